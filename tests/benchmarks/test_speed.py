"""What the benchmark of speed promises: it keeps its time, loses nothing that it has measured, and compares fairly."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, speed
from benchmarks.speed import Budget, Ceilings, OutOfTime, Part
from benchmarks.textbook import leaf, plain_fine, textbook_loop
from nst_model import FeatureModel, Precision, Style, StylizeOptions, stylize
from nst_model.memory import Memory
from nst_model.weights import load_weights

UNLIMITED = Budget(None)


@pytest.fixture
def model(tiny_weights_file: Path) -> FeatureModel:
    """The tiny VGG-16."""
    return FeatureModel(load_weights("vgg16", tiny_weights_file), "cpu")


def empty() -> dict[str, Any]:
    """Return results before anything is measured."""
    return {kind: [] for kind in (*speed.KINDS, "left_out")}


def gatys(**given: Any) -> StylizeOptions:
    """Return options of `gatys` at 32 px, in fp32."""
    return StylizeOptions.of("gatys", size_px=32, precision=Precision.FP32, **given)


def test_turns_end_as_soon_as_those_left_do_not_fit() -> None:
    """A part that would take too long costs one turn, not the budget."""
    budget, taken = Budget(1.0), []
    with pytest.raises(OutOfTime):
        for turn in budget.turns(100):
            taken.append(turn)
            time.sleep(0.05)
    assert taken == [0]
    assert list(budget.turns(3)) == [0, 1, 2]


def test_a_part_begins_only_if_there_is_time_for_its_start(tmp_path: Path) -> None:
    """What is left out is named, and what is short enough is still measured."""
    results = empty()
    parts = [
        Part("service", "long", lambda: {"size_px": 1}, start_s=60.0),
        Part("fine", "short", lambda: {"size_px": 2}, start_s=1.0),
    ]
    speed.collect(parts, Budget(30.0), results, tmp_path / "speed.json")
    found = json.loads((tmp_path / "speed.json").read_text())
    assert found["service"] == []
    assert found["fine"] == [{"size_px": 2}]
    assert found["left_out"] == [{"kind": "service", "what": "long", "why": "the budget is spent"}]


def test_a_part_that_fails_is_named_and_takes_no_other_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is there from the beginning, and whole whenever it is read."""
    file = tmp_path / "speed.json"
    seen: list[Any] = []

    def first() -> dict[str, Any]:
        seen.append(json.loads(file.read_text()))
        raise RuntimeError("out of memory")

    def second() -> dict[str, Any]:
        seen.append(json.loads(file.read_text()))
        return {"size_px": 512}

    speed.collect([Part("race", "a", first), Part("fine", "b", second)], UNLIMITED, empty(), file)
    found = json.loads(file.read_text())
    failed = {"kind": "race", "what": "a", "why": "RuntimeError: out of memory"}
    assert seen == [empty(), empty() | {"left_out": [failed]}]
    assert found == empty() | {"fine": [{"size_px": 512}], "left_out": [failed]}
    assert "Traceback" in capsys.readouterr().err


def test_one_that_ends_early_runs_no_further(model: FeatureModel, tmp_path: Path) -> None:
    """Its curve ends where it ended; the other one makes all its iterations, also those of the last, shorter turn."""
    ending = gatys(iterations=35, plateau=0.5)
    found = speed.race(model, 0, ending, UNLIMITED, tmp_path)
    textbook, ours = (found["curves"][name] for name in ("textbook", "ours"))
    assert found["textbook_iterations"] == len(textbook) == 35
    assert 10 < len(ours) < 30
    assert len({loss for _, loss in ours}) == len(ours)
    for curve in (textbook, ours):
        assert all(after[0] > before[0] for before, after in itertools.pairwise(curve))


def test_ours_is_credited_with_a_picture_as_good_as_the_textbooks(model: FeatureModel, tmp_path: Path) -> None:
    """And with no earlier one, in all the seconds until then."""
    found = speed.race(model, 1, gatys(iterations=12), UNLIMITED, tmp_path)
    textbook, ours = ([loss for _, loss in found["curves"][name]] for name in ("textbook", "ours"))
    assert len(ours) == len(textbook) + 1  # the picture to begin with, too
    first = found["ours_iterations"]
    assert ours[first] <= found["loss"] < ours[first - 1]
    assert found["ours_s"] == found["curves"]["ours"][first][0]
    assert found["sooner"] == found["textbook_s"] / found["ours_s"]
    assert {file.name for file in tmp_path.iterdir()} == {"race-32-1-ours.png", "race-32-1-textbook.png"}


def test_the_plain_loops_have_our_objectives(model: FeatureModel) -> None:
    """The textbook's is that of `gatys` wherever it comes to; plain `fine` with Adam goes where ours goes."""
    content, style = speed.pair(model, 0, 48)
    image = leaf(content)
    textbook = textbook_loop(model, image, style, gatys())
    for _ in range(3):
        next(textbook)
    expected = speed.loss_in_fp32(model, content, style, image.detach()[0], gatys())
    assert next(textbook) == pytest.approx(expected, rel=1e-4)
    adam = StylizeOptions(optimizer="adam", iterations=4, first_size_px=48, precision=Precision.FP32)
    ours = [iterate.loss for iterate in stylize(model, content, [Style(style)], adam)]
    plain = list(itertools.islice(plain_fine(model, content, style), len(ours)))
    assert plain == pytest.approx(ours, rel=1e-3)


def test_history_counts_in_what_it_is_kept_in(model: FeatureModel) -> None:
    """At a byte a second the limit is the bytes: activations both ways, and each number of the pairs once."""
    slow, options = Ceilings({"fp32": 1e30}, 1.0), gatys()
    activations = 2 * speed.activation_bytes(model.trunk(options), 24, 32)
    for memory in (Memory(30, 4), Memory(10, 2)):
        _, bytes_s = speed.limits(model, (24, 32), options, memory, [slow])
        assert bytes_s == activations + 2 * memory.pairs * 3 * 24 * 32 * memory.number_bytes


@pytest.fixture
def report_of(
    model: FeatureModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """Measure parts of some kinds at tiny sizes; return the lines of the report, whose plots are in `tmp_path`."""
    monkeypatch.setitem(speed.MATRIX_EDGE, "cpu", 64)
    parts = {
        "iteration": lambda: speed.iteration(model, "fine", 32, 1, UNLIMITED),
        "race": lambda: speed.race(
            model, 0, gatys(iterations=12, learning_rate=1e-5, optimizer="adam"), UNLIMITED, tmp_path
        ),
        "fine": lambda: speed.fine(model, 64, 1, 1, UNLIMITED),
        "service": lambda: {}["no server"],
    }

    def lines(*kinds: str) -> list[str]:
        file = tmp_path / "speed.json"
        speed.collect([Part(kind, "tiny", parts[kind]) for kind in kinds], UNLIMITED, empty(), file)
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["report", str(file), "--images", str(tmp_path)])
        report.main()
        return capsys.readouterr().out.splitlines()

    return lines


def test_a_report_of_nothing_is_empty(report_of: Callable[..., list[str]], tmp_path: Path) -> None:
    """No table without rows, and no plot."""
    assert report_of() == []
    assert not list(tmp_path.glob("*.svg"))


@pytest.mark.parametrize("kinds", [["race"], ["fine"], ["iteration", "race", "fine", "service"]])
def test_a_report_shows_what_was_measured_and_names_the_rest(
    kinds: list[str], report_of: Callable[..., list[str]], tmp_path: Path
) -> None:
    """Whatever is missing: a textbook to compare with, a loss that was not reached, a part that failed."""
    lines = report_of(*kinds)
    rows = {
        "iteration": ("| fine | 32 |", "| – |"),
        "race": ("| astronaut, strokes | 32 | 12, ", "| not reached | – |"),
        "fine": ("`fine` at 64 px: ", "eager Adam, 1 a scale"),
        "service": ("Left out: service, tiny: KeyError", "no server"),
    }
    for kind, (begin, part) in rows.items():
        found = [line for line in lines if line.startswith(begin) and part in line]
        assert len(found) == (kind in kinds), kind
    plots = {"iteration": "speed-iteration.svg", "race": "speed-race.svg"}
    assert {file.name for file in tmp_path.glob("*.svg")} == {plots[kind] for kind in kinds if kind in plots}


def test_the_limit_that_is_shown_is_the_one_that_counts() -> None:
    """The larger of the two, and which it is where it is not arithmetic: the fraction is reckoned with it."""
    row = {
        "preset": "gatys",
        "size_px": 512,
        "precision": "bf16",
        "textbook_s": 0.02,
        "ours_s": 0.004,
        "faster": 5.0,
        "arithmetic_limit_s": 0.002,
        "bytes_limit_s": 0.003,
        "fraction_of_matrix_rate": 0.5,
        "fraction_of_limit": 0.75,
        "matrix_tflops": {"fp32": 50.0, "bf16": 700.0},
        "memory_gb_per_s": 4000.0,
    }
    shown, arithmetic = (
        list(report.table(empty() | {"iteration": [given]})) for given in (row, row | {"arithmetic_limit_s": 0.0031})
    )
    assert shown[2] == "| gatys | 512 | bf16 | 0.0200 | 0.00400 | 5.00× | 0.00300 (bytes) | 50% | 75% |"
    assert "| 0.00310 |" in arithmetic[2]
