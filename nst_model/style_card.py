"""What a style file says of itself, and which runs it can serve. Free of torch."""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nst_model.artifact import FORMAT_VERSION, producer
from nst_model.errors import InvalidArtifact, InvalidOption
from nst_model.models import CARDS, model_card
from nst_model.options import MARGIN_PX, MOMENTS, Color, Init, Padding, Pooling, Precision, StylizeOptions, relative
from nst_model.scales import MIN_EDGE_PX

STYLE_SUFFIX = ".style.safetensors"

MAX_SIZES = 32
"""Of a style file; coarse-to-fine from 16 to 4096 px there are 17."""


def is_line(text: str) -> bool:
    """Return whether a text has no control characters, line breaks or halves of characters."""
    return not any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in text)


@dataclass(frozen=True)
class StyleSource:
    """An image that a style was made of: the SHA-256 of its file, and its share; the shares sum to 1."""

    sha256: str
    share: float


@dataclass(frozen=True, kw_only=True)
class StyleCard:
    """What there is in a style file.

    Attributes:
        display_name: of the style.
        model: name of the feature model.
        weights_sha256: of the file that the model's weights were published in.
        pooling: of the model.
        padding: of the model; with MIRROR the images had a margin of 16 px.
        precision: the arithmetic that the moments were computed with.
        sizes_px: longer edges that the style's images were brought to, ascending.
        layers: whose moments there are, from the image upwards.
        images: what the style was made of.
    """

    display_name: str
    model: str
    weights_sha256: str
    pooling: Pooling
    padding: Padding
    precision: Precision
    sizes_px: tuple[int, ...]
    layers: tuple[str, ...]
    images: tuple[StyleSource, ...]

    def description(self) -> dict[str, Any]:
        """Return what the file says of itself; `of` takes it back."""
        card = model_card(self.model)
        return {
            "format_version": FORMAT_VERSION,
            "kind": "style",
            "format": "safetensors",
            **producer(),
            "display_name": self.display_name,
            "model": self.model,
            "model_display_name": card.display_name,
            "license": card.license,
            "weights_sha256": self.weights_sha256,
            "architecture": card.architecture.name,
            "pooling": self.pooling.value,
            "padding": self.padding.value,
            "margin_px": MARGIN_PX if self.padding is Padding.MIRROR else 0,
            "precision": self.precision.value,
            "sizes_px": list(self.sizes_px),
            "layers": list(self.layers),
            "images": [{"sha256": image.sha256, "share": image.share} for image in self.images],
        }

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> StyleCard:
        """Return the card of a file with that description. Raises InvalidArtifact if it is not a style's."""
        if description.get("kind") != "style":
            raise InvalidArtifact(f"the file is no style but a {description.get('kind')}")
        try:
            card = cls(
                display_name=str(description["display_name"]),
                model=str(description["model"]),
                weights_sha256=str(description["weights_sha256"]),
                pooling=Pooling(description["pooling"]),
                padding=Padding(description["padding"]),
                precision=Precision(description["precision"]),
                sizes_px=tuple(int(size) for size in description["sizes_px"]),
                layers=tuple(str(layer) for layer in description["layers"]),
                images=tuple(StyleSource(str(i["sha256"]), float(i["share"])) for i in description["images"]),
            )
            card._check_values()
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise InvalidArtifact(f"the style file's description lacks or has wrong: {error}") from None
        return card

    def _check_values(self) -> None:
        """Raise ValueError unless everything in the card is such as a style file can have."""
        sizes_px, named = self.sizes_px, (self.weights_sha256, *(image.sha256 for image in self.images))
        shares = [image.share for image in self.images]
        # Of another model's layers nothing is known; no run takes the file.
        layers = CARDS[self.model].architecture.layers if self.model in CARDS else self.layers
        for right, what in (
            (0 < len(sizes_px) <= MAX_SIZES, f"sizes_px must be 1 to {MAX_SIZES}, not {len(sizes_px)}"),
            (sizes_px[:1] >= (MIN_EDGE_PX,), f"sizes_px must be at least {MIN_EDGE_PX}, not {sizes_px[:1]}"),
            (all(a < b for a, b in itertools.pairwise(sizes_px)), "sizes_px must ascend"),
            (self.layers, "layers must name one at least"),
            (
                self.layers == tuple(layer for layer in layers if layer in self.layers),
                f"layers must be {self.model}'s, each once, from the image upwards, not {', '.join(self.layers)}",
            ),
            (all(re.fullmatch("[0-9a-f]{64}", text) for text in named), "sha256 must have 64 hexadecimal digits"),
            (
                all(0 <= share <= 1 for share in shares) and abs(math.fsum(shares) - 1) < 1e-6,
                f"shares must be 0 to 1 and sum to 1, not {', '.join(map(str, shares))}",
            ),
            (is_line(self.display_name), f"display_name must be one line of text, not {self.display_name!r}"),
        ):
            if not right:
                raise ValueError(what)

    def check(
        self, options: StylizeOptions, *, model: str, weights_sha256: str | None, sizes_px: Iterable[int]
    ) -> None:
        """Raise InvalidOption, which names what the file has, unless it can serve a run.

        Args:
            options: of the run.
            model: name of the run's feature model.
            weights_sha256: of that model, None if it isn't known yet.
            sizes_px: longer edges of the style at each scale of the run.
        """
        if options.style_loss not in MOMENTS:
            there = ", ".join(sorted(MOMENTS))
            raise InvalidOption("style_loss", f"must be one of {there} for a style file, not {options.style_loss}")
        for name, picture_free in (
            ("color", options.color is Color.STYLE),
            ("init", options.init is not Init.STYLE_STATISTICS),
        ):
            if not picture_free:
                raise InvalidOption(
                    name, f"{getattr(options, name)} needs the style's picture, and a style file has only its moments"
                )
        if model != self.model:
            raise InvalidOption("model", f"must be {self.model}, which the style file was made with, not {model}")
        if weights_sha256 not in (None, self.weights_sha256):
            raise InvalidOption(
                "model",
                f"{model} has weights {weights_sha256} here, and the style file was made with {self.weights_sha256}",
            )
        for name, own in (("pooling", self.pooling), ("padding", self.padding)):
            if getattr(options, name) is not own:
                raise InvalidOption(name, f"must be {own}, as in the style file, not {getattr(options, name)}")
        for layer in relative(options.style_layers):
            if layer not in self.layers:
                raise InvalidOption(
                    f"style_layers[{layer}]", f"is not in the style file, which has {', '.join(self.layers)}"
                )
        for size_px in sizes_px:
            if size_px not in self.sizes_px:
                there = ", ".join(map(str, self.sizes_px))
                raise InvalidOption("size_px", f"needs the style at {size_px} px; the style file has it at {there} px")
