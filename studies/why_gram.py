"""Why Gram matrices, and not the feature maps themselves? Each style loss on a style moved about, and its pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.losses import POSITIONED
from nst_model.stylization import of_size
from studies.lab import STYLE_LOSS_NAMES, Features, Lab, Loss, square, style_losses
from studies.measures import ghost, ssim
from studies.report import Report, curves, figure, heatmap

PHOTO, STYLE = "cat", "strokes"
WEAKER = (4, 16, 64)
FIRST_SIZES_PX = (64, 128, 4096)
TEXTURE: Mapping[str, Any] = {"content_weight": 0, "init": "noise", "first_size_px": FIRST_SIZES_PX[0]}
"""Options of a picture made of noise and a style alone."""
LAYOUT_LAYER = "relu4_1"
SHIFTS_PX = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ROLLS = 16
"""How often the style is rolled at random, for what the layout of a picture without it is by chance."""
RESPONSE_SCALE = 1.5
"""Size of the styles whose responses are measured, relative to the pictures': their edges matter less."""


def run(lab: Lab, report: Report) -> None:
    """Make the study's pictures, plots, numbers and tables."""
    responses(lab, report)
    stylized(lab, report)
    weaker(lab, report)
    stronger(lab, report)
    textures(lab, report)
    beginnings(lab, report)


def shifted(picture: Tensor, pixels: int) -> Tensor:
    """Return a picture (…, H, W) moved down and right by pixels; what leaves it comes in on the other side."""
    return picture.roll((pixels, pixels), dims=(-2, -1))


def half_way(picture: Tensor) -> Tensor:
    """Return a picture (…, H, W) shifted by half its height."""
    return shifted(picture, picture.shape[-2] // 2)


def shuffled(picture: Tensor, block_px: int, seed: int = 0) -> Tensor:
    """Return the largest part of a picture that whole blocks cover, with its blocks in random order."""
    rows, columns = (edge // block_px for edge in picture.shape[1:])
    whole = picture[:, : rows * block_px, : columns * block_px]
    blocks = whole.reshape(3, rows, block_px, columns, block_px).permute(1, 3, 0, 2, 4).flatten(0, 1)
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    moved = blocks[order].reshape(rows, columns, 3, block_px, block_px).permute(2, 0, 3, 1, 4)
    return moved.reshape(whole.shape)


TRANSFORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "shifted by 1 px": lambda picture: shifted(picture, 1),
    "shifted by 13 px": lambda picture: shifted(picture, 13),
    "shifted by 16 px": lambda picture: shifted(picture, 16),
    "shifted by half": half_way,
    "flipped left–right": lambda picture: picture.flip(2),
    "flipped upside down": lambda picture: picture.flip(1),
    "turned by 90°": lambda picture: picture.rot90(1, (1, 2)),
    "blocks of 32 px shuffled": lambda picture: shuffled(picture, 32),
    "blocks of 8 px shuffled": lambda picture: shuffled(picture, 8),
    "pixels shuffled": lambda picture: shuffled(picture, 1),
}
FEATURES_SHIFTED = "features shifted by half"


def responses(lab: Lab, report: Report) -> None:
    """Measure each loss on a style moved about: 1 is what it makes of another style."""
    styles = {name: cropped(lab.style(name, RESPONSE_SCALE)) for name in lab.styles}
    with torch.no_grad():
        features = {name: lab.features(picture) for name, picture in styles.items()}
        losses = {name: style_losses(of) for name, of in features.items()}
        units = {
            name: between(losses[name], [features[other] for other in features if other != name]) for name in losses
        }

        def response(moved: Callable[[str], Features]) -> dict[str, dict[str, float]]:
            found = {name: values(losses[name], moved(name), units[name]) for name in styles}
            return {loss: {name: found[name][loss] for name in styles} for loss in STYLE_LOSS_NAMES}

        def response_to(change: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
            return response(lambda name: lab.features(change(styles[name])))

        by_transform = {
            "as it is": response(features.__getitem__),
            FEATURES_SHIFTED: response(lambda name: {at: half_way(of) for at, of in features[name].items()}),
            **{name: response_to(change) for name, change in TRANSFORMS.items()},
        }
        limit = next(iter(styles.values())).shape[1] // 2
        shifts = [pixels for pixels in SHIFTS_PX if pixels <= limit]
        by_shift = {pixels: response_to(partial(shifted, pixels=pixels)) for pixels in shifts}
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


def between(losses: Mapping[str, Loss], others: Sequence[Features]) -> dict[str, float]:
    """Return loss → its mean over the features of other styles."""
    return {name: float(np.mean([float(loss(other)) for other in others])) for name, loss in losses.items()}


def values(losses: Mapping[str, Loss], features: Features, units: Mapping[str, float]) -> dict[str, float]:
    """Return loss → its value at some features, in its unit."""
    return {name: float(loss(features)) / units[name] for name, loss in losses.items()}


def mean(found: Mapping[str, float]) -> float:
    """Return the mean of a mapping's values."""
    return float(np.mean(list(found.values())))


def stylized(lab: Lab, report: Report) -> None:
    """Show what each loss makes of the same photo, and what each loss says of that."""
    photo, style = lab.photos[PHOTO], lab.styles[STYLE]
    weights = lab.style_weights(PHOTO, STYLE)
    made = {loss: lab.picture(PHOTO, STYLE, style_loss=loss, style_weight=weight) for loss, weight in weights.items()}
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
        [
            "made with",
            "style weight",
            "SSIM with the photo",
            "style's layout",
            "Wasserstein",
            "sliced",
            "Gram",
            "direct",
        ],
        [
            [loss, *facts[loss].values(), *(judged[loss][by] for by in ("wasserstein", "sliced", "gram", "direct"))]
            for loss in made
        ],
    )
    plot_judgements(report, "stylized-judged", judged, "Pictures of the cat; 1 = the photo as it was")


def weaker(lab: Lab, report: Report) -> None:
    """Show that less weight does not mend the direct comparison."""
    photo, style = lab.photos[PHOTO], lab.styles[STYLE]
    weight = lab.style_weights(PHOTO, STYLE)["direct"]
    made = {
        f"direct × 1/{part}": lab.picture(PHOTO, STYLE, style_loss="direct", style_weight=weight / part)
        for part in WEAKER
    }
    report.sheet("weaker", [list(made.items())])
    judged = judgements(lab, made, style, unit=photo)
    stretched = of_size(style, photo.shape[1:])
    facts = {
        name: {
            "ssim": ssim(picture, photo),
            "ghost": ghost(picture, photo, stretched),
            "sliced": judged[name]["sliced"],
        }
        for name, picture in made.items()
    }
    report.numbers("weaker", facts)
    rows = [[name, *of.values()] for name, of in facts.items()]
    report.table("weaker", ["made with", "SSIM with the photo", "style's layout", "sliced"], rows)


def stronger(lab: Lab, report: Report) -> None:
    """Show whether more weight or more iterations bring Gram matrices to where Wasserstein is."""
    photo, style = lab.photos[PHOTO], lab.styles[STYLE]
    weights = lab.style_weights(PHOTO, STYLE)
    choices = {
        "gram": {"style_loss": "gram", "style_weight": weights["gram"]},
        "gram, 10 × the weight": {"style_loss": "gram", "style_weight": 10 * weights["gram"]},
        "gram, 3 × the iterations": {
            "style_loss": "gram",
            "style_weight": weights["gram"],
            "iterations": 3 * lab.iterations,
        },
        "wasserstein": {"style_loss": "wasserstein", "style_weight": weights["wasserstein"]},
    }
    stylized = {name: lab.picture(PHOTO, STYLE, **given) for name, given in choices.items()}
    from_noise = {name: lab.picture("nothing", STYLE, **TEXTURE, **given) for name, given in choices.items()}
    report.sheet("stronger", [list(stylized.items()), list(from_noise.items())])
    other = next(of for name, of in lab.styles.items() if name != STYLE)
    photos = judgements(lab, stylized, style, unit=photo)
    noises = judgements(lab, from_noise, style, unit=other)
    facts = {
        name: {
            "photo_gram": photos[name]["gram"],
            "photo_sliced": photos[name]["sliced"],
            "photo_ssim": ssim(stylized[name], photo),
            "noise_gram": noises[name]["gram"],
            "noise_sliced": noises[name]["sliced"],
        }
        for name in choices
    }
    report.numbers("stronger", facts)
    head = ["made with", "cat: Gram", "cat: sliced", "cat: SSIM", "from noise: Gram", "from noise: sliced"]
    report.table("stronger", head, [[name, *of.values()] for name, of in facts.items()])


def texture(lab: Lab, loss: str, first_size_px: int, padding: str = "mirror") -> Tensor:
    """Return what a style loss makes of noise, with no content at all."""
    given = {**TEXTURE, "first_size_px": first_size_px, "padding": padding}
    return lab.picture("nothing", STYLE, style_loss=loss, style_weight=lab.style_weights(PHOTO, STYLE)[loss], **given)


def textures(lab: Lab, report: Report) -> None:
    """Show what each loss makes of noise."""
    style = lab.styles[STYLE]
    made = {loss: texture(lab, loss, FIRST_SIZES_PX[0]) for loss in STYLE_LOSS_NAMES}
    report.sheet("textures", sheet_rows([("style", style)], made))
    judged = judgements(lab, made, style, unit=next(of for name, of in lab.styles.items() if name != STYLE))
    facts = {loss: {"ssim": ssim(of, style), "layout": layout(lab, of, style)} for loss, of in made.items()}
    report.numbers("textures", {"facts": facts, "judged": judged})
    report.table(
        "textures",
        ["made with", "SSIM with the style picture", "layout", *STYLE_LOSS_NAMES],
        [[loss, *facts[loss].values(), *(judged[loss][by] for by in STYLE_LOSS_NAMES)] for loss in made],
    )
    plot_judgements(report, "textures-judged", judged, "Textures from noise; 1 = another style")


def beginnings(lab: Lab, report: Report) -> None:
    """Show what the size to begin at, and the edge, make of a texture."""
    style = lab.styles[STYLE]
    other = next(name for name in lab.styles if name != STYLE)
    made = {}
    for loss in ("gram", "wasserstein"):
        made[f"{loss}, no margin"] = texture(lab, loss, FIRST_SIZES_PX[0], "replicate")
        for first in FIRST_SIZES_PX:
            made[f"{loss} from {min(first, lab.size_px)} px"] = texture(lab, loss, first)
    report.sheet("beginnings", sheet_rows([], made))
    made[f"nothing: {other}, another style"] = lab.styles[other]
    judged = judgements(lab, made, style, unit=lab.styles[other])
    facts = {
        name: {"layout": layout(lab, of, style), "gram": judged[name]["gram"], "sliced": judged[name]["sliced"]}
        for name, of in made.items()
    }
    dice = torch.Generator().manual_seed(0)
    rolls = [
        style.roll([int(torch.randint(edge, (1,), generator=dice)) for edge in style.shape[1:]], dims=(1, 2))
        for _ in range(ROLLS)
    ]
    by_chance = [layout(lab, of, style) for of in rolls]
    spread = {"mean": float(np.mean(by_chance)), "standard_deviation": float(np.std(by_chance))}
    report.numbers("beginnings", {**facts, "layout of the style, rolled at random": spread})
    rows = [[name, *of.values()] for name, of in facts.items()]
    chance = [f"the style, rolled {ROLLS} times: mean", spread["mean"], "–", "–"]
    spreading = ["… and standard deviation", spread["standard_deviation"], "–", "–"]
    report.table("beginnings", ["made with", "layout", "Gram", "sliced"], [*rows, chance, spreading])


def layout(lab: Lab, picture: Tensor, style: Tensor) -> float:
    """Return how far a picture's deep features are from the style's, relative to those of the style flipped.

    Position by position: 1 if the picture knows nothing of where things are in the style picture, 0 for its copy.
    """
    with torch.no_grad():
        here, there = lab.features(picture)[LAYOUT_LAYER], lab.features(style)[LAYOUT_LAYER]
        flips = [lab.features(style.flip(dims))[LAYOUT_LAYER] for dims in ((1,), (2,), (1, 2))]
        return float(F.mse_loss(here, there)) / float(np.mean([float(F.mse_loss(here, flip)) for flip in flips]))


def sheet_rows(first: list[tuple[str, Tensor]], made: Mapping[str, Tensor]) -> list[list[tuple[str, Tensor | None]]]:
    """Return captioned pictures in two rows."""
    tiles: list[tuple[str, Tensor | None]] = [*first, *made.items()]
    half = (len(tiles) + 1) // 2
    return [tiles[:half], tiles[half:]]


def judgements(lab: Lab, made: Mapping[str, Tensor], style: Tensor, *, unit: Tensor) -> dict[str, dict[str, float]]:
    """Return name → style loss → what it makes of that picture, in units of what it makes of the picture `unit`."""
    with torch.no_grad():
        plain = {loss: style for loss in STYLE_LOSS_NAMES if loss not in POSITIONED}

        def judged(picture: Tensor) -> dict[str, float]:
            # As a run does it: what is compared by position is stretched to the picture's shape.
            styles = plain | dict.fromkeys(map(str, POSITIONED), of_size(style, picture.shape[1:]))
            features = lab.features(picture)
            found: dict[str, float] = {}
            for loss, of in styles.items():
                found |= {loss: float(style_losses(lab.features(of), [loss])[loss](features))}
            return {loss: found[loss] for loss in STYLE_LOSS_NAMES}

        units = judged(unit)
        return {
            name: {loss: value / units[loss] for loss, value in judged(picture).items()}
            for name, picture in made.items()
        }


def plot_judgements(report: Report, name: str, judged: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draw what each loss says of each loss's picture."""
    plotted, (axes,) = figure(width=7.2)
    heatmap(axes, np.array([list(row.values()) for row in judged.values()]), list(judged), STYLE_LOSS_NAMES)
    axes.set(title=title, xlabel="measured by", ylabel="made with")
    report.plot(name, plotted)
