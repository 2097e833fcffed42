"""The demo, as `make demo` runs it, only smaller: real weights, real processes, real pictures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

DEMO = Path(__file__).resolve().parents[2] / "samples" / "demo.py"


def test_demo_makes_a_picture_and_an_animation(tmp_path: Path) -> None:
    """From an empty cache: weights are fetched, the loss falls, the files are there, the server is gone."""
    done = subprocess.run(
        [sys.executable, DEMO, "--size", "96", "--iterations", "15", "--out", tmp_path / "out"],
        env=os.environ | {"NST_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out" / "demo.png") as picture:
        assert (picture.format, picture.width) == ("PNG", 96)
    with Image.open(tmp_path / "out" / "demo.webp") as animation:
        assert animation.format == "WEBP"
        assert animation.n_frames > 5
    assert str(tmp_path / "out" / "demo.png") in done.stdout

    log = [json.loads(line) for line in (tmp_path / "out" / "server.log").read_text().splitlines()]
    ended = next(entry for entry in log if entry["event"] == "job ended")
    assert (ended["state"], ended["iterations"]) == ("succeeded", 15)
    losses = [
        float(line.split("loss ")[1].split(",")[0])
        for line in done.stderr.splitlines()
        if line.startswith("iteration ")
    ]
    assert ended["loss"] < 0.3 * losses[0]
    assert log[-1]["event"] == "stopped"
