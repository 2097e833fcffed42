"""The descent: budgets, averages, Adam, and what happens when the optimizer goes astray."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nst_model
from nst_model import FeatureModel, InvalidOption, Iterate, StopReason, Style, StylizeOptions
from nst_model.adam import Adam
from nst_model.descent import FALLBACK_RATE, PLATEAU, STALL, budgets, minimize

Picture = Callable[[int, int, int], torch.Tensor]


def run(model: FeatureModel, picture: Picture, start: torch.Tensor | None = None, **options: Any) -> list[Iterate]:
    """Return the iterates of a small stylization."""
    chosen = StylizeOptions(**options)
    styles = [Style(picture(48, 40, 2))]
    return list(nst_model.stylize(model, picture(40, 48, 1), styles, chosen, start=start))


class Bowl:
    """An objective of one's own: f(x) = mean (x - 0.5)², or whatever `loss` makes of the evaluation's number and f."""

    style_layers = ("relu1_1",)

    def __init__(self, loss: Callable[[int, float], float] = lambda _, f: f) -> None:
        self.points: list[torch.Tensor] = []
        self._loss = loss

    def loss_and_gradient(self, x: torch.Tensor, *_: Any) -> tuple[Any, torch.Tensor]:
        self.points.append(x.clone())
        value = torch.tensor(self._loss(len(self.points), float((x - 0.5).square().mean())))
        zero = torch.zeros(())
        losses = SimpleNamespace(total=value, content=zero, variation=zero, laplacian=zero, style=zero[None])
        return losses, 2 * (x - 0.5) / x.numel()


def descend(bowl: Bowl, **options: Any) -> Iterator[Iterate]:
    """Yield the iterates on a bowl."""
    yield from minimize(bowl, {}, torch.zeros(1, 3, 16, 16), StylizeOptions(**options))


def test_budget_of_each_scale() -> None:
    """`scale_iterations` from the coarsest on; the last one serves those left, and too many do no harm."""
    assert budgets(StylizeOptions(iterations=7), 3) == [7, 7, 7]
    assert budgets(StylizeOptions(scale_iterations=[9, 5]), 4) == [9, 5, 5, 5]
    assert budgets(StylizeOptions(scale_iterations=[9, 5, 3]), 2) == [9, 5]


def test_budgets_are_kept(tiny_model: FeatureModel, picture: Picture) -> None:
    """Counted through the scales, and announced from the start."""
    iterates = run(tiny_model, picture, scale_iterations=[5, 2], first_size_px=24)
    sizes = [max(iterate.picture.shape) for iterate in iterates]
    assert sizes == [24] * 5 + [34] * 2 + [48] * 3
    assert {iterate.iterations for iterate in iterates} == {9}
    works = [iterate.work for iterate in iterates]
    assert works == sorted(works)
    assert works[-1] == 1


def test_adam_is_the_textbooks() -> None:
    """Against torch.optim.Adam on the same gradients, 30 steps."""
    start = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours, theirs = Adam(start, 0.01), torch.nn.Parameter(start.clone())
    reference = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.99))
    for _ in range(30):
        ours.step(2 * (ours.x - 0.4) * torch.arange(1, 49).view_as(start), torch.zeros(()))
        theirs.grad = 2 * (theirs.detach() - 0.4) * torch.arange(1, 49).view_as(start)
        reference.step()
    torch.testing.assert_close(ours.x, theirs.detach())


def test_adam_stays_in_range_and_descends(tiny_model: FeatureModel, picture: Picture) -> None:
    """Pictures in [0, 1] and a falling loss; closures count as for L-BFGS."""
    iterates = run(tiny_model, picture, optimizer="adam", iterations=30, first_size_px=512, learning_rate=0.03)
    assert len(iterates) == 31
    assert iterates[-1].loss < 0.7 * iterates[0].loss
    assert all(0 <= float(i.picture.min()) <= float(i.picture.max()) <= 1 for i in iterates)


def test_adam_carries_its_moments_across_scales() -> None:
    """The same mean and square at each place, for the gradients of a picture with four times the pixels."""
    small = Adam(torch.full((1, 3, 8, 8), 0.5), 0.01)
    for _ in range(5):
        small.step(torch.full((1, 3, 8, 8), 4.0), torch.zeros(()))
    large = small.carried(torch.full((1, 3, 16, 16), 0.5))
    fresh = Adam(torch.full((1, 3, 16, 16), 0.5), 0.01)
    for optimizer in (large, fresh):
        optimizer.step(torch.full((1, 3, 16, 16), -1.0), torch.zeros(()))
    assert float(fresh.x.mean()) > 0.5  # against the gradient
    assert float(large.x.mean()) < 0.5  # momentum goes on


def test_averaging_shows_the_running_mean(tiny_model: FeatureModel, picture: Picture) -> None:
    """Free of bias: each picture is the weighted mean of those until then."""
    options = {"optimizer": "adam", "iterations": 6, "first_size_px": 512}
    plain = [iterate.picture for iterate in run(tiny_model, picture, **options)]
    averaged = [iterate.picture for iterate in run(tiny_model, picture, averaging=0.8, **options)]
    for last, found in enumerate(averaged):
        weights = [0.8 ** (last - place) for place in range(last + 1)]
        wanted = sum(weight * each for weight, each in zip(weights, plain, strict=False)) / sum(weights)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_stall_drops_the_memory_and_then_adam_takes_over() -> None:
    """Nothing gets better after the third evaluation: two restarts from the best point, then Adam, then the end."""
    bowl = Bowl(lambda number, f: f if number <= 3 else 10.0 + number)
    iterates = list(descend(bowl, iterations=1000, history=5))
    best = bowl.points[2]
    again = [place for place, x in enumerate(bowl.points) if torch.equal(x, best)]
    assert again[0] == 2
    assert again[1] == 2 + STALL + 1
    assert len(again) >= 4
    adam_step = bowl.points[again[3] + 1] - best
    assert float(adam_step.abs().mean()) == pytest.approx(FALLBACK_RATE, rel=0.01)
    assert iterates[-1].stop_reason is StopReason.CONVERGED
    assert torch.equal(iterates[-1].picture, best[0])
    assert len(bowl.points) < 200


def test_slow_progress_is_no_stall() -> None:
    """As long as it gets better now and then, nothing is reset."""
    bowl = Bowl(lambda number, _: 1.0 / (1 + number // (STALL - 1)))
    iterates = list(descend(bowl, iterations=100, optimizer="adam", learning_rate=1e-3))
    assert [iterate.index for iterate in iterates] == list(range(101))
    assert iterates[-1].stop_reason is StopReason.ITERATIONS


def test_a_plateau_ends_the_run_and_0_never_does() -> None:
    """When the last ten iterations have lowered the loss by less than was asked for."""
    bowl = {"history": 5, "optimizer": "adam", "learning_rate": 1e-4}

    def gain(number: int, _: float) -> float:
        return 0.9**number if number < 15 else 0.9**15 * 0.999 ** (number - 15)

    iterates = list(descend(Bowl(gain), iterations=60, plateau=0.05, **bowl))
    lowered = [1 - after.loss / before.loss for before, after in zip(iterates, iterates[PLATEAU:], strict=False)]
    assert [part < 0.05 for part in lowered] == [False] * (len(lowered) - 1) + [True]
    assert iterates[-1].stop_reason is StopReason.CONVERGED
    assert iterates[-1].work == 1
    assert len(list(descend(Bowl(gain), iterations=60, **bowl))) == 61


def test_a_plateau_ends_one_scale_and_the_next_begins(tiny_model: FeatureModel, picture: Picture) -> None:
    """Indices leave out what was not made; the next scale goes on from the best picture."""
    iterates = run(tiny_model, picture, iterations=30, first_size_px=34, plateau=0.3)
    indices = [iterate.index for iterate in iterates]
    assert indices[-1] < 60
    assert 30 in indices
    assert any(after > before + 1 for before, after in itertools.pairwise(indices))


def test_one_nan_is_survived_by_lbfgs_and_adam() -> None:
    """The loss goes on falling, and nothing that is not finite is shown."""
    for optimizer in ("lbfgs", "adam"):
        bowl = Bowl(lambda number, f: math.nan if number == 4 else f)
        iterates = list(descend(bowl, iterations=40, optimizer=optimizer))
        assert all(math.isfinite(iterate.loss) for iterate in iterates)
        assert iterates[-1].loss < 0.5 * iterates[0].loss


@pytest.mark.parametrize("init", ["gray", "style_statistics", "noise", "image"])
def test_starts(tiny_model: FeatureModel, picture: Picture, init: str) -> None:
    """The first iterate is the start that was asked for."""
    given = picture(80, 96, 7) if init == "image" else None
    first = run(tiny_model, picture, start=given, init=init, iterations=1, first_size_px=512)[0].picture
    style = picture(48, 40, 2)
    match init:
        case "gray":
            assert torch.equal(first, torch.full_like(first, 0.5))
        case "noise":
            assert float(first.mean()) == pytest.approx(0.5, abs=0.01)
            assert float(first.std()) == pytest.approx(0.1, abs=0.01)
        case "style_statistics":
            torch.testing.assert_close(first.mean(dim=(1, 2)), style.mean(dim=(1, 2)), atol=0.03, rtol=0)
            assert float(first.std()) == pytest.approx(float(style.std()), abs=0.04)
        case "image":
            assert given is not None
            wanted = torch.nn.functional.avg_pool2d(given[None], 2)[0]
            assert float((first - wanted).abs().mean()) < 0.1


def test_a_run_goes_on_from_anothers_result(tiny_model: FeatureModel, picture: Picture) -> None:
    """Its loss begins where the other ended. A margin, of so small a picture the larger part, would be made anew."""
    options = {"iterations": 15, "first_size_px": 512, "padding": "replicate"}
    first = run(tiny_model, picture, **options)[-1]
    start = first.picture.clamp(0, 1)
    again = run(tiny_model, picture, start=start, init="image", **options)
    assert again[0].loss == pytest.approx(first.loss, rel=0.2)
    assert again[-1].loss < first.loss


def test_image_start_and_picture_belong_together(tiny_model: FeatureModel, picture: Picture) -> None:
    """One without the other is refused."""
    with pytest.raises(InvalidOption, match="init image must come with a picture"):
        run(tiny_model, picture, init="image")
    with pytest.raises(InvalidOption, match="every other init without one"):
        run(tiny_model, picture, start=picture(40, 48, 3))


def test_deterministic_mode_asks_for_it_while_it_runs(tiny_model: FeatureModel, picture: Picture) -> None:
    """And puts the setting back, also if the run is left."""
    options = StylizeOptions(deterministic=True, iterations=3, first_size_px=512)
    iterates = nst_model.stylize(tiny_model, picture(32, 32, 1), [Style(picture(32, 32, 2))], options)
    next(iterates)
    assert torch.are_deterministic_algorithms_enabled()
    iterates.close()  # type: ignore[attr-defined]
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("pooling", ["max", "average", "l2"])
@pytest.mark.parametrize("padding", ["zeros", "replicate", "mirror"])
def test_deterministic_runs_repeat(tiny_model: FeatureModel, picture: Picture, pooling: str, padding: str) -> None:
    """Every algorithm on the way has a repeatable form."""
    options = {"deterministic": True, "iterations": 3, "first_size_px": 24, "pooling": pooling, "padding": padding}
    one, other = (run(tiny_model, picture, **options)[-1] for _ in range(2))
    assert torch.equal(one.picture, other.picture)


def test_laplacian_weight_keeps_the_outlines(tiny_model: FeatureModel, picture: Picture) -> None:
    """With it the picture's outlines stay closer to the photo's, and the loss is counted."""
    photo = torch.zeros(3, 48, 48)
    photo[:, 12:36, 12:36] = 1
    styles = [Style(picture(48, 48, 2))]

    def last(weight: float) -> Iterate:
        options = StylizeOptions(laplacian_weight=weight, iterations=20, first_size_px=512, content_weight=0)
        return list(nst_model.stylize(tiny_model, photo, styles, options))[-1]

    free, held = last(0), last(100)
    error = {
        id(i): float(
            (nst_model.objective.outlines(i.picture[None]) - nst_model.objective.outlines(photo[None])).square().mean()
        )
        for i in (free, held)
    }
    assert error[id(held)] < 0.2 * error[id(free)]
    assert held.laplacian_loss == pytest.approx(error[id(held)], rel=0.3)
    assert free.laplacian_loss == 0


def test_a_later_scale_that_gives_no_finite_loss_ends_with_the_picture_before(
    tiny_model: FeatureModel, picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best one of the scale before, with the reason; one NaN alone is survived."""
    real = nst_model.descent.Closure.__call__
    for spoiled, reason in ((range(6, 7), StopReason.ITERATIONS), (range(6, 100), StopReason.DIVERGED)):
        count = itertools.count(1)

        def call(self: Any, image: torch.Tensor, spoiled: range = spoiled, count: Any = count) -> Any:
            losses, gradient = real(self, image)
            return losses, gradient * (math.nan if next(count) in spoiled else 1)

        monkeypatch.setattr(nst_model.descent.Closure, "__call__", call)
        iterates = run(tiny_model, picture, iterations=5, first_size_px=34)
        assert iterates[-1].stop_reason is reason
        assert iterates[-1].picture.isfinite().all()


def test_adam_begins_each_scale_with_the_rate_it_was_given() -> None:
    """Whatever restarts made of it."""
    adam = Adam(torch.full((1, 3, 8, 8), 0.5), 0.04)
    adam.restart(adam.x)
    large = adam.carried(torch.full((1, 3, 16, 16), 0.5))
    large.step(torch.ones(1, 3, 16, 16), torch.zeros(()))
    assert float((large.x - 0.5).abs().mean()) == pytest.approx(0.04, rel=0.01)


@pytest.mark.parametrize("weights", [(0.0,), (-1.0,), (math.nan,)])
def test_weights_that_cannot_be_are_refused(
    tiny_model: FeatureModel, picture: Picture, weights: tuple[float, ...]
) -> None:
    """By name."""
    styles = [Style(picture(32, 32, 2), weight) for weight in weights]
    with pytest.raises(InvalidOption, match="styles"):
        next(iter(nst_model.stylize(tiny_model, picture(32, 32, 1), styles, StylizeOptions())))
