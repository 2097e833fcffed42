"""`nst-model`: feature models on this machine: list, fetch, calibrate, export."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from nst_model import CARDS, DEFAULT_MODEL, NstModelError
from nst_model.cache import cached_file

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


def main() -> None:
    """Run the command line; errors that a person can act on are one line."""
    try:
        app()
    except NstModelError as error:
        print(f"nst-model: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
