"""What leaves this project as a file, and what such a file says of itself. Standard library only.

An artifact is a graph (TorchScript, ONNX or `torch.export`) or a style (safetensors). In each there is one JSON object,
its *description*, called `nst.json`:

    TorchScript, pt2    the member `{archive}/extra/nst.json` of the zip archive
    ONNX                an entry of `metadata_props`, which is the last thing in the file
    safetensors         the one entry of `__metadata__`

`content_sha256` in it is the digest of everything else, so whatever was lost or altered on the way is found without a
library that would have to interpret the file first. It is the SHA-256 of these pieces, each behind its length (8 bytes,
little-endian):

    TorchScript, pt2    name and bytes of each other member, by name; names without the archive's
    ONNX                the file up to that entry
    safetensors         `{name} F32 [{shape}]` and bytes of each tensor, by name
    and in all of them  the description, with 64 zeros for `content_sha256`

A digest is no signature: it tells damage, not who made a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from nst_model.errors import InvalidArtifact

FORMAT_VERSION = 1
"""Raised when a program that reads one version would misread the next."""

DESCRIPTION = "nst.json"
EXTRA = f"extra/{DESCRIPTION}"

_METADATA_PROPS = 14
"""Number of that field in ONNX's ModelProto; its entries have a key, field 1, and a value, field 2."""

_UNSEALED = "0" * 64
_SEAL = re.compile(rb'"content_sha256":"([0-9a-f]{64})"')
_USE_PICKLE = re.compile(rb'"use_pickle":\s*true')
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_FOREIGN = "the file is no artifact of this project"
_TRUNCATED = "the file is truncated, or no artifact of this project"


class Fp32(NamedTuple):
    """A tensor in a safetensors file: fp32, little-endian, in C order."""

    shape: tuple[int, ...]
    data: bytes


class _Parts(NamedTuple):
    """A file taken apart: the pieces of its content, and its description as it stands there."""

    content: Iterable[bytes]
    description: bytes


def read_description(source: Path | bytes) -> dict[str, Any]:
    """Return what an artifact, or the file at a path, says of itself, once its digest is found right.

    Nothing in the file is executed or unpickled. Raises InvalidArtifact for what is no artifact, or truncated, altered,
    of another version, or a pickle; OSError.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    parts = _parts(data)
    if (seal := _SEAL.search(parts.description)) is None:
        raise InvalidArtifact(f"{_FOREIGN}: its description has no content_sha256")
    try:
        description = json.loads(parts.description)
        found = description["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArtifact(f"the file's description cannot be read: {error!r}") from None
    if found != FORMAT_VERSION:
        raise InvalidArtifact(f"the file has format version {found!r}; this program reads version {FORMAT_VERSION}")
    if _digest(parts.content, _with_seal(parts.description, _UNSEALED)) != seal[1].decode():
        raise InvalidArtifact("the file was altered or damaged: its content_sha256 is not that of its content")
    return dict(description)


def producer() -> dict[str, str]:
    """Return what an artifact says of the program that makes it."""
    return {"producer": "nst-service", "producer_version": version("nst-service")}


def sealed_archive(members: Mapping[str, bytes], description: Mapping[str, Any]) -> bytes:
    """Return a zip archive of members and their description, as torch writes it: stored, each at a multiple of 64."""
    sealed = _sealed(_members(members), description)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*members.items(), (EXTRA, sealed)]:
            entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            header = buffer.tell() + 30 + len(entry.filename) + 4
            entry.extra = struct.pack("<2sH", b"FB", -header % 64) + bytes(-header % 64)
            archive.writestr(entry, content)
    return buffer.getvalue()


def sealed_onnx(model: bytes, description: Mapping[str, Any]) -> bytes:
    """Return an ONNX model with its description behind it, where protobuf takes it for one more entry of metadata."""
    entry = _field(1, DESCRIPTION.encode()) + _field(2, _sealed([model], description))
    return model + _field(_METADATA_PROPS, entry)


def sealed_safetensors(tensors: Mapping[str, Fp32], description: Mapping[str, Any]) -> bytes:
    """Return a safetensors file of tensors and their description."""
    header: dict[str, Any] = {"__metadata__": {DESCRIPTION: _sealed(_tensors(tensors), description).decode()}}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + len(tensors[name].data)
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors[name].data for name in sorted(tensors))


def _sealed(content: Iterable[bytes], description: Mapping[str, Any]) -> bytes:
    whole = {**description, "content_sha256": _UNSEALED}
    unsealed = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    return _with_seal(unsealed, _digest(content, unsealed))


def _with_seal(description: bytes, digest: str) -> bytes:
    return _SEAL.sub(f'"content_sha256":"{digest}"'.encode(), description)


def _digest(content: Iterable[bytes], unsealed: bytes) -> str:
    digest = hashlib.sha256()
    for piece in (*content, unsealed):
        digest.update(struct.pack("<Q", len(piece)))
        digest.update(piece)
    return digest.hexdigest()


def _members(members: Mapping[str, bytes]) -> Iterator[bytes]:
    for name in sorted(members):
        yield name.encode()
        yield members[name]


def _tensors(tensors: Mapping[str, Fp32]) -> Iterator[bytes]:
    for name in sorted(tensors):
        yield f"{name} F32 {json.dumps(tensors[name].shape)}".encode()
        yield tensors[name].data


def _parts(data: bytes) -> _Parts:
    if data.startswith(b"PK\x03\x04"):
        return _archive_parts(data)
    if data.startswith(_PICKLES):
        raise InvalidArtifact("the file is a pickle, which could run any program and is never loaded")
    if data[8:9] == b"{":
        return _safetensors_parts(data)
    return _onnx_parts(data)


def _archive_parts(data: bytes) -> _Parts:
    """Take apart an archive as `sealed_archive` lays it out: member upon member, directory, end, and nothing between.

    So no two readers can find different members in it, and nothing is read that was not asked for.
    """
    members: dict[str, bytes] = {}
    directory: list[tuple[int, ...]] = []
    position = 0
    while data.startswith(b"PK\x03\x04", position):
        flags, method, crc, size, whole, name_size, extra_size = _unpacked("<6x2H4x3I2H", data, position)
        start = position + 30 + name_size + extra_size
        name = data[position + 30 : position + 30 + name_size].decode(errors="replace")
        if method or flags or size != whole or not name.startswith("archive/") or name in members:
            raise InvalidArtifact(f"{_FOREIGN}: {name!r} in it is compressed, twice there, or not in archive/")
        if start + size > len(data):
            raise InvalidArtifact(_TRUNCATED)
        members[name] = data[start : start + size]
        directory.append((flags, method, crc, size, whole, name_size, position))
        position = start + size
    begin = position
    for name, entry in zip(members, directory, strict=True):
        *found, extra_size, comment_size, offset = _unpacked("<8x2H4x3I3H8xI", data, position)
        there = data[position : position + 4], data[position + 46 : position + 46 + len(name.encode())]
        if (*found, offset) != entry or there != (b"PK\x01\x02", name.encode()):
            raise InvalidArtifact(f"the file is damaged: its directory says something else of {name!r}")
        position += 46 + entry[5] + extra_size + comment_size
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, len(members), len(members), position - begin, begin, 0)
    if data[position:] != end:
        raise InvalidArtifact("the file is truncated, or there is more behind its end")
    content = {name.removeprefix("archive/"): member for name, member in members.items()}
    if (description := content.pop(EXTRA, None)) is None:
        raise InvalidArtifact(f"{_FOREIGN}: it has no description")
    _refuse_pickles(content)
    return _Parts(_members(content), description)


def _unpacked(layout: str, data: bytes, position: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, position)
    except struct.error:
        raise InvalidArtifact(_TRUNCATED) from None


def _refuse_pickles(members: Mapping[str, bytes]) -> None:
    """Raise InvalidArtifact if torch would unpickle any of a pt2 archive. TorchScript's own pickles run nothing."""
    examples = [name for name, content in members.items() if name.startswith("data/sample_inputs/") and content]
    configs = [name for name, content in members.items() if name.endswith(".json") and _USE_PICKLE.search(content)]
    if examples or configs:
        raise InvalidArtifact(f"{(examples + configs)[0]} in the file has a pickle, which is never loaded")


def _safetensors_parts(data: bytes) -> _Parts:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise InvalidArtifact("the file is truncated")
    tensors, end = {}, 0
    try:
        header = json.loads(data[8:start])
        description = header.pop("__metadata__")[DESCRIPTION].encode()
        for name, entry in header.items():
            begin, end = end, entry["data_offsets"][1]
            if entry["dtype"] != "F32" or entry["data_offsets"][0] != begin or end < begin:
                raise InvalidArtifact(f"{_FOREIGN}: its tensors are of another type or order")
            tensors[name] = Fp32(tuple(entry["shape"]), data[start + begin : start + end])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InvalidArtifact):
            raise
        raise InvalidArtifact(f"the file is damaged, or no artifact of this project: {error!r}") from None
    if start + end != len(data):
        raise InvalidArtifact("the file is truncated, or there is more behind its tensors")
    return _Parts(_tensors(tensors), description)


def _onnx_parts(data: bytes) -> _Parts:
    fields = list(_fields(data, 0, len(data)))
    if fields and fields[-1].number == _METADATA_PROPS:
        last = fields[-1]
        entry = {field.number: data[field.start : field.end] for field in _fields(data, last.start, last.end)}
        if entry.get(1) == DESCRIPTION.encode():
            return _Parts([data[: last.begin]], entry.get(2, b""))
    raise InvalidArtifact(f"{_FOREIGN}: it has no description at its end")


class _Field(NamedTuple):
    """A field of a protobuf message: where it begins, and where its content starts and ends."""

    number: int
    begin: int
    start: int
    end: int


def _fields(data: bytes, position: int, end: int) -> Iterator[_Field]:
    while position < end:
        begin = position
        tag, position = _varint(data, position, end)
        match tag & 7:
            case 0:
                _, position = _varint(data, position, end)
            case 2:
                length, start = _varint(data, position, end)
                position = start + length
                if position > end:
                    raise InvalidArtifact(_TRUNCATED)
                yield _Field(tag >> 3, begin, start, position)
            case _:
                raise InvalidArtifact(_FOREIGN)


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 64, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
    raise InvalidArtifact(_TRUNCATED)


def _field(number: int, content: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(content)) + content


def _to_varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
