"""The scheduler with executors that the test holds in its hand: places, order, endings, races."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
import pytest_asyncio

from nst_model import StylizeOptions
from nst_server.errors import QueueFull, Stopping
from nst_server.images import Encoding, ImageFormat
from nst_server.jobs import Job, JobSpec, JobState
from nst_server.messages import (
    Cancel,
    Cancelled,
    Done,
    Ending,
    Failed,
    Message,
    Order,
    Pictured,
    PrepareTask,
    Progressed,
    Started,
    Task,
)
from nst_server.scheduler import MAX_PREPARATIONS, TYPICAL_JOB_S, Scheduler

PIXELS = np.zeros((16, 24, 3), np.uint8)


class Held:
    """An executor whose tasks end when the test says how."""

    device = "hand"

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.cancelled: list[str] = []
        self.is_ready = asyncio.Event()
        self.is_ready.set()
        self._ending: asyncio.Future[Ending] = asyncio.Future()

    async def ready(self) -> None:
        """Wait until the test says so."""
        await self.is_ready.wait()

    async def run(self, task: Task, report: Callable[[Message], None]) -> Ending:
        """Wait for the test's word."""
        self.tasks.append(task)
        self._ending = asyncio.Future()
        report(Started(task.id, "fp32"))
        self.report = report
        return await self._ending

    def order(self, order: Order) -> None:
        """Remember it."""
        assert isinstance(order, Cancel)
        self.cancelled.append(order.id)

    def end(self, ending: Ending | Exception) -> None:
        """End the current task."""
        if isinstance(ending, Exception):
            self._ending.set_exception(ending)
        else:
            self._ending.set_result(ending)

    def done(self) -> None:
        """End the current task well."""
        self.end(Done(self.tasks[-1].id, PIXELS, 3, 0.5, "iterations"))


@pytest_asyncio.fixture(loop_scope="session")
async def scheduler() -> AsyncIterator[Scheduler]:
    """A scheduler with two places to wait in, stopped at the end."""
    made = Scheduler(queue_size=2)
    yield made
    await made.stop(0)


def submitted(scheduler: Scheduler) -> Job:
    """Return a job that has been given to a scheduler."""
    spec = JobSpec("vgg16", StylizeOptions(), PIXELS, (), 1, Encoding(ImageFormat.PNG, 95))
    job = Job(spec)
    with scheduler.place():
        scheduler.submit(job)
    return job


async def settled() -> None:
    """Let everything happen that can, encoding in its thread too."""
    await asyncio.sleep(0.1)


async def test_places_count_what_runs_what_waits_and_what_is_being_checked(scheduler: Scheduler) -> None:
    """With one free executor three places; a held place counts; a refusal says when to come back."""
    hand = Held()
    scheduler.add(hand)
    with scheduler.place(), scheduler.place(), scheduler.place():
        with pytest.raises(QueueFull) as caught, scheduler.place():
            pass
        assert caught.value.retry_after_s > TYPICAL_JOB_S
    jobs = [submitted(scheduler) for _ in range(3)]
    await settled()
    with pytest.raises(QueueFull, match="2 jobs wait already"), scheduler.place():
        pass
    assert [job.state for job in jobs] == ["running", "queued", "queued"]

    hand.done()
    await settled()
    assert [job.state for job in jobs] == ["succeeded", "running", "queued"]
    with scheduler.place():
        pass


async def test_a_place_is_given_back_by_whoever_fails(scheduler: Scheduler) -> None:
    """An error in the block frees the place."""
    for _ in range(5):
        with pytest.raises(RuntimeError, match="not an image"), scheduler.place():
            raise RuntimeError("not an image")
    with scheduler.place(), scheduler.place():
        pass


async def test_without_a_queue_a_job_needs_a_free_executor() -> None:
    """queue_size 0: one runs, none waits."""
    scheduler, hand = Scheduler(queue_size=0), Held()
    with pytest.raises(QueueFull), scheduler.place():
        pass
    scheduler.add(hand)
    submitted(scheduler)
    with pytest.raises(QueueFull), scheduler.place():
        pass
    await settled()
    with pytest.raises(QueueFull), scheduler.place():
        pass
    hand.done()
    await settled()
    with scheduler.place():
        pass
    await scheduler.stop(0)


async def test_executors_share_one_queue(scheduler: Scheduler) -> None:
    """Two executors run the first two; whichever is free first takes the third."""
    hands = [Held(), Held()]
    for hand in hands:
        scheduler.add(hand)
    jobs = [submitted(scheduler) for _ in range(3)]
    await settled()
    assert [job.state for job in jobs] == ["running", "running", "queued"]
    hands[1].done()
    await settled()
    assert [task.id for task in hands[1].tasks] == [jobs[1].name, jobs[2].name]


async def test_an_executor_that_is_not_ready_gets_nothing(scheduler: Scheduler) -> None:
    """Jobs wait while a worker is replaced."""
    hand = Held()
    hand.is_ready.clear()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    assert job.state == "queued"
    hand.is_ready.set()
    await settled()
    assert job.state == "running"


async def test_preparations_wait_for_jobs(scheduler: Scheduler) -> None:
    """Jobs first; preparations when there are none; a failed one disturbs nobody."""
    hand = Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    for index in range(3):
        scheduler.prepare(PrepareTask(f"styles/{index}", "vgg16", (), StylizeOptions()))
    await settled()
    assert [task.id for task in hand.tasks] == [job.name]
    hand.done()
    await settled()
    hand.end(Failed("styles/0", "INTERNAL", "why"))
    await settled()
    hand.end(RuntimeError("unexpected"))
    await settled()
    assert [task.id for task in hand.tasks] == [job.name, "styles/0", "styles/1", "styles/2"]


async def test_a_job_interrupts_a_preparation(scheduler: Scheduler) -> None:
    """It is cancelled for the job, and made up for after it; a job itself is never interrupted."""
    hand = Held()
    scheduler.add(hand)
    scheduler.prepare(PrepareTask("styles/a", "vgg16", (), StylizeOptions()))
    await settled()
    job = submitted(scheduler)
    assert hand.cancelled == ["styles/a"]
    hand.end(Cancelled("styles/a"))
    await settled()
    assert job.state == "running"
    submitted(scheduler)
    assert hand.cancelled == ["styles/a"]
    for _ in range(2):
        hand.done()
        await settled()
    assert hand.tasks[-1].id == "styles/a"


async def test_preparations_are_bounded(scheduler: Scheduler) -> None:
    """What is beyond the bound is left to the jobs that need it: memory does not grow with every style created."""
    for index in range(MAX_PREPARATIONS + 5):
        scheduler.prepare(PrepareTask(f"styles/{index}", "vgg16", (), StylizeOptions()))
    assert len(scheduler._preparations) == MAX_PREPARATIONS


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        (Cancelled("x"), JobState.CANCELLED),
        (Failed("x", "OUT_OF_MEMORY", "too little"), JobState.FAILED),
        (RuntimeError("unexpected"), JobState.FAILED),
        (Done("x", np.zeros((0, 0, 3), np.uint8), 1, 0.5, "iterations"), JobState.FAILED),
    ],
    ids=["cancelled", "failed", "raises", "cannot be encoded"],
)
async def test_every_job_ends(scheduler: Scheduler, ending: Ending | Exception, state: JobState) -> None:
    """Whatever the executor says or raises, and if its picture cannot be encoded; the next job is served."""
    hand = Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    hand.end(ending)
    await settled()
    assert job.state == state
    assert (job.error is not None) == (state == JobState.FAILED)
    following = submitted(scheduler)
    await settled()
    hand.done()
    await settled()
    assert following.state == "succeeded"


async def test_cancel_at_every_stage(scheduler: Scheduler) -> None:
    """Waiting: gone at once. Running: the executor is told. Being encoded or ended: too late, and harmless."""
    hand = Held()
    scheduler.add(hand)
    running, waiting, behind = (submitted(scheduler) for _ in range(3))
    await settled()
    scheduler.cancel(waiting)
    assert (waiting.state, waiting.start_time) == ("cancelled", None)
    assert behind.queue_position == 0
    scheduler.cancel(running)
    assert hand.cancelled == [running.name]

    hand.done()  # it had finished when the cancellation reached it
    await asyncio.sleep(0)
    scheduler.cancel(running)
    await settled()
    assert running.state == "succeeded"
    for job in (running, waiting):
        scheduler.cancel(job)
    assert hand.cancelled == [running.name]
    assert behind.state == "running"


async def test_stop_waits_for_the_grace_and_then_fails_what_still_runs() -> None:
    """Waiting jobs fail at once, running ones may end within the grace, late news of a failed one is ignored."""
    scheduler, hand = Scheduler(queue_size=2), Held()
    scheduler.add(hand)
    running, waiting = submitted(scheduler), submitted(scheduler)
    await settled()
    stopping = asyncio.create_task(scheduler.stop(0.3))
    await settled()
    assert (running.state, waiting.state) == ("running", "failed")
    assert waiting.error is not None
    assert waiting.error.reason == "SERVER_STOPPING"
    with pytest.raises(Stopping), scheduler.place():
        pass
    await stopping
    assert running.state == "failed"
    assert hand.cancelled == [running.name]
    ended = len(running._log)
    hand.report(Progressed(running.name, 1, 2, 1.0, 1.0, 0.0, 0.0, {}, 0.0, 0.0, 0.0))
    hand.report(Pictured(running.name, 1, PIXELS))
    assert len(running._log) == ended


async def test_stop_lets_a_job_finish_and_encode_its_picture() -> None:
    """A job that ends within the grace succeeds, and stop returns as soon as it has."""
    scheduler, hand = Scheduler(queue_size=2), Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    began = time.monotonic()
    stopping = asyncio.create_task(scheduler.stop(30))
    await settled()
    hand.done()
    await stopping
    assert job.state == "succeeded"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("state", ["idle", "not ready", "preparing"])
async def test_stop_waits_for_jobs_only(state: str) -> None:
    """Nothing runs: stop returns at once, whatever the executors are doing."""
    scheduler, hand = Scheduler(queue_size=2), Held()
    if state == "not ready":
        hand.is_ready.clear()
    scheduler.add(hand)
    if state == "preparing":
        scheduler.prepare(PrepareTask("styles/x", "vgg16", (), StylizeOptions()))
    await settled()
    await asyncio.wait_for(scheduler.stop(30), 1)


async def test_a_job_that_comes_while_the_server_stops_is_refused() -> None:
    """Also when its place was held before: submit refuses."""
    scheduler = Scheduler(queue_size=2)
    with scheduler.place():
        await scheduler.stop(0)
        spec = JobSpec("vgg16", StylizeOptions(), PIXELS, (), 1, Encoding(ImageFormat.PNG, 95))
        with pytest.raises(Stopping):
            scheduler.submit(Job(spec))
