"""Layer names and torchvision's module numbers, pinned."""

from __future__ import annotations

import pytest
import torchvision
from torch import nn

from nst_model.architecture import VGG16, VGG19, Architecture

INDICES = {
    "vgg16": {
        "relu1_1": 0,
        "relu1_2": 2,
        "relu2_1": 5,
        "relu2_2": 7,
        "relu3_1": 10,
        "relu3_2": 12,
        "relu3_3": 14,
        "relu4_1": 17,
        "relu4_2": 19,
        "relu4_3": 21,
        "relu5_1": 24,
        "relu5_2": 26,
        "relu5_3": 28,
    },
    "vgg19": {
        "relu1_1": 0,
        "relu1_2": 2,
        "relu2_1": 5,
        "relu2_2": 7,
        "relu3_1": 10,
        "relu3_2": 12,
        "relu3_3": 14,
        "relu3_4": 16,
        "relu4_1": 19,
        "relu4_2": 21,
        "relu4_3": 23,
        "relu4_4": 25,
        "relu5_1": 28,
        "relu5_2": 30,
        "relu5_3": 32,
        "relu5_4": 34,
    },
}


@pytest.mark.parametrize("architecture", [VGG16, VGG19], ids=lambda a: a.name)
def test_names_stand_for_these_convolutions(architecture: Architecture) -> None:
    """`relu4_2` is the ReLU after module 19 of VGG-16 and module 21 of VGG-19."""
    assert {c.layer: c.index for c in architecture.convolutions} == INDICES[architecture.name]


@pytest.mark.parametrize("architecture", [VGG16, VGG19], ids=lambda a: a.name)
def test_torchvisions_modules_are_what_the_names_say(architecture: Architecture) -> None:
    """Convolution, ReLU, and a pooling before each new block; and no other module."""
    modules = getattr(torchvision.models, architecture.name)(weights=None).features
    counted = 0
    for convolution in architecture.convolutions:
        assert isinstance(modules[convolution.index], nn.Conv2d)
        assert modules[convolution.index].out_channels == convolution.channels
        assert isinstance(modules[convolution.index + 1], nn.ReLU)
        counted += 2
        if convolution.pooled:
            assert isinstance(modules[convolution.index - 1], nn.MaxPool2d)
            counted += 1
    assert len(modules) == counted + 1  # the pooling at the end


@pytest.mark.parametrize(
    ("layer", "field_px"),
    [("relu1_1", 3), ("relu1_2", 5), ("relu2_1", 10), ("relu3_1", 24), ("relu4_1", 60), ("relu5_1", 132)],
)
def test_receptive_fields_of_vgg16(layer: str, field_px: int) -> None:
    """By hand: +2·stride for each convolution, +stride for each pooling."""
    assert VGG16.receptive_field_px(layer) == field_px


def test_receptive_field_of_vgg19_is_the_literatures() -> None:
    """relu5_1 of VGG-19 sees 156 px."""
    assert VGG19.receptive_field_px("relu5_1") == 156
