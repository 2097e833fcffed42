"""The journal: writes what happens to jobs to the store, in the order it happened, many jobs in one transaction."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from nst_server.errors import RequestError, StorageFull, StorageReadOnly, StorageUnavailable
from nst_server.storage.database import JobStore
from nst_server.storage.records import Batch

log = structlog.get_logger()

RETRY_S = 1.0
"""How long the journal waits before it tries again to write to a store that takes nothing."""

AT_ONCE = 1000
"""Batches in one transaction."""

PATIENCE_S = 10.0
"""How long a store may take nothing, while another takes its place for instance, before callers are told."""

FOR_A_WHILE = (StorageFull, StorageUnavailable)
"""Why storage may take nothing for a while."""

ALSO_READ_ONLY = (*FOR_A_WHILE, StorageReadOnly)
"""The same of a database: while it is read-only, nobody can even write there that a job has failed of that."""

T = TypeVar("T")


async def patiently(
    work: Callable[[], Awaitable[T]], otherwise: str, reasons: tuple[type[RequestError], ...] = FOR_A_WHILE
) -> T:
    """Return what the work does, tried again for as long as the storage takes nothing: that is nobody's fault.

    `otherwise` is what the log says, once.
    """
    waiting = False
    while True:
        try:
            return await work()
        except reasons as error:
            if not waiting:
                log.error(f"{otherwise} yet", error=str(error))
            waiting = True
            await asyncio.sleep(RETRY_S)


@dataclass(frozen=True)
class _Entry:
    """A batch to write, or None for the question whether all before it is written."""

    batch: Batch | None
    settled: Callable[[Exception | None], None]


class Journal:
    """One writer for all jobs of a server. What it was given is written once, or refused by the store, never lost.

    While the store takes nothing (a full disk, a database that is away or read-only) entries wait; the optimization
    does not.

    Attributes:
        stuck: set while the store takes nothing.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.stuck = asyncio.Event()
        self._refusal: RequestError | None = None
        self._stuck_since = 0.0
        self._entries: list[_Entry] = []
        self._work = asyncio.Event()
        self._task = asyncio.create_task(self._write(), name="journal")

    def add(self, batch: Batch, settled: Callable[[Exception | None], None]) -> None:
        """Write a batch after all before it; `settled` is called when it is durable, or with why it never will be."""
        self._entries.append(_Entry(batch, settled))
        self._work.set()

    async def flush(self) -> None:
        """Wait until everything added so far is settled."""
        settled = asyncio.Event()
        self._entries.append(_Entry(None, lambda _: settled.set()))
        self._work.set()
        await settled.wait()

    @property
    def read_only(self) -> RequestError | None:
        """Why nothing that happens can be told, if it is that the store has been read-only for PATIENCE_S."""
        late = self._late()
        return late if isinstance(late, StorageReadOnly) else None

    async def durable(self, done: Awaitable[Any]) -> None:
        """Wait for what happens when something is durable; raise why it is not if that takes longer than PATIENCE_S.

        It is not undone then, and durable as soon as the store takes something.
        """
        waiting = asyncio.ensure_future(done)
        try:
            while not (await asyncio.wait([waiting], timeout=RETRY_S))[0]:
                if (error := self._late()) is not None:
                    raise error
            waiting.result()
        finally:
            waiting.cancel()

    async def close(self, patience_s: float) -> None:
        """Write what is left, unless the store takes nothing for so long, and stop."""
        try:
            async with asyncio.timeout(patience_s):
                await self.flush()
        except TimeoutError:
            log.error("events were not written", entries=len(self._entries))
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _write(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._entries:
                entries = self._entries[:AT_ONCE]
                try:
                    failures = iter(await self._store.append_many([entry.batch for entry in entries if entry.batch]))
                except RequestError as error:
                    self._stick(error)
                    await asyncio.sleep(RETRY_S)
                    continue
                self._go_on()
                del self._entries[: len(entries)]
                for entry in entries:
                    entry.settled(next(failures) if entry.batch else None)

    def _late(self) -> RequestError | None:
        return self._refusal if time.monotonic() - self._stuck_since > PATIENCE_S else None

    def _stick(self, error: RequestError) -> None:
        if type(error) is not type(self._refusal):
            log.error("events cannot be written yet", error=str(error), entries=len(self._entries))
            self._stuck_since = time.monotonic()
        self._refusal = error
        self.stuck.set()

    def _go_on(self) -> None:
        if self._refusal is not None:
            log.info("events are written again", seconds=round(time.monotonic() - self._stuck_since))
        self._refusal = None
        self.stuck.clear()
