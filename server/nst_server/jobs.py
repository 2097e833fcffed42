"""Jobs and their streams: a numbered log of events, a slot for the newest picture, and any number of watchers.

Knows nothing of gRPC: a transport reads `Job.watch` and converts.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from nst_model.options import StylizeOptions
from nst_server.errors import RequestError, StorageUnavailable
from nst_server.frames import Frame, Frames, Newest, Picture, PreviewSpec, Spooled
from nst_server.images import EncodedImage, Encoding, ImageFormat
from nst_server.messages import Checkpoint, Done, Pictured, Progressed, StyleImage, StyleMoments

if TYPE_CHECKING:
    from nst_server.images import Mask, Pixels

HEARTBEAT_S = 10.0
"""A stream that has nothing to tell says so after this time."""

EACH_STEP = 10
"""A place in the queue nearer to the front than this is told at each step."""

FOLLOW_S = 0.5
"""How often the archive is asked for news of a job on another server."""


class JobState(StrEnum):
    """Where a job stands; see the contract's JobState."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


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
    styles: tuple[StyleImage | StyleMoments, ...]
    preview_interval: int
    output: Encoding
    start: Pixels | None = None
    alpha: Mask | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobSnapshot:
    """A job at one moment; see the contract's Job.

    Attributes:
        finishing: whether its caller said that the best picture so far is enough.
    """

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
    result: StoredResult | None = None
    attempt: int = 0
    sequence: int = 0
    request_id: str = ""
    finishing: bool = False

    @classmethod
    def queued(cls, spec: JobSpec, request_id: str = "", queue_position: int = 0) -> JobSnapshot:
        """Return a new job."""
        height, width = spec.content.shape[:2]
        return cls(
            name=f"jobs/{uuid.uuid4().hex}",
            state=JobState.QUEUED,
            model=spec.model,
            options=spec.options,
            width=width,
            height=height,
            create_time=_utc(),
            start_time=None,
            end_time=None,
            queue_position=queue_position,
            device="",
            precision="",
            progress=None,
            error=None,
            request_id=request_id,
        )


@dataclass(frozen=True)
class StoredResult:
    """The result of a job, without its file: that is the blob of that SHA-256, `total_bytes` long."""

    sha256: str
    format: ImageFormat
    width: int
    height: int
    total_bytes: int
    iteration: int
    loss: float
    stop_reason: str

    @classmethod
    def of(cls, image: EncodedImage, done: Done) -> StoredResult:
        """Return what is kept of a finished picture."""
        size = (image.width, image.height, len(image.data))
        return cls(image.sha256, image.format, *size, done.iteration, done.loss, done.stop_reason)


@dataclass(frozen=True)
class Finished:
    """The result of a job; a watcher gets its file, too."""

    result: StoredResult
    data: bytes = b""


@dataclass(frozen=True)
class StateChanged:
    """A job entered another state; `job` is as it is after that."""

    job: JobSnapshot


@dataclass(frozen=True)
class Heartbeat:
    """Nothing has happened for a while."""


Payload = JobSnapshot | StateChanged | Progressed | Frame | Finished | Heartbeat


@dataclass(frozen=True)
class Event:
    """What happened to a job, and when. `sequence` and `attempt` as in the contract's JobEvent."""

    sequence: int
    attempt: int
    time: datetime
    payload: Payload


class Archive(Protocol):
    """Where a job's events and files are kept."""

    def append(self, job: Job, events: Sequence[Event], images: Sequence[str]) -> None:
        """Write a job's next events, with the job as it is after them; calls `job.written` or `job.lost` later."""

    async def events(self, name: str, after: int) -> list[Event]:
        """Return some of a job's events after a number, the next first; none if there are no more.

        Raises NotFound if the job has been deleted.
        """

    async def file(self, sha256: str) -> bytes:
        """Return a result's file."""

    @property
    def read_only(self) -> RequestError | None:
        """Why nothing that happens can be told, and probably will not be soon; None if it can, or will be."""

    def spool(self) -> BinaryIO:
        """Return an empty file for frames that wait, which is gone when it is closed."""


class Job:
    """One job: its state, its log, and who watches it. Changed on the event loop only, by the scheduler.

    What happens is appended to the archive first, and shown to watchers and callers when it is durable there:
    nobody has heard of what a crash could undo.

    Args:
        snapshot: the job as it is in the archive.
        archive: where the events up to `snapshot.sequence` are, and those to come go.
        spec: what to make; None if that has to be made out of the stored request first.
        alpha: of the result and its previews.

    Attributes:
        caller: whose turn in the queue it takes; not stored.
        checkpoint: where a worker can go on from.
        elsewhere: whether another server has the job: then the archive tells what happens to it.
        every_frame: whether somebody wants each picture that is due, and not just the newest.
    """

    def __init__(
        self, snapshot: JobSnapshot, archive: Archive, spec: JobSpec | None = None, *, caller: str = ""
    ) -> None:
        self.name = snapshot.name
        self.caller = caller
        self.spec = spec
        self.checkpoint: Checkpoint | None = None
        self.elsewhere = False
        self.every_frame = False
        self._archive = archive
        self._now = self._shown = snapshot
        self._told_position = snapshot.queue_position
        self._before = snapshot.sequence  # events up to this one are in the archive only
        self._log: list[Event] = []
        self._picture: Picture | None = None
        self._frames: set[Frames] = set()
        self._watchers: set[asyncio.Event] = set()
        self._lost: RequestError | None = None

    @property
    def state(self) -> JobState:
        """Where the job stands, whether or not that is durable yet."""
        return self._now.state

    @property
    def gone(self) -> bool:
        """Whether nothing more will be heard of the job here."""
        return self._lost is not None

    @property
    def now(self) -> JobSnapshot:
        """The job as it is, whether or not that is durable yet."""
        return self._now

    def snapshot(self) -> JobSnapshot:
        """Return the job as far as is durable, and its place in the queue as it is."""
        if self._shown.state is self._now.state is JobState.QUEUED:
            return replace(self._shown, queue_position=self._now.queue_position)
        return self._shown

    def attempted(self, attempt: int) -> None:
        """Note that an attempt at the job begins."""
        self._now = replace(self._now, attempt=attempt)

    def started(self, device: str, precision: str) -> None:
        """Note that the job got a device."""
        start_time = self._now.start_time or _utc()
        self._enter(JobState.RUNNING, device=device, precision=precision, start_time=start_time)

    def progressed(self, progress: Progressed) -> None:
        """Note an iteration."""
        self._now = replace(self._now, progress=progress)
        self._append(progress)

    def pictured(self, pictured: Pictured) -> None:
        """Put the newest picture into its slot."""
        alpha = None if self.spec is None else self.spec.alpha
        self._picture = Picture(pictured, self._now.width, self._now.height, alpha)
        for frames in self._frames:
            frames.offer(self._picture)
        self._wake()

    def steered(self, options: StylizeOptions, iterations: int | None = None) -> None:
        """Note that the job goes on with other options, and how many iterations that makes, if it is known."""
        progress = self._now.progress
        if progress is not None and iterations is not None:
            progress = replace(progress, iterations=iterations)
        self._now = replace(self._now, options=options, progress=progress)
        self._append(StateChanged(self._now))

    def finishing(self) -> None:
        """Note that the best picture so far is enough for its caller."""
        self._now = replace(self._now, finishing=True)
        self._append(StateChanged(self._now))

    def succeeded(self, result: StoredResult) -> None:
        """End the job with a result, whose file is in the archive."""
        self._now = replace(self._now, result=result)
        self._append(Finished(result), images=(result.sha256,))
        self._end(JobState.SUCCEEDED)

    def failed(self, error: JobError) -> None:
        """End the job without a result."""
        self._end(JobState.FAILED, error=error)

    def cancelled(self) -> None:
        """End the job because its caller wanted that."""
        self._end(JobState.CANCELLED)

    def paused(self) -> None:
        """Note that the job waits until its caller wants it to go on."""
        self._enter(JobState.PAUSED, device="", precision="")

    def queued(self) -> None:
        """Note that the job waits for a device again."""
        self._enter(JobState.QUEUED, device="", precision="")

    def moved(self, queue_position: int) -> None:
        """Note that the queue moved on; an event tells of it near the front, and at each halving further back.

        Every step of every job would be as many events as the square of the queue's length.
        """
        if queue_position == self._now.queue_position:
            return
        self._now = replace(self._now, queue_position=queue_position)
        if queue_position < EACH_STEP or not self._told_position / 2 < queue_position <= self._told_position:
            self._told_position = queue_position
            self._append(StateChanged(self._now))

    def written(self, events: Sequence[Event], shown: JobSnapshot) -> None:
        """Show events that are durable now, and the job as it is after them."""
        self._log.extend(events)
        self._shown = shown
        self._wake()

    def lost(self, error: RequestError) -> None:
        """Note why nothing more will be heard of the job here."""
        self._lost = error
        self._wake()

    def check(self) -> None:
        """Raise why nothing more will be heard of the job here, unless it has ended."""
        if self._lost is not None and not self._shown.state.terminal:
            raise self._lost

    async def ended(self) -> None:
        """Wait until the job has ended, and that is durable, or nothing more will be heard of it here."""
        wakeup = asyncio.Event()
        self._watchers.add(wakeup)
        try:
            while not (self._shown.state.terminal or self._lost):
                await wakeup.wait()
                wakeup.clear()
        finally:
            self._watchers.discard(wakeup)

    def parameters(self, done: Done) -> dict[str, Any]:
        """Return what the result's file says of its making: what was asked for, and what came of it."""
        assert self.spec is not None, "a job that has run has a spec"
        loss = done.loss if math.isfinite(done.loss) else None  # JSON has no other numbers
        return {**self.spec.parameters, "loss": loss, "iteration": done.iteration, "stop_reason": done.stop_reason}

    async def watch(
        self, preview: PreviewSpec, after: int = 0, heartbeat_s: float = HEARTBEAT_S
    ) -> AsyncGenerator[Event]:
        """Yield a snapshot, then every event after a number, and pictures as they come; ends after the terminal event.

        The log is read at the watcher's own pace. Raises what `lost` was told.
        """
        wakeup = asyncio.Event()
        told = -1 if self._shown.progress is None else self._shown.progress.iteration
        frames: Frames = Newest(preview, told)
        if preview.every_frame and preview.interval:
            frames = Spooled(preview, self._archive.spool(), wakeup.set)  # which may be refused
        self._watchers.add(wakeup)
        self._frames.add(frames)
        if self._picture is not None:
            frames.offer(self._picture)
        try:
            yield self._event(self.snapshot(), after)
            cursor = after
            async for event in self._past(after):
                cursor = event.sequence  # it may be one that has come since, even the last
                yield event
                if _is_last(event):
                    return
            cursor = max(cursor, self._before)  # what is compacted is in the snapshot
            if self.elsewhere and not self._shown.state.terminal:
                present = self._follow(cursor, wakeup, heartbeat_s)
            else:
                present = self._present(cursor, told, frames, wakeup, heartbeat_s)
            async for event in present:
                yield event
        finally:
            self._watchers.discard(wakeup)
            self._frames.discard(frames)
            frames.close()

    async def _past(self, cursor: int) -> AsyncGenerator[Event]:
        """Yield the events after a number that are in the archive only."""
        while cursor < self._before and (events := await self._archive.events(self.name, cursor)):
            for event in events:
                cursor = event.sequence
                yield await self._whole(event)

    async def _present(
        self, cursor: int, told: int, frames: Frames, wakeup: asyncio.Event, heartbeat_s: float
    ) -> AsyncGenerator[Event]:
        """Yield the events after a number that have been seen here, and those to come, with frames in between."""
        loop = asyncio.get_running_loop()
        quiet_until = loop.time() + heartbeat_s
        while True:
            wakeup.clear()
            while cursor < self._before + len(self._log):
                event = self._log[cursor - self._before]
                if isinstance(event.payload, Finished):
                    while frame := await frames.due(told, ending=True):
                        yield self._event(frame, cursor)
                if isinstance(event.payload, Progressed):
                    told = event.payload.iteration
                cursor += 1
                yield await self._whole(event)
                quiet_until = loop.time() + heartbeat_s
            if self._shown.state.terminal:
                return
            if (error := self._lost or self._archive.read_only) is not None:
                raise error
            if frame := await frames.due(told):
                yield self._event(frame, cursor)
                quiet_until = loop.time() + heartbeat_s
                continue
            try:
                async with asyncio.timeout_at(quiet_until):
                    await wakeup.wait()
            except TimeoutError:  # pictures that cannot be shown yet are no sign of life
                yield self._event(Heartbeat(), cursor)
                quiet_until = loop.time() + heartbeat_s

    async def _follow(self, cursor: int, wakeup: asyncio.Event, heartbeat_s: float) -> AsyncGenerator[Event]:
        """Yield what the archive tells of a job on another server after a number, up to its end; no pictures."""
        quiet_s = 0.0
        while self._lost is None:
            for event in await self._news(cursor):
                cursor, quiet_s = event.sequence, 0.0
                yield await self._whole(event)
                if _is_last(event):
                    return
            with contextlib.suppress(TimeoutError):  # a server that stops says so at once
                await asyncio.wait_for(wakeup.wait(), FOLLOW_S)
            quiet_s += FOLLOW_S
            if quiet_s >= heartbeat_s:
                quiet_s = 0.0
                yield self._event(Heartbeat(), cursor)
        raise self._lost

    async def _news(self, cursor: int) -> list[Event]:
        """Return some of the archive's events after a number; none while it does not answer."""
        try:
            return await self._archive.events(self.name, cursor)
        except StorageUnavailable:
            return []

    async def _whole(self, event: Event) -> Event:
        """Return an event with the file that belongs to it."""
        if not isinstance(event.payload, Finished):
            return event
        data = await self._archive.file(event.payload.result.sha256)
        return replace(event, payload=replace(event.payload, data=data))

    def _enter(self, state: JobState, **changes: Any) -> None:
        assert not self.state.terminal, f"{self.name} is {self.state} and cannot become {state}"
        self._now = replace(self._now, state=state, queue_position=0, **changes)
        self._told_position = 0
        self._append(StateChanged(self._now))

    def _end(self, state: JobState, **changes: Any) -> None:
        self._enter(state, end_time=_utc(), **changes)

    def _append(self, payload: Payload, images: Sequence[str] = ()) -> None:
        sequence = self._now.sequence + 1
        self._now = replace(self._now, sequence=sequence)
        if isinstance(payload, StateChanged):
            payload = StateChanged(self._now)
        self._archive.append(self, [self._event(payload, sequence)], images)

    def _event(self, payload: Payload, sequence: int) -> Event:
        return Event(sequence, self._now.attempt, _utc(), payload)

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()


def _is_last(event: Event) -> bool:
    return isinstance(event.payload, StateChanged) and event.payload.job.state.terminal


def _utc() -> datetime:
    return datetime.now(UTC)
