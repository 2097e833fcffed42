"""The worker process: one device, one task at a time. The only part of the server that imports torch.

Three threads: the main one computes; a reader takes tasks and cancellations; a sender writes to the pipe, so that the
optimization never waits for the front. Pictures have a slot for the newest one only; everything else is queued.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, overload

import numpy as np
import torch

import nst_model
from nst_model import (
    FeatureModel,
    InvalidOption,
    Iterate,
    KeptStyle,
    NstModelError,
    Style,
    StyleFile,
    StylizeOptions,
)
from nst_model.descent import Recordings
from nst_model.devices import memory_bytes, return_memory, reuse_memory
from nst_model.errors import DamagedState
from nst_model.options import MOMENTS, STEERABLE
from nst_model.scales import scales
from nst_model.state import State
from nst_model.stylization import LayerTargets, Stylization, TargetsOf, of_size
from nst_model.weights import load_weights
from nst_server.errors import RequestError
from nst_server.gram_cache import GramCache, GramKey
from nst_server.messages import (
    FINISHED,
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
    Ready,
    Refused,
    Started,
    Steer,
    Steered,
    StyleImage,
    StyleMoments,
    StylizeTask,
    Suspend,
    Suspended,
    Task,
    WorkerConfig,
)
from nst_server.storage.blobs import Blobs

if TYPE_CHECKING:
    from nst_server.images import Mask

log = logging.getLogger(__name__)

RATE_WINDOW = 10
"""Iterations that the rate is averaged over."""

REST_S = 0.2
"""A worker looks this often whether what the last task left behind has been written, until it has."""

SELDOM = 100
"""A checkpoint that took a second of processor time is followed by this many seconds without one."""


def main(connection: Connection, config: WorkerConfig) -> None:
    """Run a worker process until the front kills it or is gone."""
    logging.basicConfig(stream=sys.stderr, format="worker %(levelname)s: %(message)s")
    reuse_memory()
    sender = _Sender(connection)
    try:
        worker = Worker(config, sender)
    except NstModelError as error:
        sender.send(Refused(str(error)))
        sender.close()
        return
    reader = _Reader(connection)
    device = worker.model(config.model).device
    sender.send(Ready(str(device), tuple(nst_model.available_devices()), memory_bytes(device)))
    while True:
        return_memory()  # what a task leaves behind is of no use to the next one
        sender.send(worker.run(*_next_task(reader, worker, sender)))


def _next_task(reader: _Reader, worker: Worker, sender: _Sender) -> tuple[Task, Control]:
    """Wait for a task; meanwhile give back what was still being written when the last one ended."""
    while (asked := reader.next_task(REST_S)) is None:
        if worker.at_rest and sender.at_rest:
            return_memory()
            return reader.next_task()
    return asked


class Worker:
    """Runs tasks on one device. Raises NstModelError if the device or the first model cannot be had."""

    def __init__(self, config: WorkerConfig, sender: _Sender) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._config = config
        self._device = nst_model.resolve_device(config.device)
        self._sender = sender
        blobs = None if config.blobs is None else Blobs.open(config.blobs)
        self._keeper = _Keeper(blobs, config.checkpoint_interval_s, sender)
        self._grams = GramCache(config.grams)
        self._models: dict[str, FeatureModel] = {}
        self._recordings = Recordings()
        self.model(config.model)

    @property
    def at_rest(self) -> bool:
        """Whether no checkpoint is being written."""
        return self._keeper.at_rest

    def model(self, name: str) -> FeatureModel:
        """Return a feature model on this worker's device, loaded once."""
        if name not in self._models:
            weights = load_weights(name, self._config.weights.get(name))
            self._models[name] = FeatureModel(weights, self._device, self._config.memory_bytes, self._recordings)
        return self._models[name]

    def run(self, task: Task, control: Control) -> Ending:
        """Run a task to its end; whatever goes wrong is an ending too."""
        try:
            match task:
                case StylizeTask():
                    return self._stylize(task, control)
                case PrepareTask():
                    self._prepare(task, control.stop)
                    return Cancelled(task.id) if control.stop.is_set() else Done(task.id)
        except NstModelError as error:
            return Failed(
                task.id,
                "MODEL_UNAVAILABLE" if isinstance(error, LookupError | RuntimeError) else "INTERNAL",
                str(error),
            )
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
                advice = "choose a smaller size_px, a shorter history, or precision bf16"
                return Failed(task.id, "OUT_OF_MEMORY", f"{self._device} has too little memory for this job; {advice}")
            traceback.print_exc()
            return Failed(task.id, "INTERNAL", f"{type(error).__name__}: {error}")

    def _stylize(self, task: StylizeTask, control: Control) -> Ending:
        model = self.model(task.model)
        clock = _Clock()
        self._keeper.begin()
        self._sender.send(Started(task.id, model.precision(task.options).value))
        styles = [_style(style) for style in task.styles]
        content = nst_model.from_pixels(task.content)
        targets_of = self._targets_of(model, task.styles)
        start = None if task.start is None else nst_model.from_pixels(task.start)
        run = Stylization(model, content, styles, task.options, start=start, targets_of=targets_of, stop=control.stop)
        reason, latest = "", -1
        if task.checkpoint is not None:
            latest = self._take_up(run, task, task.checkpoint, clock)
        for iterate in run:
            if iterate.index > latest:  # else the best one again, with the reason to stop
                self._report(task, iterate, clock, every_frame=task.every_frame or control.every_frame)
            latest = iterate.index
            if iterate.stop_reason is not None:
                reason = iterate.stop_reason.value
                break
            order = self._obeyed(task, run, control)
            if isinstance(order, Finish):
                reason = FINISHED
                break
            if isinstance(order, Suspend):
                self._keeper.keep(task, run, latest, clock)
                return Suspended(task.id)
            self._keeper.offer(task, run, latest, clock)
        self._grams.trim(self._config.grams_max_bytes)
        if control.stop.is_set() or run.best is None:
            return Cancelled(task.id)
        # One that is finished early may have to be enlarged.
        picture = of_size(run.best.picture, content.shape[1:])
        return Done(task.id, nst_model.to_pixels(picture, bits=task.bit_depth), run.best.index, run.best.loss, reason)

    def _take_up(self, run: Stylization, task: StylizeTask, checkpoint: Checkpoint, clock: _Clock) -> int:
        """Go on from a checkpoint, and return which iteration it was made after.

        Without one that can be read the run begins anew, which costs time only; then it is -1.
        """
        try:
            run.restore(State.from_bytes(self._keeper.read(checkpoint)))
        except (DamagedState, RequestError, OSError) as error:
            log.warning("%s cannot be gone on from: %s; the job begins anew", checkpoint.key, error)
            return -1
        clock.go_on(checkpoint.elapsed_s)
        # What the caller has changed since.
        wanted = {name: getattr(task.options, name) for name in STEERABLE}
        if any(getattr(run.options, name) != value for name, value in wanted.items()):
            run.steer(**wanted)
            self._sender.send(Steered(task.id, run.options, run.iterations))
        return checkpoint.iteration

    def _obeyed(self, task: StylizeTask, run: Stylization, control: Control) -> Finish | Suspend | None:
        """Carry out the orders that have come; return the one that ends the run."""
        for order in control.orders():
            if isinstance(order, Finish | Suspend):
                return order
            if isinstance(order, EveryFrame):
                control.every_frame = True
                continue
            assert isinstance(order, Steer)
            try:
                run.steer(**order.changes)
            except InvalidOption as error:  # it was checked; the job goes on as it was
                log.warning("%s cannot be steered: %s", task.id, error)
            self._sender.send(Steered(task.id, run.options, run.iterations))
        return None

    def _report(self, task: StylizeTask, iterate: Iterate, clock: _Clock, *, every_frame: bool) -> None:
        elapsed_s, rate, remaining_s = clock.tick(iterate.index, iterate.work)
        losses = (iterate.loss, iterate.content_loss, iterate.tv_loss, iterate.laplacian_loss, iterate.style_losses)
        self._sender.send(Progressed(task.id, iterate.index, iterate.iterations, *losses, elapsed_s, rate, remaining_s))
        if task.frame_interval and iterate.index % task.frame_interval == 0:
            picture = functools.partial(_pictured, task.id, iterate)
            (self._sender.send if every_frame else self._sender.send_picture)(picture)

    def _prepare(self, task: PrepareTask, stop: threading.Event) -> None:
        model = self.model(task.model)
        targets_of = self._targets_of(model, task.styles)
        size_px = task.options.size_px
        for edge in scales(size_px, size_px, task.options.first_size_px):
            for style in map(style_of, task.styles):
                if not stop.is_set():
                    targets_of(style.scaled(edge / size_px), task.options)
        self._grams.trim(self._config.grams_max_bytes)

    def _targets_of(self, model: FeatureModel, styles: Sequence[StyleImage | StyleMoments]) -> TargetsOf:
        """Return `model.style_targets`, with what is on disk taken from there and the rest kept there."""
        base_px = {image.sha256: image.size_px for image in styles if isinstance(image, StyleImage)}

        def targets_of(style: Style, options: StylizeOptions) -> LayerTargets:
            if options.style_loss not in MOMENTS or not style.name or options.deterministic:
                return model.style_targets(style, options)
            key = GramKey(
                model=model.weights.name,
                weights_sha256=model.weights.sha256,
                image_sha256=style.name,
                size_px=max(style.picture.shape[1:]),
                base_px=base_px[style.name],
                pooling=options.pooling,
                padding=f"{options.padding}{options.margin_px or ''}",
                precision=model.precision(options),
            )
            layers = [layer for layer, weight in options.style_layers.items() if weight > 0]
            kept = self._grams.load(key, layers)
            if len(kept) == len(layers):
                return {
                    layer: {name: tensor.to(model.device) for name, tensor in targets.items()}
                    for layer, targets in kept.items()
                }
            computed = model.style_targets(style, options)
            self._grams.save(key, computed)
            return computed

        return targets_of


def _pictured(id: str, iterate: Iterate) -> Pictured:
    return Pictured(id, iterate.index, nst_model.to_pixels(iterate.picture))


def _style(style: StyleImage | StyleMoments) -> Style | KeptStyle:
    if isinstance(style, StyleMoments):
        return KeptStyle(StyleFile.from_bytes(style.file), style.size_px, style.weight, _mask(style.region))
    return style_of(style)


def style_of(image: StyleImage) -> Style:
    """Return a style image of a task as the core has it; its name is its file's SHA-256 if all of it is meant."""
    return Style(
        nst_model.from_pixels(image.pixels),
        image.weight,
        image.sha256 if image.mask is None else "",
        region=_mask(image.region),
        mask=_mask(image.mask),
    )


def _mask(pixels: Mask | None) -> torch.Tensor | None:
    return None if pixels is None else torch.from_numpy(np.array(pixels)).float() / 255


class _Clock:
    """Seconds, rate and estimate of one run."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._ticks: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=RATE_WINDOW + 1)

    def go_on(self, elapsed_s: float) -> None:
        """Count from what another clock showed."""
        self._start -= elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self._start

    def tick(self, iteration: int, work: float) -> tuple[float, float, float]:
        """Return elapsed seconds, iterations per second and remaining seconds; 0 for what is unknown.

        `work` is the part of the run that is done: iterations at finer scales take longer.
        """
        now = time.monotonic()
        if self._ticks and iteration != self._ticks[-1][0] + 1:
            self._ticks.clear()  # a scale has ended early: what was left out took no time
        self._ticks.append((iteration, work, now))
        first, then_done, then = self._ticks[0]
        if iteration == first or now <= then:
            return now - self._start, 0.0, 0.0
        passed = now - then
        return now - self._start, (iteration - first) / passed, (1 - work) * passed / (work - then_done)


class Control:
    """The orders for one task, from the reader to whoever computes.

    Attributes:
        stop: set when the task is cancelled.
        every_frame: whether no picture may be left out.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.every_frame = False
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()

    def give(self, order: Order) -> None:
        """Take an order; one to cancel goes before all others."""
        if isinstance(order, Cancel):
            self.stop.set()
        else:
            self._orders.put(order)

    def orders(self) -> Iterator[Order]:
        """Yield the orders that have come."""
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._orders.get_nowait()


class _Keeper(threading.Thread):
    """Writes checkpoints while the next iterations are computed; costs less than a hundredth of the time."""

    def __init__(self, blobs: Blobs | None, interval_s: float, sender: _Sender) -> None:
        super().__init__(daemon=True, name="keeper")
        self._blobs = blobs
        self._interval_s = interval_s
        self._sender = sender
        self._waiting: queue.SimpleQueue[tuple[StylizeTask, State, Checkpoint]] = queue.SimpleQueue()
        self._copying_s = 0.0
        self._busy = False
        self._due = 0.0
        self.start()

    def read(self, checkpoint: Checkpoint) -> bytes:
        """Return what was kept."""
        if checkpoint.data:
            return checkpoint.data
        if self._blobs is None:
            raise FileNotFoundError("this server keeps no checkpoints")
        return self._blobs.fetch_now(checkpoint.key)

    @property
    def at_rest(self) -> bool:
        """Whether nothing is being written."""
        return not self._busy

    def begin(self) -> None:
        """Begin to count the interval for another task."""
        self._due = time.monotonic() + self._interval_s

    def offer(self, task: StylizeTask, run: Stylization, iteration: int, clock: _Clock) -> None:
        """Keep the state of a run between two iterates if it is time to."""
        if self._blobs is None or self._busy or time.monotonic() < self._due:
            return
        began = time.monotonic()
        try:
            state = run.state()
        except (torch.OutOfMemoryError, MemoryError) as error:  # the run itself may have room
            log.warning("no checkpoint of %s: %s", task.id, error)
            self._due = time.monotonic() + self._interval_s
            return
        self._busy = True
        self._copying_s = time.monotonic() - began
        self._waiting.put((task, state, _checkpoint(task, iteration, clock)))

    def keep(self, task: StylizeTask, run: Stylization, iteration: int, clock: _Clock) -> None:
        """Keep the state of a run between two iterates now, with the front if there is nowhere else.

        A failure is logged: the last checkpoint stays.
        """
        while self._busy:
            time.sleep(0.01)
        checkpoint = _checkpoint(task, iteration, clock)
        if self._blobs is not None:
            self._write(task, run.state(), checkpoint)
        else:
            kept = dataclasses.replace(checkpoint, key="", data=run.state().to_bytes())
            self._sender.send(Kept(task.id, kept))

    def run(self) -> None:
        while True:
            task, state, checkpoint = self._waiting.get()
            began = time.thread_time()
            self._write(task, state, checkpoint)
            cost_s = self._copying_s + time.thread_time() - began  # to wait for the disk costs nothing
            self._due = time.monotonic() + max(self._interval_s, SELDOM * cost_s)
            del task, state  # or they are held until the next ones come
            self._busy = False

    def _write(self, task: StylizeTask, state: State, checkpoint: Checkpoint) -> None:
        assert self._blobs is not None
        try:
            self._blobs.write_now(checkpoint.key, state.to_bytes())
        except Exception as error:  # whatever it is, the run goes on
            log.warning("no checkpoint of %s: %s", task.id, error)
        else:
            self._sender.send(Kept(task.id, checkpoint))


def _checkpoint(task: StylizeTask, iteration: int, clock: _Clock) -> Checkpoint:
    key = f"checkpoints/{task.id.rpartition('/')[2]}/{task.attempt}-{iteration}"
    return Checkpoint(key, iteration, clock.elapsed_s, attempt=task.attempt)


class _Reader(threading.Thread):
    """Reads tasks and cancellations; ends the process when the front is gone."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(daemon=True, name="reader")
        self._connection = connection
        self._tasks: queue.SimpleQueue[tuple[Task, Control]] = queue.SimpleQueue()
        self.start()

    @overload
    def next_task(self) -> tuple[Task, Control]: ...
    @overload
    def next_task(self, within_s: float) -> tuple[Task, Control] | None: ...
    def next_task(self, within_s: float | None = None) -> tuple[Task, Control] | None:
        """Wait for a task; return it with the orders that come for it. None if none comes in time."""
        try:
            return self._tasks.get(timeout=within_s)
        except queue.Empty:
            return None

    def run(self) -> None:
        current: tuple[str, Control] | None = None
        while True:
            try:
                message: Task | Order = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)  # in the middle of whatever is being computed: nobody wants it any more
            if isinstance(message, Order):
                if current is not None and current[0] == message.id:
                    current[1].give(message)
            else:
                current = (message.id, Control())
                self._tasks.put((message, current[1]))
            del message  # or it is held until the next one comes


class _Sender(threading.Thread):
    """Writes messages in order, and of pictures the newest.

    A picture comes as a function that makes its message: only those that are written are made, in this thread.
    """

    def __init__(self, connection: Connection) -> None:
        super().__init__(daemon=True, name="sender")
        self._connection = connection
        self._waiting = threading.Condition()
        self._messages: collections.deque[Message | Callable[[], Pictured]] = collections.deque()
        self._picture: Callable[[], Pictured] | None = None
        self._writing = False
        self._closed = False
        self.start()

    @property
    def at_rest(self) -> bool:
        """Whether everything is written."""
        with self._waiting:
            return not (self._writing or self._messages or self._picture)

    def send(self, message: Message | Callable[[], Pictured]) -> None:
        """Queue a message. An ending goes after the picture that is still waiting."""
        with self._waiting:
            if isinstance(message, Ending) and self._picture is not None:
                self._messages.append(self._picture)
                self._picture = None
            self._messages.append(message)
            self._waiting.notify()

    def send_picture(self, picture: Callable[[], Pictured]) -> None:
        """Send a picture when the pipe is free, unless a newer one comes first."""
        with self._waiting:
            self._picture = picture
            self._waiting.notify()

    def close(self) -> None:
        """Wait until everything is written."""
        with self._waiting:
            self._closed = True
            self._waiting.notify()
        self.join()

    def run(self) -> None:
        while (message := self._next()) is not None:
            try:
                self._connection.send(message() if callable(message) else message)
            except OSError:
                os._exit(0)
            except RuntimeError as error:  # the device may lack the memory for a picture, and the run go on
                log.warning("a picture is left out: %s", error)
            del message  # or it is held until the next one comes

    def _next(self) -> Message | Callable[[], Pictured] | None:
        with self._waiting:
            self._writing = False
            while not (self._messages or self._picture or self._closed):
                self._waiting.wait()
            self._writing = True
            if self._messages:
                return self._messages.popleft()
            picture, self._picture = self._picture, None
            return picture
