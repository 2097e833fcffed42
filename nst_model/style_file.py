"""A style as a file: the moments of its features at each size, without its pictures.

A safetensors file of the tensors `{size}.{layer}.mean` (C,) and `{size}.{layer}.gram` (C, C), fp32, such as the graph
`grams` of an exported model yields, and a description (see `artifact.py`). A style of several images is stored mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from nst_model import artifact
from nst_model.artifact import Fp32
from nst_model.errors import InvalidArtifact
from nst_model.losses import Targets
from nst_model.style_card import StyleCard

MOMENTS = ("mean", "gram")


@dataclass(frozen=True)
class StyleFile:
    """What is kept of a style.

    Attributes:
        card: what it is of.
        moments: longer edge of the style in pixels → layer → `mean` (C,) and `gram` (C, C), fp32, on the CPU.
    """

    card: StyleCard
    moments: Mapping[int, Mapping[str, Targets]]

    def to_bytes(self) -> bytes:
        """Return the file that `from_bytes` reads; always the same for the same style.

        Raises InvalidArtifact if something in the card cannot be in a file.
        """
        StyleCard.of(self.card.description())
        tensors = {}
        for size_px, layers in self.moments.items():
            for layer, targets in layers.items():
                for name in MOMENTS:
                    array = targets[name].detach().cpu().numpy()
                    tensors[f"{size_px}.{layer}.{name}"] = Fp32(array.shape, array.astype("<f4").tobytes())
        return artifact.sealed_safetensors(tensors, self.card.description())

    @classmethod
    def from_bytes(cls, data: bytes) -> StyleFile:
        """Return the style of a file. Raises InvalidArtifact."""
        card = StyleCard.of(artifact.read_description(data))
        try:
            tensors = safetensors.torch.load(data)
        except SafetensorError as error:
            raise InvalidArtifact(f"the style file cannot be read: {error}") from None
        moments: dict[int, dict[str, dict[str, Tensor]]] = {}
        for size_px in card.sizes_px:
            for layer in card.layers:
                targets = {name: tensors.pop(f"{size_px}.{layer}.{name}", None) for name in MOMENTS}
                mean, gram = targets["mean"], targets["gram"]
                if mean is None or gram is None or mean.ndim != 1 or gram.shape != 2 * mean.shape:
                    raise InvalidArtifact(f"the style file lacks the moments of {layer} at {size_px} px")
                if not (mean.isfinite().all() and gram.isfinite().all()):
                    raise InvalidArtifact(f"the style file's moments of {layer} at {size_px} px are not finite")
                moments.setdefault(size_px, {})[layer] = {"mean": mean, "gram": gram}
        return cls(card, moments)
