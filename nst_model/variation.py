"""Differences of neighbouring pixels, and the way back: what the engine and the exported graphs share.

Of plain operations, so that TorchScript compiles them, and `torch.export` and ONNX trace them. Pictures are
(N, 3, H, W). The *slope* of something is the gradient of a scalar, of each picture's own, towards it.
"""

# Annotations stay objects in this module (no `from __future__ import annotations`): TorchScript reads them.

from torch import Tensor
from torch.nn import functional as F

from nst_model.network import folded, replicated


def neighbours(image: Tensor) -> list[Tensor]:
    """Return the differences of pixels of pictures: vertical, horizontal, and along both diagonals.

    Beyond the edge the nearest pixel counts.
    """
    padded = replicated(image)
    return [
        padded[:, :, 1:, 1:-1] - padded[:, :, :-1, 1:-1],
        padded[:, :, 1:-1, 1:] - padded[:, :, 1:-1, :-1],
        padded[:, :, 1:, 1:] - padded[:, :, :-1, :-1],
        padded[:, :, 1:, :-1] - padded[:, :, :-1, 1:],
    ]


def neighbours_slope(slopes: list[Tensor]) -> Tensor:
    """Return the slope of the pictures, given those of their `neighbours`."""
    # Beyond the last difference there is a zero, so that every pixel is in as many.
    down, across, one, other = [F.pad(slope, [1, 1, 1, 1]) for slope in slopes]
    slope = down[:, :, :-1] - down[:, :, 1:]
    slope = slope + (across[:, :, :, :-1] - across[:, :, :, 1:])
    slope = slope + (one[:, :, :-1, :-1] - one[:, :, 1:, 1:])
    return folded(slope + (other[:, :, :-1, 1:] - other[:, :, 1:, :-1]))
