"""Content by inner product? Each content loss on a photo made brighter, flatter or bent, and its pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nst_model.stylization import of_size
from studies.lab import CONTENT_LOSS_NAMES, Features, Lab, Loss, content_losses, scaled, style_losses
from studies.measures import edge_agreement, intensity, ssim
from studies.report import Report, curves, figure

PHOTOS, STYLE = ("cat", "astronaut"), "strokes"
FACTORS = (0.4, 0.55, 0.7, 0.85, 1.0, 1.15, 1.3, 1.45, 1.6)
SHIFTS_PX = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
LAYER, RAW = "relu4_2", "raw inner product"
RUNAWAY_STEPS, RUNAWAY_EDGE_PX = 60, 128
INVERSION_WEIGHT = 5.0


def run(lab: Lab, report: Report) -> None:
    """Make the study's pictures, plots, numbers and tables."""
    responses(lab, report)
    runaway(lab, report)
    stylized(lab, report)
    inversions(lab, report)


def brighter(photo: Tensor, factor: float) -> Tensor:
    """Return a photo whose light is multiplied by a factor. Not clipped: clipping would change the structure too."""
    return photo * factor


def contrasted(photo: Tensor, factor: float) -> Tensor:
    """Return a photo whose distance from its mean is multiplied by a factor. Not clipped."""
    mean = photo.mean(dim=(1, 2), keepdim=True)
    return mean + (photo - mean) * factor


def bent(photo: Tensor, pixels: float, seed: int = 0) -> Tensor:
    """Return a photo whose parts are moved about smoothly, by at most so many pixels."""
    height, width = photo.shape[1:]
    noise = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(seed))
    field = F.interpolate(noise, size=(height, width), mode="bicubic", align_corners=True)[0]
    field = field / field.square().sum(dim=0).sqrt().max() * pixels
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    grid = torch.stack((x + field[0] * 2 / (width - 1), y + field[1] * 2 / (height - 1)), dim=2)
    moved: Tensor = F.grid_sample(photo[None], grid[None], padding_mode="border", align_corners=True)[0]
    return moved


def raw_inner_product(content: Features) -> Loss:
    """Return minus the inner product of feature maps with the content's, in units of the content's with itself: −1."""
    wanted = content[LAYER]
    return lambda here: -(here[LAYER] * wanted).sum() / wanted.square().sum()


def responses(lab: Lab, report: Report) -> None:
    """Measure each loss on a changed photo: 1 is what it makes of another photo."""
    with torch.no_grad():
        features = {name: lab.features(photo) for name, photo in lab.photos.items()}
        losses = {name: {**content_losses(of), RAW: raw_inner_product(of)} for name, of in features.items()}
        units = {**between_photos(lab, losses), RAW: 1.0}

        def response(change: Callable[[Tensor], Tensor]) -> dict[str, float]:
            moved = {name: lab.features(change(photo)) for name, photo in lab.photos.items()}
            return {
                loss: average([float(losses[name][loss](moved[name])) for name in losses]) / unit
                for loss, unit in units.items()
            }

        by_brightness = {factor: response(partial(brighter, factor=factor)) for factor in FACTORS}
        by_contrast = {factor: response(partial(contrasted, factor=factor)) for factor in FACTORS}
        by_shift = {pixels: response(partial(bent, pixels=pixels)) for pixels in SHIFTS_PX}
    report.numbers("brightness", by_brightness)
    report.numbers("contrast", by_contrast)
    report.numbers("local_shift_px", by_shift)
    plot_responses(report, by_brightness, by_contrast, by_shift)
    cases = {
        "40 % of the light": by_brightness[0.4],
        "70 % of the light": by_brightness[0.7],
        "130 % of the light": by_brightness[1.3],
        "160 % of the light": by_brightness[1.6],
        "40 % of the contrast": by_contrast[0.4],
        "70 % of the contrast": by_contrast[0.7],
        "130 % of the contrast": by_contrast[1.3],
        "160 % of the contrast": by_contrast[1.6],
        "bent by 2 px": by_shift[2.0],
        "bent by 8 px": by_shift[8.0],
    }
    names = [*CONTENT_LOSS_NAMES, RAW]
    report.table(
        "responses", ["the photo with …", *names], [[case, *(of[n] for n in names)] for case, of in cases.items()]
    )
    photo = lab.photos[PHOTOS[0]]
    tiles = [
        ("photo", photo),
        ("40 % of the light", brighter(photo, 0.4)),
        ("160 % of the light", brighter(photo, 1.6)),
        ("40 % of the contrast", contrasted(photo, 0.4)),
        ("160 % of the contrast", contrasted(photo, 1.6)),
        ("bent by 8 px", bent(photo, 8.0)),
    ]
    report.sheet("changes", [tiles])


def between_photos(lab: Lab, losses: Mapping[str, Mapping[str, Loss]]) -> dict[str, float]:
    """Return content loss → its mean between photos, each against the others stretched to its shape."""
    found: dict[str, list[float]] = {name: [] for name in CONTENT_LOSS_NAMES}
    for name, of in losses.items():
        for other, photo in lab.photos.items():
            if other != name:
                here = lab.features(of_size(photo, lab.photos[name].shape[1:]))
                for loss, values in found.items():
                    values.append(float(of[loss](here)))
    return {loss: average(values) for loss, values in found.items()}


def average(values: Sequence[float]) -> float:
    """Return the mean of some numbers."""
    return math.fsum(values) / len(values)


def plot_responses(report: Report, *by: Mapping[float, Mapping[str, float]]) -> None:
    """Draw the bounded losses in three panels, one for each change, and the raw inner product in a fourth."""
    plotted, panels = figure(columns=4, width=4.0, height=3.8)
    titles = ("Brightness", "Contrast", "Local shifts")
    labels = ("light × factor", "contrast × factor", "largest shift, pixels")
    for axes, title, label, found in zip(panels, titles, labels, by, strict=False):
        lines = {loss: [at[loss] for at in found.values()] for loss in CONTENT_LOSS_NAMES}
        curves(axes, list(found), lines, title=title, x_label=label, y_label="loss; 1 = another photo")
    panels[0].legend(fontsize=8)
    raw = {title.lower(): [at[RAW] for at in found.values()] for title, found in zip(titles[:2], by, strict=False)}
    curves(
        panels[3], list(by[0]), raw, title="Raw inner product", x_label="factor", y_label="loss; −1 = the photo itself"
    )
    panels[3].axhline(-1, color="black", linewidth=0.8, linestyle="--")
    panels[3].legend(fontsize=8)
    report.plot("responses", plotted)


def runaway(lab: Lab, report: Report) -> None:
    """Descend on the raw inner product and on the bounded ones, from a photo at 40 % contrast."""
    photo = lab.photos[PHOTOS[0]]
    small = scaled(photo, min(RUNAWAY_EDGE_PX, max(photo.shape[1:])))
    with torch.no_grad():
        there = lab.features(small)
    losses = {RAW: raw_inner_product(there), **content_losses(there)}
    found = {name: descended(lab, small, losses[name]) for name in (RAW, "inner_product", "squared_error")}
    report.numbers(
        "descent", {name: {"loss": values, "largest_pixel": largest} for name, (values, largest, _) in found.items()}
    )
    plotted, panels = figure(columns=2, width=4.6, height=3.6)
    steps = list(range(RUNAWAY_STEPS))
    values = {name: trace for name, (trace, _, _) in found.items()}
    curves(
        panels[0], steps, values, title="The loss while it is minimized alone", x_label="step of Adam", y_label="loss"
    )
    largest = {name: trace for name, (_, trace, _) in found.items()}
    curves(
        panels[1],
        steps,
        largest,
        title="The picture's largest value",
        x_label="step of Adam",
        y_label="|value − ½|, 0.5 = in range",
    )
    panels[1].axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    panels[0].legend(fontsize=8)
    report.plot("descent", plotted)
    report.sheet(
        "descent", [[("start", contrasted(small, 0.4)), *((name, picture) for name, (_, _, picture) in found.items())]]
    )


def descended(lab: Lab, photo: Tensor, loss: Loss) -> tuple[list[float], list[float], Tensor]:
    """Return a loss and the picture's largest distance from mid-gray, step by step, and the last picture."""
    image = contrasted(photo, 0.4).requires_grad_(True)
    adam = torch.optim.Adam([image], lr=0.02)
    values, largest = [], []
    for _ in range(RUNAWAY_STEPS):
        adam.zero_grad()
        value = loss(lab.features(image))
        value.backward()  # type: ignore[no-untyped-call]
        values.append(float(value.detach()))
        largest.append(float((image.detach() - 0.5).abs().max()))
        adam.step()
    return values, largest, image.detach()


def stylized(lab: Lab, report: Report) -> None:
    """Show what each loss makes of the same photos, and measure what is left of them."""
    rows, sheet, numbers = [], [], {}
    for name in PHOTOS:
        photo = lab.photos[name]
        weights = matched(lab, name)
        made = {loss: lab.picture(name, STYLE, content_loss=loss, content_weight=w) for loss, w in weights.items()}
        sheet.append([("photo", photo), *made.items()])
        facts = {loss: kept(lab, picture, name) for loss, picture in made.items()}
        numbers[name] = {loss: {"content_weight": weights[loss], **facts[loss]} for loss in made}
        rows += [[name, loss, weights[loss], *facts[loss].values()] for loss in made]
    report.numbers("stylized", numbers)
    report.sheet("stylized", sheet)
    report.table(
        "stylized",
        ["photo", "content loss", "content weight", "SSIM", "edges", "intensity", "style distance"],
        rows,
    )


def matched(lab: Lab, photo: str) -> dict[str, float]:
    """Return content loss → the weight with which it pulls as hard as the default one, at the default picture."""
    default = lab.options()
    reference = lab.picture(photo, STYLE, content_loss="squared_error", content_weight=default.content_weight)
    return {loss: default.content_weight * ratio for loss, ratio in lab.content_weights(photo, reference).items()}


def kept(lab: Lab, picture: Tensor, photo: str) -> dict[str, float]:
    """Return what is left of a photo in a picture, and how far the picture is from the style: 1 = the photo."""
    original = lab.photos[photo]
    with torch.no_grad():
        loss = style_losses(lab.features(lab.styles[STYLE]), ["sliced"])["sliced"]
        distance = float(loss(lab.features(picture))) / float(loss(lab.features(original)))
    return {
        "ssim": ssim(picture, original),
        "edges": edge_agreement(picture, original),
        "intensity": intensity(picture, original),
        "style_distance": distance,
    }


def inversions(lab: Lab, report: Report) -> None:
    """Show what each content loss alone makes of noise: what it remembers of a photo."""
    rows, sheet, numbers = [], [], {}
    for name in PHOTOS:
        photo, weights = lab.photos[name], matched(lab, name)
        scale = INVERSION_WEIGHT / weights["squared_error"]
        made = {
            loss: lab.picture(  # nothing but the content loss: what smooths would be taken for memory
                name,
                STYLE,
                content_loss=loss,
                content_weight=weight * scale,
                style_weight=0,
                tv_weight=0,
                style_layers={"relu1_1": 1.0},
                init="noise",
                first_size_px=64,
            )
            for loss, weight in weights.items()
        }
        sheet.append([("photo", photo), *made.items()])
        numbers[name] = {
            loss: {
                "ssim": ssim(picture, photo),
                "edges": edge_agreement(picture, photo),
                "intensity": intensity(picture, photo),
                "contrast": float(picture.std() / photo.std()),
            }
            for loss, picture in made.items()
        }
        rows += [[name, loss, *facts.values()] for loss, facts in numbers[name].items()]
    report.numbers("inversions", numbers)
    report.sheet("inversions", sheet)
    report.table("inversions", ["photo", "content loss", "SSIM", "edges", "intensity", "contrast"], rows)
