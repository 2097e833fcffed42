"""What an iteration costs with each loss, relative to Gram matrices and squared error, interleaved."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import nst_model
from nst_model import ContentLoss, FeatureModel, Style, StyleLoss, StylizeOptions, load_weights
from nst_model.calibration import dead_leaves, one_over_f_noise

WARM_UP = 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--iterations", type=int, default=10)
    options = parser.parse_args()
    model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), options.device)
    print("| loss | " + " | ".join(f"{size} px" for size in options.sizes) + " |")
    print("| --- |" + " --- |" * len(options.sizes))
    cases = {f"style {loss}": {"style_loss": loss} for loss in StyleLoss}
    cases |= {f"content {loss}": {"style_loss": StyleLoss.GRAM, "content_loss": loss} for loss in ContentLoss}
    columns = [relative_times(model, size, options.iterations, cases) for size in options.sizes]
    for case in cases:
        print(f"| {case} | " + " | ".join(f"{column[case]:.2f}×" for column in columns) + " |")


def relative_times(
    model: FeatureModel, size: int, iterations: int, cases: dict[str, dict[str, object]]
) -> dict[str, float]:
    """Return the median time of an iteration of each case, relative to the first one's."""
    content = one_over_f_noise(size, torch.Generator().manual_seed(1))[:, : size * 3 // 4]
    style = Style(dead_leaves(size, torch.Generator().manual_seed(2)))
    runs = {
        case: nst_model.stylize(
            model, content, [style], StylizeOptions(iterations=iterations + WARM_UP, first_size_px=4096, **given)
        )
        for case, given in cases.items()
    }
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for turn in range(iterations + WARM_UP):
        for case, run in runs.items():
            began = time.perf_counter()
            next(run)
            if turn >= WARM_UP:
                seconds[case].append(time.perf_counter() - began)
    medians = {case: statistics.median(times) for case, times in seconds.items()}
    return {case: median / medians["style gram"] for case, median in medians.items()}


if __name__ == "__main__":
    main()
