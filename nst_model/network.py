"""The feature model: a VGG trunk whose every layer has mean activation 1, scriptable with TorchScript.

Shapes: N batch, C channels, H and W positions. A picture is (N, 3, H, W), RGB, fp32, nominally in [0, 1]; a layer's
features are (N, C, H / stride, W / stride), fp32.
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nst_model.options import Padding, Pooling, Precision
from nst_model.weights import FeatureWeights


def replicated(x: Tensor) -> Tensor:
    """Return x (N, C, H, W) with each edge repeated once outside. On a GPU `F.pad` has no repeatable gradient."""
    x = torch.cat((x[:, :, :1], x, x[:, :, -1:]), dim=2)
    return torch.cat((x[:, :, :, :1], x, x[:, :, :, -1:]), dim=3)


def folded(slope: Tensor) -> Tensor:
    """Return the gradient towards x (N, C, H, W), given that towards `replicated(x)`: copies' go to the originals."""
    slope = torch.cat((slope[:, :, :1] + slope[:, :, 1:2], slope[:, :, 2:-2], slope[:, :, -2:-1] + slope[:, :, -1:]), 2)
    left = slope[:, :, :, :1] + slope[:, :, :, 1:2]
    right = slope[:, :, :, -2:-1] + slope[:, :, :, -1:]
    return torch.cat((left, slope[:, :, :, 2:-2], right), 3)


class Stage(nn.Module):
    """One 3×3 convolution and its ReLU, with the pooling before it where a block begins."""

    name: Final[str]
    tapped: Final[bool]
    pooled: Final[bool]
    pooling: Final[str]
    padding: Final[int]

    def __init__(
        self, name: str, weight: Tensor, bias: Tensor, *, tapped: bool, pooled: bool, pooling: str, padding: int
    ) -> None:
        super().__init__()
        self.name = name
        self.tapped = tapped
        self.pooled = pooled
        self.pooling = pooling
        self.padding = padding
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    weight: Tensor
    bias: Tensor

    def forward(self, below: Tensor) -> Tensor:
        """Return the layer's features, given those below it, in the trunk's precision."""
        x = self._pool(below) if self.pooled else below
        return torch.relu_(F.conv2d(x, self.weight, self.bias, padding=[self.padding, self.padding]))

    @torch.jit.export
    def gradient(self, towards: Tensor, here: Tensor, below: Tensor) -> Tensor:
        """Return a function's gradient towards the features below, given that towards this layer's features, `here`.

        `towards` is overwritten. Nothing but the features is kept on the way up: the ReLU's mask is where its output is
        above 0, and what the pooling chose is found once more.
        """
        torch.ops.aten.threshold_backward(towards, here, 0, grad_input=towards)
        if not self.pooled:
            return self._through_convolution(towards, below)
        if self.pooling == "max":
            pooled, chosen = torch.ops.aten.max_pool2d_with_indices(below, [2, 2], [2, 2])
            towards = self._through_convolution(towards, pooled)
            gradient: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(
                towards, below, [2, 2], [2, 2], [0, 0], [1, 1], False, chosen
            )
            return gradient
        pooled = self._pool(below)
        towards = self._through_convolution(towards, pooled)
        if self.pooling == "l2":
            towards /= pooled
        towards = torch.ops.aten.avg_pool2d_backward(towards, below, [2, 2], [2, 2], [0, 0], False, True, None)
        return towards.mul_(below) if self.pooling == "l2" else towards

    def _through_convolution(self, towards: Tensor, x: Tensor) -> Tensor:
        """Return the gradient towards the convolution's input, of which only the shape counts."""
        padding, ones = [self.padding, self.padding], [1, 1]
        # Of the three gradients, towards input, weight and bias, the first is asked for.
        found, _, _ = torch.ops.aten.convolution_backward(
            towards, x, self.weight, None, ones, padding, ones, False, [0, 0], 1, [True, False, False]
        )
        gradient: Tensor = found
        return gradient

    def _pool(self, x: Tensor) -> Tensor:
        if self.pooling == "average":
            return F.avg_pool2d(x, 2)
        if self.pooling == "l2":
            return (F.avg_pool2d(x.square(), 2) + 1e-12).sqrt()  # the root has no slope at 0
        return F.max_pool2d(x, 2)


class Trunk(nn.Module):
    """A VGG from the image up to the deepest layer asked for, and back down for the gradient.

    The input's mean is subtracted inside; everything else of the network's own preprocessing, and the scaling that
    brings each layer's mean activation to 1, is folded into the weights.

    The way down is written out: autograd would add up what the layers' losses contribute in fp32, keep each pooling's
    choice, and allow no operation that it cannot differentiate.
    """

    replicate: Final[bool]
    names: list[str]

    def __init__(self, stages: list[Stage], mean: Tensor, *, replicate: bool) -> None:
        super().__init__()
        self.replicate = replicate
        self.names = [stage.name for stage in stages]
        self.stages = nn.ModuleList(stages)
        self.register_buffer("mean", mean)

    mean: Tensor

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features of each tapped layer, fp32, by name. `image`: (N, 3, H, W) RGB in [0, 1]."""
        features = self.tapped(self.ascend(image))
        return {layer: found.to(self.mean.dtype) for layer, found in features.items()}

    @torch.jit.export
    def ascend(self, image: Tensor) -> list[Tensor]:
        """Return the network's input and every layer's features, all in the trunk's precision: what `descend` needs."""
        x = image - self.mean
        if self.replicate:
            x = replicated(x)
        x = x.to(self.stages[0].weight.dtype).contiguous(memory_format=torch.channels_last)  # type: ignore[arg-type]
        found = [x]
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found

    @torch.jit.export
    def tapped(self, ascent: list[Tensor]) -> dict[str, Tensor]:
        """Return the features of each tapped layer, in the trunk's precision, by name."""
        features: dict[str, Tensor] = {}
        for number, stage in enumerate(self.stages):
            if stage.tapped:
                features[stage.name] = ascent[number + 1]  # type: ignore[index]
        return features

    @torch.jit.export
    def descend(self, ascent: list[Tensor], towards: dict[str, Tensor]) -> Tensor:
        """Return a function's gradient towards the image, (N, 3, H, W) in fp32, given those towards tapped features.

        Args:
            ascent: what `ascend` returned of the image.
            towards: layer → gradient, of the features' shape and precision. Overwritten.
        """
        number = len(self.names) - 1  # TorchScript knows of a reversed list's modules their methods only
        gradient = towards[self.names[number]]  # nothing is computed above the deepest layer that is tapped
        for stage in self.stages[::-1]:
            gradient = stage.gradient(gradient, ascent[number + 1], ascent[number])  # type: ignore[operator]
            number -= 1
            if number >= 0 and self.names[number] in towards:
                gradient += towards[self.names[number]]
        gradient = gradient.to(self.mean.dtype)
        return folded(gradient) if self.replicate else gradient.contiguous()


def build_trunk(
    weights: FeatureWeights,
    layers: Iterable[str],
    *,
    pooling: Pooling = Pooling.MAX,
    padding: Padding = Padding.ZEROS,
    precision: Precision = Precision.FP32,
    device: torch.device | str = "cpu",
) -> Trunk:
    """Return the trunk of `weights` that yields `layers`, on `device`, in eager mode and without gradients of its own.

    Raises KeyError for a layer that the architecture does not have, ValueError for Precision.AUTO.
    """
    if precision is Precision.AUTO:
        raise ValueError("precision must be resolved before a trunk is built; see nst_model.devices.resolve_precision")
    dtype = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    wanted = set(layers)
    if unknown := wanted - set(weights.architecture.layers):
        raise KeyError(f"{', '.join(sorted(unknown))}: not in {weights.architecture.name}")
    stages: list[Stage] = []
    below = 1.0
    for convolution in weights.architecture.convolutions:
        here = weights.mean_activation[pooling][convolution.layer]
        weight, bias = weights.convolutions[convolution.layer]
        # ReLU and every pooling are positively homogeneous, so dividing a layer's output by a constant and
        # multiplying the next one's input by it changes nothing else (Gatys et al., 2016, section 2).
        stages.append(
            Stage(
                convolution.layer,
                (weight * (below / here)).to(device, dtype).contiguous(memory_format=torch.channels_last),
                (bias / here).to(device, dtype),
                tapped=convolution.layer in wanted,
                pooled=convolution.pooled,
                pooling=pooling.value,
                padding=1 if padding is Padding.ZEROS or stages else 0,
            )
        )
        below = here
        wanted.discard(convolution.layer)
        if not wanted:
            break
    trunk = Trunk(
        stages,
        weights.mean.to(device).view(1, 3, 1, 1),
        replicate=padding is not Padding.ZEROS,
    )
    return trunk.eval()
