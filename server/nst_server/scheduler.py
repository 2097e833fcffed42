"""The queue: which job runs on which executor, and when. First come, first served; bounded."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import structlog

from nst_server import images
from nst_server.errors import QueueFull, Stopping
from nst_server.executor import Executor
from nst_server.jobs import Finished, Job, JobError
from nst_server.messages import (
    Cancel,
    Cancelled,
    Done,
    Ending,
    Failed,
    Message,
    Pictured,
    PrepareTask,
    Progressed,
    Started,
    StylizeTask,
    Task,
)

log = structlog.get_logger()

TYPICAL_JOB_S = 30.0
"""How long a job takes, as far as is known before the first has ended."""

MAX_PREPARATIONS = 64
"""Style images that may wait to be prepared, each of about a megabyte; four styles of the largest kind."""

STOPPING = JobError("SERVER_STOPPING", "the server stopped before the job was done; try again in a moment")


class Scheduler:
    """Hands jobs to executors.

    Args:
        queue_size: jobs that may wait; 0 accepts one only when an executor is free.
    """

    def __init__(self, queue_size: int) -> None:
        self._queue_size = queue_size
        self._waiting: collections.deque[Job] = collections.deque()
        self._preparations: collections.deque[PrepareTask] = collections.deque()
        self._preparing: dict[Executor, PrepareTask] = {}
        self._reserved = 0
        self._running: dict[str, tuple[Job, Executor]] = {}
        self._work = asyncio.Event()
        self._loops: dict[Executor, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._typical_s = TYPICAL_JOB_S

    def add(self, executor: Executor) -> None:
        """Begin to hand jobs to an executor."""
        self._loops[executor] = asyncio.create_task(self._serve(executor), name=f"serve-{executor.device}")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the queue for a job, within the block that submits it. Raises QueueFull or Stopping."""
        if self._stopping:
            raise Stopping("the server is stopping and takes no more jobs")
        free = max(0, len(self._loops) - len(self._running))
        taken = len(self._waiting) + self._reserved
        if taken >= self._queue_size + free:
            raise QueueFull(taken, self._typical_s * (taken + 1) / max(1, len(self._loops)))
        self._reserved += 1
        try:
            yield
        finally:
            self._reserved -= 1

    def submit(self, job: Job) -> None:
        """Queue a job for which `place` is held."""
        if self._stopping:
            raise Stopping("the server is stopping and takes no more jobs")
        job.queue_position = len(self._waiting)
        self._waiting.append(job)
        self._work.set()
        for executor, task in self._preparing.items():  # a job does not wait for what nobody waits for
            executor.order(Cancel(task.id))

    def prepare(self, task: PrepareTask) -> None:
        """Compute Gram matrices when an executor has nothing better to do."""
        if len(self._preparations) < MAX_PREPARATIONS:  # jobs compute for themselves what was not prepared
            self._preparations.append(task)
            self._work.set()

    def cancel(self, job: Job) -> None:
        """End a job; does nothing if it has ended."""
        if job in self._waiting:
            self._waiting.remove(job)
            job.cancelled()
            self._log_end(job)
            self._renumber()
        elif job.name in self._running:
            self._running[job.name][1].order(Cancel(job.name))

    async def stop(self, grace_s: float) -> None:
        """Take no more jobs, fail those that wait, let the running ones go on for `grace_s`, then fail them too."""
        self._stopping = True
        while self._waiting:
            job = self._waiting.popleft()
            job.failed(STOPPING)
            self._log_end(job)
        # Not the loops that wait for a worker or prepare a style: nobody waits for what they do.
        if busy := [self._loops[executor] for _, executor in self._running.values()]:
            await asyncio.wait(busy, timeout=grace_s)
        for job, executor in list(self._running.values()):
            executor.order(Cancel(job.name))
            if not job.state.terminal:
                job.failed(STOPPING)
                self._log_end(job)
        for loop in self._loops.values():
            loop.cancel()
        await asyncio.gather(*self._loops.values(), *self._endings, return_exceptions=True)

    async def _serve(self, executor: Executor) -> None:
        while not self._stopping:
            await executor.ready()
            if self._waiting:
                await self._run(self._waiting.popleft(), executor)
            elif self._preparations:
                await self._prepare(self._preparations.popleft(), executor)
            else:
                self._work.clear()
                await self._work.wait()

    async def _prepare(self, task: PrepareTask, executor: Executor) -> None:
        self._preparing[executor] = task
        try:
            ending = await _ending(executor, task, lambda _: None)
        finally:
            del self._preparing[executor]
        if isinstance(ending, Cancelled):
            self._preparations.append(task)
        if isinstance(ending, Failed):
            log.warning("style not prepared", style=task.id, error=ending.message)

    async def _run(self, job: Job, executor: Executor) -> None:
        self._running[job.name] = (job, executor)
        self._renumber()
        began = time.monotonic()
        spec = job.spec
        task = StylizeTask(
            id=job.name,
            model=spec.model,
            content=spec.content,
            styles=spec.styles,
            options=spec.options,
            frame_interval=spec.preview_interval,
            start=spec.start,
            bit_depth=spec.output.bit_depth,
        )
        try:
            ending = await _ending(executor, task, lambda message: _note(job, message, executor.device))
        finally:
            del self._running[job.name]
        self._typical_s += 0.3 * (time.monotonic() - began - self._typical_s)
        # The executor is free for the next job while this one's picture is being encoded.
        self._endings.add(end := asyncio.create_task(self._end(job, ending)))
        end.add_done_callback(self._endings.discard)

    async def _end(self, job: Job, ending: Ending) -> None:
        if job.state.terminal:  # failed by `stop`
            return
        match ending:
            case Done():
                assert ending.pixels is not None
                try:
                    image = await asyncio.to_thread(
                        images.encode,
                        ending.pixels,
                        job.spec.output,
                        alpha=job.spec.alpha,
                        parameters=job.parameters(ending),
                    )
                except Exception as error:  # whatever it is, a job must end, or its caller waits for ever
                    log.exception("result not encoded", job=job.name)
                    job.failed(JobError("INTERNAL", f"the result could not be encoded: {error}"))
                else:
                    job.succeeded(Finished(image, ending.iteration, ending.loss, ending.stop_reason))
            case Cancelled():
                job.cancelled()
            case Failed():
                job.failed(JobError(ending.reason, ending.message))
        self._log_end(job)

    def _renumber(self) -> None:
        for position, job in enumerate(self._waiting):
            job.moved(position)

    def _log_end(self, job: Job) -> None:
        height, width = job.spec.content.shape[:2]
        log.info(
            "job ended",
            job=job.name,
            state=str(job.state),
            styles=[image.sha256[:12] for image in job.spec.styles],
            size=f"{width}×{height}",
            iterations=job.progress.iteration if job.progress else 0,
            seconds=round(job.progress.elapsed_s, 2) if job.progress else 0,
            device=job.device,
            loss=job.progress.loss if job.progress else None,
            error=job.error.message if job.error else None,
        )


async def _ending(executor: Executor, task: Task, report: Callable[[Message], None]) -> Ending:
    try:
        return await executor.run(task, report)
    except Exception as error:  # the loop that serves the executor must go on
        log.exception("executor failed", task=task.id)
        return Failed(task.id, "INTERNAL", f"{type(error).__name__}: {error}")


def _note(job: Job, message: Message, device: str) -> None:
    if job.state.terminal:
        return
    match message:
        case Started():
            job.started(device, message.precision)
            log.info("job started", job=job.name, model=job.spec.model, device=device, precision=message.precision)
        case Progressed():
            job.progressed(message)
        case Pictured():
            job.pictured(message)
