"""The descent: an optimizer on a scripted objective, scale after scale, as a sequence of iterates.

An evaluation of the objective and the step that follows it are launched together and need nothing from the host. What
the host wants to know of them, a few numbers, it reads later: on a GPU while the next evaluation is being computed.

Pictures are (3, H, W), RGB, fp32, nominally in [0, 1]; iterates of L-BFGS may leave that range a little: to clip them
would break the curvature pairs.
"""

from __future__ import annotations

import collections
import functools
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nst_model.adam import Adam
from nst_model.errors import InvalidImage
from nst_model.graphs import Recorded
from nst_model.lbfgs import LBFGS
from nst_model.memory import Memory, full_memory
from nst_model.objective import Losses, interpreted
from nst_model.options import Curvature, Optimizer, StylizeOptions
from nst_model.state import State

STALL = 12
"""Iterations in succession without a better picture after which the optimizer's memory is dropped."""
RESTARTS = 2
"""Restarts of L-BFGS without a better picture after which Adam takes over."""
FALLBACK_RATE = 0.005
"""Adam's step size then, in units of the picture's range: the picture is nearly finished."""
MAX_RESTARTS = 6
"""Restarts without a better picture after which the run ends."""
PLATEAU = 10
"""Iterations over which the option `plateau` looks at the loss."""
AHEAD: Mapping[str, int] = {"cuda": 1}
"""Evaluations that are launched before the numbers of the last one are read, by the kind of device; 0 elsewhere.

Whatever the number, the iterates are the same. What has been launched in vain, when an iterate turns out to be a
reason to go on from elsewhere, is dropped.
"""


class StopReason(StrEnum):
    """Why a run ended by itself."""

    ITERATIONS = "iterations"
    DIVERGED = "diverged"
    CONVERGED = "converged"


@dataclass(frozen=True)
class Iterate:
    """One point of the optimization: a picture and the objective at it, its margin included if it has one.

    Attributes:
        index: 0 for the starting picture, 1 after the first step, and so on, through all scales.
        iterations: index of the last iterate, if nothing ends the run before.
        work: part of the run's work that is done, in (0, 1]: an iteration's work is its number of pixels, those of a
            margin included.
        picture: (3, H, W) RGB on the device, of its scale's size, unclipped. Never modified afterwards. With
            averaging, the average, at which the objective is not known; in luminance mode, with the photo's chroma.
        loss: the objective. Losses of different scales are not comparable.
        content_loss: before its weight.
        tv_loss: the total variation, before its weight.
        laplacian_loss: before its weight.
        style_losses: layer → loss, before any weight.
        stop_reason: why the run ends with this iterate; None while it goes on.
    """

    index: int
    iterations: int
    work: float
    picture: Tensor
    loss: float
    content_loss: float
    tv_loss: float
    laplacian_loss: float
    style_losses: Mapping[str, float]
    stop_reason: StopReason | None = None


class Closure:
    """The objective of one scale, as the optimizer calls it.

    Args:
        objective: the scripted objective.
        targets: its `content_targets`; None says that the first picture is the content itself, whose targets then
            need no pass of their own.
        regions: layer → weights of the positions in each region; None for one region everywhere.
    """

    def __init__(
        self, objective: Any, targets: dict[str, Tensor] | None, regions: dict[str, Tensor] | None = None
    ) -> None:
        self.style_layers: list[str] = objective.style_layers
        self._objective = objective
        self._targets = targets
        self._regions = regions

    def __call__(self, image: Tensor) -> tuple[Losses, Tensor]:
        """Return the losses of a picture (1, 3, H, W), and the gradient."""
        with interpreted():
            if self._targets is None:
                self._targets, losses, gradient = self._objective.begin(image, self._regions)
            else:
                losses, gradient = self._objective.loss_and_gradient(image, self._targets, self._regions)
        return losses, gradient

    @property
    def form(self) -> Hashable:
        """What another objective must have in common for `take`; None if that is not known before the first call."""
        if self._targets is None:
            return None
        objective = self._objective
        parts = tuple((name, part.original_name) for name, part in objective.named_modules())
        choices = (objective.absolute_tv, objective.outlined, *objective.content_layers)
        trunk = tuple(tensor.data_ptr() for tensor in objective.trunk.buffers())
        return parts, choices, trunk, tuple((name, t.shape, t.dtype) for name, t in self._tensors().items())

    def take(self, other: Closure) -> None:
        """Be the objective that another one of the same form is, in the memory that this one has."""
        given = other._tensors()
        for name, tensor in self._tensors().items():
            tensor.copy_(given[name])

    def _tensors(self) -> dict[str, Tensor]:
        """Return by name all that may differ between objectives of one form."""
        named = {name: tensor for name, tensor in self._objective.named_buffers() if not name.startswith("trunk.")}
        for kind, tensors in (("content", self._targets), ("regions", self._regions)):
            named |= {f"{kind} {layer}": tensor for layer, tensor in (tensors or {}).items()}
        return named


@dataclass(frozen=True)
class Loop:
    """An objective, an optimizer on it, and the recording of one iteration of theirs."""

    closure: Closure
    optimizer: LBFGS | Adam
    recorded: Recorded

    @classmethod
    def of(cls, closure: Closure, optimizer: LBFGS | Adam) -> Loop:
        """Return the loop of an objective and an optimizer; nothing is recorded yet."""
        work = functools.partial(launch, closure, optimizer)
        return cls(closure, optimizer, Recorded(work, optimizer.x.device))

    @property
    def form(self) -> Hashable:
        """What another loop must have in common for `take`; None if that is not known before the first iteration."""
        of_closure = self.closure.form
        # By which kernels was chosen when they were recorded.
        return of_closure and (of_closure, self.optimizer.form, torch.are_deterministic_algorithms_enabled())

    def take(self, other: Loop) -> None:
        """Go on where a loop of the same form is: its numbers come to where the recording reads and writes."""
        if self.closure is not other.closure:
            self.closure.take(other.closure)
        if self.optimizer is not other.optimizer:
            self.optimizer.restore(other.optimizer.state())


Loops = dict[torch.Size, tuple[Hashable, Loop]]
"""Size of the picture that is optimized, (1, 3, H, W) → form and loop of what has been recorded there."""


class Recordings:
    """What the last run on a device has recorded, for the next one: of runs of one kind only, since it holds memory."""

    def __init__(self) -> None:
        self._kind: Hashable = None
        self._loops: Loops | None = None

    def of(self, kind: Hashable, is_room: Callable[[], bool]) -> Loops | None:
        """Return what has been left by a run of a kind, or None if nothing shall be.

        What one of another kind has left is given back first, before it is asked whether there `is_room` to leave
        anything.
        """
        if kind != self._kind:
            if self._loops is not None:
                self._loops.clear()  # even if whoever left it is still there
            self._kind, self._loops = kind, None
        if self._loops is None and is_room():
            self._loops = {}
        return self._loops


def minimize(
    objective: Any,
    targets: dict[str, Tensor],
    start: Tensor,
    options: StylizeOptions,
    *,
    stop: threading.Event | None = None,
) -> Iterator[Iterate]:
    """Yield the iterates of the optimizer on a scripted objective, from `start` (1, 3, H, W), at one scale."""
    descent = Descent(options, [1], stop)
    descent.closure = Closure(objective, targets)
    descent.begin(start)
    yield from descent.iterates()


class Descent:
    """One run through all scales: counts iterations and work, and remembers where it stands.

    A picture that is not finite or a stall drops the optimizer's memory and goes on from the best picture; if that
    does not help L-BFGS gives way to Adam.

    Args:
        options: optimizer, iterations, history, averaging.
        pixels: how much work an iteration at each scale is, in proportion.
        stop: looked at between evaluations, from any thread.
        memory: of L-BFGS; what the options ask for if None.
        loops: what earlier runs have recorded. This one takes what fits, and leaves what it has; nothing if None.

    Attributes:
        closure: the objective of that scale; whoever iterates sets it. It may become another one of the same form, with
            the same numbers, for which there is a recording.
        scale: which scale comes next or is being worked on, from 0.
        over: whether the run has ended by itself.
        picture: (1, 3, H, W), what to begin the next scale with, once one has ended.
    """

    def __init__(
        self,
        options: StylizeOptions,
        pixels: Sequence[float],
        stop: threading.Event | None,
        memory: Memory | None = None,
        loops: Loops | None = None,
    ) -> None:
        self._options = options
        self._memory = memory or full_memory(options)
        self._loops = loops
        self._stop = stop
        self._pixels = list(pixels)
        self._budgets = budgets(options, len(pixels))
        self._index = 0  # of the next iterate
        self._ahead: collections.deque[_Evaluation] = collections.deque()  # those after it that are launched already
        self._optimizer: LBFGS | Adam | None = None
        self._watch: _Watch | None = None  # of the scale that is being worked on
        self._loop: Loop | None = None
        self._former: Loop | None = None  # the one before, as long as its recording may serve
        self._average = _Average(options.averaging)
        self._before: Iterate | None = None  # the best one known when the watch began
        self._latest: Iterate | None = None
        self.closure: Closure | None = None
        self.scale = 0
        self.over = False
        self.picture: Tensor | None = None

    @property
    def iterations(self) -> int:
        """Index of the last iterate, if nothing ends the run before."""
        return sum(self._budgets)

    @property
    def at_work(self) -> bool:
        """Whether a scale has begun and not yet ended."""
        return self._watch is not None

    @property
    def best(self) -> Iterate | None:
        """The iterate to keep if the run ended now, None before the first.

        That is the best of the scale or, with averaging, the latest: averages improve with time, and the objective is
        not known at them.
        """
        if self._options.averaging:
            return self._latest
        return (self._watch and self._watch.best) or self._before

    def begin(self, start: Tensor) -> None:
        """Begin the next scale from its first picture, (1, 3, H, W)."""
        self._optimizer = self._optimizer_for(start)
        self._leave_loop()
        self._watch = _Watch(self._optimizer.x.clone())
        self._average = _Average(self._options.averaging)

    def steer(self, options: StylizeOptions, *, anew: bool) -> None:
        """Go on with other options. `anew` says that the objective has changed: what is known of it counts no more."""
        done = self._index - self._end(self.scale - 1)  # at this scale
        planned = budgets(options, len(self._pixels))
        self._budgets[self.scale :] = planned[self.scale :]
        if self.at_work:
            self._budgets[self.scale] = max(planned[self.scale], done - self._final)
        if anew:
            self.closure = None
        if self.at_work and anew:
            self._before = self.best
            self._at.x.copy_(self._point)
            self._at.forget()
            self._ahead.clear()
            self._watch = _Watch(self._at.x.clone())
        self._options = options

    def iterates(self, shown: Callable[[Tensor], Tensor] = lambda picture: picture) -> Iterator[Iterate]:
        """Yield the iterates that are left of the scale. `shown` makes the iterate's picture of what the optimizer has.

        When the scale is done, `scale` is the next one and `picture` what to begin it with; not so if `stop` was set.
        """
        while self._wanted(self._index) and self._watch_now.hopeful:
            if self._stop is not None and self._stop.is_set():
                return
            evaluation = self._next_evaluation()
            iterate = self._read(evaluation)
            self._index += 1
            if iterate is None:
                self._watch_now.verdict = StopReason.DIVERGED
                self._recover()
                continue
            iterate = replace(iterate, picture=shown(self._average.of(iterate.picture)))
            self._latest = iterate
            stalled = self._watch_now.stalled(iterate, evaluation.x)
            gradient_squared = evaluation.numbers.values[-1]
            converged = gradient_squared == 0 or self._watch_now.flat(self._options.plateau)
            if self._final and (converged or iterate.index == self._end(self.scale)):
                reason = StopReason.CONVERGED if converged else StopReason.ITERATIONS
                self.over = True
                self._leave_loop()
                yield replace(iterate, work=1.0, stop_reason=reason)
                return
            # The step comes first, so that what is kept between two iterates is where the next one begins.
            if converged:
                self._watch_now.converged = True
                self._index = self._end(self.scale)
            elif stalled:
                self._recover()
            yield iterate
        yield from self._leave_scale()

    def _next_evaluation(self) -> _Evaluation:
        """Return the evaluation of the next iterate, having launched as many of the following as shall be."""
        assert self.closure is not None, "set the closure before the iterates"
        most = 1 + AHEAD.get(self._at.x.device.type, 0)
        while len(self._ahead) < most and (not self._ahead or self._wanted(self._index + len(self._ahead))):
            x = self._at.x.clone()
            self._ahead.append(_Evaluation(x, _Numbers(self._launch())))
        return self._ahead.popleft()

    def _launch(self) -> Tensor:
        """Evaluate and step, from a recording if there is one of this objective and this optimizer, or one like it."""
        assert self.closure is not None, "set the closure before the iterates"
        if self._loop is None or (self._loop.closure, self._loop.optimizer) != (self.closure, self._at):
            # One that was recorded may serve again; of any other the memory first.
            self._former = self._loop if self._loop is not None and self._loop.recorded.made else None
            self._loop = None
            self._loop = Loop.of(self.closure, self._at)
        if self._loop.recorded.possible and not self._loop.recorded.made:
            self._resume(self._loop)
        return self._loop.recorded()

    def _resume(self, loop: Loop) -> None:
        """Let a recorded loop of the same form go on where `loop` is: this run's own until now, or another's."""
        form = loop.form
        if form is None:
            return
        kept, self._former = self._former, None
        if kept is None or not kept.recorded.made or kept.form != form:
            kept_form, kept = (self._loops or {}).pop(self._at.x.shape, (None, loop))
            if kept_form != form:
                return
        kept.take(loop)
        self._loop, self.closure, self._optimizer = kept, kept.closure, kept.optimizer

    def _leave_loop(self) -> None:
        """Leave what has been recorded to whoever comes: nobody needs it here any more."""
        if self._loops is not None and self._loop is not None and self._loop.recorded.made:
            self._loops[self._loop.optimizer.x.shape] = self._loop.form, self._loop
        self._loop = self._former = None

    def _wanted(self, index: int) -> bool:
        """Return whether there shall be an iterate of that index at this scale."""
        return index < self._end(self.scale) + self._final

    def _recover(self) -> None:
        """Go on from the best picture."""
        self._ahead.clear()
        self._optimizer = self._watch_now.failed(self._at)

    def _leave_scale(self) -> Iterator[Iterate]:
        watch = self._watch_now
        best = watch.best or self._before
        if best is None:
            raise InvalidImage("content gives no finite loss: the objective is NaN or infinite at the starting picture")
        if self._final or not (watch.best or watch.hopeful):
            self.over = True
            self._leave_loop()
            reason = StopReason.ITERATIONS if watch.hopeful else watch.verdict
            yield replace(best, work=1.0, stop_reason=reason)
            return
        early = watch.converged or not watch.hopeful
        self.picture = watch.best_x if early or watch.failures else self._point.clone()
        self._ahead.clear()
        self._index = self._end(self.scale)
        self._before, self._watch, self.closure = best, None, None
        self.scale += 1

    def state(self) -> State:
        """Return what `restore` needs to go on exactly, after an iterate. No tensor in it is modified later."""
        watch, optimizer = self._watch_now, self._at
        tensors = {f"optimizer.{name}": tensor for name, tensor in optimizer.state().items()}
        tensors |= {f"ahead.{place}": evaluation.x for place, evaluation in enumerate(self._ahead)}
        tensors["best_x"] = watch.best_x
        values = {
            "scale": self.scale,
            "index": self._index,
            "budgets": list(self._budgets),
            "optimizer": _kind(optimizer).value,
            "ahead": [evaluation.numbers.values for evaluation in self._ahead],
            "watch": watch.state(),
            "average": self._average.weight,
        }
        if self._average.sum is not None:
            tensors["average"] = self._average.sum
        for name, iterate in (("best", watch.best), ("before", self._before), ("latest", self._latest)):
            if iterate is not None and not (name == "latest" and not self._options.averaging):
                tensors[name] = iterate.picture
                values[name] = _without_picture(iterate)
        return State(tensors, values)

    def restore(self, state: State) -> None:
        """Go on from what `state` returned of a run with the same options and scales."""
        values = state.values
        known = {
            name: Iterate(picture=state.tensors[name], **values[name])
            for name in ("best", "before", "latest")
            if name in values
        }
        optimizing = {
            name.removeprefix("optimizer."): tensor
            for name, tensor in state.tensors.items()
            if name.startswith("optimizer.")
        }
        self.scale, self._index, self._budgets = values["scale"], values["index"], list(values["budgets"])
        self._optimizer = _restored(Optimizer(values["optimizer"]), optimizing)
        self._ahead.extend(
            _Evaluation(state.tensors[f"ahead.{place}"], _Numbers(torch.tensor(numbers, dtype=torch.float64)))
            for place, numbers in enumerate(values["ahead"])
        )
        self._watch = _Watch(state.tensors["best_x"])
        self._watch.restore(values["watch"], known.get("best"))
        self._average = _Average(self._options.averaging, state.tensors.get("average"), values["average"])
        self._before, self._latest = known.get("before"), known.get("latest")

    @property
    def _final(self) -> bool:
        return self.scale == len(self._pixels) - 1

    @property
    def _watch_now(self) -> _Watch:
        assert self._watch is not None, "begin a scale before its iterates"
        return self._watch

    @property
    def _point(self) -> Tensor:
        """Where the next iterate will be, (1, 3, H, W)."""
        return self._ahead[0].x if self._ahead else self._at.x

    @property
    def _at(self) -> LBFGS | Adam:
        assert self._optimizer is not None, "begin a scale before its iterates"
        return self._optimizer

    def _end(self, scale: int) -> int:
        """Return the index of the iterate at which a scale ends, 0 before the first."""
        return sum(self._budgets[: scale + 1])

    def _work(self, index: int) -> float:
        """Return the part of the run's work that is done with an iterate."""
        per_iteration = np.repeat(self._pixels, self._budgets)
        done = np.cumsum(np.append(per_iteration, self._pixels[-1]))
        return float(done[min(index, len(done) - 1)] / done[-1])

    def _optimizer_for(self, start: Tensor) -> LBFGS | Adam:
        if isinstance(self._optimizer, Adam) and self._options.optimizer is Optimizer.ADAM:
            return self._optimizer.carried(start, self._options.margin_px)
        if self._options.optimizer is Optimizer.ADAM:
            return Adam(start, self._options.learning_rate)
        spectral = self._options.curvature is Curvature.SPECTRAL
        stored = torch.bfloat16 if self._memory.number_bytes < start.element_size() else None
        return LBFGS(start, self._memory.pairs, stored=stored, spectral=spectral)

    def _read(self, evaluation: _Evaluation) -> Iterate | None:
        """Return the next iterate, None if it is not finite."""
        assert self.closure is not None, "set the closure before the iterates"
        values = evaluation.numbers.values
        if not all(map(math.isfinite, values)):
            return None
        total, content, variation, laplacian, *rest = values
        styles = dict(zip(self.closure.style_layers, rest[:-1], strict=True))
        index, iterations, work = self._index, self.iterations, self._work(self._index)
        return Iterate(index, iterations, work, evaluation.x[0], total, content, variation, laplacian, styles)


def launch(closure: Closure, optimizer: LBFGS | Adam) -> Tensor:
    """Evaluate the objective where the optimizer is, and let it step; return what the host may want to know of it.

    That is one vector on the device: the losses, in the order of `Iterate`, and the gradient's squared norm. Nothing
    waits for the device.
    """
    losses, gradient = closure(optimizer.x)
    optimizer.step(gradient, losses.total)
    scalars = torch.stack((losses.total, losses.content, losses.variation, losses.laplacian))
    return torch.cat((scalars, losses.style, gradient.square().sum()[None]))


class _Numbers:
    """A vector on its way from the device."""

    def __init__(self, vector: Tensor) -> None:
        self._vector = vector
        self._there: torch.cuda.Event | None = None
        if vector.is_cuda:
            self._vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._vector.copy_(vector, non_blocking=True)
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(torch.cuda.current_stream(vector.device))

    @functools.cached_property
    def values(self) -> list[float]:
        """The numbers; the first call waits for them."""
        if self._there is not None:
            self._there.synchronize()
        return [float(value) for value in self._vector.tolist()]


@dataclass(frozen=True)
class _Evaluation:
    """One that has been launched: the point (1, 3, H, W), a copy, and what is known of it."""

    x: Tensor
    numbers: _Numbers


def budgets(options: StylizeOptions, scales: int) -> list[int]:
    """Return the number of iterations at each of so many scales, from the coarsest on."""
    given = options.scale_iterations or (options.iterations,)
    return [given[min(scale, len(given) - 1)] for scale in range(scales)]


class _Watch:
    """Remembers the best picture of a scale, and what went wrong since.

    Attributes:
        best: the best iterate, None before the first.
        best_x: the optimizer's point there; where it began before the first.
        failures: restarts since.
        verdict: what to call it if the run ends with them.
        converged: whether there is nowhere to go from here.
    """

    def __init__(self, start: Tensor) -> None:
        self.best: Iterate | None = None
        self.best_x = start
        self.failures = 0
        self.verdict = StopReason.DIVERGED
        self.converged = False
        self._since_best = 0
        self._lowest: collections.deque[float] = collections.deque(maxlen=PLATEAU + 1)  # losses, after each iterate

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs besides the best picture, for JSON."""
        return {
            "failures": self.failures,
            "verdict": self.verdict.value,
            "converged": self.converged,
            "since_best": self._since_best,
            "lowest": list(self._lowest),
        }

    def restore(self, values: Mapping[str, Any], best: Iterate | None) -> None:
        """Remember what another watch knew."""
        self.best = best
        self.failures, self.converged = values["failures"], values["converged"]
        self.verdict = StopReason(values["verdict"])
        self._since_best = values["since_best"]
        self._lowest.extend(values["lowest"])

    @property
    def hopeful(self) -> bool:
        """Whether it is worth going on."""
        return self.failures <= (1 if self.best is None else MAX_RESTARTS)

    def stalled(self, iterate: Iterate, x: Tensor) -> bool:
        """Take note of an iterate, at x; return whether it is time to try something else."""
        self._since_best += 1
        if self.best is None or iterate.loss < self.best.loss:
            self.best, self.best_x = iterate, x
            self.failures = self._since_best = 0
        self._lowest.append(self.best.loss)
        self.verdict = StopReason.CONVERGED
        return self._since_best >= STALL

    def flat(self, part: float) -> bool:
        """Return whether the last iterates have lowered the loss by less than a part of it."""
        return len(self._lowest) > PLATEAU and self._lowest[-1] > (1 - part) * self._lowest[0]

    def failed(self, optimizer: LBFGS | Adam) -> LBFGS | Adam:
        """Return the optimizer to go on with from the best picture: the same without memory, or Adam."""
        self.failures += 1
        self._since_best = 0
        if isinstance(optimizer, LBFGS) and self.failures > RESTARTS:
            return Adam(self.best_x, FALLBACK_RATE)
        optimizer.restart(self.best_x)
        return optimizer


class _Average:
    """Running average of pictures, free of the bias towards the first (Kingma and Ba, 2015, section 3)."""

    def __init__(self, decay: float, sum_: Tensor | None = None, weight: float = 0.0) -> None:
        self._decay = decay
        self.sum = sum_
        self.weight = weight

    def of(self, picture: Tensor) -> Tensor:
        """Take a picture in and return the average, the picture itself if there is no decay."""
        if not self._decay:
            return picture
        before = torch.zeros_like(picture) if self.sum is None else self.sum
        self.sum = self._decay * before + (1 - self._decay) * picture
        self.weight = self._decay * self.weight + 1 - self._decay
        return self.sum / self.weight


def _restored(kind: Optimizer, state: Mapping[str, Tensor]) -> LBFGS | Adam:
    """Return the optimizer that `state` was of, on the device of its tensors."""
    optimizer: LBFGS | Adam
    if kind is Optimizer.LBFGS:
        optimizer = LBFGS(state["x"], len(state["inverse"]), stored=state["pairs"].dtype, spectral="bands" in state)
    else:
        optimizer = Adam(state["x"], 0.0)
    optimizer.restore(state)
    return optimizer


def _kind(optimizer: LBFGS | Adam) -> Optimizer:
    return Optimizer.LBFGS if isinstance(optimizer, LBFGS) else Optimizer.ADAM


def _without_picture(iterate: Iterate) -> dict[str, Any]:
    """Return all else of an iterate; one on the way has no reason to stop."""
    values = {item.name: getattr(iterate, item.name) for item in fields(iterate)}
    del values["picture"], values["stop_reason"]
    return {**values, "style_losses": dict(iterate.style_losses)}
