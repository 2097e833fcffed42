"""How near an iteration comes to what the hardware must charge, and how soon a picture is as good as the textbook's.

Every part interleaves what it compares. On a CPU all but the service is measured in seconds of processor, those of all
threads together: a ratio of them is the same however much else the machine does. `make bench` writes `speed.json`;
`benchmarks/report.py` makes a table and plots of it.
On a GPU: `python -m benchmarks.speed --device cuda --sizes 512 1024 2048 --race-size 512 --budget 600 --out FOLDER`.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import nst_model
from benchmarks import service
from benchmarks.canonical import STYLES, picture
from benchmarks.core import leaf, loss_in_fp32, textbook_loop
from benchmarks.presets import distances
from benchmarks.run import machine
from nst_model import FeatureModel, Precision, Style, StylizeOptions, load_weights, to_pixels
from nst_model.devices import memory_bytes, reuse_memory
from nst_model.network import Trunk
from nst_model.options import Optimizer, relative
from nst_model.scales import scales
from nst_model.variation import neighbours
from samples.demo import skimage_photo

T = TypeVar("T")

PAIRS = (("astronaut.png", "strokes.jpg"), ("coffee.png", "waves.jpg"), ("chelsea.png", "glass.jpg"))
"""Photographs of scikit-image's with styles of samples/."""

MATRIX_EDGE = {"cpu": 2048, "cuda": 8192}
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


class OutOfTime(Exception):
    """The budget is spent: what is not measured yet is left out."""


class Budget:
    """Seconds that may be spent, None for any number."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    def check(self, needed_s: float = 0.0) -> None:
        """Raise OutOfTime unless so many seconds are left."""
        if self._end is not None and time.monotonic() + needed_s > self._end:
            raise OutOfTime


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Return how long `work` takes, seconds, of the processor's time if that is the device, and what it returns."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    began = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began, result


def as_installed() -> AbstractContextManager[None]:
    """Return a context with fp32 as PyTorch comes, which `FeatureModel` changes: a GPU convolves in TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=False, allow_tf32=True)


def best_seconds(work: Callable[[], object], device: torch.device, rounds: int = 7) -> float:
    """Return the shortest time that `work` takes, seconds."""
    work()
    return min(timed(work, device)[0] for _ in range(rounds))


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
        self, trunk: Trunk, options: StylizeOptions, precision: Precision, size: tuple[int, int]
    ) -> list[float]:
        """Return the least seconds of an iteration: by arithmetic, and by bytes.

        Bytes are the activations once each way, and the optimizer's history once.
        """
        rows, columns = (edge + 2 * options.margin_px for edge in size)
        history = 2 * options.history * 3 * rows * columns * 4
        return [
            2 * convolution_flops(trunk, rows, columns) / self.flops[str(precision)],
            (2 * activation_bytes(trunk, rows, columns) + history) / self.bytes_per_s,
        ]


def pair(model: FeatureModel, place: int, size_px: int) -> tuple[Tensor, Tensor]:
    """Return a photograph and a style of a longer edge in pixels, both (3, H, W), on the model's device."""
    photo, style = PAIRS[place]
    found = picture(skimage_photo(photo), size_px), picture(STYLES / style, size_px)
    return found[0].contiguous().to(model.device), found[1].contiguous().to(model.device)


def iteration(model: FeatureModel, preset: str, size_px: int, rounds: int, budget: Budget) -> dict[str, Any]:
    """Return seconds an iteration of a preset at one scale, the textbook's, and the limits; medians, interleaved."""
    content, style = pair(model, 1, size_px)
    options = StylizeOptions.of(preset, size_px=size_px, iterations=10_000, first_size_px=size_px)
    gatys = StylizeOptions.of("gatys", size_px=size_px, precision=Precision.FP32)
    grams = {layer: kept["gram"] for layer, kept in model.style_targets(Style(style), gatys).items()}
    textbook = textbook_loop(model, leaf(content), grams, gatys)
    ours = nst_model.stylize(model, content, [Style(style)], options)
    ceilings, seconds = [Ceilings.of(model.device)], {"textbook": [], "ours": []}
    for _ in range(rounds + 2):
        with as_installed():
            seconds["textbook"].append(timed(next(textbook), model.device)[0])
        seconds["ours"].append(timed(lambda: next(ours), model.device)[0])
        budget.check(10 * (seconds["textbook"][-1] + seconds["ours"][-1]))
    ceilings.append(Ceilings.of(model.device))
    precision = model.precision(options)
    trunk = model.trunk(options)
    arithmetic_s, bytes_s = (
        min(limits)
        for limits in zip(
            *(c.limits_s(trunk, options, precision, (content.shape[1], content.shape[2])) for c in ceilings),
            strict=True,
        )
    )
    textbook_s, ours_s = (statistics.median(seconds[name][2:]) for name in ("textbook", "ours"))
    return {
        "preset": preset,
        "size_px": size_px,
        "precision": str(precision),
        "textbook_s": textbook_s,
        "ours_s": ours_s,
        "faster": textbook_s / ours_s,
        "arithmetic_limit_s": arithmetic_s,
        "bytes_limit_s": bytes_s,
        "fraction_of_matrix_rate": arithmetic_s / ours_s,
        "fraction_of_limit": max(arithmetic_s, bytes_s) / ours_s,
        "matrix_tflops": {name: rate / 1e12 for name, rate in ceilings[-1].flops.items()},
        "memory_gb_per_s": ceilings[-1].bytes_per_s / 1e9,
    }


def race(
    model: FeatureModel, place: int, size_px: int, iterations: int, *, budget: Budget, folder: Path
) -> dict[str, Any]:
    """Return how long the textbook loop takes for its iterations and `gatys` for the same loss, seconds.

    The two take turns of ten iterations. Losses are compared in fp32, whatever they were optimized in. Both pictures
    are written to `folder`, and measured by what neither was made with: the distances of `benchmarks/presets.py`.
    """
    content, style = pair(model, place, size_px)
    options = StylizeOptions.of("gatys", size_px=size_px, iterations=iterations)
    fp32 = dataclasses.replace(options, precision=Precision.FP32)
    grams = {layer: kept["gram"] for layer, kept in model.style_targets(Style(style), fp32).items()}
    image = leaf(content)
    textbook = textbook_loop(model, image, grams, fp32)
    ours = nst_model.stylize(model, content, [Style(style)], options)
    curves: dict[str, list[tuple[float, float]]] = {"textbook": [], "ours": []}
    spent = dict.fromkeys(curves, 0.0)
    kept: list[Tensor] = []
    for _ in range(iterations // 10):
        for name, curve in curves.items():
            began = time.monotonic()
            for _ in range(10):
                if name == "textbook":
                    with as_installed():
                        seconds, loss = timed(next(textbook), model.device)
                elif (found := timed(lambda: next(ours, None), model.device))[1] is not None:
                    seconds, iterate = found
                    loss = iterate.loss
                    kept.append(iterate.picture.cpu())
                spent[name] += seconds
                curve.append((spent[name], loss))
            budget.check(3 * (time.monotonic() - began))
    pictures = {"textbook": image.detach()[0].clone()}
    reached = float(next(textbook)())

    def loss_at(index: int) -> float:
        return loss_in_fp32(model, content, style, kept[index].to(model.device), fp32)

    first, last = 0, len(kept) - 1
    if loss_at(last) > reached:
        first = last + 1
    while first < last:
        middle = (first + last) // 2
        first, last = (first, middle) if loss_at(middle) <= reached else (middle + 1, last)
    ours_s = curves["ours"][first][0] if first < len(kept) else None
    pictures["ours"] = kept[min(first, len(kept) - 1)].to(model.device)
    measured = {}
    for name, shown in pictures.items():
        measured[name] = distances(model, shown, content, style)
        Image.fromarray(to_pixels(shown.cpu())).save(folder / f"race-{size_px}-{place}-{name}.png")
    return {
        "photo": PAIRS[place][0],
        "style": PAIRS[place][1],
        "size_px": size_px,
        "textbook_iterations": iterations,
        "textbook_s": spent["textbook"],
        "loss": reached,
        "ours_iterations": first if ours_s else None,
        "ours_s": ours_s,
        "sooner": spent["textbook"] / ours_s if ours_s else None,
        "distances": measured,
        "curves": curves,
    }


def plain_root(matrix: Tensor) -> Tensor:
    """Return the square root of a matrix by twelve Newton–Schulz steps that autograd follows."""
    identity = torch.eye(len(matrix), device=matrix.device)
    norm = torch.linalg.matrix_norm(matrix) + 1e-8
    root, inverse = matrix / norm, identity
    for _ in range(12):
        step = 1.5 * identity - 0.5 * (inverse @ root)
        root, inverse = root @ step, step @ inverse
    return root * norm.sqrt()


def plain_fine(model: FeatureModel, content: Tensor, style: Tensor) -> Iterator[Callable[[], float]]:
    """Yield, for each iteration, a function that makes it: the objective of `fine` in eager fp32, Adam and autograd."""
    options = StylizeOptions(precision=Precision.FP32)
    shares, kept = relative(options.style_layers), model.style_targets(Style(style), options)
    layers = [(s.name, s.weight.contiguous(), s.bias, s.pooled, s.padding) for s in model.trunk(options).stages]
    mean, margin = model.trunk(options).mean, options.margin_px
    image = F.pad(content[None], [margin] * 4, mode="reflect")

    def features(x: Tensor) -> dict[str, Tensor]:
        found, x = {}, F.pad(x - mean, [1] * 4, mode="replicate")
        for name, weight, bias, pooled, padding in layers:
            x = F.relu(F.conv2d(F.max_pool2d(x, 2) if pooled else x, weight, bias, padding=padding))
            found[name] = x
        return found

    def moments(found: Tensor) -> tuple[Tensor, Tensor]:
        columns = found[0].flatten(1)
        centre = columns.mean(dim=1)
        return centre, columns @ columns.T / columns.shape[1] - torch.outer(centre, centre)

    with torch.no_grad():
        there = features(image)["relu4_2"]
    targets = {}
    for layer, known in kept.items():
        covariance = known["gram"] - torch.outer(known["mean"], known["mean"])
        targets[layer] = known["mean"], covariance.trace(), plain_root(covariance)
    image = image.clone().requires_grad_(True)
    adam = torch.optim.Adam([image], lr=0.02, betas=(0.9, 0.99))

    def step() -> float:
        adam.zero_grad()
        here = features(image)
        loss = options.content_weight * F.mse_loss(here["relu4_2"], there)
        for layer, share in shares.items():
            centre, covariance = moments(here[layer])
            centre_there, variance, root = targets[layer]
            overlap = plain_root(root @ covariance @ root).trace()
            distance = (covariance.trace() + variance - 2 * overlap) / len(centre)
            loss = loss + share * (F.mse_loss(centre, centre_there) + distance)
        down, across, one, other = (difference.square().mean() for difference in neighbours(image))
        loss = loss + options.tv_weight * (down + across + 0.5 * (one + other)) / 3
        loss.backward()
        adam.step()
        with torch.no_grad():
            image.clamp_(0, 1)
        return float(loss.detach())

    while True:
        yield step


def fine(model: FeatureModel, size_px: int, adam_iterations: int, rounds: int, budget: Budget) -> dict[str, Any]:
    """Return the seconds of `fine` to the objective that Adam's iterations at each of three scales reach.

    What Adam reaches is found with our own Adam in fp32. What it costs is the median time of an eager iteration at each
    scale, times their number.
    """
    content, style = pair(model, 0, size_px)
    base = {"size_px": size_px, "first_size_px": size_px // 2}
    slow = StylizeOptions(
        **base, optimizer=Optimizer.ADAM, iterations=adam_iterations, precision=Precision.FP32, averaging=0.99
    )
    eager_s = 0.0
    for edge in scales(size_px, min(content.shape[1:]), size_px // 2):
        small = [
            picture(file, edge).contiguous().to(model.device)
            for file in (skimage_photo(PAIRS[0][0]), STYLES / PAIRS[0][1])
        ]
        steps = plain_fine(model, *small)
        with as_installed():
            eager = [timed(next(steps), model.device)[0] for _ in range(rounds)]
        eager_s += adam_iterations * statistics.median(eager[1:])
        budget.check()
    end = None
    for iterate in nst_model.stylize(model, content, [Style(style)], slow):
        end = iterate
        budget.check()
    assert end is not None
    wanted = loss_in_fp32(model, content, style, end.picture, slow)
    for iterations in (10, 15, 20, 30, 40, 60):
        seconds, (*_, last) = timed(
            lambda n=iterations: list(
                nst_model.stylize(model, content, [Style(style)], StylizeOptions(**base, iterations=n))
            ),
            model.device,
        )
        reached = loss_in_fp32(model, content, style, last.picture, slow)
        if reached <= wanted:
            break
        budget.check(seconds)
    return {
        "size_px": size_px,
        "adam_iterations": adam_iterations,
        "adam_s": eager_s,
        "adam_loss": wanted,
        "ours_iterations": iterations,
        "ours_s": seconds,
        "ours_loss": reached,
        "reached": reached <= wanted,
        "faster": eager_s / seconds,
    }


def parts(given: argparse.Namespace, model: FeatureModel, budget: Budget) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the name of each list of results, and what adds to it."""
    for size, preset in itertools.product(given.sizes, ("gatys", "fine")):
        yield "iteration", lambda p=preset, s=size: iteration(model, p, s, given.rounds, budget)
    for place in given.pairs:
        yield (
            "race",
            lambda place=place: race(
                model, place, given.race_size, given.race_iterations, budget=budget, folder=given.out
            ),
        )
    yield "fine", lambda: fine(model, given.fine_size, given.fine_iterations, given.rounds, budget)
    yield "service", lambda: asyncio.run(service.overhead(given.device, given.service_size, given.rounds, 3))


def main() -> None:
    """Measure, and write the results after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=8, help="Iterations of each that are timed.")
    parser.add_argument("--parts", nargs="+", default=["iteration", "race", "fine", "service"])
    parser.add_argument("--pairs", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--race-size", type=int, default=256)
    parser.add_argument("--race-iterations", type=int, default=300)
    parser.add_argument("--fine-size", type=int, default=256)
    parser.add_argument("--fine-iterations", type=int, default=200, help="Of Adam, at each scale.")
    parser.add_argument("--service-size", type=int, default=512)
    parser.add_argument("--budget", type=float, help="Seconds after which nothing more is begun.")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    given = parser.parse_args()
    reuse_memory()
    model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), given.device)
    given.out.mkdir(parents=True, exist_ok=True)
    file, budget = given.out / "speed.json", Budget(given.budget)
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part in given.parts:
        results[part] = []
    results["machine"] = f"{machine()}, {time.strftime('%Y-%m-%d')}, {memory_bytes(model.device) / 2**30:.0f} GiB"
    for name, measure in parts(given, model, budget):
        if name not in given.parts:
            continue
        try:
            found = measure()
        except OutOfTime:
            print(f"{name}: left out, the budget is spent", flush=True)
            continue
        results[name].append(found)
        print(name, {key: value for key, value in found.items() if key != "curves"}, flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
