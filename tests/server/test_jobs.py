"""Jobs and their watchers: the numbered log, the slot for the newest picture."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nst_server import images
from nst_server.errors import Moved
from nst_server.frames import Frame, PreviewSpec
from nst_server.jobs import Event, Finished, Heartbeat, Job, JobError, JobSnapshot, JobState, StateChanged, StoredResult
from nst_server.messages import Done, Pictured, Progressed
from tests.server.memory import EVERY, JPEG, NONE, PIXELS, MemoryLedger, new_job


@pytest.fixture
def ledger() -> MemoryLedger:
    """An archive in which everything is durable at once."""
    return MemoryLedger()


@pytest.fixture
def job(ledger: MemoryLedger) -> Job:
    """A job that waits."""
    return new_job(ledger)


def iterated(job: Job, iteration: int, *, picture: bool = True) -> None:
    """Let a job make an iteration, as a worker reports it."""
    job.progressed(Progressed(job.name, iteration, 100, 1.0, 1.0, 0.0, 0.0, {}, 0.0, 0.0, 0.0))
    if picture:
        job.pictured(Pictured(job.name, iteration, np.full((16, 24, 3), iteration, np.uint8)))


def finished(job: Job, iteration: int) -> bytes:
    """Let a job succeed; return the file of its result."""
    image = images.encode(PIXELS, JPEG)
    ledger = job._archive
    assert isinstance(ledger, MemoryLedger)
    ledger.kept(image.data)
    job.succeeded(StoredResult.of(image, Done(job.name, PIXELS, iteration, 1.0, "iterations")))
    return image.data


def kinds(events: list[Event]) -> list[Any]:
    """Return each event's kind, with its iteration or state where it has one."""
    return [
        (type(event.payload).__name__, getattr(event.payload, "iteration", None))
        for event in events
        if not isinstance(event.payload, StateChanged | JobSnapshot)
    ]


async def test_a_watcher_sees_everything(job: Job) -> None:
    """A snapshot with the last number; then every event once, gapless, the terminal one last, from any number on."""
    job.started("cpu", "fp32")
    iterated(job, 0)
    watching = job.watch(NONE, after=1)
    events = [await anext(watching)]
    iterated(job, 1)
    iterated(job, 2)
    data = finished(job, 2)
    events += [event async for event in watching]

    assert isinstance(events[0].payload, JobSnapshot)
    assert events[0].payload.state == JobState.RUNNING
    assert events[0].payload.progress is not None
    assert events[0].payload.progress.iteration == 0
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5, 6]
    assert kinds(events) == [("Progressed", 0), ("Progressed", 1), ("Progressed", 2), ("Finished", None)]
    assert isinstance(events[-2].payload, Finished)
    assert events[-2].payload.data == data
    last = events[-1].payload
    assert isinstance(last, StateChanged)
    assert last.job.state == JobState.SUCCEEDED
    assert last.job.end_time is not None
    assert last.job.result is not None


async def test_nobody_hears_of_what_is_not_durable(job: Job, ledger: MemoryLedger) -> None:
    """Neither watchers nor callers, before it is; then all of it, in order."""
    ledger.held = True
    watching = job.watch(EVERY)
    await anext(watching)
    job.started("cpu", "fp32")
    iterated(job, 0)
    assert (job.state, job.snapshot().state) == (JobState.RUNNING, JobState.QUEUED)
    told = asyncio.create_task(anext(watching))
    await asyncio.sleep(0.05)
    assert not told.done()
    ledger.release()
    assert (await told).sequence == 1
    assert [(await anext(watching)).sequence for _ in range(2)] == [2, 2]
    assert job.snapshot().state == JobState.RUNNING
    await watching.aclose()


async def test_what_was_before_this_server_comes_from_the_archive(job: Job, ledger: MemoryLedger) -> None:
    """Page by page, and then what happens now, without a gap; after compaction what is left of it."""
    job.started("cpu", "fp32")
    for iteration in range(4):
        iterated(job, iteration, picture=False)
    later = Job(job.now, ledger, job.spec)
    watching = later.watch(NONE)
    events = [await anext(watching) for _ in range(4)]
    iterated(later, 4)
    finished(later, 4)
    events += [event async for event in watching]
    assert [event.sequence for event in events] == list(range(9))
    assert [event.sequence for event in [event async for event in later.watch(NONE, after=3)]] == list(range(3, 9))

    ledger.stored = [event for event in ledger.stored if not isinstance(event.payload, Progressed)]
    gone = Job(later.now, ledger, job.spec)
    told = [event async for event in gone.watch(NONE)]
    assert [event.sequence for event in told] == [0, 1, 7, 8]
    assert isinstance(told[0].payload, JobSnapshot)
    assert told[0].payload.progress is not None
    assert told[0].payload.progress.iteration == 4


async def test_a_job_of_another_server_is_followed(job: Job, ledger: MemoryLedger) -> None:
    """The archive tells what happens to it, up to its end; a heartbeat when nothing does."""
    job.started("cpu", "fp32")
    seen = Job(job.now, ledger)
    seen.elsewhere = True
    told: list[Event] = []

    async def watch() -> None:
        told.extend([event async for event in seen.watch(NONE, after=1, heartbeat_s=1)])

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0.1)
    iterated(job, 0)
    await asyncio.sleep(1.7)
    finished(job, 0)
    await asyncio.wait_for(watching, 5)
    assert [event.sequence for event in told if not isinstance(event.payload, Heartbeat)] == [1, 2, 3, 4]
    assert any(isinstance(event.payload, Heartbeat) for event in told)


async def test_a_job_that_ends_while_it_is_looked_up_is_told_to_its_end(job: Job, ledger: MemoryLedger) -> None:
    """Its watcher has it as it was, and then no server has it any more: the archive's last event is the stream's."""
    job.started("cpu", "fp32")
    iterated(job, 0)
    seen = Job(job.now, ledger)
    seen.elsewhere = True
    job.cancelled()
    told = await asyncio.wait_for(_all(seen.watch(NONE, after=1)), 5)
    assert [event.sequence for event in told] == [1, 2, 3]


async def _all(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


async def test_watchers_of_a_job_that_is_lost_are_told(job: Job) -> None:
    """After all that was durable."""
    watching = job.watch(NONE)
    await anext(watching)
    iterated(job, 0)
    job.lost(Moved("elsewhere"))
    assert (await anext(watching)).sequence == 1
    with pytest.raises(Moved, match="elsewhere"):
        await anext(watching)
    await asyncio.wait_for(job.ended(), 1)


async def test_silence_is_broken_by_heartbeats(job: Job) -> None:
    """Again and again; each has the number of the last event."""
    iterated(job, 0)
    watching = job.watch(NONE, after=1, heartbeat_s=0.05)
    events = [await anext(watching) for _ in range(4)]
    assert [type(event.payload) for event in events] == [JobSnapshot, Heartbeat, Heartbeat, Heartbeat]
    assert [event.sequence for event in events] == [1] * 4
    await watching.aclose()


async def test_every_frame_waits_for_its_watcher(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """However slowly it reads and however slowly they are encoded: all of them, none skipped, before the result."""
    original = images.encode

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(0.01)
        return original(*arguments, **named)

    monkeypatch.setattr(images, "encode", slow)
    every = job.watch(dataclasses.replace(EVERY, every_frame=True, interval=2))
    newest = job.watch(EVERY)
    for watching in (every, newest):
        await anext(watching)
    for iteration in range(20):
        iterated(job, iteration)
    finished(job, 19)
    events = [event async for event in every]
    frames = [event.payload for event in events if isinstance(event.payload, Frame)]
    assert [(frame.iteration, frame.skipped) for frame in frames] == [(iteration, 0) for iteration in range(0, 20, 2)]
    shades = [int(np.asarray(Image.open(io.BytesIO(frame.image.data))).mean()) for frame in frames]
    assert shades == pytest.approx(range(0, 20, 2), abs=1)
    assert isinstance(events[-2].payload, Finished)
    assert sum(isinstance(event.payload, Frame) for event in [event async for event in newest]) == 1
    assert not job._frames


async def test_a_frame_that_cannot_be_kept_is_counted(job: Job, ledger: MemoryLedger) -> None:
    """A full disk costs frames, and the watcher is told how many."""

    class Full(io.BytesIO):
        full = True

        def write(self, data: Any) -> int:
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(data)

    disk = Full()
    ledger.spool = lambda: disk  # type: ignore[method-assign]
    watching = job.watch(dataclasses.replace(EVERY, every_frame=True))
    await anext(watching)
    for iteration in range(5):
        iterated(job, iteration)
        await asyncio.sleep(0.05)
        disk.full = iteration < 2
    finished(job, 4)
    frames = [event.payload for event in [event async for event in watching] if isinstance(event.payload, Frame)]
    assert [(frame.iteration, frame.skipped) for frame in frames] == [(3, 3), (4, 0)]
    assert disk.closed


async def test_a_frame_that_cannot_be_read_is_counted(job: Job, ledger: MemoryLedger) -> None:
    """The stream goes on with the next one, which tells how many are missing."""

    class Worn(io.BytesIO):
        reads = 0

        def read(self, size: int | None = -1, /) -> bytes:
            self.reads += 1
            if self.reads in (1, 2, 4):
                raise OSError(5, "Input/output error")
            return super().read(size)

    ledger.spool = Worn  # type: ignore[method-assign]
    watching = job.watch(dataclasses.replace(EVERY, every_frame=True))
    await anext(watching)
    for iteration in range(6):
        iterated(job, iteration)
    finished(job, 5)
    events = [event async for event in watching]
    frames = [event.payload for event in events if isinstance(event.payload, Frame)]
    assert [(frame.iteration, frame.skipped) for frame in frames] == [(2, 2), (4, 1), (5, 0)]
    assert isinstance(events[-2].payload, Finished)


async def test_pictures_that_wait_to_be_encoded_are_bounded(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are too many are left out, and counted where they are missing."""
    monkeypatch.setattr("nst_server.frames.MAX_AHEAD_BYTES", 3 * 16 * 24 * 3)
    may_encode = threading.Event()
    original = images.encode

    def held(*arguments: Any, **named: Any) -> Any:
        may_encode.wait(10)
        return original(*arguments, **named)

    monkeypatch.setattr(images, "encode", held)
    watching = job.watch(dataclasses.replace(EVERY, every_frame=True))
    await anext(watching)
    for iteration in range(8):
        iterated(job, iteration)
        await asyncio.sleep(0)
    may_encode.set()
    frames = []
    while len(frames) < 3:
        event = await anext(watching)
        if isinstance(event.payload, Frame):
            frames.append(event.payload)
    iterated(job, 8)
    finished(job, 8)
    frames += [event.payload for event in [event async for event in watching] if isinstance(event.payload, Frame)]
    assert [(frame.iteration, frame.skipped) for frame in frames] == [(0, 0), (1, 0), (2, 0), (8, 5)]


async def test_a_slow_watcher_gets_the_newest_picture_and_the_count_of_the_others(job: Job) -> None:
    """Pictures conflate; numbers do not; a frame comes after the progress of its iteration, with its number."""
    watching = job.watch(EVERY)
    await anext(watching)
    for iteration in range(5):
        iterated(job, iteration)
    events = [await anext(watching) for _ in range(6)]
    assert kinds(events) == [*(("Progressed", iteration) for iteration in range(5)), ("Frame", 4)]
    frame = events[-1].payload
    assert isinstance(frame, Frame)
    assert frame.skipped == 4
    assert events[-1].sequence == events[-2].sequence == 5

    iterated(job, 5)
    iterated(job, 6)
    finished(job, 6)
    events = [event async for event in watching]
    assert kinds(events) == [("Progressed", 5), ("Progressed", 6), ("Frame", 6), ("Finished", None)]
    (frame,) = [event.payload for event in events if isinstance(event.payload, Frame)]
    assert frame.skipped == 1
    await watching.aclose()


async def test_each_watcher_has_its_own_pace_and_interval(job: Job) -> None:
    """Two watchers of one job: each sees all events, frames at its own interval, skipped counted for itself."""
    every, third = job.watch(EVERY), job.watch(PreviewSpec(3, 64, JPEG))
    seen: dict[str, list[Event]] = {"every": [await anext(every)], "third": [await anext(third)]}

    async def watch(name: str, watching: Any) -> None:
        seen[name] += [event async for event in watching]

    async with asyncio.TaskGroup() as group:
        group.create_task(watch("every", every))
        group.create_task(watch("third", third))
        for iteration in range(8):
            iterated(job, iteration)
            await asyncio.sleep(0.05)
        finished(job, 7)

    frames = {
        name: [(event.payload.iteration, event.payload.skipped) for event in events if isinstance(event.payload, Frame)]
        for name, events in seen.items()
    }
    assert frames["every"] == [(iteration, 0) for iteration in range(8)]
    assert frames["third"] == [(0, 0), (3, 0), (6, 0)]
    numbers = {
        name: [event.sequence for event in events if not isinstance(event.payload, Frame | JobSnapshot)]
        for name, events in seen.items()
    }
    assert numbers["every"] == numbers["third"] == list(range(1, 11))


async def test_a_picture_is_encoded_once_for_all_who_want_it_alike(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three watchers, two of them with the same wish: two encodings."""
    encodings = []
    original = images.encode

    def counting(*arguments: Any, **named: Any) -> Any:
        encodings.append(arguments[1:])
        return original(*arguments, **named)

    monkeypatch.setattr(images, "encode", counting)
    watchers = [job.watch(preview) for preview in (EVERY, EVERY, PreviewSpec(1, 16, JPEG))]
    for watcher in watchers:
        await anext(watcher)
    iterated(job, 0)
    for watcher in watchers:
        await anext(watcher)
    frames = await asyncio.gather(*(anext(watcher) for watcher in watchers))

    assert len(encodings) == 2
    first, second, third = (frame.payload for frame in frames)
    assert isinstance(first, Frame)
    assert isinstance(second, Frame)
    assert isinstance(third, Frame)
    assert first.image is second.image
    assert (third.image.width, third.image.height) == (16, 11)
    for watcher in watchers:
        await watcher.aclose()


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
async def test_a_watcher_of_an_ended_job_gets_its_snapshot_and_the_end(job: Job, end: str) -> None:
    """Whoever comes too late is told how it ended, and does not wait for ever."""
    match end:
        case "succeeded":
            finished(job, 1)
        case "failed":
            job.failed(JobError("INTERNAL", "why"))
        case "cancelled":
            job.cancelled()
    last = job.now.sequence
    events = [event async for event in job.watch(EVERY, after=last - 1)]

    assert [event.sequence for event in events] == [last - 1, last]
    assert isinstance(events[0].payload, JobSnapshot)
    assert events[0].payload.state == end
    error = events[0].payload.error
    assert error == (JobError("INTERNAL", "why") if end == "failed" else None)
    assert len([event async for event in job.watch(EVERY, after=last)]) == 1


async def test_a_watcher_that_leaves_is_forgotten(job: Job) -> None:
    """Wherever it stood: before its first event, waiting, or in the middle."""
    for steps in range(3):
        watching = job.watch(EVERY)
        iterated(job, steps)
        for _ in range(steps):
            await anext(watching)
        await watching.aclose()
    waiting = asyncio.create_task(anext(watching := job.watch(EVERY)))
    await waiting
    blocked = asyncio.create_task(anext(watching))
    await asyncio.sleep(0.05)
    assert len(job._watchers) == 1
    blocked.cancel()
    await asyncio.wait([blocked])
    await watching.aclose()

    assert not job._watchers


def test_a_job_ends_once(job: Job) -> None:
    """No terminal state is left for another."""
    job.cancelled()
    with pytest.raises(AssertionError, match="is cancelled and cannot become failed"):
        job.failed(JobError("INTERNAL", "too late"))


async def test_moving_in_the_queue_is_an_event_only_if_something_moved(job: Job, ledger: MemoryLedger) -> None:
    """The same position again is no news."""
    job.moved(2)
    job.moved(2)
    job.moved(1)
    job.started("cpu", "fp32")
    positions = [event.payload.job.queue_position for event in ledger.stored if isinstance(event.payload, StateChanged)]
    assert positions == [2, 1, 0]


async def test_a_long_queue_is_told_of_in_few_events(job: Job, ledger: MemoryLedger) -> None:
    """Each step near the front, and each halving further back; the job itself always says where it is."""
    for position in range(600, -1, -1):
        job.moved(position)
        assert job.snapshot().queue_position == position
    positions = [event.payload.job.queue_position for event in ledger.stored if isinstance(event.payload, StateChanged)]
    assert positions == [600, 300, 150, 75, 37, 18, *range(9, -1, -1)]
    job.moved(40)
    assert ledger.stored[-1].payload.job.queue_position == 40


async def test_pause_and_resume_keep_what_was_done(job: Job, ledger: MemoryLedger) -> None:
    """The start's time and the progress stay; the device is given back."""
    job.attempted(1)
    job.started("cpu", "fp32")
    iterated(job, 0)
    job.paused()
    assert (job.now.state, job.now.device, job.now.attempt) == (JobState.PAUSED, "", 1)
    job.queued()
    job.attempted(2)
    started = job.now.start_time
    job.started("cuda:0", "bf16")
    assert (job.now.start_time, job.now.device, job.now.attempt) == (started, "cuda:0", 2)
    assert job.now.progress is not None
    states = [event.payload.job.state for event in ledger.stored if isinstance(event.payload, StateChanged)]
    assert states == ["running", "paused", "queued", "running"]
