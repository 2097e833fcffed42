"""What leaves for other runtimes: four graphs of plain tensor operations, with the backward pass written out.

A runtime needs no autograd for them, no loop and no shape in advance: TorchScript compiles these modules, and
`torch.export` and ONNX trace them. They agree with `nst_model.objective.Objective` for the style loss `gram`, the
content loss `squared_error` and the total variation in its norm L2, for each picture of a batch by itself.

Shapes: N batch, C channels, H and W of the picture, h and w of a layer. A picture is (N, 3, H, W), RGB, fp32, nominally
in [0, 1], at least 16 px each way. Features are (N, C, h, w), of mean activation 1. The *slope* of something is the
gradient of each picture's total loss to it, and has its shape.
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_model import network
from nst_model.network import Trunk, folded, replicated
from nst_model.variation import neighbours, neighbours_slope


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (N, C) and the Gram matrix (N, C, C) of features (N, C, h, w), both over positions.

    The Gram matrix by way of the covariance: sums of thousands of numbers that are nearly alike, as where a picture is
    flat, are less exact by two digits, and otherwise so in each runtime.
    """
    mean = features.mean(dim=3).mean(dim=2)
    columns = (features - mean[:, :, None, None]).flatten(2)
    # The number of positions stays an integer: a float would be baked into an exported graph.
    covariance = torch.bmm(columns, columns.transpose(1, 2)) / columns.shape[2]
    return mean, covariance + mean.unsqueeze(2) * mean.unsqueeze(1)


def squares(x: Tensor) -> Tensor:
    """Return the mean square of x (N, A, B, C) for each picture: (N,)."""
    # Axis by axis: onnxruntime adds one after the other, and over a hundred thousand at once would lose three digits.
    return x.square().mean(dim=3).mean(dim=2).mean(dim=1)


def squares_slope(x: Tensor) -> Tensor:
    """Return the slope of `squares` to x (N, …)."""
    return x * 2 / x[0].numel()


def gram_slope(error: Tensor, features: Tensor) -> Tensor:
    """Return the slope of `squares(error)` to features (N, C, h, w), `error` being their Gram matrices less others."""
    columns = features.flatten(2)
    slope = squares_slope(error)
    slope = (slope + slope.transpose(1, 2)) / columns.shape[2]
    return torch.bmm(slope, columns).reshape(features.shape)


def pool(x: Tensor, pooling: str) -> Tensor:
    """Return x (N, C, h, w) at half the resolution; an odd last row or column is left out."""
    if pooling == "average":
        return F.avg_pool2d(x, 2)
    if pooling == "l2":
        # The root of the mean plus 1e-12, which ONNX's optimizer would take for nothing and leave out.
        return (F.avg_pool2d(x.square(), 2) * 1e12 + 1).sqrt() * 1e-6
    return F.max_pool2d(x, 2)


def pool_slope(slope: Tensor, x: Tensor, pooled: Tensor, pooling: str) -> Tensor:
    """Return the slope of x (N, C, h, w), given that of `pooled`, which is `pool(x, pooling)`."""
    if pooling == "average":
        slope = slope / 4
        return spread(slope, slope, slope, slope, x.shape[2], x.shape[3])
    if pooling == "l2":
        slope = slope / (4 * pooled)
        return spread(slope, slope, slope, slope, x.shape[2], x.shape[3]) * x
    # To the first of the greatest, as torch does: where a picture is flat all four are the greatest.
    above = x[:, :, 0::2].narrow(2, 0, pooled.shape[2])
    below = x[:, :, 1::2]
    zero = torch.zeros_like(slope)
    a = torch.where(above[:, :, :, 0::2].narrow(3, 0, pooled.shape[3]) == pooled, slope, zero)
    rest = slope - a
    b = torch.where(above[:, :, :, 1::2] == pooled, rest, zero)
    rest = rest - b
    c = torch.where(below[:, :, :, 0::2].narrow(3, 0, pooled.shape[3]) == pooled, rest, zero)
    return spread(a, b, c, rest - c, x.shape[2], x.shape[3])


def spread(a: Tensor, b: Tensor, c: Tensor, d: Tensor, height: int, width: int) -> Tensor:
    """Return (N, C, height, width) of its quarters: of each four positions a and b above, c and d below.

    The quarters are (N, C, height // 2, width // 2); an odd last row or column is 0.
    """
    x = F.pixel_shuffle(torch.stack((a, b, c, d), dim=2).flatten(1, 2), 2)
    # One row and one column more, and then cut: to ask whether they are missing would bind an exported graph to the
    # answer. By narrow: of a slice torch.export does not know that it is as long as was asked for.
    return F.pad(x, [0, 1, 0, 1]).narrow(2, 0, height).narrow(3, 0, width)


def variation(differences: list[Tensor]) -> Tensor:
    """Return each picture's total variation, (N,), given its `neighbours`."""
    down, across, one, other = differences[0], differences[1], differences[2], differences[3]
    return (squares(down) + squares(across) + 0.5 * (squares(one) + squares(other))) / 3


def variation_slope(differences: list[Tensor]) -> Tensor:
    """Return the slope of `variation` to the pictures (N, 3, H, W), given their `neighbours`."""
    down, across = squares_slope(differences[0]) / 3, squares_slope(differences[1]) / 3
    one, other = squares_slope(differences[2]) / 6, squares_slope(differences[3]) / 6
    return neighbours_slope([down, across, one, other])


class Step(NamedTuple):
    """What one stage's way up leaves for the way down.

    Attributes:
        below: what the stage was given: the features of the one before.
        halved: the same after the pooling, if the stage has one.
        features: what it made of that.
        weight: of its convolution.
        padding: rows and columns of zeros that the convolution saw beyond each edge.
        pooled: whether the stage has a pooling.
    """

    below: Tensor
    halved: Tensor
    features: Tensor
    weight: Tensor
    padding: int
    pooled: bool


class Stage(nn.Module):
    """One convolution and its ReLU, with the pooling before it where a block begins.

    What differs between stages is in attributes and no constants, so that TorchScript has one type for all of them.
    """

    weight: Tensor
    bias: Tensor
    padding: int
    pooled: bool
    pooling: str

    def __init__(self, stage: network.Stage) -> None:
        super().__init__()
        # Of the usual layout: of others torch.export would have to know how long an edge is.
        self.register_buffer("weight", stage.weight.contiguous())
        self.register_buffer("bias", stage.bias)
        self.padding = stage.padding
        self.pooled = stage.pooled
        self.pooling = stage.pooling

    def forward(self, below: Tensor) -> Step:
        """Return the step up from the features of the stage before."""
        halved = pool(below, self.pooling) if self.pooled else below
        features = torch.relu_(F.conv2d(halved, self.weight, self.bias, padding=[self.padding, self.padding]))
        return Step(below, halved, features, self.weight, self.padding, self.pooled)


class Ladder(nn.Module):
    """A trunk that can be climbed and, with the slopes of some layers, descended again to the picture.

    Args:
        trunk: the engine's trunk of the same weights, in fp32.
        flipping: convolve with flipped weights on the way down, in place of a transposed convolution. onnxruntime flips
            constants once, when it loads a graph, and its convolution is faster; torch would flip them at each call.
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
        self.stages = nn.ModuleDict({stage.name: Stage(stage) for stage in stages})
        self.register_buffer("mean", trunk.mean)
        self.pooling = stages[0].pooling
        self.replicate = trunk.replicate
        self.flipping = flipping

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features of every layer of pictures (N, 3, H, W), by name."""
        return self.by_layer(self.climb(image))

    def climb(self, image: Tensor) -> list[Step]:
        """Return the steps from pictures (N, 3, H, W) to the deepest layer."""
        if image.dim() != 4 or image.shape[1] != 3:
            raise ValueError("image must have the shape (N, 3, H, W)")
        x = image - self.mean
        if self.replicate:
            x = replicated(x)
        steps: list[Step] = []
        for stage in self.stages.values():
            step = stage(x)
            steps.append(step)
            x = step.features
        return steps

    def by_layer(self, steps: list[Step]) -> dict[str, Tensor]:
        """Return layer → features of steps."""
        features: dict[str, Tensor] = {}
        for number, layer in enumerate(self.layers):
            features[layer] = steps[number].features
        return features

    def descend(self, steps: list[Step], slopes: dict[str, Tensor]) -> Tensor:
        """Return the slope of the pictures, given those of layers' features, the deepest layer's among them."""
        slope = torch.zeros_like(steps[-1].features)
        for down in range(len(steps)):
            number = len(steps) - 1 - down
            step, layer = steps[number], self.layers[number]
            if layer in slopes:
                slope = slope + slopes[layer]
            slope = self._through_convolution(slope * (step.features > 0), step.weight, step.padding)
            if step.pooled:
                slope = pool_slope(slope, step.below, step.halved, self.pooling)
        return folded(slope) if self.replicate else slope

    def _through_convolution(self, slope: Tensor, weight: Tensor, padding: int) -> Tensor:
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
        found: dict[str, Tensor] = {}
        for layer in self.layers:
            mean, gram = moments(features[layer])
            found[layer + ".mean"] = mean
            found[layer + ".gram"] = gram
        return found


class Comparison(nn.Module):
    """What `Objective` and `Closure` have in common: pictures compared with a content and a style."""

    content_layers: list[str]
    style_layers: list[str]

    def __init__(self, ladder: Ladder, content_layers: Sequence[str], style_layers: Sequence[str]) -> None:
        super().__init__()
        self.ladder = ladder
        self.content_layers = list(content_layers)
        self.style_layers = list(style_layers)

    def differences(self, features: dict[str, Tensor], content: dict[str, Tensor]) -> list[Tensor]:
        """Return features less the content's, (N, C, h, w) for each content layer."""
        # Stacked, since a difference alone would spread one row, one channel or one picture over all; in ONNX nothing
        # else says that two shapes must be the same.
        pairs = [torch.stack((features[layer], content[layer])) for layer in self.content_layers]
        return [pair[0] - pair[1] for pair in pairs]

    def errors(self, features: dict[str, Tensor], style: dict[str, Tensor]) -> list[Tensor]:
        """Return the features' Gram matrices less the style's, (N, C, C) for each style layer."""
        for layer in self.style_layers:
            channels = features[layer].shape[1]
            if list(style[layer].shape) != [channels, channels]:
                raise ValueError("style." + layer + " must have as many rows and columns as the layer has channels")
        return [moments(features[layer])[1] - style[layer] for layer in self.style_layers]

    def losses(
        self,
        differences: list[Tensor],
        errors: list[Tensor],
        pixels: list[Tensor],
        content_weights: Tensor,
        style_weights: Tensor,
        tv_weight: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what `Objective.forward` does; `pixels` are the pictures' `neighbours`."""
        content = torch.stack([squares(difference) for difference in differences], dim=1)
        style = torch.stack([squares(error.unsqueeze(1)) for error in errors], dim=1)
        tv = variation(pixels)
        return content @ content_weights + style @ style_weights + tv_weight * tv, content, style, tv


class Objective(Comparison):
    """The graph `objective`: pictures, what they are compared with, and weights to losses."""

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
        differences, errors = self.differences(features, content), self.errors(features, style)
        return self.losses(differences, errors, neighbours(image), content_weights, style_weights, tv_weight)


class Closure(Comparison):
    """The graph `closure`: what `Objective` is given, to its losses and the gradient of each picture's total to it."""

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
        steps = self.ladder.climb(image)
        features = self.ladder.by_layer(steps)
        differences, errors = self.differences(features, content), self.errors(features, style)
        pixels = neighbours(image)
        slopes: dict[str, Tensor] = {}
        for number, layer in enumerate(self.style_layers):
            slopes[layer] = gram_slope(errors[number], features[layer]) * style_weights[number]
        for number, layer in enumerate(self.content_layers):
            slope = squares_slope(differences[number]) * content_weights[number]
            slopes[layer] = slopes[layer] + slope if layer in slopes else slope
        gradient = self.ladder.descend(steps, slopes) + tv_weight * variation_slope(pixels)
        total, content_loss, style_loss, tv = self.losses(
            differences, errors, pixels, content_weights, style_weights, tv_weight
        )
        return total, content_loss, style_loss, tv, gradient
