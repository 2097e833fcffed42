"""Errors of disks, databases and object stores, and which refusal stands for each."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
import sqlite3
from collections.abc import Iterator

from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

from nst_server.errors import RequestError, StorageDamaged, StorageFull, StorageReadOnly, StorageUnavailable

OS = {
    errno.ENOSPC: StorageFull,
    errno.EDQUOT: StorageFull,
    errno.EFBIG: StorageFull,
    errno.EROFS: StorageReadOnly,
    errno.EACCES: StorageReadOnly,
    errno.EPERM: StorageReadOnly,
    errno.ENOTDIR: StorageReadOnly,
    errno.EEXIST: StorageReadOnly,  # a file in a folder's place
    errno.EIO: StorageDamaged,
}
"""By errno."""

SQLITE = {
    sqlite3.SQLITE_FULL: StorageFull,
    # A write-ahead log or its index that cannot grow.
    sqlite3.SQLITE_IOERR_WRITE: StorageFull,
    sqlite3.SQLITE_IOERR_SHMSIZE: StorageFull,
    sqlite3.SQLITE_READONLY: StorageReadOnly,
    sqlite3.SQLITE_CANTOPEN: StorageReadOnly,
    sqlite3.SQLITE_PERM: StorageReadOnly,
    sqlite3.SQLITE_CORRUPT: StorageDamaged,
    sqlite3.SQLITE_NOTADB: StorageDamaged,
    sqlite3.SQLITE_IOERR: StorageUnavailable,
    sqlite3.SQLITE_BUSY: StorageUnavailable,
    sqlite3.SQLITE_LOCKED: StorageUnavailable,
}
"""By result code, else by its primary code, the lowest 8 bits."""

POSTGRESQL = {
    "53100": StorageFull,
    "25006": StorageReadOnly,
    "42501": StorageReadOnly,
    "XX001": StorageDamaged,
    "XX002": StorageDamaged,
    "28": StorageUnavailable,
    "3D": StorageUnavailable,
    "40": StorageUnavailable,
    "53": StorageUnavailable,
    "57P": StorageUnavailable,
    "58": StorageUnavailable,
    "08": StorageUnavailable,
}
"""By SQLSTATE, else by the beginning of it."""

TEXT = {
    StorageFull: "is full",
    StorageReadOnly: "cannot be written to",
    StorageDamaged: "is damaged",
    StorageUnavailable: "cannot be reached",
}


class LeaseLost(Exception):
    """A worker wrote to a job whose lease it no longer holds."""


class OutOfSequence(Exception):
    """Events do not continue a job's numbering."""


class SchemaNewer(Exception):
    """A newer version of the server has changed the database."""


@contextlib.contextmanager
def refused(storage: str) -> Iterator[None]:
    """Raise within the block what `refusal` makes of errors; `storage` is what failed, "the data folder"."""
    try:
        yield
    except RequestError:  # somebody has said better what failed
        raise
    except Exception as error:
        if (known := refusal(error, storage)) is None:
            raise
        raise known from error


def refusal(error: BaseException, storage: str) -> RequestError | None:
    """Return the refusal that stands for an error of a disk, a database or an object store; None for any other."""
    for cause in _causes(error):
        if (kind := _kind(cause)) is not None:
            reason = re.sub(r"^<class [^>]*>: ", "", str(cause).splitlines()[0])
            return kind(f"{storage} {TEXT[kind]}: {reason}")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, and what it was wrapped around: the database's own."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = getattr(seen, "orig", None) or seen.__cause__


def _kind(error: BaseException) -> type[RequestError] | None:
    kind = None
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)
        kind = SQLITE.get(code) or SQLITE.get(code & 0xFF)
    elif state := getattr(error, "sqlstate", None):
        kind = next((POSTGRESQL[state[:length]] for length in (5, 3, 2) if state[:length] in POSTGRESQL), None)
    elif isinstance(error, PermissionDeniedError | UnauthenticatedError):
        kind = StorageReadOnly
    elif isinstance(error, BaseError):
        number = re.search(r"\(os error (\d+)\)", str(error))
        kind = OS.get(int(number[1])) if number else StorageUnavailable
    elif isinstance(error, ConnectionError | TimeoutError | FileNotFoundError | socket.gaierror) or (
        type(error).__name__ == "InternalClientError"  # what asyncpg makes of a connection that breaks in the midst
    ):
        kind = StorageUnavailable
    elif isinstance(error, OSError):
        kind = OS.get(error.errno or 0)
    return kind
