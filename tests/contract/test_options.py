"""Options are defined once: the proto owns names and wire types, `nst_model.options` defaults, bounds and meaning."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from importlib import resources
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FieldDescriptor

from nst.v1 import options_pb2
from nst_model.options import Preset, StylizeOptions, bounds_of, default_of
from nst_server import convert

FIELDS = {field.name: field for field in options_pb2.StylizeOptions.DESCRIPTOR.fields}
OPTIONS = {option.name: option for option in dataclasses.fields(StylizeOptions)}
WIRE_TYPES = {
    bool: {FieldDescriptor.TYPE_BOOL},
    int: {FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_UINT32},
    float: {FieldDescriptor.TYPE_DOUBLE},
}


@pytest.fixture(scope="module")
def comments() -> dict[str, str]:
    """Every field's comment in StylizeOptions, as one line."""
    data = resources.files("nst.v1").joinpath("contract.binpb").read_bytes()
    file = next(
        file for file in descriptor_pb2.FileDescriptorSet.FromString(data).file if file.name == "nst/v1/options.proto"
    )
    message = [message.name for message in file.message_type].index("StylizeOptions")
    found = {}
    for location in file.source_code_info.location:
        if tuple(location.path[:2]) == (4, message) and len(location.path) == 4 and location.path[2] == 2:
            name = file.message_type[message].field[location.path[3]].name
            found[name] = " ".join(location.leading_comments.split())
    return found


def test_the_same_names_on_both_sides() -> None:
    """A field in only one of the two is an error."""
    assert set(FIELDS) == set(OPTIONS)


@pytest.mark.parametrize("name", OPTIONS)
def test_wire_type_fits(name: str) -> None:
    """Numbers are optional scalars, so that 0 and "not given" differ; choices are enums with the same names."""
    field, default = FIELDS[name], default_of(OPTIONS[name])
    if isinstance(default, StrEnum):
        prefix = field.enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
        names = {value.name.removeprefix(prefix).lower() for value in field.enum_type.values if value.number}
        assert names == set(type(default))
    elif isinstance(default, Mapping):
        entry = field.message_type.fields_by_name
        assert (entry["key"].type, entry["value"].type) == (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_DOUBLE)
    elif isinstance(default, tuple):
        assert field.is_repeated
        assert field.type == FieldDescriptor.TYPE_INT32
    else:
        assert field.has_presence
        assert field.type in WIRE_TYPES[type(default)]


@pytest.mark.parametrize("name", OPTIONS)
def test_comment_states_default_and_range(name: str, comments: dict[str, str]) -> None:
    """The comment is the reference that a developer in another language reads; its facts are the dataclass's."""
    default, bounds = default_of(OPTIONS[name]), bounds_of(name)
    assert f"Default: {_written(default)}." in comments[name]
    if bounds.minimum is not None and bounds.maximum is not None:
        assert f"Range: {bounds.minimum:g} to {_written(bounds.maximum)}." in comments[name]


def test_given_values_arrive_and_others_keep_their_defaults() -> None:
    """Zero is a value; an absent field is not."""
    message = options_pb2.StylizeOptions(
        seed=0, content_weight=0, init=options_pb2.INIT_NOISE, style_layers={"relu2_2": 2.0}
    )
    assert convert.options_from_proto(message) == StylizeOptions(
        content_weight=0, init="noise", style_layers={"relu2_2": 2}
    )


def test_every_option_survives_the_round_trip() -> None:
    """Values other than the defaults, there and back."""
    changed = StylizeOptions(
        size_px=100,
        iterations=3,
        content_weight=2.5,
        style_weight=7,
        content_layers={"relu1_1": 1},
        style_layers={"relu2_1": 1, "relu3_1": 2},
        style_scale=0.5,
        init="noise",
        seed=2**32 - 1,
        pooling="average",
        precision="bf16",
        history=7,
        preset="gatys",
        style_loss="covariance",
        content_loss="cosine",
        first_size_px=64,
        tv_weight=0.5,
        padding="zeros",
        scale_iterations=[3, 2, 1],
        optimizer="adam",
        learning_rate=0.05,
        averaging=0.5,
        color="pca",
        tv_norm="l1",
        laplacian_weight=3,
        deterministic=True,
        curvature="uniform",
        plateau=0.01,
    )
    assert all(getattr(changed, name) != default_of(option) for name, option in OPTIONS.items())
    assert convert.options_from_proto(convert.options_to_proto(changed)) == changed


def test_a_preset_changes_what_is_left_out() -> None:
    """Given fields override the preset's; the job's options say every value."""
    message = options_pb2.StylizeOptions(preset=options_pb2.PRESET_GATYS, iterations=3)
    assert convert.options_from_proto(message) == StylizeOptions.of("gatys", iterations=3)


def test_presets_are_described() -> None:
    """DescribeOptions shows every preset with the options that it stands for."""
    described = {preset.name: preset for preset in convert.describe_presets()}
    assert set(described) == set(Preset)
    for name, preset in described.items():
        assert preset.description
        assert convert.options_from_proto(preset.options) == StylizeOptions.of(name)


def test_description_is_the_dataclass() -> None:
    """DescribeOptions says of every option what the dataclass knows, in the order of the field numbers."""
    described = list(convert.describe_options())
    assert [message.name for message in described] == [
        field.name for field in sorted(FIELDS.values(), key=lambda f: f.number)
    ]
    for message in described:
        default, bounds = default_of(OPTIONS[message.name]), bounds_of(message.name)
        assert message.type != options_pb2.OPTION_TYPE_UNSPECIFIED
        assert message.description == bounds.description
        assert _value(message) == default
        assert message.HasField("minimum") == (bounds.minimum is not None)
        if bounds.minimum is not None:
            assert (message.minimum, message.maximum) == (bounds.minimum, bounds.maximum)
        assert list(message.choices) == (list(type(default)) if isinstance(default, StrEnum) else [])


def _value(message: options_pb2.OptionDescription) -> Any:
    match message.default_value.WhichOneof("kind"):
        case "struct_value":
            return dict(message.default_value.struct_value)
        case "list_value":
            return tuple(message.default_value.list_value)
        case kind:
            return getattr(message.default_value, kind)


def _written(value: Any) -> str:
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{layer}: {weight}" for layer, weight in value.items()) + "}"
    if isinstance(value, bool | tuple):
        return str(value).lower() if value else "none" if value == () else "false"
    return f"{value:.10g}" if isinstance(value, int) else str(value).replace("1000000000.0", "1e+09")
