"""ExportModel: the bytes, the bad requests, who waits for whom, what is kept, and what becomes of a process."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.torch

from nst.v1 import file_pb2, model_service_pb2, style_transfer_service_pb2
from nst_model import read_description
from nst_model.architecture import VGG16
from nst_server import Server, convert
from nst_server import exports as exports_module
from tests.conftest import TINY_WIDTHS, random_state
from tests.server.conftest import Caller, until
from tests.server.test_process import launch
from tests.server.test_styles import small_disk

Serve = Callable[..., Any]

__all__ = ["launch"]

QUICK = {"format": "EXPORT_FORMAT_TORCHSCRIPT"}
"""An export that takes a second."""

SLOW = {"format": "EXPORT_FORMAT_ONNX"}
"""An export that takes five seconds at least."""


def exporting(process: int | None = None) -> set[int]:
    """Return the processes below this one that make a file: those that give way to all others."""
    found: set[int] = set()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{process or os.getpid()}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                nice = os.getpriority(os.PRIO_PROCESS, child) - os.getpriority(os.PRIO_PROCESS, 0)
                found |= {child} if nice == 10 else exporting(child)
    return found


def request(**fields: Any) -> model_service_pb2.ExportModelRequest:
    """Return a request: a QUICK one, changed as told."""
    return model_service_pb2.ExportModelRequest(**(QUICK | fields))


async def parts(caller: Caller, **fields: Any) -> list[file_pb2.FilePart]:
    """Return all that an ExportModel call sends."""
    return [part async for part in caller.models.ExportModel(request(**fields))]


async def exported(caller: Caller, **fields: Any) -> bytes:
    """Return an exported file; every promise of FilePart is asserted."""
    return whole(await parts(caller, **fields))


def whole(sent: list[file_pb2.FilePart], begun: bytes = b"") -> bytes:
    """Return the file that parts make up, some of which may have come before; every promise of FilePart is asserted."""
    data, begins = begun, True
    for part in sent:
        if part == file_pb2.FilePart():
            assert begins, "a sign of life after the file had begun"
            continue
        begins = False
        assert part.offset == len(data)
        assert len(part.data) <= 2 * 1024 * 1024
        data += part.data
        assert part.file_name
        assert (part.total_bytes, part.sha256) == (sent[-1].total_bytes, sent[-1].sha256)
    assert len(data) == sent[-1].total_bytes
    assert hashlib.sha256(data).hexdigest() == sent[-1].sha256
    return data


@contextlib.asynccontextmanager
async def being_made(server: Server, caller: Caller, **fields: Any) -> AsyncIterator[Any]:
    """A call for a file that is being made, by a process that has begun."""
    call = caller.models.ExportModel(request(**(SLOW | fields)))
    reading = asyncio.ensure_future(call.read())
    await until(lambda: bool(exporting()), 10)
    try:
        yield call
    finally:
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reading
        await until(lambda: not (server._application.exports._makings or exporting()))


# The file


async def test_an_exported_model_is_whole_and_says_what_it_is(caller: Caller, tiny_weights_file: Path) -> None:
    """The bytes are those of the hash; the file describes what was asked for; the proposed name says it, too."""
    sent = await parts(caller, graph="EXPORT_GRAPH_CLOSURE", pooling="POOLING_AVERAGE", style_layers=["relu2_1"])
    description = read_description(whole(sent))
    assert (description["graph"], description["format"], description["pooling"]) == (
        "closure",
        "torchscript",
        "average",
    )
    assert (description["model"], description["style_layers"]) == ("vgg16", ["relu2_1"])
    assert description["weights_sha256"] == hashlib.sha256(tiny_weights_file.read_bytes()).hexdigest()
    assert sent[-1].file_name == "vgg16-closure-average-zeros-fp32.pt"


async def test_server_and_command_line_make_the_same_bytes(
    caller: Caller, tiny_weights_file: Path, tmp_path: Path
) -> None:
    """`python -m nst_model export` needs no server, and its file is the server's."""
    environment = os.environ | {"NST_CACHE_DIR": str(tmp_path / "cache")}

    def run(*arguments: str | Path) -> None:
        command = [sys.executable, "-W", "error::UserWarning", "-m", "nst_model", *arguments]
        subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)

    await asyncio.to_thread(run, "fetch", "vgg16", "--file", tiny_weights_file)
    await asyncio.to_thread(run, "export", "vgg16", "--graph", "grams", "--format", "torchscript", "-o", "grams.pt")
    assert await exported(caller, graph="EXPORT_GRAPH_GRAMS") == (tmp_path / "grams.pt").read_bytes()


async def test_a_large_file_comes_in_parts(caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consecutive, none above the bound, with the whole's length, hash and name in every one."""
    data = await exported(caller)
    monkeypatch.setattr(convert, "PART_BYTES", 1000)
    sent = await parts(caller)
    assert whole(sent) == data
    assert {len(part.data) for part in sent[:-1]} == {1000}


async def test_a_download_goes_on_from_any_offset(caller: Caller) -> None:
    """The rest is the rest of the same file, from its end on nothing; another file's begins with its start."""
    data = await exported(caller)
    sha256 = hashlib.sha256(data).hexdigest()
    for offset in (0, 1, len(data) - 1, len(data)):
        for named in ("", sha256, sha256.upper()):
            assert whole(await parts(caller, offset=offset, sha256=named), data[:offset]) == data
    assert whole(await parts(caller, offset=len(data) + 9, sha256="00" * 32)) == data


@pytest.mark.parametrize(
    ("wrong", "code", "field"),
    [
        ({"model": "vgg17"}, "NOT_FOUND", "model"),
        ({"model": "models/"}, None, None),
        ({"graph": 9}, "INVALID_ARGUMENT", "graph"),
        ({"format": 9}, "INVALID_ARGUMENT", "format"),
        ({"precision": 9}, "INVALID_ARGUMENT", "precision"),
        ({"precision": "EXPORT_PRECISION_FP16"}, "INVALID_ARGUMENT", "precision"),
        ({"pooling": 9}, "INVALID_ARGUMENT", "pooling"),
        ({"padding": 9}, "INVALID_ARGUMENT", "padding"),
        ({"style_layers": ["relu6_1"]}, "INVALID_ARGUMENT", "style_layers[relu6_1]"),
        ({"style_layers": ["relu1_1", "relu1_1"]}, "INVALID_ARGUMENT", "style_layers"),
        ({"content_layers": ["relu5_4"]}, "INVALID_ARGUMENT", "content_layers[relu5_4]"),
        ({"layers": ["relu1_1"]}, "INVALID_ARGUMENT", "layers"),
        ({"graph": "EXPORT_GRAPH_FEATURES", "layers": ["x\0"]}, "INVALID_ARGUMENT", "layers[x\0]"),
        ({"graph": "EXPORT_GRAPH_FEATURES", "style_layers": ["relu1_1"]}, "INVALID_ARGUMENT", "style_layers"),
        ({"graph": "EXPORT_GRAPH_GRAMS", "content_layers": ["relu1_1"]}, "INVALID_ARGUMENT", "content_layers"),
        ({"offset": -1}, "INVALID_ARGUMENT", "offset"),
        ({"offset": 2**62}, "INVALID_ARGUMENT", "offset"),
    ],
    ids=str,
)
async def test_bad_requests_are_refused_naming_the_field(
    caller: Caller, wrong: dict[str, Any], code: str | None, field: str | None
) -> None:
    """Each field: what does not exist, what does not go together, what is deeper than the model."""
    if code is None:
        assert await exported(caller, **wrong)
        return
    refusal = await caller.refusal(parts(caller, **wrong))
    assert (refusal.code.name, refusal.field) == (code, field)


async def test_a_model_that_is_not_here_is_refused(caller: Caller) -> None:
    """FAILED_PRECONDITION says how its weights can be had."""
    refusal = await caller.refusal(parts(caller, model="vgg19"))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "MODEL_NOT_FETCHED")
    assert "nst-model fetch vgg19" in refusal.message


# What is kept


async def test_a_file_is_made_once(serve: Serve) -> None:
    """Asked for again, also after a restart, it comes from the data folder; and it is made anew if it was damaged."""
    server, client = await serve()
    data = await exported(client)
    (kept,) = (server._settings.data_dir / "exports").iterdir()
    made = kept.stat().st_ino
    assert await exported(client) == data
    await server.stop(0)
    server, client = await serve()
    assert await exported(client) == data
    assert kept.stat().st_ino == made

    kept.write_bytes(data[:-1] + b"x")
    assert await exported(client) == data
    assert kept.read_bytes() == data


async def test_other_weights_are_another_file(serve: Serve, tmp_path: Path) -> None:
    """A server that is started with other weights does not send what it made of the ones before."""
    server, client = await serve()
    data = await exported(client)
    await server.stop(0)
    weights = tmp_path / "other.safetensors"
    safetensors.torch.save_file(random_state(VGG16, TINY_WIDTHS, seed=1), weights)
    _, client = await serve(weights={"vgg16": weights})
    other = await exported(client)
    assert other != data
    assert read_description(other)["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()


async def test_what_is_kept_is_bounded(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used go first; the newest stays even if it alone is too large."""
    server, client = await serve()
    folder = server._settings.data_dir / "exports"
    first, second = {"graph": "EXPORT_GRAPH_GRAMS"}, {"graph": "EXPORT_GRAPH_FEATURES"}
    sizes = [len(await exported(client, **fields)) for fields in (first, second)]
    (older, newer) = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    await exported(client, **first)  # and so the other one is the least recently used
    monkeypatch.setattr(server._application.exports, "_max_bytes", sum(sizes) + sizes[0] // 2)
    await exported(client, graph="EXPORT_GRAPH_CLOSURE")
    assert (older.exists(), newer.exists()) == (True, False)
    monkeypatch.setattr(server._application.exports, "_max_bytes", 1)
    data = await exported(client, graph="EXPORT_GRAPH_OBJECTIVE")
    assert [file.read_bytes() for file in folder.iterdir()] == [data]


async def test_a_full_disk_is_said_and_leaves_nothing_half(serve: Serve, tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED; nothing of the file is left; with room again it is made."""
    (tmp_path / "data").mkdir()
    with small_disk(tmp_path / "data" / "exports") as folder:
        server, client = await serve(data_dir=tmp_path / "data")
        with contextlib.suppress(OSError), (folder / "filling").open("wb") as stream:
            while True:
                stream.write(bytes(4096))
                stream.flush()
        refusal = await client.refusal(parts(client))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert [file.name for file in folder.iterdir()] == ["filling"]
        (folder / "filling").unlink()
        assert await exported(client)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert await exported(client)  # it is there
        refusal = await client.refusal(parts(client, graph="EXPORT_GRAPH_GRAMS"))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORAGE_READ_ONLY")
        await server.stop(0)


# Who waits


async def test_signs_of_life_come_while_a_file_is_made(
    shared: Server, caller: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Empty parts, before the file; a stock client that appends `data` appends nothing."""
    monkeypatch.setattr(exports_module, "FIRST_SIGN_S", 0.01)
    monkeypatch.setattr(exports_module, "SIGN_OF_LIFE_S", 0.01)
    sent = await parts(caller, padding="PADDING_REPLICATE")
    assert whole(sent)
    assert sent[0] == sent[1] == file_pb2.FilePart()


async def test_a_client_that_leaves_ends_the_making(shared: Server, caller: Caller) -> None:
    """Its process is killed within a second, and nothing of the file is left."""
    async with being_made(shared, caller) as call:
        call.cancel()
        assert await until(lambda: not exporting()) < 1
    assert not list((shared._settings.data_dir / "exports").glob("*.partial"))


async def test_a_deadline_ends_the_making(shared: Server, caller: Caller) -> None:
    """As a client that leaves does."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in caller.models.ExportModel(request(**SLOW), timeout=1):
            pass
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: not exporting())


async def test_a_file_that_somebody_else_waits_for_is_made(shared: Server, caller: Caller) -> None:
    """Two who want the same file wait for one process, which goes on while one of them does."""
    fields = {"graph": "EXPORT_GRAPH_GRAMS", "padding": "PADDING_MIRROR", **SLOW}
    async with being_made(shared, caller, **fields) as first:
        (process,) = exporting()
        second = asyncio.ensure_future(exported(caller, **fields))
        await asyncio.sleep(0.1)
        first.cancel()
        await asyncio.sleep(0.1)
        assert exporting() == {process}
        assert await second
    await until(lambda: not exporting())


async def test_one_file_is_made_at_a_time(shared: Server, caller: Caller) -> None:
    """Whoever comes second waits; there is never more than one process that exports."""
    counts = []
    graphs = ("FEATURES", "GRAMS", "OBJECTIVE")
    fields = [{"graph": f"EXPORT_GRAPH_{graph}", "pooling": "POOLING_L2"} for graph in graphs]
    making = asyncio.gather(*(exported(caller, **each) for each in fields))
    while not making.done():
        counts.append(len(exporting()))
        await asyncio.sleep(0.01)
    assert len({*await making}) == 3
    assert max(counts) == 1


async def test_too_many_who_wait_are_refused(shared: Server, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    """RESOURCE_EXHAUSTED with RetryInfo; what is there already is sent nevertheless."""
    data = await exported(caller)
    monkeypatch.setattr(exports_module, "MAX_WAITING", 0)
    async with being_made(shared, caller, style_layers=["relu1_1"]):
        refusal = await caller.refusal(parts(caller, style_layers=["relu1_2"]))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert refusal.retry_s
        assert "exports wait already" in refusal.message
        assert await exported(caller) == data


async def test_jobs_go_on_while_a_file_is_made(
    shared: Server, caller: Caller, ask: Callable[..., style_transfer_service_pb2.StylizeRequest]
) -> None:
    """No device is asked, and the front answers."""
    async with being_made(shared, caller, style_layers=["relu3_1"]):
        told = await caller.told(ask())
        assert told.result
        assert shared._application.exports._makings


# Processes that end


async def test_a_process_that_dies_is_said_and_replaced(shared: Server, caller: Caller) -> None:
    """INTERNAL, naming the signal; the next request is served."""
    call = asyncio.ensure_future(caller.refusal(parts(caller, style_layers=["relu4_1"], **SLOW)))
    await until(lambda: bool(exporting()), 10)
    (process,) = exporting()
    os.kill(process, signal.SIGKILL)
    refusal = await call
    assert refusal.code == grpc.StatusCode.INTERNAL
    assert "killed by signal 9" in refusal.message
    assert await exported(caller, style_layers=["relu4_1"])


async def test_a_stop_ends_the_making(serve: Serve) -> None:
    """Who waits is told UNAVAILABLE with RetryInfo at once, and no process outlives the server."""
    server, client = await serve()
    call = asyncio.ensure_future(client.refusal(parts(client, **SLOW)))
    await until(lambda: bool(exporting()), 10)
    await server.stop(0)
    refusal = await call
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
    assert refusal.retry_s
    await until(lambda: not exporting())
    assert not list((server._settings.data_dir / "exports").glob("*"))


async def test_a_killed_server_takes_its_export_along(launch: Callable[..., Any], tmp_path: Path) -> None:
    """Also after `kill -9` no process of it is left; the next server removes what was half done and makes it anew."""
    server = await launch()
    await server.serving()
    processes = len(server.group())
    call = server.caller.models.ExportModel(request(**SLOW))
    reading = asyncio.ensure_future(call.read())
    await until(lambda: len(server.group()) > processes, 10)
    os.kill(server.process.pid, signal.SIGKILL)
    assert await server.ended(5) == -signal.SIGKILL
    with contextlib.suppress(grpc.aio.AioRpcError):
        await reading

    torn = tmp_path / "data" / "exports" / f"{'0' * 64}.partial"
    torn.write_bytes(b"half")
    server = await launch()
    await server.serving()
    assert not torn.exists()
    began = time.monotonic()
    assert await exported(server.caller)
    assert time.monotonic() - began < 30
