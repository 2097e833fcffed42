"""A run that is broken off and taken up again, and one that is steered."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import nst_model
from nst_model import FeatureModel, InvalidOption, Iterate, StopReason, Style, StylizeOptions
from nst_model.errors import DamagedState
from nst_model.lbfgs import LBFGS
from nst_model.state import State
from nst_model.stylization import Stylization

Picture = Callable[[int, int, int], torch.Tensor]
Make = Callable[..., Stylization]

RUNS: dict[str, dict[str, Any]] = {
    "fine": {"iterations": 4, "first_size_px": 24},
    "short memory": {"iterations": 7, "history": 3, "first_size_px": 512},
    "adam": {"optimizer": "adam", "averaging": 0.7, "iterations": 3, "first_size_px": 24},
    "noise": {"init": "noise", "iterations": 4, "first_size_px": 512, "color": "luminance", "seed": 3},
    "gatys": {"preset": "gatys", "iterations": 9},
    "plateau": {"iterations": 30, "plateau": 0.3, "first_size_px": 24, "history": 4},
    "budgets": {"scale_iterations": (2, 1, 3), "first_size_px": 24, "padding": "replicate"},
}


@pytest.fixture
def make(tiny_model: FeatureModel, picture: Picture) -> Make:
    """Make the run of some options, always of the same pictures."""

    def run(preset: str = "fine", **options: Any) -> Stylization:
        styles = [Style(picture(40, 48, 2))]
        return Stylization(tiny_model, picture(40, 48, 1), styles, StylizeOptions.of(preset, **options))

    return run


def kept(run: Stylization) -> State:
    """Return a run's state, to a file and back."""
    return State.from_bytes(run.state().to_bytes())


def same(one: Iterate, other: Iterate) -> bool:
    """Tell whether two iterates are alike to the bit."""
    numbers = [
        (i.index, i.iterations, i.work, i.loss, i.content_loss, i.tv_loss, i.style_losses, i.stop_reason)
        for i in (one, other)
    ]
    return numbers[0] == numbers[1] and torch.equal(one.picture, other.picture)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_taken_up_again_is_the_same_to_the_bit(make: Make, name: str) -> None:
    """Wherever it is broken off: pictures, numbers, what is best, and the end."""
    whole = make(**RUNS[name])
    undisturbed = [(iterate, whole.best) for iterate in whole]
    for cut in range(len(undisturbed) - 1):
        first = make(**RUNS[name])
        next(itertools.islice(first, cut, None))
        second = make(**RUNS[name])
        second.restore(kept(first))
        assert second.best is not None
        assert same(second.best, undisturbed[cut][1]), cut
        rest = [(iterate, second.best) for iterate in second]
        assert len(rest) == len(undisturbed) - cut - 1
        for (after, best), (expected, best_expected) in zip(rest, undisturbed[cut + 1 :], strict=True):
            assert same(after, expected), (cut, expected.index)
            assert same(best, best_expected), (cut, expected.index)


def test_a_state_is_not_touched_by_the_run_that_goes_on(make: Make) -> None:
    """So it can be written while the next iteration is computed."""
    run = make(iterations=12, history=3, first_size_px=512)
    iterates = iter(run)
    for _ in range(6):
        next(iterates)
    state = run.state()
    before = state.to_bytes()
    list(iterates)
    assert state.to_bytes() == before


@pytest.fixture
def stubborn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An objective that no step lowers, to the end."""
    real = nst_model.descent.Closure.__call__

    def stubborn(self: Any, image: torch.Tensor) -> Any:
        losses, gradient = real(self, image)
        return losses._replace(total=losses.total * 0 + 1), gradient

    monkeypatch.setattr(nst_model.descent.Closure, "__call__", stubborn)


@pytest.mark.usefixtures("stubborn")
def test_a_recovery_survives_too(make: Make) -> None:
    """In the middle of restarts, and with Adam in L-BFGS's place."""
    options = {"iterations": 60, "first_size_px": 512, "size_px": 48}
    undisturbed = list(make(**options))
    for cut in (13, 25, 40, 50):
        first = make(**options)
        next(iterate for iterate in first if iterate.index == cut)
        second = make(**options)
        second.restore(kept(first))
        rest = list(second)
        assert all(same(*pair) for pair in zip(rest, undisturbed[cut + 1 :], strict=True)), cut


@pytest.mark.usefixtures("stubborn")
def test_adam_does_not_keep_the_memory_of_lbfgs(make: Make) -> None:
    """What it took the place of is gone with its pairs."""

    def alive() -> int:
        gc.collect()
        return sum(type(one) is LBFGS for one in gc.get_objects())

    before = alive()
    run = make(iterations=60, first_size_px=512, size_px=48)
    next(iterate for iterate in run if iterate.index == 5)
    assert alive() == before + 1
    next(iterate for iterate in run if iterate.index == 50)
    assert alive() == before


def test_a_state_of_an_older_version_is_refused(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything of it is used."""
    run = make(iterations=3)
    next(iter(run))
    with monkeypatch.context() as older:
        older.setattr(nst_model.state, "FORMAT", "2")
        data = run.state().to_bytes()
    with pytest.raises(DamagedState, match="format 2; this version reads 4"):
        State.from_bytes(data)


def test_the_format_of_a_state_changes_with_what_it_has(make: Make) -> None:
    """Whoever changes what is kept gives it another number: a run would fail that took up an older version's state."""
    run = make(iterations=3, first_size_px=512, history=4)
    next(iterate for iterate in run if iterate.index == 2)
    shapes = {name: tuple(tensor.shape) for name, tensor in run.state().tensors.items()}
    n, scalars = 3 * 72 * 80, ("gamma", "loss", "cap", "damping", "count", "taken")
    optimizer = {
        "x": (1, 3, 72, 80),
        "inverse": (4, 4),
        "curvature": (4,),
        "sg": (4,),
        "g": (n,),
        "s": (n,),
        "bands": (2, 3, 12),
        "places": (2, 7 * 7 + 25 * 35 + 72 * 80),
        "pairs": (2, 2, n),
        **dict.fromkeys(scalars, ()),
    }
    found = {name.removeprefix("optimizer."): shape for name, shape in shapes.items() if name.startswith("optimizer.")}
    assert (nst_model.state.FORMAT, found) == ("4", optimizer)


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_state_is_refused(make: Make, damage: str) -> None:
    """Torn, altered, or nothing at all."""
    run = make(iterations=3)
    next(iter(run))
    data = run.state().to_bytes()
    damaged = {"cut": data[:-100], "altered": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[damage]
    with pytest.raises(DamagedState):
        State.from_bytes(damaged)


def test_another_runs_state_is_refused(make: Make) -> None:
    """Options that cannot change on the way must agree."""
    run = make(iterations=3, first_size_px=512)
    next(iter(run))
    for other in ({"seed": 5}, {"first_size_px": 24}, {"color": "luminance"}):
        with pytest.raises(DamagedState, match="other options or pictures"):
            make(**{"iterations": 3, "first_size_px": 512, **other}).restore(run.state())


def test_more_iterations_on_the_way_change_nothing_but_the_end(make: Make) -> None:
    """The optimizer remembers what it knew; with fewer, the run ends with the best picture so far."""
    options: dict[str, Any] = {"first_size_px": 512}
    longer = list(make(iterations=16, **options))
    run, seen = make(iterations=6, **options), []
    for iterate in run:
        seen.append(iterate)
        if iterate.index == 4:
            run.steer(iterations=16)
    assert [i.loss for i in seen] == [i.loss for i in longer]
    assert (seen[4].iterations, seen[5].iterations) == (6, 16)
    assert seen[-1].stop_reason is StopReason.ITERATIONS
    run, seen = make(iterations=9, **options), []
    for iterate in run:
        seen.append(iterate)
        if iterate.index == 4:
            run.steer(iterations=2)
    assert [i.index for i in seen] in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 4])
    assert seen[-1].stop_reason is StopReason.ITERATIONS
    assert seen[-1].loss == min(i.loss for i in seen)


def test_other_weights_count_from_the_next_iteration_on(make: Make) -> None:
    """The picture stays; the objective, its curvature and its best are those of the new weights."""
    run, seen = make(iterations=8, first_size_px=512), []
    for iterate in run:
        seen.append(iterate)
        if iterate.index == 3:
            run.steer(style_weight=0.0, content_weight=50.0)
            assert run.best is seen[-1] or run.best.loss <= seen[-1].loss
    terms = [50 * i.content_loss + run.options.tv_weight * i.tv_loss for i in seen]
    assert [i.loss for i in seen[4:]] == pytest.approx(terms[4:], rel=1e-5)
    assert seen[3].loss != pytest.approx(terms[3], rel=1e-3)
    assert seen[-1].content_loss < seen[4].content_loss
    step = float((seen[4].picture - seen[3].picture).abs().max())
    assert 0 < step < 0.5


def test_layers_and_outlines_can_be_changed_on_the_way(make: Make) -> None:
    """Which means another trunk and other targets."""
    run, seen = make(iterations=4, first_size_px=24), []
    for iterate in run:
        seen.append(iterate)
        if iterate.index == 2:
            run.steer(style_layers={"relu2_2": 1.0}, laplacian_weight=3.0)
    assert list(seen[2].style_losses) != ["relu2_2"]
    assert all(list(i.style_losses) == ["relu2_2"] and i.laplacian_loss >= 0 for i in seen[3:])
    assert seen[-1].picture.shape[2] == 48


def test_steering_survives_a_restart(make: Make) -> None:
    """What was changed is in the state."""
    options = {"iterations": 5, "first_size_px": 24}
    whole, seen = make(**options), []
    for iterate in whole:
        seen.append(iterate)
        if iterate.index == 3:
            whole.steer(tv_weight=1.0, iterations=7)
        if iterate.index == 6:
            state = kept(whole)
    again = make(**options)
    again.restore(state)
    rest = list(again)
    assert again.options.tv_weight == 1.0
    assert all(same(*pair) for pair in zip(rest, seen[7:], strict=True))


def test_what_cannot_be_steered_is_refused(make: Make) -> None:
    """By name; a value out of bounds too; and the run goes on as it was."""
    run = make(iterations=3, first_size_px=512)
    iterates = iter(run)
    next(iterates)
    with pytest.raises(InvalidOption, match="seed cannot be changed while a job runs; these can: content_layers"):
        run.steer(seed=1)
    with pytest.raises(InvalidOption, match="tv_weight must be at least 0, not -1"):
        run.steer(tv_weight=-1)
    with pytest.raises(InvalidOption, match=r"style_layers\[relu9_9\] is no layer"):
        run.steer(style_layers={"relu9_9": 1.0})
    assert len(list(iterates)) == 3
