"""Files that are either whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from nst_client.errors import InvalidArgumentError

MAX_FILE_BYTES = 1 << 30
"""No file above this is read: a message of protobuf ends at 2 GiB, and servers take far less."""


def read_file(
    path: str | os.PathLike[str], *, field: str, kind: type[InvalidArgumentError] = InvalidArgumentError
) -> bytes:
    """Return the bytes of a file that is to be sent. Raises `kind`, naming the request's `field`."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise kind(
                f"{field}: {str(file)!r} has {file.stat().st_size} bytes; at most {MAX_FILE_BYTES} can be sent",
                field=field,
            )
        return file.read_bytes()
    except FileNotFoundError as error:
        raise kind(f"{field}: there is no file {str(file)!r}", field=field) from error
    except OSError as error:
        raise kind(f"{field}: cannot read {str(file)!r}: {error.strerror}", field=field) from error


def write_all(stream: BinaryIO, data: bytes) -> None:
    """Write and flush all of `data`, even to a stream that takes a part at a time, unbuffered. Raises OSError."""
    left = memoryview(data)
    while left:
        left = left[stream.write(left) :]
    stream.flush()


def write_whole(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file in one step and return its path: whoever looks sees the old file or the new one, never a half.

    A link keeps pointing where it points; a device or pipe is written to directly. Raises OSError, naming a file.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return Path(path)
        temporary.write_bytes(data)
        temporary.replace(target)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # a full disk does not say which file
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return Path(path)
