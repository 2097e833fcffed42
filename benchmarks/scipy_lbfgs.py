"""How far SciPy's L-BFGS comes on the exported closure, in the sample's unknowns and in pixels, and the engine's."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import OptimizeResult, minimize

import nst_model
from benchmarks.canonical import STYLES
from benchmarks.speed import PAIRS
from nst_model import FeatureModel, Style, StylizeOptions, load_weights
from nst_model.export_spec import ExportGraph, ExportSpec
from nst_model.exports import export, write_artifact
from nst_model.options import Padding, Pooling
from nst_model.weights import FeatureWeights
from samples.demo import skimage_photo
from samples.portable.python import stylize as sample


def write_models(weights: FeatureWeights, folder: Path) -> None:
    """Write the graphs that the sample reads, as its README has them made."""
    for graph in (ExportGraph.FEATURES, ExportGraph.GRAMS, ExportGraph.CLOSURE):
        spec = ExportSpec(graph=graph, pooling=Pooling.AVERAGE, padding=Padding.MIRROR)
        write_artifact(export(weights, spec), folder / f"{graph}{spec.format.suffix}")


def engine_losses(weights: FeatureWeights, photo: np.ndarray, style: np.ndarray, iterations: int) -> list[float]:
    """Return the losses of the engine's iterations on the sample's objective, both pictures being (1, 3, H, W)."""
    options = StylizeOptions.of(
        "gatys",
        iterations=iterations,
        content_weight=sample.CONTENT_WEIGHT,
        style_weight=sample.STYLE_WEIGHT,
        style_layers=sample.STYLE_LAYERS,
        tv_weight=sample.TV_WEIGHT,
        history=sample.HISTORY,
        padding="mirror",
        precision="fp32",
    )
    content, painting = (torch.from_numpy(picture[0]) for picture in (photo, style))
    run = nst_model.stylize(FeatureModel(weights, "cpu"), content, [Style(painting)], options)
    return [iterate.loss for iterate in run][1:]


def scipy_losses(function: Callable[[np.ndarray], Any], start: np.ndarray, iterations: int) -> list[float]:
    """Return the losses of SciPy's iterations, as the sample has them made."""
    losses: list[float] = []

    def report(intermediate_result: OptimizeResult) -> None:
        losses.append(float(intermediate_result.fun))

    options = {"maxiter": iterations, "maxfun": sys.maxsize, "maxcor": sample.HISTORY, "ftol": 0.0, "gtol": 0.0}
    minimize(function, start, method="L-BFGS-B", jac=True, callback=report, options=options)
    return losses


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--iterations", type=int, default=60)
    given = parser.parse_args()
    weights = load_weights(nst_model.DEFAULT_MODEL)
    print("| photograph, style | after | engine | SciPy, unknowns | SciPy, pixels |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        write_models(weights, Path(folder))
        for names in PAIRS:
            files = (skimage_photo(names[0]), STYLES / names[1])
            photo, style = (sample.read_picture(file, given.size) for file in files)
            objective = sample.Objective(Path(folder), photo, style)
            engine = engine_losses(weights, photo, style, given.iterations)
            start = objective.start.ravel().astype(np.float64)
            scaled = scipy_losses(sample.Unknowns(objective), np.zeros_like(start), given.iterations)
            pixels = scipy_losses(objective, start, given.iterations)
            for after in sorted({min(10, given.iterations), given.iterations}):
                ends = [losses[after - 1] for losses in (engine, scaled, pixels)]
                more = "".join(f" | {end:.2f} ({end / ends[0] - 1:+.1%})" for end in ends[1:])
                print(f"| {', '.join(Path(name).stem for name in names)} | {after} | {ends[0]:.2f}{more} |", flush=True)


if __name__ == "__main__":
    main()
