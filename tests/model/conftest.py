"""Feature models for the tests of the core, and the textbook to hold them against."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from nst_model import FeatureModel
from nst_model.architecture import VGG16
from nst_model.weights import FeatureWeights, load_weights
from tests.conftest import random_state
from tests.model.textbook import Textbook


@pytest.fixture(scope="session")
def tiny_weights(tiny_weights_file: Path) -> FeatureWeights:
    """The tiny VGG-16, calibrated."""
    return load_weights("vgg16", tiny_weights_file)


@pytest.fixture(scope="session")
def plain_weights(tmp_path_factory: pytest.TempPathFactory) -> FeatureWeights:
    """A VGG-16 whose channels fill the processor's registers.

    Else its convolutions take the last channels by another way, which rounds otherwise: what is flat would not come out
    flat, and the greatest of four would be any of them.
    """
    file = tmp_path_factory.mktemp("weights") / "plain-vgg16.safetensors"
    safetensors.torch.save_file(random_state(VGG16, (16, 16, 16, 16, 16)), file)
    return load_weights("vgg16", file)


@pytest.fixture(scope="session")
def tiny_textbook(tiny_weights_file: Path, tiny_weights: FeatureWeights) -> Textbook:
    """The same network, computed plainly in float64."""
    return Textbook(
        safetensors.torch.load_file(tiny_weights_file), tiny_weights.architecture, tiny_weights.mean_activation
    )


@pytest.fixture
def tiny_model(tiny_weights: FeatureWeights) -> FeatureModel:
    """The tiny VGG-16 on the CPU."""
    return FeatureModel(tiny_weights, "cpu")


@pytest.fixture(scope="session")
def picture() -> Callable[[int, int, int], torch.Tensor]:
    """Make a random picture (3, height, width) in [0, 1] from height, width and seed."""

    def make(height: int, width: int, seed: int) -> torch.Tensor:
        return torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))

    return make
