"""What the programs of samples/portable are tested with: a real model, exported once, and small pictures."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from nst_model import DEFAULT_MODEL, fetch, load_weights
from nst_model.export_spec import ExportFormat, ExportGraph, ExportSpec
from nst_model.exports import export, write_artifact
from nst_model.options import Padding, Pooling
from tests.conftest import user_cache

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = REPOSITORY / "samples" / "portable"
TORCH = Path(torch.__file__).parent
SIZE_PX = 128


PAINTING: Any = {"pooling": Pooling.AVERAGE, "padding": Padding.MIRROR}
"""What samples/portable/README.md exports the graphs with."""
SHALLOW = ("--content-layer=relu2_1", "--style-layer=relu1_1", "--style-layer=relu2_1", "--padding=mirror")
"""A closure that a CPU can evaluate when it plays the GPU."""


class Workshop:
    """Files in the making: a process for each, all at once.

    Args:
        commands: by the name of the file that each makes.
    """

    def __init__(self, commands: Mapping[str, Sequence[str]]) -> None:
        self._processes = {
            name: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for name, command in commands.items()
        }

    def wait_for(self, name: str) -> None:
        """Wait until a file is made. Fails with what its maker said if it is not."""
        said, _ = self._processes[name].communicate()
        assert self._processes[name].returncode == 0, said

    def close(self) -> None:
        """End what nobody waited for."""
        for process in self._processes.values():
            with process:  # waits, and closes its pipe
                process.kill()


def build_command(program: Path) -> list[str]:
    """Return the command of samples/portable/cpp/README.md, warnings being errors."""
    headers = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include"]
    return [
        *("g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", str(SAMPLES / "cpp" / "stylize.cpp")),
        *("-o", str(program)),
        *(word for folder in headers for word in ("-isystem", str(folder))),
        *(f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]


def export_command(path: Path, *options: str) -> list[str]:
    """Return the command of samples/portable/README.md for the closure, whose making takes longest."""
    return [sys.executable, "-m", "nst_model", "export", "--graph=closure", "--format=onnx", "-o", str(path), *options]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where everything is made."""
    return tmp_path_factory.mktemp("portable")


@pytest.fixture(scope="session")
def workshop(folder: Path) -> Iterator[Workshop]:
    """The makers of the C++ program and of the closures, at work."""
    (folder / "models").mkdir()
    commands = {"stylize": build_command(folder / "stylize")} if shutil.which("g++") else {}
    commands["closure.onnx"] = export_command(
        folder / "models" / "closure.onnx", "--pooling=average", "--padding=mirror"
    )
    commands["shallow.onnx"] = export_command(folder / "shallow.onnx", *SHALLOW)
    with user_cache():
        fetch(DEFAULT_MODEL)  # once, and not in each of the processes
        workshop = Workshop(commands)
    yield workshop
    workshop.close()


@pytest.fixture(scope="session")
def program(workshop: Workshop, folder: Path) -> Path:
    """The C++ program."""
    assert shutil.which("g++"), "g++ is missing; install it: apt-get update && apt-get install -y g++"
    workshop.wait_for("stylize")
    return folder / "stylize"


@pytest.fixture(scope="session")
def models(workshop: Workshop, folder: Path) -> Path:
    """A folder with the three graphs of the default model, as ONNX and as TorchScript."""
    with user_cache():
        weights = load_weights(DEFAULT_MODEL)
    wanted = {
        "features.onnx": ExportSpec(graph=ExportGraph.FEATURES, layers=("relu4_2",), **PAINTING),
        "grams.onnx": ExportSpec(graph=ExportGraph.GRAMS, **PAINTING),
        "features.pt": ExportSpec(graph=ExportGraph.FEATURES, format=ExportFormat.TORCHSCRIPT, **PAINTING),
        "grams.pt": ExportSpec(graph=ExportGraph.GRAMS, format=ExportFormat.TORCHSCRIPT, **PAINTING),
        "closure.pt": ExportSpec(graph=ExportGraph.CLOSURE, format=ExportFormat.TORCHSCRIPT, **PAINTING),
    }
    for name, spec in wanted.items():
        write_artifact(export(weights, spec), folder / "models" / name)
    workshop.wait_for("closure.onnx")
    return folder / "models"


@pytest.fixture(scope="session")
def shallow_closure(workshop: Workshop, folder: Path) -> Path:
    """A closure up to relu2_1, with max pooling, as ONNX."""
    workshop.wait_for("shallow.onnx")
    return folder / "shallow.onnx"


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
