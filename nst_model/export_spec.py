"""What can be exported: which graph of which model, in which format. Free of torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from enum import StrEnum

from nst_model.errors import InvalidOption
from nst_model.models import DEFAULT_MODEL, ModelCard, model_card
from nst_model.options import Padding, Pooling

DEEPEST_FEATURES = "relu5_1"
STYLE_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
CONTENT_LAYERS = ("relu4_2",)


class ExportGraph(StrEnum):
    """What an exported graph computes."""

    FEATURES = "features"
    GRAMS = "grams"
    OBJECTIVE = "objective"
    CLOSURE = "closure"


class ExportFormat(StrEnum):
    """The file format of an exported graph."""

    TORCHSCRIPT = "torchscript"
    ONNX = "onnx"
    PT2 = "pt2"

    @property
    def suffix(self) -> str:
        """What file names end in."""
        return {"torchscript": ".pt", "onnx": ".onnx", "pt2": ".pt2"}[self.value]


class ExportPrecision(StrEnum):
    """How an exported graph keeps its weights; it takes, computes and returns fp32 either way."""

    FP32 = "fp32"
    FP16 = "fp16"


LAYERS_OF = {
    ExportGraph.FEATURES: ("layers",),
    ExportGraph.GRAMS: ("style_layers",),
    ExportGraph.OBJECTIVE: ("content_layers", "style_layers"),
    ExportGraph.CLOSURE: ("content_layers", "style_layers"),
}
"""Which layers each graph is asked for, by field of ExportSpec."""


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """What to export. Raises InvalidOption or UnknownModel; once made, every layer that the graph has is named.

    Attributes:
        model: name of the feature model.
        graph: what it computes.
        format: of the file.
        precision: of the weights in it; FP16 in ONNX only.
        layers: of `features`; empty for all up to relu5_1.
        content_layers: of `objective` and `closure`; empty for relu4_2.
        style_layers: of `grams`, `objective` and `closure`; empty for the five of Gatys et al. (2016).
        pooling: how the model halves its resolution.
        padding: what lies beyond the edge. MIRROR is for a caller who mirrors the picture by 16 px first.
    """

    model: str = DEFAULT_MODEL
    graph: ExportGraph = ExportGraph.CLOSURE
    format: ExportFormat = ExportFormat.ONNX
    precision: ExportPrecision = ExportPrecision.FP32
    layers: tuple[str, ...] = ()
    content_layers: tuple[str, ...] = ()
    style_layers: tuple[str, ...] = ()
    pooling: Pooling = Pooling.MAX
    padding: Padding = Padding.ZEROS

    def __post_init__(self) -> None:
        card = model_card(self.model)
        choices: tuple[tuple[str, type[StrEnum]], ...] = (
            ("graph", ExportGraph),
            ("format", ExportFormat),
            ("precision", ExportPrecision),
            ("pooling", Pooling),
            ("padding", Padding),
        )
        for name, kind in choices:
            object.__setattr__(self, name, _checked_choice(name, getattr(self, name), kind))
        if self.precision is ExportPrecision.FP16 and self.format is not ExportFormat.ONNX:
            raise InvalidOption("precision", f"must be fp32 for the format {self.format}; only onnx has fp16")
        for name in ("layers", "content_layers", "style_layers"):
            object.__setattr__(self, name, self._checked_layers(name, card))

    @property
    def file_name(self) -> str:
        """A name for the file that says what is in it."""
        return f"{self.model}-{self.graph}-{self.pooling}-{self.padding}-{self.precision}{self.format.suffix}"

    def _checked_layers(self, name: str, card: ModelCard) -> tuple[str, ...]:
        given = tuple(getattr(self, name))
        there = card.architecture.layers
        if name not in LAYERS_OF[self.graph]:
            if given:
                takes = " and ".join(LAYERS_OF[self.graph])
                raise InvalidOption(name, f"must be empty for the graph {self.graph}, which takes {takes}")
            return ()
        for layer in given:
            if layer not in there:
                close = difflib.get_close_matches(str(layer), there, n=1)
                hint = f"did you mean {close[0]}? It has " if close else "it has "
                raise InvalidOption(f"{name}[{layer}]", f"is no layer of {self.model}; {hint}{', '.join(there)}")
        if len(set(given)) != len(given):
            raise InvalidOption(name, f"must name each layer once, not {', '.join(given)}")
        default = {
            "layers": there[: there.index(DEEPEST_FEATURES) + 1],
            "content_layers": CONTENT_LAYERS,
            "style_layers": STYLE_LAYERS,
        }
        # In one order, whatever order they were named in: the same content is the same file.
        return tuple(layer for layer in there if layer in (given or default[name]))


def _checked_choice(name: str, value: str, choices: type[StrEnum]) -> StrEnum:
    try:
        return choices(value)
    except ValueError:
        raise InvalidOption(name, f"must be one of {', '.join(choices)}, not {value!r}") from None
