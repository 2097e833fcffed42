"""Models and styles that leave a server, with the real commands: whatever breaks on the way, the file is whole."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from nst_client import Client
from nst_model import read_description
from nst_model.architecture import VGG16
from tests.client.conftest import Wire
from tests.conftest import picture_bytes, random_state
from tests.end_to_end.conftest import Running
from tests.end_to_end.test_cli_jobs import MortalServer

BIN = Path(sys.executable).parent
WIDTHS = (16, 32, 128, 256, 512)
"""Channels in each block of a VGG-16 whose exports have some 12 MB, which are six parts."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MortalServer]:
    """A server whose model is not so tiny; each test leaves it running."""
    folder = tmp_path_factory.mktemp("exports")
    weights = folder / "weights.safetensors"
    safetensors.torch.save_file(random_state(VGG16, WIDTHS), weights)
    mortal = MortalServer(weights, folder)
    mortal.start()
    yield mortal
    mortal.end(signal.SIGTERM)


def nst(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line to its good end."""
    command = [str(BIN / "nst"), *map(str, arguments)]
    environment = os.environ | {"NST_SERVER": address}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240)


def test_a_download_that_is_cut_goes_on(server: MortalServer) -> None:
    """The connection breaks twice in the middle of a file: the client has it whole, and took no byte twice."""
    wire = Wire(server.address, breaks=(3 << 20, 7 << 20))
    sizes: list[int] = []
    broken: list[Any] = []
    wanted = {"graph": "features", "format": "torchscript"}
    with Client(wire.address, on_connection=broken.append) as client:
        file = client.export_model(**wanted, on_progress=lambda received, _: sizes.append(received))
    wire.cut()
    with Client(server.address) as client:
        assert client.export_model(**wanted) == file
    assert hashlib.sha256(file.data).hexdigest() == file.sha256
    assert read_description(file.data)["graph"] == "features"
    assert len(file.data) > 5 * 2**21
    assert len([error for error in broken if error is not None]) >= 2
    received = [size for size in sizes if size]
    assert received == sorted(received)
    assert received[-1] == len(file.data)


def test_a_server_killed_in_the_middle_is_waited_for(server: MortalServer, tmp_path: Path) -> None:
    """`nst export` says that the connection is lost, waits, and writes the file that the next server makes."""
    out = tmp_path / "features.onnx"
    command = [str(BIN / "nst"), "export", "vgg16", "-o", str(out), "--graph", "features"]
    environment = os.environ | {"NST_SERVER": server.address}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert next(lines) == "the server is making the file\n"
        server.end(signal.SIGKILL)
        assert next(lines) == "connection lost, trying again\n"
        assert not list(tmp_path.iterdir())
        server.start()
        said = list(lines)
    assert process.returncode == 0, said
    assert said[0] == "connected again\n"
    assert said[-1].startswith(f"wrote {out}: ")
    assert read_description(out)["graph"] == "features"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    inspected = subprocess.run([BIN / "nst", "inspect", out], capture_output=True, text=True, check=True).stdout
    assert "graph      features, onnx with opset" in inspected


def test_ctrl_c_leaves_nothing(server: MortalServer, tmp_path: Path) -> None:
    """Exit code 130 within two seconds, no file; and the server, which makes it for nobody, goes on to the next."""
    command = [str(BIN / "nst"), "export", "vgg16", "-o", str(tmp_path / "x.onnx"), "--pooling", "average"]
    environment = os.environ | {"NST_SERVER": server.address}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "the server is making the file\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert time.monotonic() - began < 2
    assert not list(tmp_path.iterdir())
    nst(server.address, "export", "vgg16", "-o", tmp_path / "x.pt", "--graph", "grams")
    assert read_description(tmp_path / "x.pt")["graph"] == "grams"


def test_a_style_goes_from_one_server_to_another(
    running_server: Running, tmp_path: Path, tiny_weights_file: Path
) -> None:
    """`nst styles export` here, `nst styles import` there: the picture is the same, to the bit."""
    photo, wave = tmp_path / "photo.png", tmp_path / "wave.png"
    photo.write_bytes(picture_bytes(96, 72, seed=1))
    wave.write_bytes(picture_bytes(80, 96, seed=2))
    there = MortalServer(tiny_weights_file, tmp_path)
    starting = threading.Thread(target=there.start)
    starting.start()
    options: list[Any] = ["--size-px", 80, "--first-size-px", 40]
    try:
        here = running_server.address
        nst(here, "styles", "create", wave, "--id", "e2e-wave")
        nst(here, "styles", "export", "e2e-wave", "-o", tmp_path / "wave.style.safetensors", *options)
        starting.join()
        imported = nst(there.address, "styles", "import", tmp_path / "wave.style.safetensors", "--id", "brought")
        assert imported.stdout == "styles/brought\n"
        more = [*options, "--iterations", 4, "--precision", "fp32", "--quiet"]
        nst(here, "stylize", photo, "styles/e2e-wave", "-o", tmp_path / "here.png", *more)
        nst(there.address, "stylize", photo, "styles/brought", "-o", tmp_path / "there.png", *more)
    finally:
        starting.join()
        there.end(signal.SIGTERM)
        nst(here, "styles", "delete", "e2e-wave")
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("here.png", "there.png")]
    assert np.array_equal(*pictures)
