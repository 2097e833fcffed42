"""Which device and which arithmetic to compute with."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from nst_model.errors import DeviceUnavailable
from nst_model.options import Precision

CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")

CUDA_OVERHEAD = 1 / 16
"""Part of a GPU's memory that is left to its driver, to CUDA's libraries and to the feature model."""

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of glibc's mallopt, from malloc.h."""


def available_devices() -> list[str]:
    """Return the devices of this machine worth computing on: every CUDA device, else Apple's GPU, else the CPU."""
    if torch.cuda.is_available():
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        return ["mps"]
    return ["cpu"]


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`. Raises DeviceUnavailable."""
    if name == "auto":
        return torch.device(available_devices()[0])
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceUnavailable(f"{name!r} is no device; use auto, cpu, mps, cuda or cuda:N") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceUnavailable(f"{name} is not here: PyTorch sees {count} CUDA devices on this machine")
        return torch.device("cuda", device.index or 0)
    if device.type not in ("cpu", "cuda", "mps") or (device.type != "cuda" and device.index is not None):
        raise DeviceUnavailable(f"{name!r} cannot be used; use auto, cpu, mps, cuda or cuda:N")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceUnavailable("mps is not here: PyTorch sees no Apple GPU on this machine")
    return device


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """Return what AUTO stands for on `device`: BF16 where the processor multiplies bf16 faster than fp32, else FP32."""
    if precision is not Precision.AUTO:
        return precision
    return Precision.BF16 if _fast_bf16(device) else Precision.FP32


def memory_bytes(device: torch.device) -> int:
    """Return how much memory computations on a device may take: of a GPU what is free, of a CPU what there is."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What PyTorch holds of it without using it is free as well.
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return lasting_memory_bytes(device)


def lasting_memory_bytes(device: torch.device) -> int:
    """Return how much memory computations on a device may take when nothing else does: the same at any time."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return int(total * (1 - CUDA_OVERHEAD))
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        physical = min(physical, int(CONTAINER_LIMIT.read_text()))
    return physical


def reuse_memory() -> None:
    """Let this process keep the memory that it frees, for good: for one that computes and does nothing else.

    The GNU C library gives blocks of more than 32 MiB back to the system as soon as they are freed, and the next one is
    filled with zeros page by page. At 1024 px that is a seventh of an iteration on a CPU. Elsewhere this does nothing.
    """
    with suppress(AttributeError, OSError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        # Threads to come share one heap: what is free at the end of another is given back only below that threshold.
        mallopt(M_ARENA_MAX, 1)


def return_memory() -> None:
    """Give what this process has kept by `reuse_memory` back to the system, where it is free."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def deterministic() -> Iterator[None]:
    """Compute by repeatable algorithms only, within the block: on a GPU sums are not formed in the same order else."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        # Not is_supported, which is true wherever bf16 can be emulated.
        instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in instructions)
    return False
