"""What every study needs: pictures to work on, a feature model, losses as numbers, and pictures made by them.

Pictures are (3, H, W), RGB, fp32, in [0, 1].
"""

from __future__ import annotations

import importlib.util
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nst_model import ContentLoss, FeatureModel, Style, StyleLoss, StylizeOptions, from_pixels, stylize
from nst_model.losses import CONTENT_LOSSES, POSITIONED, STYLE_LOSSES, style_targets
from nst_model.margin import mirrored
from nst_model.options import relative
from nst_model.stylization import of_size, size_of

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
STYLES = ("strokes", "glass", "waves", "mosaic")
PHOTOS = {"cat": "chelsea.png", "astronaut": "astronaut.png", "coffee": "coffee.png", "rocket": "rocket.jpg"}
STYLE_LOSS_NAMES = tuple(str(loss) for loss in StyleLoss)
CONTENT_LOSS_NAMES = tuple(str(loss) for loss in ContentLoss)

Features = Mapping[str, Tensor]
"""Layer → features (1, C, H, W)."""

Loss = Callable[[Features], Tensor]
"""Features of a picture → how far they are from what they are compared with, a scalar."""


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
        self._made: dict[tuple[str, str, str], Tensor] = {}
        self._style_weights: dict[tuple[str, str], dict[str, float]] = {}

    def style(self, name: str, scale: float = 1.0) -> Tensor:
        """Return a style picture whose longer edge is `scale` of the results'."""
        return scaled(self._large_styles[name], round(self.size_px * scale))

    def options(self, **given: Any) -> StylizeOptions:
        """Return the options of the preset `fine`, but for the lab's size and iterations and those `given`."""
        return StylizeOptions.of("fine", **{"size_px": self.size_px, "iterations": self.iterations, **given})

    def features(self, picture: Tensor, margin_px: int = 0) -> dict[str, Tensor]:
        """Return the features of a picture at every layer that the preset looks at. Gradients pass through.

        Measures see the picture as it is; what is weighed for a run sees it with the run's margin.
        """
        seen = mirrored(picture.to(self.model.device), margin_px)[None]
        found: dict[str, Tensor] = self.model.trunk(self.options())(seen)
        return found

    @property
    def _margin_px(self) -> int:
        return self.options().margin_px

    def style_weights(self, photo: str, style: str) -> dict[str, float]:
        """Return style loss → the weight with which it pulls as hard at the photo as Wasserstein does with weight 1.

        How hard is the norm of the gradient of the style term alone, with respect to the picture.
        """
        if (photo, style) not in self._style_weights:
            picture = self.styles[style]
            stretched = of_size(picture, self.photos[photo].shape[1:])
            losses: dict[str, Loss] = {}
            with torch.no_grad():
                for name in STYLE_LOSS_NAMES:
                    seen = self.features(stretched if name in POSITIONED else picture, self._margin_px)
                    losses |= style_losses(seen, [name])
            pulls = {name: self._pull(loss, self.photos[photo]) for name, loss in losses.items()}
            self._style_weights[photo, style] = ratios(StyleLoss.WASSERSTEIN, pulls)
        return self._style_weights[photo, style]

    def content_weights(self, photo: str, picture: Tensor) -> dict[str, float]:
        """Return content loss → the weight with which it pulls as hard at `picture` as squared error does with 1."""
        with torch.no_grad():
            losses = content_losses(self.features(self.photos[photo], self._margin_px))
        pulls = {name: self._pull(loss, picture) for name, loss in losses.items()}
        return ratios(ContentLoss.SQUARED_ERROR, pulls)

    def _pull(self, loss: Loss, picture: Tensor) -> float:
        image = picture.clone().requires_grad_(True)
        return float(torch.autograd.grad(loss(self.features(image, self._margin_px)), image)[0].norm())

    def picture(self, content: str, style: str, **given: Any) -> Tensor:
        """Return what the preset `fine` with the options `given` makes of a photo, or of gray in a style's shape.

        The same request is answered once.
        """
        options = self.options(**given)
        key = (content, style, repr(options))
        if key not in self._made:
            print(f"  {content} + {style} {given}", file=sys.stderr, flush=True)
            gray = torch.full_like(self.styles[style], 0.5)
            photo = self.photos.get(content, gray)
            self._made[key] = self.make(photo, self.style(style, options.style_scale), options)
        return self._made[key]

    def make(self, content: Tensor, style: Tensor, options: StylizeOptions) -> Tensor:
        """Return the last picture of a stylization, clipped."""
        (last,) = deque(stylize(self.model, content, [Style(style)], options), maxlen=1)
        return last.picture.clamp(0, 1).cpu()


def style_losses(style: Features, names: Sequence[str] = STYLE_LOSS_NAMES) -> dict[str, Loss]:
    """Return style loss → how far a picture's features are from a style's, over the preset's layers."""
    return {name: _style_loss(StyleLoss(name), style) for name in names}


def _style_loss(kind: StyleLoss, style: Features) -> Loss:
    layers = relative(StylizeOptions().style_layers)
    at_layers = {layer: STYLE_LOSSES[kind](style_targets(style[layer].detach(), kind)) for layer in layers}

    def loss(here: Features) -> Tensor:
        total = torch.zeros(())
        for layer, weight in layers.items():
            total = total + weight * _followed(at_layers[layer], here[layer]).cpu()
        return total

    return loss


def _followed(module: nn.Module, features: Tensor, *targets: Tensor) -> Tensor:
    """Return a loss of features as autograd can follow it, from the loss and the gradient that the module returns."""
    with torch.enable_grad():
        value, gradient = module(features.detach(), torch.ones(()), *targets)
    loss: Tensor = value + (gradient * (features - features.detach())).sum()
    return loss


def content_losses(content: Features) -> dict[str, Loss]:
    """Return content loss → how far a picture's features are from the content's, over the preset's layers."""
    return {name: _content_loss(ContentLoss(name), content) for name in CONTENT_LOSS_NAMES}


def _content_loss(kind: ContentLoss, content: Features) -> Loss:
    layers, comparison = relative(StylizeOptions().content_layers), CONTENT_LOSSES[kind]()

    def loss(here: Features) -> Tensor:
        total = torch.zeros(())
        for layer, weight in layers.items():
            total = total + weight * _followed(comparison, here[layer], content[layer]).cpu()
        return total

    return loss


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
