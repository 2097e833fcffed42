"""Pictures on the way to watchers: the newest only, or every one that is due, kept on disk until it is read."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Protocol

import structlog

from nst_server import images
from nst_server.images import EncodedImage, Encoding

if TYPE_CHECKING:
    from nst_server.images import Mask
    from nst_server.messages import Pictured

log = structlog.get_logger()

MAX_AHEAD_BYTES = 256 * 2**20
"""Pictures that wait to be encoded for one watcher of every frame, before some are left out."""


@dataclass(frozen=True)
class PreviewSpec:
    """Which pictures a watcher wants.

    Attributes:
        interval: every so many iterations; 0 for none.
        size_px: at most this on the longer edge.
        every_frame: leave none out, however slowly they are read.
    """

    interval: int
    size_px: int
    encoding: Encoding
    every_frame: bool = False


@dataclass(frozen=True)
class Frame:
    """The picture at one iteration. `skipped` frames were due to this watcher and left out before it."""

    image: EncodedImage
    iteration: int
    skipped: int


class Picture:
    """A picture of a job. It is encoded once for each way of encoding, whoever asks."""

    def __init__(self, pictured: Pictured, width: int, height: int, alpha: Mask | None) -> None:
        self.iteration = pictured.iteration
        self.bytes = pictured.pixels.nbytes
        self._size = (width, height)  # of the finished picture: those of coarser scales are shown as large
        self._pixels = pictured.pixels
        self._alpha = alpha
        self._encoded: dict[tuple[int, Encoding], asyncio.Task[EncodedImage]] = {}

    async def encoded(self, preview: PreviewSpec) -> EncodedImage:
        """Return the picture as a watcher wants it."""
        key = (preview.size_px, preview.encoding)
        if key not in self._encoded:
            size = images.preview_size(*self._size, preview.size_px)
            work = asyncio.to_thread(images.encode, self._pixels, preview.encoding, size, alpha=self._alpha)
            self._encoded[key] = asyncio.create_task(work)
        return await asyncio.shield(self._encoded[key])


class Frames(Protocol):
    """The frames of one watcher."""

    def offer(self, picture: Picture) -> None:
        """Take note of a job's newest picture."""

    async def due(self, told: int, *, ending: bool = False) -> Frame | None:
        """Return the next frame for the watcher, who knows of iterations up to `told`; None if there is none yet.

        `ending` says that no picture will follow: then those on their way are waited for.
        """

    def close(self) -> None:
        """Forget all frames."""


class Newest:
    """A slot for the newest picture: a slow watcher costs nothing but its own frames.

    Args:
        told: up to which iteration the job had come when the stream began; −1 before the first.
    """

    def __init__(self, preview: PreviewSpec, told: int) -> None:
        self._preview = preview
        self._picture: Picture | None = None
        self._last = -1  # iteration that was shown
        self._counted = told // max(1, preview.interval) * preview.interval  # frames up to here are no loss

    def offer(self, picture: Picture) -> None:
        """Put a picture into the slot; see Frames."""
        if _is_due(picture, self._preview):
            self._picture = picture

    async def due(self, told: int, *, ending: bool = False) -> Frame | None:  # noqa: ARG002
        """Return the picture in the slot, unless it was shown; see Frames."""
        picture = self._picture
        if picture is None or not self._last < picture.iteration <= told:
            return None
        image = await picture.encoded(self._preview)
        skipped = max(0, (picture.iteration - self._counted) // self._preview.interval - 1)
        self._last = self._counted = picture.iteration
        return Frame(image, picture.iteration, skipped)

    def close(self) -> None:
        """Forget the picture; see Frames."""
        self._picture = None


class Spooled:
    """Every picture that is due, encoded as it comes and kept in a file until it is read.

    What cannot be encoded as fast as it comes, or kept, on a full disk for instance, is left out and counted.

    Args:
        file: empty, readable and writable; closed at the end.
        wake: called when there is something new.
    """

    def __init__(self, preview: PreviewSpec, file: BinaryIO, wake: Callable[[], None]) -> None:
        self._preview = preview
        self._file = file
        self._wake = wake
        self._last = -1
        self._coming: asyncio.Queue[tuple[Picture, int]] = asyncio.Queue()  # with what was left out before it
        self._kept: collections.deque[tuple[EncodedImage, int, int, int, int]] = collections.deque()
        self._skipped = 0  # since the last that is coming
        self._lost = 0  # since the last that was shown
        self._end = 0
        self._ahead_bytes = 0
        self._using = threading.Lock()
        self._task = asyncio.create_task(self._spool())

    def offer(self, picture: Picture) -> None:
        """Let a picture be kept; see Frames."""
        if _is_due(picture, self._preview) and picture.iteration > self._last:
            self._skipped += (picture.iteration - self._last) // self._preview.interval - 1 if self._last >= 0 else 0
            self._last = picture.iteration
            if self._ahead_bytes + picture.bytes > MAX_AHEAD_BYTES:
                self._skipped += 1
                return
            self._ahead_bytes += picture.bytes
            self._coming.put_nowait((picture, self._skipped))
            self._skipped = 0

    async def due(self, told: int, *, ending: bool = False) -> Frame | None:
        """Return the oldest frame that was not shown; see Frames."""
        if ending:
            await self._coming.join()
        while self._kept and self._kept[0][1] <= told:
            if frame := await self._first():
                return frame
        return None

    async def _first(self) -> Frame | None:
        """Take the oldest frame out of the file; None if it cannot be read any more."""
        image, iteration, skipped, start, length = self._kept[0]
        try:
            data = await asyncio.to_thread(self._read, start, length)
        except OSError as error:
            log.warning("frame not read", iteration=iteration, error=str(error))
            self._lost += 1 + skipped
            return None
        finally:
            self._kept.popleft()
        lost, self._lost = self._lost, 0
        return Frame(EncodedImage(data, image.format, image.width, image.height), iteration, skipped + lost)

    def close(self) -> None:
        """Drop the file; see Frames."""
        self._task.cancel()
        with contextlib.suppress(OSError):
            self._file.close()

    async def _spool(self) -> None:
        failed = 0
        while True:
            picture, skipped = await self._coming.get()
            skipped += failed
            try:
                image = await picture.encoded(self._preview)
                start = self._end if self._kept else 0  # once all is read the file's space is used again
                await asyncio.to_thread(self._write, start, image.data)
            except Exception as error:  # whatever it is, the stream goes on without that frame
                failed = skipped + 1
                log.warning("frame not kept", iteration=picture.iteration, error=str(error))
            else:
                bare = EncodedImage(b"", image.format, image.width, image.height)
                self._end = start + len(image.data)
                self._kept.append((bare, picture.iteration, skipped, start, len(image.data)))
                failed = 0
            self._ahead_bytes -= picture.bytes
            self._coming.task_done()
            self._wake()

    def _write(self, start: int, data: bytes) -> None:
        with self._using:
            self._file.seek(start)
            left = memoryview(data)
            while left:  # nothing is buffered: what a full disk refuses must not come up later
                left = left[self._file.write(left) :]

    def _read(self, start: int, length: int) -> bytes:
        with self._using:
            self._file.seek(start)
            return self._file.read(length)


def _is_due(picture: Picture, preview: PreviewSpec) -> bool:
    return preview.interval > 0 and picture.iteration % preview.interval == 0
