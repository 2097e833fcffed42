"""The making of a picture as an animated image."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nst_client.errors import InvalidArgumentError
from nst_client.events import Frame, Result
from nst_client.files import write_whole
from nst_client.images import Picture, over_white

if TYPE_CHECKING:
    from PIL import Image

PILLOW_FORMATS = {".webp": "WEBP", ".gif": "GIF", ".png": "PNG", ".apng": "PNG"}

MAX_FRAMES = 120
"""More frames make the file larger and the making no clearer."""

PLAYING_MS = 6_000
"""About how long the frames between the first and the last are to take together."""

SHORTEST_MS, LONGEST_MS = 40, 200
FIRST_MS = 700
LAST_MS = 2_000

LONGEST_EDGE_PX = 768
"""Larger frames are reduced to this: an animation in full size would be too large to be shown anywhere."""

PALETTE_SAMPLE_PX = 256

SETTINGS: dict[str, dict[str, object]] = {
    "WEBP": {"quality": 80, "method": 2},
    "GIF": {},
    "PNG": {"compress_level": 3},
}
"""What Pillow is told for each format: about 15 ms a frame of 512 pixels, and files hardly larger."""


class FrameSampler:
    """Keeps an even choice of the frames that come by, and never more than twice MAX_FRAMES."""

    def __init__(self) -> None:
        self._kept: list[Frame] = []
        self._newest: Frame | None = None
        self._stride = 1
        self._seen = 0

    def add(self, frame: Frame) -> None:
        """See one more frame."""
        if self._seen % self._stride == 0:
            self._kept.append(frame)
        self._newest = frame
        self._seen += 1
        if len(self._kept) >= 2 * MAX_FRAMES:
            self._kept = self._kept[::2]
            self._stride *= 2

    def frames(self) -> list[Frame]:
        """Return at most MAX_FRAMES frames in order, the first and the newest among them."""
        frames = list(self._kept)
        if self._newest is not None and frames[-1] is not self._newest:
            frames.append(self._newest)
        if len(frames) <= MAX_FRAMES:
            return frames
        step = (len(frames) - 1) / (MAX_FRAMES - 1)
        return [frames[round(index * step)] for index in range(MAX_FRAMES)]


def pillow_format(path: str | os.PathLike[str]) -> str:
    """Return Pillow's name for the animated format of a file name; raise InvalidArgumentError if it has none."""
    suffix = Path(path).suffix.lower()
    if suffix not in PILLOW_FORMATS:
        known = ", ".join(PILLOW_FORMATS)
        raise InvalidArgumentError(f"an animation's file name must end in one of {known}, not {suffix!r}")
    return PILLOW_FORMATS[suffix]


def write_animation(path: str | os.PathLike[str], frames: Sequence[Frame], result: Result) -> Path:
    """Write an endless animation of the frames, ending with the result at their size, and return its path.

    The first picture and the result are held; the others play for about six seconds. Raises OSError.
    """
    kind = pillow_format(path)
    shown: list[Picture] = [frame for frame in frames if frame.iteration != result.iteration]
    shown.append(result)
    first, *others = _quantized(shown) if kind == "GIF" else _pictures(shown)
    buffer = io.BytesIO()
    first.save(
        buffer, kind, save_all=True, append_images=others, duration=durations_ms(len(shown)), loop=0, **SETTINGS[kind]
    )
    return write_whole(path, buffer.getvalue())


def durations_ms(count: int) -> list[int]:
    """Return how long each of `count` pictures is shown, in milliseconds; multiples of 10, as GIF needs."""
    if count == 1:
        return [LAST_MS]
    between = max(SHORTEST_MS, min(LONGEST_MS, PLAYING_MS // max(1, count - 2)))
    return [FIRST_MS, *[between // 10 * 10] * (count - 2), LAST_MS]


def _pictures(shown: Sequence[Picture]) -> Iterator[Image.Image]:
    """Yield the pictures in RGB, one at a time, all at the first one's size."""
    size = None
    for picture in shown:
        image = _decoded(picture)
        size = size or image.size
        yield image if image.size == size else image.resize(size)


def _quantized(shown: Sequence[Picture]) -> Iterator[Image.Image]:
    """Yield the pictures in 256 colours that suit the first, the middle and the last of them.

    One palette for all: Pillow's own, one for every frame, takes thirty times as long and flickers.
    """
    from PIL import Image  # noqa: PLC0415 - only those who want an animation pay for it

    samples = [_decoded(shown[index]) for index in (0, len(shown) // 2, -1)]
    sheet = Image.new("RGB", (PALETTE_SAMPLE_PX, PALETTE_SAMPLE_PX * len(samples)))
    for row, sample in enumerate(samples):
        sheet.paste(sample.resize((PALETTE_SAMPLE_PX, PALETTE_SAMPLE_PX)), (0, row * PALETTE_SAMPLE_PX))
    palette = sheet.quantize(256)
    return (image.quantize(palette=palette) for image in _pictures(shown))


def _decoded(picture: Picture) -> Image.Image:
    from PIL import Image  # noqa: PLC0415 - only those who want an animation pay for it

    with Image.open(io.BytesIO(picture.data)) as file:
        image = over_white(file)
    image.thumbnail((LONGEST_EDGE_PX, LONGEST_EDGE_PX))
    return image
