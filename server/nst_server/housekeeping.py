"""What is kept for how long: jobs by age, everything by size, images as long as somebody holds them, leftovers."""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import structlog

from nst_server.errors import NotFound, RequestError, StorageFull
from nst_server.ledger import Ledger
from nst_server.storage.blobs import Stored
from nst_server.storage.records import ENDED

log = structlog.get_logger()

SWEEP_S = 600.0
"""How often what is kept no longer is removed."""

LOOSE = timedelta(days=1)
"""How long what nobody holds stays after it was last used: images, uploads, what a killed process left half done."""

PRESSED = timedelta(minutes=10)
"""The same when there is more than may be kept."""

JUST_ENDED = timedelta(minutes=1)
"""How long a job that ends, or is paused, stays however much there is: its caller is about to ask for the result."""

REPLAY = timedelta(days=1)
"""How long the progress of an ended job can be replayed; after that its snapshot has the last."""

SLACK = 0.05
"""Of what may be kept: so much more is removed when there is too much, that not all that comes finds it full."""

IN_VAIN_S = 5.0
"""After room was looked for in vain, what comes is refused for so long without looking again."""

DELETE_S = 30.0
"""How long a job that is to be deleted may take to end."""

CHECKED_AT_ONCE = 500


@dataclass
class _Stock:
    """What is stored: bytes of everything, and parts of uploads by their id."""

    bytes: int = 0
    parts: dict[str, list[Stored]] = field(default_factory=lambda: collections.defaultdict(list))


class Housekeeper:
    """Removes what is kept no longer, and sees to it that no more comes than may be kept.

    Args:
        delete: deletes a job by its name, and returns how many bytes that made free; see `Application.delete_job`.
        keep: how long a job that has ended stays; None for ever.
        keep_bytes: how large images, uploads and checkpoints may be together; None for no limit. What nobody holds
            goes first, then the jobs that are at rest, ended or paused, those that have been for longest before others.
    """

    def __init__(
        self, ledger: Ledger, delete: Callable[[str], Awaitable[int]], keep: timedelta | None, keep_bytes: int | None
    ) -> None:
        self._ledger = ledger
        self._delete = delete
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._turn = asyncio.Lock()
        self._used = keep_bytes or 0  # as measured last, and what has come since; before that the worst
        self._in_vain_until = 0.0
        ledger.make_room = self.make_room

    async def run(self) -> None:
        """Sweep now and then, until cancelled."""
        while True:
            await self.sweep(datetime.now(UTC))
            await asyncio.sleep(SWEEP_S)

    async def sweep(self, now: datetime) -> None:
        """Remove what is kept no longer; what the storage refuses stays until the next time."""
        for chore in (self._relieve, self._expire, self._compact, self._tidy, self._drop_unknown):
            async with self._turn:
                try:
                    await chore(now)
                except RequestError as error:
                    log.error("not swept", error=str(error))
                except Exception:  # without sweeping the disk would be full some day
                    log.exception("not swept")
        await self._ledger.store.hold_reserve()

    async def make_room(self, size: int) -> None:
        """Make room for bytes that are about to come. Raises StorageFull if what must stay leaves none."""
        if self._keep_bytes is None:
            return
        if self._used + size > self._keep_bytes:
            async with self._turn:
                if self._used + size > self._keep_bytes and time.monotonic() > self._in_vain_until:
                    await self._relieve(datetime.now(UTC), size)
                    if self._used + size > self._keep_bytes:
                        self._in_vain_until = time.monotonic() + IN_VAIN_S
        if self._used + size > self._keep_bytes:
            raise StorageFull(
                f"there is no room for {size} bytes more: images, uploads and checkpoints take {self._used} of the "
                f"{self._keep_bytes} bytes that keep_gib allows, and are in use or were a moment ago"
            )
        self._used += size

    async def _relieve(self, now: datetime, size: int = 0) -> None:
        """Measure what is stored, and remove what may go if there is too much for that and so many bytes more."""
        stock = await self._stock()
        self._used = stock.bytes
        if self._keep_bytes is None or self._used + size <= self._keep_bytes:
            return
        goal = self._keep_bytes * (1 - SLACK) - size
        for id in await self._stale_uploads(stock, now - PRESSED):
            self._used -= await self._drop_upload(stock, id)
            if self._used <= goal:
                return
        store = self._ledger.store
        for sha256 in await store.unreferenced(now - PRESSED):
            self._used -= await store.collect(sha256, now - PRESSED, self._ledger.remove)
            if self._used <= goal:
                return
        for id in await store.at_rest(now - JUST_ENDED, self._ledger.owner):
            self._used -= await self._drop_job(id, "there is more than may be kept")
            if self._used <= goal:
                return

    async def _expire(self, now: datetime) -> None:
        if self._keep is not None:
            for id in await self._ledger.store.at_rest(now - self._keep, self._ledger.owner):
                await self._drop_job(id, "kept for long enough")

    async def _compact(self, now: datetime) -> None:
        for id, sequence in await self._ledger.store.ended_before(now - REPLAY):
            await self._ledger.store.compact(id, sequence)

    async def _tidy(self, now: datetime) -> None:
        """Remove what nobody holds, and what is left of uploads, jobs and writers that are no more."""
        store, blobs = self._ledger.store, self._ledger.blobs
        stock = await self._stock()
        for id in await self._stale_uploads(stock, now - LOOSE):
            await self._drop_upload(stock, id)
        for sha256 in await store.unreferenced(now - LOOSE):
            await store.collect(sha256, now - LOOSE, self._ledger.remove)
        for id in {key.split("/")[1] for key in await blobs.keys("checkpoints")}:
            if await self._is_over(id):
                await blobs.remove_below(f"checkpoints/{id}")
        await blobs.clean(now - LOOSE)

    async def _drop_unknown(self, now: datetime) -> None:
        """Remove the blobs that the database knows nothing of: it was moved away, or restored from a backup."""
        blobs = self._ledger.blobs
        old = [found.sha256 async for found in blobs.list() if found.modified < now - LOOSE]
        for start in range(0, len(old), CHECKED_AT_ONCE):
            some = old[start : start + CHECKED_AT_ONCE]
            await blobs.delete(*(set(some) - await self._ledger.store.known(some)))

    async def _stock(self) -> _Stock:
        stock = _Stock()
        async for found in self._ledger.blobs.below(""):
            stock.bytes += found.bytes
            kind, id, *_ = found.key.split("/")
            if kind == "uploads":
                stock.parts[id].append(found)
        return stock

    async def _stale_uploads(self, stock: _Stock, older_than: datetime) -> list[str]:
        """Return the uploads of which nothing has come since a time, those that the database does not know included."""
        active = {id for id, parts in stock.parts.items() if max(part.modified for part in parts) >= older_than}
        begun = await self._ledger.store.uploads_before(older_than)
        known = set(begun)
        unknown = [id for id in stock.parts if id not in known]
        return [id for id in (*begun, *unknown) if id not in active]

    async def _drop_upload(self, stock: _Stock, id: str) -> int:
        await self._ledger.store.delete_upload(id)
        parts = stock.parts.get(id, [])
        await self._ledger.blobs.remove(*(part.key for part in parts))
        return sum(part.bytes for part in parts)

    async def _drop_job(self, id: str, reason: str) -> int:
        log.info(f"job deleted: {reason}", job=f"jobs/{id}")
        try:
            async with asyncio.timeout(DELETE_S):
                return await self._delete(f"jobs/{id}")
        except NotFound:
            return 0  # its caller was faster, or another server
        except TimeoutError:
            log.error("job not deleted: it does not end", job=f"jobs/{id}")
            return 0

    async def _is_over(self, id: str) -> bool:
        try:
            return (await self._ledger.store.get(id)).state in ENDED
        except NotFound:
            return True
