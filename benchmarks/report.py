"""The table and the plots of docs/performance.md, from what `benchmarks/speed.py` has written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"


def merged(files: Sequence[Path]) -> dict[str, list[Any]]:
    """Return part → results of several files of one machine."""
    found: dict[str, list[Any]] = {"iteration": [], "race": [], "fine": [], "service": [], "left_out": []}
    for file in files:
        results = json.loads(file.read_text())
        for part, rows in found.items():
            rows.extend(results.get(part, []))
    return found


def table(results: dict[str, list[Any]]) -> Iterator[str]:
    """Yield the lines of the tables, Markdown; nothing of what was not measured."""
    for part in (iterations, races):
        lines = list(part(results))
        if lines:
            yield from (*lines, "")
    for row in results["fine"]:
        faster = f"{row['faster']:.1f}×" if row["faster"] else "not reached"
        yield (
            f"`fine` at {row['size_px']} px: {row['ours_iterations']} iterations a scale, {digits(row['ours_s'])} s, "
            f"loss {row['ours_loss']:.4f}; eager Adam, {row['adam_iterations']} a scale, {digits(row['adam_s'])} s, "
            f"loss {row['adam_loss']:.4f}: {faster}."
        )
    for row in results["service"]:
        yield (
            f"The service with a frame each iteration at {row['size_px']} px: {digits(row['alone_s'])} s alone, "
            f"{digits(row['served_s'])} s served: {row['added']:+.1%}."
        )
    for row in results["left_out"]:
        yield f"Left out: {row['kind']}, {row['what']}: {row['why']}."


def iterations(results: dict[str, list[Any]]) -> Iterator[str]:
    """Yield the table of iterations, and the ceilings: the highest rates that were measured."""
    rows = results["iteration"]
    if not rows:
        return
    yield "| preset | px | precision | textbook, s | ours, s | faster | limit, s | of the matrix rate | of the limit |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        textbook, faster = "–", "–"
        if row["textbook_s"] is not None:
            textbook, faster = digits(row["textbook_s"]), f"{row['faster']:.2f}×"
        yield (
            f"| {row['preset']} | {row['size_px']} | {row['precision']} | {textbook} | {digits(row['ours_s'])} "
            f"| {faster} | {digits(limit_s(row))}{' (bytes)' if row['bytes_limit_s'] == limit_s(row) else ''} "
            f"| {row['fraction_of_matrix_rate']:.0%} | {row['fraction_of_limit']:.0%} |"
        )
    yield ""
    rates = {name: max(row["matrix_tflops"][name] for row in rows) for name in ("bf16", "fp32")}
    yield (
        f"Matrix products: {digits(rates['bf16'])} TFLOPS in bf16, {digits(rates['fp32'])} in fp32; copies: "
        f"{digits(max(row['memory_gb_per_s'] for row in rows))} GB/s, read and written together. "
        "On a CPU for each second of processor: of each core, while all are at work."
    )


def races(results: dict[str, list[Any]]) -> Iterator[str]:
    """Yield the table of races."""
    rows = results["race"]
    if not rows:
        return
    yield (
        "| photograph, style | px | textbook: iterations, s, loss | ours: iterations, s | sooner "
        "| style distance, textbook; ours | content distance |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        ours = "not reached | –"
        if row["ours_s"] is not None:
            ours = f"{row['ours_iterations']}, {digits(row['ours_s'])} | {row['sooner']:.1f}×"
        style, content = zip(row["distances"]["textbook"], row["distances"]["ours"], strict=True)
        yield (
            f"| {Path(row['photo']).stem}, {Path(row['style']).stem} | {row['size_px']} "
            f"| {row['textbook_iterations']}, {digits(row['textbook_s'])}, {row['loss']:.2f} | {ours} "
            f"| {style[0]:.3f}; {style[1]:.3f} | {content[0]:.2f}; {content[1]:.2f} |"
        )


def limit_s(row: dict[str, Any]) -> float:
    """Return the seconds of an iteration at the hardware's limit: the larger of the two."""
    return max(row["arithmetic_limit_s"], row["bytes_limit_s"])


def digits(value: float) -> str:
    """Return a number above 0 with three digits, or all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def plot_iterations(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the seconds of an iteration against the limit, by size."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    rows = sorted(rows, key=lambda row: row["size_px"])

    def line(style: str, label: str, points: Iterable[tuple[float, float]], color: str | None = None) -> None:
        if points := list(points):
            axes.loglog(*zip(*points, strict=True), style, label=label, color=color)

    for preset in sorted({row["preset"] for row in rows}):
        line("o-", preset, ((row["size_px"], row["ours_s"]) for row in rows if row["preset"] == preset))
    compared = [row for row in rows if row["textbook_s"] is not None]
    line("s--", "textbook loop, fp32", ((row["size_px"], row["textbook_s"]) for row in compared), "gray")
    line(":", "limit of gatys", ((row["size_px"], limit_s(row)) for row in compared), "black")
    sizes = sorted({row["size_px"] for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel("longer edge, px")
    axes.set_ylabel("seconds an iteration")
    axes.legend()
    figure.savefig(file)
    plt.close(figure)


def plot_races(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the losses over the seconds: a row of plots for each size, a column for each pair."""
    sizes, photos = sorted({row["size_px"] for row in rows}), sorted({row["photo"] for row in rows})
    figure, axes = plt.subplots(
        len(sizes), len(photos), figsize=(4 * len(photos), 3.5 * len(sizes)), layout="constrained", squeeze=False
    )
    for place in axes.flat:
        place.set_visible(False)
    for row in rows:
        place = axes[sizes.index(row["size_px"])][photos.index(row["photo"])]
        place.set_visible(True)
        for name, curve in row["curves"].items():
            place.semilogy(*zip(*curve, strict=True), label={"ours": "gatys"}.get(name, "textbook loop"))
        place.axhline(row["loss"], color="gray", linewidth=0.5)
        place.set_ylim(row["loss"] / 1.5, row["loss"] * 30)
        place.set_title(f"{Path(row['photo']).stem}, {Path(row['style']).stem}, {row['size_px']} px")
        place.set_xlabel("seconds")
        place.set_ylabel("loss")
        place.legend()
    figure.savefig(file)
    plt.close(figure)


def main() -> None:
    """Print the tables and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="speed.json")
    parser.add_argument("--images", type=Path, default=IMAGES, help="Folder for the plots.")
    given = parser.parse_args()
    results = merged(given.files)
    given.images.mkdir(parents=True, exist_ok=True)
    for line in table(results):
        print(line)
    if results["iteration"]:
        plot_iterations(results["iteration"], given.images / "speed-iteration.svg")
    if results["race"]:
        plot_races(results["race"], given.images / "speed-race.svg")


if __name__ == "__main__":
    main()
