"""The scheduler with executors that the test holds in its hand: places, order, endings, races."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Callable, Iterable

import numpy as np
import pytest
import pytest_asyncio

from nst_model import StylizeOptions
from nst_server.errors import Moved, QueueFull, Stopping, StorageFull, StorageReadOnly
from nst_server.images import Encoding, ImageFormat
from nst_server.jobs import Job, JobState, StateChanged
from nst_server.messages import (
    Cancel,
    Cancelled,
    Checkpoint,
    Done,
    Ending,
    EveryFrame,
    Failed,
    Finish,
    Kept,
    Message,
    Order,
    PrepareTask,
    Started,
    Steer,
    Steered,
    StylizeTask,
    Suspend,
    Suspended,
    Task,
)
from nst_server.scheduler import MAX_ATTEMPTS, MAX_DEATHS, MAX_PREPARATIONS, TYPICAL_JOB_S, Scheduler
from tests.server.memory import PIXELS, MemoryLedger, new_job, new_spec

PNG = Encoding(ImageFormat.PNG, 95)


class Held:
    """An executor whose tasks end when the test says how."""

    device = "hand"
    memory_bytes = 0

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.orders: list[Order] = []
        self.is_ready = asyncio.Event()
        self.is_ready.set()
        self._ending: asyncio.Future[Ending] = asyncio.Future()

    async def ready(self) -> None:
        """Wait until the test says so."""
        await self.is_ready.wait()

    async def run(self, task: Task, report: Callable[[Message], None], orders: Iterable[Order] = ()) -> Ending:
        """Wait for the test's word."""
        self.tasks.append(task)
        self.orders += orders
        self._ending = asyncio.Future()
        report(Started(task.id, "fp32"))
        self.report = report
        return await self._ending

    @property
    def cancelled(self) -> list[str]:
        """What was to be cancelled."""
        return [order.id for order in self.orders if isinstance(order, Cancel)]

    def order(self, order: Order) -> None:
        """Remember it."""
        self.orders.append(order)

    def end(self, ending: Ending | Exception) -> None:
        """End the current task."""
        if isinstance(ending, Exception):
            self._ending.set_exception(ending)
        else:
            self._ending.set_result(ending)

    def done(self) -> None:
        """End the current task well."""
        self.end(Done(self.tasks[-1].id, PIXELS, 3, 0.5, "iterations"))


class Queue(Scheduler):
    """A scheduler with a ledger that the test holds in its hand, too."""

    def __init__(self, queue_size: int) -> None:
        self.ledger = MemoryLedger()
        self.loaded: list[str] = []
        super().__init__(queue_size, self.ledger, self._load_spec)

    async def _load_spec(self, job: Job) -> None:
        self.loaded.append(job.name)
        job.spec = new_spec(PNG)


@pytest_asyncio.fixture(loop_scope="session")
async def scheduler() -> AsyncIterator[Queue]:
    """A scheduler with two places to wait in, stopped at the end."""
    made = Queue(queue_size=2)
    yield made
    await made.stop(0)


def submitted(scheduler: Queue, caller: str = "") -> Job:
    """Return a job that has been given to a scheduler."""
    job = new_job(scheduler.ledger, caller=caller, output=PNG)
    with scheduler.place():
        scheduler.submit(job)
    return job


async def settled() -> None:
    """Let everything happen that can, encoding in its thread too."""
    await asyncio.sleep(0.1)


async def test_places_count_what_runs_what_waits_and_what_is_being_checked(scheduler: Queue) -> None:
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


async def test_a_place_is_given_back_by_whoever_fails(scheduler: Queue) -> None:
    """An error in the block frees the place."""
    for _ in range(5):
        with pytest.raises(RuntimeError, match="not an image"), scheduler.place():
            raise RuntimeError("not an image")
    with scheduler.place(), scheduler.place():
        pass


async def test_without_a_queue_a_job_needs_a_free_executor() -> None:
    """queue_size 0: one runs, none waits."""
    scheduler, hand = Queue(queue_size=0), Held()
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


async def test_executors_share_one_queue(scheduler: Queue) -> None:
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


async def test_an_executor_that_is_not_ready_gets_nothing(scheduler: Queue) -> None:
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


async def test_preparations_wait_for_jobs(scheduler: Queue) -> None:
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


async def test_a_job_interrupts_a_preparation(scheduler: Queue) -> None:
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


async def test_preparations_are_bounded(scheduler: Queue) -> None:
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
async def test_every_job_ends(scheduler: Queue, ending: Ending | Exception, state: JobState) -> None:
    """Whatever the executor says or raises, and if its picture cannot be encoded; the next job is served."""
    hand = Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    hand.end(ending)
    await settled()
    assert job.state == state
    assert (job.now.error is not None) == (state == JobState.FAILED)
    following = submitted(scheduler)
    await settled()
    hand.done()
    await settled()
    assert following.state == "succeeded"


async def test_cancel_at_every_stage(scheduler: Queue) -> None:
    """Waiting: gone at once. Running: the executor is told. Being encoded or ended: too late, and harmless."""
    hand = Held()
    scheduler.add(hand)
    running, waiting, behind = (submitted(scheduler) for _ in range(3))
    await settled()
    scheduler.cancel(waiting)
    assert (waiting.state, waiting.now.start_time) == ("cancelled", None)
    assert behind.now.queue_position == 0
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


async def test_orders_that_come_while_a_task_is_made_are_not_lost(scheduler: Queue) -> None:
    """Between a job's turn and its task there are the database and the decoding of its images."""
    hand, attempting = Held(), asyncio.Event()
    original = scheduler.ledger.attempt

    async def slow(job: Job) -> bool:
        await attempting.wait()
        return await original(job)

    scheduler.ledger.attempt = slow  # type: ignore[method-assign]
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    scheduler.every_frame(job)
    scheduler.cancel(job)
    assert (hand.tasks, job.state) == ([], "queued")
    attempting.set()
    await settled()
    assert hand.orders == [EveryFrame(job.name), Cancel(job.name)]


async def test_stop_waits_for_the_grace_and_then_suspends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting jobs wait on, running ones may end within the grace, and are then asked for their state; none is lost."""
    monkeypatch.setattr("nst_server.scheduler.SUSPEND_S", 0.2)
    scheduler, hands = Queue(queue_size=2), [Held(), Held()]
    for hand in hands:
        scheduler.add(hand)
    good, deaf, waiting = (submitted(scheduler) for _ in range(3))
    await settled()
    stopping = asyncio.create_task(scheduler.stop(0.4))
    await settled()
    assert [job.state for job in (good, deaf, waiting)] == ["running", "running", "queued"]
    assert not hands[0].orders
    with pytest.raises(Stopping), scheduler.place():
        pass
    await asyncio.sleep(0.2)
    assert hands[0].orders == [Suspend(good.name)]
    hands[0].report(Kept(good.name, Checkpoint("k", 3, 1.0)))
    hands[0].end(Suspended(good.name))
    await stopping
    assert [job.state for job in (good, deaf, waiting)] == ["queued"] * 3
    assert scheduler.ledger.checkpoints == [Checkpoint("k", 3, 1.0)]
    assert scheduler.ledger.dropped == []


async def test_stop_lets_a_job_finish_and_encode_its_picture() -> None:
    """A job that ends within the grace succeeds, and stop returns as soon as it has."""
    scheduler, hand = Queue(queue_size=2), Held()
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
    scheduler, hand = Queue(queue_size=2), Held()
    if state == "not ready":
        hand.is_ready.clear()
    scheduler.add(hand)
    if state == "preparing":
        scheduler.prepare(PrepareTask("styles/x", "vgg16", (), StylizeOptions()))
    await settled()
    await asyncio.wait_for(scheduler.stop(30), 1)


async def test_a_job_that_comes_while_the_server_stops_is_refused() -> None:
    """Also when its place was held before: submit refuses."""
    scheduler = Queue(queue_size=2)
    with scheduler.place():
        await scheduler.stop(0)
        with pytest.raises(Stopping):
            scheduler.submit(new_job(scheduler.ledger))


async def test_callers_take_turns(scheduler: Queue) -> None:
    """One caller's two jobs do not hold up another's, which came later."""
    hand = Held()
    submitted(scheduler, "a")
    scheduler.add(hand)
    await settled()
    second, other = submitted(scheduler, "a"), submitted(scheduler, "b")
    hand.done()
    await settled()
    hand.done()
    await settled()
    assert [task.id for task in hand.tasks[1:]] == [second.name, other.name]
    third, late = submitted(scheduler, "b"), submitted(scheduler, "c")
    assert (third.now.queue_position, late.now.queue_position) == (0, 1)


async def test_pause_gives_the_device_back_and_resume_goes_on_from_the_checkpoint(scheduler: Queue) -> None:
    """The next job runs meanwhile; a paused job is not in the queue; its next attempt gets its state."""
    hand = Held()
    scheduler.add(hand)
    job, following = submitted(scheduler), submitted(scheduler)
    await settled()
    scheduler.pause(job)
    assert hand.orders == [Suspend(job.name)]
    hand.report(Kept(job.name, Checkpoint("k", 7, 1.0)))
    hand.end(Suspended(job.name))
    await settled()
    assert (job.state, following.state) == ("paused", "running")
    assert scheduler.estimated_start_s(job) is None
    scheduler.resume(job)
    assert job.state == "queued"
    hand.done()
    await settled()
    task = hand.tasks[-1]
    assert isinstance(task, StylizeTask)
    assert (task.id, task.checkpoint, task.attempt) == (job.name, Checkpoint("k", 7, 1.0), 2)
    hand.done()
    await settled()
    assert job.state == "succeeded"
    assert scheduler.ledger.dropped == [following.name, job.name]


async def test_pause_and_resume_of_what_waits(scheduler: Queue) -> None:
    """It leaves the queue at once, and comes back at its end. Resumed before it has paused it goes on by itself."""
    hand = Held()
    running, waiting = submitted(scheduler), submitted(scheduler)
    scheduler.pause(waiting)
    assert (waiting.state, len(scheduler._waiting)) == ("paused", 1)
    scheduler.pause(waiting)
    scheduler.add(hand)
    await settled()
    scheduler.resume(waiting)
    scheduler.resume(waiting)
    assert (waiting.state, len(scheduler._waiting)) == ("queued", 1)
    scheduler.pause(running)
    scheduler.resume(running)
    hand.end(Suspended(running.name))
    await settled()
    assert running.state == "running"
    states = [event.payload.job.state for event in scheduler.ledger.stored if isinstance(event.payload, StateChanged)]
    assert states.count("paused") == 1
    for _ in range(2):
        hand.done()
        await settled()
    scheduler.pause(running)
    scheduler.resume(running)
    scheduler.cancel(running)
    assert running.state == waiting.state == "succeeded"


async def test_steering_reaches_a_running_job_by_order_and_a_waiting_one_at_once(scheduler: Queue) -> None:
    """The options change when the worker says so, or now; the task of the next attempt has them."""
    hand = Held()
    running, waiting = submitted(scheduler), submitted(scheduler)
    scheduler.add(hand)
    await settled()
    options = StylizeOptions(content_weight=3)
    for job in (running, waiting):
        scheduler.steer(job, options, {"content_weight": 3})
    assert hand.orders == [Steer(running.name, {"content_weight": 3})]
    assert (running.now.options.content_weight, waiting.now.options.content_weight) == (0.025, 3)
    hand.report(Steered(running.name, options, 100))
    assert running.now.options == options
    hand.done()
    await settled()
    task = hand.tasks[-1]
    assert isinstance(task, StylizeTask)
    assert task.options == options


async def test_enough(scheduler: Queue) -> None:
    """A running job is told to finish; one that waits or is paused begins first, and is told then."""
    hand = Held()
    scheduler.add(hand)
    running, paused = submitted(scheduler), submitted(scheduler)
    await settled()
    scheduler.pause(paused)
    scheduler.finish(running)
    assert hand.orders == [Finish(running.name)]
    scheduler.finish(paused)
    assert paused.state == "queued"
    hand.done()
    await settled()
    assert hand.orders[1:] == [Finish(paused.name)]


async def test_every_frame_is_asked_for_once_it_is_wanted(scheduler: Queue) -> None:
    """By order of a running job, with the task of a waiting one."""
    hand = Held()
    scheduler.add(hand)
    running, waiting = submitted(scheduler), submitted(scheduler)
    await settled()
    for job in (running, waiting):
        scheduler.every_frame(job)
    assert hand.orders == [EveryFrame(running.name)]
    hand.done()
    await settled()
    assert [task.every_frame for task in hand.tasks if isinstance(task, StylizeTask)] == [False, True]


async def test_a_dead_worker_costs_an_attempt_and_not_the_job(scheduler: Queue) -> None:
    """It goes before others; after some deaths in a row it fails, but a checkpoint in between says it moves on."""
    hand = Held()
    scheduler.add(hand)
    job, other = submitted(scheduler), submitted(scheduler)
    await settled()
    for death in range(2 * MAX_DEATHS - 2):
        if death == MAX_DEATHS - 1:
            hand.report(Kept(job.name, Checkpoint("k", 1, 1.0)))
        hand.end(Failed(job.name, "WORKER_DIED", "killed"))
        await settled()
        assert (job.state, job.now.attempt) == ("running", death + 2)
    hand.end(Failed(job.name, "WORKER_DIED", "killed again"))
    await settled()
    assert job.now.error is not None
    assert (job.now.error.reason, other.state) == ("WORKER_DIED", "running")


async def test_a_job_that_takes_its_servers_along_is_given_up(scheduler: Queue) -> None:
    """Nobody lives to count how often; but attempts are numbered, and so is the one that the last checkpoint is of."""
    hand = Held()
    scheduler.add(hand)
    for attempts, checkpoint, state in (
        (MAX_ATTEMPTS, None, "failed"),
        (MAX_ATTEMPTS - 1, None, "running"),
        (MAX_ATTEMPTS, Checkpoint("k", 7, 1.0, attempt=1), "running"),
        (MAX_ATTEMPTS + 1, Checkpoint("k", 7, 1.0, attempt=1), "failed"),
    ):
        job = new_job(scheduler.ledger, output=PNG)
        job.attempted(attempts)
        job.checkpoint = checkpoint
        scheduler.submit(job)
        await settled()
        assert job.state == state, (attempts, checkpoint)
        if state == "failed":
            assert job.now.error is not None
            assert job.now.error.reason == "GIVEN_UP"
        else:
            hand.done()
            await settled()


@pytest.mark.parametrize("ending", [Suspended("x"), Failed("x", "WORKER_DIED", "killed")])
async def test_what_a_caller_wants_outlives_the_attempt(scheduler: Queue, ending: Ending) -> None:
    """A worker that is suspending already, or dies, never hears of it: a cancel, a change, a pause."""
    hand = Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    first = scheduler.steer(job, StylizeOptions(content_weight=3), {"content_weight": 3})
    over = scheduler.pause(job)
    second = scheduler.steer(job, StylizeOptions(content_weight=4), {"content_weight": 4})
    assert first and over and second
    hand.report(Steered(job.name, StylizeOptions(content_weight=3), 100))
    assert (first.done(), over.done(), second.done()) == (True, False, False)
    assert scheduler.options(job).content_weight == 4
    hand.end(dataclasses.replace(ending, id=job.name))
    await settled()
    assert (over.done(), second.done()) == (True, True)
    assert (job.state, job.now.options.content_weight) == ("paused", 4)
    assert job.spec is None

    scheduler.resume(job)
    await settled()
    scheduler.pause(job)
    scheduler.cancel(job)
    scheduler.pause(job)
    hand.end(dataclasses.replace(ending, id=job.name))
    await settled()
    assert job.state == "cancelled"


async def test_a_paused_job_needs_a_place_to_go_on(scheduler: Queue) -> None:
    """Or the queue would not be bounded; what is refused changes nothing."""
    paused = submitted(scheduler)
    scheduler.pause(paused)
    waiting = [submitted(scheduler) for _ in range(2)]
    with pytest.raises(QueueFull):
        scheduler.resume(paused)
    with pytest.raises(QueueFull):
        scheduler.finish(paused)
    assert (paused.state, paused.now.finishing) == ("paused", False)
    scheduler.cancel(waiting[0])
    scheduler.finish(paused)
    assert (paused.state, paused.now.finishing) == ("queued", True)


async def test_a_job_that_cannot_begin_fails_alone(scheduler: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its ledger raises; the next job runs."""

    async def attempt(job: Job) -> bool:
        monkeypatch.undo()
        raise ValueError("who wrote this?")

    hand = Held()
    monkeypatch.setattr(scheduler.ledger, "attempt", attempt)
    job, following = submitted(scheduler), submitted(scheduler)
    scheduler.add(hand)
    await settled()
    assert job.now.error is not None
    assert (job.now.error.reason, following.state) == ("INTERNAL", "running")
    hand.done()


async def test_enough_is_not_forgotten_by_a_job_that_was_about_to_pause(scheduler: Queue) -> None:
    """Paused, and then told to finish before its worker has let go: it goes on at once, and finishes."""
    hand = Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    scheduler.pause(job)
    scheduler.finish(job)
    hand.end(Suspended(job.name))
    await settled()
    assert job.state == "running"
    assert hand.orders[-1] == Finish(job.name)
    hand.done()


async def test_enough_sends_a_paused_job_on(scheduler: Queue) -> None:
    """One that was told to finish and then paused, too: told again, it goes on and finishes."""
    hand = Held()
    job = submitted(scheduler)
    scheduler.finish(job)
    scheduler.pause(job)
    assert (job.state, job.now.finishing) == ("paused", True)
    scheduler.finish(job)
    scheduler.add(hand)
    await settled()
    assert (job.state, hand.orders) == ("running", [Finish(job.name)])
    hand.done()
    await settled()
    assert job.state == "succeeded"


async def test_whoever_waits_for_a_job_that_was_taken_is_answered(
    scheduler: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change and a pause that came while its attempt was being stored, which another server had made already."""
    may_go_on = asyncio.Event()

    async def attempt(job: Job) -> bool:
        await may_go_on.wait()
        job.lost(Moved("taken"))
        return False

    monkeypatch.setattr(scheduler.ledger, "attempt", attempt)
    job = submitted(scheduler)
    scheduler.add(Held())
    await settled()
    waits = (
        scheduler.finish(job),
        scheduler.steer(job, StylizeOptions(content_weight=3), {"content_weight": 3}),
        scheduler.pause(job),
    )
    may_go_on.set()
    for wait in waits:
        assert wait is not None
        await asyncio.wait_for(wait, 5)


async def test_another_servers_job_is_let_go(scheduler: Queue) -> None:
    """Whether it was waiting here or running; nothing more is written of it, and none of its checkpoints dropped."""
    hand = Held()
    taken, running = new_job(scheduler.ledger), new_job(scheduler.ledger)
    scheduler.ledger.taken = {taken.name}
    for job in (taken, running):
        scheduler.submit(job)
    scheduler.add(hand)
    await settled()
    assert [task.id for task in hand.tasks] == [running.name]
    running.lost(Stopping("taken"))
    scheduler.drop(running)
    written = len(scheduler.ledger.stored)
    assert hand.cancelled == [running.name]
    hand.end(Cancelled(running.name))
    await settled()
    assert (len(scheduler.ledger.stored), scheduler.ledger.dropped) == (written, [])


async def test_a_result_that_cannot_be_kept_fails_its_job(scheduler: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder's own reason; nothing else is harmed. A disk that is full for a while is waited for."""
    monkeypatch.setattr("nst_server.journal.RETRY_S", 0.01)
    hand = Held()
    scheduler.add(hand)
    job = submitted(scheduler)
    await settled()
    scheduler.ledger.refuses = StorageReadOnly("the data folder cannot be written to")
    hand.done()
    await settled()
    assert job.now.error is not None
    assert (job.state, job.now.error.reason) == ("failed", "STORAGE_READ_ONLY")
    patient = submitted(scheduler)
    await settled()
    scheduler.ledger.refuses = StorageFull("the data folder is full")
    hand.done()
    await settled()
    assert patient.state == "running"
    scheduler.ledger.refuses = None
    await settled()
    assert patient.state == "succeeded"
    following = submitted(scheduler)
    await settled()
    hand.done()
    await settled()
    assert following.state == "succeeded"


async def test_a_job_of_an_earlier_server_is_loaded_when_its_turn_comes(scheduler: Queue) -> None:
    """Its images are not read before."""
    hand = Held()
    scheduler.add(hand)
    running = submitted(scheduler)
    await settled()
    left = new_job(scheduler.ledger)
    left.spec = None
    scheduler.submit(left)
    await settled()
    assert scheduler.loaded == []
    hand.done()
    await settled()
    assert (scheduler.loaded, running.state, left.state) == ([left.name], "succeeded", "running")
