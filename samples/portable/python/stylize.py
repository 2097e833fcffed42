"""Style transfer without a deep-learning framework: an exported closure in ONNX Runtime, and SciPy's L-BFGS.

    python stylize.py PHOTO STYLE [--models ../models] [--out stylized.png] [--size 256] [--iterations 60]

Needs numpy, scipy, pillow and onnxruntime. Pictures are (1, 3, H, W), RGB, float32 in [0, 1].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from scipy.ndimage import uniform_filter
from scipy.optimize import OptimizeResult, minimize

CONTENT_WEIGHT = 1.0
STYLE_WEIGHT = 20.0
STYLE_LAYERS = {"relu1_1": 256.0, "relu2_1": 64.0, "relu3_1": 16.0, "relu4_1": 4.0, "relu5_1": 1.0}
"""Relative weights of layers; 1 for any other."""
TV_WEIGHT = 200.0
HISTORY = 20
OCTAVES = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Frequencies that FREEDOM is for, in cycles a pixel."""
FREEDOM = (
    (10.0, 8.0, 4.0, 1.0, 0.5, 0.45, 1.0),
    (0.6, 0.7, 0.4, 0.3, 0.6, 2.4, 5.0),
    (0.35, 0.4, 0.2, 0.12, 0.2, 0.7, 2.2),
)
"""Inverse curvature of lightness and of two opposed colors by frequency: what this project's own L-BFGS had learnt
after 60 iterations, at 128 px, averaged over three pairs of pictures and rounded."""
PROBES = 2
PROBE = 0.1
"""Standard deviation of the noise by which the curvature of places is found, in the unknowns."""
MOST_FREEDOM = 3.0
"""A place's inverse curvature is at most this many times their geometric mean, and at least as small a part of it."""
BLUR_PX = 5
MIN_EDGE_PX = 16
"""Smallest edge whose deepest features still have a position."""
CALLS = 7
"""Calls that --benchmark takes the median of."""

Array = np.ndarray[Any, np.dtype[np.float32]]


class Objective:
    """What is minimized: the exported closure, with what a photograph and a style make it compare the picture with.

    Args:
        folder: where `features.onnx`, `grams.onnx` and `closure.onnx` are.
        photo: the content.
        style: of any size.

    Attributes:
        start: the photograph, continued beyond its edge by `margin_px` of its mirror image if the model wants that.
        margin_px: what `picture` cuts off again.
    """

    def __init__(self, folder: Path, photo: Array, style: Array) -> None:
        self._closure = opened(folder, "closure")
        self.margin_px: int = described(self._closure)["margin_px"]
        self.start = self.with_margin(photo)
        content = outputs(opened(folder, "features"), self.start)
        grams = outputs(opened(folder, "grams"), self.with_margin(style))
        inputs = [entry.name for entry in self._closure.get_inputs()]
        content_layers = [name.removeprefix("content.") for name in inputs if name.startswith("content.")]
        style_layers = [name.removeprefix("style.") for name in inputs if name.startswith("style.")]
        relative = np.array([STYLE_LAYERS.get(layer, 1.0) for layer in style_layers])
        self._fixed = {
            **{f"content.{layer}": content[layer] for layer in content_layers},
            **{f"style.{layer}": grams[f"{layer}.gram"][0] for layer in style_layers},
            "content_weights": np.full(len(content_layers), CONTENT_WEIGHT / len(content_layers), np.float32),
            "style_weights": (STYLE_WEIGHT * relative / relative.sum()).astype(np.float32),
            "tv_weight": np.array(TV_WEIGHT, np.float32),
        }

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss of the picture whose pixels are x, flat, and its gradient, as SciPy wants them: float64."""
        image = x.reshape(self.start.shape).astype(np.float32)
        total, gradient = self._closure.run(["total", "gradient"], {"image": image, **self._fixed})
        return float(total[0]), gradient.ravel().astype(np.float64)

    def picture(self, x: np.ndarray) -> Image.Image:
        """Return the picture whose pixels are x, flat, without its margin, clipped to [0, 1]."""
        margin = self.margin_px
        _, _, height, width = self.start.shape
        pixels = x.reshape(self.start.shape)[0, :, margin : height - margin, margin : width - margin]
        return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))

    def with_margin(self, picture: Array) -> Array:
        """Return a picture as the model wants it."""
        beside = (self.margin_px, self.margin_px)
        return np.pad(picture, ((0, 0), (0, 0), beside, beside), mode="reflect")


class Unknowns:
    """What L-BFGS sees in place of pixels: unknowns z in which the objective's curvature is nearly the same everywhere.

    x = start + B·√Γ·√D·z. B takes lightness and two opposed colors to RGB. Γ is FREEDOM, a diagonal in the Fourier
    domain; D is one in the picture, found by what a little noise does to the gradient. This is what an initial inverse
    Hessian B·√Γ·D·√Γ·Bᵀ is to an L-BFGS that takes one, as SciPy's does not.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        _, self._channels, *self._size = objective.start.shape
        height, width = self._size
        rows = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]], float)
        self._basis = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)).clip(min=OCTAVES[0])
        by_octave = np.log(FREEDOM) / 2
        self._root = np.exp([np.interp(np.log(frequency), np.log(OCTAVES), each) for each in by_octave])
        self._scale = np.ones((height, width))
        self._scale = self._by_place()

    def pixels(self, z: np.ndarray) -> np.ndarray:
        """Return the pixels, flat."""
        moved = self._filtered(self._scale * z.reshape(self._channels, *self._size))
        return self._objective.start.ravel() + np.tensordot(self._basis.T, moved, 1).ravel()

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss and its gradient to z, flat."""
        loss, gradient = self._objective(self.pixels(z))
        pulled_back = np.tensordot(self._basis, gradient.reshape(self._channels, *self._size), 1)
        return loss, (self._scale * self._filtered(pulled_back)).ravel()

    def _filtered(self, pictures: np.ndarray) -> np.ndarray:
        """Return √Γ·pictures, (C, H, W)."""
        return np.fft.irfft2(np.fft.rfft2(pictures) * self._root, s=self._size)

    def _by_place(self) -> np.ndarray:
        """Return √D, (H, W)."""
        random = np.random.default_rng(0)
        unknowns = self._objective.start.size
        _, here = self(np.zeros(unknowns))
        squares = np.zeros(self._size)
        for _ in range(PROBES):
            _, there = self(PROBE * random.standard_normal(unknowns))
            squares += ((there - here) ** 2).reshape(self._channels, *self._size).sum(axis=0)
        for _ in range(2):
            squares = uniform_filter(squares, BLUR_PX, mode="mirror")
        logarithm = -np.log(squares.clip(min=np.finfo(float).tiny)) / 2
        bound = np.log(MOST_FREEDOM)
        return np.exp((logarithm - logarithm.mean()).clip(-bound, bound) / 2)


def opened(folder: Path, graph: str) -> onnxruntime.InferenceSession:
    """Return an exported graph, ready to run. Ends the program if it is not there, or another."""
    file = folder / f"{graph}.onnx"
    if not file.exists():
        sys.exit(f"stylize: {file} is not there; `nst-model export --graph {graph}` makes it")
    try:
        session = onnxruntime.InferenceSession(file)
    except Exception as error:  # ONNX Runtime has no exception of its own
        sys.exit(f"stylize: {file} cannot be loaded: {error}")
    if (found := described(session).get("graph")) != graph:
        sys.exit(f"stylize: {file} is not the graph {graph}, but {found or 'of another origin'}")
    return session


def described(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return what an exported graph says of itself."""
    description: dict[str, Any] = json.loads(session.get_modelmeta().custom_metadata_map.get("nst.json", "{}"))
    return description


def outputs(session: onnxruntime.InferenceSession, image: Array) -> dict[str, Array]:
    """Return what a graph makes of a picture, by name."""
    names = [entry.name for entry in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": image}), strict=True))


def read_picture(file: Path, edge_px: int) -> Array:
    """Return a picture file's pixels, its longer edge scaled to `edge_px`. Ends the program if it is none."""
    try:
        with Image.open(file) as stored:
            picture = ImageOps.exif_transpose(stored).convert("RGB")
    except OSError as error:
        sys.exit(f"stylize: {file} cannot be read as a picture: {error}")
    scale = edge_px / max(picture.size)
    width, height = (max(MIN_EDGE_PX, round(edge * scale)) for edge in picture.size)
    pixels = np.asarray(picture.resize((width, height), Image.Resampling.LANCZOS), np.float32) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def optimize(objective: Objective, iterations: int) -> np.ndarray:
    """Return the pixels after so many iterations of SciPy's L-BFGS, flat; print the loss of each."""
    iteration = 0

    def report(intermediate_result: OptimizeResult) -> None:
        nonlocal iteration
        iteration += 1
        print(f"{iteration}/{iterations}  loss {intermediate_result.fun:.6g}", flush=True)

    unknowns, start = Unknowns(objective), np.zeros(objective.start.size)
    options = {"maxiter": iterations, "maxfun": sys.maxsize, "maxcor": HISTORY, "ftol": 0.0, "gtol": 0.0}
    found = minimize(unknowns, start, method="L-BFGS-B", jac=True, callback=report, options=options)
    return unknowns.pixels(found.x)


def benchmark(objective: Objective) -> dict[str, Any]:
    """Return the median time of the closure."""
    start = objective.start.ravel().astype(np.float64)
    objective(start)  # the first call allocates
    seconds = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        objective(start)
        seconds.append(time.perf_counter() - begin)
    _, _, height, width = objective.start.shape
    runtime = f"onnxruntime {onnxruntime.__version__}"
    return {"runtime": runtime, "width": width, "height": height, "calls": CALLS, "seconds": statistics.median(seconds)}


def main() -> None:
    """Style a photograph."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", type=Path)
    parser.add_argument("style", type=Path)
    parser.add_argument("--models", type=Path, default=Path(__file__).resolve().parents[1] / "models", help="Folder.")
    parser.add_argument("--out", type=Path, default=Path("stylized.png"))
    parser.add_argument("--size", type=int, default=256, help="Longer edge of the picture, pixels.")
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--benchmark", action="store_true", help="Time the closure instead, and print JSON.")
    options = parser.parse_args()
    if options.size < MIN_EDGE_PX or options.iterations < 1:
        parser.error(f"--size must be at least {MIN_EDGE_PX}, --iterations at least 1")
    photo, style = read_picture(options.photo, options.size), read_picture(options.style, options.size)
    objective = Objective(options.models, photo, style)
    if options.benchmark:
        print(json.dumps(benchmark(objective)))
        return
    objective.picture(optimize(objective, options.iterations)).save(options.out)
    print(options.out)


if __name__ == "__main__":
    main()
