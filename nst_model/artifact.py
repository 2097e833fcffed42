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

An archive is refused, too, unless it is byte for byte the one that its members make here. So every byte of a file is
covered. A digest is no signature: it tells damage, not who made a file.
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

KINDS = ("graph", "style")

DESCRIPTION = "nst.json"
EXTRA = f"extra/{DESCRIPTION}"

_METADATA_PROPS = 14
"""Number of that field in ONNX's ModelProto; its entries have a key, field 1, and a value, field 2."""

_UNSEALED = "0" * 64
_SEAL = re.compile(rb'"content_sha256":"([0-9a-f]{64})"')
_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_FOREIGN = "the file is no artifact of this project"
_TRUNCATED = "the file is truncated, or no artifact of this project"

_MAX_PARTS = 1000
"""Members of an archive, or fields of an ONNX model; no file of this project has half as many."""
_MAX_FILE_BYTES = 1 << 28
"""The largest model takes a third of that, a style of every layer at every size two."""
_MAX_HEADER_BYTES = 1 << 20
"""Of a style file, and of any description."""

_PT2_MEMBER = re.compile(
    r"data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|models/model\.json|data/sample_inputs/model\.pt|archive_format|archive_version|\.data/version|byteorder"
)
_TORCHSCRIPT_MEMBER = re.compile(
    r"(data|constants)\.pkl|code/[\w./]+\.py|(data|constants)/\d+|version|byteorder|\.(data/version|format_version|storage_alignment)"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")
_PROGRAM_TEXT = {
    "expr_str": (
        r"(?:(?:Add|And|Equality|FloorDiv|GreaterThan|LessThan|Max|Mul|StrictGreaterThan)\(|Integer\(-?\d+\)"
        r"|Symbol\('[su]\d+', positive=True, integer=True\)|, |\))*"
    ),
    "as_string": r"Runtime assertion failed for expression [\w ()&/*+<=>,-]* on node '\w+'|\w*",
    "in_spec": (
        r'(?:"builtins\.(?:tuple|dict)"|"(?:type|context|children_spec)"|null|"null"|"\[(?:\\"[\w.]+\\"(?:, )?)*\]"'
        r"|[\[\]{}:, 1])*"
    ),
    "target": (
        r"_operator\.(add|and_|eq|floordiv|ge|gt|le|lt|mul|sub)|torch\.ops\.aten\.(_assert_scalar|add|avg_pool2d|bmm|cat|conv2d"
        r"|conv_transpose2d|div|eq|flatten|gt|matmul|max_pool2d|mean|mul|narrow|pad|pixel_shuffle|relu_|reshape|select|slice|sqrt"
        r"|square|stack|sub|sym_size|transpose|unsqueeze|where|zeros_like)\.\w+"
    ),
    "guards_code": "",
}
"""What the texts in a pt2 program may be, by their names: torch evaluates some, and makes a Python function of others.
All others are names."""
_PROGRAM_TEXT["out_spec"] = _PROGRAM_TEXT["in_spec"]


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
    parts = _parts(content_of(source))
    if len(parts.description) > _MAX_HEADER_BYTES or (seal := _SEAL.search(parts.description)) is None:
        raise InvalidArtifact(f"{_FOREIGN}: its description has no content_sha256")
    try:
        description = json.loads(parts.description)
        found = description["format_version"]
        json.dumps(description, ensure_ascii=False, allow_nan=False).encode()  # else nobody could print it
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InvalidArtifact(f"the file's description cannot be read: {error!r}") from None
    if found != FORMAT_VERSION:
        raise InvalidArtifact(f"the file has format version {found!r}; this program reads version {FORMAT_VERSION}")
    if _digest(parts.content, _with_seal(parts.description, _UNSEALED)) != seal[1].decode():
        raise InvalidArtifact("the file was altered or damaged: its content_sha256 is not that of its content")
    if description.get("kind") not in KINDS:
        raise InvalidArtifact(f"{_FOREIGN}: it is neither {' nor '.join(KINDS)} but {description.get('kind')!r}")
    return dict(description)


def content_of(source: Path | bytes) -> bytes:
    """Return bytes as they are, or a file's. Raises InvalidArtifact for one that does not end; OSError."""
    if isinstance(source, bytes):
        return source
    with source.open("rb") as stream:
        data = stream.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidArtifact(f"{_FOREIGN}: it has more than {_MAX_FILE_BYTES} bytes")
    return data


def producer() -> dict[str, str]:
    """Return what an artifact says of the program that makes it."""
    return {"producer": "nst-service", "producer_version": version("nst-service")}


def sealed_archive(members: Mapping[str, bytes], description: Mapping[str, Any]) -> bytes:
    """Return a zip archive of members and their description, as torch writes it: stored, each at a multiple of 64."""
    return _archive({**members, EXTRA: _sealed(_members(members), description)})


def _archive(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            entry = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # else other bytes on Windows
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
    """Take apart an archive that is, byte for byte, as `sealed_archive` lays it out.

    So no two readers can find different members in it, and no byte of it is beyond the digest.
    """
    members: dict[str, bytes] = {}
    position = 0
    while data.startswith(b"PK\x03\x04", position):
        size, _, name_size, extra_size = _unpacked("<18x2I2H", data, position)
        start = position + 30 + name_size + extra_size
        name = data[position + 30 : position + 30 + name_size].decode(errors="replace").removeprefix("archive/")
        if start + size > len(data):
            raise InvalidArtifact(_TRUNCATED)
        if len(members) == _MAX_PARTS:
            raise InvalidArtifact(f"{_FOREIGN}: it has more than {_MAX_PARTS} members")
        members[name] = data[start : start + size]
        position = start + size
    if EXTRA not in members:
        raise InvalidArtifact(f"{_FOREIGN}, or truncated: it has no description")
    if _archive(members) != data:
        raise InvalidArtifact("the file was altered or damaged, or has more in it than its members")
    description = members.pop(EXTRA)
    return _Parts(_harmless(members), description)


def _unpacked(layout: str, data: bytes, position: int) -> tuple[int, ...]:
    try:
        return struct.unpack_from(layout, data, position)
    except struct.error:
        raise InvalidArtifact(_TRUNCATED) from None


def _harmless(members: Mapping[str, bytes]) -> Iterator[bytes]:
    """Yield what `_members` does. Raises InvalidArtifact for what torch would unpickle, evaluate or run as it loads it.

    TorchScript's own pickles make tensors and modules only; torch reads them with a reader of its own.
    """
    allowed = _PT2_MEMBER if "archive_format" in members else _TORCHSCRIPT_MEMBER
    for name, content in members.items():
        if not allowed.fullmatch(name) or (name.startswith("data/sample_inputs/") and content):
            raise InvalidArtifact(f"{name!r} in the file may be a program or a pickle, which is never loaded")
        try:
            if name == "models/model.json":
                _check_program("", json.loads(content))
            elif name.endswith(".json"):
                _check_payloads(name, json.loads(content)["config"].values())
        except InvalidArtifact:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidArtifact(f"{name!r} in the file cannot be read: {error!r}") from None
    yield from _members(members)


def _check_payloads(name: str, entries: Iterable[Any]) -> None:
    for entry in entries:
        if entry["use_pickle"] is not False or not _PAYLOAD.fullmatch(entry["path_name"]):
            raise InvalidArtifact(f"{name!r} in the file has a pickle, which is never loaded")


def _check_program(name: str, value: Any) -> None:
    """Raise InvalidArtifact unless every text at or below a value in a pt2 program is such as our own files have."""
    if isinstance(value, str):
        if not re.fullmatch(_PROGRAM_TEXT.get(name, r"[\w.+]*"), value, re.ASCII):
            raise InvalidArtifact(f"{name!r} in the file's program could run something: {value[:80]!r}")
    elif isinstance(value, dict):
        for key, below in value.items():
            _check_program("", key)
            _check_program(key, below)
    elif isinstance(value, list):
        for below in value:
            _check_program(name, below)


def _safetensors_parts(data: bytes) -> _Parts:
    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise InvalidArtifact("the file is truncated")
    if start > _MAX_HEADER_BYTES:
        raise InvalidArtifact(f"{_FOREIGN}: its header has {start - 8} bytes, at most {_MAX_HEADER_BYTES} are read")
    tensors, end = {}, 0
    try:
        header = json.loads(data[8:start])
        description = header.pop("__metadata__")[DESCRIPTION].encode()
        for name, entry in header.items():
            begin, end = end, entry["data_offsets"][1]
            if entry["dtype"] != "F32" or entry["data_offsets"][0] != begin or end < begin:
                raise InvalidArtifact(f"{_FOREIGN}: its tensors are of another type or order")
            tensors[name] = Fp32(tuple(entry["shape"]), data[start + begin : start + end])
        content = list(_tensors(tensors))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InvalidArtifact):
            raise
        raise InvalidArtifact(f"the file is damaged, or no artifact of this project: {error!r}") from None
    if start + end != len(data):
        raise InvalidArtifact("the file is truncated, or there is more behind its tensors")
    return _Parts(content, description)


def _onnx_parts(data: bytes) -> _Parts:
    last = None
    for last in _fields(data, 0, len(data)):  # noqa: B007 - the last one is asked for
        pass
    if last is not None and last.number == _METADATA_PROPS:
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
    """Yield the fields with a length of a message. Raises InvalidArtifact, too if there are more than ours have."""
    for _ in range(_MAX_PARTS):
        if position >= end:
            return
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
    if position < end:
        raise InvalidArtifact(f"{_FOREIGN}: it has more than {_MAX_PARTS} fields")


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
