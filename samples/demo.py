"""The demo: a server, a photograph, a style, and a picture out of them, through the real gRPC stream.

Runs `nst-model fetch`, `nst-server` and `nst stylize`, just as a person would.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

SAMPLES = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
STOP_WITHIN_S = 30


def main() -> None:
    """Run the demo; print where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--photo", type=Path, default=skimage_photo("chelsea.png"), help="Photograph; a cat by default."
    )
    parser.add_argument("--style", type=Path, default=SAMPLES / "styles" / "strokes.jpg", help="Style image.")
    parser.add_argument("--size", type=int, default=384, help="Longer edge of the picture, pixels.")
    parser.add_argument("--iterations", type=int, default=20, help="Iterations at each scale.")
    parser.add_argument("--out", type=Path, default=Path("out"), help="Folder of the results.")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the server is stopped then too
    picture, animation = options.out / "demo.png", options.out / "demo.webp"

    run("nst-model", "fetch")
    with server(options.out / "server.log") as address:
        print(f"nst-server listens on {address}")
        size, iterations = f"--size-px={options.size}", f"--iterations={options.iterations}"
        files = ["-o", str(picture), "--animation", str(animation)]
        run("nst", "stylize", "--server", address, str(options.photo), str(options.style), *files, size, iterations)
    for what, file in (("picture", picture), ("animation", animation), ("server log", options.out / "server.log")):
        print(f"{what:<11} {file.resolve()}")


def skimage_photo(name: str) -> Path:
    """Return a photograph that scikit-image ships, without importing it."""
    found = importlib.util.find_spec("skimage")
    if found is None or found.origin is None:
        sys.exit("demo: scikit-image is missing; install with: pip install -e '.[server,demo]'")
    return Path(found.origin).parent / "data" / name


def run(*command: str) -> None:
    """Run one of the project's commands; leave with its exit code if it fails."""
    done = subprocess.run([BIN / command[0], *command[1:]], check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)


@contextlib.contextmanager
def server(log_file: Path) -> Iterator[str]:
    """Run a server on a free loopback port while the block lasts; its address is the value."""
    command = [
        BIN / "nst-server",
        "--listen",
        "localhost:0",
        "--log-format",
        "json",
        "--data-dir",
        log_file.parent / "data",
    ]
    with log_file.open("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield address_in(log_file, process)
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WITHIN_S)
            process.kill()


def address_in(log_file: Path, process: subprocess.Popen[bytes]) -> str:
    """Wait for the server's log to say where it listens."""
    while True:
        for line in log_file.read_text().splitlines():
            if line.startswith("{") and (entry := json.loads(line)).get("event") == "serving":
                return str(entry["address"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
            sys.exit(f"demo: the server did not start; see {log_file}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
