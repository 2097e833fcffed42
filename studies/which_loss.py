"""Which loss for which picture: contact sheets of style losses, content weights and scales."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from studies.lab import STYLE_LOSS_NAMES, Lab, style_losses
from studies.measures import edge_agreement, ssim
from studies.report import Report

PHOTO, STYLES = "cat", ("strokes", "waves", "mosaic")
CONTENT_WEIGHTS = (0.0, 0.005, 0.025, 0.1, 0.5)
STYLE_SCALES, FIRST_SIZES_PX = (0.5, 1.0, 2.0), (64, 128, 4096)


def run(lab: Lab, report: Report) -> None:
    """Make the study's pictures, numbers and tables."""
    every_style_loss(lab, report)
    content_weights(lab, report)
    scales(lab, report)


def every_style_loss(lab: Lab, report: Report) -> None:
    """Try every style loss with every style, each pulling as hard at the photo as Wasserstein does."""
    photo, sheet, facts = lab.photos[PHOTO], [], {}
    for style in STYLES:
        weights = lab.style_weights(PHOTO, style)
        made = {loss: lab.picture(PHOTO, style, style_loss=loss, style_weight=w) for loss, w in weights.items()}
        sheet.append([(style, lab.styles[style]), *made.items()])
        facts[style] = {loss: judged(lab, picture, photo, lab.styles[style]) for loss, picture in made.items()}
    report.sheet("style-losses", sheet)
    report.numbers("style_losses", facts)
    rows = [
        [loss, *(facts[style][loss][fact] for style in STYLES for fact in ("sliced", "ssim"))]
        for loss in STYLE_LOSS_NAMES
    ]
    head = ["style loss", *(text for style in STYLES for text in (f"{style}: style distance", "SSIM"))]
    report.table("style-losses", head, rows)


def content_weights(lab: Lab, report: Report) -> None:
    """Make one picture for each weight of the content."""
    made = {f"{weight:g}": lab.picture(PHOTO, STYLES[0], content_weight=weight) for weight in CONTENT_WEIGHTS}
    facts = {label: judged(lab, picture, lab.photos[PHOTO], lab.styles[STYLES[0]]) for label, picture in made.items()}
    tabulate(report, "content-weights", "content weight", facts)
    report.sheet("content-weights", [[(f"content weight {name}", picture) for name, picture in made.items()]])


def scales(lab: Lab, report: Report) -> None:
    """Make one picture for each size of the style and each size to begin at."""
    facts, sheet = {}, []
    for scale in STYLE_SCALES:
        style, row = lab.style(STYLES[1], scale), []
        for first in FIRST_SIZES_PX:
            given: dict[str, Any] = {"style_scale": scale, "first_size_px": first}
            picture = lab.picture(PHOTO, STYLES[1], **given)
            name = f"style × {scale:g}, from {min(first, lab.size_px)} px"
            facts[name] = judged(lab, picture, lab.photos[PHOTO], style)
            row.append((name, picture))
        sheet.append(row)
    report.sheet("scales", sheet)
    tabulate(report, "scales", "scales", facts)


def tabulate(report: Report, name: str, head: str, facts: Mapping[str, Mapping[str, float]]) -> None:
    """Write a table of what `judged` says of each picture."""
    report.numbers(name.replace("-", "_"), facts)
    rows = [[label, *of.values()] for label, of in facts.items()]
    report.table(name, [head, "Wasserstein", "sliced", "SSIM", "edges"], rows)


def judged(lab: Lab, picture: Tensor, photo: Tensor, style: Tensor) -> dict[str, float]:
    """Return a picture's distance from the style, 1 = the photo's, by two losses, and what is left of the photo."""
    with torch.no_grad():
        losses = style_losses(lab.features(style), ["wasserstein", "sliced"])
        here, before = lab.features(picture), lab.features(photo)
        found = {name: float(loss(here)) / float(loss(before)) for name, loss in losses.items()}
    return {**found, "ssim": ssim(picture, photo), "edges": edge_agreement(picture, photo)}
