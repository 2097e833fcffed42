"""Where jobs are kept in tests that hold the archive in their hand."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from nst_model import StylizeOptions
from nst_server.errors import RequestError
from nst_server.frames import PreviewSpec
from nst_server.images import Encoding, ImageFormat
from nst_server.jobs import Event, Job, JobSnapshot, JobSpec
from nst_server.messages import Checkpoint

JPEG = Encoding(ImageFormat.JPEG, 85)
EVERY = PreviewSpec(1, 64, JPEG)
NONE = PreviewSpec(0, 64, JPEG)
PIXELS = np.zeros((16, 24, 3), np.uint8)


class MemoryLedger:
    """An archive and ledger that remembers; what is appended is durable at once, unless `held`.

    Attributes:
        held: whether what is appended waits for `release`.
        refuses: what `keep_result` raises.
    """

    read_only: RequestError | None = None

    def __init__(self) -> None:
        self.stored: list[Event] = []
        self.files: dict[str, bytes] = {}
        self.checkpoints: list[Checkpoint] = []
        self.dropped: list[str] = []
        self.held = False
        self.refuses: RequestError | None = None
        self.taken: set[str] = set()
        self._waiting: list[tuple[Job, Sequence[Event], JobSnapshot]] = []

    def append(self, job: Job, events: Sequence[Event], images: Sequence[str]) -> None:
        """Write events; see Archive."""
        assert all(sha256 in self.files for sha256 in images)
        self._waiting.append((job, events, job.now))
        if not self.held:
            self.release()

    def release(self) -> None:
        """Make durable what has been appended."""
        waiting, self._waiting = self._waiting, []
        for job, events, now in waiting:
            self.stored += events
            job.written(events, now)

    async def events(self, name: str, after: int) -> list[Event]:
        """Return some events, two at a time; see Archive."""
        assert name.startswith("jobs/")
        return [event for event in self.stored if event.sequence > after][:2]

    async def file(self, sha256: str) -> bytes:
        """Return a file; see Archive."""
        return self.files[sha256]

    def spool(self) -> BinaryIO:
        """Return a file; see Archive."""
        return io.BytesIO()

    async def attempt(self, job: Job) -> bool:
        """Begin an attempt; see Keeping. Jobs in `taken` are another server's."""
        if job.name in self.taken:
            return False
        job.attempted(job.now.attempt + 1)
        return True

    async def keep_result(self, job: Job, data: bytes, width: int, height: int, media_type: str) -> None:
        """Keep a result; see Keeping."""
        assert job.spec
        assert width
        assert height
        assert media_type.startswith("image/")
        if self.refuses:
            raise self.refuses
        self.kept(data)

    def kept(self, data: bytes) -> None:
        """Keep a file."""
        self.files[hashlib.sha256(data).hexdigest()] = data

    def keep_checkpoint(self, job: Job, checkpoint: Checkpoint) -> None:
        """Note a checkpoint; see Keeping."""
        job.checkpoint = checkpoint
        self.checkpoints.append(checkpoint)

    def drop_checkpoints(self, job: Job) -> None:
        """Note the end of a job; see Keeping."""
        self.dropped.append(job.name)


def new_spec(output: Encoding = JPEG) -> JobSpec:
    """Return what to make: 24×16 px."""
    return JobSpec("vgg16", StylizeOptions(), PIXELS, (), 1, output)


def new_job(ledger: MemoryLedger, *, caller: str = "", output: Encoding = JPEG) -> Job:
    """Return a job that waits."""
    spec = new_spec(output)
    return Job(JobSnapshot.queued(spec), ledger, spec, caller=caller)
