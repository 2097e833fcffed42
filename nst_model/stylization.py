"""Stylization: from a content picture and styles to a sequence of iterates.

Pictures are (3, H, W), RGB, fp32, nominally in [0, 1]; iterates may leave that range a little, which `to_pixels`
clips. The optimization itself is not clipped: that would break L-BFGS's curvature pairs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.color import gray, moments, recolored, with_luminance
from nst_model.descent import Closure, Descent, Iterate, Loops, Recordings
from nst_model.devices import deterministic, lasting_memory_bytes, memory_bytes, resolve_device, resolve_precision
from nst_model.errors import DamagedState, InvalidImage, InvalidOption
from nst_model.losses import POSITIONED, Targets, mixed_targets, style_targets
from nst_model.margin import mirrored, trimmed
from nst_model.memory import Memory, fitting_memory, peak_bytes
from nst_model.network import Trunk, build_trunk
from nst_model.objective import Objective, interpreted
from nst_model.options import (
    BUDGETS,
    STEERABLE,
    Color,
    Init,
    Padding,
    Precision,
    StylizeOptions,
    plain,
    relative,
    steered,
)
from nst_model.regions import Layout, fitting, layer_weights
from nst_model.scales import MIN_EDGE_PX, scaled_edge, scales
from nst_model.state import State
from nst_model.style_file import StyleFile
from nst_model.torchscript import script
from nst_model.weights import FeatureWeights

GRAY, NOISE_SPREAD = 0.5, 0.1

RECORDED_PEAKS = 3
"""What a run takes at most that leaves its recordings, and one that takes them over, as a multiple of the peak of a run
that does neither. The recordings of all scales hold twice the finest's, each having twice the pixels of the one before;
beside them the next run makes its own first evaluations before it takes over."""


@dataclass(frozen=True)
class Style:
    """A style image.

    Attributes:
        picture: (3, H, W) RGB in [0, 1], of the size it has beside the finished picture.
        weight: share of this style, relative to the others' of its region.
        name: whatever tells it from others, for a cache of its targets; empty if they must not be kept.
        region: (H', W') in [0, 1], of the content's proportions: where it belongs. None for wherever no other does.
        mask: (H', W') in [0, 1], of `picture`'s proportions: which part of it makes the style. None for all.
    """

    picture: Tensor
    weight: float = 1.0
    name: str = ""
    region: Tensor | None = None
    mask: Tensor | None = None

    def scaled(self, scale: float) -> Style:
        """Return the style with its picture scaled."""
        size = size_of(self.picture, round(max(self.picture.shape[1:]) * scale))
        return dataclasses.replace(self, picture=of_size(self.picture, size))


@dataclass(frozen=True)
class KeptStyle:
    """A style without its picture: a style file.

    Attributes:
        file: its moments.
        size_px: longer edge that the style has beside the finished picture, pixels; smaller at coarser scales.
        weight: share of this style, relative to the others' of its region.
        region: as of `Style`.
    """

    file: StyleFile
    size_px: int
    weight: float = 1.0
    region: Tensor | None = None

    def scaled(self, scale: float) -> KeptStyle:
        """Return the style at another size."""
        return dataclasses.replace(self, size_px=scaled_edge(self.size_px, scale))

    def check(self, model: FeatureModel, options: StylizeOptions, edges: Sequence[int]) -> None:
        """Raise InvalidOption unless the file can serve a run whose scales have these longer edges."""
        sizes_px = [self.scaled(edge / edges[-1]).size_px for edge in edges]
        weights = model.weights
        self.file.card.check(options, model=weights.name, weights_sha256=weights.sha256, sizes_px=sizes_px)
        for layers in self.file.moments.values():
            for layer, kept in layers.items():
                channels, there = len(weights.convolutions[layer][1]), len(kept["mean"])
                if there != channels:
                    raise InvalidOption(
                        f"style_layers[{layer}]", f"has {channels} channels, and {there} in the style file"
                    )

    def targets(self, options: StylizeOptions) -> LayerTargets:
        """Return what is kept of the style at each style layer."""
        kept = self.file.moments[self.size_px]
        return {layer: kept[layer] for layer in relative(options.style_layers)}


AnyStyle = Style | KeptStyle

LayerTargets = Mapping[str, Targets]
"""Layer → what a style loss keeps of a style there."""

TargetsOf = Callable[[Style, StylizeOptions], LayerTargets]


class FeatureModel:
    """A feature model on a device. Keeps its trunk, so that the next stylization starts at once.

    Args:
        weights: what `load_weights` returns.
        device: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.
        memory_bytes: what a stylization may take of the device's memory; 0 for what it has.
        recordings: what is shared with other feature models on the device, as that is only ever one's at a time; its
            own if None.
    """

    def __init__(
        self,
        weights: FeatureWeights,
        device: str | torch.device = "auto",
        memory_bytes: int = 0,
        recordings: Recordings | None = None,
    ) -> None:
        self.weights = weights
        self._memory_bytes = memory_bytes
        self.device = resolve_device(str(device))
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False  # else convolutions in FP32 keep 10 bits of their 23
        self._trunks: dict[Any, Trunk] = {}
        self._recordings = recordings or Recordings()

    def precision(self, options: StylizeOptions) -> Precision:
        """Return the arithmetic that `options` lead to on this device: FP32 or BF16."""
        return resolve_precision(options.precision, self.device)

    def memory(self, options: StylizeOptions, height: int, width: int) -> Memory:
        """Return how L-BFGS shall remember, for a picture of that size to fit."""
        return fitting_memory(options, height, width, self.weights.architecture, self._limit_bytes(options))

    def loops(self, options: StylizeOptions, height: int, width: int) -> Loops | None:
        """Return what the last run has left for another of the same sizes, None where there is no room for it."""
        peak = peak_bytes(options, height, width, self.weights.architecture)
        model = (self.weights.name, self.weights.sha256)
        kind = (model, height, width, options.first_size_px, options.margin_px, peak, options.deterministic)
        return self._recordings.of(kind, lambda: RECORDED_PEAKS * peak <= self._limit_bytes(options))

    def _limit_bytes(self, options: StylizeOptions) -> int:
        if self._memory_bytes:
            return self._memory_bytes
        # What is free at the moment must not choose what a run is like that shall be the same each time.
        return lasting_memory_bytes(self.device) if options.deterministic else memory_bytes(self.device)

    def trunk(self, options: StylizeOptions) -> Trunk:
        """Return the trunk that yields every layer that the options name."""
        named = {*relative(options.style_layers), *relative(options.content_layers)}
        layers = tuple(layer for layer in self.weights.architecture.layers if layer in named)
        precision = self.precision(options)
        key = (layers, options.pooling, options.padding is Padding.ZEROS, precision)
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
        layers = relative(options.style_layers)
        picture = mirrored(style.picture.to(self.device), options.margin_px)
        weights: dict[str, Tensor] = {}
        if style.mask is not None:
            mask = mirrored(fitting(style.mask.cpu()[None], style.picture.shape[1:]), options.margin_px)
            seen = layer_weights(mask, picture.shape[1:], layers, self.weights.architecture)
            weights = {layer: regions[0].to(self.device) for layer, regions in seen.items()}
        with torch.no_grad():
            features = self.trunk(options)(picture[None])
            return {layer: style_targets(features[layer], options.style_loss, weights.get(layer)) for layer in layers}

    def objective(
        self, styles: Sequence[LayerTargets], options: StylizeOptions, region_shares: Sequence[float] = (1.0,)
    ) -> torch.jit.ScriptModule:
        """Return the scripted objective for each region's style targets: what is minimized."""
        here = [
            {
                # Copies: where a recording reads them, the next run's take their place.
                layer: {name: tensor.to(self.device, copy=True) for name, tensor in at_layer.items()}
                for layer, at_layer in targets.items()
            }
            for targets in styles
        ]
        return script(Objective(self.trunk(options), here, options, region_shares))


def mixed(parts: Sequence[tuple[float, LayerTargets]]) -> dict[str, dict[str, Tensor]]:
    """Return the targets of several styles, (weight, targets) each, mixed by weight.

    Raises ValueError unless there is a weight above 0.
    """
    total = math.fsum(weight for weight, _ in parts)
    if not total > 0:
        raise ValueError("styles must have at least one weight above 0")
    shares = [(weight / total, targets) for weight, targets in parts if weight > 0]
    return {layer: mixed_targets([(share, targets[layer]) for share, targets in shares]) for layer in shares[0][1]}


def size_of(picture: Tensor, longer_edge_px: int) -> tuple[int, int]:
    """Return height and width, at least MIN_EDGE_PX, of a picture (3, H, W) scaled to a longer edge in pixels."""
    scale = longer_edge_px / max(picture.shape[1:])
    height, width = (max(MIN_EDGE_PX, round(edge * scale)) for edge in picture.shape[1:])
    return height, width


def of_size(picture: Tensor, size: Sequence[int]) -> Tensor:
    """Return a picture (C, H, W) scaled to a height and width, clipped to [0, 1] if that changes it."""
    if tuple(picture.shape[1:]) == tuple(size):
        return picture
    scaled: Tensor = F.interpolate(picture[None], size=list(size), mode="bicubic", antialias=True)[0]
    return scaled.clamp(0, 1)


def stylize(
    model: FeatureModel,
    content: Tensor,
    styles: Sequence[AnyStyle],
    options: StylizeOptions,
    *,
    start: Tensor | None = None,
    targets_of: TargetsOf | None = None,
    stop: threading.Event | None = None,
) -> Iterator[Iterate]:
    """Yield the starting picture and then one iterate for each iteration, scale after scale.

    One iteration is one step and one evaluation of the objective and its gradient. The last step of a scale is
    evaluated at the next one. The run ends when all iterations are made, or when it has converged or diverged at the
    last scale: the last iterate says which. When `stop` is set it ends before the next evaluation, without a last word.
    An iterate is never NaN or infinite.

    Args:
        model: the feature model, on its device.
        content: (3, H, W) RGB in [0, 1], already of the size that the result shall have.
        styles: of the sizes they have beside the finished picture; smaller at coarser scales. Those that are compared
            position by position are stretched to the picture's size.
        options: see StylizeOptions. `size_px` and `style_scale` are the caller's affair.
        start: (3, H, W) RGB in [0, 1], the picture that Init.IMAGE starts from; of any size.
        targets_of: in place of `model.style_targets`, to keep what it returns.
        stop: looked at between evaluations, from any thread.

    Raises InvalidImage or InvalidOption.
    """
    yield from Stylization(model, content, styles, options, start=start, targets_of=targets_of, stop=stop)


class Stylization:
    """One run of `stylize`, to be iterated over once; between two iterates it can be kept, or steered.

    The arguments are those of `stylize`. Raises InvalidImage or InvalidOption.

    Attributes:
        options: those in force.
    """

    def __init__(
        self,
        model: FeatureModel,
        content: Tensor,
        styles: Sequence[AnyStyle],
        options: StylizeOptions,
        *,
        start: Tensor | None = None,
        targets_of: TargetsOf | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        _check(content, styles, options, start)
        options.check_layers(model.weights.architecture.layers)
        self.options = options
        self._model = model
        self._start = start
        self._stop = stop
        self._edges = scales(max(content.shape[1:]), min(content.shape[1:]), options.first_size_px)
        self._kept = [style for style in styles if isinstance(style, KeptStyle)]
        self._check_kept(options)
        with self._repeatable():
            self._scene = _Scene(model, content, styles, options, targets_of or model.style_targets)
        self._loops = model.loops(options, *content.shape[1:])  # gives memory back
        self._memory = model.memory(options, *content.shape[1:])
        self._descent = Descent(options, self._pixels(), stop, self._memory, self._loops)

    def __iter__(self) -> Iterator[Iterate]:
        """Yield the iterates that are left; see `stylize`."""
        with self._repeatable():
            descent, scene = self._descent, self._scene
            while not descent.over:
                edge = self._edges[descent.scale]
                if not self._prepared():
                    return
                if not descent.at_work:
                    if descent.picture is None:
                        picture = scene.starting_picture(self._start)
                    else:
                        picture = trimmed(descent.picture[0], self.options.margin_px)
                    descent.begin(mirrored(of_size(picture, scene.size(edge)), self.options.margin_px)[None])
                for iterate in descent.iterates(scene.shown):
                    yield iterate
                    if not descent.over and not self._prepared():
                        return
                if self._stop is not None and self._stop.is_set():
                    return

    @property
    def best(self) -> Iterate | None:
        """The iterate to return if the run ended now, None before the first: see `Descent.best`."""
        return self._descent.best

    @property
    def iterations(self) -> int:
        """Index of the last iterate, if nothing ends the run before."""
        return self._descent.iterations

    def steer(self, **changes: Any) -> None:
        """Change options, any of `options.STEERABLE`, from the next iteration on.

        Raises InvalidOption, and changes nothing, for a value out of bounds or an option that cannot be changed on the
        way.
        """
        options = steered(self.options, changes)
        options.check_layers(self._model.weights.architecture.layers)
        self._check_kept(options)
        anew = any(getattr(options, name) != getattr(self.options, name) for name in STEERABLE - BUDGETS)
        self._descent.steer(options, anew=anew)
        self.options = self._scene.options = options

    def state(self) -> State:
        """Return what `restore` needs to go on exactly from the last iterate, which must not be the run's last.

        Neither the model nor the pictures are in it. None of its tensors is modified later: write it at leisure.
        """
        state = self._descent.state()
        return State(state.tensors, {**state.values, "options": plain(self.options), "edges": self._edges})

    def restore(self, state: State) -> None:
        """Go on, in place of beginning, from the state of a run of the same model, pictures and options.

        Options that were changed on the way are taken over. Raises DamagedState for the state of another run.
        """
        kept = StylizeOptions(**state.values["options"])
        same = {name: getattr(kept, name) for name in STEERABLE}
        if state.values["edges"] != self._edges or dataclasses.replace(self.options, **same) != kept:
            raise DamagedState("the kept state is that of a run with other options or pictures")
        self.options = self._scene.options = kept
        self._descent = Descent(kept, self._pixels(), self._stop, self._memory, self._loops)
        self._descent.restore(state.to(self._model.device))

    def _check_kept(self, options: StylizeOptions) -> None:
        for style in self._kept:
            style.check(self._model, options, self._edges)

    def _pixels(self) -> list[int]:
        return [self._scene.pixels(edge) for edge in self._edges]

    def _repeatable(self) -> AbstractContextManager[None]:
        return deterministic() if self.options.deterministic else contextlib.nullcontext()

    def _prepared(self) -> bool:
        """Make sure that there is an objective for the scale at work; return whether it is still wanted."""
        if self._descent.closure is None:
            first = self._descent.scale == 0 and not self._descent.at_work
            at_content = first and self.options.init is Init.CONTENT
            edge = self._edges[self._descent.scale]
            self._descent.closure = self._scene.closure(edge, at_content=at_content, stop=self._stop)
        return self._descent.closure is not None


class _Scene:
    """What a stylization is of: the content, and the styles where they belong."""

    def __init__(
        self,
        model: FeatureModel,
        content: Tensor,
        styles: Sequence[AnyStyle],
        options: StylizeOptions,
        targets_of: TargetsOf,
    ) -> None:
        self.options = options  # those that may change on the way are read anew at each use
        self._model = model
        self._targets_of = targets_of
        self._photo = content.to(model.device)
        self._luminance_only = options.color is Color.LUMINANCE
        self._content = gray(self._photo) if self._luminance_only else self._photo
        self._styles = [self._recolored(style) for style in styles]
        self._layout = Layout.of(
            [None if style.region is None else fitting(style.region[None], content.shape[1:])[0] for style in styles],
            [style.weight for style in styles],
        )

    def size(self, edge: int) -> tuple[int, int]:
        """Return the height and width of the picture with a longer edge, pixels."""
        return size_of(self._content, edge)

    def pixels(self, edge: int) -> int:
        """Return how many pixels are optimized when the longer edge has so many: the margin's count too."""
        height, width = (length + 2 * self.options.margin_px for length in self.size(edge))
        return height * width

    def closure(self, edge: int, *, at_content: bool, stop: threading.Event | None) -> Closure | None:
        """Return the objective at the scale of a longer edge, pixels; None if it is not wanted any more.

        `at_content` says that the first picture will be the content.
        """
        margin = self.options.margin_px
        here = mirrored(of_size(self._content, self.size(edge)), margin)
        smaller = edge / max(self._content.shape[1:])
        targets = []
        for group in self._layout.members:
            parts = []
            for style in (self._styles[place] for place in group):
                if stop is not None and stop.is_set():
                    return None
                if style.weight > 0:
                    parts.append((style.weight, self._style_targets(style.scaled(smaller), edge)))
            targets.append(mixed(parts))
        if self._layout.regions is None:
            objective, regions = self._model.objective(targets, self.options), None
        else:
            masks = mirrored(fitting(self._layout.regions, self.size(edge)), margin)
            # By area, so that every pixel is painted alike.
            objective = self._model.objective(targets, self.options, masks.mean(dim=(1, 2)).tolist())
            architecture = self._model.weights.architecture
            found = layer_weights(masks, here.shape[1:], objective.style_layers, architecture)
            regions = {layer: weights.to(here.device) for layer, weights in found.items()}
        return Closure(objective, None if at_content else content_targets(objective, here), regions)

    def _style_targets(self, style: AnyStyle, edge: int) -> LayerTargets:
        if isinstance(style, KeptStyle):
            return {
                layer: {name: tensor.to(self._photo.device) for name, tensor in targets.items()}
                for layer, targets in style.targets(self.options).items()
            }
        if self.options.style_loss in POSITIONED:
            style = dataclasses.replace(style, picture=of_size(style.picture, self.size(edge)))
        return self._targets_of(style, self.options)

    def starting_picture(self, given: Tensor | None) -> Tensor:
        """Return the picture to start from, (3, H, W), of the content's shape; `given` is that of Init.IMAGE."""
        picture = self._start(given)
        return gray(picture) if self._luminance_only else picture

    def _start(self, given: Tensor | None) -> Tensor:
        content, options = self._content, self.options
        # Drawn on the CPU, so that a seed means the same on every device.
        noise = torch.randn(content.shape, generator=torch.Generator().manual_seed(options.seed))
        match options.init:
            case Init.CONTENT:
                return content
            case Init.NOISE:
                return (GRAY + NOISE_SPREAD * noise).to(content)
            case Init.GRAY:
                return torch.full_like(content, GRAY)
            case Init.STYLE_STATISTICS:
                mean, covariance = _mixed_moments([style for style in self._styles if isinstance(style, Style)])
                pixels: Tensor = mean[:, None] + torch.linalg.cholesky(covariance) @ noise.flatten(1).double()
                return pixels.view(content.shape).clamp(0, 1).to(content)
            case Init.IMAGE:
                assert given is not None, "checked before"
                return of_size(given.to(content), content.shape[1:])
        raise AssertionError(options.init)

    def shown(self, picture: Tensor) -> Tensor:
        """Return what is shown of an iterate: without the margin, in luminance mode with the photograph's chroma."""
        picture = trimmed(picture, self.options.margin_px).contiguous()
        if not self._luminance_only:
            return picture
        return with_luminance(of_size(self._photo, picture.shape[1:]), picture)

    def _recolored(self, style: AnyStyle) -> AnyStyle:
        if self.options.color is Color.STYLE:
            return style
        assert isinstance(style, Style), "checked before"
        picture = recolored(style.picture.to(self._photo), self._photo, self.options.color)
        return dataclasses.replace(style, picture=picture, name="")


def content_targets(objective: Any, content: Tensor) -> dict[str, Tensor]:
    """Return what a scripted objective compares the picture with, given the content (3, H, W) of the same size."""
    with interpreted():
        targets: dict[str, Tensor] = objective.content_targets(content[None])
    return targets


def _mixed_moments(styles: Sequence[Style]) -> tuple[Tensor, Tensor]:
    """Return the mean (3,) and the covariance (3, 3) of the styles' colours, mixed by weight."""
    total = math.fsum(style.weight for style in styles)
    mean, square = torch.zeros(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    for style in styles:
        own, covariance = moments(style.picture)
        mean += style.weight / total * own
        square += style.weight / total * (covariance + torch.outer(own, own))
    return mean, square - torch.outer(mean, mean)


def to_pixels(picture: Tensor, *, bits: int = 8) -> np.ndarray:
    """Return a picture (3, H, W) as HWC RGB, clipped and rounded, on the host.

    uint8 in [0, 255], or with 16 `bits` uint16 in [0, 65535].
    """
    with _aside(picture.device):
        levels = picture.clamp(0, 1).mul_(2**bits - 1).round_()
        pixels = levels.to(torch.uint8 if bits == 8 else torch.int32)  # torch computes little in uint16
        pixels = pixels.permute(1, 2, 0).contiguous()
        if pixels.is_cuda:
            pixels = torch.empty(pixels.shape, dtype=pixels.dtype, pin_memory=True).copy_(pixels, non_blocking=True)
    return pixels.cpu().numpy().astype(f"uint{bits}", copy=False)


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """On a GPU, do what is in the block after what has been launched, beside what will be, and wait for it alone."""
    if device.type != "cuda":
        yield
        return
    aside = _frame_stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        yield
    aside.synchronize()


@functools.cache
def _frame_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream that pictures leave a device by: always the same, for memory freed on one serves it alone."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


def from_pixels(pixels: np.ndarray) -> Tensor:
    """Return HWC uint8 pixels in [0, 255], RGB, as a picture (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255


def _check(content: Tensor, styles: Sequence[AnyStyle], options: StylizeOptions, start: Tensor | None) -> None:
    _check_picture(content, "content")
    if (options.init is Init.IMAGE) != (start is not None):
        raise InvalidOption("init", "image must come with a picture to start from, and every other init without one")
    if start is not None:
        _check_picture(start, "start")
    if not any(style.weight > 0 for style in styles):
        raise InvalidOption("styles", "must have at least one weight above 0")
    for number, style in enumerate(styles):
        if not 0 <= style.weight < math.inf:
            raise InvalidOption(f"styles[{number}].weight", f"must be finite and at least 0, not {style.weight}")
        _check_mask(style.region, f"styles[{number}].region")
        if isinstance(style, KeptStyle):
            continue
        _check_mask(style.mask, f"styles[{number}].mask")
        if style.mask is not None and options.style_loss in POSITIONED:
            raise InvalidOption(
                "style_loss", f"{options.style_loss} compares position by position, so no style may have a mask"
            )


def _check_mask(mask: Tensor | None, name: str) -> None:
    if mask is None:
        return
    if mask.ndim != 2 or min(mask.shape) < 1:
        raise InvalidImage(f"{name} must have shape (H, W), not {tuple(mask.shape)}")
    if not mask.max() > 0:
        raise InvalidImage(f"{name} is black everywhere, so it selects nothing")


def _check_picture(picture: Tensor, name: str) -> None:
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise InvalidImage(f"{name} must have shape (3, H, W), not {tuple(picture.shape)}")
    if min(picture.shape[1:]) < MIN_EDGE_PX:
        raise InvalidImage(
            f"{name} must have at least {MIN_EDGE_PX} px on each edge, not {picture.shape[2]}×{picture.shape[1]}"
        )
