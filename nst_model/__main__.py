"""`nst-model`: feature models on this machine: list, fetch, calibrate, export; styles as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nst_model import CARDS, DEFAULT_MODEL, InvalidOption, NstModelError
from nst_model.artifact import read_description
from nst_model.cache import cached_file
from nst_model.export_spec import STYLE_LAYERS, ExportFormat, ExportGraph, ExportPrecision, ExportSpec
from nst_model.options import Padding, Pooling, Precision, StylizeOptions
from nst_model.scales import scaled_edge
from nst_model.style_card import STYLE_SUFFIX

app = typer.Typer(
    help="Feature models on this machine: list, fetch, calibrate, export; styles as files.",
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
    *,
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
    file = output or Path(spec.file_name)
    _check_folder(file)
    from nst_model.exports import export, write_artifact  # noqa: PLC0415
    from nst_model.weights import load_weights  # noqa: PLC0415

    write_artifact(export(load_weights(model), spec), file)
    print(file)


@app.command()
def style(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help=f"The file; its name should end in {STYLE_SUFFIX}.")],
    model: Annotated[str, typer.Option(help="Name of a feature model.")] = DEFAULT_MODEL,
    weight: Annotated[list[float], typer.Option(help="Of an image, in their order; default 1.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="Name of the style, for people.")] = "",
    size: Annotated[int, typer.Option(help="Longer edge of the largest pictures that it is for, pixels.")] = 512,
    first_size: Annotated[int, typer.Option(help="Longer edge that their coarse-to-fine runs begin at, pixels.")] = 128,
    style_scale: Annotated[float, typer.Option(help="Longer edge of the images relative to the pictures'.")] = 1.0,
    layer: Annotated[list[str], typer.Option(help="Layer to be kept; may be repeated.")] = [],  # noqa: B006
    pooling: Annotated[Pooling, typer.Option(help="How the model halves its resolution.")] = Pooling.MAX,
    padding: Annotated[Padding, typer.Option(help="What lies beyond the edge.")] = Padding.MIRROR,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the model.")] = Precision.FP32,
) -> None:
    """Write the style of images as a file of moments."""
    options = StylizeOptions(
        size_px=size,
        first_size_px=first_size,
        style_scale=style_scale,
        style_layers=dict.fromkeys(layer or STYLE_LAYERS, 1.0),
        pooling=pooling,
        padding=padding,
        precision=precision,
    )
    weights_given = weight or [1.0] * len(images)
    if len(weights_given) != len(images):
        raise InvalidOption("weight", f"must be given for each image or for none, not {len(weight)} for {len(images)}")
    _check_folder(output)
    from nst_model.exports import write_artifact  # noqa: PLC0415
    from nst_model.pictures import read_picture  # noqa: PLC0415
    from nst_model.preparation import prepare_style  # noqa: PLC0415
    from nst_model.stylization import FeatureModel, Style  # noqa: PLC0415
    from nst_model.weights import file_sha256, load_weights  # noqa: PLC0415

    edge_px = scaled_edge(size, style_scale)
    styles = [
        Style(read_picture(file, edge_px), share, file_sha256(file))
        for file, share in zip(images, weights_given, strict=True)
    ]
    kept = prepare_style(FeatureModel(load_weights(model), "cpu"), styles, options, display_name=name)
    write_artifact(kept.to_bytes(), output)
    print(output)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An exported model or a style file.")]) -> None:
    """Check a file and print what it says of itself."""
    print(json.dumps(read_description(file), indent=2, ensure_ascii=False))


def _check_folder(file: Path) -> None:
    """Say at once that a file cannot be written, and not after half a minute of work."""
    if not file.absolute().parent.is_dir():
        raise InvalidOption("output:", f"there is no folder {str(file.parent)!r}")


def main() -> None:
    """Run the command line; errors that a person can act on are one line."""
    try:
        app()
    except (NstModelError, OSError) as error:
        print(f"nst-model: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
