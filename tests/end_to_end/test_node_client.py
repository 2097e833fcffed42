"""The TypeScript client against the real server."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.end_to_end.conftest import Running

FOLDER = Path(__file__).resolve().parents[2] / "client" / "node"


def test_node_client_passes_its_own_tests_against_a_real_server(running_server: Running) -> None:
    """`npm test`: unit tests, every program of its README, and the whole of the contract end to end."""
    npm = shutil.which("npm")
    assert npm, "npm is missing; install Node 20 or newer: apt-get update && apt-get install nodejs npm"
    assert (FOLDER / "node_modules").is_dir(), "the client's packages are missing: cd client/node && npm ci"
    done = subprocess.run(
        [npm, "test"],
        cwd=FOLDER,
        env=os.environ | {"NST_TEST_SERVER": running_server.address, "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "fail 0" in done.stdout
