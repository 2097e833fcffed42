"""How much memory a stylization takes, reckoned from its options and size. Free of torch.

The two that count grow with the picture: the activations that the backward pass needs, and L-BFGS's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from nst_model.architecture import Architecture
from nst_model.options import Curvature, Optimizer, Precision, StyleLoss, StylizeOptions

FIXED_BYTES = 250 * 2**20
"""Buffers of the convolutions, of the allocator, and of all that does not grow with the picture."""

ACTIVATION_COPIES = 2.5
"""What is kept of each layer: its features and its gradient, and half as much that was freed but is too small for what
comes next (see `nst_model.devices.reuse_memory`)."""

WORKING_COPIES = 6
"""Arrays of the size of the largest layer that are in use at once."""

PICTURES = 24
"""Pictures in fp32 that are in use at once: the optimizer's vectors, the best one, averages, what is shown."""

SPECTRAL_PICTURES = 16
"""Those that Curvature.SPECTRAL adds: spectra, and the share of each frequency in each band."""

LOSS_COPIES: Mapping[StyleLoss, int] = {StyleLoss.SLICED: 10, StyleLoss.DIRECT: 5, StyleLoss.CROSS: 5}
"""Arrays of the size of the largest layer that a style loss adds: what it sorts, or maps of the style and gradients."""

LEAST_PAIRS = 10
"""For want of memory L-BFGS remembers no fewer, unless fewer were asked for."""


class Memory(NamedTuple):
    """How L-BFGS remembers: so many pairs, each number in so many bytes, 4 (fp32) or 2 (bf16)."""

    pairs: int
    number_bytes: int

    @property
    def picture_bytes(self) -> int:
        """What it takes for each number of a picture."""
        return 2 * self.pairs * self.number_bytes


def full_memory(options: StylizeOptions) -> Memory:
    """Return the memory that the options ask for."""
    return Memory(options.history, 4)


def least_memory(options: StylizeOptions) -> Memory:
    """Return the smallest memory that a stylization makes do with."""
    return Memory(min(options.history, LEAST_PAIRS), 2)


def fitting_memory(
    options: StylizeOptions, height: int, width: int, architecture: Architecture, limit_bytes: float
) -> Memory:
    """Return the best memory with which a stylization takes no more than a limit: first in bf16, then of fewer pairs.

    The least, if even that is too much. The arguments are those of `peak_bytes`.
    """
    full, least = full_memory(options), least_memory(options)
    if peak_bytes(options, height, width, architecture) <= limit_bytes:
        return full
    left = limit_bytes - peak_bytes(options, height, width, architecture, Memory(0, 2))
    pairs = int(left // (3 * _pixels(options, height, width) * Memory(1, 2).picture_bytes))
    return Memory(max(least.pairs, min(pairs, full.pairs)), 2)


def peak_bytes(
    options: StylizeOptions, height: int, width: int, architecture: Architecture, memory: Memory | None = None
) -> int:
    """Return about how much memory a stylization takes at most, beside the feature model, in bytes.

    Rather too much than too little: measured peaks are between two fifths of it and all (`benchmarks/memory.py`).

    Args:
        options: of the stylization.
        height: of the finished picture, pixels.
        width: of the finished picture, pixels.
        architecture: of the feature model.
        memory: of L-BFGS, if it is not the full one.
    """
    named = {
        layer
        for layers in (options.style_layers, options.content_layers)
        for layer, weight in layers.items()
        if weight > 0
    }
    deepest = max(number for number, layer in enumerate(architecture.layers) if layer in named)
    channels = [
        convolution.channels / convolution.stride_px**2 for convolution in architecture.convolutions[: deepest + 1]
    ]
    value_bytes = 2 if options.precision is Precision.BF16 else 4
    numbers = ACTIVATION_COPIES * sum(channels) + WORKING_COPIES * max(channels)
    numbers += LOSS_COPIES.get(options.style_loss, 0) * max(channels)
    picture_bytes = 4 * PICTURES
    if options.optimizer is Optimizer.LBFGS:
        picture_bytes += (memory or full_memory(options)).picture_bytes
        picture_bytes += 4 * SPECTRAL_PICTURES if options.curvature is Curvature.SPECTRAL else 0
    else:
        picture_bytes += 4 * 2  # Adam's moments
    return round(FIXED_BYTES + _pixels(options, height, width) * (numbers * value_bytes + 3 * picture_bytes))


def largest_size_px(
    options: StylizeOptions, height: int, width: int, architecture: Architecture, limit_bytes: float
) -> int:
    """Return the largest longer edge, in pixels, at which a picture of these proportions takes no more than a limit.

    With the least memory of L-BFGS; 0 if there is none.
    """
    longer = max(height, width)

    def fits(size: int) -> bool:
        rows, columns = (max(1, round(edge * size / longer)) for edge in (height, width))
        return peak_bytes(options, rows, columns, architecture, least_memory(options)) <= limit_bytes

    small, large = 0, longer
    while small < large:
        middle = (small + large + 1) // 2
        small, large = (middle, large) if fits(middle) else (small, middle - 1)
    return small


def _pixels(options: StylizeOptions, height: int, width: int) -> int:
    return (height + 2 * options.margin_px) * (width + 2 * options.margin_px)
