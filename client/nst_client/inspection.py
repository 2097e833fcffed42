"""`nst inspect`: what an exported file says of itself, checked and written for people. Needs no server."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nst_client.display import printable, size_text
from nst_client.errors import InvalidArgumentError

Description = Mapping[str, Any]


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what an exported model or a style file says of itself, once its hash was found to be right.

    Nothing in the file is executed. Raises InvalidArgumentError if it cannot be read, is none of these, or is not as it
    was written.
    """
    # Files are read by the module that writes them, which needs nothing but Python itself.
    from nst_model.artifact import read_description as read  # noqa: PLC0415
    from nst_model.errors import InvalidArtifact  # noqa: PLC0415

    try:
        return read(Path(path))
    except InvalidArtifact as error:
        raise InvalidArgumentError(f"{os.fspath(path)!r}: {error}") from error
    except OSError as error:
        raise InvalidArgumentError(f"cannot read {os.fspath(path)!r}: {error.strerror}") from error


def description_lines(path: Path, described: Description) -> list[str]:
    """Return what people want to know of a file, line by line. Raises InvalidArgumentError if it lacks something."""
    try:
        lines = [
            f"{path}: {size_text(path.stat().st_size)}, whole and unaltered",
            *(_graph_lines(described) if described["kind"] == "graph" else _style_lines(described)),
            f"made by {described['producer']} {described['producer_version']}",
        ]
    except (LookupError, TypeError, ValueError) as error:  # whoever wrote it, it was not this project
        raise InvalidArgumentError(f"{str(path)!r}: its description lacks, or has wrong: {error}") from error
    return [printable(line) for line in lines]


def _graph_lines(described: Description) -> Iterator[str]:
    yield f"graph      {described['graph']}, {_written(described)}"
    yield from _model_lines(described)
    given, normalized = described["input"], described["normalization"]
    low, high = given["range"]
    yield (
        f"picture    {given['layout']}, {given['colors']} from {low} to {high},"
        f" {given['minimum_edge_px']} px at least each way; the mean {_list(normalized['mean'])} is taken off inside"
    )
    if described["margin_px"]:
        yield f"margin     mirror the picture by {described['margin_px']} px on each side first"
    for role in ("inputs", "outputs"):
        for number, value in enumerate(described[role]):
            yield f"{role if number == 0 else '':<10} {_value(value)}"


def _style_lines(described: Description) -> Iterator[str]:
    name = described["display_name"] or "(without a name)"
    yield f"style      {name}, {described['format']}, {described['precision']}"
    yield from _model_lines(described)
    yield f"sizes      {_list(described['sizes_px'])} px"
    yield f"layers     {_list(described['layers'])}"
    for image in described["images"]:
        yield f"image      share {image['share']:.3g}, sha256 {image['sha256']}"


def _model_lines(described: Description) -> Iterator[str]:
    yield f"model      {described['model']}: {described['model_display_name']}, licence {described['license']}"
    yield f"weights    sha256 {described['weights_sha256']}"
    yield f"network    {described['architecture']}, pooling {described['pooling']}, padding {described['padding']}"


def _written(described: Description) -> str:
    opset = f" with opset {described['opset']}, {described['nodes']} nodes" if described["opset"] else ""
    return f"{described['format']}{opset}, {described['precision']}, torch {described['torch_version']}"


def _value(value: Mapping[str, Any]) -> str:
    return f"{value['name']:<16} {value['dtype']} ({_list(value['shape'])})"


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values))
