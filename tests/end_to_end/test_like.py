"""A result says how it was made, and `--like` makes it again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.end_to_end.conftest import BIN, Running


def test_like_repeats_a_result_byte_for_byte(
    running_server: Running, tmp_path: Path, photo: bytes, painting: bytes
) -> None:
    """Another style loss, colours, seed, layers, scales and margin, from nothing but the picture and its inputs."""
    (tmp_path / "photo.png").write_bytes(photo)
    (tmp_path / "style.png").write_bytes(painting)
    chosen = (
        "--size-px 72 --iterations 3 --first-size-px 48 --style-loss sliced --content-loss cosine --color luminance"
        " --init noise --seed 7 --style-layers relu3_1=2,relu2_1=1,relu1_1=5,relu4_1=0.1 --laplacian-weight 2"
        " --averaging 0.5 --padding replicate --deterministic"
    )

    def stylized(out: str, flags: str) -> bytes:
        command = [BIN / "nst", "stylize", "photo.png", "style.png", "-o", out, *flags.split()]
        environment = os.environ | {"NST_SERVER": running_server.address}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "note:" not in done.stderr
        return (tmp_path / out).read_bytes()

    first = stylized("first.png", chosen)
    for _ in range(3):
        assert stylized("again.png", "--like first.png") == first
    assert stylized("other.png", "--like first.png --seed 8") != first
