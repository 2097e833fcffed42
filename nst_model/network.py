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

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's features, in the trunk's precision."""
        if self.pooled:
            x = self._pool(x)
        return torch.relu_(F.conv2d(x, self.weight, self.bias, padding=[self.padding, self.padding]))

    def _pool(self, x: Tensor) -> Tensor:
        if self.pooling == "average":
            return F.avg_pool2d(x, 2)
        if self.pooling == "l2":
            return (F.avg_pool2d(x.square(), 2) + 1e-12).sqrt()  # the root has no slope at 0
        return F.max_pool2d(x, 2)


class Trunk(nn.Module):
    """A VGG from the image up to the deepest layer asked for.

    The input's mean is subtracted inside; everything else of the network's own preprocessing, and the scaling that
    brings each layer's mean activation to 1, is folded into the weights.
    """

    bf16: Final[bool]
    replicate: Final[bool]

    def __init__(self, stages: list[Stage], mean: Tensor, *, bf16: bool, replicate: bool) -> None:
        super().__init__()
        self.replicate = replicate
        self.bf16 = bf16
        self.stages = nn.ModuleList(stages)
        self.register_buffer("mean", mean)

    mean: Tensor

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Return the features of each tapped layer, fp32, by name. `image`: (N, 3, H, W) RGB in [0, 1]."""
        x = image - self.mean
        if self.replicate:
            x = replicated(x)
        if self.bf16:
            x = x.to(torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        features: dict[str, Tensor] = {}
        for stage in self.stages:
            x = stage(x)
            if stage.tapped:
                features[stage.name] = x.float()  # type: ignore[index]
        return features


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
        bf16=precision is Precision.BF16,
        replicate=padding is not Padding.ZEROS,
    )
    return trunk.eval()
