"""The core's iteration against the textbook loop: same objective, same start, interleaved step by step."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

import nst_model
from nst_model import FeatureModel, Precision, Style, StylizeOptions, gram, load_weights
from nst_model.network import build_trunk
from nst_model.options import relative

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds an iteration (medians), and losses after the last iteration."""

    size_px: int
    precision: str
    textbook_s: float
    ours_s: float
    textbook_loss: float
    ours_loss: float

    def __str__(self) -> str:
        """Return the line as Markdown."""
        speed, loss = self.textbook_s / self.ours_s, self.ours_loss / self.textbook_loss
        return (
            f"| {self.size_px} | {self.precision} | {self.textbook_s:.3f} | {self.ours_s:.3f} | {speed:.2f}× "
            f"| {self.textbook_loss:.2f} | {self.ours_loss:.2f} | {loss:.3f} |"
        )


HEADER = (
    "| px | precision | textbook s/it | ours s/it | faster | textbook loss | ours loss | ours / textbook |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |"
)


def textbook_loop(
    model: FeatureModel, image: Tensor, grams: dict[str, Tensor], options: StylizeOptions
) -> Iterator[Callable[[], float]]:
    """Yield, for each iteration, a function that makes it and returns the loss before: plain PyTorch, as in tutorials.

    `image` (1, 3, H, W), a leaf of autograd's, is optimized in place; as it is given, it is the content.
    """
    style_layers, content_layers = relative(options.style_layers), relative(options.content_layers)
    trunk = build_trunk(
        model.weights,
        [*style_layers, *content_layers],
        pooling=options.pooling,
        precision=Precision.FP32,
        device=model.device,
    )
    layers = [(stage.name, stage.weight.contiguous(), stage.bias, stage.pooled) for stage in trunk.stages]

    def features(x: Tensor) -> dict[str, Tensor]:
        found, x = {}, x - trunk.mean
        for name, weight, bias, pooled in layers:
            x = F.relu(F.conv2d(F.avg_pool2d(x, 2) if pooled else x, weight, bias, padding=1))
            found[name] = x
        return found

    with torch.no_grad():
        there = features(image)
    optimizer = torch.optim.LBFGS([image], max_iter=1, history_size=100, tolerance_grad=0, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        here = features(image)
        loss = options.content_weight * sum(
            w * F.mse_loss(here[layer], there[layer]) for layer, w in content_layers.items()
        )
        loss = loss + options.style_weight * sum(
            w * F.mse_loss(gram(here[layer]), grams[layer]) for layer, w in style_layers.items()
        )
        loss.backward()
        return loss

    def step() -> float:
        return float(optimizer.step(closure).detach())

    while True:
        yield step


def leaf(content: Tensor) -> Tensor:
    """Return a photograph (3, H, W) as a picture for autograd to differentiate to, (1, 3, H, W)."""
    return content[None].clone().requires_grad_(True)


def measure(model: FeatureModel, size_px: int, iterations: int, precision: Precision) -> Row:
    """Return the row of one size. The pictures are made here: 1/f noise as content, dead leaves as style."""
    from nst_model.calibration import dead_leaves, one_over_f_noise  # noqa: PLC0415

    random = torch.Generator().manual_seed(1)
    height = size_px * 3 // 4
    content = one_over_f_noise(size_px, random)[:, :height].contiguous().to(model.device)
    style = dead_leaves(size_px, random)[:, :height].contiguous().to(model.device)
    options = StylizeOptions.of("gatys", size_px=size_px, iterations=iterations, precision=precision)
    fp32 = dataclasses.replace(options, precision=Precision.FP32)
    ours = nst_model.stylize(model, content, [Style(style)], options)
    targets = model.style_targets(Style(style), fp32)
    grams = {layer: kept["gram"] for layer, kept in targets.items()}
    textbook = textbook_loop(model, leaf(content), grams, fp32)
    next(ours)
    seconds: dict[str, list[float]] = {"textbook": [], "ours": []}
    for _ in range(iterations):
        step = next(textbook)
        seconds["textbook"].append(timed(step)[0])
        elapsed, iterate = timed(lambda: next(ours))
        seconds["ours"].append(elapsed)
    textbook_loss = next(textbook)()  # the loss that step returns is that of the point before it
    return Row(
        size_px,
        model.precision(options).value,
        statistics.median(seconds["textbook"]),
        statistics.median(seconds["ours"]),
        textbook_loss,
        loss_in_fp32(model, content, style, iterate.picture, fp32),
    )


def loss_in_fp32(
    model: FeatureModel, content: Tensor, style: Tensor, picture: Tensor, options: StylizeOptions
) -> float:
    """Return the objective at a picture, computed in fp32 whatever it was optimized in."""
    objective = model.objective([model.style_targets(Style(style), options)], options)
    return float(objective(picture[None], objective.content_targets(content[None])).total)


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Return how long `work` takes, seconds, the device's share included, and what it returns."""
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", default=nst_model.DEFAULT_MODEL)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--precision", type=Precision, default=Precision.AUTO, choices=list(Precision))
    options = parser.parse_args()
    model = FeatureModel(load_weights(options.model), options.device)
    print(HEADER)
    for size_px in options.sizes:
        print(measure(model, size_px, options.iterations, options.precision), flush=True)


if __name__ == "__main__":
    main()
