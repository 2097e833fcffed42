"""Gatys, Ecker and Bethge (2016), written out plainly in float64: what the fast implementation is held against.

Nothing is shared with it but the network's published weights and the calibration's mean activations.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.architecture import Architecture
from nst_model.options import Pooling

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(1, 3, 1, 1)


def pooled(x: Tensor, pooling: Pooling) -> Tensor:
    """Halve the resolution: the maximum, the mean or the root mean square of 2×2."""
    match pooling:
        case Pooling.MAX:
            return F.max_pool2d(x, 2)
        case Pooling.AVERAGE:
            return F.avg_pool2d(x, 2)
        case Pooling.L2:
            return (F.lp_pool2d(x, 2, 2).square() / 4 + 1e-12).sqrt()


class Textbook:
    """A VGG with torchvision's weights and preprocessing."""

    def __init__(
        self, state: Mapping[str, Tensor], architecture: Architecture, means: Mapping[Pooling, Mapping[str, float]]
    ) -> None:
        self.state = {name: value.double() for name, value in state.items()}
        self.architecture = architecture
        self.means = means

    def features(self, image: Tensor, pooling: Pooling = Pooling.MAX) -> dict[str, Tensor]:
        """Return every layer's features of image (1, 3, H, W) in [0, 1], divided by the layer's mean activation."""
        x = (image.double() - MEAN) / STD
        found = {}
        for block, count in enumerate(self.architecture.convolutions_per_block, start=1):
            if block > 1:
                x = pooled(x, pooling)
            for position in range(1, count + 1):
                index = self._index(block, position)
                x = F.relu(
                    F.conv2d(x, self.state[f"features.{index}.weight"], self.state[f"features.{index}.bias"], padding=1)
                )
                layer = f"relu{block}_{position}"
                found[layer] = x / self.means[pooling][layer]
        return found

    def gram(self, features: Tensor) -> Tensor:
        """Equation 3, divided by the number of positions: entry by entry, as a sum over positions."""
        _, channels, height, width = features.shape
        rows = features.reshape(channels, height * width)
        return torch.stack([(rows * rows[i]).sum(dim=1) for i in range(channels)]) / (height * width)

    def losses(
        self,
        image: Tensor,
        content: Tensor,
        grams: Mapping[str, Tensor],
        *,
        style_layers: Mapping[str, float],
        content_layers: Mapping[str, float],
        style_weight: float,
        content_weight: float,
        pooling: Pooling = Pooling.MAX,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return total, content and style losses; weights are divided by their sums."""
        there, here = self.features(content, pooling), self.features(image, pooling)
        content_loss = sum(
            weight / sum(content_layers.values()) * ((here[layer] - there[layer]) ** 2).mean()
            for layer, weight in content_layers.items()
        )
        style = [((self.gram(here[layer]) - grams[layer]) ** 2).mean() for layer in style_layers]
        style_loss = sum(
            weight / sum(style_layers.values()) * loss
            for weight, loss in zip(style_layers.values(), style, strict=True)
        )
        return content_weight * content_loss + style_weight * style_loss, content_loss, style

    def _index(self, block: int, position: int) -> int:
        before = sum(2 * count + 1 for count in self.architecture.convolutions_per_block[: block - 1])
        return before + 2 * (position - 1)
