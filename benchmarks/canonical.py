"""The canonical unit at work: the same options at other sizes and on another network must weigh alike.

For each size and model, the ratio of the weighted style loss to the weighted content loss at the end of a run.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nst_model
from nst_model import FeatureModel, FeatureWeights, Iterate, Style, StylizeOptions, load_weights
from nst_model.architecture import VGG19
from nst_model.calibration import calibrate
from nst_model.options import relative

STYLES = Path(__file__).resolve().parent.parent / "samples" / "styles"


def vgg19_of(vgg16: FeatureWeights) -> FeatureWeights:
    """Return a VGG-19 that computes what a VGG-16 does: identity convolutions where it has a layer more.

    After a ReLU nothing is negative, so another one changes nothing. Calibrated anew.
    """
    convolutions = dict(vgg16.convolutions)
    for convolution in VGG19.convolutions:
        if convolution.layer not in convolutions:
            channels = convolutions[f"relu{convolution.block}_1"][0].shape[0]
            kernel = torch.zeros(channels, channels, 3, 3)
            kernel[range(channels), range(channels), 1, 1] = 1
            convolutions[convolution.layer] = (kernel, torch.zeros(channels))
    return calibrate(dataclasses.replace(vgg16, name="vgg19", architecture=VGG19, convolutions=convolutions))


def picture(file: Path, size_px: int) -> torch.Tensor:
    """Return a picture of a longer edge in pixels, (3, H, W)."""
    with Image.open(file) as image:
        scale = size_px / max(image.size)
        size = round(image.width * scale), round(image.height * scale)
        return nst_model.from_pixels(np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)))


def last(weights: FeatureWeights, photo: Path, style: Path, options: StylizeOptions) -> Iterate:
    """Return the last iterate of a run."""
    size = options.size_px
    *_, found = nst_model.stylize(FeatureModel(weights), picture(photo, size), [Style(picture(style, size))], options)
    return found


def ratio(iterate: Iterate, options: StylizeOptions) -> float:
    """Return weighted style loss / weighted content loss."""
    layers = relative(options.style_layers)
    style = sum(weight * iterate.style_losses[layer] for layer, weight in layers.items())
    return options.style_weight * style / (options.content_weight * iterate.content_loss)


def rows(photo: Path, style: Path, presets: list[str], sizes: list[int], iterations: int | None) -> Iterator[str]:
    """Yield the table's rows."""
    vgg16 = load_weights(nst_model.DEFAULT_MODEL)
    given = {} if iterations is None else {"iterations": iterations}
    for preset in presets:
        for weights, size in [*((vgg16, size) for size in sizes), (vgg19_of(vgg16), sizes[0])]:
            options = StylizeOptions.of(preset, size_px=size, **given)
            found = last(weights, photo, style, options)
            yield f"| {preset} | {weights.architecture.name} | {size} | {ratio(found, options):.3f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photo", type=Path)
    parser.add_argument("--style", type=Path, default=STYLES / "strokes.jpg")
    parser.add_argument("--presets", nargs="+", default=["fine", "gatys"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 768])
    parser.add_argument("--iterations", type=int, help="At each scale, in place of the preset's.")
    options = parser.parse_args()
    print("| preset | network | px | style : content |\n| --- | --- | --- | --- |")
    for row in rows(options.photo, options.style, options.presets, options.sizes, options.iterations):
        print(row, flush=True)


if __name__ == "__main__":
    main()
