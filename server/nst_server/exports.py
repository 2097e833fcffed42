"""Exports: files that take torch to make. They are made one at a time, by a process that ends with its file, and kept.

    exports/{key}.{sha256}      a file, by a hash of all that it depends on, and by its own
    exports/{key}.partial       one that is being made

Whatever is here can be made anew, to the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from nst_server import errors
from nst_server.errors import Internal, QueueFull, RequestError, Stopping
from nst_server.executor import CONTEXT, exit_description, warm
from nst_server.messages import Exported, ExportTask, NotExported
from nst_server.storage.faults import refused

log = structlog.get_logger()

MAKERS = ("nst-service", "torch", "onnx", "onnxscript")
"""Packages of which another version may make another file."""

SIGN_OF_LIFE_S = 10.0
"""How often who waits for a file hears that it is still being made."""

FIRST_SIGN_S = 0.5
"""When who waits for a file hears for the first time that it is being made."""

MAX_WAITING = 16
"""Files that may wait to be made while another is; one more is refused."""

TYPICAL_S = 20.0
"""How long a file takes to be made, as far as is known before the first has been."""

STOPPING = Stopping("the server is stopping and makes no more files")

REFUSALS = {
    kind.reason: kind
    for kind in (
        errors.ModelNotFetched,
        errors.StorageDamaged,
        errors.StorageFull,
        errors.StorageReadOnly,
        errors.StorageUnavailable,
    )
}
"""What the process that makes a file may say that it failed for; anything else is Internal."""


@dataclass(frozen=True)
class ExportOrder:
    """A file that somebody wants.

    Attributes:
        task: how it is made.
        name: what to save it under.
        depends_on: all that its bytes depend on, ready for JSON; the versions of what makes it are added.
    """

    task: ExportTask
    name: str
    depends_on: Mapping[str, Any]

    @functools.cached_property
    def key(self) -> str:
        """What tells the file from all others, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps([_versions(), self.depends_on], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class ExportedFile:
    """A file that is there, open for reading. `size` is in bytes."""

    name: str
    sha256: str
    size: int
    stream: BinaryIO

    async def read(self, offset: int, length: int) -> bytes:
        """Return at most `length` bytes from `offset` on."""
        return await asyncio.to_thread(os.pread, self.stream.fileno(), length, offset)


class _Making:
    """A file that is being made, or looked for. It is given up when nobody waits for it any more."""

    def __init__(self, task: asyncio.Task[Path]) -> None:
        self.task = task
        self.callers = 0


class Exports:
    """The files below one folder.

    Args:
        max_bytes: of all files together; the least recently used go first, but never the newest.
        threads: CPU threads of the process that makes a file; 0 leaves the choice to PyTorch.
    """

    def __init__(self, folder: Path, max_bytes: int, threads: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._threads = threads
        self._makings: dict[str, _Making] = {}
        self._turn = asyncio.Lock()
        self._waiting = 0
        self._typical_s = TYPICAL_S
        self._closed = False
        self._conversing = ThreadPoolExecutor(1, thread_name_prefix="export")

    def clean(self) -> None:
        """Remove what a server that was killed left half done."""
        for leftover in self._folder.glob("*.partial"):
            leftover.unlink(missing_ok=True)

    async def close(self) -> None:
        """Make no more files; who waits for one is told that the server stops."""
        self._closed = True
        tasks = [making.task for making in self._makings.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._conversing.shutdown(wait=False)

    async def made(self, order: ExportOrder) -> AsyncGenerator[ExportedFile | None]:
        """Yield None now and then while a file is made, and at the end the file, which is open until the next step.

        Whoever closes the generator does not want the file any more. Raises RequestError.
        """
        path: Path | None = None
        while path is None:
            making = self._making(order)
            making.callers += 1
            try:
                pause_s = FIRST_SIGN_S
                while not (await asyncio.wait([making.task], timeout=pause_s))[0]:
                    yield None
                    pause_s = SIGN_OF_LIFE_S
                path = _outcome(making.task)
                stream = await asyncio.to_thread(path.open, "rb")
            except FileNotFoundError:  # others were made in that moment, and this one had to go
                path = None
            finally:
                making.callers -= 1
                if not making.callers:
                    making.task.cancel()
                    self._forget(order.key, making)
        with stream:
            yield ExportedFile(order.name, path.suffix.removeprefix("."), os.fstat(stream.fileno()).st_size, stream)

    async def kept(self, path: Path, name: str, sha256: str) -> AsyncGenerator[ExportedFile | None]:
        """Yield a file that is kept elsewhere as `made` yields one of these. Raises RequestError."""
        with refused(f"the file {path.name}"):
            stream = await asyncio.to_thread(path.open, "rb")
        with stream:
            yield ExportedFile(name, sha256, os.fstat(stream.fileno()).st_size, stream)

    def _making(self, order: ExportOrder) -> _Making:
        if self._closed:
            raise STOPPING
        key = order.key
        if key not in self._makings:
            self._makings[key] = making = _Making(asyncio.create_task(self._file(key, order)))
            making.task.add_done_callback(lambda _: self._forget(key, making))
        return self._makings[key]

    def _forget(self, key: str, making: _Making) -> None:
        if self._makings.get(key) is making:
            del self._makings[key]
        if making.task.done() and not making.task.cancelled():
            making.task.exception()  # who waited may have left in the same moment

    async def _file(self, key: str, order: ExportOrder) -> Path:
        """Return the file of a key, made if it is not there. Raises RequestError."""
        with refused(f"the folder {self._folder}"):
            if found := await asyncio.to_thread(self._found, key):
                return found
            if self._waiting > MAX_WAITING:
                raise QueueFull(self._waiting, self._typical_s * self._waiting, "exports")
            self._waiting += 1
            try:
                async with self._turn:
                    return await self._make(key, order)
            finally:
                self._waiting -= 1

    async def _make(self, key: str, order: ExportOrder) -> Path:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        partial = self._folder / f"{key}.partial"
        await warm()
        ours, theirs = CONTEXT.Pipe()
        arguments = (theirs, self._threads, dict(os.environ))
        process = CONTEXT.Process(target=_process_main, args=arguments, daemon=True, name="nst-export")
        with theirs:
            process.start()
        conversation = loop.run_in_executor(self._conversing, _converse, ours, process, order.task, partial)
        try:
            outcome = await asyncio.shield(conversation)
            if isinstance(outcome, NotExported):
                raise REFUSALS.get(outcome.reason, Internal)(outcome.message)
            seconds = loop.time() - began
            self._typical_s += 0.3 * (seconds - self._typical_s)
            log.info("exported", file=order.name, bytes=outcome.size, seconds=round(seconds, 1))
            return await asyncio.to_thread(self._kept, partial, key, outcome.sha256)
        except asyncio.CancelledError:
            log.info("export given up", file=order.name)
            raise
        finally:
            process.kill()
            await asyncio.shield(conversation)  # it ends with the process
            partial.unlink(missing_ok=True)

    def _found(self, key: str) -> Path | None:
        for path in self._folder.glob(f"{key}.*"):
            if path.suffix != ".partial":
                if _sha256(path) == path.suffix.removeprefix("."):
                    with contextlib.suppress(OSError):  # it can be read, whatever else
                        os.utime(path)
                    return path
                log.warning("export is damaged and will be made anew", file=str(path))
                path.unlink(missing_ok=True)
        return None

    def _kept(self, partial: Path, key: str, sha256: str) -> Path:
        path = partial.rename(self._folder / f"{key}.{sha256}")
        self._trim(path)
        return path

    def _trim(self, newest: Path) -> None:
        files = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                files.append((path == newest, path.stat().st_mtime, path.stat().st_size, path))
        total = sum(size for _, _, size, _ in files)
        for kept, _, size, path in sorted(files):
            if total <= self._max_bytes or kept:
                return
            path.unlink(missing_ok=True)
            total -= size


@functools.cache
def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in MAKERS}


def _outcome(task: asyncio.Task[Path]) -> Path:
    """Return what a task that is done has come to. Raises Stopping if it was cancelled, which only a stop does."""
    try:
        return task.result()
    except asyncio.CancelledError:
        raise STOPPING from None


def _converse(connection: Connection, process: BaseProcess, task: ExportTask, partial: Path) -> Exported | NotExported:
    """Have a process make a file; return how it ended, with the process."""
    outcome: Exported | NotExported | None = None
    with connection, contextlib.suppress(EOFError, OSError):
        connection.send((task, partial))
        outcome = connection.recv()
        process.kill()
    process.join()
    how = exit_description(process.exitcode)
    return outcome or NotExported(RequestError.reason, f"the export process ended before its file was made: {how}")


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _process_main(connection: Connection, threads: int, environment: dict[str, str]) -> None:
    # Imported here, in the child: this module belongs to the front, which never imports torch.
    from nst_server.export_process import main  # noqa: PLC0415

    os.environ |= environment  # it was forked from a process that was started before
    main(connection, threads)
