"""The table and the plots of docs/performance.md, from what `benchmarks/speed.py` has written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def merged(files: Sequence[Path]) -> dict[str, list[dict[str, Any]]]:
    """Return part → results of several files of one machine."""
    found: dict[str, list[dict[str, Any]]] = {"iteration": [], "race": [], "fine": [], "service": []}
    for file in files:
        results = json.loads(file.read_text())
        for part, rows in found.items():
            rows.extend(results.get(part, []))
    return found


def table(results: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    """Yield the lines of the tables, Markdown."""
    yield "| preset | px | precision | textbook, s | ours, s | faster | limit, s | of the matrix rate | of the limit |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in results["iteration"]:
        # The textbook's loop has the objective of `gatys`, so there is nothing that another preset is faster than.
        faster = f"{row['faster']:.2f}×" if row["preset"] == "gatys" else "–"
        yield (
            f"| {row['preset']} | {row['size_px']} | {row['precision']} "
            f"| {row['textbook_s']:.3f} | {row['ours_s']:.3f} | {faster} "
            f"| {row['arithmetic_limit_s']:.3f} | {row['fraction_of_matrix_rate']:.0%} "
            f"| {row['fraction_of_limit']:.0%} |"
        )
    yield ""
    yield "| photograph, style | px | textbook: iterations, s, loss | ours: iterations, s | sooner |"
    yield "| --- | --- | --- | --- | --- |"
    for row in results["race"]:
        ours = "not reached | –"
        if row["ours_s"] is not None:
            ours = f"{row['ours_iterations']}, {row['ours_s']:.1f} | {row['sooner']:.1f}×"
        yield (
            f"| {row['photo']}, {row['style']} | {row['size_px']} "
            f"| {row['textbook_iterations']}, {row['textbook_s']:.1f}, {row['loss']:.2f} | {ours} |"
        )
    yield ""
    for row in results["fine"]:
        yield (
            f"`fine` at {row['size_px']} px: {row['ours_iterations']} iterations a scale, {row['ours_s']:.1f} s, loss "
            f"{row['ours_loss']:.4f}; eager Adam, {row['adam_iterations']} a scale, {row['adam_s']:.1f} s, loss "
            f"{row['adam_loss']:.4f}: {row['faster']:.1f}×{'' if row['reached'] else ', not reached'}."
        )
    for row in results["service"]:
        yield (
            f"The service with a frame each iteration at {row['size_px']} px: {row['alone_s']:.3f} s alone, "
            f"{row['served_s']:.3f} s served: {row['added']:+.1%}."
        )


def plot_iterations(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the seconds of an iteration against the limit, by size."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for preset in sorted({row["preset"] for row in rows}):
        here = sorted((row for row in rows if row["preset"] == preset), key=lambda row: row["size_px"])
        sizes = [row["size_px"] for row in here]
        axes.loglog(sizes, [row["ours_s"] for row in here], "o-", label=preset)
    here = sorted((row for row in rows if row["preset"] == "gatys"), key=lambda row: row["size_px"])
    sizes = [row["size_px"] for row in here]
    axes.loglog(sizes, [row["textbook_s"] for row in here], "s--", color="gray", label="textbook loop, fp32")
    axes.loglog(sizes, [row["arithmetic_limit_s"] for row in here], ":", color="black", label="limit of gatys")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("longer edge, px")
    axes.set_ylabel("seconds an iteration")
    axes.legend()
    figure.savefig(file)
    plt.close(figure)


def plot_races(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the losses over the seconds, pair by pair."""
    figure, axes = plt.subplots(1, len(rows), figsize=(4 * len(rows), 3.5), layout="constrained", squeeze=False)
    for place, row in zip(axes[0], rows, strict=True):
        for name, curve in row["curves"].items():
            place.semilogy(*zip(*curve, strict=True), label={"ours": "gatys"}.get(name, "textbook loop"))
        place.axhline(row["loss"], color="gray", linewidth=0.5)
        place.set_ylim(row["loss"] / 1.5, row["loss"] * 30)
        place.set_title(f"{Path(row['photo']).stem}, {Path(row['style']).stem}")
        place.set_xlabel("seconds")
    axes[0][0].set_ylabel("loss")
    axes[0][0].legend()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Print the tables and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="speed.json")
    parser.add_argument("--images", type=Path, default=IMAGES, help="Folder for the plots.")
    given = parser.parse_args()
    results = merged(given.files)
    print("\n".join(table(results)))
    if results["iteration"]:
        plot_iterations(results["iteration"], given.images / "speed-iteration.svg")
    if results["race"]:
        plot_races(results["race"], given.images / "speed-race.svg")


if __name__ == "__main__":
    main()
