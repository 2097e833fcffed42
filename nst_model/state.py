"""The state of a run between two iterates, and its form on disk.

A file is the SHA-256 of the rest (32 bytes), then a safetensors file whose metadata holds the numbers as JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from nst_model.errors import DamagedState

FORMAT = "4"
"""Changes whenever a run could not go on from what an older version has written."""


@dataclass(frozen=True)
class State:
    """What a run needs to go on exactly where it was: tensors by name, and numbers that JSON can hold."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def to(self, device: torch.device | str) -> State:
        """Return the state with its tensors on a device."""
        return State({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.values)

    def to_bytes(self) -> bytes:
        """Return the file that `from_bytes` reads."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        # Tensors that share memory, as the newest picture and the optimizer's point may, are refused.
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        # One entry only: safetensors writes several in any order.
        body = safetensors.torch.save(tensors, {"state": json.dumps({"format": FORMAT, "values": self.values})})
        return hashlib.sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes) -> State:
        """Return the state, on the CPU, of a file that `to_bytes` made. Raises DamagedState."""
        digest, body = data[:32], data[32:]
        if hashlib.sha256(body).digest() != digest:
            raise DamagedState("the state of the run is damaged: its hash is wrong")
        length = int.from_bytes(body[:8], "little")
        state = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["state"])
        if state["format"] != FORMAT:
            raise DamagedState(f"the state of the run has format {state['format']}; this version reads {FORMAT}")
        return cls(safetensors.torch.load(body), state["values"])
