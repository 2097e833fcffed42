"""The preset `fine` against the plain loop of Gatys et al. (2016), given the same seconds.

The two run interleaved, whichever has used less time next, until `fine` is done. Then both pictures are measured alike:
how far their features are from the style's (Wasserstein-2, the layers of `fine`) and from the photograph's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nst_model
from benchmarks.canonical import picture
from nst_model import FeatureModel, Iterate, Style, StylizeOptions, load_weights, to_pixels
from nst_model.objective import interpreted
from nst_model.options import relative
from nst_model.stylization import content_targets


def race(runs: list[Iterator[Iterate]]) -> tuple[list[Iterate], list[float]]:
    """Return the last iterate and the seconds of each run when the first one has ended."""
    seconds = [0.0] * len(runs)
    latest: dict[int, Iterate] = {}
    while True:
        turn = int(np.argmin(seconds))
        began = time.perf_counter()
        iterate = next(runs[turn], None)
        seconds[turn] += time.perf_counter() - began
        if iterate is not None:
            latest[turn] = iterate
        elif turn == 0:
            return [latest[place] for place in range(len(runs))], seconds
        else:
            seconds[turn] = float("inf")  # has made all its iterations


def distances(
    model: FeatureModel, shown: torch.Tensor, photo: torch.Tensor, style: torch.Tensor
) -> tuple[float, float]:
    """Return the style distance and the content distance of a picture, both (3, H, W)."""
    options = StylizeOptions()
    objective = model.objective([model.style_targets(Style(style), options)], options)
    with interpreted():
        losses = objective(shown.clamp(0, 1)[None], content_targets(objective, photo))
    shares = torch.tensor(list(relative(options.style_layers).values()))
    return float((losses.style * shares).sum()), float(losses.content)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PHOTO STYLE", help="Pairs of image files.")
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="Folder for the pictures.")
    options = parser.parse_args()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    model = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), options.device)
    plain = FeatureModel(load_weights(nst_model.DEFAULT_MODEL), options.device)  # has a trunk of its own
    print("| photo, style | style distance: fine; gatys | content distance: fine; gatys | iterations of gatys |")
    print("| --- | --- | --- | --- |")
    for photo_file, style_file in zip(options.pictures[::2], options.pictures[1::2], strict=True):
        photo, style = (picture(file, options.size) for file in (photo_file, style_file))
        chosen = (
            StylizeOptions(size_px=options.size),
            StylizeOptions.of("gatys", size_px=options.size, iterations=10_000),
        )
        runs = [
            nst_model.stylize(each, photo, [Style(style)], one)
            for each, one in zip((model, plain), chosen, strict=True)
        ]
        ends, _ = race(runs)
        (fine_style, fine_content), (gatys_style, gatys_content) = (
            distances(model, end.picture, photo, style) for end in ends
        )
        print(
            f"| {photo_file.stem}, {style_file.stem} | {fine_style:.3f}; {gatys_style:.3f} "
            f"| {fine_content:.3f}; {gatys_content:.3f} | {ends[1].index} |",
            flush=True,
        )
        if options.out:
            for preset, end in zip(("fine", "gatys"), ends, strict=True):
                Image.fromarray(to_pixels(end.picture)).save(
                    options.out / f"{photo_file.stem}-{style_file.stem}-{preset}.png"
                )


if __name__ == "__main__":
    main()
