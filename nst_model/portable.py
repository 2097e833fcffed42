"""What leaves for other runtimes: four modules of plain tensor operations, with the backward pass written out.

No runtime needs autograd for them, nor a loop, nor a shape known in advance: TorchScript compiles these modules,
`torch.export` and ONNX trace them. They agree with `nst_model.objective.Objective` for the style loss `gram`, the content
loss `squared_error` and the total variation in its norm L2, for each picture of a batch by itself.

Shapes: N batch, C channels, H and W of the picture, h and w of a layer, P = h·w. A picture is (N, 3, H, W), RGB, fp32, nominally in
[0, 1], at least 16 px each way. Features are (N, C, h, w), of mean activation 1. A *slope* is the gradient of each picture's
total, of the shape of what it is the gradient to.
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.
# What differs between stages is an attribute and no constant, so that all of them are of one type in TorchScript: names of
# types would depend on what else was compiled in the process.

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_model import network
from nst_model.network import Trunk, replicated


def folded(slope: Tensor) -> Tensor:
    """Return the slope of x (N, C, H, W), given that of `replicated(x)`: the copies' is added to the originals'."""
    slope = torch.cat((slope[:, :, :1] + slope[:, :, 1:2], slope[:, :, 2:-2], slope[:, :, -2:-1] + slope[:, :, -1:]), 2)
    left = slope[:, :, :, :1] + slope[:, :, :, 1:2]
    right = slope[:, :, :, -2:-1] + slope[:, :, :, -1:]
    return torch.cat((left, slope[:, :, :, 2:-2], right), 3)


def gram_matrices(features: Tensor) -> Tensor:
    """Return the Gram matrices of features (N, C, h, w): (N, C, C), divided by the number of positions."""
    columns = features.flatten(2)
    # The number of positions stays an integer: a float would be baked into an exported graph.
    return columns @ columns.transpose(1, 2) / columns.shape[2]


def squares(x: Tensor) -> Tensor:
    """Return the mean square of x (N, A, B, C) for each picture: (N,)."""
    # Axis by axis: onnxruntime adds one after the other, and over a hundred thousand at once would lose three digits.
    return x.square().mean(dim=3).mean(dim=2).mean(dim=1)


def squares_slope(x: Tensor) -> Tensor:
    """Return the slope of `squares` to x (N, …)."""
    return x * 2 / (x[0].numel())


def gram_slope(error: Tensor, features: Tensor) -> Tensor:
    """Return the slope of `squares(error)` to features (N, C, h, w), `error` being `gram_matrices(features)` less a constant."""
    columns = features.flatten(2)
    slope = squares_slope(error)
    slope = (slope + slope.transpose(1, 2)) / columns.shape[2]
    return (slope @ columns).reshape(features.shape)


def summed(
    image: Tensor,
    content_losses: list[Tensor],
    style_losses: list[Tensor],
    content_weights: Tensor,
    style_weights: Tensor,
    tv_weight: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return total (N,), content losses (N, layers), style losses (N, layers) and total variation (N,) of pictures.

    The losses are lists of (N,), an entry for each layer.
    """
    content, style, tv = torch.stack(content_losses, dim=1), torch.stack(style_losses, dim=1), variation(image)
    return content @ content_weights + style @ style_weights + tv_weight * tv, content, style, tv


def pool(x: Tensor, pooling: str) -> Tensor:
    """Return x (N, C, h, w) at half the resolution; an odd last row or column is left out."""
    if pooling == "average":
        return F.avg_pool2d(x, 2)
    if pooling == "l2":
        return (F.avg_pool2d(x.square(), 2) + 1e-12).sqrt()
    return F.max_pool2d(x, 2)


def spread(a: Tensor, b: Tensor, c: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """Return the quadruples that pooling made one of in their places: a b over c d, zeros in an odd last row or column.

    a to d are (N, C, h // 2, w // 2) each; what is returned has the shape of x, (N, C, h, w).
    """
    # One row and one column more than there can be, and then cut to size: how many are missing is 0 or 1, and to ask
    # which would bind an exported graph to the answer.
    a, b, c, d = F.pad(a, [0, 1, 0, 1]), F.pad(b, [0, 1, 0, 1]), F.pad(c, [0, 1, 0, 1]), F.pad(d, [0, 1, 0, 1])
    rows = torch.stack((torch.stack((a, b), dim=-1).flatten(3), torch.stack((c, d), dim=-1).flatten(3)), dim=3)
    return rows.flatten(2, 3)[:, :, : x.shape[2], : x.shape[3]]


def pool_slope(slope: Tensor, x: Tensor, pooled: Tensor, pooling: str) -> Tensor:
    """Return the slope of x (N, C, h, w), given that of `pooled`, which is `pool(x, pooling)`."""
    if pooling == "average":
        slope = slope / 4
        return spread(slope, slope, slope, slope, x)
    if pooling == "l2":
        slope = slope / (4 * pooled)
        return spread(slope, slope, slope, slope, x) * x
    # To the first of the greatest, as torch does: where a picture is flat all four are the greatest.
    rows, columns = slope.shape[2], slope.shape[3]
    zero = torch.zeros_like(slope)
    first = x[:, :, 0::2, 0::2][:, :, :rows, :columns] == pooled
    second = x[:, :, 0::2, 1::2][:, :, :rows, :columns] == pooled
    third = x[:, :, 1::2, 0::2][:, :, :rows, :columns] == pooled
    a = torch.where(first, slope, zero)
    rest = slope - a
    b = torch.where(second, rest, zero)
    rest = rest - b
    c = torch.where(third, rest, zero)
    return spread(a, b, c, rest - c, x)


def variation(image: Tensor) -> Tensor:
    """Return each picture's total variation, (N,): see `nst_model.objective.total_variation`."""
    down, across, one, other = _differences(image)
    return (squares(down) + squares(across) + 0.5 * (squares(one) + squares(other))) / 3


def variation_slope(image: Tensor) -> Tensor:
    """Return the slope of `variation` to the pictures (N, 3, H, W)."""
    down, across, one, other = _differences(image)
    down = down * 2 / (3 * down.shape[1] * down.shape[2] * down.shape[3])
    across = across * 2 / (3 * across.shape[1] * across.shape[2] * across.shape[3])
    one = one / (3 * one.shape[1] * one.shape[2] * one.shape[3])
    other = other / (3 * other.shape[1] * other.shape[2] * other.shape[3])
    slope = F.pad(down, [1, 1, 1, 0]) - F.pad(down, [1, 1, 0, 1])
    slope = slope + F.pad(across, [1, 0, 1, 1]) - F.pad(across, [0, 1, 1, 1])
    slope = slope + F.pad(one, [1, 0, 1, 0]) - F.pad(one, [0, 1, 0, 1])
    slope = slope + F.pad(other, [0, 1, 1, 0]) - F.pad(other, [1, 0, 0, 1])
    return folded(slope)


def _differences(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    padded = replicated(image)
    down = padded[:, :, 1:, 1:-1] - padded[:, :, :-1, 1:-1]
    across = padded[:, :, 1:-1, 1:] - padded[:, :, 1:-1, :-1]
    one = padded[:, :, 1:, 1:] - padded[:, :, :-1, :-1]
    other = padded[:, :, 1:, :-1] - padded[:, :, :-1, 1:]
    return down, across, one, other


class Stage(nn.Module):
    """The weights of one convolution, and whether a pooling comes before it."""

    weight: Tensor
    bias: Tensor
    pooled: bool

    def __init__(self, weight: Tensor, bias: Tensor, pooled: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.pooled = pooled


class Way(NamedTuple):
    """What the way up through a trunk leaves for the way down, a list entry for each stage.

    Attributes:
        below: what the stage was given; the features of the one before.
        halved: the same after the pooling, if the stage has one.
        features: what the stage made of it.
        weights: of its convolution.
        pooled: whether it pools.
    """

    below: list[Tensor]
    halved: list[Tensor]
    features: list[Tensor]
    weights: list[Tensor]
    pooled: list[bool]


def by_layer(layers: list[str], features: list[Tensor]) -> dict[str, Tensor]:
    """Return layer → features."""
    found: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        found[layer] = features[number]
    return found


class Ladder(nn.Module):
    """A trunk that can be climbed and, with the slopes of some layers, descended again to the picture.

    Args:
        trunk: the engine's trunk of the same weights, in fp32.
        flipping: convolve with flipped weights on the way down, in place of a transposed convolution. For ONNX: runtimes
            flip constants once, when they load the graph, and are faster so; TorchScript would flip them at each call.
    """

    mean: Tensor
    layers: list[str]
    pooling: str
    replicate: bool
    flipping: bool

    def __init__(self, trunk: Trunk, flipping: bool = False) -> None:
        super().__init__()
        stages = cast("list[network.Stage]", list(trunk.stages))
        self.layers = [stage.name for stage in stages]
        self.stages = nn.ModuleDict({stage.name: Stage(stage.weight, stage.bias, stage.pooled) for stage in stages})
        self.register_buffer("mean", trunk.mean)
        self.pooling = stages[0].pooling
        self.replicate = trunk.replicate
        self.flipping = flipping

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features of every layer of pictures (N, 3, H, W), by name."""
        way = self.climb(image)
        return by_layer(self.layers, way.features)

    def climb(self, image: Tensor) -> Way:
        """Return what the features of pictures (N, 3, H, W) are made of."""
        x = image - self.mean
        if self.replicate:
            x = replicated(x)
        padding = 0 if self.replicate else 1
        below: list[Tensor] = []
        halved: list[Tensor] = []
        features: list[Tensor] = []
        weights: list[Tensor] = []
        pooled: list[bool] = []
        for stage in self.stages.values():
            below.append(x)
            if stage.pooled:
                x = pool(x, self.pooling)
            halved.append(x)
            x = torch.relu_(F.conv2d(x, stage.weight, stage.bias, padding=[padding, padding]))
            padding = 1
            features.append(x)
            weights.append(stage.weight)
            pooled.append(stage.pooled)
        return Way(below, halved, features, weights, pooled)

    def descend(self, way: Way, slopes: dict[str, Tensor]) -> Tensor:
        """Return the slope of the pictures, given those of layers' features, the deepest layer's among them."""
        deepest = len(self.layers) - 1
        slope = torch.zeros_like(way.features[deepest])
        for up in range(len(self.layers)):
            stage = deepest - up
            layer = self.layers[stage]
            if layer in slopes:
                slope = slope + slopes[layer]
            slope = slope * (way.features[stage] > 0)
            slope = self._before_convolution(
                slope, way.weights[stage], padding=0 if self.replicate and stage == 0 else 1
            )
            if way.pooled[stage]:
                slope = pool_slope(slope, way.below[stage], way.halved[stage], self.pooling)
        return folded(slope) if self.replicate else slope

    def _before_convolution(self, slope: Tensor, weight: Tensor, padding: int) -> Tensor:
        if self.flipping:
            return F.conv2d(slope, weight.flip([2, 3]).transpose(0, 1), padding=[2 - padding, 2 - padding])
        return F.conv_transpose2d(slope, weight, padding=[padding, padding])


class Features(nn.Module):
    """The graph `features`: pictures to features, by layer."""

    layers: list[str]

    def __init__(self, ladder: Ladder, layers: Sequence[str]) -> None:
        super().__init__()
        self.ladder = ladder
        self.layers = list(layers)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return layer → features (N, C, h, w) of pictures (N, 3, H, W)."""
        features = self.ladder(image)
        return {layer: features[layer] for layer in self.layers}


class Grams(nn.Module):
    """The graph `grams`: pictures to what is kept of a style, by layer."""

    layers: list[str]

    def __init__(self, ladder: Ladder, layers: Sequence[str]) -> None:
        super().__init__()
        self.ladder = ladder
        self.layers = list(layers)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return, of pictures (N, 3, H, W), `relu1_1.mean` (N, C) and `relu1_1.gram` (N, C, C) for each layer."""
        features = self.ladder(image)
        moments: dict[str, Tensor] = {}
        for layer in self.layers:
            moments[layer + ".mean"] = features[layer].mean(dim=3).mean(dim=2)
            moments[layer + ".gram"] = gram_matrices(features[layer])
        return moments


class Objective(nn.Module):
    """The graph `objective`: pictures, what they are compared with, and weights to losses."""

    content_layers: list[str]
    style_layers: list[str]

    def __init__(self, ladder: Ladder, content_layers: Sequence[str], style_layers: Sequence[str]) -> None:
        super().__init__()
        self.ladder = ladder
        self.content_layers = list(content_layers)
        self.style_layers = list(style_layers)

    def forward(
        self,
        image: Tensor,
        content: dict[str, Tensor],
        style: dict[str, Tensor],
        content_weights: Tensor,
        style_weights: Tensor,
        tv_weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return total (N,), content losses (N, content layers), style losses (N, style layers) and variation (N,).

        Args:
            image: pictures (N, 3, H, W).
            content: content layer → features (N, C, h, w) of the content, as large as the pictures.
            style: style layer → Gram matrix (C, C) of the style.
            content_weights: (content layers,), in their order.
            style_weights: (style layers,), in their order.
            tv_weight: a scalar.
        """
        features = self.ladder(image)
        content_losses = [squares(features[layer] - content[layer]) for layer in self.content_layers]
        style_losses = [
            squares((gram_matrices(features[layer]) - style[layer]).unsqueeze(1)) for layer in self.style_layers
        ]
        return summed(image, content_losses, style_losses, content_weights, style_weights, tv_weight)


class Closure(nn.Module):
    """The graph `closure`: what `Objective` is given, to its losses and the gradient of each picture's total to it."""

    content_layers: list[str]
    style_layers: list[str]

    def __init__(self, ladder: Ladder, content_layers: Sequence[str], style_layers: Sequence[str]) -> None:
        super().__init__()
        self.ladder = ladder
        self.content_layers = list(content_layers)
        self.style_layers = list(style_layers)

    def forward(
        self,
        image: Tensor,
        content: dict[str, Tensor],
        style: dict[str, Tensor],
        content_weights: Tensor,
        style_weights: Tensor,
        tv_weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return what `Objective.forward` does, of the same arguments, and the gradient (N, 3, H, W)."""
        way = self.ladder.climb(image)
        features = by_layer(self.ladder.layers, way.features)
        slopes: dict[str, Tensor] = {}
        content_losses: list[Tensor] = []
        style_losses: list[Tensor] = []
        for number, layer in enumerate(self.style_layers):
            error = gram_matrices(features[layer]) - style[layer]
            style_losses.append(squares(error.unsqueeze(1)))
            slopes[layer] = gram_slope(error, features[layer]) * style_weights[number]
        for number, layer in enumerate(self.content_layers):
            difference = features[layer] - content[layer]
            content_losses.append(squares(difference))
            slope = squares_slope(difference) * content_weights[number]
            slopes[layer] = slopes[layer] + slope if layer in slopes else slope
        total, content_loss, style_loss, tv = summed(
            image, content_losses, style_losses, content_weights, style_weights, tv_weight
        )
        gradient = self.ladder.descend(way, slopes) + tv_weight * variation_slope(image)
        return total, content_loss, style_loss, tv, gradient
