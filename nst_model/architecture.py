"""The VGG family (Simonyan and Zisserman, 2015): names, indices and geometry of its layers.

A *layer* here is the output of a ReLU, by the literature's name: `relu4_2` is the second convolution of the fourth
block, after its ReLU. torchvision numbers the modules of `vgg.features` instead; `Convolution.index` is that number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Convolution:
    """One 3×3 convolution and its ReLU.

    Attributes:
        layer: name of the ReLU's output, `relu1_1` for instance.
        index: number of the convolution in torchvision's `vgg.features`; its ReLU is the next one.
        block: number of its block, from 1.
        pooled: whether a pooling halves the resolution just before it.
    """

    layer: str
    index: int
    block: int
    pooled: bool

    @property
    def channels(self) -> int:
        """Number of feature maps in the published network."""
        return int(min(64 * 2 ** (self.block - 1), 512))

    @property
    def stride_px(self) -> int:
        """Pixels of the picture between neighbouring positions."""
        return int(2 ** (self.block - 1))


@dataclass(frozen=True)
class Architecture:
    """A VGG: the number of convolutions in each of its five blocks."""

    name: str
    convolutions_per_block: tuple[int, ...]

    @cached_property
    def convolutions(self) -> tuple[Convolution, ...]:
        """Every convolution, from the image upwards."""
        found = []
        index = 0
        for block, count in enumerate(self.convolutions_per_block, start=1):
            for position in range(1, count + 1):
                found.append(Convolution(f"relu{block}_{position}", index, block, pooled=block > 1 and position == 1))
                index += 2
            index += 1  # the pooling
        return tuple(found)

    @cached_property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, from the image upwards."""
        return tuple(convolution.layer for convolution in self.convolutions)

    def receptive_field_px(self, layer: str) -> int:
        """Pixels of the picture, along each axis, that one position of `layer` sees."""
        field, stride = 1, 1
        for convolution in self.convolutions:
            if convolution.pooled:
                field += stride
                stride *= 2
            field += 2 * stride
            if convolution.layer == layer:
                return field
        raise KeyError(layer)


VGG16 = Architecture("vgg16", (2, 2, 3, 3, 3))
VGG19 = Architecture("vgg19", (2, 2, 4, 4, 4))
