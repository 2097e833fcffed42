"""What the package is from outside: its names, its weight, what it does without."""

import inspect
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nst_client

ROOT = Path(__file__).parents[2]

PUBLIC_NAMES = {
    "clients": "Client AsyncClient Stylization AsyncStylization",
    "arguments": "AnyImage Encoding ImageName ImageSource NO_PREVIEW Preview StyleInput StyleName Weighted",
    "events": "Event Frame Progress Result Snapshot StateChange",
    "resources": "ExportedFile Job JobFailure JobResult Layer Model Numbers OptionDescription Picture PreparedGrams"
    " Preset StoredImage Style StyleFile StyleImage",
    "parameters": "Parameters StyleRecord read_parameters",
    "choices": "ImageFormat JobState ModelState OptionType StopReason",
    "errors": "AlreadyExistsError BrokenStreamError ClientClosedError DeadlineExceededError FailedPreconditionError"
    " ImageNotReadableError InvalidArgumentError JobCancelledError JobEndedError JobFailedError MessageTooLargeError"
    " NotFoundError NstError QueueFullError ResourceExhaustedError ServerError UnavailableError UnknownOptionError",
}


def test_public_names_are_pinned() -> None:
    """A name is added to or removed from the public API on purpose only."""
    assert sorted(nst_client.__all__) == sorted(" ".join(PUBLIC_NAMES.values()).split())


def test_every_exception_descends_from_the_root() -> None:
    """`except NstError` catches all that the package raises."""
    errors = [kind for name, kind in vars(nst_client).items() if name.endswith("Error")]
    assert len(errors) == 18
    assert all(issubclass(kind, nst_client.NstError) for kind in errors)


def test_both_clients_offer_the_same_methods() -> None:
    """Whatever `Client` can do, `AsyncClient` does under the same name, with the same parameters."""

    def shape(kind: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(method).parameters) for name, method in methods if name[0] != "_"}

    assert shape(nst_client.Client) == shape(nst_client.AsyncClient)


def python(code: str, *, executable: str = sys.executable, cwd: Path | None = None) -> str:
    """Return what a new interpreter prints."""
    done = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_cheap() -> None:
    """Importing the package takes at most 0.3 s of CPU."""
    code = "import time; began = time.process_time(); import nst_client; print(time.process_time() - began)"
    assert min(float(python(code)) for _ in range(5)) <= 0.3


def test_import_leaves_heavy_packages_alone() -> None:
    """Importing the package loads neither torch nor numpy, nor PIL, rich and typer, which only some need."""
    code = "import sys, nst_client; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    heavy = {"torch", "torchvision", "numpy", "PIL", "rich", "typer", "nst_model", "nst_server"}
    assert not heavy & set(python(code).split())


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a fresh environment's Python, with the base package installed on the oldest supported gRPC."""
    # A copy: the build writes the generated contract into its source.
    source = tmp_path_factory.mktemp("source")
    for name in ("proto", "nst_model", "server", "client/nst_client"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*_pb2*", "*.binpb"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    home = tmp_path_factory.mktemp("home")
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    executable = str(home / "bin" / "python")
    floor = ["grpcio==1.76.0", "grpcio-status==1.76.0", "protobuf==6.31.1"]
    pip = [executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", str(source), *floor]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return executable


def test_base_install_is_small(bare_python: str) -> None:
    """The base package and all it needs take at most 80 MB beyond Python."""
    packages = Path(python("import sysconfig; print(sysconfig.get_path('purelib'))", executable=bare_python))
    brought_by_venv = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils-precedence")
    total = sum(
        file.stat().st_size
        for entry in packages.iterdir()
        if not entry.name.startswith(brought_by_venv)
        for file in ([entry] if entry.is_file() else entry.rglob("*"))
        if file.is_file()
    )
    assert 10e6 < total <= 80e6


def test_base_install_works_on_the_oldest_grpc(bare_python: str, tmp_path: Path) -> None:
    """Without torch and numpy, with the oldest gRPC and protobuf, package and command line work."""
    code = """
import importlib.util, nst_client
from nst_client.options import options_message
assert importlib.util.find_spec("torch") is None and importlib.util.find_spec("numpy") is None
options = options_message({"iterations": 5, "init": "noise", "style_layers": {"relu1_1": 1}})
try:
    list(nst_client.Client("localhost:1").list_models())
except nst_client.UnavailableError:
    print(options.iterations)
"""
    assert python(code, executable=bare_python, cwd=tmp_path) == "5"
    for arguments in (["--help"], ["stylize", "--help"]):
        nst = Path(bare_python).with_name("nst")
        done = subprocess.run([nst, *arguments], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Usage" in done.stdout


def test_import_does_not_depend_on_the_environment(tmp_path: Path) -> None:
    """The package is imported from any directory, with warnings as errors."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import nst_client"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_grpc_does_not_write_to_stderr(story: Any, serve: Any) -> None:
    """A server that goes away is an exception, and no line of gRPC's own log in the caller's terminal."""
    code = """
import sys, time, nst_client
stylization = nst_client.Client(sys.argv[1], patience_s=1).stylize(b"photo", b"style")
next(stylization)
print("reading", flush=True)
time.sleep(0.5)
try:
    list(stylization)
except nst_client.UnavailableError:
    time.sleep(0.2)
"""
    # gRPC writes about every other time.
    for _ in range(4):
        server = serve(story.snapshot().then(30))
        command = [sys.executable, "-c", code, server.address]
        environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
        assert process.stdout is not None
        process.stdout.readline()
        server.grpc_server.stop(grace=0)
        assert process.communicate(timeout=20) == (b"", b"")
        assert process.returncode == 0
