"""What every study needs: pictures to work on, a feature model, losses as numbers, and pictures made by them.

Pictures are (3, H, W), RGB, fp32, in [0, 1].
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nst_model import ContentLoss, FeatureModel, Style, StyleLoss, StylizeOptions, from_pixels, stylize
from nst_model.losses import CONTENT_LOSSES, STYLE_LOSSES, style_targets
from nst_model.options import relative
from nst_model.stylization import of_size, size_of

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
STYLES = ("strokes", "glass", "waves", "mosaic")
PHOTOS = {"cat": "chelsea.png", "astronaut": "astronaut.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
STYLE_LOSS_NAMES = tuple(str(loss) for loss in StyleLoss)
CONTENT_LOSS_NAMES = tuple(str(loss) for loss in ContentLoss)

Features = Mapping[str, Tensor]
"""Layer → features (1, C, H, W)."""


class Lab:
    """A feature model and pictures of one size; remembers the pictures it has made.

    Args:
        model: the feature model.
        size_px: longer edge of photos, styles and results.
        iterations: at each scale.
        styles: name → picture; those in samples/styles if None.
        photos: name → picture; some of scikit-image's if None.
    """

    def __init__(
        self,
        model: FeatureModel,
        size_px: int,
        iterations: int,
        styles: Mapping[str, Tensor] | None = None,
        photos: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.size_px = size_px
        self.iterations = iterations
        self._large_styles = styles or {name: read(SAMPLES / "styles" / f"{name}.jpg") for name in STYLES}
        large_photos = photos or {name: read(skimage_photo(file)) for name, file in PHOTOS.items()}
        self.photos = {name: scaled(photo, size_px) for name, photo in large_photos.items()}
        self.styles = {name: self.style(name) for name in self._large_styles}
        self._made: dict[Any, Tensor] = {}

    def style(self, name: str, scale: float = 1.0) -> Tensor:
        """Return a style picture whose longer edge is `scale` of the results'."""
        return scaled(self._large_styles[name], round(self.size_px * scale))

    def options(self, **given: Any) -> StylizeOptions:
        """Return the options of the preset `fine`, but for the lab's size and iterations and those `given`."""
        return StylizeOptions.of("fine", **{"size_px": self.size_px, "iterations": self.iterations, **given})

    def features(self, picture: Tensor) -> dict[str, Tensor]:
        """Return the features of a picture at every layer that the preset looks at. Gradients pass through."""
        found: dict[str, Tensor] = self.model.trunk(self.options())(picture.to(self.model.device)[None])
        return found

    def style_weights(self, photo: str, style: str) -> dict[str, float]:
        """Return style loss → the weight with which it pulls as hard at the photo as Wasserstein does with weight 1.

        How hard is the norm of the gradient of the style term alone, with respect to the picture.
        """
        there = self.features(self.styles[style])

        def pull(name: str) -> float:
            image = self.photos[photo].clone().requires_grad_(True)
            gradient = torch.autograd.grad(style_loss(name, self.features(image), there), image)[0]
            return float(gradient.norm())

        return ratios(StyleLoss.WASSERSTEIN, {name: pull(name) for name in STYLE_LOSS_NAMES})

    def content_weights(self, photo: str, picture: Tensor) -> dict[str, float]:
        """Return content loss → the weight with which it pulls as hard at `picture` as squared error does with 1."""
        with torch.no_grad():
            there = self.features(self.photos[photo])

        def pull(name: str) -> float:
            image = picture.clone().requires_grad_(True)
            return float(torch.autograd.grad(content_loss(name, self.features(image), there), image)[0].norm())

        return ratios(ContentLoss.SQUARED_ERROR, {name: pull(name) for name in CONTENT_LOSS_NAMES})

    def picture(self, content: str, style: str, **given: Any) -> Tensor:
        """Return what the preset `fine` with the options `given` makes of a photo, or of a style's frame.

        The same request is answered once.
        """
        options = self.options(**given)
        key = (content, style, *sorted((name, str(value)) for name, value in given.items()))
        if key not in self._made:
            print(f"  {content} + {style} {given}", file=sys.stderr, flush=True)
            photo = self.photos[content] if content in self.photos else self.styles[content]
            self._made[key] = self.make(photo, self.style(style, options.style_scale), options)
        return self._made[key]

    def make(self, content: Tensor, style: Tensor, options: StylizeOptions) -> Tensor:
        """Return the last picture of a stylization, clipped."""
        last = None
        for last in stylize(self.model, content, [Style(style)], options):
            pass
        assert last is not None
        return last.picture.clamp(0, 1).cpu()


def style_loss(name: str, here: Features, style: Features, options: StylizeOptions | None = None) -> Tensor:
    """Return one of the style losses of a picture's features against a style's, over the preset's layers."""
    kind = StyleLoss(name)
    total = torch.zeros(())
    for layer, weight in relative((options or StylizeOptions()).style_layers).items():
        targets = style_targets(style[layer].detach(), kind)
        total = total + weight * STYLE_LOSSES[kind](targets)(here[layer]).cpu()
    return total


def content_loss(name: str, here: Features, content: Features) -> Tensor:
    """Return one of the content losses of a picture's features against the content's, over the preset's layers."""
    comparison = CONTENT_LOSSES[ContentLoss(name)]()
    total = torch.zeros(())
    for layer, weight in relative(StylizeOptions().content_layers).items():
        total = total + weight * comparison(here[layer], content[layer].detach()).cpu()
    return total


def ratios(reference: str, values: Mapping[str, float]) -> dict[str, float]:
    """Return name → reference's value divided by its own."""
    return {name: values[reference] / value for name, value in values.items()}


def scaled(picture: Tensor, longer_edge_px: int) -> Tensor:
    """Return a picture scaled to a longer edge, pixels."""
    return of_size(picture, size_of(picture, longer_edge_px))


def square(picture: Tensor) -> Tensor:
    """Return the central square of a picture."""
    height, width = picture.shape[1:]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return picture[:, top : top + edge, left : left + edge]


def luminance(picture: Tensor) -> np.ndarray:
    """Return the luma (H, W) of a picture, ITU-R BT.601."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    return torch.einsum("c,chw->hw", weights, picture.cpu()).double().numpy()


def read(file: Path) -> Tensor:
    """Return the picture of an image file."""
    with Image.open(file) as image:
        return from_pixels(np.asarray(image.convert("RGB")))


def skimage_photo(name: str) -> Path:
    """Return a photograph that scikit-image ships."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        sys.exit("studies: scikit-image is missing; install with: pip install -e '.[studies]'")
    return Path(found.origin).parent / "data" / name
