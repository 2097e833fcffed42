"""What people do with durable jobs, with the real commands: servers are killed, terminals closed, and nobody minds."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nst_client import AsyncClient, Client, Progress, Result, StateChange
from tests.conftest import picture_bytes

BIN = Path(sys.executable).parent
START_WITHIN_S = 60
OPTIONS = {"iterations": 120, "size_px": 96}


class MortalServer:
    """`nst-server` at one port and one data folder, to be killed and started again."""

    def __init__(self, weights: Path, folder: Path) -> None:
        with closing(socket.create_server(("localhost", 0))) as free:
            self.address = f"localhost:{free.getsockname()[1]}"
        self._log = folder / "log"
        self._settings = {
            "NST_LISTEN": self.address,
            "NST_DATA_DIR": str(folder / "data"),
            "NST_DEVICES": '["cpu"]',
            "NST_DEFAULT_MODEL": "vgg16",
            "NST_WEIGHTS": json.dumps({"vgg16": str(weights)}),
            "NST_LOG_FORMAT": "json",
            "NST_THREADS": "1",
            "NST_CHECKPOINT_INTERVAL_S": "0.2",
            "NST_GRACE_S": "0",
        }
        self._process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Start it, and wait until it serves."""
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([BIN / "nst-server"], env=os.environ | self._settings, stderr=log)
        deadline = time.monotonic() + START_WITHIN_S
        while '"serving"' not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.05)

    def end(self, number: signal.Signals) -> None:
        """End it by a signal, and wait until it is gone."""
        self._process.send_signal(number)
        self._process.wait(60)


@pytest.fixture(scope="module")
def server(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServer]:
    """Return a server that runs; each test leaves it so."""
    mortal = MortalServer(tiny_weights_file, tmp_path_factory.mktemp("mortal"))
    mortal.start()
    yield mortal
    mortal.end(signal.SIGTERM)


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Return a photograph and a style, as files."""
    files = tmp_path / "photo.png", tmp_path / "wave.png"
    for seed, file in enumerate(files):
        file.write_bytes(picture_bytes(96, 72, seed=seed))
    return files


def numbered(events: list[Any]) -> list[int]:
    """Return the numbers of the events that have one of their own."""
    return [event.sequence for event in events if isinstance(event, StateChange | Progress | Result)]


def followed(address: str, images: tuple[Path, Path], watch: Callable[[Any], None]) -> tuple[list[Any], Result]:
    """Return all events and the result of a stylization."""
    with Client(address) as client, client.stylize(*images, **OPTIONS) as stylization:
        events = []
        for event in stylization:
            watch(event)
            events.append(event)
        return events, stylization.result()


async def followed_async(address: str, images: tuple[Path, Path], watch: Any) -> tuple[list[Any], Result]:
    """Return all events and the result of a stylization, under asyncio."""
    async with AsyncClient(address) as client, client.stylize(*images, **OPTIONS) as stylization:
        events = []
        async for event in stylization:
            watch(event)
            events.append(event)
        return events, await stylization.result()


@pytest.mark.parametrize(("how", "number"), [("sync", signal.SIGKILL), ("async", signal.SIGTERM)])
def test_a_server_that_goes_is_not_noticed(
    server: MortalServer, images: tuple[Path, Path], how: str, number: signal.Signals
) -> None:
    """Kill -9 in the middle, or a stop in good order: the same picture, and every event once, without a word."""
    _, undisturbed = followed(server.address, images, lambda _: None)
    restarts: list[threading.Thread] = []

    def restart() -> None:
        server.end(number)
        server.start()

    def watch(event: Any) -> None:
        if isinstance(event, Progress) and event.iteration == 40 and not restarts:
            restarts.append(threading.Thread(target=restart))
            restarts[0].start()

    if how == "sync":
        events, result = followed(server.address, images, watch)
    else:
        events, result = asyncio.run(followed_async(server.address, images, watch))
    restarts[0].join()
    assert numbered(events) == list(range(1, events[-1].sequence + 1))
    assert events[-1].attempt == 2
    assert result.image.tobytes() == undisturbed.image.tobytes()


def nst(server: MortalServer, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command and return what it printed."""
    environment = os.environ | {"NST_SERVER": server.address}
    command = [BIN / "nst", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_job_from_one_terminal_to_another(server: MortalServer, images: tuple[Path, Path], tmp_path: Path) -> None:
    """Detached, listed, paused, resumed, changed, ended early, watched, downloaded, deleted."""
    made = nst(server, "stylize", *images, "--detach", "--size-px", 96, "--iterations", 9000)
    assert (made.returncode, made.stderr) == (0, "")
    name = made.stdout.strip()
    assert name in nst(server, "jobs", "list", "--state", "queued", "--state", "running").stdout
    assert nst(server, "jobs", "pause", name).stdout.startswith(name)
    assert json.loads(nst(server, "jobs", "show", name, "--json").stdout)["state"] in {"running", "paused"}
    assert nst(server, "jobs", "resume", name).returncode == 0
    assert nst(server, "jobs", "update", name, "--content-weight", 0.5).returncode == 0
    assert nst(server, "jobs", "update", name, "--finish").returncode == 0
    watched = nst(server, "jobs", "watch", name.removeprefix("jobs/"), "-o", tmp_path / "watched.png")
    assert watched.returncode == 0, watched.stderr
    assert nst(server, "jobs", "download", name, "-o", tmp_path / "loaded.png").returncode == 0
    assert (tmp_path / "watched.png").read_bytes() == (tmp_path / "loaded.png").read_bytes()
    assert nst(server, "jobs", "cancel", name).stdout == f"{name} succeeded\n"
    assert nst(server, "jobs", "delete", name).returncode == 0
    assert nst(server, "jobs", "show", name).returncode == 2


def test_large_images_and_results_by_name(server: MortalServer, images: tuple[Path, Path], tmp_path: Path) -> None:
    """A photograph that no message takes, sent as if it were small; its result goes into the next job by its name."""
    large = tmp_path / "large.bmp"
    large.write_bytes(picture_bytes(3400, 2600, format="BMP"))
    assert large.stat().st_size > 24 << 20
    with Client(server.address) as client:
        client.stylize(large, images[1], size_px=64, iterations=1).result()
        first = client.create_job(*images, size_px=64, iterations=2, request_id="first")
        again = client.create_job(*images, size_px=64, iterations=2, request_id="first")
        assert first.name == again.name
        client.watch_job(first).result()
        kept = client.get_job(first).result
        assert kept is not None
        assert client.download_image(kept).data == client.watch_job(first).result().data
        stored = client.upload_image(images[0])
        assert client.stylize(stored, images[1], size_px=64, iterations=1, init_image=kept).result().iteration == 1


def test_detached_by_ctrl_c(server: MortalServer, images: tuple[Path, Path], tmp_path: Path) -> None:
    """Without a terminal `nst jobs watch` leaves the job running, and `nst stylize` cancels it."""
    name = nst(server, "stylize", *images, "--detach", "--size-px", 96, "--iterations", 9000).stdout.strip()
    environment = os.environ | {"NST_SERVER": server.address}
    commands = {
        "running": ["jobs", "watch", name],
        "cancelled": ["stylize", *images, "-o", tmp_path / "o.png", "--size-px", 96, "--iterations", 9000],
    }
    for state, arguments in commands.items():
        command = [BIN / "nst", *map(str, arguments)]
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            line = process.stderr.readline()
            process.send_signal(signal.SIGTERM)
            said = process.stderr.read()
        assert process.returncode == 130, line + said
        with contextlib.closing(Client(server.address)) as client:
            newest = next(client.list_jobs())
            left = client.get_job(name) if state == "running" else newest
            assert left.name in said
            assert left.state.is_terminal == (state == "cancelled")
    assert nst(server, "jobs", "cancel", name).stdout == f"{name} cancelled\n"
