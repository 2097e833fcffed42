"""The queue: which job runs on which executor, and when. Fair between callers; bounded."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import structlog

from nst_model import StylizeOptions
from nst_server import images
from nst_server.errors import QueueFull, RequestError, Stopping
from nst_server.executor import Executor
from nst_server.images import ImageFormat
from nst_server.jobs import Job, JobError, JobState, StoredResult
from nst_server.journal import patiently
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
    Pictured,
    PrepareTask,
    Progressed,
    Started,
    Steer,
    Steered,
    StylizeTask,
    Suspend,
    Suspended,
    Task,
)
from nst_server.waiting import Waiting

log = structlog.get_logger()

TYPICAL_JOB_S = 30.0
"""How long a job takes, as far as is known before the first has ended."""

MAX_PREPARATIONS = 64
"""Style images that may wait to be prepared, each of about a megabyte; four styles of the largest kind."""

MAX_DEATHS = 3
"""Workers that may die of one job, one after the other without a checkpoint in between, before it has failed."""

MAX_ATTEMPTS = 10
"""Attempts at a job, one after the other without a checkpoint in between, before it has failed: those that took the
whole server with them are counted nowhere else."""

SUSPEND_S = 5.0
"""Of the grace at a stop: how long workers get to keep the state of what they compute, seconds; at most half of it."""

STOPPING = Stopping("the server is stopping and takes no more jobs")

MEDIA_TYPES = {
    ImageFormat.JPEG: "image/jpeg",
    ImageFormat.PNG: "image/png",
    ImageFormat.WEBP: "image/webp",
    ImageFormat.TIFF: "image/tiff",
}


class Keeping(Protocol):
    """What the scheduler needs of the ledger."""

    async def attempt(self, job: Job) -> bool:
        """Begin the next attempt at a queued job; return False if this server has it no more."""

    async def keep_result(self, job: Job, data: bytes, width: int, height: int, media_type: str) -> None:
        """Keep the file of a job's result."""

    def keep_checkpoint(self, job: Job, checkpoint: Checkpoint) -> None:
        """Note a job's newest checkpoint."""

    def drop_checkpoints(self, job: Job) -> None:
        """Remove all that was kept of a job on the way."""


class _Run:
    """One attempt at a job. Orders that come before its task is made are kept for it.

    What the caller wants is kept until the worker has answered: it may die, or be suspending already, and never obey.

    Attributes:
        state: what the job is to become when the attempt is broken off, PAUSED or CANCELLED; None to go on.
        options: those of each Steer that was not answered yet, the oldest first.
        finish: whether the best picture so far is enough, which a job cannot note while its attempt is being noted.
        begun: done when the worker has begun, or the attempt is over.
        over: done when the attempt is.
    """

    def __init__(self, job: Job, executor: Executor) -> None:
        self.job = job
        self.executor = executor
        self.state: JobState | None = None
        self.options: collections.deque[tuple[StylizeOptions, asyncio.Future[None]]] = collections.deque()
        self.finish = False
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._orders: list[Order] | None = []

    def order(self, order: Order) -> None:
        """Pass an order on."""
        if self._orders is None:
            self.executor.order(order)
        else:
            self._orders.append(order)

    def end(self) -> None:
        """Note that the attempt is over."""
        for done in (self.begun, self.over, *(done for _, done in self.options)):
            if not done.done():
                done.set_result(None)

    async def ending(self, task: StylizeTask, report: Callable[[Message], None]) -> Ending:
        """Have the task computed; return how it ended."""
        orders, self._orders = self._orders or [], None
        return await _ending(self.executor, task, report, orders)


class Scheduler:
    """Hands jobs to executors, and takes up those that were broken off.

    Args:
        queue_size: jobs that may wait; 0 accepts one only when an executor is free.
        ledger: where jobs are kept.
        load: makes the spec of a job that has none out of its stored request.
    """

    def __init__(self, queue_size: int, ledger: Keeping, load: Callable[[Job], Awaitable[None]]) -> None:
        self._ledger = ledger
        self._load = load
        self._queue_size = queue_size
        self._waiting: Waiting[Job] = Waiting()
        self._preparations: collections.deque[PrepareTask] = collections.deque()
        self._preparing: dict[Executor, PrepareTask] = {}
        self._reserved = 0
        self._running: dict[str, _Run] = {}
        self._deaths: collections.Counter[str] = collections.Counter()
        self._work = asyncio.Event()
        self._loops: dict[Executor, asyncio.Task[None]] = {}
        self._endings: dict[str, asyncio.Task[None]] = {}  # of jobs whose picture is there, and being encoded
        self._stopping = False
        self._typical_s = TYPICAL_JOB_S

    def add(self, executor: Executor) -> None:
        """Begin to hand jobs to an executor."""
        self._loops[executor] = asyncio.create_task(self._serve(executor), name=f"serve-{executor.device}")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue for a job, within the block that submits it. Raises QueueFull or Stopping."""
        if self._stopping:
            raise STOPPING
        free = max(0, len(self._loops) - len(self._running))
        taken = len(self._waiting) + self._reserved
        if taken >= self._queue_size + free:
            raise QueueFull(taken, self._wait_s(taken + 1))
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    @property
    def stopping(self) -> bool:
        """Whether jobs are taken no more."""
        return self._stopping

    def next_position(self, caller: str) -> int:
        """Return the place in the queue that a caller's next job would have."""
        return self._waiting.place(caller)

    def submit(self, job: Job, *, first: bool = False) -> None:
        """Queue a job: a new one, for which `place` is held, or one that goes on, before its caller's others."""
        if self._stopping:
            raise STOPPING
        self._waiting.add(job.caller, job, first=first)
        self._renumber()
        self._work.set()
        for executor, task in self._preparing.items():  # a job does not wait for what nobody waits for
            executor.order(Cancel(task.id))

    def prepare(self, task: PrepareTask) -> None:
        """Compute Gram matrices when an executor has nothing better to do."""
        if len(self._preparations) < MAX_PREPARATIONS:  # jobs compute for themselves what was not prepared
            self._preparations.append(task)
            self._work.set()

    def cancel(self, job: Job) -> None:
        """End a job; does nothing if it has ended, or its picture is there."""
        if run := self._running.get(job.name):
            run.state = JobState.CANCELLED
            run.order(Cancel(job.name))
        elif not (job.state.terminal or job.name in self._endings):
            self._leave(job)
            job.cancelled()
            self._ended(job)

    def drop(self, job: Job) -> None:
        """Do no more for a job that another server has."""
        if job.name in self._running:
            self._running[job.name].order(Cancel(job.name))
        else:
            self._leave(job)

    def pause(self, job: Job) -> asyncio.Future[None] | None:
        """Let a job wait without a device until `resume`; does nothing if it has ended.

        Returns what is done when the worker has let it go, None if it has none.
        """
        if run := self._running.get(job.name):
            if run.state is not JobState.CANCELLED:
                run.state = JobState.PAUSED
                run.order(Suspend(job.name))
            return run.over
        if job.state is JobState.QUEUED:
            self._leave(job)
            self._pause(job)
        return None

    def resume(self, job: Job) -> None:
        """Queue a paused job again; does nothing to any other, but what is about to be paused goes on after that.

        Raises QueueFull or Stopping.
        """
        if run := self._running.get(job.name):
            if run.state is JobState.PAUSED:
                run.state = None
        elif job.state is JobState.PAUSED:
            with self.place():
                job.queued()
                self.submit(job)

    def finish(self, job: Job) -> asyncio.Future[None] | None:
        """End a job with the best picture so far; one that has made none yet begins, and ends at once.

        Returns what is done when that cannot be forgotten any more, None if it cannot. Raises QueueFull or Stopping.
        """
        if job.name in self._endings:
            return None
        if run := self._running.get(job.name):
            run.order(Finish(job.name))
            if not run.begun.done():
                run.finish = True
                return run.begun
        else:
            self.resume(job)
        if not job.now.finishing:
            job.finishing()
        return None

    def steer(self, job: Job, options: StylizeOptions, changes: Mapping[str, Any]) -> asyncio.Future[None] | None:
        """Let a job go on with other options, checked by the caller.

        Returns what is done when the worker does, None if it has none.
        """
        if run := self._running.get(job.name):
            done = asyncio.get_running_loop().create_future()
            run.options.append((options, done))
            run.order(Steer(job.name, changes))
            return done
        if job.name not in self._endings:
            job.steered(options)
        return None

    def options(self, job: Job) -> StylizeOptions:
        """Return what a job's options will be when its worker has done all that it was told."""
        run = self._running.get(job.name)
        return run.options[-1][0] if run and run.options else job.now.options

    def every_frame(self, job: Job) -> None:
        """Have each picture of a job sent that is due, from its next iteration on, and not just the newest."""
        job.every_frame = True
        if job.name in self._running:
            self._running[job.name].order(EveryFrame(job.name))

    def memory_bytes(self) -> int:
        """Return what a job may take of its device's memory, whichever it gets; 0 if nobody knows."""
        return min((executor.memory_bytes for executor in self._loops if executor.memory_bytes), default=0)

    def estimated_start_s(self, job: Job) -> float | None:
        """Return in how many seconds a waiting job will probably get a device; None if it does not wait."""
        return self._wait_s(job.now.queue_position + 1) if job in self._waiting else None

    async def stop(self, grace_s: float) -> None:
        """Take no more jobs and keep the state of those that run, if they do not end by themselves within `grace_s`.

        What has not ended is queued in the ledger then, for the next server.
        """
        self._stopping = True
        suspend_s = min(SUSPEND_S, grace_s / 2)
        if busy := self._busy():
            await asyncio.wait(busy, timeout=grace_s - suspend_s)
        for run in self._running.values():
            run.order(Suspend(run.job.name))
        if busy := self._busy():
            await asyncio.wait(busy, timeout=suspend_s)
        for task in (*self._loops.values(), *self._endings.values()):
            task.cancel()
        await asyncio.gather(*self._loops.values(), *self._endings.values(), return_exceptions=True)
        for run in self._running.values():  # its worker did not answer: the last checkpoint must do
            if not (run.job.gone or run.job.state.terminal):
                self._break_off(run)
            run.end()
        self._running.clear()

    def _busy(self) -> list[asyncio.Task[None]]:
        """Return what works on jobs: not the loops that wait for a worker or prepare a style."""
        return [*(self._loops[run.executor] for run in self._running.values()), *self._endings.values()]

    async def _serve(self, executor: Executor) -> None:
        while not self._stopping:
            await executor.ready()
            if self._waiting:
                await self._run(self._waiting.take(), executor)
            elif self._preparations:
                await self._prepare(self._preparations.popleft(), executor)
            else:
                self._work.clear()
                await self._work.wait()

    async def _prepare(self, task: PrepareTask, executor: Executor) -> None:
        self._preparing[executor] = task
        try:
            ending = await _ending(executor, task, lambda _: None, ())
        finally:
            del self._preparing[executor]
        if isinstance(ending, Cancelled):
            self._preparations.append(task)
        if isinstance(ending, Failed):
            log.warning("style not prepared", style=task.id, error=ending.message)

    async def _run(self, job: Job, executor: Executor) -> None:
        self._running[job.name] = run = _Run(job, executor)
        self._renumber()
        began = time.monotonic()
        ending: Ending | None
        try:
            task = await self._task(job)
            if task is None:
                ending = None
            elif task.attempt - (task.checkpoint.attempt if task.checkpoint else 0) > MAX_ATTEMPTS:
                text = f"{MAX_ATTEMPTS} attempts ended with their worker or server before anything was kept of them"
                ending = Failed(job.name, "GIVEN_UP", text)
            else:
                ending = await run.ending(task, lambda message: self._note(run, message))
        except RequestError as error:
            ending = Failed(job.name, error.reason, str(error))
        except Exception as error:  # the loop that serves the executor must go on
            log.exception("job cannot begin", job=job.name)
            ending = Failed(job.name, "INTERNAL", f"{type(error).__name__}: {error}")
        if not self._stopping or ending is not None:
            self._running.pop(job.name, None)
        if ending is None:
            run.end()
            return
        self._typical_s += 0.3 * (time.monotonic() - began - self._typical_s)
        self._end(run, ending)
        run.end()

    async def _task(self, job: Job) -> StylizeTask | None:
        """Return the task of the next attempt at a job; None if another server has it."""
        if not await self._ledger.attempt(job):
            return None
        if job.spec is None:
            await patiently(lambda: self._load(job), f"{job.name} cannot begin")
        spec = job.spec
        assert spec is not None, "loaded"
        return StylizeTask(
            id=job.name,
            model=spec.model,
            content=spec.content,
            styles=spec.styles,
            options=job.now.options,
            frame_interval=spec.preview_interval,
            start=spec.start,
            bit_depth=spec.output.bit_depth,
            checkpoint=job.checkpoint,
            attempt=job.now.attempt,
            every_frame=job.every_frame,
        )

    def _end(self, run: _Run, ending: Ending) -> None:
        job = run.job
        if job.gone:
            return
        match ending:
            case Done():
                # The executor is free for the next job while this one's picture is being encoded.
                self._endings[job.name] = task = asyncio.create_task(self._picture(job, ending))
                task.add_done_callback(lambda _: self._endings.pop(job.name))
            case Cancelled():
                job.cancelled()
            case Suspended():
                self._break_off(run)
            case Failed(reason="WORKER_DIED") if run.state or self._deaths[job.name] + 1 < MAX_DEATHS:
                self._deaths[job.name] += 1
                log.warning("job is taken up again", job=job.name, after=ending.message)
                self._break_off(run)
            case Failed():
                job.failed(JobError(ending.reason, ending.message))
        if job.state.terminal:
            self._ended(job)

    def _break_off(self, run: _Run) -> None:
        """Let a job become what its caller wanted of an attempt that did not come to its end."""
        job = run.job
        if run.state is JobState.CANCELLED:
            job.cancelled()
            return
        if run.finish and not job.now.finishing:
            job.finishing()
        if run.options:
            job.steered(run.options[-1][0])
        if run.state is JobState.PAUSED and not job.now.finishing:
            self._pause(job)
        else:
            self._again(job)

    def _pause(self, job: Job) -> None:
        job.paused()
        job.spec = None  # its pictures, which are loaded again when it goes on

    async def _picture(self, job: Job, done: Done) -> None:
        assert done.pixels is not None
        assert job.spec is not None
        output = job.spec.output
        try:
            image = await asyncio.to_thread(
                images.encode, done.pixels, output, alpha=job.spec.alpha, parameters=job.parameters(done)
            )
            media_type = MEDIA_TYPES[output.format]
            await patiently(
                lambda: self._ledger.keep_result(job, image.data, image.width, image.height, media_type),
                f"the result of {job.name} cannot be kept",
            )
        except asyncio.CancelledError:  # the server stops: the next one has the last checkpoint
            job.queued()
            raise
        except RequestError as error:
            job.failed(JobError(error.reason, f"the result could not be kept: {error}"))
        except Exception as error:  # whatever it is, a job must end, or its caller waits for ever
            log.exception("result not encoded", job=job.name)
            job.failed(JobError("INTERNAL", f"the result could not be encoded: {error}"))
        else:
            job.succeeded(StoredResult.of(image, done))
        self._ended(job)

    def _again(self, job: Job) -> None:
        """Put a job that was broken off back into the queue, before its caller's others."""
        job.queued()
        if not self._stopping:
            self.submit(job, first=True)

    def _leave(self, job: Job) -> None:
        if job in self._waiting:
            self._waiting.remove(job)
            self._renumber()

    def _renumber(self) -> None:
        if self._stopping:  # nobody's turn will come
            return
        for position, job in enumerate(self._waiting):
            job.moved(position)

    def _wait_s(self, turns: int) -> float:
        return self._typical_s * turns / max(1, len(self._loops))

    def _note(self, run: _Run, message: Message) -> None:
        job = run.job
        match message:
            case Started():
                job.started(run.executor.device, message.precision)
                log.info("job started", job=job.name, device=run.executor.device, attempt=job.now.attempt)
                if run.finish and not job.now.finishing:
                    job.finishing()
                elif job.now.finishing:
                    run.order(Finish(job.name))
                run.begun.set_result(None)
            case Progressed():
                job.progressed(message)
            case Pictured():
                job.pictured(message)
            case Steered():
                job.steered(message.options, message.iterations)
                if run.options:
                    run.options.popleft()[1].set_result(None)
            case Kept():
                self._deaths.pop(job.name, None)
                self._ledger.keep_checkpoint(job, message.checkpoint)

    def _ended(self, job: Job) -> None:
        self._deaths.pop(job.name, None)
        self._ledger.drop_checkpoints(job)
        now = job.now
        log.info(
            "job ended",
            job=job.name,
            state=str(now.state),
            size=f"{now.width}×{now.height}",
            attempt=now.attempt,
            iterations=now.progress.iteration if now.progress else 0,
            seconds=round(now.progress.elapsed_s, 2) if now.progress else 0,
            device=now.device,
            loss=now.progress.loss if now.progress else None,
            error=now.error.message if now.error else None,
        )


async def _ending(executor: Executor, task: Task, report: Callable[[Message], None], orders: Iterable[Order]) -> Ending:
    try:
        return await executor.run(task, report, orders)
    except Exception as error:  # the loop that serves the executor must go on
        log.exception("executor failed", task=task.id)
        return Failed(task.id, "INTERNAL", f"{type(error).__name__}: {error}")
