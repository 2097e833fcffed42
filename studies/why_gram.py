"""Why Gram matrices, and not the feature maps themselves? Each style loss on a style moved about, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from studies.lab import STYLE_LOSS_NAMES, Features, Lab, square, style_loss
from studies.measures import ghost, ssim
from studies.report import Report, curves, figure, heatmap
from nst_model.stylization import of_size

PHOTO, STYLE = "cat", "strokes"
SHIFTS_PX = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SHEET_SHIFT_PX = 13


def run(lab: Lab, report: Report) -> None:
    """Make the study's pictures, plots, numbers and tables."""
    responses(lab, report)
    stylized(lab, report)
    textures(lab, report)


def shifted(picture: Tensor, pixels: int) -> Tensor:
    """Return a picture (…, H, W) moved down and right by pixels; what leaves it comes in on the other side."""
    return picture.roll((pixels, pixels), dims=(-2, -1))


def shuffled(picture: Tensor, block_px: int, seed: int = 0) -> Tensor:
    """Return the largest part of a picture that whole blocks cover, with its blocks in random order."""
    rows, columns = (edge // block_px for edge in picture.shape[1:])
    blocks = picture[:, : rows * block_px, : columns * block_px].unflatten(2, (columns, block_px))
    blocks = blocks.unflatten(1, (rows, block_px)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    moved = blocks[order].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
    return moved.flatten(3, 4).flatten(1, 2)


TRANSFORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "shifted by 1 px": lambda picture: shifted(picture, 1),
    f"shifted by {SHEET_SHIFT_PX} px": lambda picture: shifted(picture, SHEET_SHIFT_PX),
    "shifted by 16 px": lambda picture: shifted(picture, 16),
    "shifted by half": lambda picture: shifted(picture, picture.shape[1] // 2),
    "flipped left–right": lambda picture: picture.flip(2),
    "flipped upside down": lambda picture: picture.flip(1),
    "turned by 90°": lambda picture: picture.rot90(1, (1, 2)),
    "blocks of 32 px shuffled": lambda picture: shuffled(picture, 32),
    "blocks of 8 px shuffled": lambda picture: shuffled(picture, 8),
    "pixels shuffled": lambda picture: shuffled(picture, 1),
}
FEATURES_SHIFTED = "features shifted by half"


def responses(lab: Lab, report: Report) -> None:
    """What each loss makes of a style moved about: 1 is what it makes of another style."""
    styles = {name: cropped(picture) for name, picture in lab.styles.items()}
    with torch.no_grad():
        features = {name: lab.features(picture) for name, picture in styles.items()}
        units = {loss: between_styles(loss, features) for loss in STYLE_LOSS_NAMES}

        def response(change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
            moved = {name: lab.features(change(picture)) for name, picture in styles.items()}
            return normalized(moved, features, units)

        by_transform = {
            FEATURES_SHIFTED: normalized(
                {name: {layer: shifted(at, at.shape[3] // 2) for layer, at in of.items()} for name, of in features.items()},
                features,
                units,
            )
        }
        by_transform |= {name: response(change) for name, change in TRANSFORMS.items()}
        shifts = [pixels for pixels in SHIFTS_PX if pixels <= min(next(iter(styles.values())).shape[1:]) // 2]
        by_shift = {pixels: response(lambda picture, pixels=pixels: shifted(picture, pixels)) for pixels in shifts}  # type: ignore[misc]
    report.numbers("response", by_transform)
    report.numbers("response_by_shift_px", by_shift)
    report.table(
        "responses",
        ["the style picture …", *STYLE_LOSS_NAMES],
        [[name, *(mean(found[loss]) for loss in STYLE_LOSS_NAMES)] for name, found in by_transform.items()],
    )
    first = next(iter(styles.values()))
    tiles = [("as it is", first), *((name, change(first)) for name, change in TRANSFORMS.items())]
    report.sheet("transforms", [tiles[:6], tiles[6:]])
    plotted, (axes,) = figure(width=7.5)
    lines = {loss: [mean(found[loss]) for found in by_shift.values()] for loss in STYLE_LOSS_NAMES}
    curves(
        axes,
        shifts,
        lines,
        title="The style picture against itself, shifted (circularly, down and right)",
        x_label="shift, pixels",
        y_label="loss; 1 = another style",
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(shifts, [str(pixels) for pixels in shifts])
    axes.set_yscale("log")
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.legend(ncols=2, fontsize=8)
    report.plot("shifts", plotted)


def cropped(picture: Tensor) -> Tensor:
    """Return the central square of a picture, its edge a multiple of 32 px where it has as many."""
    whole = square(picture)
    edge = whole.shape[1] // 32 * 32 or whole.shape[1]
    return whole[:, :edge, :edge]


def between_styles(loss: str, features: Mapping[str, Features]) -> dict[str, float]:
    """Return style → the mean of a loss between the others and it."""
    return {
        style: mean({other: float(style_loss(loss, features[other], of)) for other in features if other != style})
        for style, of in features.items()
    }


def normalized(
    moved: Mapping[str, Features], features: Mapping[str, Features], units: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """Return loss → style → the loss of its moved features, in units of what the loss makes of other styles."""
    return {
        loss: {style: float(style_loss(loss, moved[style], features[style])) / unit for style, unit in by_style.items()}
        for loss, by_style in units.items()
    }


def mean(values: Mapping[str, float]) -> float:
    """Return the mean of a mapping's values."""
    return float(np.mean(list(values.values())))


def stylized(lab: Lab, report: Report) -> None:
    """The pictures that each loss makes of the same photo, and what each loss says of them."""
    photo, style = lab.photos[PHOTO], lab.styles[STYLE]
    weights = lab.style_weights(PHOTO, STYLE)
    made = {
        loss: lab.picture(PHOTO, STYLE, style_loss=loss, style_weight=weight) for loss, weight in weights.items()
    }
    report.sheet("stylized", sheet_rows([("photo", photo), ("style", style)], made))
    judged = judgements(lab, made, style, unit=photo)
    stretched = of_size(style, photo.shape[1:])
    facts = {
        loss: {
            "style_weight": weights[loss],
            "ssim": ssim(picture, photo),
            "ghost": ghost(picture, photo, stretched),
        }
        for loss, picture in made.items()
    }
    report.numbers("stylized", {"facts": facts, "judged": judged})
    report.table(
        "stylized",
        ["made with", "style weight", "SSIM with the photo", "style's layout", "Wasserstein", "sliced", "Gram", "direct"],
        [
            [loss, *facts[loss].values(), *(judged[loss][by] for by in ("wasserstein", "sliced", "gram", "direct"))]
            for loss in made
        ],
    )
    plot_judgements(report, "stylized-judged", judged, "Pictures of the cat; 1 = the photo as it was")


def textures(lab: Lab, report: Report) -> None:
    """The pictures that each loss makes of noise, with no content at all."""
    style = lab.styles[STYLE]
    weights = lab.style_weights(PHOTO, STYLE)
    made = {
        loss: lab.picture(STYLE, STYLE, style_loss=loss, style_weight=weight, content_weight=0, init="noise", first_size_px=64)
        for loss, weight in weights.items()
    }
    report.sheet("textures", sheet_rows([("style", style)], made))
    others = [picture for name, picture in lab.styles.items() if name != STYLE]
    judged = judgements(lab, made, style, unit=others[0])
    facts = {loss: {"ssim_with_style": ssim(picture, style)} for loss, picture in made.items()}
    report.numbers("textures", {"facts": facts, "judged": judged})
    report.table(
        "textures",
        ["made with", "SSIM with the style picture", *STYLE_LOSS_NAMES],
        [[loss, facts[loss]["ssim_with_style"], *(judged[loss][by] for by in STYLE_LOSS_NAMES)] for loss in made],
    )
    plot_judgements(report, "textures-judged", judged, "Textures from noise; 1 = another style")


def sheet_rows(first: list[tuple[str, Tensor]], made: Mapping[str, Tensor]) -> list[list[tuple[str, Tensor | None]]]:
    """Return captioned pictures in two rows."""
    tiles: list[tuple[str, Tensor | None]] = [*first, *made.items()]
    half = (len(tiles) + 1) // 2
    return [tiles[:half], tiles[half:]]


def judgements(lab: Lab, made: Mapping[str, Tensor], style: Tensor, *, unit: Tensor) -> dict[str, dict[str, float]]:
    """Return name → style loss → what it makes of that picture, in units of what it makes of the picture `unit`."""
    with torch.no_grad():
        there, start = lab.features(style), lab.features(unit)
        units = {loss: float(style_loss(loss, start, there)) for loss in STYLE_LOSS_NAMES}
        found = {}
        for name, picture in made.items():
            here = lab.features(picture)
            found[name] = {loss: float(style_loss(loss, here, there)) / units[loss] for loss in STYLE_LOSS_NAMES}
    return found


def plot_judgements(report: Report, name: str, judged: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw what each loss says of each loss's picture."""
    plotted, (axes,) = figure(width=7.2)
    heatmap(axes, np.array([list(row.values()) for row in judged.values()]), list(judged), STYLE_LOSS_NAMES)
    axes.set(title=title, xlabel="measured by", ylabel="made with")
    report.plot(name, plotted)
