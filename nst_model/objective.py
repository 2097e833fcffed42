"""The objective of one stylization, as a module that TorchScript compiles: trunk, style targets and losses in one.

Shapes: C channels, H and W positions of a layer, R regions. A picture is (1, 3, H, W), RGB, fp32, nominally in [0, 1].
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_model.losses import CONTENT_LOSSES, STYLE_LOSSES, Targets, differentiable
from nst_model.network import Trunk, replicated
from nst_model.options import StylizeOptions, TvNorm, relative
from nst_model.variation import neighbours, neighbours_slope


class Losses(NamedTuple):
    """The objective and what it is made of.

    Attributes:
        total: content_weight · content + style_weight · Σ weight · style + tv_weight · variation +
            laplacian_weight · laplacian, a scalar.
        content: the content loss before its weight, a scalar.
        variation: the total variation before its weight, a scalar.
        laplacian: the Laplacian loss before its weight, a scalar; 0 if its weight is.
        style: each style layer's loss before any weight, (L,), in the order of `Objective.style_layers`.
    """

    total: Tensor
    content: Tensor
    variation: Tensor
    laplacian: Tensor
    style: Tensor


def total_variation(image: Tensor, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """Return the mean squared difference of neighbouring pixels of a picture (1, 3, H, W), and its gradient.

    Each pixel has eight neighbours. Diagonal pairs, the last two of `neighbours`, count half, being twice as far apart
    squared (the nine-point stencil). With `absolute`, the mean of the differences' magnitudes, smooth below a
    thousandth of the picture's range.
    """
    values: list[Tensor] = []
    slopes: list[Tensor] = []
    for number, difference in enumerate(neighbours(image)):
        share = (1.0 if number < 2 else 0.5) / 3
        if absolute:
            magnitude = (difference.square() + 1e-6).sqrt()
            values.append(share * (magnitude - 1e-3).mean())
            slopes.append(difference / magnitude * (share / difference.numel()))
        else:
            values.append(share * difference.square().mean())
            slopes.append(difference * (2 * share / difference.numel()))
    return torch.stack(values).sum(), neighbours_slope(slopes)


def outlines(image: Tensor) -> Tensor:
    """Return the Laplacian of a picture (1, 3, H, W) averaged over 4×4 pixels (Li et al., 2017), each channel apart."""
    small = replicated(F.avg_pool2d(image, 4))
    centre = small[:, :, 1:-1, 1:-1]
    beside = small[:, :, 1:-1, 2:] + small[:, :, 1:-1, :-2]
    return small[:, :, 2:, 1:-1] + small[:, :, :-2, 1:-1] + beside - 4 * centre


class LayerLoss(nn.Module):
    """The style losses at one layer, one for each region, and the layer's relative weight."""

    weight: Tensor
    shares: Tensor

    def __init__(self, losses: Sequence[nn.Module], shares: Sequence[float], weight: float) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.register_buffer("shares", torch.tensor(shares))
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, features: Tensor, scale: Tensor, regions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) before its weight, a scalar, and its gradient times `scale`.

        `regions` are (R, H·W).
        """
        total, gradient = torch.zeros_like(scale), scale  # the latter for TorchScript: there is a region
        for region, loss in enumerate(self.losses):
            share = self.shares[region]
            value, towards = loss(features, scale * share, None if regions is None else regions[region])
            total = total + share * value
            gradient = towards if region == 0 else gradient.add_(towards)
        return total, gradient


class LayerComparison(nn.Module):
    """A content loss at one layer, and the layer's relative weight."""

    weight: Tensor

    def __init__(self, loss: nn.Module, weight: float) -> None:
        super().__init__()
        self.loss = loss
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, features: Tensor, scale: Tensor, content: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of features (1, C, H, W) against the content's, before its weight, and its gradient."""
        value, gradient = self.loss(features, scale, content)
        return value, gradient


class Objective(nn.Module):
    """What is minimized: a function of the picture, of the content's features and of where the regions are.

    The style's targets are buffers: they are saved with the module, and those made of moments serve any picture size.
    So are the weights, as scalars: nothing that may differ between jobs of one shape is a number in the code. What has
    the size of the picture is an argument: the content's targets, and the regions.

    Args:
        trunk: the feature model; must tap every layer that the options name.
        styles: for each region, layer → what the style loss keeps of the style; see `losses.style_targets`.
        options: which losses, layers and weights.
        shares: how much each region counts; they sum to 1 if every pixel belongs to some region.
    """

    content_weight: Tensor
    style_weight: Tensor
    tv_weight: Tensor
    laplacian_weight: Tensor
    absolute_tv: Final[bool]
    outlined: Final[bool]
    style_layers: Final[list[str]]
    content_layers: Final[list[str]]

    def __init__(
        self,
        trunk: Trunk,
        styles: Sequence[Mapping[str, Targets]],
        options: StylizeOptions,
        shares: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.trunk = trunk
        for name in ("style_weight", "content_weight", "tv_weight", "laplacian_weight"):
            self.register_buffer(name, torch.tensor(float(getattr(options, name))))
        self.absolute_tv = options.tv_norm is TvNorm.L1
        self.outlined = options.laplacian_weight > 0
        style, content = relative(options.style_layers), relative(options.content_layers)
        self.style_layers = list(style)
        self.content_layers = list(content)
        style_loss, content_loss = STYLE_LOSSES[options.style_loss], CONTENT_LOSSES[options.content_loss]
        self.style = nn.ModuleDict(
            {
                name: LayerLoss([style_loss(targets[name]) for targets in styles], shares, weight)
                for name, weight in style.items()
            }
        )
        self.content = nn.ModuleDict({name: LayerComparison(content_loss(), content[name]) for name in content})
        self.to(trunk.mean.device)

    def forward(self, image: Tensor, content: dict[str, Tensor], regions: dict[str, Tensor] | None = None) -> Losses:
        """Return the losses of a picture (1, 3, H, W).

        Args:
            image: the picture.
            content: `content_targets` of the content image, of the picture's size.
            regions: layer → weights of the positions in each region, (R, H·W), each row summing to 1; None for one
                region everywhere.
        """
        return self.loss_and_gradient(image, content, regions)[0]

    @torch.jit.export
    def loss_and_gradient(
        self, image: Tensor, content: dict[str, Tensor], regions: dict[str, Tensor] | None = None
    ) -> tuple[Losses, Tensor]:
        """Return the losses of a picture and the total's gradient, (1, 3, H, W). One closure of the optimizer.

        Does not work under the caller's `torch.no_grad`.
        """
        image = image.detach()
        return self._evaluate(image, self.trunk.ascend(image), content, regions)

    @torch.jit.export
    def begin(
        self, content: Tensor, regions: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], Losses, Tensor]:
        """Return `content_targets` of the content image, and its own `loss_and_gradient`, by one pass of the trunk.

        For an optimization that starts from the content, (1, 3, H, W).
        """
        image = content.detach()
        ascent = self.trunk.ascend(image)
        targets = self._targets(image, ascent)
        losses, gradient = self._evaluate(image, ascent, targets, regions)
        return targets, losses, gradient

    @torch.jit.export
    def content_targets(self, image: Tensor) -> dict[str, Tensor]:
        """Return what the picture is compared with, of the content image: layer → features (1, C, H, W), fp32.

        With a Laplacian weight also `outlines` → `outlines` of the image.
        """
        image = image.detach()
        return self._targets(image, self.trunk.ascend(image))

    def _targets(self, image: Tensor, ascent: list[Tensor]) -> dict[str, Tensor]:
        features = self.trunk.tapped(ascent)
        targets = {layer: features[layer].to(image.dtype) for layer in self.content_layers}
        if self.outlined:
            targets["outlines"] = outlines(image)
        return targets

    def _evaluate(
        self, image: Tensor, ascent: list[Tensor], content: dict[str, Tensor], regions: dict[str, Tensor] | None
    ) -> tuple[Losses, Tensor]:
        """Return the losses and the gradient of a picture, given what `Trunk.ascend` made of it."""
        features = self.trunk.tapped(ascent)
        towards: dict[str, Tensor] = {}
        content_loss = torch.zeros_like(self.content_weight)
        for layer, comparison in self.content.items():
            scale = self.content_weight * comparison.weight  # type: ignore[operator]
            value, towards[layer] = comparison(features[layer], scale, content[layer])
            content_loss = content_loss + comparison.weight * value
        style_loss = torch.zeros_like(self.style_weight)
        style_losses: list[Tensor] = []
        for layer, loss in self.style.items():
            scale = self.style_weight * loss.weight  # type: ignore[operator]
            value, gradient = loss(features[layer], scale, None if regions is None else regions[layer])
            towards[layer] = towards[layer].add_(gradient) if layer in towards else gradient
            style_losses.append(value)
            style_loss = style_loss + loss.weight * value
        variation, laplacian, smoothing = self._smoothness(image, content)
        total = (
            self.content_weight * content_loss
            + self.style_weight * style_loss
            + self.tv_weight * variation
            + self.laplacian_weight * laplacian
        )
        losses = Losses(total, content_loss, variation, laplacian, torch.stack(style_losses))
        return losses, self.trunk.descend(ascent, towards).add_(smoothing)

    def _smoothness(self, image: Tensor, content: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the total variation, the Laplacian loss, and the gradient of both, weighted, (1, 3, H, W)."""
        variation, slope = total_variation(image, self.absolute_tv)
        smoothing = self.tv_weight * slope
        laplacian = torch.zeros_like(self.laplacian_weight)
        if self.outlined:
            leaf = differentiable(image)
            difference = F.mse_loss(outlines(leaf), content["outlines"])
            laplacian = difference.detach()
            gradient = torch.autograd.grad([self.laplacian_weight * difference], [leaf])[0]
            assert gradient is not None
            smoothing = smoothing + gradient
        return variation, laplacian, smoothing


def interpreted() -> AbstractContextManager[None]:
    """Return a context in which scripted modules run as they are written, without being compiled anew for each size.

    The recompiled graph sums gradients in another order, so one rounding tells it from the eager module; and a call
    out of this context compiles for those within, too. The kernels, which take the time, are the same.
    """
    context: AbstractContextManager[None] = torch.jit.optimized_execution(False)  # type: ignore[attr-defined]
    return context
