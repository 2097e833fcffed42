"""Exported graphs in their runtimes against eager torch: the same inputs, call by call in turns, in one run.

Eager is what the engine does: its trunk, and its losses with their gradient. C++ and JavaScript are processes
beside this one, `exports.cpp` and `exports.mjs`, which make a call when they are asked to; of the latter there are two,
one in Node and one with a page in headless Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

import nst_model
from benchmarks.run import machine
from nst_model import ExportFormat, ExportGraph, ExportPrecision, ExportSpec, export, gram, load_graph, load_weights
from nst_model.exports import arguments, inputs_of
from nst_model.network import build_trunk
from nst_model.objective import Objective
from nst_model.options import StylizeOptions
from nst_model.weights import FeatureWeights

FOLDER = Path(__file__).resolve().parent
WEB = FOLDER.parent / "samples" / "portable" / "web"

Call = Callable[[], float]
"""Makes one call and returns how long it took, seconds."""

FORMATS = {
    "TorchScript": (ExportFormat.TORCHSCRIPT, ExportPrecision.FP32),
    "torch.export": (ExportFormat.PT2, ExportPrecision.FP32),
    "ONNX": (ExportFormat.ONNX, ExportPrecision.FP32),
    "ONNX, fp16 weights": (ExportFormat.ONNX, ExportPrecision.FP16),
}

EAGER = ("none", "torch, eager")


@dataclass(frozen=True)
class File:
    """An exported graph, how large it is in bytes, how long that took, and its description."""

    path: Path
    size: int
    seconds: float
    description: dict[str, Any]


def exported(weights: FeatureWeights, graph: ExportGraph, folder: Path) -> dict[str, File]:
    """Export a graph in each format; return the files by format."""
    files = {}
    for name, (format, precision) in FORMATS.items():
        spec = ExportSpec(model=weights.name, graph=graph, format=format, precision=precision)
        begin = time.perf_counter()
        data = export(weights, spec)
        seconds = time.perf_counter() - begin
        path = folder / f"{graph}-{precision}{format.suffix}"
        path.write_bytes(data)
        files[name] = File(path, len(data), seconds, nst_model.read_description(data))
    return files


def inputs(weights: FeatureWeights, spec: ExportSpec, height: int, width: int) -> dict[str, Tensor]:
    """Return numbers for each input of a graph."""
    random = torch.Generator().manual_seed(1)
    edges = {"batch": 1, "height": height, "width": width}
    found = {}
    for value in inputs_of(weights, spec):
        parts = [edge if isinstance(edge, int) else edge.partition("//")[::2] for edge in value["shape"]]
        shape = [part if isinstance(part, int) else edges[part[0]] // int(part[1] or 1) for part in parts]
        found[value["name"]] = torch.rand(shape, generator=random)
    return found


def eager(weights: FeatureWeights, spec: ExportSpec, given: dict[str, Tensor]) -> Callable[[], object]:
    """Return what the engine computes of a graph's inputs, as a function."""
    layers = {*spec.layers, *spec.content_layers, *spec.style_layers}
    trunk = build_trunk(weights, layers)
    image = given["image"]
    if spec.graph is ExportGraph.FEATURES:
        return lambda: trunk(image)
    if spec.graph is ExportGraph.GRAMS:
        return lambda: [gram(features) for features in trunk(image).values()]
    options = StylizeOptions.of("gatys", precision="fp32")
    targets = {layer: {"gram": given[f"style.{layer}"]} for layer in spec.style_layers}
    objective = Objective(trunk, [targets], options)
    content = {layer: given[f"content.{layer}"] for layer in spec.content_layers}
    if spec.graph is ExportGraph.OBJECTIVE:
        return lambda: objective(image, content)
    return lambda: objective.loss_and_gradient(image, content)


def timed(work: Callable[[], object], *, gradients: bool = False) -> Call:
    """Return a call that times `work`, with or without autograd."""

    def call() -> float:
        with torch.set_grad_enabled(gradients):
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin

    return call


@contextmanager
def process(*command: str | Path) -> Iterator[Call]:
    """Yield a call that another process makes."""
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None
        assert running.stdout is not None

        def call() -> float:
            assert running.stdin is not None
            assert running.stdout is not None
            running.stdin.write("\n")
            running.stdin.flush()
            return float(running.stdout.readline())

        yield call
        running.stdin.close()


def chromium() -> str:
    """Return the program of a browser of the Chromium family."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), names[0])


def in_onnxruntime(file: Path, given: dict[str, Tensor], threads: int) -> Call:
    """Return a call of an ONNX graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    arrays = {name: tensor.numpy() for name, tensor in given.items()}
    return timed(lambda: session.run(None, arrays))


def in_torch(file: Path, spec: ExportSpec, given: dict[str, Tensor]) -> Call:
    """Return a call of a graph in TorchScript or pt2."""
    module, positional = load_graph(file), arguments(spec, given)
    return timed(lambda: module(*positional))


def built(folder: Path) -> Path:
    """Return the C++ program, built against the torch wheel."""
    torch_folder, program = Path(torch.__file__).parent, folder / "exports"
    include = torch_folder / "include"
    flags = ["-isystem", include, "-isystem", include / "torch" / "csrc" / "api" / "include"]
    libraries = [f"-L{torch_folder / 'lib'}", f"-Wl,-rpath,{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O2", FOLDER / "exports.cpp", "-o", program, *flags, *libraries]
    subprocess.run(command, check=True)
    return program


def write(given: dict[str, Tensor], folder: Path) -> Path:
    """Write inputs as the other processes read them; return the folder."""
    folder.mkdir()
    (folder / "inputs.txt").write_text("".join(f"{' '.join(map(str, [n, *t.shape]))}\n" for n, t in given.items()))
    for name, tensor in given.items():
        (folder / f"{name}.f32").write_bytes(tensor.numpy().tobytes())
    return folder


def measure(calls: dict[tuple[str, str], Call], rounds: int) -> dict[tuple[str, str], float]:
    """Return the median seconds of each call, made in turns; the first rounds are not counted."""
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    for number in range(rounds + 3):  # TorchScript compiles in its first two
        for name, call in calls.items():
            took = call()
            if number >= 3:
                seconds[name].append(took)
    return {name: statistics.median(found) for name, found in seconds.items()}


def of_graph(
    weights: FeatureWeights, graph: ExportGraph, size: tuple[int, int], folder: Path, *, threads: int, rounds: int
) -> tuple[dict[str, File], dict[tuple[str, str], float]]:
    """Return the files of a graph, and seconds by format and runtime."""
    files = exported(weights, graph, folder)
    spec = ExportSpec(model=weights.name, graph=graph)
    given = inputs(weights, spec, *size)
    data = write(given, folder / f"{graph}-inputs")
    with ExitStack() as stack:
        calls = {EAGER: timed(eager(weights, spec, given), gradients=graph is ExportGraph.CLOSURE)}
        for name, file in files.items():
            if name.startswith("ONNX"):
                calls[name, "onnxruntime"] = in_onnxruntime(file.path, given, threads)
                command = ("node", FOLDER / "exports.mjs", file.path, data, str(threads))
                calls[name, "onnxruntime-web, Node"] = stack.enter_context(process(*command))
                calls[name, "onnxruntime-web, Chromium"] = stack.enter_context(process(*command, chromium()))
            else:
                calls[name, "torch, Python"] = in_torch(file.path, spec, given)
            if name == "TorchScript":
                program = process(folder / "exports", file.path, data, str(threads))
                calls[name, "libtorch, C++"] = stack.enter_context(program)
        return files, measure(calls, rounds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=nst_model.DEFAULT_MODEL)
    parser.add_argument("--height", type=int, default=192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for needed, install in (("g++", "g++"), ("node", "nodejs npm"), (chromium(), "chromium")):
        if shutil.which(needed) is None:
            sys.exit(f"{needed} is missing; install it: apt-get update && apt-get install -y {install}")
    if not (WEB / "node_modules" / "playwright-core").is_dir():
        sys.exit(f"onnxruntime-web and playwright-core are missing; install them: cd {WEB} && npm ci")
    torch.set_num_threads(options.threads)
    weights = load_weights(options.model)
    print(f"{machine()}; {options.model}, {options.width}×{options.height} px, {options.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built(folder)
        size = (options.height, options.width)
        found = {
            graph: of_graph(weights, graph, size, folder, threads=options.threads, rounds=options.rounds)
            for graph in ExportGraph
        }
    print_tables({graph: files for graph, (files, _) in found.items()}, {graph: s for graph, (_, s) in found.items()})


def print_tables(
    files: dict[ExportGraph, dict[str, File]], seconds: dict[ExportGraph, dict[tuple[str, str], float]]
) -> None:
    """Print time per call, and then what exporting takes, as Markdown."""
    header = f"{' | '.join(ExportGraph)} |\n| --- | --- | {' | '.join('---' for _ in ExportGraph)} |"
    print(f"\n| format | runtime | {header}")
    for format, runtime in next(iter(seconds.values())):
        cells = []
        for graph in ExportGraph:
            took, plain = seconds[graph][format, runtime], seconds[graph][EAGER]
            cells.append(f"{1000 * took:.0f} ms" + ("" if runtime == EAGER[1] else f" ({took / plain:.2f})"))
        print(f"| {format} | {runtime} | {' | '.join(cells)} |")
    print(f"\n| format | of it | {header}")
    for format in FORMATS:
        those = [files[graph][format] for graph in ExportGraph]
        print(f"| {format} | export | {' | '.join(f'{file.seconds:.1f} s' for file in those)} |")
        print(f"| {format} | file | {' | '.join(f'{file.size / 1e6:.1f} MB' for file in those)} |")
        if format.startswith("ONNX"):
            print(f"| {format} | nodes | {' | '.join(str(file.description['nodes']) for file in those)} |")


if __name__ == "__main__":
    main()
