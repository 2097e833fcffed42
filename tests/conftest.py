"""Shared by all tests: a tiny feature model with the architecture of VGG-16, and small pictures."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from nst_model.architecture import VGG16, Architecture

# The networks of most tests are tiny: threads would cost more than they gain, above all on a machine with other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# A test run in the background of a shell ignores SIGINT, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


TINY_WIDTHS = (4, 6, 8, 8, 8)
"""Channels in each block of the tests' VGG-16."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the tests' own options."""
    parser.addoption("--soak-minutes", type=float, default=2, help="how long tests/faults/test_soak.py goes on")


def random_state(architecture: Architecture, widths: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a state dict with torchvision's key names and `widths[block - 1]` channels in each block."""
    random = torch.Generator().manual_seed(seed)
    state, channels = {}, 3
    for convolution in architecture.convolutions:
        width = widths[convolution.block - 1]
        spread = (2 / (9 * channels)) ** 0.5  # He et al. (2015): keeps activations alive through the ReLUs
        state[f"features.{convolution.index}.weight"] = torch.randn(width, channels, 3, 3, generator=random) * spread
        state[f"features.{convolution.index}.bias"] = torch.randn(width, generator=random) * 0.05
        channels = width
    return state


USER_CACHE = os.environ.get("NST_CACHE_DIR")


@contextlib.contextmanager
def user_cache() -> Iterator[None]:
    """Let real weights be read from the user's own cache, and fetched into it if they are not there."""
    with pytest.MonkeyPatch.context() as patch:
        if USER_CACHE is None:
            patch.delenv("NST_CACHE_DIR")
        else:
            patch.setenv("NST_CACHE_DIR", USER_CACHE)
        yield


@pytest.fixture(scope="module")
def real_cache() -> Iterator[None]:
    """The user's own cache, for tests with real weights."""
    with user_cache():
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests that need real weights say so; nothing else reads or fills the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NST_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with VGG-16's layers and few channels: fast, and nothing like a trained network."""
    file = tmp_path_factory.mktemp("weights") / "tiny-vgg16.safetensors"
    safetensors.torch.save_file(random_state(VGG16, TINY_WIDTHS), file)
    return file


def picture_bytes(width: int, height: int, *, seed: int = 0, mode: str = "RGB", format: str = "PNG") -> bytes:
    """Return an image file with smooth random colours."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture(scope="session")
def photo() -> bytes:
    """A landscape PNG, 96×64 px."""
    return picture_bytes(96, 64, seed=1)


@pytest.fixture(scope="session")
def painting() -> bytes:
    """A portrait PNG, 64×80 px."""
    return picture_bytes(64, 80, seed=2)
