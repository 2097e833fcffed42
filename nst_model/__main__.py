"""`nst-model`: feature models on this machine: list, fetch, calibrate, export."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nst_model import CARDS, DEFAULT_MODEL, NstModelError
from nst_model.artifact import read_description
from nst_model.cache import cached_file
from nst_model.export_spec import ExportFormat, ExportGraph, ExportPrecision, ExportSpec
from nst_model.options import Padding, Pooling

app = typer.Typer(
    help="Feature models on this machine: list, fetch, calibrate, export.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(help="Name of a feature model; `nst-model list` shows them.")]


@app.command("list")
def list_models() -> None:
    """List the feature models and whether their weights are on this machine."""
    for card in CARDS.values():
        state = "fetched" if cached_file(card.name) else f"not fetched ({card.download_mb} MB)"
        print(f"{card.name:<12} {state:<24} {card.description}")


@app.command("fetch")
def fetch_model(
    model: Model = DEFAULT_MODEL,
    file: Annotated[
        Path | None, typer.Option(help="A state dict with torchvision's key names, instead of a download.")
    ] = None,
) -> None:
    """Fetch a model's weights, check their SHA-256, calibrate them and keep them in the cache."""
    from nst_model.weights import fetch  # noqa: PLC0415 - torch only where it is needed

    print(fetch(model, file))


@app.command()
def calibrate(model: Model = DEFAULT_MODEL) -> None:
    """Measure each layer's mean activation anew and hold it against the cached one; exit with 1 if they differ."""
    from nst_model.calibration import calibrate as measure  # noqa: PLC0415
    from nst_model.weights import load_weights  # noqa: PLC0415

    cached = load_weights(model)
    measured = measure(cached)
    worst = 0.0
    print(f"{'layer':<8} {'pooling':<8} {'cached':>10} {'measured':>10}")
    for pooling, means in measured.mean_activation.items():
        for layer, mean in means.items():
            kept = cached.mean_activation[pooling][layer]
            worst = max(worst, abs(mean / kept - 1))
            print(f"{layer:<8} {pooling:<8} {kept:>10.4f} {mean:>10.4f}")
    print(f"largest relative difference: {worst:.1e}")
    if worst > 1e-3:
        raise typer.Exit(1)


@app.command("export")
def export_model(
    model: Model = DEFAULT_MODEL,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file; by default named after what is in it.")
    ] = None,
    graph: Annotated[ExportGraph, typer.Option(help="What it computes.")] = ExportGraph.CLOSURE,
    format: Annotated[ExportFormat, typer.Option(help="The file's format.")] = ExportFormat.ONNX,
    precision: Annotated[
        ExportPrecision, typer.Option(help="Of the weights; fp16 in ONNX only.")
    ] = ExportPrecision.FP32,
    layer: Annotated[list[str], typer.Option(help="Layer of the graph features; may be repeated.")] = [],  # noqa: B006
    content_layer: Annotated[list[str], typer.Option(help="Layer for the content; may be repeated.")] = [],  # noqa: B006
    style_layer: Annotated[list[str], typer.Option(help="Layer for the style; may be repeated.")] = [],  # noqa: B006
    pooling: Annotated[Pooling, typer.Option(help="How the model halves its resolution.")] = Pooling.MAX,
    padding: Annotated[Padding, typer.Option(help="What lies beyond the edge.")] = Padding.ZEROS,
) -> None:
    """Write a model as a file for another runtime."""
    spec = ExportSpec(
        model=model,
        graph=graph,
        format=format,
        precision=precision,
        layers=tuple(layer),
        content_layers=tuple(content_layer),
        style_layers=tuple(style_layer),
        pooling=pooling,
        padding=padding,
    )
    from nst_model.exports import export, write_artifact  # noqa: PLC0415
    from nst_model.weights import load_weights  # noqa: PLC0415

    file = output or Path(spec.file_name)
    write_artifact(export(load_weights(model), spec), file)
    print(file)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An exported model or a style file.")]) -> None:
    """Check a file and print what it says of itself."""
    print(json.dumps(read_description(file), indent=2, ensure_ascii=False))


def main() -> None:
    """Run the command line; errors that a person can act on are one line."""
    try:
        app()
    except NstModelError as error:
        print(f"nst-model: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
