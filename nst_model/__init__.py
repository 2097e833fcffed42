"""The numeric core: neural style transfer by optimization (Gatys, Ecker and Bethge, CVPR 2016).

Tensors in, tensors out. Public names are loaded when first used, so that reading the options or the list of models
costs no import of torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nst_model.descent import Iterate, StopReason
    from nst_model.devices import available_devices, resolve_device, resolve_precision
    from nst_model.exports import export, load_graph, write_artifact
    from nst_model.losses import gram
    from nst_model.objective import Losses, Objective
    from nst_model.preparation import prepare_style
    from nst_model.style_file import StyleFile
    from nst_model.stylization import FeatureModel, KeptStyle, Style, from_pixels, stylize, to_pixels
    from nst_model.torchscript import script
    from nst_model.weights import FeatureWeights, fetch, load_weights

from nst_model.artifact import read_description
from nst_model.errors import (
    DeviceUnavailable,
    InvalidArtifact,
    InvalidImage,
    InvalidOption,
    NstModelError,
    UnknownModel,
    WeightsCorrupt,
    WeightsUnavailable,
)
from nst_model.export_spec import ExportFormat, ExportGraph, ExportPrecision, ExportSpec
from nst_model.models import CARDS, DEFAULT_MODEL, ModelCard, model_card
from nst_model.options import (
    Color,
    ContentLoss,
    Curvature,
    Init,
    Optimizer,
    Padding,
    Pooling,
    Precision,
    Preset,
    StyleLoss,
    StylizeOptions,
    TvNorm,
)
from nst_model.style_card import StyleCard, StyleSource

_LAZY = {
    "available_devices": "devices",
    "resolve_device": "devices",
    "resolve_precision": "devices",
    "Losses": "objective",
    "Objective": "objective",
    "gram": "losses",
    "export": "exports",
    "load_graph": "exports",
    "write_artifact": "exports",
    "prepare_style": "preparation",
    "script": "torchscript",
    "StyleFile": "style_file",
    "KeptStyle": "stylization",
    "FeatureModel": "stylization",
    "Iterate": "descent",
    "StopReason": "descent",
    "Style": "stylization",
    "from_pixels": "stylization",
    "stylize": "stylization",
    "to_pixels": "stylization",
    "FeatureWeights": "weights",
    "fetch": "weights",
    "load_weights": "weights",
}

__all__ = [
    "CARDS",
    "DEFAULT_MODEL",
    "Color",
    "ContentLoss",
    "Curvature",
    "DeviceUnavailable",
    "ExportFormat",
    "ExportGraph",
    "ExportPrecision",
    "ExportSpec",
    "FeatureModel",
    "FeatureWeights",
    "Init",
    "InvalidArtifact",
    "InvalidImage",
    "InvalidOption",
    "Iterate",
    "KeptStyle",
    "Losses",
    "ModelCard",
    "NstModelError",
    "Objective",
    "Optimizer",
    "Padding",
    "Pooling",
    "Precision",
    "Preset",
    "StopReason",
    "Style",
    "StyleCard",
    "StyleFile",
    "StyleLoss",
    "StyleSource",
    "StylizeOptions",
    "TvNorm",
    "UnknownModel",
    "WeightsCorrupt",
    "WeightsUnavailable",
    "available_devices",
    "export",
    "fetch",
    "from_pixels",
    "gram",
    "load_graph",
    "load_weights",
    "model_card",
    "prepare_style",
    "read_description",
    "resolve_device",
    "resolve_precision",
    "script",
    "stylize",
    "to_pixels",
    "write_artifact",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"nst_model.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
