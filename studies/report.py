"""What the studies leave behind: pictures, plots, numbers, and the tables in their pages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nst_model import to_pixels

mpl.use("Agg")

CAPTION_PX, GAP_PX = 18, 4


class Report:
    """One study's page, with its pictures and numbers.

    Args:
        folder: where the pages are.
        name: of the page and of the file of numbers, without suffix; what the names of its pictures begin with.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._numbers: dict[str, Any] = {}
        (folder / "images").mkdir(parents=True, exist_ok=True)

    def sheet(self, name: str, rows: Sequence[Sequence[tuple[str, Tensor | None]]]) -> None:
        """Save rows of captioned pictures as one JPEG; None leaves a place empty."""
        contact_sheet(rows).save(self._image(f"{name}.jpg"), quality=88, optimize=True)

    def plot(self, name: str, figure: Figure) -> None:
        """Save a figure as PNG."""
        figure.savefig(self._image(f"{name}.png"), dpi=110, metadata={"Software": None})

    def table(self, name: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Write a table between the page's markers of that name; at the end of the page if it has none."""
        lines = [
            f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *(map(shown, row) for row in rows))
        ]
        page = self._folder / f"{self._name}.md"
        before = page.read_text(encoding="utf-8") if page.exists() else ""
        page.write_text(filled(before, name, "\n".join(lines)), encoding="utf-8")

    def numbers(self, name: str, values: Any) -> None:
        """Keep numbers for the study's JSON file, and write it."""
        self._numbers[name] = values
        text = json.dumps(rounded(self._numbers), indent=1, ensure_ascii=False)
        (self._folder / f"{self._name}.json").write_text(text + "\n", encoding="utf-8")

    def _image(self, file: str) -> Path:
        return self._folder / "images" / f"{self._name}-{file}"


def filled(page: str, name: str, table: str) -> str:
    """Return a page with a table between its markers of that name, or after everything else."""
    begin, end = f"<!-- table {name} -->", f"<!-- end {name} -->"
    block = f"{begin}\n\n{table}\n\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    return found.sub(lambda _: block, page) if found.search(page) else f"{page}\n{block}\n"


def shown(value: Any) -> str:
    """Return a cell's text; a number in two or three digits."""
    if not isinstance(value, float):
        return str(value)
    size = abs(value)
    if size == 0:
        return "0"
    if not 1e-3 <= size < 1e4:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    decimals = 3 if size < 0.1 else 2 if size < 10 else 1 if size < 100 else 0
    return f"{value:.{decimals}f}"


def rounded(value: Any) -> Any:
    """Return numbers in four digits, inside of whatever holds them."""
    if isinstance(value, Mapping):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def contact_sheet(rows: Sequence[Sequence[tuple[str, Tensor | None]]]) -> Image.Image:
    """Return rows of pictures, each under its caption."""
    pictures = [picture for row in rows for _, picture in row if picture is not None]
    width = max(picture.shape[2] for picture in pictures)
    heights = [max(picture.shape[1] for _, picture in row if picture is not None) for row in rows]
    columns = max(map(len, rows))
    size = (columns * (width + GAP_PX) + GAP_PX, sum(heights) + len(rows) * (CAPTION_PX + GAP_PX) + GAP_PX)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.truetype(Path(mpl.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 11)
    top = GAP_PX
    for row, height in zip(rows, heights, strict=True):
        for column, (caption, picture) in enumerate(row):
            left = GAP_PX + column * (width + GAP_PX)
            draw.text((left, top + 1), caption, fill="black", font=font)
            if picture is not None:
                sheet.paste(Image.fromarray(to_pixels(picture)), (left, top + CAPTION_PX))
        top += CAPTION_PX + height + GAP_PX
    return sheet


def curves(
    axes: Axes, x: Sequence[float], lines: Mapping[str, Sequence[float]], *, title: str, x_label: str, y_label: str
) -> None:
    """Draw one line for each name."""
    for name, y in lines.items():
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.4, label=name)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)


def heatmap(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draw a matrix of positive numbers, its entries written in, colours by their logarithm."""
    shade = np.log10(np.clip(values, 1e-3, 1e2))
    axes.imshow(shade, cmap="RdYlGn_r", vmin=-2, vmax=2, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, shown(float(value)), ha="center", va="center", fontsize=8)


def figure(columns: int = 1, height: float = 4.2, width: float = 5.6) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, side by side; sizes in inches, width for each panel."""
    made = Figure(figsize=(width * columns, height), layout="constrained")
    return made, list(np.atleast_1d(made.subplots(1, columns)))
