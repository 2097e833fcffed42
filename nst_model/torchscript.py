"""TorchScript: modules compiled for runtimes without Python.

PyTorch has deprecated TorchScript; it is what loads in C++ and on a phone without anything else, so it is still
written here. ARCHITECTURE.md says more.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zipfile

import torch
from torch import nn


class deprecation_accepted(warnings.catch_warnings):  # noqa: N801 - reads as a statement
    """A context in which TorchScript does not warn that it is deprecated."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")


def script(module: nn.Module) -> torch.jit.ScriptModule:
    """Return `module` compiled; it shares the original's tensors."""
    with deprecation_accepted():
        return torch.jit.script(module)


def load(data: bytes, device: torch.device | str = "cpu") -> torch.jit.ScriptModule:
    """Return the module in a TorchScript file, on a device."""
    with deprecation_accepted():
        module: torch.jit.ScriptModule = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
    return module


def members(module: nn.Module) -> dict[str, bytes]:
    """Return what a file of the compiled module has to contain, by name in the archive.

    The same for the same module, whatever else was compiled in the process. Without the `debug_pkl` files, which hold
    paths of source files. The module's types get other names.
    """
    _name_by_structure(module)
    buffer = io.BytesIO()  # torch's writer reports a full disk by ending the process
    with deprecation_accepted():
        torch.jit.save(script(module), buffer)
    with zipfile.ZipFile(buffer) as archive:
        found = {path.partition("/")[2]: archive.read(path) for path in archive.namelist()}
    assert not any("___torch_mangle" in name for name in found), list(found)
    return {name: data for name, data in found.items() if not name.endswith((".debug_pkl", ".data/serialization_id"))}


def _name_by_structure(module: nn.Module) -> None:
    """Give the type of every module that has modules in it a name that depends on what they are.

    TorchScript makes a type of its own for each such structure, and numbers those of the same name as they come.
    """
    for child in module.children():
        _name_by_structure(child)
    parts = tuple((name, type(child).__name__) for name, child in module.named_children())
    if parts:
        kind = type(module)
        name = f"{kind.__name__}_{hashlib.sha256(repr(parts).encode()).hexdigest()[:8]}"
        if (kind, name) not in _named:
            _named[kind, name] = type(name, (kind,), {"__module__": kind.__module__})
        module.__class__ = _named[kind, name]


_named: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}
"""Types made by `_name_by_structure`: TorchScript knows a type by its identity."""
