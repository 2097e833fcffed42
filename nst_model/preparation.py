"""Making a style file of pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from nst_model.errors import InvalidOption
from nst_model.options import MOMENTS, StyleLoss, StylizeOptions, relative
from nst_model.scales import scales
from nst_model.style_card import StyleCard, StyleSource, is_line
from nst_model.style_file import StyleFile
from nst_model.stylization import FeatureModel, Style, TargetsOf, mixed


def prepare_style(
    model: FeatureModel,
    styles: Sequence[Style],
    options: StylizeOptions,
    *,
    display_name: str = "",
    targets_of: TargetsOf | None = None,
) -> StyleFile:
    """Return the style file of pictures, mixed by their weights, for runs of up to `options.size_px`.

    Args:
        model: the feature model.
        styles: pictures, of the sizes that they have beside a finished picture of `size_px`; their longer edges must be
            the same. The SHA-256 of its file is the name of each.
        options: `size_px` and `first_size_px` say at which scales the style is seen, and its layers, pooling, padding
            and precision how.
        display_name: of the style, for people.
        targets_of: in place of `model.style_targets`, to keep what it returns.

    Raises InvalidImage or InvalidOption.
    """
    edges_px = sorted({max(style.picture.shape[1:]) for style in styles})
    if len(edges_px) != 1:
        raise InvalidOption("styles", f"must have one longer edge, not {', '.join(map(str, edges_px)) or 'none'} px")
    if not is_line(display_name):
        raise InvalidOption("display_name", f"must be one line of text, not {display_name!r}")
    if not any(style.weight > 0 for style in styles):
        raise InvalidOption("styles", "must have at least one weight above 0")
    for number, style in enumerate(styles):
        if not 0 <= style.weight < math.inf:
            raise InvalidOption(f"styles[{number}].weight", f"must be finite and at least 0, not {style.weight}")
    options.check_layers(model.weights.architecture.layers)
    if options.style_loss not in MOMENTS:
        options = dataclasses.replace(options, style_loss=StyleLoss.GRAM)
    moments = {}
    for edge in scales(options.size_px, options.size_px, options.first_size_px):
        sized = [style.scaled(edge / options.size_px) for style in styles]
        targets = [(style.weight, (targets_of or model.style_targets)(style, options)) for style in sized]
        moments[max(sized[0].picture.shape[1:])] = mixed(targets)
    total = math.fsum(style.weight for style in styles)
    named = relative(options.style_layers)
    return StyleFile(
        StyleCard(
            display_name=display_name,
            model=model.weights.name,
            weights_sha256=model.weights.sha256,
            pooling=options.pooling,
            padding=options.padding,
            precision=model.precision(options),
            sizes_px=tuple(sorted(moments)),
            layers=tuple(layer for layer in model.weights.architecture.layers if layer in named),
            images=tuple(StyleSource(style.name, style.weight / total) for style in styles),
        ),
        moments,
    )
