"""Golden runs: the loss curves of small runs, pinned. `python -m tests.model.test_golden` writes them anew.

They say that something in the numerics has changed, not that it is wrong: every other test here says what is right.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import nst_model
from nst_model import Color, ContentLoss, FeatureModel, Style, StyleLoss, StylizeOptions, load_weights
from nst_model.architecture import VGG16
from nst_model.weights import FeatureWeights
from tests.conftest import TINY_WIDTHS, random_state

FILE = Path(__file__).with_name("golden.json")
SHOWN = (0, 3, 6, 10)
"""Iterations whose losses are pinned: at the start exactly, later as far as rounding lets runs stay together."""
TOLERANCES = (1e-4, 0.01, 0.02, 0.03)

CASES: dict[str, dict[str, Any]] = {
    **{f"style-{loss}": {"style_loss": loss} for loss in StyleLoss},
    **{f"content-{loss}": {"content_loss": loss} for loss in ContentLoss if loss != "squared_error"},
    **{f"color-{color}": {"color": color} for color in Color if color != "style"},
    "preset-gatys": {"preset": "gatys"},
    **{f"pooling-{pooling}": {"pooling": pooling} for pooling in ("average", "l2")},
    "curvature-uniform": {"curvature": "uniform"},
    "adam": {"optimizer": "adam"},
    "adam-coarse-to-fine": {"optimizer": "adam", "first_size_px": 24, "scale_iterations": [4, 3, 4]},
    "noise": {"init": "noise", "seed": 3},
    **{f"start-{init}": {"init": init} for init in ("gray", "style_statistics", "image")},
    **{f"padding-{padding}": {"padding": padding} for padding in ("zeros", "replicate")},
    "coarse-to-fine": {"first_size_px": 24, "scale_iterations": [4, 3, 4]},
    "regularised": {"tv_norm": "l1", "laplacian_weight": 10.0},
    "regions": {"regions": True},
}


def smooth(height: int, width: int, seed: int) -> torch.Tensor:
    """Return a smooth random picture, (3, H, W)."""
    small = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear", align_corners=False)[0]


def curve(weights: FeatureWeights, *, regions: bool = False, **given: Any) -> list[float]:
    """Return the losses of a small run at the iterations SHOWN."""
    options = StylizeOptions.of(
        **({"preset": "fine", "iterations": 10, "first_size_px": 512, "precision": "fp32"} | given)
    )
    left = torch.zeros(40, 48)
    left[:, :20] = 1
    styles = [Style(smooth(40, 40, 1), region=left if regions else None), Style(smooth(32, 40, 2), weight=0.5)]
    model = FeatureModel(weights, "cpu")
    start = smooth(20, 24, 4) if options.init == "image" else None
    losses = [iterate.loss for iterate in nst_model.stylize(model, smooth(40, 48, 3), styles, options, start=start)]
    return [losses[index] for index in SHOWN]


@pytest.mark.parametrize("case", CASES)
def test_loss_curve_is_the_golden_one(tiny_weights: FeatureWeights, case: str) -> None:
    """Every loss, colour mode, pooling, padding, optimizer and start, and the paper."""
    wanted = json.loads(FILE.read_text())[case]
    for found, expected, tolerance in zip(curve(tiny_weights, **CASES[case]), wanted, TOLERANCES, strict=True):
        assert found == pytest.approx(expected, rel=tolerance)


def test_no_golden_run_is_left_over() -> None:
    """The file holds those above and no others."""
    assert set(json.loads(FILE.read_text())) == set(CASES)


def main() -> None:
    """Write the golden file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tiny.safetensors"
        safetensors.torch.save_file(random_state(VGG16, TINY_WIDTHS), file)
        weights = load_weights("vgg16", file)
    golden = {case: [float(f"{loss:.7g}") for loss in curve(weights, **given)] for case, given in CASES.items()}
    FILE.write_text("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in golden.items()) + "\n}\n")


if __name__ == "__main__":
    main()
