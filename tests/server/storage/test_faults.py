"""Disks that are full, read-only or damaged, and databases that refuse: what is said, and that nothing is half done.

The disk faults run in a process of its own, as the limits are a process's: a file that may not grow stands for a full
disk, a folder without write permission (and for root without the capability to ignore it) for a read-only one.
"""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy import text

from nst_server.errors import NotFound, StorageDamaged, StorageFull, StorageReadOnly, StorageUnavailable
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore
from nst_server.storage.faults import refusal
from nst_server.storage.records import Batch, EventRecord, JobRecord

NOW = datetime(2026, 1, 2, tzinfo=UTC)
LEAF = 0x0A  # the first byte of a leaf of an index in SQLite, or of a table without row ids

FULL = """
import asyncio, resource, sys
from datetime import datetime, UTC
from pathlib import Path
from nst_server.errors import StorageFull
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore
from nst_server.storage.records import EventRecord

async def main(folder):
    store = await JobStore.open(folder / "nst.sqlite3")
    blobs = Blobs.open(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    number = 0
    try:
        while True:
            events = [EventRecord(number + n, 0, datetime.now(UTC), "progress", {"x": "y" * 5000}) for n in (1, 2, 3)]
            await store.append("a", None, events)
            number += 3
    except StorageFull as error:
        print(number, error)
    for data in (bytes(500_000), bytes(6_000_000)):
        try:
            await blobs.put(data)
        except StorageFull as error:
            print(error)
    try:
        blobs.write_now("checkpoints/a", bytes(500_000))
    except StorageFull as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    await store.append("a", None, events)
    await store.close()

asyncio.run(main(Path(sys.argv[1])))
"""

READ_ONLY = """
import asyncio, sys
from pathlib import Path
from nst_server.errors import StorageReadOnly
from nst_server.storage.blobs import Blobs
from nst_server.storage.database import JobStore

async def main(folder):
    for where in (folder / "nst.sqlite3", folder / "new.sqlite3", folder / "new" / "nst.sqlite3"):
        try:
            await JobStore.open(where)
        except StorageReadOnly as error:
            print(error)
    blobs = Blobs.open(folder)
    for write in (blobs.put(b"picture"), blobs.write("checkpoints/a", b"x"), blobs.delete(sys.argv[2])):
        try:
            await write
        except StorageReadOnly as error:
            print(error)
    try:
        Blobs.open(folder / "new")
    except StorageReadOnly as error:
        print(error)
    assert await blobs.get(sys.argv[2]) == b"there"

asyncio.run(main(Path(sys.argv[1])))
"""


def told(script: str, *arguments: object, prefix: tuple[str, ...] = ()) -> list[str]:
    """Return the lines that a process prints, which must end well."""
    command = [*prefix, sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


async def test_a_full_disk_is_said_and_harms_nothing(tmp_path: Path) -> None:
    """STORAGE_FULL from the database and the blobs; what was refused is not there by half, and with room it goes on."""
    store = await JobStore.open(tmp_path / "nst.sqlite3")
    await store.create(JobRecord("a", NOW))
    await store.close()

    database, *blobs = await asyncio.to_thread(told, FULL, tmp_path)

    number, message = database.split(" ", 1)
    assert f"{tmp_path}/nst.sqlite3 is full" in message
    assert len(blobs) == 3
    assert all(f"{tmp_path} is full" in line for line in blobs)
    assert [file for file in tmp_path.rglob("*") if file.is_file() and "sqlite3" not in file.name] == []
    store = await JobStore.open(tmp_path / "nst.sqlite3")
    assert [event.sequence for event in await store.events("a")] == list(range(1, int(number) + 4))
    await store.close()


async def test_a_database_that_may_not_grow_is_full(tmp_path: Path) -> None:
    """In the midst of a group of writes: none of them is done, and the store goes on."""
    store = await JobStore.open(tmp_path / "nst.sqlite3")
    await store.create(JobRecord("a", NOW))

    def limit(connection: Any) -> None:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 3}")

    await store._write(limit)
    events = [EventRecord(number, 0, NOW, "progress", {"x": "y" * 5000}) for number in range(1, 20)]

    with pytest.raises(StorageFull, match="is full: database or disk is full"):
        await store.append("a", None, events)
    await store.append("a", None, events[:1])

    assert await store.events("a") == events[:1]
    await store.close()


async def test_a_read_only_folder_is_said(tmp_path: Path) -> None:
    """STORAGE_READ_ONLY, for a new database and an old one, a blob and a checkpoint; what is there can be read."""
    folder = tmp_path / "data"
    await (await JobStore.open(folder / "nst.sqlite3")).close()
    sha256 = await Blobs.open(folder).put(b"there")
    (folder / "checkpoints").mkdir()
    paths = [folder, *folder.rglob("*")]
    for path in paths:
        path.chmod(0o555)
    prefix = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    try:
        lines = await asyncio.to_thread(told, READ_ONLY, folder, sha256, prefix=prefix)
    finally:
        for path in paths:
            path.chmod(0o755)

    assert len(lines) == 7
    assert all(f"{folder}" in line and "cannot be written to" in line for line in lines)


async def test_a_file_in_the_folders_place_is_said(tmp_path: Path) -> None:
    """Like a folder that cannot be written to, naming it."""
    (tmp_path / "data").write_text("")

    with pytest.raises(StorageReadOnly, match=r"data/nst\.sqlite3 cannot be written to"):
        await JobStore.open(tmp_path / "data" / "nst.sqlite3")
    with pytest.raises(StorageReadOnly, match="data/blobs cannot be written to"):
        Blobs.open(tmp_path / "data" / "blobs")


@pytest.mark.parametrize("damage", ["page", "header", "short", "nonsense"])
async def test_a_damaged_database_is_said_when_it_is_opened(tmp_path: Path, damage: str) -> None:
    """STORAGE_DAMAGED naming the file and what to do, and the file is left as it is."""
    file = tmp_path / "nst.sqlite3"
    store = await JobStore.open(file)
    await store.create(
        JobRecord("a", NOW), [EventRecord(n, 0, NOW, "progress", {"x": "y" * 900}) for n in range(1, 200)]
    )
    await store.close()
    data = bytearray(file.read_bytes())
    match damage:
        case "page":
            for page in range(8, len(data) // 4096, 2):
                data[page * 4096 : page * 4096 + 64] = os.urandom(64)
        case "header":
            data[:100] = bytes(100)
        case "short":
            del data[len(data) // 2 :]
        case "nonsense":
            data = bytearray(os.urandom(20_000))
    file.write_bytes(data)

    for _ in range(2):
        with pytest.raises(
            StorageDamaged, match=r"nst\.sqlite3 is damaged: .*; restore it from a backup, or move it away"
        ):
            await JobStore.open(file)
    assert file.read_bytes() == data


async def test_damage_that_comes_later_is_said(tmp_path: Path) -> None:
    """STORAGE_DAMAGED from whatever reads it; other jobs go on.

    SQLite's cache is smaller than the events of either job, and holds those of the second, the last that opening reads.
    """
    file = tmp_path / "nst.sqlite3"
    store = await JobStore.open(file)
    for job, letter in (("a", "y"), ("b", "z")):
        events = [EventRecord(n, 0, NOW, "progress", {"x": letter * 900}) for n in range(1, 5000)]
        await store.create(JobRecord(job, NOW), events)
    await store.close()
    store = await JobStore.open(file)
    data = bytearray(file.read_bytes())
    for page in range(len(data) // 4096):
        if b"y" * 900 in data[page * 4096 : (page + 1) * 4096] and data[page * 4096] == LEAF:
            data[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    file.write_bytes(data)

    with pytest.raises(StorageDamaged, match=r"nst\.sqlite3 is damaged"):
        await store.events("a", limit=10_000)
    assert (await store.get("b")).id == "b"
    event = EventRecord(5000, 0, NOW, "progress", {})
    hurt, fine = await store.append_many([Batch("a", [event]), Batch("b", [event])])
    assert isinstance(hurt, StorageDamaged)
    assert fine is None
    assert [event.sequence for event in await store.events("b", after=4998)] == [4999, 5000]
    await store.close()


async def test_a_locked_database_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process writes for longer than is waited; then it goes on."""
    monkeypatch.setattr("nst_server.storage.database.BUSY_TIMEOUT_MS", 50)
    first, second = await JobStore.open(tmp_path / "nst.sqlite3"), await JobStore.open(tmp_path / "nst.sqlite3")
    await first.create(JobRecord("a", NOW))

    async def slow(connection: Any) -> None:
        with pytest.raises(StorageUnavailable, match="cannot be reached: database is locked"):
            await second.append("a", changes={"device": "cpu"})

    from sqlalchemy.util import await_only

    await first._write(lambda connection: await_only(slow(connection)))
    await second.append("a", changes={"device": "cpu"})
    for store in (first, second):
        await store.close()


@pytest.mark.parametrize(
    ("state", "kind"),
    [
        ("53100", StorageFull),
        ("25006", StorageReadOnly),
        ("XX001", StorageDamaged),
        ("57P01", StorageUnavailable),
        ("40P01", StorageUnavailable),
    ],
)
async def test_what_postgresql_reports_is_understood(postgresql_url: str, state: str, kind: type[Exception]) -> None:
    """By SQLSTATE, in the words of PostgreSQL, also in a group of writes; nothing of it is done."""
    store = await JobStore.open(postgresql_url)
    await store.create(JobRecord("a", NOW))
    fault = f"BEGIN RAISE EXCEPTION 'no way' USING ERRCODE = '{state}'; END"
    for statement in (
        f"CREATE FUNCTION fault() RETURNS trigger LANGUAGE plpgsql AS $$ {fault} $$",
        "CREATE TRIGGER fault BEFORE INSERT ON events EXECUTE FUNCTION fault()",
    ):
        await store._write(lambda connection, statement=statement: connection.execute(text(statement)))

    with pytest.raises(kind, match=r"the database postgresql://.*: no way"):
        await store.append("a", None, [EventRecord(1, 0, NOW, "state", {})], {"device": "cpu"})
    assert (await store.get("a")).device == ""
    await store.close()


async def test_a_read_only_postgresql_is_said(postgresql: Any, postgresql_url: str) -> None:
    """A standby, for instance: FAILED_PRECONDITION, and reading goes on."""
    await (await JobStore.open(postgresql_url)).close()
    name = urlsplit(postgresql_url).path[1:]
    postgresql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    store = await JobStore.open(postgresql_url)
    with pytest.raises(StorageReadOnly):
        await store.create(JobRecord("a", NOW))
    assert await store.list() == []
    await store.close()


async def test_a_lost_connection_is_made_anew(postgresql: Any, postgresql_url: str) -> None:
    """After PostgreSQL has ended them all, the next call works."""
    store = await JobStore.open(postgresql_url)
    await store.create(JobRecord("a", NOW))
    postgresql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname LIKE 'nst%'")

    assert (await store.get("a")).id == "a"
    await store.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "x"), StorageFull),
        (OSError(errno.EDQUOT, "x"), StorageFull),
        (PermissionError(errno.EACCES, "x"), StorageReadOnly),
        (OSError(errno.EROFS, "x"), StorageReadOnly),
        (OSError(errno.EIO, "x"), StorageDamaged),
        (ConnectionResetError(errno.ECONNRESET, "x"), StorageUnavailable),
    ],
)
def test_errors_of_disks_are_told_apart(error: OSError, kind: type[Exception]) -> None:
    """By errno."""
    assert type(refusal(error, "the data folder")) is kind


@pytest.mark.parametrize("error", [ValueError("x"), NotFound("name", "x"), OSError(errno.EINVAL, "x"), KeyError()])
def test_other_errors_are_no_refusals(error: Exception) -> None:
    """Those of the program above all."""
    assert refusal(error, "the data folder") is None
