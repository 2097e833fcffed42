"""Flags made from the contract."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor
from typer.testing import CliRunner

from nst.v1 import options_pb2
from nst_client import InvalidArgumentError, cli
from nst_client.flags import flag_values, with_option_flags
from nst_client.options import OPTIONS
from nst_client.reference import field_comments

FIELD = descriptor_pb2.FieldDescriptorProto


def test_every_option_has_a_flag_and_its_comment_is_the_help() -> None:
    """`nst stylize --help` shows each field of StylizeOptions with what the contract says of it."""
    done = CliRunner().invoke(cli.app, ["stylize", "--help"], env={"COLUMNS": "500", "TERM": "dumb"})
    text = re.sub(r"[\s│]+", " ", done.stdout)
    comments = field_comments("StylizeOptions")
    assert set(comments) == set(OPTIONS.fields_by_name)
    for name, comment in comments.items():
        assert f"--{name.replace('_', '-')}" in text
        assert len(comment) > 20
        assert comment in text
    assert "content|noise" in text


@pytest.fixture
def richer() -> Descriptor:
    """Return StylizeOptions as a later contract may have it: with a field of every other kind."""
    file = descriptor_pb2.FileDescriptorProto()
    options_pb2.DESCRIPTOR.CopyToProto(file)
    file.name, file.package = "later/options.proto", "later"
    message = next(entry for entry in file.message_type if entry.name == "StylizeOptions")
    for field in (field for entry in file.message_type for field in [*entry.field, *nested_fields(entry)]):
        if field.type_name:
            field.type_name = field.type_name.replace(".nst.v1.", ".later.")
    kinds = {"grain": FIELD.TYPE_FLOAT, "tile_px": FIELD.TYPE_INT64, "keep_colors": FIELD.TYPE_BOOL}
    added = {**kinds, "note": FIELD.TYPE_STRING}
    for number, (name, kind) in enumerate(added.items(), start=100):
        message.field.add(name=name, number=number, type=kind, label=FIELD.LABEL_OPTIONAL)
    message.field.add(name="scales_px", number=200, type=FIELD.TYPE_INT32, label=FIELD.LABEL_REPEATED)
    message.field.add(
        name="mood", number=201, type=FIELD.TYPE_ENUM, type_name=".later.Pooling", label=FIELD.LABEL_OPTIONAL
    )
    pool = descriptor_pool.DescriptorPool()
    struct = descriptor_pb2.FileDescriptorProto()
    descriptor_pool.Default().FindFileByName("google/protobuf/struct.proto").CopyToProto(struct)
    pool.Add(struct)
    pool.Add(file)
    return pool.FindMessageTypeByName("later.StylizeOptions")


def nested_fields(entry: Any) -> list[Any]:
    """Return the fields of a message's nested messages."""
    return [field for nested in entry.nested_type for field in nested.field]


def test_field_added_to_the_contract_is_a_flag(richer: Descriptor) -> None:
    """A new field of any kind is a flag with help, with no line of the command line changed."""
    app = typer.Typer(rich_markup_mode="rich")
    seen: dict[str, Any] = {}

    @app.command()
    @with_option_flags(richer, {"grain": "How much [film] grain."})
    def paint(photo: str, **options: Any) -> None:
        seen.update(flag_values(richer, options), photo=photo)

    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200", "TERM": "dumb"}).stdout
    for text in ("--grain", "How much [film] grain.", "--tile-px", "--no-keep-colors", "--mood", "max|average"):
        assert text in shown
    flags = "x.jpg --grain 0.5 --tile-px 64 --keep-colors --note hi --scales-px 256,512 --mood max --iterations 3"
    done = CliRunner().invoke(app, flags.split())
    assert done.exit_code == 0, done.output
    assert seen == {
        "photo": "x.jpg",
        "grain": 0.5,
        "tile_px": 64,
        "keep_colors": True,
        "note": "hi",
        "scales_px": [256, 512],
        "mood": "max",
        "iterations": 3,
    }


def test_layers_may_go_without_weights() -> None:
    """`relu1_1,relu2_1=0.5`: a layer without a weight has weight 1; anything else is refused."""
    given = {"style_layers": "relu1_1, relu2_1=0.5", "iterations": None}
    assert flag_values(OPTIONS, given) == {"style_layers": {"relu1_1": 1.0, "relu2_1": 0.5}}
    with pytest.raises(InvalidArgumentError, match="the weight '' is not a number"):
        flag_values(OPTIONS, {"style_layers": "relu1_1="})
