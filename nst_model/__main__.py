"""`nst-model`: feature models on this machine: list, fetch, calibrate, export; styles as files."""

from __future__ import annotations

import json
import os
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

STDOUT = "-"

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
        str, typer.Option("--output", "-o", help="A file, a directory, or - for stdout; default: a file here.")
    ] = os.curdir,
    graph: Annotated[ExportGraph, typer.Option(help="What it computes.")] = ExportGraph.CLOSURE,
    format: Annotated[
        ExportFormat | None, typer.Option(help="The file's format; default: the one that its name ends in, or onnx.")
    ] = None,
    precision: Annotated[
        ExportPrecision, typer.Option(help="Of the weights; fp16 in ONNX only.")
    ] = ExportPrecision.FP32,
    layers: Annotated[str, typer.Option(metavar="LAYER,…", help="Of the graph features.")] = "",
    content_layers: Annotated[str, typer.Option(metavar="LAYER,…", help="Compared with the content's.")] = "",
    style_layers: Annotated[str, typer.Option(metavar="LAYER,…", help="Compared with the style's.")] = "",
    pooling: Annotated[Pooling, typer.Option(help="How the model halves its resolution.")] = Pooling.MAX,
    padding: Annotated[Padding, typer.Option(help="What lies beyond the edge.")] = Padding.ZEROS,
) -> None:
    """Write a model as a file for another runtime."""
    spec = ExportSpec(
        model=model,
        graph=graph,
        format=_format(output, format),
        precision=precision,
        layers=_listed(layers),
        content_layers=_listed(content_layers),
        style_layers=_listed(style_layers),
        pooling=pooling,
        padding=padding,
    )
    file = _target(output, spec.file_name)
    from nst_model.exports import export  # noqa: PLC0415
    from nst_model.weights import load_weights  # noqa: PLC0415

    _write(export(load_weights(model), spec), file)


@app.command()
def style(
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", help=f"A file, whose name should end in {STYLE_SUFFIX}, or - for stdout.")
    ],
    model: Annotated[str, typer.Option(help="Name of a feature model.")] = DEFAULT_MODEL,
    weight: Annotated[list[float], typer.Option(help="Of an image, in their order; default 1.")] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="Name of the style, for people.")] = "",
    size: Annotated[int, typer.Option(help="Longer edge of the largest pictures that it is for, pixels.")] = 512,
    first_size: Annotated[int, typer.Option(help="Longer edge that their coarse-to-fine runs begin at, pixels.")] = 128,
    style_scale: Annotated[float, typer.Option(help="Longer edge of the images relative to the pictures'.")] = 1.0,
    style_layers: Annotated[str, typer.Option(metavar="LAYER,…", help="To be kept.")] = "",
    pooling: Annotated[Pooling, typer.Option(help="How the model halves its resolution.")] = Pooling.MAX,
    padding: Annotated[Padding, typer.Option(help="What lies beyond the edge.")] = Padding.MIRROR,
    precision: Annotated[Precision, typer.Option(help="Arithmetic of the model.")] = Precision.FP32,
) -> None:
    """Write the style of images as a file of moments."""
    options = StylizeOptions(
        size_px=size,
        first_size_px=first_size,
        style_scale=style_scale,
        style_layers=dict.fromkeys(_listed(style_layers) or STYLE_LAYERS, 1.0),
        pooling=pooling,
        padding=padding,
        precision=precision,
    )
    weights_given = weight or [1.0] * len(images)
    if len(weights_given) != len(images):
        raise InvalidOption("weight", f"must be given for each image or for none, not {len(weight)} for {len(images)}")
    file = _target(output)
    from nst_model.pictures import read_picture  # noqa: PLC0415
    from nst_model.preparation import prepare_style  # noqa: PLC0415
    from nst_model.stylization import FeatureModel, Style  # noqa: PLC0415
    from nst_model.weights import file_sha256, load_weights  # noqa: PLC0415

    edge_px = scaled_edge(size, style_scale)
    styles = [
        Style(read_picture(image, edge_px), share, file_sha256(image))
        for image, share in zip(images, weights_given, strict=True)
    ]
    kept = prepare_style(FeatureModel(load_weights(model), "cpu"), styles, options, display_name=name)
    _write(kept.to_bytes(), file)


@app.command()
def inspect(file: Annotated[Path, typer.Argument(help="An exported model or a style file.")]) -> None:
    """Check a file and print what it says of itself."""
    print(json.dumps(read_description(file), indent=2))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in text.split(",")) if text else ()


def _format(output: str, wanted: ExportFormat | None) -> ExportFormat:
    """Return the format of an exported file. Raises InvalidOption if its name ends in another one."""
    meant = {format.suffix: format for format in ExportFormat}.get(Path(output).suffix)
    if None not in {meant, wanted} and wanted is not meant:
        raise InvalidOption("format", f"must be {meant} for a file called {output!r}, not {wanted}")
    return wanted or meant or ExportFormat.ONNX


def _target(output: str, name: str | None = None) -> Path | None:
    """Return the file to be written, None for stdout. Raises InvalidOption at once, and not after the work.

    In a folder it has its own `name`, if there is one.
    """
    if output == STDOUT:
        return None
    file = Path(output)
    if file.is_dir():
        if name is None:
            raise InvalidOption("output:", f"{str(file)!r} is a folder; name a file in it")
        file /= name
    folder = file.resolve().parent
    if not folder.is_dir():
        raise InvalidOption("output:", f"there is no folder {str(file.parent)!r}")
    if not os.access(folder, os.W_OK) and (file.is_file() or not file.exists()):
        raise InvalidOption("output:", f"the folder {str(folder)!r} cannot be written to")
    return file


def _write(data: bytes, file: Path | None) -> None:
    """Write a file and print its name; or write to stdout, all of it even if it takes a part at a time."""
    if file is None:
        with open(sys.stdout.fileno(), "wb", closefd=False) as stream:
            stream.write(data)
        return
    from nst_model.exports import write_artifact  # noqa: PLC0415

    write_artifact(data, file)
    print(file)


def main() -> None:
    """Run the command line; errors that a person can act on are one line."""
    try:
        app()
    except (NstModelError, OSError) as error:
        print(f"nst-model: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
