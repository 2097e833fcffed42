"""Pictures that come in parts, put together and checked."""

from __future__ import annotations

import hashlib
from typing import Any

from nst.v1 import image_pb2
from nst_client.convert import named
from nst_client.errors import BrokenStreamError
from nst_client.images import ImageFormat


class PartBuffer:
    """The parts of one kind of picture (frames, or results), in the order of their arrival."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._shape: tuple[object, ...] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no picture has begun without being whole."""
        return self._shape is None

    @property
    def received_bytes(self) -> int:
        """How much there is of a picture that is not whole yet."""
        return len(self._data)

    def clear(self) -> None:
        """Drop a picture that is not whole."""
        self._data.clear()
        self._shape = None

    def add(self, part: image_pb2.ImagePart, *, of: object) -> dict[str, Any] | None:
        """Return the fields of `Picture` once the part makes it whole, else None.

        `of` tells pictures apart: every part of one picture brings an equal value. Raises BrokenStreamError if the
        part does not continue the picture, or the whole has another checksum than the server says.
        """
        shape = (of, part.format, part.width, part.height, part.total_bytes)
        if self._shape is None:
            self._shape = shape
        if part.offset != len(self._data) or shape != self._shape or not part.data:
            raise BrokenStreamError(
                f"an image's part at byte {part.offset} of {part.total_bytes} does not continue"
                f" the {len(self._data)} bytes that came before"
            )
        self._data += part.data
        return self._whole(part) if len(self._data) >= part.total_bytes else None

    def _whole(self, part: image_pb2.ImagePart) -> dict[str, Any]:
        data = bytes(self._data)
        if len(data) != part.total_bytes or hashlib.sha256(data).hexdigest() != part.sha256:
            raise BrokenStreamError(
                f"an image of {len(data)} bytes arrived damaged: {part.total_bytes} bytes with"
                f" SHA-256 {part.sha256 or '(none)'} were announced"
            )
        self.clear()
        kind = named(ImageFormat, image_pb2.ImageFormat.DESCRIPTOR, part.format)
        return {"data": data, "format": kind, "width": part.width, "height": part.height}
