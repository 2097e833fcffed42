"""samples/portable/python: style transfer with SciPy and ONNX Runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from nst_model import DEFAULT_MODEL, FeatureModel, Style, StylizeOptions, load_weights, stylize
from tests.portable.conftest import REPOSITORY, SAMPLES, SIZE_PX

ITERATIONS = 60

WITHOUT_TORCH = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
loaded = {"torch", "onnx", "nst_model"} & sys.modules.keys()
assert not loaded, loaded
"""


def command(*words: str | Path) -> list[str | Path]:
    """Return the command that runs the program, and then makes sure that no deep-learning framework was loaded."""
    return [sys.executable, "-c", WITHOUT_TORCH, SAMPLES / "python" / "stylize.py", *words]


def our_loss(pictures: Path, sample: ModuleType) -> float:
    """Return the loss that the engine ends at, from the same pictures by the same objective."""
    photo, style = (
        torch.from_numpy(sample.read_picture(pictures / f"{name}.png", SIZE_PX)[0]) for name in ("photo", "style")
    )
    options = StylizeOptions.of(
        "gatys",
        iterations=ITERATIONS,
        content_weight=sample.CONTENT_WEIGHT,
        style_weight=sample.STYLE_WEIGHT,
        style_layers=sample.STYLE_LAYERS,
        tv_weight=sample.TV_WEIGHT,
        history=sample.HISTORY,
        padding="mirror",
        precision="fp32",
    )
    *_, last = stylize(FeatureModel(load_weights(DEFAULT_MODEL), "cpu"), photo, [Style(style)], options)
    return last.loss


@pytest.mark.usefixtures("real_cache")
def test_scipys_lbfgs_ends_where_ours_does(models: Path, pictures: Path, sample: ModuleType, tmp_path: Path) -> None:
    """Sixty iterations without torch in the process style a photograph, to within 3 % of the engine's loss."""
    out = tmp_path / "out.png"
    words = [pictures / "photo.png", pictures / "style.png", "--models", models, "--out", out]
    sizes = ["--size", str(SIZE_PX), "--iterations", str(ITERATIONS)]
    with subprocess.Popen(
        command(*words, *sizes), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        ours = our_loss(pictures, sample)
        printed, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    losses = [float(line.split()[-1]) for line in printed.splitlines() if "loss" in line]
    assert len(losses) == ITERATIONS
    assert losses[-1] == pytest.approx(ours, rel=0.03)
    with Image.open(out) as painted, Image.open(pictures / "photo.png") as photo:
        assert painted.size == photo.size
        assert np.abs(np.asarray(painted, int) - np.asarray(photo, int)).mean() > 5


def test_the_page_on_exports_styles_a_photograph(models: Path, pictures: Path, tmp_path: Path) -> None:
    """The program in docs/exports.md, as it is there but for where its pictures come from."""
    page = (REPOSITORY / "docs" / "exports.md").read_text()
    program = page.split("with SciPy\n\n```python\n")[1].split("```")[0]
    begin = "photo, painting = …, …"
    assert begin in program
    read = "photo, painting = (np.load(f'{name}.npy') for name in ('photo', 'style'))"
    for name in ("photo", "style"):
        with Image.open(pictures / f"{name}.png") as opened:
            pixels = np.asarray(opened.convert("RGB"), np.float32) / 255
        np.save(tmp_path / name, pixels.transpose(2, 0, 1)[None])
    for graph in ("features", "grams", "closure"):
        (tmp_path / f"{graph}.onnx").symlink_to(models / f"{graph}.onnx")
    program = program.replace(begin, read).replace('"maxiter": 100', '"maxiter": 3')
    program += "\nprint(loss(photo.ravel())[0], loss(picture.ravel())[0])"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert after < before / 2


def test_benchmark_prints_json(models: Path, pictures: Path) -> None:
    """--benchmark tells runtime, size and seconds."""
    words = [pictures / "photo.png", pictures / "style.png", "--models", models, "--size", "32", "--benchmark"]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["width"], figures["height"]) == (32 + 32, 16 + 32)
    assert figures["runtime"].startswith("onnxruntime ")
    assert 0 < figures["seconds"] < 60


@pytest.mark.parametrize(
    ("closure", "message"),
    [
        (None, "closure.onnx is not there"),
        ("photo.png", "closure.onnx cannot be loaded"),
        ("grams.onnx", "closure.onnx is not the graph closure, but grams"),
    ],
)
def test_what_is_no_closure_is_named(
    models: Path, pictures: Path, tmp_path: Path, closure: str | None, message: str
) -> None:
    """A file that cannot be used is named in one line, and nothing is written."""
    if closure:
        source = (models if closure.endswith(".onnx") else pictures) / closure
        shutil.copy(source, tmp_path / "closure.onnx")
    words = [pictures / "photo.png", pictures / "style.png", "--models", tmp_path, "--out", tmp_path / "out.png"]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.png", "style.png"], "absent.png cannot be read as a picture"),
        (["photo.png", "notes.txt"], "notes.txt cannot be read as a picture"),
        (["photo.png", "style.png", "--size", "8"], "--size must be at least 16"),
        (["photo.png", "style.png", "--iterations", "0"], "--iterations at least 1"),
    ],
)
def test_bad_input_is_named(pictures: Path, tmp_path: Path, words: list[str], message: str) -> None:
    """A picture that is none, or a number out of range, is named in one line."""
    for name in ("photo.png", "style.png"):
        shutil.copy(pictures / name, tmp_path)
    (tmp_path / "notes.txt").write_text("not a picture")
    done = subprocess.run(command(*words), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
