"""Options: bounds, defaults, and what a refusal says."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import pytest

from nst_model import Init, InvalidOption, Pooling, Precision, StylizeOptions
from nst_model.options import PRESETS, bounds_of, default_of, relative

NUMBERS = [option for option in dataclasses.fields(StylizeOptions) if type(default_of(option)) in (int, float)]


@pytest.mark.parametrize("option", NUMBERS, ids=lambda option: option.name)
def test_both_bounds_are_allowed_and_nothing_beyond(option: dataclasses.Field[Any]) -> None:
    """The message names option, bound and value."""
    bounds, kind = bounds_of(option.name), type(default_of(option))
    assert bounds.minimum is not None
    assert bounds.maximum is not None
    for allowed in (bounds.minimum, bounds.maximum):
        assert getattr(StylizeOptions(**{option.name: kind(allowed)}), option.name) == allowed
    step = 1 if kind is int else 0.001
    with pytest.raises(InvalidOption, match=f"{option.name} must be at least {bounds.minimum:g}.*, not"):
        StylizeOptions(**{option.name: kind(bounds.minimum - step)})
    with pytest.raises(InvalidOption, match=f"{option.name} must be at most .*, not"):
        StylizeOptions(**{option.name: kind(bounds.maximum + step)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, not 0"),
        ({"iterations": 10**9}, "iterations must be at most 10000, not 1000000000"),
        ({"iterations": 2.5}, "iterations must be a whole number, not 2.5"),
        ({"size_px": 15}, "size_px must be at least 16 px, not 15"),
        ({"style_weight": math.nan}, "style_weight must be finite, not nan"),
        ({"content_weight": math.inf}, "content_weight must be finite, not inf"),
        ({"style_weight": "much"}, "style_weight must be a number, not 'much'"),
        ({"seed": True}, "seed must be a number, not True"),
        ({"init": "photo"}, "init must be one of content, noise, gray, style_statistics, image, not 'photo'"),
        ({"content_weight": 0, "style_weight": 0}, "must not both be 0"),
        ({"style_layers": {"relu1_1": math.nan}}, r"style_layers\[relu1_1\] must be finite, not nan"),
        ({"style_layers": {"relu1_1": -1}}, r"style_layers\[relu1_1\] must be at least 0, not -1"),
        ({"style_layers": {"relu1_1": 0}}, "style_layers must have at least one weight above 0"),
        ({"content_layers": {}}, "content_layers must have at least one weight above 0"),
        ({"content_layers": ["relu4_2"]}, "content_layers must map layer names to weights"),
    ],
)
def test_refusal_names_option_bound_and_value(options: dict[str, Any], message: str) -> None:
    """What a person needs to mend it."""
    with pytest.raises(InvalidOption, match=message):
        StylizeOptions(**options)


def test_choices_are_taken_by_name() -> None:
    """A string becomes its enum."""
    options = StylizeOptions(init="noise", pooling="average", precision="bf16")
    assert (options.init, options.pooling, options.precision) == (Init.NOISE, Pooling.AVERAGE, Precision.BF16)


def test_options_cannot_be_changed() -> None:
    """Neither a field nor a weight inside one."""
    options = StylizeOptions()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.seed = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        options.style_layers["relu1_1"] = 5  # type: ignore[index]


def test_options_cross_a_process_border() -> None:
    """Pickled and back they are equal, and still read-only."""
    options = StylizeOptions(style_layers={"relu3_1": 2}, init="noise")
    copy = pickle.loads(pickle.dumps(options))
    assert copy == options
    with pytest.raises(TypeError):
        copy.style_layers["relu1_1"] = 5


def test_layer_weights_are_relative() -> None:
    """Divided by their sum; a weight of 0 leaves the layer out."""
    assert relative({"a": 3, "b": 1, "c": 0}) == {"a": 0.75, "b": 0.25}


def test_layers_have_one_order() -> None:
    """However they are given: a dictionary's order, which the wire does not keep, must not reach the sums."""
    one, other = (StylizeOptions(style_layers=dict(layers)) for layers in ([("b", 1), ("a", 2)], [("a", 2), ("b", 1)]))
    assert list(one.style_layers) == list(other.style_layers) == ["a", "b"]


def test_presets_are_pinned() -> None:
    """The defaults, which are those of `fine`, and what each preset changes in them are a promise."""
    values = {field.name: getattr(StylizeOptions(), field.name) for field in dataclasses.fields(StylizeOptions)}
    assert values == {
        "size_px": 512,
        "iterations": 20,
        "content_weight": 0.025,
        "style_weight": 1.0,
        "content_layers": {"relu4_2": 1.0},
        "style_layers": {"relu1_1": 256.0, "relu2_1": 64.0, "relu3_1": 16.0, "relu4_1": 4.0, "relu5_1": 1.0},
        "style_scale": 1.0,
        "init": "content",
        "seed": 0,
        "pooling": "max",
        "precision": "auto",
        "history": 20,
        "preset": "fine",
        "style_loss": "wasserstein",
        "content_loss": "squared_error",
        "first_size_px": 128,
        "tv_weight": 20.0,
        "padding": "mirror",
        "scale_iterations": (),
        "optimizer": "lbfgs",
        "learning_rate": 0.02,
        "averaging": 0.0,
        "color": "style",
        "tv_norm": "l2",
        "laplacian_weight": 0.0,
        "deterministic": False,
        "curvature": "spectral",
        "plateau": 0.0,
    }
    assert {preset: dict(found.values) for preset, found in PRESETS.items()} == {
        "fine": {},
        "gatys": {
            "iterations": 200,
            "content_weight": 1.0,
            "style_weight": 30.0,
            "style_layers": {"relu1_1": 64.0, "relu2_1": 16.0, "relu3_1": 4.0, "relu4_1": 1.0, "relu5_1": 1.0},
            "pooling": "average",
            "history": 50,
            "style_loss": "gram",
            "first_size_px": 4096,
            "tv_weight": 0.0,
            "padding": "zeros",
        },
        "preview": {"size_px": 256, "iterations": 10},
    }


def test_an_option_overrides_its_preset() -> None:
    """A preset is a starting point."""
    options = StylizeOptions.of("gatys", iterations=3, style_loss="covariance")
    assert (options.preset, options.iterations, options.style_loss, options.tv_weight) == ("gatys", 3, "covariance", 0)
    with pytest.raises(InvalidOption, match="preset must be one of fine, gatys, preview, not 'best'"):
        StylizeOptions.of("best")
