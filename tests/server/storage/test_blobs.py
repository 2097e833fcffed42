"""Blobs in a folder, in memory and in an S3 bucket behave alike."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from nst_server.errors import NotFound, StorageDamaged, StorageUnavailable
from nst_server.storage.blobs import MEMORY, Blobs

DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()
NOTHING = "0" * 64


@pytest.fixture(params=["folder", "memory", "s3"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """An empty store of each kind."""
    match request.param:
        case "folder":
            return Blobs.open(tmp_path / "a #1%?" / "blobs")
        case "memory":
            return Blobs.open(MEMORY)
        case _:
            bucket = f"nst-{uuid.uuid4().hex}"
            endpoint = request.getfixturevalue("s3")
            urllib.request.urlopen(urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")).close()
            return Blobs.open(f"s3://{bucket}/some/prefix")


def file_of(folder: Path, sha256: str = SHA256) -> Path:
    """Return the file of a blob."""
    return folder / "blobs" / sha256[:2] / sha256


@pytest.mark.parametrize("data", [DATA, b"", bytes(12_000_000)], ids=["some", "none", "much"])
async def test_a_blob_comes_back_by_its_hash(blobs: Blobs, data: bytes) -> None:
    """However often it is put; above 5 MiB it travels in parts."""
    sha256 = await blobs.put(data)

    assert sha256 == await blobs.put(data) == hashlib.sha256(data).hexdigest()
    assert await blobs.get(sha256) == data
    assert await blobs.exists(sha256)
    (found,) = [blob async for blob in blobs.list()]
    assert (found.sha256, found.bytes) == (sha256, len(data))
    assert abs(datetime.now(UTC) - found.modified) < timedelta(minutes=1)
    await blobs.delete(sha256)
    await blobs.delete(sha256)
    assert not await blobs.exists(sha256)
    assert [blob async for blob in blobs.list()] == []


async def test_a_blob_is_read_in_parts(blobs: Blobs) -> None:
    """From anywhere; at the end fewer bytes, beyond it none."""
    await blobs.put(DATA)

    assert await blobs.read(SHA256, 0, 10) == DATA[:10]
    assert await blobs.read(SHA256, 1000, 5000) == DATA[1000:6000]
    assert await blobs.read(SHA256, len(DATA) - 3, 100) == DATA[-3:]
    assert (
        await blobs.read(SHA256, len(DATA), 1)
        == await blobs.read(SHA256, 10**9, 1)
        == await blobs.read(SHA256, 5, 0)
        == b""
    )


@pytest.mark.parametrize("start", [0, 1, 2**21, 2**21 + 7, 5_000_000 - 1, 5_000_000])
async def test_the_whole_comes_in_parts(blobs: Blobs, start: int) -> None:
    """From anywhere, each with its place."""
    data = os.urandom(5_000_000)
    sha256 = await blobs.put(data)

    parts = [part async for part in blobs.parts(sha256, len(data), start)]
    assert [place for place, _ in parts] == [start + sum(len(part) for _, part in parts[:n]) for n in range(len(parts))]
    assert b"".join(part for _, part in parts) == data[start:]
    assert max((len(part) for _, part in parts), default=0) <= 2**21


@pytest.mark.parametrize("damage", ["altered first", "altered last", "short", "gone"])
@pytest.mark.parametrize("start", [0, 2_500_000])
async def test_nobody_gets_a_whole_that_is_wrong(tmp_path: Path, damage: str, start: int) -> None:
    """What was altered before the bytes that are asked for, too: the last part never comes."""
    blobs, data = Blobs.open(tmp_path), os.urandom(5_000_000)
    sha256 = await blobs.put(data)
    assert await blobs.intact(sha256, len(data))
    file = file_of(tmp_path, sha256)
    match damage:
        case "altered first":
            file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        case "altered last":
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        case "short":
            file.write_bytes(data[:-1])
        case "gone":
            file.unlink()

    got = b""
    with pytest.raises(NotFound if damage == "gone" else StorageDamaged, match=sha256):
        async for _, part in blobs.parts(sha256, len(data), start):
            got += part
    assert len(got) < len(data) - start
    assert not await blobs.intact(sha256, len(data))
    await blobs.put(data)
    assert await blobs.intact(sha256, len(data))


async def test_what_is_not_there_is_not_found(blobs: Blobs) -> None:
    """A hash, a name, an upload; and no hash is a path."""
    for missing in (blobs.get(NOTHING), blobs.read(NOTHING, 0, 1), blobs.fetch("checkpoints/x")):
        with pytest.raises(NotFound, match="is not stored here"):
            await missing
    with pytest.raises(NotFound):
        blobs.fetch_now("checkpoints/x")
    for odd in ("../../etc/passwd", "", "0" * 63, "G" * 64, "A" * 64):
        with pytest.raises(NotFound, match="is no SHA-256"):
            await blobs.get(odd)
    assert await blobs.assembled("nobody") == b""


async def test_a_named_object_is_replaced(blobs: Blobs) -> None:
    """By another process without an event loop as well; its hash is checked if it is given."""
    first, second = (hashlib.sha256(data).hexdigest() for data in (b"first", b"second"))
    await blobs.write("checkpoints/a", b"first")
    blobs.write_now("checkpoints/a", b"second")

    assert await blobs.fetch("checkpoints/a", second) == blobs.fetch_now("checkpoints/a") == b"second"
    with pytest.raises(StorageDamaged, match="checkpoints/a is damaged: its bytes"):
        await blobs.fetch("checkpoints/a", first)
    with pytest.raises(StorageDamaged):
        blobs.fetch_now("checkpoints/a", first)
    await blobs.write("checkpoints/ab", b"")
    await blobs.write("checkpoints/b/1", b"")
    assert await blobs.keys("checkpoints") == ["checkpoints/a", "checkpoints/ab", "checkpoints/b/1"]
    await blobs.remove_below("checkpoints/b")
    await blobs.remove("checkpoints/a", "checkpoints/none")
    assert await blobs.keys("checkpoints") == ["checkpoints/ab"]


async def test_parts_are_assembled_in_order(blobs: Blobs) -> None:
    """Whatever order they came in, however often; a gap is said."""
    await blobs.put_part("u", 9000, DATA[9000:])
    with pytest.raises(StorageDamaged, match="'u' has a gap at byte 0"):
        await blobs.assembled("u")
    await blobs.put_part("u", 0, DATA[:9000])
    await blobs.put_part("u", 0, DATA[:9000])
    await blobs.put_part("u", 8000, DATA[8000:9500])  # of a caller that has sent other parts before
    await blobs.put_part("v", 0, b"other")

    assert await blobs.assembled("u") == DATA
    await blobs.drop_parts("u")
    assert await blobs.keys("uploads") == ["uploads/v/0000000000000000-0000000000000005"]


@pytest.mark.parametrize("damage", ["altered", "short", "empty", "gone"])
async def test_altered_bytes_are_never_returned(tmp_path: Path, damage: str) -> None:
    """STORAGE_DAMAGED, or NOT_FOUND; to put them again mends it."""
    blobs = Blobs.open(tmp_path)
    file = file_of(tmp_path, await blobs.put(DATA))
    match damage:
        case "altered":
            file.write_bytes(DATA[:-1] + b"x")
        case "short":
            file.write_bytes(DATA[:-1])
        case "empty":
            file.write_bytes(b"")
        case "gone":
            file.unlink()

    with pytest.raises(NotFound if damage == "gone" else StorageDamaged, match=SHA256):
        await blobs.get(SHA256)
    await blobs.put(DATA)
    assert await blobs.get(SHA256) == DATA


WRITER = """
import sys
from pathlib import Path
from nst_server.storage.blobs import Blobs

blobs = Blobs.open(Path(sys.argv[1]))
number = 0
while True:
    number = (number + 1) % 256
    print(number, flush=True)
    blobs.write_now("checkpoints/a", bytes([number]) * 30_000_000)
"""


async def test_a_writer_that_is_killed_leaves_nothing_by_half(tmp_path: Path) -> None:
    """Three times, in the midst of 30 MB: the name stands for the old bytes or the new; leftovers are cleaned up."""
    blobs = Blobs.open(tmp_path)
    partial = tmp_path / "checkpoints" / "a#1"
    interrupted = 0
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout
            for _ in range(2):
                writer.stdout.readline()
            while not partial.exists():
                pass
            writer.kill()
        interrupted += partial.exists()
        data = await blobs.fetch("checkpoints/a")
        assert (len(data), len(set(data))) == (30_000_000, 1)
        assert await blobs.keys("") == ["checkpoints/a"]
        await blobs.clean(datetime.now(UTC) + timedelta(minutes=1))
        assert not partial.exists()
    assert interrupted, "no write was interrupted"


async def test_leftovers_of_killed_writers_are_removed(tmp_path: Path) -> None:
    """Old ones only: somebody may still be writing the others. They are no objects."""
    blobs = Blobs.open(tmp_path)
    file = file_of(tmp_path, await blobs.put(DATA))
    old, new, other = (file.with_name(f"{file.name}{end}") for end in ("#1", "#2", "#x"))
    for leftover in (old, new, other):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    os.utime(file, (0, 0))

    assert [blob.sha256 async for blob in blobs.list()] == [SHA256]
    await blobs.clean(datetime.now(UTC) - timedelta(hours=1))

    assert sorted(file.parent.iterdir()) == sorted([file, new, other])


async def test_blobs_are_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    """By its path and by its URL; those in memory are gone."""
    await Blobs.open(tmp_path / "data").put(DATA)

    for where in (tmp_path / "data", f"file://{tmp_path}/data"):
        assert await Blobs.open(where).get(SHA256) == DATA
    await Blobs.open(MEMORY).put(DATA)
    assert not await Blobs.open(MEMORY).exists(SHA256)


@pytest.mark.parametrize("url", ["ftp://host/path", "data", ""])
def test_other_places_are_refused(url: str) -> None:
    """Naming those there are."""
    with pytest.raises(ValueError, match="s3://"):
        Blobs.open(url)


async def test_a_bucket_that_is_not_there_is_said(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As is an endpoint that does not answer; both name the bucket."""
    with pytest.raises(StorageUnavailable, match="s3://nobodys-bucket cannot be reached"):
        await Blobs.open("s3://nobodys-bucket").put(DATA)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageUnavailable, match="s3://bucket cannot be reached"):
        await Blobs.open("s3://bucket").put(DATA)
