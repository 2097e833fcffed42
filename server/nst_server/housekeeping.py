"""What is kept for how long: ended jobs by age and by size, images as long as a job holds them, events, leftovers."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import structlog

from nst_server.errors import NotFound, RequestError
from nst_server.ledger import Ledger
from nst_server.storage.records import ENDED

log = structlog.get_logger()

SWEEP_S = 600.0
"""How often what is kept no longer is removed."""

LOOSE = timedelta(days=1)
"""How long an image that no job holds, an upload that is not complete and what a killed process left half done stay."""

REPLAY = timedelta(days=1)
"""How long the progress of an ended job can be replayed; after that its snapshot has the last."""

CHECKED_AT_ONCE = 500


class Housekeeper:
    """Removes what is kept no longer.

    Args:
        keep: how long an ended job stays; None for ever.
        keep_bytes: how large the images of all jobs may be together before ended jobs go, the oldest first; None for
            no limit.
    """

    def __init__(self, ledger: Ledger, keep: timedelta | None, keep_bytes: int | None) -> None:
        self._ledger = ledger
        self._keep = keep
        self._keep_bytes = keep_bytes

    async def run(self) -> None:
        """Sweep now and then, until cancelled."""
        while True:
            try:
                await self.sweep(datetime.now(UTC))
            except RequestError as error:
                log.error("not swept", error=str(error))
            except Exception:  # without sweeping the disk would be full some day
                log.exception("not swept")
            await asyncio.sleep(SWEEP_S)

    async def sweep(self, now: datetime) -> None:
        """Remove what is kept no longer. Raises RequestError if the storage refuses."""
        store, blobs = self._ledger.store, self._ledger.blobs
        for id in await store.expired(None if self._keep is None else now - self._keep, self._keep_bytes):
            log.info("job deleted: kept for long enough", job=f"jobs/{id}")
            await self._delete(id)
        for id, sequence in await store.ended_before(now - REPLAY):
            await store.compact(id, sequence)
        for sha256 in await store.unreferenced(now - LOOSE):
            await store.collect(sha256, now - LOOSE, blobs.delete)
        for upload in await store.stale_uploads(now - LOOSE):
            await store.delete_upload(upload)
            await blobs.drop_parts(upload)
        for id in {key.split("/")[1] for key in await blobs.keys("checkpoints")}:
            if await self._is_over(id):
                await blobs.remove_below(f"checkpoints/{id}")
        await self._drop_unknown(now - LOOSE)
        await blobs.clean(now - LOOSE)

    async def _delete(self, id: str) -> None:
        try:
            await self._ledger.delete(id)
        except NotFound:
            return  # its caller was faster, or another server

    async def _is_over(self, id: str) -> bool:
        try:
            return (await self._ledger.store.get(id)).state in ENDED
        except NotFound:
            return True

    async def _drop_unknown(self, older_than: datetime) -> None:
        """Remove the blobs that the database knows nothing of: it was moved away, or restored from a backup."""
        old = [blob.sha256 async for blob in self._ledger.blobs.list() if blob.modified < older_than]
        for start in range(0, len(old), CHECKED_AT_ONCE):
            some = old[start : start + CHECKED_AT_ONCE]
            for sha256 in set(some) - await self._ledger.store.known(some):
                await self._ledger.blobs.delete(sha256)
