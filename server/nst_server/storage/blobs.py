"""Bytes that outlive the server: pictures by their SHA-256, checkpoints and parts of uploads by name.

    blobs/{first two digits}/{sha256}      pictures
    uploads/{id}/{offset}-{length}         parts of pictures on their way here
    {key}                                  what `write` is told, `checkpoints/…` for instance

In a folder, a bucket (`s3://…`, `gs://…`, `az://…`), or memory. What is written is there as a whole or not at all: a
folder's files get their names when they are complete, a bucket's by nature.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.store import LocalStore, MemoryStore, from_url

from nst_server.errors import NotFound, StorageDamaged
from nst_server.storage.faults import refused

if TYPE_CHECKING:
    from obstore.store import ObjectStore, RetryConfig

T = TypeVar("T")

MEMORY = ":memory:"

SHA256 = re.compile(r"[0-9a-f]{64}")
UNFINISHED = re.compile(r".+#\d+")
"""Name of a file that is still being written."""

SCHEMES = ("s3://", "gs://", "az://", "file://")

RETRIES: RetryConfig = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}

THREADS = ThreadPoolExecutor(16, "nst-blobs")
"""Where the library is called. Its coroutines end in threads of its own, which abort a process that exits meanwhile."""


READ_BYTES = 2 * 1024 * 1024
"""What is read at once of a file that is read in parts."""


@dataclass(frozen=True)
class Stored:
    """What is stored by a name, without its bytes. `bytes` is their number."""

    key: str
    bytes: int
    modified: datetime

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes, of what is stored by it."""
        return self.key.rsplit("/", 1)[1]


class Blobs:
    """Bytes by their SHA-256, and by name.

    All methods raise StorageFull, StorageReadOnly, StorageDamaged and StorageUnavailable. `write_now` and `fetch_now`
    block, for processes without an event loop.
    """

    def __init__(self, store: ObjectStore, place: str) -> None:
        """Use `open`."""
        self._store = store
        self._place = place
        self._folder = store.prefix if isinstance(store, LocalStore) else None

    @classmethod
    def open(cls, where: Path | str) -> Blobs:
        """Return the blobs in a folder, which is made, at a bucket's URL, or in MEMORY of this process.

        A bucket's credentials, region and endpoint come from the environment: AWS_…, GOOGLE_…, AZURE_….
        Raises ValueError for any other URL.
        """
        if isinstance(where, Path):
            place = f"the folder {where}"
            with refused(place):
                where.mkdir(parents=True, exist_ok=True)
                return cls(LocalStore(where.resolve()), place)
        if where == MEMORY:
            return cls(MemoryStore(), "the memory")
        if where.startswith("file://"):
            return cls.open(Path(where.removeprefix("file://")))
        if not where.startswith(SCHEMES):
            raise ValueError(f"blobs are in a folder or at s3://…, gs://… or az://…, not at {where!r}")
        return cls(from_url(where, retry_config=RETRIES), where)

    async def put(self, data: bytes) -> str:
        """Keep bytes and return their SHA-256. Kept ones are written again, which mends damage."""
        sha256 = hashlib.sha256(data).hexdigest()
        await self.write(_key(sha256), data)
        return sha256

    async def get(self, sha256: str) -> bytes:
        """Return the bytes of a hash. Raises NotFound, StorageDamaged if they are others."""
        return await self.fetch(_key(sha256), sha256)

    async def read(self, sha256: str, start: int, length: int) -> bytes:
        """Return at most `length` bytes from `start` on; fewer at the end, where there are none b"". Raises NotFound.

        They are not checked: only the whole can be.
        """
        return await self._do(self._read, _key(sha256), start, length)

    async def parts(self, sha256: str, size: int, start: int = 0) -> AsyncIterator[tuple[int, bytes]]:
        """Yield the `size` bytes of a hash from `start` on, in parts, each with its place.

        Raises NotFound, and StorageDamaged if they are others: before the last part, so that nobody has them all.
        """
        digest, offset = hashlib.sha256(), 0
        while offset < size:
            data = await self.read(sha256, offset, min(READ_BYTES, size - offset))
            await self._do(digest.update, data)
            if not data or (offset + len(data) == size and digest.hexdigest() != sha256):
                raise self._damaged(_key(sha256), sha256)
            if (skipped := max(0, start - offset)) < len(data):
                yield offset + skipped, data[skipped:]
            offset += len(data)

    async def intact(self, sha256: str, size: int) -> bool:
        """Return whether the `size` bytes of a hash are here, and are those."""
        try:
            async for _ in self.parts(sha256, size):
                pass
        except (NotFound, StorageDamaged):
            return False
        return True

    async def exists(self, sha256: str) -> bool:
        """Return whether something is here by a hash."""
        return await self._do(self._exists, _key(sha256))

    async def delete(self, *sha256s: str) -> None:
        """Delete the bytes of some hashes, if they are here."""
        await asyncio.gather(*(self.remove(_key(sha256)) for sha256 in sha256s))

    async def write(self, key: str, data: bytes) -> None:
        """Keep bytes by a name, in place of what had it."""
        await self._do(self.write_now, key, data)

    async def fetch(self, key: str, sha256: str = "") -> bytes:
        """Return the bytes of a name. Raises NotFound, StorageDamaged if they are not of the given SHA-256."""
        return await self._do(self.fetch_now, key, sha256)

    def write_now(self, key: str, data: bytes) -> None:
        """Do what `write` does, and block."""
        with refused(self._place):
            obstore.put(self._store, key, data)
            if self._folder:
                with contextlib.suppress(FileNotFoundError):  # it has been removed again
                    _settle(self._folder, key)

    def fetch_now(self, key: str, sha256: str = "") -> bytes:
        """Do what `fetch` does, and block."""
        with refused(self._place):
            try:
                data = bytes(obstore.get(self._store, key).bytes())
            except FileNotFoundError:
                raise _nothing(key) from None
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            raise self._damaged(key, sha256)
        return data

    async def remove(self, *keys: str) -> None:
        """Delete what has some names, if anything has."""
        for key in keys:
            await self._do(self._remove, key)

    async def keys(self, prefix: str) -> list[str]:
        """Return the names below a prefix of whole segments, `checkpoints/4f1c` for instance, in order."""
        return sorted([found.key async for found in self.below(prefix)])

    async def remove_below(self, prefix: str) -> None:
        """Delete whatever has a name below a prefix."""
        await self.remove(*await self.keys(prefix))

    async def put_part(self, upload_id: str, offset: int, data: bytes) -> None:
        """Keep a part of an upload; `offset` in bytes is where it belongs."""
        await self.write(f"uploads/{upload_id}/{offset:016d}-{len(data):016d}", data)

    async def assembled(self, upload_id: str) -> bytes:
        """Return the parts of an upload, joined; some may overlap. Raises StorageDamaged if one is missing."""
        parts, end = [], 0
        for key in await self.keys(f"uploads/{upload_id}"):
            offset = int(key.rsplit("/", 1)[1].split("-")[0])
            if offset > end:
                raise StorageDamaged(f"{self._place}: the upload {upload_id!r} has a gap at byte {end}")
            parts.append((await self.fetch(key))[end - offset :])
            end += len(parts[-1])
        return b"".join(parts)

    async def drop_parts(self, upload_id: str) -> None:
        """Delete the parts of an upload."""
        await self.remove_below(f"uploads/{upload_id}")

    async def clean(self, older_than: datetime) -> None:
        """Remove what writers that were killed left half done in a folder before a time."""
        if self._folder:
            await self._do(_clean, self._folder, older_than)

    async def list(self) -> AsyncIterator[Stored]:
        """Yield the bytes that are stored by their hash, in no order."""
        async for found in self.below("blobs"):
            if SHA256.fullmatch(found.sha256):
                yield found

    async def below(self, prefix: str) -> AsyncIterator[Stored]:
        """Yield what is stored below a prefix of whole segments, in no order."""
        if self._folder:
            for stored in await self._do(_walk, self._folder, prefix):
                yield stored
            return
        pages = iter(await self._do(obstore.list, self._store, prefix))
        while page := await self._do(next, pages, None):
            for found in page:
                yield Stored(found["path"], found["size"], found["last_modified"].astimezone(UTC))

    def _damaged(self, key: str, sha256: str) -> StorageDamaged:
        return StorageDamaged(f"{self._place}: {key} is damaged: its bytes are not of SHA-256 {sha256}")

    async def _do(self, work: Callable[..., T], *arguments: object) -> T:
        with refused(self._place):
            return await asyncio.get_running_loop().run_in_executor(THREADS, work, *arguments)

    def _read(self, key: str, start: int, length: int) -> bytes:
        try:
            end = min(start + length, obstore.head(self._store, key)["size"])
            return bytes(obstore.get_range(self._store, key, start=start, end=end)) if start < end else b""
        except FileNotFoundError:
            raise _nothing(key) from None

    def _remove(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, key)

    def _exists(self, key: str) -> bool:
        try:
            obstore.head(self._store, key)
        except FileNotFoundError:
            return False
        return True


def _key(sha256: str) -> str:
    if not SHA256.fullmatch(sha256):
        raise NotFound("name", f"{sha256!r} is no SHA-256 in hexadecimal")
    return f"blobs/{sha256[:2]}/{sha256}"


def _nothing(key: str) -> NotFound:
    return NotFound("name", f"{key} is not stored here")


def _settle(folder: Path, key: str) -> None:
    """Wait until a file, its name and its folders' names would survive a loss of power."""
    file = folder / key
    for path in (file, *file.parents):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if path == folder:
            return


def _walk(folder: Path, prefix: str) -> list[Stored]:
    """Return what is below a folder; the library's own listing fails when a file goes meanwhile."""
    found = []
    for place, _, names in os.walk(folder / prefix):
        for name in names:
            file = Path(place, name)
            with contextlib.suppress(FileNotFoundError):
                if not UNFINISHED.fullmatch(name):
                    status = file.stat()
                    modified = datetime.fromtimestamp(status.st_mtime, UTC)
                    found.append(Stored(file.relative_to(folder).as_posix(), status.st_size, modified))
    return found


def _clean(folder: Path, older_than: datetime) -> None:
    for file in folder.rglob("*#*"):
        if UNFINISHED.fullmatch(file.name) and file.stat().st_mtime < older_than.timestamp():
            file.unlink(missing_ok=True)
