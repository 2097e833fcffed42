"""L-BFGS on the device against `torch.optim.LBFGS`, the textbook's matrices, and known problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nst_model import FeatureModel, Style, StylizeOptions
from nst_model.descent import Closure
from nst_model.lbfgs import BACK, BLOCK, FIRST_STEP_RMS, LBFGS, MAX_STEP_RMS, OVERSHOOT, combined, products
from nst_model.stylization import content_targets

Function = Callable[[Tensor], Tensor]
Problem = Callable[[Tensor], tuple[Tensor, Tensor]]
"""The loss at a point and its gradient."""
UNTAMED = {"max_step_rms": math.inf, "overshoot": math.inf}
"""Neither a cap nor a way back, like the textbook."""


def run(optimizer: LBFGS, gradient_of: Function, iterations: int, loss: float = 0.0) -> list[Tensor]:
    """Return the points of `iterations` steps, the start first."""
    points = [optimizer.x.clone()]
    for _ in range(iterations):
        optimizer.step(gradient_of(optimizer.x), torch.tensor(loss))
        points.append(optimizer.x.clone())
    return points


def convex_quadratic(n: int, condition: float) -> Tensor:
    """Return a positive definite (n, n) matrix, float64."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, np.log10(condition), n, dtype=torch.float64)) @ q.T


def bowl(n: int, condition: float) -> Problem:
    """Return f(x) = 10⁴·xᵀAx / 2; large, for torch's least curvature is an absolute number."""
    a = convex_quadratic(n, condition)
    return lambda x: (5e3 * x @ a @ x, 1e4 * a @ x)


def rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return Rosenbrock's function in n dimensions: a curved valley."""
    x = x.detach().requires_grad_(True)
    loss = (100 * (x[1:] - x[:-1].square()).square() + (1 - x[:-1]).square()).sum()
    return loss.detach(), torch.autograd.grad(loss, x)[0]


class Plain:
    """A `torch.optim.LBFGS` of one evaluation a step, lr 1 and no tolerances, in float64."""

    def __init__(self, problem: Problem, start: Tensor, history: int) -> None:
        self._problem = problem
        self.x = start.clone().requires_grad_(True)
        self._optimizer = torch.optim.LBFGS(
            [self.x], max_iter=1, history_size=history, tolerance_grad=0, tolerance_change=0
        )

    def step(self) -> tuple[Tensor, Tensor]:
        """Step; return the gradient and the loss at the point before."""
        loss, gradient = self._problem(self.x.detach())

        def closure() -> Tensor:
            self.x.grad = gradient.clone()
            return loss

        self._optimizer.step(closure)  # type: ignore[no-untyped-call]
        return gradient, loss

    def first_step_rms(self) -> float:
        """Return the root mean square of torch's first step, gradient · min(1, 1 / ‖gradient‖₁)."""
        _, gradient = self._problem(self.x.detach())
        return float(gradient.square().mean().sqrt() * (1 / gradient.abs().sum()).clamp_max(1))


def style(model: FeatureModel, picture: Callable[[int, int, int], Tensor]) -> tuple[Problem, Tensor]:
    """Return a small style objective of a flat picture in float64, and where to start."""
    options = StylizeOptions.of("gatys", precision="fp32")
    objective = model.objective([model.style_targets(Style(picture(32, 40, 2)), options)], options)
    content = picture(24, 32, 1)
    there = content_targets(objective, content)
    closure = Closure(objective, there)

    def problem(x: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradient = closure(x.view(1, 3, 24, 32).float())
        return losses.total.double(), gradient.flatten().double()

    return problem, content.flatten().double()


PROBLEMS: dict[str, tuple[Problem, Tensor]] = {
    "bowl": (bowl(200, 1e3), torch.ones(200, dtype=torch.float64)),
    "narrow bowl": (bowl(500, 1e6), torch.ones(500, dtype=torch.float64)),
    "rosenbrock": (rosenbrock, torch.zeros(1000, dtype=torch.float64)),
    "rosenbrock from afar": (rosenbrock, -torch.ones(100, dtype=torch.float64)),
}


@pytest.mark.parametrize("history", [1, 5, 20, 100])
@pytest.mark.parametrize("problem", [*PROBLEMS, "style"])
def test_each_of_200_steps_is_torchs_to_rounding(
    tiny_model: FeatureModel, picture: Callable[[int, int, int], Tensor], problem: str, history: int
) -> None:
    """From the same points and gradients. Runs left alone part by chance in the end: rounding grows exponentially."""
    function, start = style(tiny_model, picture) if problem == "style" else PROBLEMS[problem]
    theirs = Plain(function, start, history)
    ours = LBFGS(start, history, first_step_rms=theirs.first_step_rms(), **UNTAMED)
    for number in range(200):
        before = theirs.x.detach().clone()
        ours.step(*theirs.step())
        step = theirs.x.detach() - before
        assert float((ours.x - theirs.x.detach()).norm()) < 1e-9 * float(step.norm()), number
        ours.restore({**ours.state(), "x": theirs.x.detach(), "s": step})


@pytest.mark.parametrize("history", [5, 100])
@pytest.mark.parametrize("problem", [*PROBLEMS, "style"])
def test_runs_left_alone_stay_with_torchs(
    tiny_model: FeatureModel, picture: Callable[[int, int, int], Tensor], problem: str, history: int
) -> None:
    """The same points for twenty iterations, and as low a loss after 200."""
    function, start = style(tiny_model, picture) if problem == "style" else PROBLEMS[problem]
    theirs = Plain(function, start, history)
    ours = LBFGS(start, history, first_step_rms=theirs.first_step_rms(), **UNTAMED)
    for number in range(200):
        loss, gradient = function(ours.x)
        ours.step(gradient, loss)
        theirs.step()
        if number < 20:
            torch.testing.assert_close(ours.x, theirs.x.detach(), rtol=1e-6, atol=1e-9)
    start_loss = float(function(start)[0])
    lost = [float(function(x.detach())[0]) / start_loss for x in (ours.x, theirs.x)]
    assert lost[0] == pytest.approx(lost[1], rel=0.25, abs=1e-9)


@pytest.mark.parametrize("history", [3, 50])
def test_direction_is_that_of_the_dense_inverse_hessian(history: int) -> None:
    """Each step is -H·g, H built as a matrix from the last m pairs by the BFGS formula (Nocedal and Wright, 7.16)."""
    n = 12
    a = convex_quadratic(n, 30)
    optimizer = LBFGS(torch.ones(n, dtype=torch.float64), history, max_step_rms=1e9)
    points = run(optimizer, lambda x: a @ x, 8)
    gradients = [a @ x for x in points]

    for k in range(1, 8):
        pairs = [(points[i + 1] - points[i], gradients[i + 1] - gradients[i]) for i in range(max(0, k - history), k)]
        s, y = pairs[-1]
        h = torch.eye(n, dtype=torch.float64) * (s @ y) / (y @ y)
        for s, y in pairs:
            rho = 1 / (s @ y)
            v = torch.eye(n, dtype=torch.float64) - rho * torch.outer(y, s)
            h = v.T @ h @ v + rho * torch.outer(s, s)
        torch.testing.assert_close(points[k + 1] - points[k], -h @ gradients[k], rtol=1e-6, atol=1e-10)


def test_a_step_never_waits_for_a_number() -> None:
    """On a device that has none: whatever asked for one would fail."""
    for stored in (None, torch.bfloat16):
        optimizer = LBFGS(torch.zeros(1, 3, 8, 8, device="meta"), 5, stored=stored, spectral=True)
        with pytest.raises((RuntimeError, NotImplementedError)):
            float(optimizer.x.sum())  # so this is how it would fail
        for _ in range(8):
            optimizer.step(torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros((), device="meta"))
        optimizer.restart(torch.zeros(1, 3, 8, 8, device="meta"))


def test_first_step_has_its_length_and_later_ones_are_capped() -> None:
    """Root mean squares in units of the unknowns, whatever the gradient's scale."""
    optimizer = LBFGS(torch.zeros(1000), 10)
    points = run(optimizer, lambda x: 1e6 * (x - 5.0), 6)
    lengths = [float((after - before).square().mean().sqrt()) for before, after in itertools.pairwise(points)]
    assert lengths[0] == pytest.approx(FIRST_STEP_RMS, rel=1e-4)
    assert max(lengths[1:]) == pytest.approx(MAX_STEP_RMS, rel=1e-4)


def test_an_overshooting_step_is_taken_back_in_part() -> None:
    """A quarter of it is kept, the memory stays as it was, and the next pair is that of the quarter."""
    a = convex_quadratic(12, 30)
    loyal, tempted = (LBFGS(torch.full((12,), 0.3, dtype=torch.float64), 5) for _ in range(2))
    for optimizer in (loyal, tempted):
        run(optimizer, lambda x: a @ x, 3, loss=1.0)
    before = loyal.x - loyal.state()["s"]
    assert torch.equal(loyal.x, tempted.x)
    tempted.step(a @ tempted.x * 100, torch.tensor(1.0 + OVERSHOOT))
    torch.testing.assert_close(tempted.x, before + BACK * (loyal.x - before))
    kept, now = loyal.state(), tempted.state()
    unchanged = ("pairs", "inverse", "curvature", "gamma", "g", "sg", "count", "loss")
    assert all(torch.equal(kept[name], now[name]) for name in unchanged)
    quarter = tempted.x.clone()
    tempted.step(a @ tempted.x, torch.tensor(0.5))
    s, y = tempted.state()["pairs"][:, 2]
    torch.testing.assert_close(s, quarter - before)
    torch.testing.assert_close(y, a @ (quarter - before))


def test_the_first_step_is_never_backed_up_from() -> None:
    """There is nothing to compare with, however large the loss is."""
    optimizer = LBFGS(torch.zeros(10), 5)
    assert float(run(optimizer, lambda x: x - 1, 1, loss=1e30)[1].mean()) == pytest.approx(FIRST_STEP_RMS)


def test_ill_conditioned_quadratic_is_solved() -> None:
    """Twenty unknowns, condition 1000: the gradient falls by eight orders of magnitude in 150 iterations."""
    a = convex_quadratic(20, 1000)
    optimizer = LBFGS(torch.full((20,), 0.5, dtype=torch.float64), 20)
    last = run(optimizer, lambda x: a @ x, 150)[-1]
    assert float((a @ last).norm()) < 1e-8 * float((a @ torch.full((20,), 0.5, dtype=torch.float64)).norm())


def test_memory_wraps_around_many_times() -> None:
    """A history of two still converges over a hundred pairs."""
    a = convex_quadratic(10, 20)
    last = run(LBFGS(torch.full((10,), 0.5, dtype=torch.float64), 2), lambda x: a @ x, 120)[-1]
    assert float(last.norm()) < 1e-6


def test_pairs_of_negative_curvature_are_left_out() -> None:
    """On a concave function every step still goes downhill."""
    optimizer = LBFGS(torch.full((4,), 0.1), 5)
    points = run(optimizer, lambda x: -x, 10)
    losses = [float(-0.5 * x @ x) for x in points]
    assert losses == sorted(losses, reverse=True)
    assert int(optimizer.state()["count"]) == 0


def test_a_pair_that_is_left_out_costs_none_that_is_remembered() -> None:
    """Not even when the memory is full and its place would be the oldest one's."""
    optimizer = LBFGS(torch.full((6,), 0.1, dtype=torch.float64), 2)
    a = convex_quadratic(6, 5)
    run(optimizer, lambda x: a @ x, 4)
    before = optimizer.state()
    optimizer.step(before["g"] - before["s"], torch.tensor(0.0))
    after = optimizer.state()
    assert all(torch.equal(before[name], after[name]) for name in ("pairs", "inverse", "curvature", "gamma", "count"))


def test_a_vanished_gradient_does_no_harm() -> None:
    """At the minimum it stays where it is."""
    optimizer = LBFGS(torch.full((4,), 0.1), 3)
    run(optimizer, lambda x: x, 3)
    x = optimizer.x.clone()
    optimizer.step(torch.zeros(4), torch.tensor(0.0))
    for _ in range(3):
        optimizer.step(torch.zeros(4), torch.tensor(0.0))
    assert optimizer.x.isfinite().all()
    assert float((optimizer.x - x).abs().max()) <= 4 * MAX_STEP_RMS


def test_the_start_is_not_modified() -> None:
    """It belongs to whoever gave it."""
    start = torch.full((3, 8, 8), 0.5)
    run(LBFGS(start, 5), lambda x: x, 5)
    assert torch.equal(start, torch.full((3, 8, 8), 0.5))


def test_restart_goes_on_from_a_point_with_shorter_steps() -> None:
    """After a restart there is no memory, and the cap is a quarter: as if it were new."""
    optimizer, new = LBFGS(torch.zeros(100), 5), LBFGS(torch.full((100,), 0.3), 5, max_step_rms=MAX_STEP_RMS / 4)
    run(optimizer, lambda x: x - 1, 3)
    optimizer.restart(torch.full((100,), 0.3))
    points = [run(each, lambda x: (x - 1) ** 3, 5) for each in (optimizer, new)]
    assert all(torch.equal(one, other) for one, other in zip(*points, strict=True))
    assert float((points[0][1] - 0.3).square().mean().sqrt()) == pytest.approx(
        min(FIRST_STEP_RMS, MAX_STEP_RMS / 4), rel=1e-4
    )


@pytest.mark.parametrize("given", [{}, {"stored": torch.bfloat16}, {"spectral": True}])
@pytest.mark.parametrize("cut", [0, 1, 2, 3, 9])
def test_restored_it_goes_on_to_the_bit(cut: int, given: dict[str, Any]) -> None:
    """Wherever it is left, the memory half full, full, or wrapped around."""
    a = convex_quadratic(48, 100).float()

    def gradient(x: Tensor) -> Tensor:
        return (a @ x.flatten()).view_as(x)

    start = torch.full((3, 4, 4), 0.5)
    whole, again = (LBFGS(start, 3, **given) for _ in range(2))
    run(whole, gradient, cut)
    run(again, lambda x: gradient(x) + 1, 5)  # whatever it did before
    state = whole.state()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    again.restore(state)
    points = [run(optimizer, gradient, 8) for optimizer in (whole, again)]
    assert all(torch.equal(one, other) for one, other in zip(*points, strict=True))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.items()), "a state is a copy"
    assert state["pairs"].shape[1] == (min(cut - 1, 3) if cut else 0)


@pytest.mark.parametrize("n", [7, BLOCK, 2 * BLOCK + 5])
def test_a_memory_in_bf16_is_used_in_fp32(n: int) -> None:
    """Products and sums are those of the rounded rows, accumulated in fp32."""
    random = torch.Generator().manual_seed(0)
    rows, vector = torch.randn(6, n, generator=random).bfloat16(), torch.randn(n, generator=random)
    coefficients = torch.randn(6, generator=random, dtype=torch.float64)
    torch.testing.assert_close(products(rows, vector).double(), rows.double() @ vector.double(), rtol=1e-4, atol=1e-3)
    exact = coefficients @ rows.double()
    torch.testing.assert_close(combined(coefficients, rows).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_memory_in_bf16_costs_little(tiny_model: FeatureModel, picture: Callable[[int, int, int], Tensor]) -> None:
    """As low a loss after 100 iterations, within 5 %, on a style objective."""
    problem, start = style(tiny_model, picture)

    def last(**given: Any) -> float:
        optimizer = LBFGS(start, 20, **given)
        for _ in range(100):
            loss, gradient = problem(optimizer.x)
            optimizer.step(gradient, loss)
        return float(problem(optimizer.x)[0])

    assert last(stored=torch.bfloat16) == pytest.approx(last(), rel=0.05)
