"""The worker process: one device, one task at a time. The only part of the server that imports torch.

Three threads: the main one computes; a reader takes tasks and cancellations; a sender writes to the pipe, so that the
optimization never waits for the front. Pictures have a slot for the newest one only; everything else is queued.
"""

from __future__ import annotations

import collections
import logging
import os
import queue
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np
import torch

import nst_model
from nst_model import FeatureModel, Iterate, NstModelError, StopReason, Style, StylizeOptions
from nst_model.losses import MOMENTS
from nst_model.stylization import LayerTargets, TargetsOf, scales
from nst_model.weights import load_weights
from nst_server.gram_cache import GramCache, GramKey
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
    Ready,
    Refused,
    Shutdown,
    Started,
    StyleImage,
    StylizeTask,
    Task,
    WorkerConfig,
)

if TYPE_CHECKING:
    from nst_server.images import Mask

RATE_WINDOW = 10
"""Iterations that the rate is averaged over."""


def main(connection: Connection, config: WorkerConfig) -> None:
    """Run a worker process until the front says Shutdown or is gone."""
    logging.basicConfig(stream=sys.stderr, format="worker %(levelname)s: %(message)s")
    sender = _Sender(connection)
    try:
        worker = Worker(config, sender)
    except NstModelError as error:
        sender.send(Refused(str(error)))
        sender.close()
        return
    reader = _Reader(connection)
    sender.send(Ready(str(worker.model(config.model).device), tuple(nst_model.available_devices())))
    while True:
        task, stop = reader.next_task()
        sender.send(worker.run(task, stop))


class Worker:
    """Runs tasks on one device. Raises NstModelError if the device or the first model cannot be had."""

    def __init__(self, config: WorkerConfig, sender: _Sender) -> None:
        if config.threads:
            torch.set_num_threads(config.threads)
        self._config = config
        self._device = nst_model.resolve_device(config.device)
        self._sender = sender
        self._grams = GramCache(config.grams)
        self._models: dict[str, FeatureModel] = {}
        self.model(config.model)

    def model(self, name: str) -> FeatureModel:
        """Return a feature model on this worker's device, loaded once."""
        if name not in self._models:
            weights = load_weights(name, self._config.weights.get(name))
            self._models[name] = FeatureModel(weights, self._device)
        return self._models[name]

    def run(self, task: Task, stop: threading.Event) -> Ending:
        """Run a task to its end; whatever goes wrong is an ending too."""
        try:
            match task:
                case StylizeTask():
                    return self._stylize(task, stop)
                case PrepareTask():
                    self._prepare(task, stop)
                    return Cancelled(task.id) if stop.is_set() else Done(task.id)
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

    def _stylize(self, task: StylizeTask, stop: threading.Event) -> Ending:
        model = self.model(task.model)
        clock = _Clock()
        self._sender.send(Started(task.id, model.precision(task.options).value))
        styles = _styles(task.styles)
        content = nst_model.from_pixels(task.content)
        targets_of = self._targets_of(model, task.styles)
        start = None if task.start is None else nst_model.from_pixels(task.start)
        best: Iterate | None = None
        reason = StopReason.ITERATIONS
        latest, averaged = -1, task.options.averaging > 0
        for iterate in nst_model.stylize(
            model, content, styles, task.options, start=start, targets_of=targets_of, stop=stop
        ):
            reason = iterate.stop_reason or reason
            if best is not None and iterate.index <= latest:  # the best one again, with the news
                break
            latest = iterate.index
            # An average is the better the later, and the objective is not known at it.
            if not best or best.picture.shape != iterate.picture.shape or iterate.loss < best.loss or averaged:
                best = iterate
            self._report(task, iterate, clock)
        self._grams.trim(self._config.grams_max_bytes)
        if stop.is_set() or best is None:
            return Cancelled(task.id)
        pixels = nst_model.to_pixels(best.picture, bits=task.bit_depth)
        return Done(task.id, pixels, best.index, best.loss, reason.value)

    def _report(self, task: StylizeTask, iterate: Iterate, clock: _Clock) -> None:
        elapsed_s, rate, remaining_s = clock.tick(iterate.index, iterate.work)
        losses = (iterate.loss, iterate.content_loss, iterate.tv_loss, iterate.laplacian_loss, iterate.style_losses)
        self._sender.send(Progressed(task.id, iterate.index, iterate.iterations, *losses, elapsed_s, rate, remaining_s))
        if task.frame_interval and iterate.index % task.frame_interval == 0:
            self._sender.send_picture(Pictured(task.id, iterate.index, nst_model.to_pixels(iterate.picture)))

    def _prepare(self, task: PrepareTask, stop: threading.Event) -> None:
        model = self.model(task.model)
        targets_of = self._targets_of(model, task.styles)
        size_px = task.options.size_px
        for edge in scales(size_px, size_px, task.options.first_size_px):
            for style in _styles(task.styles):
                if not stop.is_set():
                    targets_of(style.scaled(edge / size_px), task.options)
        self._grams.trim(self._config.grams_max_bytes)

    def _targets_of(self, model: FeatureModel, images: Sequence[StyleImage]) -> TargetsOf:
        """Return `model.style_targets`, with what is on disk taken from there and the rest kept there."""
        base_px = {image.sha256: image.size_px for image in images}

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


def _styles(images: Sequence[StyleImage]) -> list[Style]:
    return [
        Style(
            nst_model.from_pixels(image.pixels),
            image.weight,
            image.sha256 if image.mask is None else "",
            region=_mask(image.region),
            mask=_mask(image.mask),
        )
        for image in images
    ]


def _mask(pixels: Mask | None) -> torch.Tensor | None:
    return None if pixels is None else torch.from_numpy(np.array(pixels)).float() / 255


class _Clock:
    """Seconds, rate and estimate of one run."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._ticks: collections.deque[tuple[int, float, float]] = collections.deque(maxlen=RATE_WINDOW + 1)

    def tick(self, iteration: int, work: float) -> tuple[float, float, float]:
        """Return elapsed seconds, iterations per second and remaining seconds; 0 for what is unknown.

        `work` is the part of the run that is done: iterations at finer scales take longer.
        """
        now = time.monotonic()
        self._ticks.append((iteration, work, now))
        first, then_done, then = self._ticks[0]
        if iteration == first or now <= then:
            return now - self._start, 0.0, 0.0
        passed = now - then
        return now - self._start, (iteration - first) / passed, (1 - work) * passed / (work - then_done)


class _Reader(threading.Thread):
    """Reads tasks and cancellations; ends the process when the front is gone."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(daemon=True, name="reader")
        self._connection = connection
        self._tasks: queue.SimpleQueue[tuple[Task, threading.Event]] = queue.SimpleQueue()
        self.start()

    def next_task(self) -> tuple[Task, threading.Event]:
        """Wait for a task; return it with the event that is set when it is cancelled."""
        return self._tasks.get()

    def run(self) -> None:
        current: tuple[str, threading.Event] | None = None
        while True:
            try:
                message: Task | Cancel | Shutdown = self._connection.recv()
            except (EOFError, OSError):
                message = Shutdown()
            if isinstance(message, Shutdown):
                os._exit(0)  # in the middle of whatever is being computed: nobody wants it any more
            if isinstance(message, Cancel):
                if current is not None and current[0] == message.id:
                    current[1].set()
            else:
                current = (message.id, threading.Event())
                self._tasks.put((message, current[1]))


class _Sender(threading.Thread):
    """Writes messages in order, and of pictures the newest."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(daemon=True, name="sender")
        self._connection = connection
        self._waiting = threading.Condition()
        self._messages: collections.deque[Message] = collections.deque()
        self._picture: Pictured | None = None
        self._closed = False
        self.start()

    def send(self, message: Message) -> None:
        """Queue a message. An ending goes after the picture that is still waiting."""
        with self._waiting:
            if isinstance(message, Ending) and self._picture is not None:
                self._messages.append(self._picture)
                self._picture = None
            self._messages.append(message)
            self._waiting.notify()

    def send_picture(self, picture: Pictured) -> None:
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
                self._connection.send(message)
            except OSError:
                os._exit(0)

    def _next(self) -> Message | None:
        with self._waiting:
            while not (self._messages or self._picture or self._closed):
                self._waiting.wait()
            if self._messages:
                return self._messages.popleft()
            picture, self._picture = self._picture, None
            return picture
