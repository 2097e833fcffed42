"""The library: images by content, uploaded in parts that can be sent again, downloaded in parts from anywhere."""

from __future__ import annotations

import asyncio
import hashlib
import re
import uuid
import weakref
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime

from nst_server import images
from nst_server.errors import InvalidField, NotFound, PartMissing, StorageDamaged, StorageFull
from nst_server.ledger import Ledger
from nst_server.storage.records import ImageRecord, UploadRecord

SHA256 = re.compile(r"[0-9a-f]{64}")
WHOLE_AT_ONCE = 2
"""Uploads that are joined, checked and decoded at the same time: each takes its file's memory and its picture's."""


@dataclass(frozen=True)
class Upload:
    """An image on its way; `image` is the SHA-256 of one that is complete."""

    id: str
    total_bytes: int
    received_bytes: int
    image: str = ""


class Library:
    """The images of one server. Raises RequestError for what it refuses.

    Args:
        max_bytes: of one image file.
        max_pixels: of one image.
    """

    def __init__(self, ledger: Ledger, max_bytes: int, max_pixels: int) -> None:
        self._ledger = ledger
        self._max_bytes = max_bytes
        self._max_pixels = max_pixels
        self._completing = asyncio.Semaphore(WHOLE_AT_ONCE)
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def create(self, total_bytes: int, sha256: str, caller: str = "") -> Upload:
        """Begin an upload; one of an image that is here is complete at once."""
        if not 1 <= total_bytes <= self._max_bytes:
            raise InvalidField("total_bytes", f"must be from 1 to {self._max_bytes}, not {total_bytes}")
        sha256 = sha256.lower()
        if sha256 and not SHA256.fullmatch(sha256):
            raise InvalidField("sha256", f"must be 64 hexadecimal digits, not {sha256[:80]!r}")
        upload = UploadRecord(uuid.uuid4().hex, caller, total_bytes, sha256, datetime.now(UTC))
        await self._ledger.store.add_upload(upload)  # from now on the image, if it is here, stays
        if sha256 and await self._here(sha256, total_bytes):
            await self._ledger.store.advance_upload(upload.id, 0, total_bytes)
            return Upload(upload.id, total_bytes, total_bytes, sha256)
        try:
            await self._ledger.make_room(total_bytes)
        except StorageFull:
            await self._ledger.store.delete_upload(upload.id)
            raise
        return Upload(upload.id, total_bytes, 0)

    async def get(self, name: str) -> Upload:
        """Return how far an upload has come."""
        record = await self._ledger.store.upload(_id(name))
        if record.received == record.size and record.sha256 and await self._here(record.sha256, record.size):
            return Upload(record.id, record.size, record.size, record.sha256)
        return Upload(record.id, record.size, record.received)

    async def write(self, name: str, offset: int, data: bytes) -> Upload:
        """Add a part; with the last one the whole becomes an image."""
        async with self._turns.setdefault(name, asyncio.Lock()):
            return await self._write(name, offset, data)

    async def _write(self, name: str, offset: int, data: bytes) -> Upload:
        store, blobs = self._ledger.store, self._ledger.blobs
        record = await store.upload(_id(name))
        end = offset + len(data)
        if not data:
            raise InvalidField("data", "is empty")
        if offset < 0 or end > record.size:
            raise InvalidField(
                "offset", f"and data must lie within the {record.size} bytes of the whole, not end at {end}"
            )
        if offset > record.received:
            raise PartMissing(record.received)
        if end > record.received:
            data, offset = data[record.received - offset :], record.received
            await self._ledger.make_room(len(data))
            await blobs.put_part(record.id, offset, data)
            if not await store.advance_upload(record.id, offset, len(data)):
                return await self.get(name)  # somebody else was faster
        there = await self.get(name)
        return there if end < record.size or there.image else await self._complete(record)

    async def describe(self, name: str) -> ImageRecord:
        """Return what is known of an image."""
        sha256 = name.removeprefix("images/")
        if not SHA256.fullmatch(sha256):
            raise NotFound("name", f"there is no image {name!r}")
        image = await self._ledger.store.image(sha256)
        if not image.mime.startswith("image/"):  # a style file, which a job holds
            raise NotFound("name", f"there is no image {name!r}")
        return image

    async def read(self, image: ImageRecord, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        """Yield the parts of an image's file from an offset on, each with its own.

        Raises StorageDamaged before the last part if the file is not what it was.
        """
        try:
            async for part in self._ledger.blobs.parts(image.sha256, image.bytes, offset):
                yield part
        except NotFound as error:
            raise StorageDamaged(f"the file of images/{image.sha256} is not stored any more") from error

    async def _complete(self, record: UploadRecord) -> Upload:
        async with self._completing:
            return await self._whole(record)

    async def _whole(self, record: UploadRecord) -> Upload:
        """Make an image of an upload whose parts are here."""
        try:
            data = await self._ledger.blobs.assembled(record.id)
        except StorageDamaged:
            if (there := await self.get(record.id)).image:  # another server was faster
                return there
            raise
        try:
            sha256 = await asyncio.to_thread(self._checked, record, data)
            kind = await asyncio.to_thread(images.kind_of, data)
            # Not forgotten yet: who loses this answer sends the last part again. And it holds the image from now on.
            await self._ledger.store.complete_upload(record.id, sha256)
            await self._ledger.keep_image(
                data, kind.width, kind.height, kind.media_type, sha256=sha256, caller=record.caller
            )
        except InvalidField:
            await self._ledger.store.delete_upload(record.id)
            await self._ledger.blobs.drop_parts(record.id)
            raise
        await self._ledger.blobs.drop_parts(record.id)
        return Upload(record.id, record.size, record.size, sha256)

    def _checked(self, record: UploadRecord, data: bytes) -> str:
        """Return the SHA-256 of a whole file. Raises InvalidField."""
        sha256 = hashlib.sha256(data).hexdigest()
        if record.sha256 and sha256 != record.sha256:
            raise InvalidField("sha256", f"of what was sent is {sha256}, not {record.sha256}: send it again")
        images.decode_with_alpha(data, "data", self._max_pixels)
        return sha256

    async def _here(self, sha256: str, total_bytes: int) -> bool:
        try:
            noted = (await self._ledger.store.use(sha256)).bytes == total_bytes
        except NotFound:
            return False
        return noted and await self._ledger.blobs.intact(sha256, total_bytes)  # else an upload mends it


def _id(name: str) -> str:
    if "\0" in name:  # PostgreSQL takes no such text
        raise NotFound("name", f"there is no upload {name!r}")
    return name.removeprefix("uploads/")
