"""What the programs of samples/portable are tested with: a real model, exported once, and small pictures."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage
from PIL import Image

from nst_model import DEFAULT_MODEL, load_weights
from nst_model.export_spec import ExportFormat, ExportGraph, ExportSpec
from nst_model.exports import export, write_artifact
from nst_model.options import Padding, Pooling
from tests.conftest import user_cache

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "samples" / "portable"
SIZE_PX = 128


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str] | None]]:
    """The C++ program and what is making it, the commands of its README; None if there is no g++."""
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "stylize.cpp").symlink_to(SAMPLES / "cpp" / "stylize.cpp")
    _, commands, *_ = (SAMPLES / "cpp" / "README.md").read_text().split("```")
    if shutil.which("g++") is None:
        yield folder / "stylize", None
        return
    with subprocess.Popen(
        ["bash", "-e", "-c", commands.removeprefix("sh\n")],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        yield folder / "stylize", process
        process.kill()


@pytest.fixture(scope="session")
def program(compiler: tuple[Path, subprocess.Popen[str] | None]) -> Path:
    """The C++ program, built without a warning."""
    path, process = compiler
    assert process, "g++ is missing; install it: apt-get update && apt-get install -y g++"
    _, said = process.communicate()
    assert process.returncode == 0, said
    assert not said
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
