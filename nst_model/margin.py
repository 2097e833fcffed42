"""The margin: a picture continued beyond its edge by its mirror image, so that the edge is a place like any other.

At the edge of what a convolutional network sees, its features mean something else, and an optimization answers with a
seam of specks. In the margin the picture is optimized like elsewhere, and what happens there is cut off.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mirrored(picture: Tensor, margin_px: int) -> Tensor:
    """Return a picture (…, H, W), at least 2 pixels each way, continued on each side; the edge itself is not repeated.

    Goes to and fro where the margin is wider than the picture.
    """
    if not margin_px:
        return picture
    rows, columns = (_to_and_fro(length, margin_px).to(picture.device) for length in picture.shape[-2:])
    return picture.index_select(-2, rows).index_select(-1, columns)


def trimmed(picture: Tensor, margin_px: int) -> Tensor:
    """Return a picture (…, H + 2·margin, W + 2·margin) without its margin, (…, H, W)."""
    if not margin_px:
        return picture
    return picture[..., margin_px:-margin_px, margin_px:-margin_px]


def _to_and_fro(length: int, beyond: int) -> Tensor:
    place = torch.arange(-beyond, length + beyond) % (2 * length - 2)
    return torch.minimum(place, 2 * length - 2 - place)
