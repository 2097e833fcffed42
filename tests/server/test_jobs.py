"""Jobs and their watchers: the numbered log, the slot for the newest picture."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from nst_model import StylizeOptions
from nst_server import images
from nst_server.images import Encoding, ImageFormat
from nst_server.jobs import (
    Event,
    Finished,
    Frame,
    Job,
    JobError,
    JobSnapshot,
    JobSpec,
    JobState,
    PreviewSpec,
    StateChanged,
)
from nst_server.messages import Pictured, Progressed

JPEG = Encoding(ImageFormat.JPEG, 85)
EVERY = PreviewSpec(1, 64, JPEG)
NONE = PreviewSpec(0, 64, JPEG)


def new_job() -> Job:
    """Return a job of 24×16 px that waits."""
    spec = JobSpec("vgg16", StylizeOptions(), np.zeros((16, 24, 3), np.uint8), (), 1, JPEG)
    return Job(spec)


def iterated(job: Job, iteration: int, *, picture: bool = True) -> None:
    """Let a job make an iteration, as a worker reports it."""
    job.progressed(Progressed(job.name, iteration, 100, 1.0, 1.0, 0.0, 0.0, {}, 0.0, 0.0, 0.0))
    if picture:
        job.pictured(Pictured(job.name, iteration, np.full((16, 24, 3), iteration, np.uint8)))


def finished(job: Job, iteration: int) -> None:
    """Let a job succeed."""
    job.succeeded(Finished(images.encode(job.spec.content, JPEG), iteration, 1.0, "iterations"))


def kinds(events: list[Event]) -> list[Any]:
    """Return each event's kind, with its iteration or state where it has one."""
    return [
        (type(event.payload).__name__, getattr(event.payload, "iteration", None))
        for event in events
        if not isinstance(event.payload, StateChanged | JobSnapshot)
    ]


async def test_a_watcher_sees_everything_from_its_snapshot_on() -> None:
    """The snapshot carries the last number; then every event once, gapless, the terminal one last."""
    job = new_job()
    job.started("cpu", "fp32")
    iterated(job, 0)
    watching = job.watch(NONE)
    events = [await anext(watching)]
    iterated(job, 1)
    iterated(job, 2)
    finished(job, 2)
    events += [event async for event in watching]

    assert isinstance(events[0].payload, JobSnapshot)
    assert events[0].payload.state == JobState.RUNNING
    assert events[0].payload.progress is not None
    assert events[0].payload.progress.iteration == 0
    assert [event.sequence for event in events] == [2, 3, 4, 5, 6]
    assert kinds(events) == [("Progressed", 1), ("Progressed", 2), ("Finished", 2)]
    last = events[-1].payload
    assert isinstance(last, StateChanged)
    assert last.job.state == JobState.SUCCEEDED
    assert last.job.end_time is not None


async def test_a_slow_watcher_gets_the_newest_picture_and_the_count_of_the_others() -> None:
    """Pictures conflate; numbers do not; a frame comes after the progress of its iteration, with its number."""
    job = new_job()
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
    assert kinds(events) == [("Progressed", 5), ("Progressed", 6), ("Frame", 6), ("Finished", 6)]
    (frame,) = [event.payload for event in events if isinstance(event.payload, Frame)]
    assert frame.skipped == 1
    await watching.aclose()


async def test_each_watcher_has_its_own_pace_and_interval() -> None:
    """Two watchers of one job: each sees all events, frames at its own interval, skipped counted for itself."""
    job = new_job()
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


async def test_a_picture_is_encoded_once_for_all_who_want_it_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three watchers, two of them with the same wish: two encodings."""
    job, encodings = new_job(), []
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
async def test_a_watcher_of_an_ended_job_gets_its_snapshot_and_the_end(end: str) -> None:
    """Whoever comes too late is told how it ended, and does not wait for ever."""
    job = new_job()
    match end:
        case "succeeded":
            finished(job, 1)
        case "failed":
            job.failed(JobError("INTERNAL", "why"))
        case "cancelled":
            job.cancelled()
    events = [event async for event in job.watch(EVERY)]

    assert len(events) == 1
    assert isinstance(events[0].payload, JobSnapshot)
    assert events[0].payload.state == end


async def test_a_watcher_that_leaves_is_forgotten() -> None:
    """Wherever it stood: before its first event, waiting, or in the middle."""
    job = new_job()
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


def test_a_job_ends_once() -> None:
    """No terminal state is left for another."""
    job = new_job()
    job.cancelled()
    with pytest.raises(AssertionError, match="is cancelled and cannot become failed"):
        job.failed(JobError("INTERNAL", "too late"))


def test_moving_in_the_queue_is_an_event_only_if_something_moved() -> None:
    """The same position again is no news."""
    job = new_job()
    job.queue_position = 2
    job.moved(2)
    assert not job._log
    job.moved(1)
    job.started("cpu", "fp32")
    positions = [event.payload.job.queue_position for event in job._log if isinstance(event.payload, StateChanged)]
    assert positions == [1, 0]
