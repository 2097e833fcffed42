"""The host reads late what an evaluation has found; the iterates are the same as if it had waited."""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import nst_model
from nst_model import FeatureModel, Iterate, Style, StyleLoss, StylizeOptions
from nst_model.descent import AHEAD, STALL, Closure, launch
from nst_model.lbfgs import LBFGS
from nst_model.state import State
from nst_model.stylization import Stylization, content_targets
from tests.model.test_resume import RUNS, same

Picture = Callable[[int, int, int], torch.Tensor]
Make = Callable[..., Stylization]


@pytest.fixture
def make(tiny_model: FeatureModel, picture: Picture, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make the run of some options, always of the same pictures, with so many evaluations launched ahead."""

    def run(ahead: int, preset: str = "fine", **options: Any) -> Stylization:
        monkeypatch.setitem(AHEAD, "cpu", ahead)
        styles = [Style(picture(40, 48, 2))]
        return Stylization(tiny_model, picture(40, 48, 1), styles, StylizeOptions.of(preset, **options))

    return run


def alike(one: list[Iterate], other: list[Iterate]) -> bool:
    """Tell whether two runs are the same to the bit."""
    return len(one) == len(other) and all(map(same, one, other))


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float], Any]], list[int]]:
    """Multiply the gradient by a function of the picture's first pixel; None makes the loss 1 instead.

    Not of the number of calls, which differs. Return the list that grows with each.
    """
    real = nst_model.descent.Closure.__call__

    def install(change: Callable[[float], Any]) -> list[int]:
        calls: list[int] = []

        def spoiled(self: Any, image: torch.Tensor) -> Any:
            calls.append(1)
            factor = change(float(image.flatten()[0]))
            losses, gradient = real(self, image)
            return losses._replace(total=losses.total * 0 + 1) if factor is None else losses, gradient * (factor or 1)

        monkeypatch.setattr(nst_model.descent.Closure, "__call__", spoiled)
        return calls

    return install


@pytest.mark.parametrize("name", RUNS)
def test_iterates_are_the_same_however_late_they_are_read(make: Make, name: str) -> None:
    """With no evaluation ahead, with one, and with more than there are at a scale."""
    waited = list(make(0, **RUNS[name]))
    for ahead in (1, 2, 20):
        assert alike(list(make(ahead, **RUNS[name])), waited), ahead


@pytest.mark.parametrize("name", RUNS)
def test_a_run_broken_off_with_evaluations_ahead_is_the_same_to_the_bit(make: Make, name: str) -> None:
    """They are kept with it, wherever it is broken off, and read by whoever goes on with it, late or not."""
    whole = make(1, **RUNS[name])
    undisturbed = list(whole)
    for cut in range(0, len(undisturbed) - 1, 3):
        first = make(1, **RUNS[name])
        next(itertools.islice(first, cut, None))
        state = State.from_bytes(first.state().to_bytes())
        for ahead in (0, 1):
            second = make(ahead, **RUNS[name])
            second.restore(state)
            assert alike(list(second), undisturbed[cut + 1 :]), (cut, ahead)


def test_nothing_is_evaluated_beyond_the_end(make: Make, spoil: Callable[..., list[int]]) -> None:
    """As many evaluations as iterates, and a scale is not begun before the one before has ended."""
    calls = spoil(lambda _: 1)
    iterates = list(make(1, iterations=4, first_size_px=24))
    assert len(calls) == len(iterates) == 13


def test_recovery_is_the_same(make: Make, spoil: Callable[..., list[int]]) -> None:
    """From evaluations that are not finite and from a stall: what was ahead is dropped."""
    for change in (lambda pixel: math.nan if pixel * 1e5 % 4 < 1 else 1, lambda _: None):
        calls = spoil(change)
        options = {"iterations": 60, "first_size_px": 512}
        waited = list(make(0, **options))
        count = len(calls)
        late = list(make(1, **options))
        assert alike(late, waited)
        assert len(calls) - count > count, "nothing was launched in vain: this run recovers from nothing"
    assert len(waited) > 3 * STALL


def test_steering_drops_what_was_ahead(make: Make) -> None:
    """Other weights and other budgets count from the next iterate on, as without."""
    changes: list[dict[str, Any]] = [
        {"style_weight": 0.1, "content_weight": 5.0},
        {"iterations": 9},
        {"iterations": 2},
        {"scale_iterations": (3, 7)},
    ]
    for change, at in itertools.product(changes, (1, 4, 6)):
        seen: list[list[Iterate]] = []
        for ahead in (0, 1, 3):
            run = make(ahead, iterations=5, first_size_px=34)
            seen.append([])
            for iterate in run:
                seen[-1].append(iterate)
                if iterate.index == at:
                    run.steer(**change)
        assert alike(seen[0], seen[1]), (change, at)
        assert alike(seen[0], seen[2]), (change, at)


def test_a_stop_lets_no_other_iterate_come(tiny_model: FeatureModel, picture: Picture) -> None:
    """Not even one that is ahead."""
    stop, seen = threading.Event(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AHEAD, "cpu", 1)
        options = StylizeOptions(iterations=10, first_size_px=512)
        styles = [Style(picture(32, 40, 2))]
        for iterate in nst_model.stylize(tiny_model, picture(40, 48, 1), styles, options, stop=stop):
            seen.append(iterate.index)
            if iterate.index == 3:
                stop.set()
    assert seen == [0, 1, 2, 3]


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
@pytest.mark.parametrize("loss", StyleLoss)
def test_an_iteration_asks_for_no_number(tiny_model: FeatureModel, picture: Picture, loss: str, optimizer: str) -> None:
    """Evaluated on a device that has none: whatever asked for one would fail."""
    options = StylizeOptions(style_loss=loss, precision="fp32", laplacian_weight=1.0)
    objective = tiny_model.objective([tiny_model.style_targets(Style(picture(40, 48, 2)), options)], options)
    targets = content_targets(objective, picture(40, 48, 1))
    closure = Closure(objective.to("meta"), {name: tensor.to("meta") for name, tensor in targets.items()})
    start = torch.empty(1, 3, 40, 48, device="meta")
    at = LBFGS(start, 4) if optimizer == "lbfgs" else nst_model.adam.Adam(start, 0.1)
    for _ in range(3):
        numbers = launch(closure, at)
    with pytest.raises(NotImplementedError):
        numbers.tolist()
    assert len(numbers) == 4 + len(options.style_layers) + 1


WAITS = {"tolist", "item", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
"""What a host asks a tensor's numbers by."""
BRINGS = {"tensor", "as_tensor", "new_tensor", "from_numpy"}
"""What it makes tensors of numbers by, whose copy to a device it waits for."""


class Noting(TorchFunctionMode):
    """Notes in a list whatever the host would wait for on a device that computes by itself."""

    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self._notes = notes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in WAITS | BRINGS:
            self._notes.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [{}, {"color": "luminance"}, {"preset": "gatys"}, {"optimizer": "adam", "averaging": 0.5}, {"plateau": 0.01}],
    ids=str,
)
def test_the_next_evaluation_is_launched_before_the_numbers_of_the_last_are_read(
    make: Make, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """In that order, from one iterate to the next, and the host asks for nothing else."""
    notes: list[str] = []
    real = nst_model.descent.Closure.__call__

    def noted(self: Any, image: torch.Tensor) -> Any:
        notes.append("launched")
        return real(self, image)

    monkeypatch.setattr(nst_model.descent.Closure, "__call__", noted)
    iterates = iter(make(1, **{"iterations": 8, "first_size_px": 512, **options}))
    next(iterates)
    assert notes == ["launched", "launched"]
    notes.clear()
    with Noting(notes):
        assert len(list(iterates)) == 8
    assert notes == ["launched", "tolist"] * 7 + ["tolist"]
