"""All benchmarks in one run, with the machine they ran on."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent


def machine() -> str:
    """Return what the figures were measured on."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        names = [
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        device = f"{names[0]} ({len(names)} cores, {torch.backends.cpu.get_cpu_capability()})"
    return f"{device}, Python {platform.python_version()}, torch {torch.__version__}"


def main() -> None:
    """Run them one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps.")
    options = parser.parse_args()
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}", flush=True)
    for script in ("losses.py", "service.py"):
        print(f"\n{script}\n", flush=True)
        subprocess.run([sys.executable, FOLDER / script, "--device", options.device], check=True)
    for script in ("reliability", "memory"):  # on the CPU
        print(f"\n{script}.py\n", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{script}"], check=True, cwd=FOLDER.parent)


if __name__ == "__main__":
    main()
