"""The calibration set against photographs: mean activation of each layer, relative to the set's."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nst_model
from nst_model.calibration import IMAGES_OF_A_KIND, SIZE_PX, calibration_images, mean_activations
from nst_model.network import build_trunk

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png")


def photograph(name: str) -> torch.Tensor:
    """Return a photograph of scikit-image's as (3, H, W) in [0, 1], longer edge as the calibration set's."""
    found = importlib.util.find_spec("skimage")
    assert found is not None
    assert found.origin is not None
    picture = Image.open(Path(found.origin).parent / "data" / name).convert("RGB")
    picture.thumbnail((SIZE_PX, SIZE_PX), Image.Resampling.LANCZOS)
    return nst_model.from_pixels(np.asarray(picture))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=nst_model.DEFAULT_MODEL)
    weights = nst_model.load_weights(parser.parse_args().model)
    layers = weights.architecture.layers
    trunk = build_trunk(weights, layers)
    made = calibration_images()
    noise, leaves = (mean_activations(trunk, half) for half in (made[:IMAGES_OF_A_KIND], made[IMAGES_OF_A_KIND:]))
    photos = [mean_activations(trunk, photograph(name)[None]) for name in PHOTOGRAPHS]
    print("| layer | 1/f noise | dead leaves | photographs: mean | smallest | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for layer in layers:
        found = [photo[layer] for photo in photos]
        figures = (noise[layer], leaves[layer], statistics.mean(found), min(found), max(found))
        print(f"| {layer} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


if __name__ == "__main__":
    main()
