"""What leaves this project as a file, and what such a file says of itself. Standard library only.

An artifact is a graph (TorchScript, ONNX or `torch.export`) or a style (safetensors). In each there is one JSON object, its
*description*, under the name `nst.json`:

    TorchScript, pt2    the member `{archive}/extra/nst.json` of the zip archive
    ONNX                the last entry of `metadata_props`, which is the last thing in the file
    safetensors         the one entry of `__metadata__`

`content_sha256` in it is that of everything else, itself taken as 64 zeros: see `_digest`. So whatever was lost or altered
on the way is found without any library that would have to interpret it first.
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
from typing import Any

from nst_model.errors import InvalidArtifact

FORMAT_VERSION = 1
"""Raised when a file of the next version could not be read as one of this."""

DESCRIPTION = "nst.json"
EXTRA = f"extra/{DESCRIPTION}"
UNSEALED = "0" * 64
"""What stands for the digest while it is computed."""

MAX_DESCRIPTION_BYTES = 1 << 20
METADATA_PROPS = 14
"""Number of that field in ONNX's ModelProto."""

_SEAL = re.compile(rb'"content_sha256":"([0-9a-f]{64})"')
_PICKLES = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_description(source: Path | bytes) -> dict[str, Any]:
    """Return what an artifact says of itself, after its hash was checked.

    Raises InvalidArtifact for a file that is none, or truncated, altered, or of another version; OSError. Nothing in the
    file is executed or unpickled.
    """
    data = source if isinstance(source, bytes) else source.read_bytes()
    return _description(*_parts(data))


def sealed_archive(members: Mapping[str, bytes], description: Mapping[str, Any], root: str = "archive") -> bytes:
    """Return a zip archive of members and description, such as torch writes it: stored, each member at a multiple of 64."""
    sealed = _sealed(_members(members), description)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in [*members.items(), (EXTRA, sealed)]:
            entry = zipfile.ZipInfo(f"{root}/{name}", (1980, 1, 1, 0, 0, 0))
            padding = -(buffer.tell() + 30 + len(entry.filename) + 4) % 64
            entry.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
            archive.writestr(entry, content)
    return buffer.getvalue()


def sealed_onnx(model: bytes, description: Mapping[str, Any]) -> bytes:
    """Return an ONNX model with its description behind it, where protobuf takes it for one more metadata entry."""
    sealed = _sealed([model], description)
    entry = _field(1, DESCRIPTION.encode()) + _field(2, sealed)
    return model + _field(METADATA_PROPS, entry)


def sealed_safetensors(tensors: Mapping[str, tuple[tuple[int, ...], bytes]], description: Mapping[str, Any]) -> bytes:
    """Return a safetensors file of fp32 tensors, each a shape and its bytes, little-endian, and their description."""
    header: dict[str, Any] = {"__metadata__": {DESCRIPTION: _sealed(_tensors(tensors), description).decode()}}
    end = 0
    for name in sorted(tensors):
        shape, data = tensors[name]
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(tensors[name][1] for name in sorted(tensors))


def producer() -> dict[str, str]:
    """Return which program and version of it makes the artifact."""
    return {"producer": "nst-service", "producer_version": version("nst-service")}


def _sealed(content: Iterable[bytes], description: Mapping[str, Any]) -> bytes:
    """Return the description as JSON, with the digest of the rest and of itself."""
    unsealed = json.dumps(
        {**description, "content_sha256": UNSEALED}, separators=(",", ":"), ensure_ascii=False
    ).encode()
    return _with_seal(unsealed, _digest(content, unsealed))


def _with_seal(description: bytes, digest: str) -> bytes:
    return _SEAL.sub(f'"content_sha256":"{digest}"'.encode(), description)


def _digest(content: Iterable[bytes], unsealed: bytes) -> str:
    """Return the SHA-256 of pieces of content and of the description, its `content_sha256` 64 zeros.

    Before each piece stands its length, 8 bytes, little-endian.
    """
    digest = hashlib.sha256()
    for piece in (*content, unsealed):
        digest.update(struct.pack("<Q", len(piece)))
        digest.update(piece)
    return digest.hexdigest()


def _members(members: Mapping[str, bytes]) -> Iterator[bytes]:
    for name in sorted(members):
        yield name.encode()
        yield members[name]


def _tensors(tensors: Mapping[str, tuple[tuple[int, ...], bytes]]) -> Iterator[bytes]:
    for name in sorted(tensors):
        shape, data = tensors[name]
        yield f"{name} F32 {json.dumps(shape)}".encode()
        yield data


def _description(content: Iterable[bytes], sealed: bytes) -> dict[str, Any]:
    if (seal := _SEAL.search(sealed)) is None:
        raise InvalidArtifact("the file's description has no content_sha256")
    try:
        description = json.loads(sealed)
        version = description["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArtifact(f"the file's description cannot be read: {error}") from None
    if version != FORMAT_VERSION:
        raise InvalidArtifact(f"the file has format version {version!r}; this version reads {FORMAT_VERSION}")
    if _digest(content, _with_seal(sealed, UNSEALED)) != seal[1].decode():
        raise InvalidArtifact("the file was altered or damaged: its content_sha256 is not that of its content")
    return dict(description)


def _parts(data: bytes) -> tuple[Iterable[bytes], bytes]:
    """Return the content's pieces and the description, sealed."""
    if data.startswith(b"PK\x03\x04"):
        return _archive_parts(data)
    if data.startswith(_PICKLES):
        raise InvalidArtifact("the file is a pickle, which could run anything and is never loaded")
    if data[8:9] == b"{":
        return _safetensors_parts(data)
    return _onnx_parts(data)


def _archive_parts(data: bytes) -> tuple[Iterable[bytes], bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            if compressed or sum(entry.file_size for entry in entries) > len(data):  # else it could fill the memory
                raise InvalidArtifact("the file is no artifact of this project: it is compressed")
            members = {entry.filename.partition("/")[2]: archive.read(entry) for entry in entries}
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        raise InvalidArtifact(f"the file is truncated or damaged: {error}") from None
    sealed = members.pop(EXTRA, None)
    if sealed is None:
        raise InvalidArtifact("the file is no artifact of this project: it lacks a description")
    return _members(members), sealed


def _safetensors_parts(data: bytes) -> tuple[Iterable[bytes], bytes]:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise InvalidArtifact("the file is truncated")
    try:
        header = json.loads(data[8:start])
        sealed = header.pop("__metadata__")[DESCRIPTION].encode()
        tensors, end = {}, 0
        for name, entry in sorted(header.items()):
            begin, end_here = entry["data_offsets"]
            if entry["dtype"] != "F32" or begin != end or end_here < begin:
                raise InvalidArtifact("the file is no artifact of this project: its tensors are laid out otherwise")
            tensors[name] = (tuple(entry["shape"]), data[start + begin : start + end_here])
            end = end_here
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArtifact(f"the file is damaged, or no artifact of this project: {error}") from None
    if start + end != len(data):
        raise InvalidArtifact("the file is truncated, or has something behind its tensors")
    return _tensors(tensors), sealed


def _onnx_parts(data: bytes) -> tuple[Iterable[bytes], bytes]:
    position, last = 0, (0, 0, 0)
    while position < len(data):
        begin = position
        tag, position = _varint(data, position)
        match tag & 7:
            case 0:
                _, position = _varint(data, position)
            case 2:
                length, position = _varint(data, position)
                last = (tag >> 3, begin, position)
                position += length
            case _:
                raise InvalidArtifact("the file is no artifact of this project")
    if position != len(data):
        raise InvalidArtifact("the file is truncated")
    number, begin, start = last
    key, value = _entry(data[start:]) if number == METADATA_PROPS else (b"", b"")
    if key != DESCRIPTION.encode():
        raise InvalidArtifact("the file is no artifact of this project: it lacks a description")
    return [data[:begin]], value


def _entry(data: bytes) -> tuple[bytes, bytes]:
    parts, position = [], 0
    while position < len(data):
        _, position = _varint(data, position)
        length, position = _varint(data, position)
        parts.append(data[position : position + length])
        position += length
    return (parts[0], parts[1]) if len(parts) == 2 else (b"", b"")


def _field(number: int, content: bytes) -> bytes:
    return _to_varint(number << 3 | 2) + _to_varint(len(content)) + content


def _to_varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _varint(data: bytes, position: int) -> tuple[int, int]:
    number, shift = 0, 0
    while True:
        if position >= len(data) or shift > 63:
            raise InvalidArtifact("the file is truncated, or no artifact of this project")
        byte = data[position]
        position += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, position
        shift += 7
