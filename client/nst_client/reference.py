"""The contract's comments, for the command line's help: what is written in the .proto files is written once."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping

from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

# Field numbers of google.protobuf.FileDescriptorProto and DescriptorProto, of which a location's path is made.
MESSAGES = 4
FIELDS = 2


def field_comments(message: str) -> dict[str, str]:
    """Return the comment of every field of a message (`StylizeOptions`), by field name, as one paragraph."""
    for file in _contract().file:
        for index, entry in enumerate(file.message_type):
            if entry.name == message and file.package == "nst.v1":
                comments = _comments(file)
                return {
                    field.name: comments.get((MESSAGES, index, FIELDS, number), "")
                    for number, field in enumerate(entry.field)
                }
    raise KeyError(message)


@functools.cache
def _contract() -> FileDescriptorSet:
    data = importlib.resources.files("nst.v1").joinpath("contract.binpb").read_bytes()
    return FileDescriptorSet.FromString(data)


def _comments(file: FileDescriptorProto) -> Mapping[tuple[int, ...], str]:
    return {
        tuple(location.path): " ".join(location.leading_comments.split())
        for location in file.source_code_info.location
        if location.leading_comments
    }
