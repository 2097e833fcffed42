"""Stylization: from a content picture and styles to a sequence of iterates.

Pictures are (3, H, W), RGB, fp32, nominally in [0, 1]; iterates may leave that range a little, which `to_pixels`
clips. The optimization itself is not clipped: that would break L-BFGS's curvature pairs.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nst_model.devices import resolve_device, resolve_precision
from nst_model.errors import InvalidImage
from nst_model.lbfgs import LBFGS
from nst_model.network import MIN_EDGE_PX, Trunk, build_trunk
from nst_model.objective import Objective, gram, script
from nst_model.options import Init, LayerWeights, Pooling, Precision, StylizeOptions, relative
from nst_model.weights import FeatureWeights

NOISE_MEAN, NOISE_SPREAD = 0.5, 0.1
OVERSHOOT = 2.0
"""A step that multiplies the loss by more than this is backed up from."""
MAX_RESTARTS = 5
"""Restarts in a row after which a loss that stays infinite or NaN ends the run."""


class StopReason(StrEnum):
    """Why a run ended by itself."""

    ITERATIONS = "iterations"
    DIVERGED = "diverged"
    CONVERGED = "converged"


@dataclass(frozen=True)
class Iterate:
    """One point of the optimization: a picture and the objective at that very picture.

    Attributes:
        index: 0 for the starting picture, 1 after the first step, and so on.
        picture: (3, H, W) RGB on the device, unclipped. Never modified afterwards.
        loss: the objective.
        content_loss: before its weight.
        style_losses: layer → loss, before any weight.
        stop_reason: why the run ends with this iterate; None while it goes on.
    """

    index: int
    picture: Tensor
    loss: float
    content_loss: float
    style_losses: Mapping[str, float]
    stop_reason: StopReason | None = None


@dataclass(frozen=True)
class WeightedGrams:
    """A style, as far as the objective knows it.

    Attributes:
        grams: layer → Gram matrix (C, C).
        weight: share of this style, relative to the others'.
    """

    grams: Mapping[str, Tensor]
    weight: float = 1.0


class FeatureModel:
    """A feature model on a device. Keeps its trunks, so that the next stylization starts at once.

    Args:
        weights: what `load_weights` returns.
        device: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.
    """

    def __init__(self, weights: FeatureWeights, device: str | torch.device = "auto") -> None:
        self.weights = weights
        self.device = resolve_device(str(device))
        self._trunks: dict[Any, Trunk] = {}

    def precision(self, options: StylizeOptions) -> Precision:
        """Return the arithmetic that `options` lead to on this device: FP32 or BF16."""
        return resolve_precision(options.precision, self.device)

    def trunk(self, layers: Sequence[str], pooling: Pooling, precision: Precision) -> Trunk:
        """Return the trunk that yields `layers`, built once for each combination."""
        order = self.weights.architecture.layers
        key = (tuple(sorted(set(layers), key=order.index)), pooling, precision)
        if key not in self._trunks:
            self._trunks.clear()  # one at a time: jobs that alternate are rarer than devices short of memory
            self._trunks[key] = build_trunk(
                self.weights, key[0], pooling=pooling, precision=precision, device=self.device
            )
        return self._trunks[key]

    def grams(self, picture: Tensor, options: StylizeOptions) -> dict[str, Tensor]:
        """Return the Gram matrix (C, C) of each of the options' style layers for a style picture (3, H, W)."""
        _check_picture(picture, "style")
        layers = list(relative(options.style_layers))
        trunk = self._job_trunk(options)
        with torch.no_grad():
            features = trunk(picture.to(self.device)[None])
            return {layer: gram(features[layer]) for layer in layers}

    def objective(self, styles: Sequence[WeightedGrams], options: StylizeOptions) -> torch.jit.ScriptModule:
        """Return the scripted objective for these styles: what `stylize` minimizes, and what can be saved."""
        style_layers = relative(options.style_layers)
        eager = Objective(
            self._job_trunk(options),
            {layer: grams.to(self.device) for layer, grams in mixed(styles, style_layers).items()},
            style_layers=style_layers,
            content_layers=relative(options.content_layers),
            style_weight=options.style_weight,
            content_weight=options.content_weight,
        )
        return script(eager)

    def _job_trunk(self, options: StylizeOptions) -> Trunk:
        layers = [*relative(options.style_layers), *relative(options.content_layers)]
        return self.trunk(layers, options.pooling, self.precision(options))


def mixed(styles: Sequence[WeightedGrams], layers: LayerWeights) -> dict[str, Tensor]:
    """Return the Gram matrices of several styles, averaged by weight.

    A Gram matrix is a mean over positions, so the average is that of a picture in which each style covers its share.
    Raises ValueError unless there is a weight above 0.
    """
    total = sum(style.weight for style in styles)
    if not total > 0:
        raise ValueError("styles must have at least one weight above 0")
    return {
        layer: sum((style.grams[layer] * (style.weight / total) for style in styles), torch.tensor(0.0))
        for layer in layers
    }


def stylize(
    model: FeatureModel,
    content: Tensor,
    styles: Sequence[WeightedGrams],
    options: StylizeOptions,
    *,
    stop: threading.Event | None = None,
) -> Iterator[Iterate]:
    """Yield the starting picture and then one iterate for each iteration.

    One iteration is one step and one evaluation of the objective and its gradient. The run ends after
    `options.iterations` of them, or when it has converged or diverged: the last iterate says which. When `stop` is set
    it ends before the next evaluation, without a last word. An iterate is never NaN or infinite.

    Args:
        model: the feature model, on its device.
        content: (3, H, W) RGB in [0, 1], already of the size that the result shall have.
        styles: from `FeatureModel.grams`, with their weights.
        options: see StylizeOptions. `size_px` and `style_scale` are the caller's affair.
        stop: looked at between evaluations, from any thread.

    Raises InvalidImage or InvalidOption.
    """
    _check_picture(content, "content")
    options.check_layers(model.weights.architecture.layers)
    content = content.to(model.device)[None]
    objective = model.objective(styles, options)
    targets = objective.content_targets(content)
    yield from minimize(objective, targets, starting_picture(content, options), options, stop=stop)


def starting_picture(content: Tensor, options: StylizeOptions) -> Tensor:
    """Return the picture to start from, of the content's shape (1, 3, H, W)."""
    match options.init:
        case Init.CONTENT:
            return content
        case Init.NOISE:
            # Drawn on the CPU, so that a seed means the same on every device.
            noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(options.seed))
            return (NOISE_MEAN + NOISE_SPREAD * noise).to(content.device)


def minimize(
    objective: Any,
    targets: dict[str, Tensor],
    start: Tensor,
    options: StylizeOptions,
    *,
    stop: threading.Event | None = None,
) -> Iterator[Iterate]:
    """Yield the iterates of L-BFGS on a scripted objective, from `start` (1, 3, H, W). See `stylize`."""
    optimizer = LBFGS(start, min(options.history, options.iterations))
    best: Iterate | None = None
    loss_before = math.inf
    failures = 0
    for index in range(options.iterations + 1):
        if stop is not None and stop.is_set():
            return
        iterate, products = _evaluate(objective, targets, optimizer, index)
        if iterate is None:
            failures += 1
            if best is None or failures > MAX_RESTARTS:
                break
            optimizer.restart(best.picture[None])
            loss_before = math.inf
            continue
        failures = 0
        if best is None or iterate.loss < best.loss:
            best = iterate
        if products[-1] == 0:  # the squared norm of the gradient
            yield dataclasses.replace(iterate, stop_reason=StopReason.CONVERGED)
            return
        if index == options.iterations:
            yield dataclasses.replace(iterate, stop_reason=StopReason.ITERATIONS)
            return
        yield iterate
        if iterate.loss > OVERSHOOT * loss_before:
            optimizer.back_up()
        else:
            loss_before = iterate.loss
            optimizer.step(products)
    if best is None:
        raise InvalidImage("content gives no finite loss: the objective is NaN or infinite at the starting picture")
    yield dataclasses.replace(best, stop_reason=StopReason.DIVERGED)


def to_pixels(picture: Tensor) -> np.ndarray:
    """Return a picture (3, H, W) as HWC uint8 in [0, 255], RGB, clipped and rounded, on the host."""
    pixels = picture.clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().contiguous().numpy()


def from_pixels(pixels: np.ndarray) -> Tensor:
    """Return HWC uint8 pixels in [0, 255], RGB, as a picture (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def _evaluate(
    objective: Any, targets: dict[str, Tensor], optimizer: LBFGS, index: int
) -> tuple[Iterate | None, np.ndarray]:
    """Evaluate the objective once; return the iterate, None if it is not finite, and the optimizer's products."""
    # Compiling the graph anew for every job and size would cost its first iterations seconds on a GPU, and the
    # kernels, which take the time, are the same.
    with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        losses, gradient = objective.loss_and_gradient(optimizer.x, targets)
    # Everything that the host wants to know crosses at once: one synchronization an iteration.
    on_device = (torch.stack((losses.total, losses.content)), losses.style, optimizer.observe(gradient))
    values = torch.cat(on_device).cpu().double().numpy()
    count = 2 + len(losses.style)
    products = values[count:]
    if not np.isfinite(values).all():
        return None, products
    styles = dict(zip(objective.style_layers, values[2:count].tolist(), strict=True))
    return Iterate(index, optimizer.x[0], float(values[0]), float(values[1]), styles), products


def _check_picture(picture: Tensor, name: str) -> None:
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InvalidImage(f"{name} must have shape (3, H, W), not {tuple(picture.shape)}")
    if min(picture.shape[1:]) < MIN_EDGE_PX:
        raise InvalidImage(
            f"{name} must have at least {MIN_EDGE_PX} px on each edge, not {picture.shape[2]}×{picture.shape[1]}"
        )
