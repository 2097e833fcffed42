"""Stylization as a sequence of iterates."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import nst_model
from nst_model import (
    FeatureModel,
    Init,
    InvalidImage,
    InvalidOption,
    Iterate,
    StopReason,
    Style,
    StylizeOptions,
)
from nst_model.descent import minimize
from nst_model.lbfgs import OVERSHOOT
from nst_model.objective import interpreted
from nst_model.scales import scales
from nst_model.stylization import content_targets, mixed

Picture = Callable[[int, int, int], torch.Tensor]


def run(model: FeatureModel, picture: Picture, **options: Any) -> Iterator[Iterate]:
    """Yield the iterates of a small stylization."""
    chosen = StylizeOptions.of("gatys", **options)
    return nst_model.stylize(model, picture(36, 28, 1), [Style(picture(32, 40, 2))], chosen)


class Counting:
    """An objective that counts its evaluations and may spoil some."""

    def __init__(self, objective: Any, spoiled: Callable[[int], bool] = lambda _: False) -> None:
        self.evaluations = 0
        self._objective = objective
        self._spoiled = spoiled
        self.style_layers = objective.style_layers

    def loss_and_gradient(self, image: torch.Tensor, targets: dict[str, torch.Tensor], regions: Any) -> Any:
        self.evaluations += 1
        losses, gradient = self._objective.loss_and_gradient(image, targets, regions)
        if self._spoiled(self.evaluations):
            return losses, gradient * math.nan
        return losses, gradient


@pytest.fixture
def problem(tiny_model: FeatureModel, picture: Picture) -> tuple[Any, dict[str, torch.Tensor], torch.Tensor]:
    """A scripted objective, its content targets and a start."""
    options = StylizeOptions.of("gatys")
    objective = tiny_model.objective([tiny_model.style_targets(Style(picture(32, 40, 2)), options)], options)
    content = picture(36, 28, 1)[None]
    return objective, content_targets(objective, content[0]), content


def test_one_evaluation_an_iteration(problem: tuple[Any, dict[str, torch.Tensor], torch.Tensor]) -> None:
    """The start costs one evaluation, and each of the iterations one more."""
    counting = Counting(problem[0])
    iterates = list(minimize(counting, problem[1], problem[2], StylizeOptions.of("gatys", iterations=7)))
    assert [iterate.index for iterate in iterates] == list(range(8))
    assert counting.evaluations == 8


def test_iterates_carry_the_objective_at_their_own_picture(tiny_model: FeatureModel, picture: Picture) -> None:
    """Evaluating the objective at an iterate's picture gives that iterate's losses."""
    options = StylizeOptions.of("gatys", iterations=3)
    styles = [Style(picture(32, 40, 2))]
    content = picture(36, 28, 1)
    objective = tiny_model.objective([tiny_model.style_targets(styles[0], options)], options)
    targets = content_targets(objective, content)
    for iterate in nst_model.stylize(tiny_model, content, styles, options):
        with interpreted():
            losses = objective(iterate.picture[None], targets)
        assert iterate.loss == pytest.approx(float(losses.total), rel=1e-6)
        assert list(iterate.style_losses.values()) == pytest.approx(losses.style.tolist(), rel=1e-6)
        weights = nst_model.options.relative(options.style_layers)
        style = sum(weights[layer] * loss for layer, loss in iterate.style_losses.items())
        total = options.content_weight * iterate.content_loss + options.style_weight * style
        assert iterate.loss == pytest.approx(total, rel=1e-5)


def test_an_overshooting_step_is_backed_up_from(tiny_model: FeatureModel, picture: Picture) -> None:
    """From a start close to the optimum the first step is far too long; the loss is mended at once and then falls."""
    losses = [iterate.loss for iterate in run(tiny_model, picture, iterations=60)]
    assert losses[1] > OVERSHOOT * losses[0], "this problem no longer overshoots; find another"
    assert max(losses[3:]) < losses[0]
    assert losses[-1] < 0.2 * losses[0]


def test_runs_repeat_bit_for_bit(tiny_model: FeatureModel, picture: Picture) -> None:
    """The same options give the same pictures, in fp32 on the same machine."""
    first, second = (list(run(tiny_model, picture, iterations=5, init=Init.NOISE, seed=7)) for _ in range(2))
    assert all(torch.equal(a.picture, b.picture) and a.loss == b.loss for a, b in zip(first, second, strict=True))


def test_noise_depends_on_the_seed_only(tiny_model: FeatureModel, picture: Picture) -> None:
    """Noise starts around mid-grey, and another seed is another start."""
    one, other = (next(run(tiny_model, picture, init=Init.NOISE, seed=seed)).picture for seed in (1, 2))
    assert not torch.equal(one, other)
    assert float(one.mean()) == pytest.approx(0.5, abs=0.02)


def test_stop_event_ends_the_run_before_the_next_evaluation(tiny_model: FeatureModel, picture: Picture) -> None:
    """Set after iterate 3, it lets no iterate 4 come."""
    options = StylizeOptions.of("gatys", iterations=100)
    styles = [Style(picture(32, 40, 2))]
    stop = threading.Event()
    seen = []
    for iterate in nst_model.stylize(tiny_model, picture(36, 28, 1), styles, options, stop=stop):
        seen.append(iterate.index)
        if iterate.index == 3:
            stop.set()
    assert seen == [0, 1, 2, 3]


def test_nan_restarts_from_the_best_picture(problem: tuple[Any, dict[str, torch.Tensor], torch.Tensor]) -> None:
    """One spoiled evaluation costs one iteration; nothing spoiled is ever shown, and the loss goes on falling."""
    counting = Counting(problem[0], lambda evaluation: evaluation == 5)
    iterates = list(minimize(counting, problem[1], problem[2], StylizeOptions.of("gatys", iterations=20)))
    assert [iterate.index for iterate in iterates] == [index for index in range(21) if index != 4]
    assert all(math.isfinite(iterate.loss) for iterate in iterates)
    assert iterates[-1].stop_reason is StopReason.ITERATIONS
    assert iterates[-1].loss < iterates[3].loss


def test_lasting_nan_ends_with_the_best_picture(problem: tuple[Any, dict[str, torch.Tensor], torch.Tensor]) -> None:
    """When restarting does not help, the last word is the best picture, with the reason.

    The best picture itself can be evaluated: only what follows it is spoiled.
    """
    counting = Counting(problem[0], lambda evaluation: evaluation > 4 and evaluation % 2 == 1)
    iterates = list(minimize(counting, problem[1], problem[2], StylizeOptions.of("gatys", iterations=50)))
    best = min(iterates[:-1], key=lambda iterate: iterate.loss)
    assert iterates[-1].stop_reason is StopReason.DIVERGED
    assert torch.equal(iterates[-1].picture, best.picture)
    assert counting.evaluations < 20


def test_vanished_gradient_is_convergence(tiny_model: FeatureModel, picture: Picture) -> None:
    """With no style weight the content itself is the minimum, and the run ends there."""
    iterates = list(run(tiny_model, picture, style_weight=0, iterations=10))
    assert [(iterate.index, iterate.stop_reason) for iterate in iterates] == [(0, StopReason.CONVERGED)]


def test_styles_mix_by_weight(tiny_model: FeatureModel, picture: Picture) -> None:
    """The mixture's moments are the weighted means; the scale of the weights does not matter."""
    options = StylizeOptions()
    one, other = (tiny_model.style_targets(Style(picture(32, 32, seed)), options) for seed in (1, 2))
    found = mixed([(3, one), (1, other)])
    for layer in options.style_layers:
        for name in ("mean", "gram"):
            torch.testing.assert_close(found[layer][name], 0.75 * one[layer][name] + 0.25 * other[layer][name])


def test_scales_grow_by_the_root_of_two() -> None:
    """From the first size to the picture's own, never below the first nor too thin."""
    assert scales(512, 384, 128) == [128, 181, 256, 362, 512]
    assert scales(500, 375, 128) == [177, 250, 354, 500]
    assert scales(512, 384, 512) == scales(512, 384, 4096) == [512]
    assert scales(512, 40, 128) == [256, 362, 512]
    assert scales(100, 100, 128) == [100]


def test_coarse_to_fine_counts_through(tiny_model: FeatureModel, picture: Picture) -> None:
    """Three scales of four iterations: indices without gaps, pictures that grow, work that ends at 1."""
    asked = []

    def targets_of(style: Style, options: StylizeOptions) -> Any:
        asked.append(tuple(style.picture.shape[1:]))
        return tiny_model.style_targets(style, options)

    options = StylizeOptions(iterations=4, first_size_px=40)
    iterates = list(
        nst_model.stylize(tiny_model, picture(80, 60, 1), [Style(picture(64, 80, 2))], options, targets_of=targets_of)
    )
    assert [iterate.index for iterate in iterates] == list(range(13))
    assert {iterate.iterations for iterate in iterates} == {12}
    sizes = [tuple(iterate.picture.shape[1:]) for iterate in iterates]
    assert sizes == [(40, 30)] * 4 + [(57, 43)] * 4 + [(80, 60)] * 5
    assert asked == [(32, 40), (46, 57), (64, 80)]
    work = [iterate.work for iterate in iterates]
    assert work == sorted(work)
    assert work[-1] == 1.0
    assert iterates[-1].stop_reason is StopReason.ITERATIONS


def test_coarse_scale_carries_over(tiny_model: FeatureModel, picture: Picture) -> None:
    """The finest scale begins at a lower loss than it would from the photograph."""
    styles, content = [Style(picture(80, 80, 2) ** 3)], picture(80, 80, 1)
    pyramid = list(nst_model.stylize(tiny_model, content, styles, StylizeOptions(iterations=15, first_size_px=40)))
    plain = next(nst_model.stylize(tiny_model, content, styles, StylizeOptions(first_size_px=80)))
    first_fine = next(iterate for iterate in pyramid if iterate.picture.shape == content.shape)
    assert first_fine.loss < 0.7 * plain.loss


@pytest.mark.parametrize(
    ("shape", "message"),
    [((3, 15, 40), "at least 16 px"), ((1, 40, 40), r"shape \(3, H, W\)"), ((40, 40), r"shape \(3, H, W\)")],
)
def test_impossible_pictures_are_refused(
    tiny_model: FeatureModel, picture: Picture, shape: tuple[int, ...], message: str
) -> None:
    """Too small a picture or a wrong shape is InvalidImage and says what is needed."""
    options = StylizeOptions()
    styles = [Style(picture(32, 32, 1))]
    with pytest.raises(InvalidImage, match=message):
        next(nst_model.stylize(tiny_model, torch.zeros(shape), styles, options))


def test_nan_in_the_content_is_refused(tiny_model: FeatureModel, picture: Picture) -> None:
    """No iterate is ever NaN, not even the first."""
    options = StylizeOptions()
    styles = [Style(picture(32, 32, 1))]
    with pytest.raises(InvalidImage, match="no finite loss"):
        next(nst_model.stylize(tiny_model, torch.full((3, 32, 32), math.nan), styles, options))


def test_unknown_layers_are_refused(tiny_model: FeatureModel, picture: Picture) -> None:
    """A layer that the model lacks names the option, the layer and the nearest one."""
    options = StylizeOptions(content_layers={"relu4_9": 1})
    with pytest.raises(InvalidOption, match=r"content_layers\[relu4_9\] is no layer.*did you mean relu4_"):
        next(nst_model.stylize(tiny_model, picture(32, 32, 1), [Style(picture(32, 32, 2))], options))


def test_pixels_round_and_clip() -> None:
    """Pictures leave the core as HWC uint8, clipped to [0, 255] and rounded to the nearest."""
    picture = torch.tensor([[[-0.5, 0.5]], [[1.5, 0.4999]], [[1.0, 0.0]]])
    assert nst_model.to_pixels(picture).tolist() == [[[0, 255, 255], [128, 127, 0]]]
    pixels = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    assert (nst_model.to_pixels(nst_model.from_pixels(pixels)) == pixels).all()


def test_sixteen_bits_round_and_clip_too() -> None:
    """HWC uint16 in [0, 65535]; what 8 bits can say is the same in 16."""
    picture = torch.tensor([[[-0.5, 0.5]], [[1.5, 0.4999]], [[1.0, 0.0]]])
    deep = nst_model.to_pixels(picture, bits=16)
    assert deep.dtype == "uint16"
    assert deep.tolist() == [[[0, 65535, 65535], [32768, 32761, 0]]]
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 16, 1).repeat(1, 1, 3).numpy()
    assert (nst_model.to_pixels(nst_model.from_pixels(levels), bits=16) == levels.astype("uint16") * 257).all()


def test_where_memory_is_short_pairs_are_fewer_and_in_bf16(tiny_weights: Any, picture: Picture) -> None:
    """And the run ends about as well."""
    ends = []
    for memory_bytes in (0, 1):
        model = FeatureModel(tiny_weights, "cpu", memory_bytes)
        options = StylizeOptions.of("gatys", iterations=40, precision="fp32")
        making = nst_model.stylization.Stylization(model, picture(36, 28, 1), [Style(picture(32, 40, 2))], options)
        iterates = iter(making)
        for _ in range(21):
            next(iterates)
        pairs = making.state().tensors["optimizer.pairs"]
        if memory_bytes:
            assert (len(pairs[0]), pairs.dtype) == (10, torch.bfloat16)
        else:
            assert len(pairs[0]) > 10
            assert pairs.dtype is torch.float32
        ends.append(list(iterates)[-1].loss)
    assert ends[1] == pytest.approx(ends[0], rel=0.2)


def test_what_is_free_at_the_moment_chooses_nothing_of_a_deterministic_run(
    tiny_weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any other takes what fits; the same bytes each time ask for the same memory each time."""
    model = FeatureModel(tiny_weights, "cpu")
    free = [2**40, 2**29]
    monkeypatch.setattr("nst_model.stylization.memory_bytes", lambda _: free[0])
    monkeypatch.setattr("nst_model.stylization.lasting_memory_bytes", lambda _: 2**40)
    for deterministic in (False, True):
        options = StylizeOptions(deterministic=deterministic)
        first = model.memory(options, 512, 512)
        free.reverse()
        assert (model.memory(options, 512, 512) == first) is deterministic
        free.reverse()
