"""The sizes that a coarse-to-fine run passes through. Free of torch."""

from __future__ import annotations

MIN_EDGE_PX = 16
"""Smallest edge whose features still have a position after four poolings."""


def scales(longer_edge_px: int, shorter_edge_px: int, first_px: int) -> list[int]:
    """Return the longer edges of a coarse-to-fine run, pixels, the last being the picture's own.

    They grow by √2 (as in Crowson, 2021). None is smaller than `first_px`, nor so small that the shorter edge would
    have too few pixels for the feature model.
    """
    found = [longer_edge_px]
    while True:
        smaller = round(longer_edge_px / 2 ** (len(found) / 2))
        if smaller < first_px or smaller * shorter_edge_px < MIN_EDGE_PX * longer_edge_px:
            return found[::-1]
        found.append(smaller)


def scaled_edge(longer_edge_px: int, scale: float) -> int:
    """Return the longer edge of a picture after scaling, pixels."""
    return max(MIN_EDGE_PX, round(longer_edge_px * scale))
