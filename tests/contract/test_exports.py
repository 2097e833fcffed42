"""What can be exported is said once: the proto owns names and wire types, the core choices and defaults."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from importlib import resources
from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from nst.v1 import file_pb2, model_service_pb2
from nst_model import ExportFormat, ExportGraph, ExportPrecision, ExportSpec, Padding, Pooling
from nst_server import convert

REQUEST = model_service_pb2.ExportModelRequest
TRANSPORT = {"offset", "sha256"}
"""Fields that say how to send, not what."""
FIELDS = {field.name: field for field in REQUEST.DESCRIPTOR.fields if field.name not in TRANSPORT}
SPEC = {field.name: field for field in dataclasses.fields(ExportSpec)}
CHOICES: dict[str, type[StrEnum]] = {
    "graph": ExportGraph,
    "format": ExportFormat,
    "precision": ExportPrecision,
    "pooling": Pooling,
    "padding": Padding,
}


@pytest.fixture(scope="module")
def comments() -> dict[str, str]:
    """Every field's comment in ExportModelRequest, as one line."""
    data = resources.files("nst.v1").joinpath("contract.binpb").read_bytes()
    files = descriptor_pb2.FileDescriptorSet.FromString(data).file
    file = next(file for file in files if file.name == "nst/v1/model_service.proto")
    message = [message.name for message in file.message_type].index("ExportModelRequest")
    found = {}
    for location in file.source_code_info.location:
        if tuple(location.path[:3]) == (4, message, 2) and len(location.path) == 4:
            name = file.message_type[message].field[location.path[3]].name
            found[name] = " ".join(location.leading_comments.split())
    return found


def test_the_same_names_on_both_sides() -> None:
    """A field in only one of the two is an error."""
    assert set(FIELDS) == set(SPEC)


@pytest.mark.parametrize("name", CHOICES)
def test_choices_match(name: str) -> None:
    """Every choice of the core is a choice of the contract, and the other way round."""
    enum = FIELDS[name].enum_type
    prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
    names = {value.name.removeprefix(prefix).lower() for value in enum.values if value.number}
    assert names == set(CHOICES[name])


@pytest.mark.parametrize("name", [*CHOICES, "content_layers", "style_layers"])
def test_comment_states_the_default(name: str, comments: dict[str, str]) -> None:
    """The comment is the reference that a developer in another language reads; its facts are the dataclass's."""
    default = getattr(ExportSpec(), name)
    written = default if isinstance(default, str) else ", ".join(default)
    assert f"Default: {written}." in comments[name]


def test_what_is_left_out_has_the_cores_default() -> None:
    """An empty request is the default export of the server's default model."""
    assert convert.export_from_proto(REQUEST(), "vgg19") == ExportSpec(model="vgg19")


@pytest.mark.parametrize(
    "given",
    [
        {"graph": "features", "layers": ("relu1_2", "relu3_3")},
        {"graph": "objective", "content_layers": ("relu3_1",), "style_layers": ("relu1_1",), "precision": "fp16"},
        {"graph": "grams", "format": "pt2", "pooling": "l2", "padding": "mirror"},
    ],
)
def test_given_values_arrive(given: dict[str, Any]) -> None:
    """Every field reaches the core, the model with or without `models/`."""
    wire = {
        name: f"{FIELDS[name].enum_type.values_by_number[0].name.removesuffix('UNSPECIFIED')}{value.upper()}"
        if name in CHOICES
        else value
        for name, value in given.items()
    }
    for model in ("vgg16", "models/vgg16"):
        assert convert.export_from_proto(REQUEST(model=model, **wire), "vgg19") == ExportSpec(model="vgg16", **given)


def test_no_part_exceeds_3_mib() -> None:
    """With the largest data, the longest numbers and a long name, a message stays below the contract's limit."""
    part = file_pb2.FilePart(
        offset=2**62, data=bytes(convert.PART_BYTES), total_bytes=2**62, sha256="a" * 64, file_name="n" * 1000
    )
    assert part.ByteSize() < 3 * 1024 * 1024
