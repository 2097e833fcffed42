"""samples/portable/web: style transfer in JavaScript, in Node and in a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.portable.conftest import SAMPLES, SIZE_PX

WEB = SAMPLES / "web"


@pytest.fixture(scope="session")
def node() -> str:
    """The command `node`, the programs' packages being there."""
    found = shutil.which("node")
    assert found, "node is missing; install Node 20 or newer: apt-get update && apt-get install -y nodejs npm"
    assert (WEB / "node_modules").is_dir(), "the packages are missing: cd samples/portable/web && npm ci"
    return found


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser of the Chromium family."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "Chromium is missing; install it: apt-get update && apt-get install -y chromium"
    return found


@pytest.fixture
def inputs(
    chromium: str,
    models: Path,
    pictures: Path,
    expected: tuple[float, np.ndarray],
    tmp_path: Path,
) -> dict[str, str]:
    """The environment of the JavaScript tests: a browser, and where models, pictures and what to expect of them are."""
    total, gradient = expected
    (tmp_path / "total.json").write_text(json.dumps(total))
    (tmp_path / "gradient.f32").write_bytes(gradient.astype("<f4").tobytes())
    given = {
        "NST_TEST_CHROMIUM": chromium,
        "NST_TEST_MODELS": models,
        "NST_TEST_PICTURES": pictures,
        "NST_TEST_EXPECTED": tmp_path,
    }
    return os.environ | {name: str(value) for name, value in given.items()}


def test_javascript_passes_its_own_tests(node: str, inputs: dict[str, str]) -> None:
    """L-BFGS, descriptions, the closure held against ONNX Runtime's; the page in headless Chromium, WebGPU included."""
    command = [node, "--test", "--test-reporter=spec", "--test-timeout=250000", "--test-concurrency=2"]
    done = subprocess.run(
        [*command, *sorted((WEB / "test").glob("*.test.mjs"))],
        cwd=WEB,
        env=inputs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    assert "fail 0" in done.stdout


def test_benchmark_prints_json(node: str, models: Path, pictures: Path) -> None:
    """--benchmark tells runtime, size and seconds."""
    words = [pictures / "photo.png", pictures / "style.png", "--models", models, "--size", "32", "--benchmark"]
    done = subprocess.run([node, WEB / "node.mjs", *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["width"], figures["height"]) == (32 + 32, 16 + 32)
    assert figures["runtime"].startswith("onnxruntime-web ")
    assert 0 < figures["seconds"] < 60


def test_the_command_paints(node: str, models: Path, pictures: Path, tmp_path: Path) -> None:
    """`node node.mjs` writes a picture of the size asked for."""
    words = [pictures / "photo.png", pictures / "style.png", "--models", models, "--out", tmp_path / "out.png"]
    sizes = ["--size", str(SIZE_PX // 2), "--iterations", "2"]
    done = subprocess.run(
        [node, WEB / "node.mjs", *words, *sizes], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "out.png") as painted:
        assert painted.size == (64, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.png", "style.png"], "absent.png cannot be read as a picture"),
        (["photo.png", "notes.txt"], "notes.txt cannot be read as a picture"),
        (
            ["photo.png", "style.png", "--models", "nowhere"],
            "features.onnx is not there; nst-model export --graph features",
        ),
        (["photo.png", "style.png", "--models", "mixed"], "closure.onnx is not an ONNX file"),
        (["photo.png", "style.png", "--size", "8"], "usage: node node.mjs PHOTO STYLE"),
        (["photo.png"], "usage: node node.mjs PHOTO STYLE"),
    ],
)
def test_bad_input_is_named(
    node: str, models: Path, pictures: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """What cannot be used is named in one line, and nothing is written."""
    for name in ("photo.png", "style.png"):
        shutil.copy(pictures / name, tmp_path)
    (tmp_path / "notes.txt").write_text("not a picture")
    (tmp_path / "mixed").mkdir()
    for name in ("features.onnx", "grams.onnx"):
        (tmp_path / "mixed" / name).symlink_to(models / name)
    shutil.copy(pictures / "photo.png", tmp_path / "mixed" / "closure.onnx")
    given = words if "--models" in words else [*words, "--models", str(models)]
    done = subprocess.run(
        [node, WEB / "node.mjs", *given], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert not (tmp_path / "stylized.png").exists()
