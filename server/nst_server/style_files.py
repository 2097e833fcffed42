"""Style files as they come from outside: read as data, checked through and through, never executed. Free of torch."""

from __future__ import annotations

import hashlib

import numpy as np
import safetensors
import safetensors.numpy

from nst_model import CARDS, InvalidArtifact, StyleCard, read_description
from nst_server.errors import InvalidField
from nst_server.styles import StoredImage, StyleFile


def read_card(data: bytes, field: str) -> StyleCard:
    """Return what a style file has. Raises InvalidField, naming `field`, if it is none, or not as it was written."""
    if not data:
        raise InvalidField(field, "is empty; it must be the bytes of a style file")
    try:
        return StyleCard.of(read_description(data))
    except InvalidArtifact as error:
        raise InvalidField(field, f"is no style file that can be used: {error}") from error


def read_file(data: bytes, field: str) -> tuple[StyleFile, str]:
    """Return what is to be known of a new style file, and the name for people in it. Raises InvalidField."""
    card = read_card(data, field)
    if card.model not in CARDS:
        raise InvalidField(
            field,
            f"is a style file of the feature model {card.model!r}, which this server does not know; "
            f"it knows {', '.join(CARDS)}",
        )
    _check_moments(data, card, field)
    images = tuple(StoredImage(image.sha256, image.share, 0, 0) for image in card.images)
    file = StyleFile(
        sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        model=card.model,
        model_sha256=card.weights_sha256,
        pooling=card.pooling,
        padding=card.padding,
        sizes_px=card.sizes_px,
        layers=card.layers,
        images=images,
    )
    return file, card.display_name


def _check_moments(data: bytes, card: StyleCard, field: str) -> None:
    """Raise InvalidField unless each layer has moments at each size, finite and of as many channels as it can have.

    A model may have fewer than published, but not other ones at another size.
    """
    try:
        tensors = safetensors.numpy.load(data)
    except safetensors.SafetensorError as error:
        raise InvalidField(field, f"is no style file that can be used: {error}") from error
    most = {convolution.layer: convolution.channels for convolution in CARDS[card.model].architecture.convolutions}
    for size_px in card.sizes_px:
        for layer in card.layers:
            mean, gram = (tensors.get(f"{size_px}.{layer}.{name}") for name in ("mean", "gram"))
            where = f"the moments of {layer} at {size_px} px"
            if mean is None or gram is None or mean.ndim != 1 or gram.shape != 2 * mean.shape:
                raise InvalidField(field, f"is no style file that can be used: it lacks {where}")
            first = tensors[f"{card.sizes_px[0]}.{layer}.mean"]
            if not 1 <= len(mean) <= most[layer] or len(mean) != len(first):
                raise InvalidField(
                    field,
                    f"is no style file that can be used: {where} have {len(mean)} channels; the layer has at most"
                    f" {most[layer]}, and at each size as many",
                )
            if not (np.isfinite(mean).all() and np.isfinite(gram).all()):
                raise InvalidField(field, f"is no style file that can be used: {where} are not finite")
