"""The descent: an optimizer on a scripted objective, scale after scale, as a sequence of iterates.

Pictures are (3, H, W), RGB, fp32, nominally in [0, 1]; iterates of L-BFGS may leave that range a little: to clip them
would break the curvature pairs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nst_model.adam import Adam
from nst_model.errors import InvalidImage
from nst_model.lbfgs import LBFGS
from nst_model.objective import Losses, interpreted
from nst_model.options import Optimizer, StylizeOptions

STALL = 12
"""Iterations in succession without a better picture after which the optimizer's memory is dropped."""
RESTARTS = 2
"""Restarts of L-BFGS without a better picture after which Adam takes over."""
FALLBACK_RATE = 0.005
"""Adam's step size then, in units of the picture's range: the picture is nearly finished."""
MAX_RESTARTS = 6
"""Restarts without a better picture after which the run ends."""


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


def minimize(
    objective: Any,
    targets: dict[str, Tensor],
    start: Tensor,
    options: StylizeOptions,
    *,
    stop: threading.Event | None = None,
) -> Iterator[Iterate]:
    """Yield the iterates of the optimizer on a scripted objective, from `start` (1, 3, H, W), at one scale."""
    yield from Descent(options, [1], stop).scale(Closure(objective, targets), start)


class Descent:
    """One run through all scales: counts iterations and work, and remembers where it stands.

    A picture that is not finite or a stall drops the optimizer's memory and goes on from the best picture; if that
    does not help L-BFGS gives way to Adam.

    Args:
        options: optimizer, iterations, history, averaging.
        pixels: how much work an iteration at each scale is, in proportion.
        stop: looked at between evaluations, from any thread.
    """

    def __init__(self, options: StylizeOptions, pixels: Sequence[float], stop: threading.Event | None) -> None:
        self._options = options
        self._stop = stop
        self._budgets = budgets(options, len(pixels))
        self._iterations = sum(self._budgets)
        per_iteration = [work for work, count in zip(pixels, self._budgets, strict=True) for _ in range(count)]
        done = np.cumsum([*per_iteration, pixels[-1]])
        self._work = done / done[-1]
        self._index = 0
        self._optimizer: LBFGS | Adam | None = None
        self._best: Iterate | None = None  # of the last scale

    def scale(
        self, closure: Closure, start: Tensor, shown: Callable[[Tensor], Tensor] = lambda picture: picture
    ) -> Generator[Iterate, None, Tensor | None]:
        """Yield the next scale's iterates; return the picture (1, 3, H, W) to go on with, None when the run is over.

        `shown` makes the iterate's picture of what the optimizer has.
        """
        budget = self._budgets.pop(0)
        end, final = self._index + budget, not self._budgets
        optimizer = self._optimizer_for(start, budget)
        watch = _Watch(optimizer)
        average = _Average(self._options.averaging)
        while self._index < end + final and watch.hopeful:
            if self._stop is not None and self._stop.is_set():
                return None
            iterate, products = self._evaluate(closure, optimizer)
            self._index += 1
            if iterate is None:
                watch.verdict = StopReason.DIVERGED
                optimizer = watch.failed(optimizer)
                continue
            iterate = replace(iterate, picture=shown(average.of(iterate.picture)))
            converged = products[-1] == 0  # the squared norm of the gradient
            stalled = watch.stalled(iterate, optimizer.x)
            if final and (converged or iterate.index == end):
                reason = StopReason.CONVERGED if converged else StopReason.ITERATIONS
                yield replace(iterate, work=1.0, stop_reason=reason)
                return None
            yield iterate
            if converged:
                break
            if stalled:
                optimizer = watch.failed(optimizer)
            else:
                optimizer.step(products, iterate.loss)
        best = watch.best or self._best
        if best is None:
            raise InvalidImage("content gives no finite loss: the objective is NaN or infinite at the starting picture")
        self._best = best
        if final or watch.best is None:
            reason = StopReason.ITERATIONS if watch.hopeful else watch.verdict
            yield replace(best, work=1.0, stop_reason=reason)
            return None
        self._optimizer = optimizer
        ended_early = self._index < end
        self._index = end
        return watch.best_x if ended_early or watch.failures else optimizer.x

    def _optimizer_for(self, start: Tensor, budget: int) -> LBFGS | Adam:
        if isinstance(self._optimizer, Adam) and self._options.optimizer is Optimizer.ADAM:
            return self._optimizer.carried(start, self._options.margin_px)
        if self._options.optimizer is Optimizer.ADAM:
            return Adam(start, self._options.learning_rate)
        return LBFGS(start, min(self._options.history, budget))

    def _evaluate(self, closure: Closure, optimizer: LBFGS | Adam) -> tuple[Iterate | None, np.ndarray]:
        """Evaluate the objective once; return the iterate, None if it is not finite, and the optimizer's products."""
        losses, gradient = closure(optimizer.x)
        # Everything that the host wants to know crosses at once: one synchronization an iteration.
        scalars = torch.stack((losses.total, losses.content, losses.variation, losses.laplacian))
        values = torch.cat((scalars, losses.style, optimizer.observe(gradient))).cpu().double().numpy()
        count = len(scalars) + len(losses.style)
        products = values[count:]
        if not np.isfinite(values).all():
            return None, products
        total, content, variation, laplacian = values[: len(scalars)].tolist()
        styles = dict(zip(closure.style_layers, values[len(scalars) : count].tolist(), strict=True))
        work = float(self._work[self._index])
        return Iterate(
            self._index, self._iterations, work, optimizer.x[0], total, content, variation, laplacian, styles
        ), products


def budgets(options: StylizeOptions, scales: int) -> list[int]:
    """Return the number of iterations at each of so many scales, from the coarsest on."""
    given = options.scale_iterations or (options.iterations,)
    return [given[min(scale, len(given) - 1)] for scale in range(scales)]


class _Watch:
    """Remembers the best picture of a scale, and what went wrong since.

    Attributes:
        best: the best iterate, None before the first.
        best_x: the optimizer's point there.
        failures: restarts since.
        verdict: what to call it if the run ends with them.
    """

    def __init__(self, optimizer: LBFGS | Adam) -> None:
        self.best: Iterate | None = None
        self.best_x = optimizer.x
        self.failures = 0
        self.verdict = StopReason.DIVERGED
        self._since_best = 0

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
        self.verdict = StopReason.CONVERGED
        return self._since_best >= STALL

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

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._sum: Tensor | None = None
        self._weight = 0.0

    def of(self, picture: Tensor) -> Tensor:
        """Take a picture in and return the average, the picture itself if there is no decay."""
        if not self._decay:
            return picture
        before = torch.zeros_like(picture) if self._sum is None else self._sum
        self._sum = self._decay * before + (1 - self._decay) * picture
        self._weight = self._decay * self._weight + 1 - self._decay
        return self._sum / self._weight
