"""The real commands of the project, as processes, with a tiny feature model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
START_WITHIN_S = 60


@dataclass(frozen=True)
class Running:
    """An `nst-server` process."""

    address: str
    process: subprocess.Popen[bytes]
    log_file: Path


@pytest.fixture(scope="session")
def running_server(tiny_weights_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """`nst-server` with the tiny model under the name vgg16, on a free port."""
    folder = tmp_path_factory.mktemp("server")
    log_file = folder / "log"
    settings = {
        "NST_LISTEN": "localhost:0",
        "NST_DATA_DIR": str(folder / "data"),
        "NST_DEVICES": '["cpu"]',
        "NST_DEFAULT_MODEL": "vgg16",
        "NST_WEIGHTS": json.dumps({"vgg16": str(tiny_weights_file)}),
        "NST_LOG_FORMAT": "json",
        "NST_THREADS": "1",
    }
    with (
        log_file.open("wb") as log,
        subprocess.Popen([BIN / "nst-server"], env=os.environ | settings, stderr=log) as process,
    ):
        try:
            yield Running(_address(log_file, process), process, log_file)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)
    assert process.returncode == 0


def _address(log_file: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log_file.read_text().splitlines():
            if line.startswith("{") and (entry := json.loads(line))["event"] == "serving":
                return str(entry["address"])
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{log_file.read_text()}")
