"""How near an iteration comes to what the hardware must charge, and how soon a picture is as good as the textbook's.

Every part interleaves what it compares. On a CPU all but the service is measured in seconds of processor, those of all
threads together: a ratio of them is the same however much else the machine does. `make bench` writes `speed.json`;
`benchmarks/report.py` makes a table and plots of it. On a GPU, in less than ten minutes:

    python -m benchmarks.speed --device cuda --sizes 512 1024 2048 --race-sizes 512 1024 2048 --budget 560 --out FOLDER

What the budget has no room for is left out, and so is what fails; `speed.json` names both, and has the rest.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import collections
import dataclasses
import gc
import itertools
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

import nst_model
from benchmarks import service
from benchmarks.canonical import STYLES, picture
from benchmarks.presets import distances
from benchmarks.run import machine
from benchmarks.textbook import leaf, plain_fine, textbook_loop
from nst_model import FeatureModel, Precision, Style, StylizeOptions, load_weights, to_pixels
from nst_model.devices import memory_bytes, reuse_memory
from nst_model.memory import Memory
from nst_model.network import Trunk
from nst_model.objective import interpreted
from nst_model.options import Optimizer
from nst_model.scales import scales
from nst_model.stylization import content_targets
from samples.demo import skimage_photo

T = TypeVar("T")

PAIRS = (("astronaut.png", "strokes.jpg"), ("coffee.png", "waves.jpg"), ("chelsea.png", "glass.jpg"))
"""Photographs of scikit-image's with styles of samples/."""

KINDS = ("iteration", "race", "fine", "service")
"""Kinds of parts, each a list of results in `speed.json`."""

MATRIX_EDGE = {"cpu": 2048, "cuda": 8192}
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}

TURN = 10
"""Iterations between two looks at the clock, in a race and on a GPU, which is idle after each look."""

WARM_UP = 2
"""Turns that are not counted."""

START_S = 10.0
"""What there must be of the budget for a part to begin: seconds that it takes before its first turn has been timed."""

SERVICE_START_S = 40.0
"""The same of the service, which starts a server."""


class OutOfTime(Exception):
    """The budget is spent: what is not measured yet is left out."""


class Budget:
    """Seconds that may be spent, None for any number."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    def check(self, needed_s: float) -> None:
        """Raise OutOfTime unless so many seconds are left."""
        if time.monotonic() + needed_s > self._end:
            raise OutOfTime

    def turns(self, number: int) -> Iterator[int]:
        """Count turns; raise OutOfTime once there is no time for those left, each as long as the shortest was."""
        shortest_s = math.inf
        for turn in range(number):
            began = time.monotonic()
            yield turn
            shortest_s = min(shortest_s, time.monotonic() - began)
            self.check(shortest_s * (number - turn - 1))


def wait(device: torch.device) -> None:
    """Return when the device has done what has been launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return how long `work` takes, seconds, of the processor's time if that is the device, and what it returns."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    wait(device)
    began = clock()
    result = work()
    wait(device)
    return clock() - began, result


def seconds_each(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes, seconds; on a GPU the mean of a turn, which is waited for only at its end."""
    times = TURN if device.type == "cuda" else 1
    return timed(lambda: [work() for _ in range(times)], device)[0] / times


def best_seconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Return the shortest time that `work` takes, seconds."""
    work()
    return min(seconds_each(work, device) for _ in range(rounds))


def matrix_flops(device: torch.device, precision: Precision) -> float:
    """Return the rate of large matrix products, floating-point operations a second: the best of several."""
    edge = MATRIX_EDGE.get(device.type, 4096)
    a, b = (torch.randn(edge, edge, device=device).to(DTYPES[precision]) for _ in range(2))
    product = torch.empty_like(a)
    return 2 * edge**3 / best_seconds(lambda: torch.mm(a, b, out=product), device)


def memory_rate(device: torch.device) -> float:
    """Return the bytes that a copy of 256 MiB reads and writes a second: the best of several."""
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device)


def convolution_flops(trunk: Trunk, height: int, width: int) -> int:
    """Return the floating-point operations of a trunk's convolutions on a picture of that size, one way."""
    total = 0
    for stage in trunk.stages:
        if stage.pooled:
            height, width = height // 2, width // 2
        total += 2 * height * width * stage.weight.numel()
    return total


def activation_bytes(trunk: Trunk, height: int, width: int) -> int:
    """Return the bytes of all the features of a picture of that size."""
    total = 0
    for stage in trunk.stages:
        if stage.pooled:
            height, width = height // 2, width // 2
        total += height * width * stage.bias.nbytes
    return total


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device reaches at most.

    Attributes:
        flops: precision → floating-point operations a second in matrix products.
        bytes_per_s: read and written together.
    """

    flops: dict[str, float]
    bytes_per_s: float

    @classmethod
    def of(cls, device: torch.device) -> Ceilings:
        """Measure them."""
        return cls({str(p): matrix_flops(device, p) for p in DTYPES}, memory_rate(device))

    def limits_s(
        self, trunk: Trunk, precision: Precision, size: tuple[int, int], history_bytes: int
    ) -> tuple[float, float]:
        """Return the least seconds of an iteration on a picture of a height and width: by arithmetic, and by bytes.

        Bytes are the activations once each way, and the optimizer's history once.
        """
        return (
            2 * convolution_flops(trunk, *size) / self.flops[str(precision)],
            (2 * activation_bytes(trunk, *size) + history_bytes) / self.bytes_per_s,
        )


def limits(
    model: FeatureModel, size: tuple[int, int], options: StylizeOptions, memory: Memory, ceilings: Iterable[Ceilings]
) -> tuple[float, float]:
    """Return `Ceilings.limits_s` of a stylization at one scale, of a height and width: the shortest that were found."""
    rows, columns = (edge + 2 * options.margin_px for edge in size)
    history_bytes = 3 * rows * columns * memory.picture_bytes
    trunk, precision = model.trunk(options), model.precision(options)
    found = [ceiling.limits_s(trunk, precision, (rows, columns), history_bytes) for ceiling in ceilings]
    arithmetic_s, bytes_s = map(min, zip(*found, strict=True))
    return arithmetic_s, bytes_s


def pair(model: FeatureModel, place: int, size_px: int) -> tuple[Tensor, Tensor]:
    """Return a photograph and a style of a longer edge in pixels, both (3, H, W), on the model's device."""
    photo, style = PAIRS[place]
    found = picture(skimage_photo(photo), size_px), picture(STYLES / style, size_px)
    return found[0].contiguous().to(model.device), found[1].contiguous().to(model.device)


def iteration(model: FeatureModel, preset: str, size_px: int, rounds: int, budget: Budget) -> dict[str, Any]:
    """Return seconds an iteration of a preset at one scale, and the limits; medians.

    In turns with the textbook's, whose objective is that of `gatys`: there is nothing that another preset is faster
    than.
    """
    content, style = pair(model, 1, size_px)
    options = StylizeOptions.of(preset, size_px=size_px, iterations=10_000, first_size_px=size_px)
    height, width = content.shape[1:]
    memory = model.memory(options, height, width)  # as the run will find it: it takes what is free
    runs: dict[str, Iterator[object]] = {"ours": nst_model.stylize(model, content, [Style(style)], options)}
    if preset == "gatys":
        runs["textbook"] = textbook_loop(model, leaf(content), style, options)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    before = Ceilings.of(model.device)
    for _ in budget.turns(WARM_UP + rounds):
        for name, run in runs.items():
            seconds[name].append(seconds_each(lambda run=run: next(run), model.device))
    after = Ceilings.of(model.device)
    medians = {name: statistics.median(found[WARM_UP:]) for name, found in seconds.items()}
    ours_s, textbook_s = medians["ours"], medians.get("textbook")
    arithmetic_s, bytes_s = limits(model, (height, width), options, memory, (before, after))
    return {
        "preset": preset,
        "size_px": size_px,
        "precision": str(model.precision(options)),
        "textbook_s": textbook_s,
        "ours_s": ours_s,
        "faster": textbook_s and textbook_s / ours_s,
        "arithmetic_limit_s": arithmetic_s,
        "bytes_limit_s": bytes_s,
        "fraction_of_matrix_rate": arithmetic_s / ours_s,
        "fraction_of_limit": max(arithmetic_s, bytes_s) / ours_s,
        "matrix_tflops": {name: rate / 1e12 for name, rate in after.flops.items()},
        "memory_gb_per_s": after.bytes_per_s / 1e9,
    }


def loss_in_fp32(
    model: FeatureModel, content: Tensor, style: Tensor, picture: Tensor, options: StylizeOptions
) -> float:
    """Return the objective of the options at a picture (3, H, W), in fp32 whatever it was optimized in."""
    options = dataclasses.replace(options, precision=Precision.FP32)
    objective = model.objective([model.style_targets(Style(style), options)], options)
    with interpreted():
        return float(objective(picture[None], content_targets(objective, content)).total)


def race(model: FeatureModel, place: int, options: StylizeOptions, budget: Budget, folder: Path) -> dict[str, Any]:
    """Return how long the textbook loop takes for the options' iterations, and they for the same loss, seconds.

    The two take turns; one that has ended early takes no more. Losses are compared in fp32, whatever they were
    optimized in. Both pictures are written to `folder`, and measured by what neither was made with: the distances of
    `benchmarks/presets.py`.
    """
    content, style = pair(model, place, options.size_px)
    image = leaf(content)
    runs: dict[str, Iterator[Any]] = {
        "textbook": itertools.islice(textbook_loop(model, image, style, options), options.iterations),
        "ours": nst_model.stylize(model, content, [Style(style)], options),
    }
    curves: dict[str, list[tuple[float, float]]] = {name: [(0.0, math.nan)] for name in runs}
    kept: list[Tensor] = []
    for _ in budget.turns(math.ceil((options.iterations + 1) / TURN)):  # one more: ours yields the first picture too
        for name, run in runs.items():
            seconds, found = timed(lambda run=run: list(itertools.islice(run, TURN)), model.device)
            if name == "ours":
                kept += [iterate.picture.cpu() for iterate in found]
                found = [iterate.loss for iterate in found]
            began = curves[name][-1][0]
            curves[name] += [(began + seconds * n / len(found), loss) for n, loss in enumerate(found, start=1)]
    curves = {name: curve[1:] for name, curve in curves.items()}
    reached = loss_in_fp32(model, content, style, image.detach()[0], options)

    def good(index: int) -> bool:
        return loss_in_fp32(model, content, style, kept[index].to(model.device), options) <= reached

    first = bisect.bisect_left(range(len(kept)), True, key=good)
    textbook_s = curves["textbook"][-1][0]
    ours_s = curves["ours"][first][0] if first < len(kept) else None
    pictures = {"textbook": image.detach()[0], "ours": kept[min(first, len(kept) - 1)].to(model.device)}
    for name, shown in pictures.items():
        Image.fromarray(to_pixels(shown)).save(folder / f"race-{options.size_px}-{place}-{name}.png")
    return {
        "photo": PAIRS[place][0],
        "style": PAIRS[place][1],
        "size_px": options.size_px,
        "textbook_iterations": len(curves["textbook"]),
        "textbook_s": textbook_s,
        "loss": reached,
        "ours_iterations": None if ours_s is None else first,
        "ours_s": ours_s,
        "sooner": None if ours_s is None else textbook_s / ours_s,
        "distances": {name: distances(model, shown, content, style) for name, shown in pictures.items()},
        "curves": curves,
    }


def fine(model: FeatureModel, size_px: int, adam_iterations: int, rounds: int, budget: Budget) -> dict[str, Any]:
    """Return the seconds of `fine` to the objective that Adam's iterations at each of three scales reach.

    What Adam reaches is found with our own Adam in fp32. What it costs is the median time of an eager iteration at each
    scale, times their number.
    """
    content, style = pair(model, 0, size_px)
    ours = StylizeOptions(size_px=size_px, first_size_px=size_px // 2)
    slow = dataclasses.replace(
        ours, optimizer=Optimizer.ADAM, iterations=adam_iterations, precision=Precision.FP32, averaging=0.99
    )

    def run(options: StylizeOptions) -> Iterator[Tensor]:
        began = time.monotonic()
        for iterate in nst_model.stylize(model, content, [Style(style)], options):
            yield iterate.picture
            budget.check((time.monotonic() - began) * (1 / iterate.work - 1))

    def last(options: StylizeOptions) -> Tensor:
        return collections.deque(run(options), maxlen=1).pop()

    eager_s = 0.0
    for edge in scales(size_px, min(content.shape[1:]), size_px // 2):
        steps = plain_fine(model, *pair(model, 0, edge))
        found = [seconds_each(lambda steps=steps: next(steps), model.device) for _ in budget.turns(1 + rounds)]
        eager_s += adam_iterations * statistics.median(found[1:])
    wanted = loss_in_fp32(model, content, style, last(slow), slow)
    for iterations in (10, 15, 20, 30, 40, 60):
        options = dataclasses.replace(ours, iterations=iterations)
        seconds, shown = timed(lambda options=options: last(options), model.device)
        reached = loss_in_fp32(model, content, style, shown, slow)
        if reached <= wanted:
            break
    return {
        "size_px": size_px,
        "adam_iterations": adam_iterations,
        "adam_s": eager_s,
        "adam_loss": wanted,
        "ours_iterations": iterations,
        "ours_s": seconds,
        "ours_loss": reached,
        "faster": eager_s / seconds if reached <= wanted else None,
    }


@dataclasses.dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        kind: one of KINDS.
        what: is measured, for people.
        measure: returns the result.
        start_s: seconds before it can tell how long it will take.
    """

    kind: str
    what: str
    measure: Callable[[], dict[str, Any]]
    start_s: float = START_S


def parts(given: argparse.Namespace, model: FeatureModel, budget: Budget) -> Iterator[Part]:
    """Yield all parts, those first that make most of the table."""
    rounds, device = given.rounds, model.device
    for size, preset in itertools.product(given.sizes, ("gatys", "fine")):
        yield Part("iteration", f"{preset}, {size} px", lambda p=preset, s=size: iteration(model, p, s, rounds, budget))
    turn = TURN if device.type == "cuda" else 1
    yield Part(
        "service",
        f"{given.service_size} px",
        lambda: asyncio.run(service.overhead(model, given.service_size, turn * rounds, budget.turns(3))),
        SERVICE_START_S,
    )
    yield Part(
        "fine",
        f"{given.fine_size} px",
        lambda: fine(model, given.fine_size, given.fine_iterations, rounds, budget),
    )
    for place, size in itertools.product(given.pairs, given.race_sizes):
        options = StylizeOptions.of("gatys", size_px=size, iterations=given.race_iterations)
        yield Part(
            "race",
            f"{', '.join(PAIRS[place])}, {size} px",
            lambda place=place, options=options: race(model, place, options, budget, given.out),
        )


def collect(parts: Iterable[Part], budget: Budget, results: dict[str, Any], file: Path) -> None:
    """Measure the parts, and write the results so far to a file before each and after the last.

    A part that fails, or that there is no time for, goes to the list `left_out`.
    """
    for part in parts:
        write(results, file)
        gc.collect()
        torch.cuda.empty_cache()  # a server has memory of its own
        try:
            budget.check(part.start_s)
            found = part.measure()
        except OutOfTime:
            why = "the budget is spent"
        except Exception as error:  # whatever it is, the rest can be measured
            traceback.print_exc()
            why = f"{type(error).__name__}: {error}"
        else:
            results[part.kind].append(found)
            shown = {key: value for key, value in found.items() if key != "curves"}
            print(f"{part.kind}, {part.what}: {shown}", flush=True)
            continue
        results["left_out"].append({"kind": part.kind, "what": part.what, "why": why})
        print(f"{part.kind}, {part.what}: left out, {why}", flush=True)
    write(results, file)


def write(results: dict[str, Any], file: Path) -> None:
    """Write results to a file, as a whole or not at all."""
    new = file.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(file)


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=8, help="Turns that are timed of each iteration.")
    parser.add_argument("--parts", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--pairs", type=int, nargs="+", default=range(len(PAIRS)), choices=range(len(PAIRS)))
    parser.add_argument("--race-sizes", type=int, nargs="+", default=[256])
    parser.add_argument("--race-iterations", type=int, default=300)
    parser.add_argument("--fine-size", type=int, default=256)
    parser.add_argument("--fine-iterations", type=int, default=200, help="Of Adam, at each scale.")
    parser.add_argument("--service-size", type=int, default=512)
    parser.add_argument("--budget", type=float, help="Seconds after which nothing more is begun.")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="Folder. Other parts there are kept.")
    given = parser.parse_args()
    budget = Budget(given.budget)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "speed.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    kept = [left for left in results.get("left_out", []) if left["kind"] not in given.parts]
    results |= {**{kind: [] for kind in given.parts}, "left_out": kept}
    reuse_memory()
    model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), given.device)
    results["machine"] = f"{machine()}, {time.strftime('%Y-%m-%d')}, {memory_bytes(model.device) / 2**30:.0f} GiB"
    collect((part for part in parts(given, model, budget) if part.kind in given.parts), budget, results, file)


if __name__ == "__main__":
    main()
