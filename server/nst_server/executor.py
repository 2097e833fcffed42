"""Where tasks are computed: behind one small interface, today by a worker process of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from typing import Protocol

import structlog

from nst_server.messages import (
    Cancel,
    Cancelled,
    Done,
    Ending,
    Failed,
    Finish,
    Message,
    Order,
    Progressed,
    Ready,
    Refused,
    Suspend,
    Suspended,
    Task,
    WorkerConfig,
)

log = structlog.get_logger()

MAX_BACKOFF_S = 30.0

OBEY_S: dict[type[Order], float] = {Cancel: 5.0, Finish: 30.0, Suspend: 30.0}
"""How long a worker may take to end its task when it is told to, seconds, beside a few evaluations: a GPU that hangs
never comes back. What is to be cancelled loses nothing by haste. To suspend includes a checkpoint of some hundred MiB,
which may have to go to an object store."""

PATIENCE = 3
"""So many of the longest evaluations of the task until then. Those of the next scale take twice as long."""

DEAD_AFTER_S = 1.0
"""How long the system may take to end a process that was killed; one that waits for a broken driver may never end."""

# Torch takes seconds to import. On Linux a process that has done so is there to be forked; macOS's libraries forbid it.
CONTEXT: ForkServerContext | SpawnContext
if sys.platform == "linux":
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(["nst_server.preload"])
else:
    CONTEXT = multiprocessing.get_context("spawn")

# GNU OpenMP's threads wait for one another by spinning. Beside any other program that takes the core a waiting one
# spins for, and an iteration takes up to five times as long; to spin for a moment only costs nothing. OpenMP reads this
# when torch is imported.
SPINNING = {"GOMP_SPINCOUNT": "1000"}


class ExecutorUnavailable(Exception):
    """An executor cannot start: its device or its feature model cannot be had. The message says why."""


class Executor(Protocol):
    """A place where one task at a time is computed."""

    device: str
    memory_bytes: int
    """What tasks may take of the device's memory; 0 if nobody knows."""

    async def ready(self) -> None:
        """Wait until a task can be computed."""

    async def run(self, task: Task, report: Callable[[Message], None], orders: Iterable[Order] = ()) -> Ending:
        """Compute a task and return how it ended; never raises for what happens to the task.

        `report` gets its other messages on the event loop; `orders` are those that have come already.
        """

    def order(self, order: Order) -> None:
        """Pass an order on to the task it is for. Does nothing if that is not being computed."""


@dataclass
class _Running:
    task: Task
    report: Callable[[Message], None]
    ending: asyncio.Future[Ending]
    sent: bool = False
    orders: list[Order] = field(default_factory=list)
    """Those that came before the task was sent."""
    heard: float = 0.0
    """When the last message came, or the task went out; 0 before that."""
    silence_s: float = 0.0
    """The longest time between two messages."""
    progressed: bool = False
    """Whether an evaluation has been made, so that it is known how long they take."""
    deadline: asyncio.TimerHandle | None = None
    """When the worker is taken for hung, once it has been told to end the task."""

    def hear(self, message: Message) -> None:
        """Note that the worker said something."""
        self.progressed |= isinstance(message, Progressed)
        now = time.monotonic()
        self.silence_s = max(self.silence_s, now - self.heard)
        self.heard = now


class ProcessExecutor:
    """A worker process. One that dies is replaced; its task ends as Failed with reason WORKER_DIED.

    One that does not end its task when it is told to (see OBEY_S) is killed.

    Attributes:
        device: the device's name, once started.
        devices: all devices that `auto` stands for on this machine, once started.
        memory_bytes: what tasks may take of its memory, once started; 0 if nobody knows.
    """

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self.device = config.device
        self.devices: tuple[str, ...] = ()
        self.memory_bytes = 0
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None
        self._gone = asyncio.Event()
        self._running: _Running | None = None
        self._ready: asyncio.Future[None] | None = None
        self._closing = False
        self._replacing: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the worker; None between two."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Start the worker process and wait until it takes tasks. Raises ExecutorUnavailable."""
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        ours, theirs = CONTEXT.Pipe()
        await warm()
        arguments = (theirs, self._config, dict(os.environ))
        process = CONTEXT.Process(target=_worker_main, args=arguments, daemon=True, name="nst-worker")
        with theirs:
            process.start()  # takes some milliseconds
        self._process, self._connection = process, ours
        self._gone.clear()
        threading.Thread(target=self._read, args=(ours, process, loop), daemon=True, name="worker-reader").start()
        await self._ready

    async def ready(self) -> None:
        """Wait until the worker process takes tasks; see Executor."""
        if self._replacing is not None:
            await asyncio.shield(self._replacing)

    async def run(self, task: Task, report: Callable[[Message], None], orders: Iterable[Order] = ()) -> Ending:
        """Compute a task; see Executor."""
        assert self._running is None, "an executor computes one task at a time"
        ending: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._running = running = _Running(task, report, ending, orders=list(orders))
        try:
            await self.ready()  # the process may have died since somebody asked
            if ending.done():  # and its successor, too
                return ending.result()
            running.heard = time.monotonic()
            for order in running.orders:
                self._expect(order, running)
            await asyncio.to_thread(self._send, task, self._connection)
            running.sent = True
            for order in running.orders:
                self._send(order, self._connection)
            return await asyncio.shield(ending)
        finally:
            self._running = None
            if running.deadline is not None:
                running.deadline.cancel()

    def order(self, order: Order) -> None:
        """Pass an order on; see Executor."""
        running = self._running
        if running is None or running.task.id != order.id:
            return
        if running.heard:  # else its worker is still starting
            self._expect(order, running)
        if running.sent:
            self._send(order, self._connection)
        else:
            running.orders.append(order)

    async def close(self) -> None:
        """End the worker process in the middle of whatever it computes: what counts is kept elsewhere."""
        self._closing = True
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.wait([self._replacing])
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), DEAD_AFTER_S)

    def _expect(self, order: Order, running: _Running) -> None:
        """Kill the worker if it does not end its task within a time of an order that says so."""
        if (obey_s := OBEY_S.get(type(order))) is None:
            return
        if isinstance(order, Finish) and not running.progressed:
            return  # it still has to make a picture; what is wanted of it would come to nothing if it were killed
        limit_s = obey_s + PATIENCE * running.silence_s
        loop = asyncio.get_running_loop()
        if running.deadline is not None:
            if running.deadline.when() <= loop.time() + limit_s:
                return
            running.deadline.cancel()
        running.deadline = loop.call_later(limit_s, self._give_up, running)

    def _give_up(self, running: _Running) -> None:
        if self._process is not None and not running.ending.done():
            silent_s = round(time.monotonic() - running.heard, 1)
            log.warning("worker killed: it hangs", device=self.device, task=running.task.id, silent_s=silent_s)
            self._process.kill()

    def _send(self, message: Task | Order, connection: Connection | None) -> None:
        if connection is not None:
            with contextlib.suppress(OSError):  # a dead worker is noticed by the reader
                connection.send(message)

    def _read(self, connection: Connection, process: BaseProcess, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            while True:
                try:
                    message: Message = connection.recv()
                except (EOFError, OSError):
                    break
                loop.call_soon_threadsafe(self._received, message)
            process.join()
            loop.call_soon_threadsafe(self._died, process, exit_description(process.exitcode))

    def _received(self, message: Message) -> None:
        match message:
            case Ready():
                self.device, self.devices = message.device, message.devices
                self.memory_bytes = message.memory_bytes
                self._settle_ready(None)
            case Refused():
                self._settle_ready(ExecutorUnavailable(message.message))
            case Done() | Cancelled() | Suspended() | Failed():
                running = self._running
                if running is not None and running.task.id == message.id and not running.ending.done():
                    running.ending.set_result(message)
            case _:
                if self._running is not None and self._running.task.id == message.id:
                    self._running.hear(message)
                    self._running.report(message)

    def _died(self, process: BaseProcess, how: str) -> None:
        if process is not self._process:  # one that refused, and has a successor already
            return
        self._process = self._connection = None  # and so their files are closed
        self._gone.set()
        ready = self._ready  # anything but well done, and whoever starts the process knows what to do
        served = ready is not None and ready.done() and not ready.cancelled() and ready.exception() is None
        self._settle_ready(ExecutorUnavailable(f"the worker process on {self.device} ended while starting: {how}"))
        if self._running is not None and not self._running.ending.done():
            text = f"the worker process on {self.device} ended in the middle of the job: {how}. Try again"
            self._running.ending.set_result(Failed(self._running.task.id, "WORKER_DIED", text))
        if served and not self._closing:
            log.warning("worker died", device=self.device, how=how)
            self._replacing = asyncio.get_running_loop().create_task(self._replace())

    async def _replace(self) -> None:
        backoff_s = 0.1
        while not self._closing:
            try:
                await self.start()
            except Exception as error:  # whatever it is, a device without a worker must get one
                log.error("worker cannot be replaced yet", device=self.device, error=str(error), retry_s=backoff_s)
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
            else:
                log.info("worker replaced", device=self.device)
                break
        self._replacing = None

    def _settle_ready(self, error: ExecutorUnavailable | None) -> None:
        if self._ready is None or self._ready.done():
            return
        if error is None:
            self._ready.set_result(None)
        else:
            self._ready.set_exception(error)


async def warm() -> None:
    """Wait until the process that workers are forked from, if there is one, can be."""
    os.environ |= SPINNING | os.environ
    loop, warm = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        process = CONTEXT.Process(target=_nothing, daemon=True)
        process.start()
        process.join()
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(warm.set)

    if isinstance(CONTEXT, ForkServerContext):
        threading.Thread(target=wait, daemon=True, name="warm").start()
        await warm.wait()


def _nothing() -> None:
    """Do nothing."""


def _worker_main(connection: Connection, config: WorkerConfig, environment: dict[str, str]) -> None:
    # Signals for the terminal's or the service's whole process group are the front's affair.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ |= environment  # it was forked from a process that was started before
    # Imported here, in the child: this module belongs to the front, which never imports torch.
    from nst_server.worker import main  # noqa: PLC0415

    main(connection, config)


def exit_description(code: int | None) -> str:
    """Return how a process ended."""
    return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
