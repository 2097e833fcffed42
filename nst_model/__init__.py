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
    from nst_model.losses import gram
    from nst_model.objective import Losses, Objective, load_artifact, save_artifact, script
    from nst_model.stylization import FeatureModel, Style, from_pixels, stylize, to_pixels
    from nst_model.weights import FeatureWeights, fetch, load_weights

from nst_model.errors import (
    DeviceUnavailable,
    InvalidImage,
    InvalidOption,
    NstModelError,
    UnknownModel,
    WeightsCorrupt,
    WeightsUnavailable,
)
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

_LAZY = {
    "available_devices": "devices",
    "resolve_device": "devices",
    "resolve_precision": "devices",
    "Losses": "objective",
    "Objective": "objective",
    "gram": "losses",
    "load_artifact": "objective",
    "save_artifact": "objective",
    "script": "objective",
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
    "FeatureModel",
    "FeatureWeights",
    "Init",
    "InvalidImage",
    "InvalidOption",
    "Iterate",
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
    "StyleLoss",
    "StylizeOptions",
    "TvNorm",
    "UnknownModel",
    "WeightsCorrupt",
    "WeightsUnavailable",
    "available_devices",
    "fetch",
    "from_pixels",
    "gram",
    "load_artifact",
    "load_weights",
    "model_card",
    "resolve_device",
    "resolve_precision",
    "save_artifact",
    "script",
    "stylize",
    "to_pixels",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"nst_model.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
