"""What the programs of samples/portable are tested with: a real model, exported once, and small pictures."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from nst_model import DEFAULT_MODEL, load_weights
from nst_model.export_spec import ExportFormat, ExportGraph, ExportSpec
from nst_model.exports import export, write_artifact
from nst_model.options import Padding, Pooling
from tests.conftest import user_cache

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "samples" / "portable"
TORCH = Path(torch.__file__).parent
SIZE_PX = 128


def build_command(program: Path) -> list[str]:
    """Return the command of samples/portable/cpp/README.md, warnings being errors."""
    headers = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
    return [
        *("g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", str(SAMPLES / "cpp" / "stylize.cpp")),
        *("-o", str(program)),
        *(word for folder in headers for word in ("-isystem", str(folder))),
        *(f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str] | None]]:
    """The C++ program and the g++ that is making it, None if there is no g++."""
    program = tmp_path_factory.mktemp("cpp") / "stylize"
    if shutil.which("g++") is None:
        yield program, None
        return
    with subprocess.Popen(build_command(program), stderr=subprocess.PIPE, text=True) as process:
        yield program, process
        process.kill()


@pytest.fixture(scope="session")
def program(compiler: tuple[Path, subprocess.Popen[str] | None]) -> Path:
    """The C++ program, built."""
    path, process = compiler
    assert process, "g++ is missing; install it: apt-get update && apt-get install -y g++"
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return path


@pytest.fixture(scope="session")
def models(compiler: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three graphs of the default model as ONNX and TorchScript; made while the compiler works."""
    folder = tmp_path_factory.mktemp("models")
    with user_cache():
        weights = load_weights(DEFAULT_MODEL)
    for graph in (ExportGraph.FEATURES, ExportGraph.GRAMS, ExportGraph.CLOSURE):
        for format in (ExportFormat.ONNX, ExportFormat.TORCHSCRIPT):
            spec = ExportSpec(
                graph=graph,
                format=format,
                layers=("relu4_2",) if graph is ExportGraph.FEATURES else (),
                pooling=Pooling.AVERAGE,
                padding=Padding.MIRROR,
            )
            write_artifact(export(weights, spec), folder / f"{graph}{format.suffix}")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photo`, `style` and, halfway between them, `start`, as .png and .ppm, at their final size."""
    folder = tmp_path_factory.mktemp("pictures")
    with Image.open(Path(skimage.__file__).parent / "data" / "coffee.png") as coffee:
        photo = coffee.convert("RGB").crop((0, 50, 600, 350)).resize((SIZE_PX, 64), Image.Resampling.LANCZOS)
    with Image.open(REPOSITORY / "samples" / "styles" / "waves.jpg") as waves:
        style = waves.resize((SIZE_PX, 96), Image.Resampling.LANCZOS)
    start = Image.blend(photo, style.resize(photo.size), 0.5)
    for name, picture in (("photo", photo), ("style", style), ("start", start)):
        picture.save(folder / f"{name}.png")
        picture.save(folder / f"{name}.ppm")
    return folder


@pytest.fixture(scope="session")
def sample() -> ModuleType:
    """The module samples/portable/python/stylize.py."""
    spec = importlib.util.spec_from_file_location("portable_sample", SAMPLES / "python" / "stylize.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def expected(models: Path, pictures: Path, sample: ModuleType) -> tuple[float, np.ndarray]:
    """Loss and gradient (3·H·W, with the margin) at `start`, as ONNX Runtime computes them."""
    photo, style, start = (
        sample.read_picture(pictures / f"{name}.png", SIZE_PX) for name in ("photo", "style", "start")
    )
    objective = sample.Objective(models, photo, style)
    total, gradient = objective(objective.with_margin(start).ravel())
    return total, gradient


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the distance, relative to the wanted vector's length."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
