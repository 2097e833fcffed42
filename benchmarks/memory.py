"""Whether a stylization takes the memory that it is reckoned to take: the peak of a process against `peak_bytes`.

Each case runs in a process of its own, on the CPU, for a few iterations; what a full history would add is added. The
process keeps the memory that it frees, as a worker does.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nst_model import DEFAULT_MODEL, StylizeOptions, model_card
from nst_model.memory import peak_bytes

ITERATIONS = 3
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"style_loss": "gram"},
    {"style_loss": "sliced"},
    {"style_loss": "direct"},
    {"content_loss": "self_similarity"},
    {"preset": "gatys"},
    {"optimizer": "adam"},
    {"precision": "bf16"},
    {"precision": "bf16", "preset": "gatys"},
    {"first_size_px": 128},
    {"style_loss": "gram", "style_layers": {"relu2_1": 1}, "content_layers": {"relu2_2": 1}},
)
"""Options that change what is held; the rest are those of `fine`, in fp32 and at one scale."""


def options_of(size_px: int, case: dict[str, Any]) -> StylizeOptions:
    """Return the options of a case."""
    given = {"size_px": size_px, "iterations": ITERATIONS, "first_size_px": 4096, "precision": "fp32", **case}
    return StylizeOptions.of(given.pop("preset", "fine"), **given)


def resident() -> int:
    """Return the memory that this process occupies, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(size_px: int, case: dict[str, Any]) -> int:
    """Return by how much this process grows at most, in bytes, in a stylization of 4:3."""
    import torch  # noqa: PLC0415 - only where it is computed

    import nst_model  # noqa: PLC0415
    from nst_model.devices import reuse_memory  # noqa: PLC0415

    reuse_memory()
    model = nst_model.FeatureModel(nst_model.load_weights(DEFAULT_MODEL), "cpu")
    content, style = torch.rand(2, 3, size_px * 3 // 4, size_px)
    before, peak = resident(), 0

    def watch() -> None:
        nonlocal peak
        while True:
            peak = max(peak, resident())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    for _ in nst_model.stylize(model, content, [nst_model.Style(style)], options_of(size_px, case)):
        pass
    return peak - before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case is not None:
        print(measured(given.sizes[0], json.loads(given.case)))
        return
    print("| options | size, px | measured, MiB | reckoned, MiB | ratio |\n| --- | --- | --- | --- | --- |")
    for size in given.sizes:
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.memory", "--sizes", str(size), "--case", json.dumps(case)]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            options = options_of(size, case)
            height = size * 3 // 4
            pixels = (height + 2 * options.margin_px) * (size + 2 * options.margin_px)
            if options.optimizer.value == "lbfgs":
                peak += pixels * 3 * 4 * 2 * (options.history - ITERATIONS)
            reckoned = peak_bytes(options, height, size, model_card(DEFAULT_MODEL).architecture)
            named = ", ".join(f"{name} {value}" for name, value in case.items()) or "`fine`"
            print(
                f"| {named} | {size} | {peak / 2**20:.0f} | {reckoned / 2**20:.0f} | {peak / reckoned:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
