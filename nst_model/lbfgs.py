"""L-BFGS (Liu and Nocedal, 1989) with one evaluation an iteration, as a sequence of points.

Symbols, as in Nocedal and Wright (2006), chapter 7: point x, gradient g, m remembered pairs s = x' - x and y = g' - g,
ρ = 1 / sᵀy, initial inverse Hessian γ·I, search direction d = -H·g. n is the number of unknowns.

Two departures from the textbook, both for this problem:

- The two-loop recursion runs on inner products only (Chen, Wang and Zhou, 2014, "Large-scale L-BFGS using
  MapReduce"): d is a linear combination of the s, y and g, and its coefficients need nothing but their mutual inner
  products. So the device does one matrix product over the history to get the new products and one to form d, and
  passes one small vector to the host for each iteration, where `torch.optim.LBFGS` passes two numbers a pair.
- No line search, which would cost evaluations, but a cap on the step's root mean square. The unknowns are pixels in
  [0, 1], so the cap has a meaning: no step moves the picture by more than 5 % of its range. It removes the overshoot
  of the first iterations, when γ comes from a single pair. A step that overshoots all the same is backed up from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

FIRST_STEP_RMS = 0.02
"""Root mean square of the first step, in units of the unknowns: there is no curvature yet to tell its length."""

MAX_STEP_RMS = 0.05
"""Largest root mean square of any later step."""

OVERSHOOT = 2.0
"""A step that multiplies the loss by more than this is backed up from."""

BACK = 0.25
"""How far an overshooting step is made good again: this part of it is kept."""

MIN_CURVATURE = 1e-10
"""Pairs with sᵀy ≤ this times yᵀy are left out: they would make H indefinite."""


class LBFGS:
    """The memory of one minimization: what a checkpoint needs to go on exactly.

    Each iteration calls `observe` with the gradient at `x`, carries the returned products to the host (along with
    whatever else it wants from there) and calls `step` with them and the objective, which moves `x`.

    Args:
        start: first x, any shape, fp32. Not modified.
        history: m, the number of pairs remembered. They take 2·m·n·4 bytes.

    Attributes:
        x: the current point, of `start`'s shape. Replaced by each step, never modified in place.
        max_step_rms: cap on the root mean square of a step, in units of the unknowns.
    """

    def __init__(self, start: Tensor, history: int) -> None:
        self.x = start.detach().clone()
        self.max_step_rms = MAX_STEP_RMS
        # Pair i is row i: s first, then y. Zeros and not empty: 0 · garbage may be NaN.
        self._pairs = torch.zeros((history, 2, start.numel()), dtype=start.dtype, device=start.device)
        self._sy = np.zeros((history, history))  # s_i · y_j for i not newer than j
        self._yy = np.zeros((history, history))
        self._slots: list[int] = []  # rows in use, oldest pair first
        self._candidate: int | None = None  # row of the pair that the next gradient completes
        self._g: Tensor | None = None
        self._g_before: Tensor | None = None
        self._loss = math.inf  # at the point that the last step was made from

    def restart(self, x: Tensor) -> None:
        """Go on from `x`, without memory and with steps a quarter as long: what to do after a step led nowhere."""
        self.forget()
        self.x = x
        self.max_step_rms /= 4

    def forget(self) -> None:
        """Go on from where it is, without memory: what to do when another function is minimized from now on."""
        self._pairs.zero_()
        self._slots.clear()
        self._candidate = None
        self._g = None
        self._loss = math.inf

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what `restore` needs to go on exactly, after a step: tensors, never modified, and numbers for JSON.

        x of `start`'s shape; pairs (rows in use, 2, n); sy and yy (m, m), float64; g (n,), absent after `restart`.
        """
        used = self._pairs[: self._rows()].clone()
        tables = {"sy": torch.from_numpy(self._sy.copy()), "yy": torch.from_numpy(self._yy.copy())}
        tensors = {"x": self.x, "pairs": used, **tables} | ({} if self._g is None else {"g": self._g})
        values = {
            "max_step_rms": self.max_step_rms,
            "slots": list(self._slots),
            "candidate": self._candidate,
            "loss": self._loss,
        }
        return tensors, values

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> LBFGS:
        """Return the minimization that `state` was of, on the device of its tensors."""
        self = cls(tensors["x"], len(tensors["sy"]))
        self._pairs[: len(tensors["pairs"])] = tensors["pairs"]
        self._sy, self._yy = (tensors[name].cpu().numpy().copy() for name in ("sy", "yy"))
        self._g = tensors.get("g")
        self.max_step_rms, self._loss = values["max_step_rms"], values["loss"]
        self._slots, self._candidate = list(values["slots"]), values["candidate"]
        return self

    def observe(self, gradient: Tensor) -> Tensor:
        """Return the inner products that `step` needs, one vector on the device, given the gradient at `x`."""
        g = gradient.detach().reshape(-1)
        newest_y = g
        self._g_before = self._g
        if self._candidate is not None and self._g is not None:
            newest_y = torch.sub(g, self._g, out=self._pairs[self._candidate, 1])
        self._g = g
        products = self._pairs[: self._rows()].flatten(0, 1) @ torch.stack((g, newest_y)).T
        return torch.cat((products.flatten(), g.dot(g)[None]))

    def step(self, products: np.ndarray, loss: float) -> None:
        """Move `x` along -H·g, given what `observe` returned, as float64 on the host, and the objective at `x`.

        If the last step raised the objective too much, it is taken back in part instead.
        """
        assert self._g is not None, "observe a gradient before each step"
        if loss > OVERSHOOT * self._loss:
            self._back_up()
            return
        self._loss = loss
        table = products[:-1].reshape(-1, 2, 2)  # pair, (s, y), (g, newest y)
        self._remember(table[:, :, 1])
        coefficients, gamma = self._direction(table[:, :, 0])
        d = self._g * -gamma
        if self._slots:
            d += torch.from_numpy(coefficients.ravel()).to(d) @ self._pairs[: len(table)].flatten(0, 1)
        rms = torch.linalg.vector_norm(d) / d.numel() ** 0.5
        limit = self.max_step_rms if self._slots else min(FIRST_STEP_RMS, self.max_step_rms)
        length = limit / rms.clamp_min(torch.finfo(d.dtype).tiny)
        d *= length.clamp_max(1.0) if self._slots else length
        self.x = self.x + d.view_as(self.x)
        self._candidate = self._free_row()
        self._pairs[self._candidate, 0] = d

    def _back_up(self) -> None:
        assert self._candidate is not None, "there is no step to take back"
        s = self._pairs[self._candidate, 0]
        self.x = self.x - ((1 - BACK) * s).view_as(self.x)
        s *= BACK
        self._g = self._g_before

    def _rows(self) -> int:
        """Return the number of rows up to the last one in use."""
        return max([*self._slots, -1 if self._candidate is None else self._candidate], default=-1) + 1

    def _free_row(self) -> int:
        capacity = len(self._pairs)
        if len(self._slots) == capacity:
            return self._slots.pop(0)
        return next(row for row in range(capacity) if row not in self._slots)

    def _remember(self, with_newest_y: np.ndarray) -> None:
        new = self._candidate
        if new is None:
            return
        self._candidate = None
        sy, yy = with_newest_y[new]
        if not sy > MIN_CURVATURE * yy:
            return
        self._slots.append(new)
        rows = self._slots
        self._sy[rows, new] = with_newest_y[rows, 0]
        self._yy[rows, new] = self._yy[new, rows] = with_newest_y[rows, 1]

    def _direction(self, with_g: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the coefficients of every (s, y) row in d, and γ: Nocedal and Wright, algorithm 7.4, on products."""
        coefficients = np.zeros_like(with_g)
        if not self._slots:
            return coefficients, 1.0
        rows = self._slots
        sg, yg = with_g[rows, 0], with_g[rows, 1]
        sy, yy = self._sy[np.ix_(rows, rows)], self._yy[np.ix_(rows, rows)]
        rho = 1 / np.diag(sy)
        gamma = sy[-1, -1] / yy[-1, -1]
        k = len(rows)
        alpha = np.zeros(k)
        for i in reversed(range(k)):
            alpha[i] = rho[i] * (sg[i] - sy[i, i + 1 :] @ alpha[i + 1 :])
        y_r = gamma * (yg - yy @ alpha)
        rest = np.zeros(k)  # α - β
        for i in range(k):
            rest[i] = alpha[i] - rho[i] * (y_r[i] + sy[:i, i] @ rest[:i])
        coefficients[rows, 0] = -rest
        coefficients[rows, 1] = gamma * alpha
        return coefficients, float(gamma)
