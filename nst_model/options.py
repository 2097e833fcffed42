"""The options of one stylization: defaults, bounds and meaning, defined here and nowhere else.

The contract's `StylizeOptions` message owns the names and wire types; a test holds the two against each other.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from nst_model.errors import InvalidOption

MAX_WEIGHT = 1e9
MAX_LIST = 100
MARGIN_PX = 16
"""Width of the margin of Padding.MIRROR."""


BUDGETS = frozenset({"iterations", "scale_iterations"})
STEERABLE = BUDGETS | {
    "content_weight",
    "style_weight",
    "tv_weight",
    "laplacian_weight",
    "content_layers",
    "style_layers",
}
"""Options that may change while a run goes on."""


class Preset(StrEnum):
    """A starting point that every other option overrides."""

    FINE = "fine"
    GATYS = "gatys"
    PREVIEW = "preview"


class Init(StrEnum):
    """The picture that the optimization starts from."""

    CONTENT = "content"
    NOISE = "noise"
    GRAY = "gray"
    STYLE_STATISTICS = "style_statistics"
    IMAGE = "image"


class StyleLoss(StrEnum):
    """Which statistic of the features makes a style."""

    GRAM = "gram"
    COVARIANCE = "covariance"
    MEAN_STD = "mean_std"
    WASSERSTEIN = "wasserstein"
    SLICED = "sliced"
    DIRECT = "direct"
    CROSS = "cross"


MOMENTS = frozenset({StyleLoss.GRAM, StyleLoss.COVARIANCE, StyleLoss.MEAN_STD, StyleLoss.WASSERSTEIN})
"""Style losses that need of a style no more than its features' mean and Gram matrix."""


class ContentLoss(StrEnum):
    """How features are compared with the content's."""

    SQUARED_ERROR = "squared_error"
    INNER_PRODUCT = "inner_product"
    COSINE = "cosine"
    SELF_SIMILARITY = "self_similarity"


class Optimizer(StrEnum):
    """What minimizes the objective."""

    LBFGS = "lbfgs"
    ADAM = "adam"


class Curvature(StrEnum):
    """What L-BFGS takes for the curvature in directions that its pairs say nothing of."""

    SPECTRAL = "spectral"
    UNIFORM = "uniform"


class Color(StrEnum):
    """Where the picture's colours come from."""

    STYLE = "style"
    LUMINANCE = "luminance"
    CHOLESKY = "cholesky"
    PCA = "pca"
    SYMMETRIC = "symmetric"
    HISTOGRAM = "histogram"


class TvNorm(StrEnum):
    """Which norm of the differences of neighbouring pixels the total variation takes."""

    L2 = "l2"
    L1 = "l1"


class Padding(StrEnum):
    """What lies beyond the picture's edge."""

    ZEROS = "zeros"
    REPLICATE = "replicate"
    MIRROR = "mirror"


class Pooling(StrEnum):
    """How the feature model halves its resolution between blocks."""

    MAX = "max"
    AVERAGE = "average"
    L2 = "l2"


class Precision(StrEnum):
    """Arithmetic of the feature model; statistics and losses are always fp32."""

    AUTO = "auto"
    FP32 = "fp32"
    BF16 = "bf16"


LayerWeights = Mapping[str, float]
"""Layer name to relative weight. Only the proportions matter: weights are divided by their sum."""


@dataclass(frozen=True)
class Bounds:
    """What an option may be: `minimum` and `maximum` are inclusive and None for choices."""

    description: str
    minimum: float | None = None
    maximum: float | None = None
    unit: str = ""


def _option(
    default: Any, description: str, minimum: float | None = None, maximum: float | None = None, unit: str = ""
) -> Any:
    bounds = Bounds(description, minimum, maximum, unit)
    if isinstance(default, Mapping):
        frozen = MappingProxyType(dict(default))
        return field(default_factory=lambda: frozen, metadata={"bounds": bounds})
    return field(default=default, metadata={"bounds": bounds})


FINE_LAYERS = {"relu1_1": 256.0, "relu2_1": 64.0, "relu3_1": 16.0, "relu4_1": 4.0, "relu5_1": 1.0}
GATYS_LAYERS = {"relu1_1": 64.0, "relu2_1": 16.0, "relu3_1": 4.0, "relu4_1": 1.0, "relu5_1": 1.0}


@dataclass(frozen=True, kw_only=True)
class StylizeOptions:
    """Options of one stylization. Raises InvalidOption if any is outside its bounds.

    The defaults are those of Preset.FINE; `StylizeOptions.of` starts from another preset.
    """

    size_px: int = _option(
        512, "Longer edge of the picture; the shorter one follows from the content image's shape.", 16, 4096, "px"
    )
    iterations: int = _option(
        20, "Iterations of the optimizer at each scale, each one evaluation of the loss and its gradient.", 1, 10_000
    )
    content_weight: float = _option(0.025, "Weight of the content loss.", 0, MAX_WEIGHT)
    style_weight: float = _option(1.0, "Weight of the style loss.", 0, MAX_WEIGHT)
    content_layers: LayerWeights = _option({"relu4_2": 1.0}, "Layers that the content is compared at.", 0, MAX_WEIGHT)
    style_layers: LayerWeights = _option(FINE_LAYERS, "Layers that the style is compared at.", 0, MAX_WEIGHT)
    style_scale: float = _option(1.0, "Longer edge of the style images relative to the picture's.", 0.1, 4)
    init: Init = _option(Init.CONTENT, "The picture that the optimization starts from.")
    seed: int = _option(0, "Seed of everything random.", 0, 2**32 - 1)
    pooling: Pooling = _option(Pooling.MAX, "How the feature model halves its resolution.")
    precision: Precision = _option(Precision.AUTO, "Arithmetic of the feature model.")
    history: int = _option(20, "Number of curvature pairs that L-BFGS remembers.", 1, 1000)
    preset: Preset = _option(Preset.FINE, "The starting point that the other options override.")
    style_loss: StyleLoss = _option(StyleLoss.WASSERSTEIN, "Which statistic of the features makes a style.")
    content_loss: ContentLoss = _option(ContentLoss.SQUARED_ERROR, "How features are compared with the content's.")
    first_size_px: int = _option(
        128, "Smallest longer edge to begin at; sizes grow by √2 from there to size_px.", 16, 4096, "px"
    )
    tv_weight: float = _option(20.0, "Weight of the total variation: how smooth the picture is.", 0, MAX_WEIGHT)
    padding: Padding = _option(Padding.MIRROR, "What lies beyond the picture's edge.")
    scale_iterations: tuple[int, ...] = _option(
        (),
        "Iterations at each scale from the coarsest on, in place of `iterations`; the last serves those left.",
        1,
        10_000,
    )
    optimizer: Optimizer = _option(Optimizer.LBFGS, "What minimizes the objective.")
    learning_rate: float = _option(0.02, "Step size of Adam, in units of the picture's range.", 1e-5, 1)
    averaging: float = _option(
        0.0, "Decay of the running average of the iterates that is shown and returned; 0 for none.", 0, 0.999
    )
    color: Color = _option(Color.STYLE, "Where the picture's colours come from.")
    tv_norm: TvNorm = _option(TvNorm.L2, "Which norm of the pixels' differences the total variation takes.")
    laplacian_weight: float = _option(
        0.0, "Weight of the Laplacian loss: how closely the content's outlines are kept.", 0, MAX_WEIGHT
    )
    deterministic: bool = _option(False, "The same bytes each time on the same machine, GPUs included.")
    curvature: Curvature = _option(
        Curvature.SPECTRAL, "What L-BFGS takes for the curvature in directions that its pairs say nothing of."
    )
    plateau: float = _option(
        0.0, "A scale ends early when ten iterations lower the loss by less than this part of it; 0 for never.", 0, 0.5
    )

    @classmethod
    def of(cls, preset: Preset | str = Preset.FINE, **given: Any) -> StylizeOptions:
        """Return the options of a preset, with those `given` in place of its own. Raises InvalidOption."""
        chosen = _checked_choice("preset", preset, Preset)
        return cls(**{**PRESETS[Preset(chosen)].values, "preset": chosen, **given})

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = _checked(option, getattr(self, option.name))
            object.__setattr__(self, option.name, value)
        if self.content_weight == 0 and self.style_weight == 0:
            raise InvalidOption("style_weight", "and content_weight must not both be 0: nothing would be optimized")

    @property
    def margin_px(self) -> int:
        """Width of what is optimized beyond each edge of the picture and then cut off."""
        return MARGIN_PX if self.padding is Padding.MIRROR else 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Read-only mappings cannot be pickled.
        return _from_values, (plain(self),)

    def check_layers(self, layers: tuple[str, ...]) -> None:
        """Raise InvalidOption unless every named layer is one of a feature model's `layers`."""
        for name in ("content_layers", "style_layers"):
            for layer in getattr(self, name):
                if layer not in layers:
                    close = difflib.get_close_matches(layer, layers, n=1)
                    hint = f"did you mean {close[0]}? It has " if close else "it has "
                    raise InvalidOption(
                        f"{name}[{layer}]", f"is no layer of the feature model; {hint}{', '.join(layers)}"
                    )


@dataclass(frozen=True)
class PresetValues:
    """What a preset is for, and what it changes in the defaults."""

    description: str
    values: Mapping[str, Any]


PRESETS: Mapping[Preset, PresetValues] = MappingProxyType(
    {
        Preset.FINE: PresetValues(
            "The best pictures: Wasserstein distance of the features' means and covariances, from coarse to fine.", {}
        ),
        Preset.GATYS: PresetValues(
            "Gatys, Ecker and Bethge (2016): Gram matrices and squared error, at one scale.",
            {
                "iterations": 200,
                "content_weight": 1.0,
                "style_weight": 30.0,
                "style_layers": GATYS_LAYERS,
                "pooling": Pooling.AVERAGE,
                "history": 50,
                "style_loss": StyleLoss.GRAM,
                "first_size_px": 4096,
                "tv_weight": 0.0,
                "padding": Padding.ZEROS,
            },
        ),
        Preset.PREVIEW: PresetValues("A look in seconds at what `fine` will make.", {"size_px": 256, "iterations": 10}),
    }
)


def _from_values(values: dict[str, Any]) -> StylizeOptions:
    return StylizeOptions(**values)


def bounds_of(name: str) -> Bounds:
    """Return what option `name` may be. Raises KeyError if there is none."""
    option = StylizeOptions.__dataclass_fields__[name]
    bounds = option.metadata["bounds"]
    assert isinstance(bounds, Bounds)
    return bounds


def default_of(option: dataclasses.Field[Any]) -> Any:
    """Return the default of one field of StylizeOptions."""
    if option.default_factory is not dataclasses.MISSING:
        return option.default_factory()
    return option.default


def relative(weights: LayerWeights) -> dict[str, float]:
    """Return the weights divided by their sum, without the layers whose weight is 0."""
    total = math.fsum(weights.values())
    return {layer: weight / total for layer, weight in weights.items() if weight > 0}


def plain(options: StylizeOptions) -> dict[str, Any]:
    """Return the options by name, as JSON can hold them; `StylizeOptions` takes them back."""
    values = {option.name: getattr(options, option.name) for option in dataclasses.fields(options)}
    return {
        name: dict(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
    }


def steered(options: StylizeOptions, changes: Mapping[str, Any]) -> StylizeOptions:
    """Return options with changes, all of them STEERABLE. Raises InvalidOption."""
    for name in sorted(changes.keys() - STEERABLE):
        raise InvalidOption(name, f"cannot be changed while a job runs; these can: {', '.join(sorted(STEERABLE))}")
    return dataclasses.replace(options, **changes)


def _checked(option: dataclasses.Field[Any], value: Any) -> Any:
    bounds: Bounds = option.metadata["bounds"]
    default = default_of(option)
    if isinstance(default, StrEnum):
        return _checked_choice(option.name, value, type(default))
    if isinstance(default, Mapping):
        return _checked_weights(option.name, value, bounds)
    if isinstance(default, tuple):
        return _checked_whole_numbers(option.name, value, bounds)
    if isinstance(default, bool):
        return _checked_truth(option.name, value)
    return _checked_number(option.name, value, type(default), bounds)


def _checked_choice(name: str, value: Any, choices: type[StrEnum]) -> StrEnum:
    try:
        return choices(value)
    except ValueError:
        raise InvalidOption(name, f"must be one of {', '.join(choices)}, not {value!r}") from None


def _checked_weights(name: str, value: Any, bounds: Bounds) -> LayerWeights:
    if not isinstance(value, Mapping):
        raise InvalidOption(name, f"must map layer names to weights, not {value!r}")
    # In one order, whatever order they came in: sums of losses must not depend on it.
    weights = {
        str(layer): _checked_number(f"{name}[{layer}]", value[layer], float, bounds) for layer in sorted(value, key=str)
    }
    if not math.fsum(weights.values()) > 0:
        raise InvalidOption(name, "must have at least one weight above 0")
    return MappingProxyType(weights)


def _checked_whole_numbers(name: str, value: Any, bounds: Bounds) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise InvalidOption(name, f"must be a list of numbers, not {value!r}")
    if len(value) > MAX_LIST:
        raise InvalidOption(name, f"must have at most {MAX_LIST} entries, not {len(value)}")
    return tuple(_checked_number(f"{name}[{place}]", entry, int, bounds) for place, entry in enumerate(value))


def _checked_truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidOption(name, f"must be true or false, not {value!r}")
    return value


def _checked_number(name: str, value: Any, kind: type, bounds: Bounds) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidOption(name, f"must be a number, not {value!r}")
    if not math.isfinite(value):
        raise InvalidOption(name, f"must be finite, not {value}")
    if kind is int and value != int(value):
        raise InvalidOption(name, f"must be a whole number, not {value}")
    assert bounds.minimum is not None
    assert bounds.maximum is not None
    unit = f" {bounds.unit}" if bounds.unit else ""
    if value < bounds.minimum:
        raise InvalidOption(name, f"must be at least {bounds.minimum:g}{unit}, not {value}")
    if value > bounds.maximum:
        raise InvalidOption(name, f"must be at most {bounds.maximum:.10g}{unit}, not {value}")
    return kind(value)
