"""Stored styles: one folder each, written whole or not at all.

styles/{id}/style.json             what is known of it
styles/{id}/{sha256}.image         its image files, as they came
styles/{id}/{sha256}.safetensors   of an imported style, which has no images, its style file
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from nst_server.errors import AlreadyExists, InvalidField, NotFound
from nst_server.storage.faults import refusal

log = structlog.get_logger()

ID = re.compile(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?")
DAMAGED = (ValueError, KeyError, TypeError)
"""What reading a style.json raises that is not what was written."""


@dataclass(frozen=True)
class StoredImage:
    """One image of a style. `width` and `height` are in pixels, upright."""

    sha256: str
    weight: float
    width: int
    height: int


@dataclass(frozen=True)
class StyleFile:
    """What is known of the file of an imported style, all by itself.

    Attributes:
        size: of the file, bytes.
        model: the feature model.
        model_sha256: of the file that the model's weights were published in.
        sizes_px: longer edges that the style images were brought to, ascending.
        layers: in the model's order.
        images: what the style was made of; their width and height are 0.
    """

    sha256: str
    size: int
    model: str
    model_sha256: str
    pooling: str
    padding: str
    sizes_px: tuple[int, ...]
    layers: tuple[str, ...]
    images: tuple[StoredImage, ...]


@dataclass(frozen=True)
class Style:
    """A stored style, without its files. It has images, or was imported with a `file`."""

    id: str
    display_name: str
    images: tuple[StoredImage, ...]
    create_time: datetime
    file: StyleFile | None = None

    @property
    def name(self) -> str:
        """Resource name."""
        return f"styles/{self.id}"

    @property
    def content(self) -> tuple[Any, ...]:
        """What makes it another style than others."""
        return self.images, self.display_name, self.file


@dataclass(frozen=True)
class StyleStore:
    """The styles below one folder. Every method touches the disk and may be called from any thread."""

    folder: Path

    def create(self, style: Style, files: Sequence[bytes]) -> Style:
        """Store a style and return it; the same content under the same id, or under none, returns what is there.

        `files` are those of its images in their order, or the one that it was imported with. Raises InvalidField for a
        malformed id, AlreadyExists for other content, StorageFull.
        """
        style = replace(style, id=style.id or _content_id(style))
        if not ID.fullmatch(style.id):
            raise InvalidField("style_id", f"must match {ID.pattern}, not {style.id!r}")
        try:
            if not self._write(style, files):
                return self._same(style)
        except OSError as error:
            raise refusal(error, "the style was not stored: the data folder") or error from error
        return style

    def get(self, name: str, field: str = "name") -> Style:
        """Return the style of a resource name or id. Raises NotFound, naming `field`."""
        style_id = name.removeprefix("styles/")
        try:
            if ID.fullmatch(style_id):
                return _read(self.folder / style_id)
        except FileNotFoundError:
            pass
        except DAMAGED as error:
            log.warning("style is damaged", style=style_id, error=repr(error))
            raise NotFound(field, f"the style {name!r} is damaged; delete it and create it again") from error
        raise NotFound(field, f"there is no style {name!r}")

    def paths(self, style: Style) -> list[Path]:
        """Return where the files are that a style was created with, in their order."""
        names = [f"{image.sha256}.image" for image in style.images]
        return [
            self.folder / style.id / name for name in ([f"{style.file.sha256}.safetensors"] if style.file else names)
        ]

    def files(self, style: Style, field: str = "name") -> list[bytes]:
        """Return the files that a style was created with. Raises NotFound if it is gone, or its style file damaged."""
        try:
            files = [path.read_bytes() for path in self.paths(style)]
        except FileNotFoundError:
            raise NotFound(field, f"the style {style.name!r} was deleted") from None
        if style.file is not None and hashlib.sha256(files[0]).hexdigest() != style.file.sha256:
            raise NotFound(field, f"the style {style.name!r} is damaged; delete it and import it again")
        return files

    def list(self) -> list[Style]:
        """Return every style, in the order of their ids."""
        found = []
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else []:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if ID.fullmatch(folder.name):
                    try:
                        found.append(_read(folder))
                    except DAMAGED as error:
                        log.warning("style is damaged", style=folder.name, error=repr(error))
        return found

    def delete(self, name: str) -> None:
        """Delete a style, even a damaged one. Raises NotFound."""
        style_id = name.removeprefix("styles/")
        # A mere rename: on a full disk, where there is no room for a new folder, deleting must work.
        deleted = self.folder / f".deleted-{uuid.uuid4().hex}"
        try:
            if not ID.fullmatch(style_id):
                raise FileNotFoundError
            (self.folder / style_id).rename(deleted)
        except FileNotFoundError:
            raise NotFound("name", f"there is no style {name!r}") from None
        except OSError as error:
            raise refusal(error, "the style was not deleted: the data folder") or error from error
        shutil.rmtree(deleted, ignore_errors=True)

    def clean(self) -> None:
        """Make the folder and remove what an interrupted run left half done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _write(self, style: Style, files: Sequence[bytes]) -> bool:
        """Write a style's folder; return False if there is one of that id."""
        new = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        try:
            for path, data in zip(self.paths(style), files, strict=True):
                _write_durably(new / path.name, data)
            record = asdict(style) | {"create_time": style.create_time.isoformat()}
            _write_durably(new / "style.json", json.dumps(record, indent=2).encode())
            _settle(new)
            new.rename(self.folder / style.id)  # fails if that folder exists and is not empty
            _settle(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
        return True

    def _same(self, style: Style) -> Style:
        try:
            there = self.get(style.id)
        except NotFound as error:
            raise AlreadyExists(f"{style.name} exists and is damaged; delete it or choose another style_id") from error
        if there.content != style.content:
            raise AlreadyExists(
                f"{style.name} exists, with other images, weights or display name; delete it or choose another style_id"
            )
        return there


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _settle(folder: Path) -> None:
    """Wait until the names in a folder would survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _content_id(style: Style) -> str:
    files = [(image.sha256, image.weight) for image in style.images] if style.file is None else style.file.sha256
    content = json.dumps([style.display_name, files])
    return f"style-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _read(folder: Path) -> Style:
    record = json.loads((folder / "style.json").read_text())
    return Style(
        id=record["id"],
        display_name=record["display_name"],
        images=_images(record["images"]),
        create_time=datetime.fromisoformat(record["create_time"]),
        file=_file(record["file"]) if record.get("file") else None,
    )


def _file(record: Mapping[str, Any]) -> StyleFile:
    tuples = {name: tuple(record[name]) for name in ("sizes_px", "layers")}
    return StyleFile(**{**record, **tuples, "images": _images(record["images"])})


def _images(records: Iterable[Mapping[str, Any]]) -> tuple[StoredImage, ...]:
    return tuple(StoredImage(**image) for image in records)
