"""L-BFGS on inner products against the textbook's matrices and on known problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nst_model.lbfgs import FIRST_STEP_RMS, LBFGS, MAX_STEP_RMS


def run(optimizer: LBFGS, gradient_of: object, iterations: int) -> list[torch.Tensor]:
    """Return the points of `iterations` steps, the start first."""
    points = [optimizer.x]
    for _ in range(iterations):
        products = optimizer.observe(gradient_of(optimizer.x))  # type: ignore[operator]
        optimizer.step(products.double().numpy(), 0.0)
        points.append(optimizer.x)
    return points


def convex_quadratic(n: int, condition: float) -> torch.Tensor:
    """Return a positive definite (n, n) matrix, float64."""
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, np.log10(condition), n, dtype=torch.float64)) @ q.T


@pytest.mark.parametrize("history", [3, 50])
def test_direction_is_that_of_the_dense_inverse_hessian(history: int) -> None:
    """Each step is -H·g, H built as a matrix from the last m pairs by the BFGS formula (Nocedal and Wright, 7.16)."""
    n = 12
    a = convex_quadratic(n, 30)
    optimizer = LBFGS(torch.ones(n, dtype=torch.float64), history)
    optimizer.max_step_rms = 1e9
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


def test_first_step_has_its_length_and_later_ones_are_capped() -> None:
    """Root mean squares in units of the unknowns, whatever the gradient's scale."""
    optimizer = LBFGS(torch.zeros(1000), 10)
    points = run(optimizer, lambda x: 1e6 * (x - 5.0), 6)
    lengths = [float((after - before).square().mean().sqrt()) for before, after in itertools.pairwise(points)]
    assert lengths[0] == pytest.approx(FIRST_STEP_RMS, rel=1e-4)
    assert max(lengths[1:]) == pytest.approx(MAX_STEP_RMS, rel=1e-4)


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


def test_rejected_pair_at_the_end_of_memory_does_no_harm() -> None:
    """A pair of negative curvature in the highest row used is dropped, and the steps go on."""
    optimizer = LBFGS(torch.full((4,), 0.1), 8)
    signs = iter([1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    run(optimizer, lambda x: next(signs) * (x - 1), 6)
    assert optimizer.x.isfinite().all()


def test_points_are_never_modified_afterwards() -> None:
    """An iterate that someone holds stays what it was; so does the start."""
    start = torch.full((3, 8, 8), 0.5)
    optimizer = LBFGS(start, 5)
    points = run(optimizer, lambda x: x, 5)
    assert torch.equal(start, torch.full((3, 8, 8), 0.5))
    assert len({point.data_ptr() for point in points}) == len(points)


def test_restart_goes_on_from_a_point_with_shorter_steps() -> None:
    """After a restart there is no memory, and the cap is a quarter."""
    optimizer = LBFGS(torch.zeros(100), 5)
    run(optimizer, lambda x: x - 1, 3)
    optimizer.restart(torch.full((100,), 0.3))
    points = run(optimizer, lambda x: x - 1, 1)
    assert torch.equal(points[0], torch.full((100,), 0.3))
    assert float((points[1] - points[0]).square().mean().sqrt()) == pytest.approx(
        min(FIRST_STEP_RMS, MAX_STEP_RMS / 4), rel=1e-4
    )
