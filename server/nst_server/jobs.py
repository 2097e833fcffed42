"""Jobs and their streams: a numbered log of events, a slot for the newest picture, and any number of watchers.

Knows nothing of gRPC: a transport reads `Job.watch` and converts.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from nst_model.options import StylizeOptions
from nst_server import images
from nst_server.images import EncodedImage, Encoding
from nst_server.messages import Done, Pictured, Progressed, StyleImage

if TYPE_CHECKING:
    from nst_server.images import Mask, Pixels


class JobState(StrEnum):
    """Where a job stands; see the contract's JobState."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended."""
        return self not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True)
class JobError:
    """Why a job failed: `reason` for programs, `message` for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class JobSpec:
    """What a caller asked for, checked and complete.

    Attributes:
        content: HWC uint8 RGB, of the result's size.
        styles: at least one; their shares sum to 1.
        preview_interval: a picture is wanted every this many iterations; 0 for none.
        output: how the result is encoded.
        start: HWC uint8 RGB, of the result's size, the picture that Init.IMAGE starts from.
        alpha: of the result and its previews, of the result's size; None if they are opaque.
        parameters: what the result's file says of the request; see Job.parameters.
    """

    model: str
    options: StylizeOptions
    content: Pixels
    styles: tuple[StyleImage, ...]
    preview_interval: int
    output: Encoding
    start: Pixels | None = None
    alpha: Mask | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment; see the contract's Job."""

    name: str
    state: JobState
    model: str
    options: StylizeOptions
    width: int
    height: int
    create_time: datetime
    start_time: datetime | None
    end_time: datetime | None
    queue_position: int
    device: str
    precision: str
    progress: Progressed | None
    error: JobError | None


@dataclass(frozen=True)
class Finished:
    """The result of a job."""

    image: EncodedImage
    iteration: int
    loss: float
    stop_reason: str


@dataclass(frozen=True)
class StateChanged:
    """A job entered another state; `job` is as it is after that."""

    job: JobSnapshot


@dataclass(frozen=True)
class Frame:
    """The picture at one iteration. `skipped` frames were due to this watcher and left out before it."""

    image: EncodedImage
    iteration: int
    skipped: int


Payload = JobSnapshot | StateChanged | Progressed | Frame | Finished


@dataclass(frozen=True)
class Event:
    """What happened to a job, and when. `sequence` and `attempt` as in the contract's JobEvent."""

    sequence: int
    attempt: int
    time: datetime
    payload: Payload


@dataclass(frozen=True)
class PreviewSpec:
    """Which pictures a watcher wants: every `interval`-th (0 for none), at most `size_px` on the longer edge."""

    interval: int
    size_px: int
    encoding: Encoding


class Picture:
    """The newest picture of a job. It is encoded once for each way of encoding, whoever asks."""

    def __init__(self, pictured: Pictured, width: int, height: int, alpha: Mask | None) -> None:
        self.iteration = pictured.iteration
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


@dataclass(eq=False)
class Job:
    """One job: its state, its log, and who watches it. Changed by the scheduler only, on the event loop."""

    spec: JobSpec
    name: str = field(default_factory=lambda: f"jobs/{uuid.uuid4().hex}")
    state: JobState = JobState.QUEUED
    create_time: datetime = field(default_factory=lambda: datetime.now(UTC))
    start_time: datetime | None = None
    end_time: datetime | None = None
    queue_position: int = 0
    device: str = ""
    precision: str = ""
    progress: Progressed | None = None
    error: JobError | None = None
    attempt: int = 1
    _log: list[Event] = field(default_factory=list)
    _picture: Picture | None = None
    _watchers: set[asyncio.Event] = field(default_factory=set)

    def snapshot(self) -> JobSnapshot:
        """Return the job as it is now."""
        height, width = self.spec.content.shape[:2]
        return JobSnapshot(
            name=self.name,
            state=self.state,
            model=self.spec.model,
            options=self.spec.options,
            width=width,
            height=height,
            create_time=self.create_time,
            start_time=self.start_time,
            end_time=self.end_time,
            queue_position=self.queue_position,
            device=self.device,
            precision=self.precision,
            progress=self.progress,
            error=self.error,
        )

    def started(self, device: str, precision: str) -> None:
        """Note that the job got a device."""
        self.device, self.precision = device, precision
        self.start_time = datetime.now(UTC)
        self._enter(JobState.RUNNING)

    def progressed(self, progress: Progressed) -> None:
        """Note an iteration."""
        self.progress = progress
        self._append(progress)

    def pictured(self, pictured: Pictured) -> None:
        """Put the newest picture into its slot."""
        height, width = self.spec.content.shape[:2]
        self._picture = Picture(pictured, width, height, self.spec.alpha)
        self._wake()

    def parameters(self, done: Done) -> dict[str, Any]:
        """Return what the result's file says of its making: what was asked for, and what came of it."""
        loss = done.loss if math.isfinite(done.loss) else None  # JSON has no other numbers
        return {**self.spec.parameters, "loss": loss, "iteration": done.iteration, "stop_reason": done.stop_reason}

    def succeeded(self, result: Finished) -> None:
        """End the job with a result."""
        self._append(result)
        self._end(JobState.SUCCEEDED)

    def failed(self, error: JobError) -> None:
        """End the job without a result."""
        self.error = error
        self._end(JobState.FAILED)

    def cancelled(self) -> None:
        """End the job because its caller wanted that."""
        self._end(JobState.CANCELLED)

    def moved(self, queue_position: int) -> None:
        """Note that the queue moved on."""
        if queue_position != self.queue_position:
            self.queue_position = queue_position
            self._append(StateChanged(self.snapshot()))

    async def watch(self, preview: PreviewSpec) -> AsyncGenerator[Event]:
        """Yield a snapshot, then every event from now on, and pictures as they come; ends after the terminal event.

        The log is read at the watcher's own pace, and the picture's slot holds the newest only: a slow watcher costs
        nothing but its own frames.
        """
        wakeup = asyncio.Event()
        self._watchers.add(wakeup)
        try:
            cursor = len(self._log)
            last_frame = -preview.interval
            yield self._event(self.snapshot(), cursor)
            while True:
                wakeup.clear()
                while cursor < len(self._log):
                    event = self._log[cursor]
                    if isinstance(event.payload, Finished) and (frame := await self._due_frame(preview, last_frame)):
                        last_frame = frame.iteration
                        yield self._event(frame, cursor)
                    cursor += 1
                    yield event
                if self.state.terminal:
                    return
                if frame := await self._due_frame(preview, last_frame):
                    last_frame = frame.iteration
                    yield self._event(frame, cursor)
                    continue
                await wakeup.wait()
        finally:
            self._watchers.discard(wakeup)

    async def _due_frame(self, preview: PreviewSpec, last: int) -> Frame | None:
        picture = self._picture
        if not preview.interval or picture is None or picture.iteration <= last or picture.iteration % preview.interval:
            return None
        image = await picture.encoded(preview)
        return Frame(image, picture.iteration, (picture.iteration - last) // preview.interval - 1)

    def _enter(self, state: JobState) -> None:
        assert not self.state.terminal, f"{self.name} is {self.state} and cannot become {state}"
        self.state = state
        self.queue_position = 0
        self._append(StateChanged(self.snapshot()))

    def _end(self, state: JobState) -> None:
        self.end_time = datetime.now(UTC)
        self._enter(state)

    def _append(self, payload: StateChanged | Progressed | Finished) -> None:
        self._log.append(self._event(payload, len(self._log) + 1))
        self._wake()

    def _event(self, payload: Payload, sequence: int) -> Event:
        return Event(sequence, self.attempt, datetime.now(UTC), payload)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()
