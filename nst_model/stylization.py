"""Stylization: from a content picture and styles to a sequence of iterates.

Pictures are (3, H, W), RGB, fp32, nominally in [0, 1]; iterates may leave that range a little, which `to_pixels`
clips. The optimization itself is not clipped: that would break L-BFGS's curvature pairs.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.devices import resolve_device, resolve_precision
from nst_model.errors import InvalidImage
from nst_model.lbfgs import LBFGS
from nst_model.losses import Targets, mixed_targets, style_targets
from nst_model.network import MIN_EDGE_PX, Trunk, build_trunk
from nst_model.objective import Losses, Objective, interpreted, script
from nst_model.options import Init, Precision, StylizeOptions, relative
from nst_model.weights import FeatureWeights

NOISE_MEAN, NOISE_SPREAD = 0.5, 0.1
OVERSHOOT = 2.0
"""A step that multiplies the loss by more than this is backed up from."""
MAX_RESTARTS = 5
"""Restarts without a better picture after which a loss that is infinite or NaN again ends the run."""


class StopReason(StrEnum):
    """Why a run ended by itself."""

    ITERATIONS = "iterations"
    DIVERGED = "diverged"
    CONVERGED = "converged"


@dataclass(frozen=True)
class Iterate:
    """One point of the optimization: a picture and the objective at that very picture.

    Attributes:
        index: 0 for the starting picture, 1 after the first step, and so on, through all scales.
        iterations: index of the last iterate, if nothing ends the run before.
        work: part of the run's work that is done, in (0, 1]: an iteration's work is its number of pixels.
        picture: (3, H, W) RGB on the device, of its scale's size, unclipped. Never modified afterwards.
        loss: the objective. Losses of different scales are not comparable.
        content_loss: before its weight.
        tv_loss: the total variation, before its weight.
        style_losses: layer → loss, before any weight.
        stop_reason: why the run ends with this iterate; None while it goes on.
    """

    index: int
    iterations: int
    work: float
    picture: Tensor
    loss: float
    content_loss: float
    tv_loss: float
    style_losses: Mapping[str, float]
    stop_reason: StopReason | None = None


@dataclass(frozen=True)
class Style:
    """A style image.

    Attributes:
        picture: (3, H, W) RGB in [0, 1], of the size it has beside the finished picture.
        weight: share of this style, relative to the others'.
        name: whatever tells it from others, for a cache of its targets.
    """

    picture: Tensor
    weight: float = 1.0
    name: str = ""

    def scaled(self, scale: float) -> Style:
        """Return the style with its picture scaled."""
        return dataclasses.replace(self, picture=resized(self.picture, round(max(self.picture.shape[1:]) * scale)))


LayerTargets = Mapping[str, Targets]
"""Layer → what a style loss keeps of a style there."""

TargetsOf = Callable[[Style, StylizeOptions], LayerTargets]


class FeatureModel:
    """A feature model on a device. Keeps its trunk, so that the next stylization starts at once.

    Args:
        weights: what `load_weights` returns.
        device: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.
    """

    def __init__(self, weights: FeatureWeights, device: str | torch.device = "auto") -> None:
        self.weights = weights
        self.device = resolve_device(str(device))
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # else convolutions in FP32 keep 10 bits of their 23
        self._trunks: dict[Any, Trunk] = {}

    def precision(self, options: StylizeOptions) -> Precision:
        """Return the arithmetic that `options` lead to on this device: FP32 or BF16."""
        return resolve_precision(options.precision, self.device)

    def trunk(self, options: StylizeOptions) -> Trunk:
        """Return the trunk that yields every layer that the options name."""
        named = {*relative(options.style_layers), *relative(options.content_layers)}
        layers = tuple(layer for layer in self.weights.architecture.layers if layer in named)
        precision = self.precision(options)
        key = (layers, options.pooling, options.padding, precision)
        if key not in self._trunks:
            self._trunks.clear()  # one at a time: jobs that alternate are rarer than devices short of memory
            self._trunks[key] = build_trunk(
                self.weights,
                layers,
                pooling=options.pooling,
                padding=options.padding,
                precision=precision,
                device=self.device,
            )
        return self._trunks[key]

    def style_targets(self, style: Style, options: StylizeOptions) -> dict[str, dict[str, Tensor]]:
        """Return what the options' style loss keeps of a style, at each of their style layers."""
        _check_picture(style.picture, "style")
        with torch.no_grad():
            features = self.trunk(options)(style.picture.to(self.device)[None])
            return {
                layer: style_targets(features[layer], options.style_loss) for layer in relative(options.style_layers)
            }

    def objective(self, targets: LayerTargets, options: StylizeOptions) -> torch.jit.ScriptModule:
        """Return the scripted objective for a style's targets: what is minimized, and what can be saved."""
        here = {
            layer: {name: tensor.to(self.device) for name, tensor in at_layer.items()}
            for layer, at_layer in targets.items()
        }
        return script(Objective(self.trunk(options), here, options))


def mixed(parts: Sequence[tuple[float, LayerTargets]]) -> dict[str, dict[str, Tensor]]:
    """Return the targets of several styles, (weight, targets) each, mixed by weight.

    Raises ValueError unless there is a weight above 0.
    """
    total = math.fsum(weight for weight, _ in parts)
    if not total > 0:
        raise ValueError("styles must have at least one weight above 0")
    shares = [(weight / total, targets) for weight, targets in parts if weight > 0]
    return {layer: mixed_targets([(share, targets[layer]) for share, targets in shares]) for layer in shares[0][1]}


def scales(longer_edge_px: int, shorter_edge_px: int, first_px: int) -> list[int]:
    """Return the longer edges of a coarse-to-fine run, pixels, the last being the picture's own.

    They grow by √2 (as in Crowson, 2021). None is smaller than `first_px`, nor so small that the shorter edge would
    have too few pixels for the feature model.
    """
    found = [longer_edge_px]
    while True:
        smaller = round(longer_edge_px / 2 ** (len(found) / 2))
        if smaller < first_px or smaller * shorter_edge_px < MIN_EDGE_PX * longer_edge_px:
            return found[::-1]
        found.append(smaller)


def resized(picture: Tensor, longer_edge_px: int) -> Tensor:
    """Return a picture (3, H, W) scaled to a longer edge in pixels, in [0, 1], at least MIN_EDGE_PX on each edge."""
    if max(picture.shape[1:]) == longer_edge_px:
        return picture
    scale = longer_edge_px / max(picture.shape[1:])
    return _interpolated(picture, [max(MIN_EDGE_PX, round(edge * scale)) for edge in picture.shape[1:]])


def stylize(
    model: FeatureModel,
    content: Tensor,
    styles: Sequence[Style],
    options: StylizeOptions,
    *,
    targets_of: TargetsOf | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Iterate]:
    """Yield the starting picture and then one iterate for each iteration, scale after scale.

    One iteration is one step and one evaluation of the objective and its gradient. Each scale makes
    `options.iterations` of them; the last step of a scale is evaluated at the next one. The run ends when all are
    made, or when it has converged or diverged at the last scale: the last iterate says which. When `stop` is set it
    ends before the next evaluation, without a last word. An iterate is never NaN or infinite.

    Args:
        model: the feature model, on its device.
        content: (3, H, W) RGB in [0, 1], already of the size that the result shall have.
        styles: of the sizes they have beside the finished picture; smaller at coarser scales.
        options: see StylizeOptions. `size_px` and `style_scale` are the caller's affair.
        targets_of: in place of `model.style_targets`, to keep what it returns.
        stop: looked at between evaluations, from any thread.

    Raises InvalidImage or InvalidOption.
    """
    _check_picture(content, "content")
    options.check_layers(model.weights.architecture.layers)
    content = content.to(model.device)
    edges = scales(max(content.shape[1:]), min(content.shape[1:]), options.first_size_px)
    run = _Run(options, stop, [edge**2 for edge in edges])
    picture = starting_picture(resized(content, edges[0]), options)
    for edge in edges:
        here = resized(content, edge)
        parts = []
        for style in styles:
            if stop is not None and stop.is_set():
                return
            parts.append((style.weight, (targets_of or model.style_targets)(style.scaled(edge / edges[-1]), options)))
        objective = model.objective(mixed(parts), options)
        start = picture if picture.shape == here.shape else _interpolated(picture, list(here.shape[1:]))
        at_content = edge == edges[0] and options.init is Init.CONTENT
        closure = _Closure(objective, None if at_content else content_targets(objective, here))
        after = yield from run.scale(closure, start[None])
        if after is None:
            return
        picture = after[0]


def starting_picture(content: Tensor, options: StylizeOptions) -> Tensor:
    """Return the picture to start from, of the content's shape (3, H, W)."""
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
    """Yield the iterates of L-BFGS on a scripted objective, from `start` (1, 3, H, W), at one scale. See `stylize`."""
    yield from _Run(options, stop, [1]).scale(_Closure(objective, targets), start)


def content_targets(objective: Any, content: Tensor) -> dict[str, Tensor]:
    """Return what a scripted objective compares the picture with, given the content (3, H, W) of the same size."""
    with interpreted():
        targets: dict[str, Tensor] = objective.content_targets(content[None])
    return targets


class _Closure:
    """The objective of one scale, as the optimizer calls it.

    Args:
        targets: the objective's `content_targets`; None says that the first picture is the content itself, whose
            targets then need no pass of their own.
    """

    def __init__(self, objective: Any, targets: dict[str, Tensor] | None) -> None:
        self.style_layers: list[str] = objective.style_layers
        self._objective = objective
        self._targets = targets

    def __call__(self, image: Tensor) -> tuple[Losses, Tensor]:
        """Return the losses of a picture (1, 3, H, W), and the gradient."""
        with interpreted():
            if self._targets is None:
                self._targets, losses, gradient = self._objective.begin(image)
            else:
                losses, gradient = self._objective.loss_and_gradient(image, self._targets)
        return losses, gradient


class _Run:
    """One run through all scales: counts iterations and work, and remembers where it stands.

    Args:
        pixels: how much work an iteration at each scale is, in proportion.
    """

    def __init__(self, options: StylizeOptions, stop: threading.Event | None, pixels: Sequence[float]) -> None:
        self._options = options
        self._stop = stop
        self._iterations = options.iterations * len(pixels)
        per_iteration = [edge for edge in pixels for _ in range(options.iterations)] + [pixels[-1]]
        done = np.cumsum(per_iteration)
        self._work = done / done[-1]
        self._index = 0

    def scale(self, closure: _Closure, start: Tensor) -> Generator[Iterate, None, Tensor | None]:
        """Yield one scale's iterates; return the picture (1, 3, H, W) to go on with, None when the run is over."""
        end = self._index + self._options.iterations
        final = end == self._iterations
        optimizer = LBFGS(start, min(self._options.history, self._options.iterations))
        best: Iterate | None = None
        loss_before = math.inf
        failures = 0
        while self._index < end + final:
            if self._stop is not None and self._stop.is_set():
                return None
            iterate, products = self._evaluate(closure, optimizer)
            self._index += 1
            if iterate is None:
                failures += 1
                if best is None or failures > MAX_RESTARTS:
                    break
                optimizer.restart(best.picture[None])
                loss_before = math.inf
                continue
            if best is None or iterate.loss < best.loss:
                best, failures = iterate, 0
            converged = products[-1] == 0  # the squared norm of the gradient
            if final and (converged or iterate.index == end):
                reason = StopReason.CONVERGED if converged else StopReason.ITERATIONS
                yield dataclasses.replace(iterate, work=1.0, stop_reason=reason)
                return None
            yield iterate
            if converged:
                break
            if iterate.loss > OVERSHOOT * loss_before:
                optimizer.back_up()
            else:
                loss_before = iterate.loss
                optimizer.step(products)
        if best is None:
            raise InvalidImage("content gives no finite loss: the objective is NaN or infinite at the starting picture")
        if final:
            reason = StopReason.DIVERGED if failures > MAX_RESTARTS else StopReason.ITERATIONS
            yield dataclasses.replace(best, work=1.0, stop_reason=reason)
            return None
        ended_early = self._index < end
        self._index = end
        return best.picture[None] if ended_early or failures else optimizer.x

    def _evaluate(self, closure: _Closure, optimizer: LBFGS) -> tuple[Iterate | None, np.ndarray]:
        """Evaluate the objective once; return the iterate, None if it is not finite, and the optimizer's products."""
        losses, gradient = closure(optimizer.x)
        # Everything that the host wants to know crosses at once: one synchronization an iteration.
        scalars = torch.stack((losses.total, losses.content, losses.variation))
        values = torch.cat((scalars, losses.style, optimizer.observe(gradient))).cpu().double().numpy()
        count = len(scalars) + len(losses.style)
        products = values[count:]
        if not np.isfinite(values).all():
            return None, products
        total, content, variation = values[: len(scalars)].tolist()
        styles = dict(zip(closure.style_layers, values[len(scalars) : count].tolist(), strict=True))
        work = float(self._work[self._index])
        return Iterate(self._index, self._iterations, work, optimizer.x[0], total, content, variation, styles), products


def to_pixels(picture: Tensor, *, bits: int = 8) -> np.ndarray:
    """Return a picture (3, H, W) as HWC RGB, clipped and rounded, on the host.

    uint8 in [0, 255], or with 16 `bits` uint16 in [0, 65535].
    """
    levels = picture.clamp(0, 1).mul(2**bits - 1).round()
    pixels = levels.to(torch.uint8 if bits == 8 else torch.int32)  # torch computes little in uint16
    return pixels.permute(1, 2, 0).cpu().contiguous().numpy().astype(f"uint{bits}", copy=False)


def from_pixels(pixels: np.ndarray) -> Tensor:
    """Return HWC uint8 pixels in [0, 255], RGB, as a picture (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def _interpolated(picture: Tensor, size: list[int]) -> Tensor:
    """Return a picture (3, H, W) at another size (H', W'), clipped to [0, 1]."""
    return F.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0].clamp(0, 1)


def _check_picture(picture: Tensor, name: str) -> None:
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InvalidImage(f"{name} must have shape (3, H, W), not {tuple(picture.shape)}")
    if min(picture.shape[1:]) < MIN_EDGE_PX:
        raise InvalidImage(
            f"{name} must have at least {MIN_EDGE_PX} px on each edge, not {picture.shape[2]}×{picture.shape[1]}"
        )
