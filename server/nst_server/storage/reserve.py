"""Room on a disk that deletions may have: a database on a full one could not even forget, as that grows its log."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

RESERVE_BYTES = 4 * 2**20
"""Enough to carry over SQLite's log, of 1 MiB and what was written at once last, and for each step of a deletion."""


class Reserve:
    """A file that takes room for as long as nothing needs it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def hold(self) -> None:
        """Take the room, unless it is taken already, or the disk has not so much."""
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._file.parent)
            if self._file.exists() or disk.f_bavail * disk.f_frsize < RESERVE_BYTES:
                return
            try:
                with self._file.open("wb") as stream:
                    stream.write(os.urandom(RESERVE_BYTES))  # zeros are nothing to a file system that compresses
                    stream.flush()
                    os.fsync(stream.fileno())
            except OSError:
                self._file.unlink()

    def spend(self) -> bool:
        """Give the room back to the disk; return whether there was any."""
        try:
            self._file.unlink()
        except OSError:
            return False
        return True
