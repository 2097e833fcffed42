"""Stored styles: one folder each, written whole or not at all.

styles/{id}/style.json       what is known of it
styles/{id}/{sha256}.image   its image files, as they came
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

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
class Style:
    """A stored style, without its images' bytes."""

    id: str
    display_name: str
    images: tuple[StoredImage, ...]
    create_time: datetime

    @property
    def name(self) -> str:
        """Resource name."""
        return f"styles/{self.id}"


@dataclass(frozen=True)
class StyleStore:
    """The styles below one folder. Every method touches the disk and may be called from any thread."""

    folder: Path

    def create(self, style_id: str, display_name: str, images: Sequence[tuple[StoredImage, bytes]]) -> Style:
        """Store a style and return it; the same content under the same id returns what is there.

        Raises InvalidField for a malformed id, AlreadyExists for other content, StorageFull.
        """
        described = tuple(image for image, _ in images)
        style_id = style_id or _content_id(described, display_name)
        if not ID.fullmatch(style_id):
            raise InvalidField("style_id", f"must match {ID.pattern}, not {style_id!r}")
        style = Style(style_id, display_name, described, datetime.now(UTC))
        try:
            if not self._write(style, images):
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

    def files(self, style: Style, field: str = "name") -> list[bytes]:
        """Return the image files of a style, in the order of its images. Raises NotFound if it is gone."""
        try:
            return [(self.folder / style.id / f"{image.sha256}.image").read_bytes() for image in style.images]
        except FileNotFoundError:
            raise NotFound(field, f"the style {style.name!r} was deleted") from None

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

    def _write(self, style: Style, images: Sequence[tuple[StoredImage, bytes]]) -> bool:
        """Write a style's folder; return False if there is one of that id."""
        new = Path(tempfile.mkdtemp(dir=self.folder, prefix=".new-"))
        try:
            for image, data in images:
                (new / f"{image.sha256}.image").write_bytes(data)
            record = asdict(style) | {"create_time": style.create_time.isoformat()}
            (new / "style.json").write_text(json.dumps(record, indent=2))
            new.rename(self.folder / style.id)  # fails if that folder exists and is not empty
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
        if (there.images, there.display_name) != (style.images, style.display_name):
            raise AlreadyExists(
                f"{style.name} exists, with other images, weights or display name; delete it or choose another style_id"
            )
        return there


def _content_id(images: Sequence[StoredImage], display_name: str) -> str:
    content = json.dumps([display_name, [(image.sha256, image.weight) for image in images]])
    return f"style-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _read(folder: Path) -> Style:
    record = json.loads((folder / "style.json").read_text())
    return Style(
        id=record["id"],
        display_name=record["display_name"],
        images=tuple(StoredImage(**image) for image in record["images"]),
        create_time=datetime.fromisoformat(record["create_time"]),
    )
