"""samples/portable/cpp: style transfer in C++ on the libtorch inside the torch wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests.portable.conftest import SIZE_PX, relative_error


def run(program: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run([program, *words], capture_output=True, text=True, timeout=120, check=False)


def in_python(models: Path, pictures: Path, sample: ModuleType) -> tuple[float, np.ndarray]:
    """Return loss and gradient at `start`, of the same TorchScript files, called from Python."""
    photo, style, start = (
        torch.from_numpy(np.pad(pixels, ((0, 0), (0, 0), (16, 16), (16, 16)), mode="reflect"))
        for pixels in (sample.read_picture(pictures / f"{name}.ppm", SIZE_PX) for name in ("photo", "style", "start"))
    )
    features, grams, closure = (torch.jit.load(str(models / f"{name}.pt")) for name in ("features", "grams", "closure"))
    relative = torch.tensor(list(sample.STYLE_LAYERS.values()), dtype=torch.float64)
    total, _, _, _, gradient = closure(
        start,
        features(photo),
        {layer: grams(style)[f"{layer}.gram"][0] for layer in sample.STYLE_LAYERS},
        torch.tensor([sample.CONTENT_WEIGHT]),
        (sample.STYLE_WEIGHT * relative / relative.sum()).float(),
        torch.tensor(sample.TV_WEIGHT),
    )
    return float(total), gradient.numpy().ravel()


def test_loss_and_gradient_equal_pythons(
    program: Path, models: Path, pictures: Path, sample: ModuleType, tmp_path: Path
) -> None:
    """What C++ computes of a TorchScript closure is what Python computes of the same file."""
    paths = [pictures / "photo.ppm", pictures / "style.ppm", "--start", pictures / "start.ppm"]
    done = run(program, *paths, "--models", models, "--size", str(SIZE_PX), "--evaluate", tmp_path / "gradient")
    assert done.returncode == 0, done.stderr
    total, gradient = in_python(models, pictures, sample)
    assert json.loads(done.stdout)["total"] == pytest.approx(total, rel=1e-6)
    assert relative_error(np.fromfile(tmp_path / "gradient", "<f4"), gradient) < 1e-6


def test_loss_and_gradient_equal_those_of_onnx(
    program: Path, models: Path, pictures: Path, expected: tuple[float, np.ndarray], tmp_path: Path
) -> None:
    """The program and ONNX Runtime agree on the whole of the objective, the targets that each makes itself included."""
    paths = [pictures / "photo.ppm", pictures / "style.ppm", "--start", pictures / "start.ppm"]
    done = run(program, *paths, "--models", models, "--size", str(SIZE_PX), "--evaluate", tmp_path / "gradient")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["total"] == pytest.approx(expected[0], rel=1e-5)
    assert relative_error(np.fromfile(tmp_path / "gradient", "<f4"), expected[1]) < 1e-5


def test_it_paints(program: Path, models: Path, pictures: Path, tmp_path: Path) -> None:
    """A few iterations of libtorch's L-BFGS lower the loss, and the picture is written."""
    paths = [pictures / "photo.ppm", pictures / "style.ppm", "--models", models, "--out", tmp_path / "out.ppm"]
    done = run(program, *paths, "--size", str(SIZE_PX), "--iterations", "12")
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines() if "loss" in line]
    assert losses[-1] < losses[0] / 2
    with Image.open(tmp_path / "out.ppm") as painted, Image.open(pictures / "photo.ppm") as photo:
        assert painted.size == photo.size
        assert np.abs(np.asarray(painted, int) - np.asarray(photo, int)).mean() > 5


def test_benchmark_prints_json(program: Path, models: Path, pictures: Path) -> None:
    """--benchmark tells runtime, size and seconds."""
    paths = [pictures / "photo.ppm", pictures / "style.ppm", "--models", models]
    done = run(program, *paths, "--size", "32", "--benchmark")
    figures = json.loads(done.stdout)
    assert (figures["width"], figures["height"]) == (32 + 32, 16 + 32)
    assert figures["runtime"] == f"libtorch {torch.__version__.partition('+')[0]}"
    assert 0 < figures["seconds"] < 60


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent.ppm", "style.ppm"], "absent.ppm cannot be opened"),
        (["style.png", "style.ppm"], "style.png is not an 8-bit PPM"),
        (["cut.ppm", "style.ppm"], "cut.ppm ends too early"),
        (["photo.ppm", "style.ppm", "--models", "nowhere"], "closure.pt does not exist"),
        (["photo.ppm", "style.ppm", "--models", "broken"], "closure.pt is no TorchScript file"),
        (["photo.ppm", "style.ppm", "--models", "mixed"], "closure.pt is not the graph closure"),
        (["photo.ppm"], "a photograph and a style are needed"),
        (["photo.ppm", "style.ppm", "--size", "8"], "--size must be at least 16"),
        (["photo.ppm", "style.ppm", "--size", "8px"], "--size must be a whole number, not 8px"),
        (["photo.ppm", "style.ppm", "--nonsense"], "--nonsense is unknown"),
    ],
)
def test_bad_input_is_named(
    program: Path, models: Path, pictures: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    """What cannot be used is named in one line, and nothing is written."""
    for name in ("photo.ppm", "style.ppm", "style.png"):
        shutil.copy(pictures / name, tmp_path)
    (tmp_path / "cut.ppm").write_bytes((pictures / "photo.ppm").read_bytes()[:1000])
    for folder, source in (("broken", pictures / "photo.ppm"), ("mixed", models / "grams.pt")):
        (tmp_path / folder).mkdir()
        shutil.copy(source, tmp_path / folder / "closure.pt")
    done = subprocess.run([program, *words], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (1, 2)
    first = done.stderr.splitlines()[0]
    assert message in first
    assert not (tmp_path / "stylized.ppm").exists()
