"""L-BFGS (Liu and Nocedal, 1989) with one evaluation an iteration, as a sequence of points, all of it on the device.

Symbols, as in Nocedal and Wright (2006), chapter 7: point x, gradient g, m remembered pairs s = x' - x and y = g' - g,
initial inverse Hessian H₀, which is γ·I or `Spectral`, search direction d = -H·g. n is the number of unknowns. S and Y
are (m, n), a pair in each row; a row that is not in use is zero.

The two-loop recursion (algorithm 7.4) in matrices. By age, R is the upper triangle of S·Yᵀ and D its diagonal:

    R·α = S·g        q = g - Yᵀ·α        r = H₀·q        Rᵀ·δ = D·α - Y·r        d = -(r + Sᵀ·δ)

α is the first loop's, δ is what the second loop adds, α - β. What is kept is not R but its inverse: a new pair adds a
column to it, and the oldest one takes its row and its column away with it, for the inverse of a triangle's corner is
the corner of its inverse. So no order by age is needed: pairs lie in a ring. S·y, the new column of R, is the
difference of two S·g. Each iteration is the same four products, half a pass over the memory each, without a number
that the host would have to wait for, and without a decision that it would have to take: where there are two branches
both are computed, and the device chooses.

Departures from the textbook, all for this problem:

- No line search, which would cost evaluations, but a cap on the step's root mean square. The unknowns are pixels in
  [0, 1], so the cap has a meaning: no step moves the picture by more than 5 % of its range. It removes the overshoot
  of the first iterations, when γ comes from a single pair. A step that overshoots all the same is backed up from.
- With `Spectral` steps are damped until they end, as a rule, where the objective is lowest along them: where its slope
  is 0, which is known one evaluation later. Undamped they end where it rises a third as steeply as it fell.
- A pair's curvature must be positive relative to yᵀy, where `torch.optim.LBFGS` asks for an absolute 1e-10.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from nst_model.spectral import Spectral

FIRST_STEP_RMS = 0.02
"""Root mean square of the first step, in units of the unknowns: there is no curvature yet to tell its length."""

MAX_STEP_RMS = 0.05
"""Largest root mean square of any later step."""

OVERSHOOT = 2.0
"""A step that multiplies the loss by more than this is backed up from."""

BACK = 0.25
"""How far an overshooting step is made good again: this part of it is kept."""

LEAST_DAMPING = 0.25
"""Least part of -H·g that a step takes."""

DAMPING_RATE = 0.05
"""By how much the logarithm of that part changes where the slope at a step's end is its slope at the beginning."""

MIN_CURVATURE = 1e-10
"""Pairs with sᵀy ≤ this times yᵀy are left out: they would make H indefinite."""

BLOCK = 4096
"""Columns of the memory that are worked on at once, where that is better than all of them."""


class LBFGS:
    """The memory of one minimization: what a checkpoint needs to go on exactly.

    Args:
        start: first x, any shape, fp32 or float64. Not modified.
        history: m, the number of pairs remembered.
        stored: what pairs are kept in: bf16 takes half the memory of fp32. `start`'s own type if None.
        spectral: whether H₀ is `Spectral` in place of γ·I; `start` must then be a picture, (…, H, W).
        first_step_rms: root mean square of the first step, in units of the unknowns.
        max_step_rms: cap on that of later steps; infinite for none.
        overshoot: a step that multiplies the loss by more than this is backed up from; infinite for never.

    Attributes:
        x: the current point, of `start`'s shape, in the same memory always: copy what you want to keep.
    """

    def __init__(
        self,
        start: Tensor,
        history: int,
        *,
        stored: torch.dtype | None = None,
        spectral: bool = False,
        first_step_rms: float = FIRST_STEP_RMS,
        max_step_rms: float = MAX_STEP_RMS,
        overshoot: float = OVERSHOOT,
    ) -> None:
        n, device = start.numel(), start.device
        self._first_step_rms, self._overshoot = first_step_rms, overshoot
        self.x = start.detach().clone()
        self._s, self._g = (torch.zeros(n, dtype=start.dtype, device=device) for _ in range(2))
        # Zeros and not empty: 0 · garbage may be NaN.
        self._pairs = torch.zeros((2, history, n), dtype=stored or start.dtype, device=device)
        exact = torch.float32 if device.type == "mps" else torch.float64
        self._inverse = torch.zeros((history, history), dtype=exact, device=device)
        self._curvature = torch.zeros(history, dtype=exact, device=device)
        self._sg = torch.zeros(history, dtype=exact, device=device)
        self._gamma = torch.ones((), dtype=exact, device=device)
        self._loss = torch.full((), math.inf, dtype=exact, device=device)
        self._cap = torch.full((), max_step_rms, dtype=exact, device=device)
        self._damping = torch.ones((), dtype=exact, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._taken = torch.zeros((), dtype=torch.bool, device=device)
        self._slots = torch.arange(history, device=device)
        self._spectral = Spectral(self.x) if spectral else None

    @property
    def form(self) -> Hashable:
        """What another minimization must have in common for `restore` to take its state, and to go on alike."""
        pairs, constants = self._pairs, (self._first_step_rms, self._overshoot)
        return ("lbfgs", self.x.shape, self.x.dtype, pairs.shape, pairs.dtype, self._spectral is None, constants)

    def restart(self, x: Tensor) -> None:
        """Go on from `x`, without memory and with steps a quarter as long: what to do after a step led nowhere."""
        self.forget()
        self.x.copy_(x)
        self._cap /= 4

    def forget(self) -> None:
        """Go on from where it is, without memory: what to do when another function is minimized from now on."""
        for name, tensor in self._tensors().items():
            if name not in ("x", "cap"):
                tensor.zero_()
        self._pairs.zero_()
        self._gamma.fill_(1.0)
        self._damping.fill_(1.0)
        self._loss.fill_(math.inf)

    def state(self) -> dict[str, Tensor]:
        """Return what `restore` needs to go on exactly, after a step: copies, on the device.

        x: the point, of `start`'s shape.
        pairs: (2, k, n), S and Y, the k ≤ m rows in use.
        inverse: (m, m), R⁻¹, by rows of the ring; curvature: (m,), the diagonal of R; sg: (m,), S·g.
        g: (n,), the gradient before the last step; s: (n,), the last step.
        gamma, loss, cap, damping: scalars, of which the loss is the one before the last step.
        bands: (2, C, bands), places: (2, P), see `Spectral`; only with `spectral`.
        count: int64, pairs ever remembered, of which the last m still are; taken: bool, whether there is a last step.
        """
        rows = min(int(self._count), self._pairs.shape[1])
        return {name: tensor.clone() for name, tensor in {**self._tensors(), "pairs": self._pairs[:, :rows]}.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where a minimization of as many unknowns, with as long a history, was when `state` was made."""
        self.forget()
        for name, tensor in self._tensors().items():
            tensor.copy_(state[name])
        kept = state["pairs"]
        self._pairs[:, : kept.shape[1]] = kept

    def _tensors(self) -> dict[str, Tensor]:
        """Return by name all that changes, but the pairs."""
        names = ("x", "inverse", "curvature", "sg", "g", "s", "gamma", "loss", "cap", "damping", "count", "taken")
        found = {name: self.x if name == "x" else getattr(self, f"_{name}") for name in names}
        if self._spectral is not None:
            found |= {"bands": self._spectral.bands, "places": self._spectral.places}
        return found

    def step(self, gradient: Tensor, loss: Tensor) -> None:
        """Move `x` along -H·g, given the gradient, of its shape, and the objective at `x`, a scalar on the device.

        If the last step raised the objective too much, it is taken back in part instead.
        """
        g = gradient.detach().reshape(-1)
        loss = loss.to(self._loss)
        back = loss > self._overshoot * self._loss
        sg = self._remember(g, wanted=~back & self._taken)
        d = self._direction(g, sg)
        rms = torch.linalg.vector_norm(d) / d.numel() ** 0.5
        ratio = self._cap.clamp_max(self._first_step_rms) / rms.clamp_min(torch.finfo(d.dtype).tiny)
        length = torch.where(self._count == 0, ratio, torch.minimum(self._cap / rms, self._damping))
        forth = d.mul_(length.to(d))
        self.x += torch.where(back, self._s * (BACK - 1), forth).view_as(self.x)
        self._s.copy_(torch.where(back, self._s * BACK, forth))
        self._g.copy_(torch.where(back, self._g, g))
        self._sg.copy_(torch.where(back, self._sg, sg))
        self._loss.copy_(torch.where(back, self._loss, loss))
        self._taken.fill_(True)

    def _remember(self, g: Tensor, *, wanted: Tensor) -> Tensor:
        """Take in the pair that the gradient at `x` completes, if it is `wanted` and fit; return S·g, (m,)."""
        pair = torch.stack((self._s, g - self._g)).to(self._pairs.dtype)
        s, y = both = pair.to(g.dtype)
        sy, yy = s.dot(y).to(self._gamma), y.dot(y).to(self._gamma)
        taken = wanted & (sy > (MIN_CURVATURE * yy).clamp_min(torch.finfo(g.dtype).tiny))
        slot = (self._count % len(self._slots))[None]
        self._pairs.index_copy_(1, slot, torch.where(taken, pair[:, None], self._pairs.index_select(1, slot)))
        sg = products(self._pairs[0], g).to(self._sg)
        # R⁻¹ without the pair that had the slot, then with the new one, whose column of R is S·y, as its last.
        here = (self._slots == slot) & taken
        inverse = self._inverse.masked_fill(here[:, None] | here, 0.0)
        above = (sg - self._sg).masked_fill(here, 0.0)
        column = torch.where(here, 1.0, -(inverse @ above)) / sy
        self._inverse.copy_(torch.where(here, column[:, None], inverse))
        self._curvature.copy_(torch.where(here, sy, self._curvature))
        self._gamma.copy_(torch.where(taken, sy / yy, self._gamma))
        if self._spectral is not None:
            self._spectral.learn(both, sy / yy, taken)
            end = s.dot(g).to(self._gamma)
            slope = (end / (end - sy)).clamp(-1.0, 0.5)  # of its beginning
            damping = (self._damping * (DAMPING_RATE * slope).exp()).clamp(LEAST_DAMPING, 1.0)
            self._damping.copy_(torch.where(taken, damping, self._damping))
        self._count += taken
        return sg

    def _direction(self, g: Tensor, sg: Tensor) -> Tensor:
        """Return d, (n,), from what is remembered."""
        s, y = self._pairs
        alpha = self._inverse @ sg
        q = g - combined(alpha, y)
        r = q.mul_(self._gamma.to(g)) if self._spectral is None else self._spectral.times(q, self._gamma)
        delta = self._inverse.t() @ (self._curvature * alpha - products(y, r).to(alpha))
        return r.add_(combined(delta, s)).neg_()


def products(rows: Tensor, vector: Tensor) -> Tensor:
    """Return the inner products of rows (m, n), which may be in bf16, with a vector (n,): (m,), in its type."""
    whole = vector.numel() // BLOCK * BLOCK if rows.is_cuda or rows.dtype != vector.dtype else 0
    if not whole:
        return rows.to(vector.dtype) @ vector
    blocks = rows[:, :whole].view(len(rows), -1, BLOCK).transpose(0, 1)
    by_block = _blocks_times(blocks, vector[:whole].view(-1, BLOCK))
    return by_block.sum(dim=0) + rows[:, whole:].to(vector.dtype) @ vector[whole:]


def _blocks_times(blocks: Tensor, vectors: Tensor) -> Tensor:
    """Return the products of blocks (b, m, BLOCK) with vectors (b, BLOCK): (b, m).

    On a GPU, whose library gives a long inner product to few of its processors, they make work for all of them.
    """
    if blocks.dtype == vectors.dtype:
        return torch.bmm(blocks, vectors[:, :, None])[:, :, 0]
    if blocks.is_cuda:
        return torch.bmm(blocks, _in_parts(vectors).permute(1, 2, 0), out_dtype=vectors.dtype).sum(dim=2)
    return torch.stack([block.to(vectors.dtype) @ vector for block, vector in zip(blocks, vectors, strict=True)])


def combined(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of rows (m, n), which may be in bf16, times their coefficients (m,): (n,), at least in fp32."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    vector = coefficients.to(dtype)
    if rows.dtype == dtype:
        return vector @ rows
    if rows.is_cuda:
        return torch.mm(_in_parts(vector), rows, out_dtype=dtype).sum(dim=0)
    return torch.cat([vector @ few.to(dtype) for few in torch.split(rows, BLOCK, dim=1)])


def _in_parts(values: Tensor) -> Tensor:
    """Return numbers in bf16 whose sums over the first dimension are those given in fp32: (3, …)."""
    parts = []
    for _ in range(3):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return torch.stack(parts)
