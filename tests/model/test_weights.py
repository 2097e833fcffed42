"""Feature weights: read, checked, calibrated, cached; and what is said when they cannot be had."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
import torch
from torch.nn import functional as F

from nst_model import (
    FeatureModel,
    Style,
    StylizeOptions,
    UnknownModel,
    WeightsCorrupt,
    WeightsUnavailable,
    fetch,
    load_weights,
)
from nst_model.architecture import VGG16
from nst_model.cache import cached_file
from nst_model.calibration import calibration_images, mean_activations
from nst_model.network import build_trunk
from nst_model.options import Pooling
from nst_model.weights import CAFFE_MEAN_BGR, FeatureWeights, _from_keras
from tests.conftest import random_state

WIDTHS = (4, 6, 8, 8, 8)


def test_pth_and_safetensors_give_the_same_weights(tiny_weights: FeatureWeights, tmp_path: Path) -> None:
    """Either kind of file, with or without a classifier."""
    state = random_state(VGG16, WIDTHS)
    torch.save(state | {"classifier.0.weight": torch.zeros(3, 3)}, tmp_path / "weights.pth")
    found = load_weights("vgg16", tmp_path / "weights.pth")
    for layer, (weight, bias) in tiny_weights.convolutions.items():
        assert torch.equal(found.convolutions[layer][0], weight)
        assert torch.equal(found.convolutions[layer][1], bias)


def test_mean_activation_is_one(tiny_weights: FeatureWeights) -> None:
    """Over the calibration set, in every layer, for every pooling: the canonical unit."""
    for pooling in Pooling:
        means = mean_activations(build_trunk(tiny_weights, VGG16.layers, pooling=pooling), calibration_images())
        assert list(means.values()) == pytest.approx([1.0] * len(VGG16.layers), rel=1e-4)


def test_unit_does_not_depend_on_how_the_network_is_scaled(tiny_weights: FeatureWeights, tmp_path: Path) -> None:
    """One layer's output ten times larger and the next one's input ten times smaller: the same model."""
    state = random_state(VGG16, WIDTHS)
    state["features.2.weight"] *= 10
    state["features.2.bias"] *= 10
    state["features.5.weight"] /= 10
    torch.save(state, tmp_path / "scaled.pth")
    picture = torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(1))
    options = StylizeOptions(style_layers={"relu1_2": 1, "relu2_1": 1})
    scaled = FeatureModel(load_weights("vgg16", tmp_path / "scaled.pth")).style_targets(Style(picture), options)
    plain = FeatureModel(tiny_weights).style_targets(Style(picture), options)
    for layer in options.style_layers:
        torch.testing.assert_close(scaled[layer]["gram"], plain[layer]["gram"], rtol=1e-4, atol=1e-5)


def test_calibration_set_is_always_the_same() -> None:
    """Eight pictures in [0, 1] with the mean and contrast of photographs."""
    images = calibration_images()
    assert images.shape == (8, 3, 256, 256)
    assert torch.equal(images, calibration_images())
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert float(images.mean()) == pytest.approx(0.45, abs=0.05)


def test_keras_layout_and_caffe_preprocessing_are_folded_in(tmp_path: Path) -> None:
    """HWIO kernels for BGR in [0, 255] minus Caffe's mean give the same features as computed plainly that way."""
    random = torch.Generator().manual_seed(3)
    channels, kernels = 3, {}
    with h5py.File(tmp_path / "weights.h5", "w") as file:
        for convolution in VGG16.convolutions:
            width = WIDTHS[convolution.block - 1]
            kernel = torch.randn(3, 3, channels, width, generator=random) * 0.2
            bias = torch.randn(width, generator=random)
            block, position = convolution.layer.removeprefix("relu").split("_")
            group = f"block{block}/layers/conv2d" + (f"_{int(position) - 1}" if position != "1" else "") + "/vars"
            file[f"{group}/0"], file[f"{group}/1"] = kernel.numpy(), bias.numpy()
            kernels[convolution.layer] = (kernel, bias)
            channels = width
    convolutions, mean = _from_keras(VGG16, tmp_path / "weights.h5")
    ones = dict.fromkeys(Pooling, dict.fromkeys(VGG16.layers, 1.0))
    trunk = build_trunk(FeatureWeights("x", VGG16, convolutions, mean, ones, ""), ["relu1_2"])
    image = torch.rand(1, 3, 20, 23, generator=random)

    found = trunk(image)["relu1_2"]

    x = image.double().flip(1) * 255 - torch.tensor(CAFFE_MEAN_BGR, dtype=torch.float64).view(1, 3, 1, 1)
    for layer in ("relu1_1", "relu1_2"):
        kernel, bias = kernels[layer]
        x = F.relu(F.conv2d(x, kernel.double().permute(3, 2, 0, 1), bias.double(), padding=1))
    assert float((found - x).norm() / x.norm()) < 1e-4


def test_damaged_cache_is_noticed(tiny_weights_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A flipped byte in the cached file is an error that says what to do, not a strange picture."""
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path))
    file = fetch("vgg16", tiny_weights_file)
    assert cached_file("vgg16") == file
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(WeightsCorrupt, match=r"is damaged.*Delete it and fetch vgg16 again"):
        load_weights("vgg16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no weights at all", "is no file of PyTorch or safetensors weights"),
        ({"features.0.weight": torch.zeros(4, 3, 3, 3)}, "lacks features.0.bias"),
        ({"features.0.weight": torch.zeros(4, 1, 3, 3), "features.0.bias": torch.zeros(4)}, "has shape"),
        ([1, 2], "holds a list, not a state dict"),
    ],
)
def test_unusable_files_are_refused(content: object, message: str, tmp_path: Path) -> None:
    """The message says what is wrong with the file."""
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(WeightsCorrupt, match=message):
        load_weights("vgg16", file)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """WeightsUnavailable with the path."""
    with pytest.raises(WeightsUnavailable, match=r"nowhere\.pth"):
        load_weights("vgg16", tmp_path / "nowhere.pth")


def test_unknown_model_names_those_there_are() -> None:
    """And the nearest one."""
    with pytest.raises(UnknownModel, match=r"did you mean vgg19.*vgg16-hed"):
        load_weights("vgg-19")


def test_unreachable_hub_names_the_other_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No silent fallback: the error names the file option and the other models."""
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(WeightsUnavailable, match=r"vgg19 are not on this machine.*--file.*another model: vgg16-hed"):
        load_weights("vgg19")


def test_hub_weights_in_torchs_cache_are_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that the hub has left in torch's cache is read without the network, and its hash held against its name."""
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path / "nst"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.save(random_state(VGG16, WIDTHS), checkpoints / "vgg16-397923af.pth")
    with pytest.raises(WeightsCorrupt, match=r"vgg16-397923af\.pth has SHA-256 [0-9a-f]{64}, which is not the one"):
        load_weights("vgg16")


@pytest.mark.parametrize(("value", "message"), [(0.0, "never excite relu1_1"), (float("nan"), "is not finite")])
def test_weights_that_cannot_work_are_refused(value: float, message: str, tmp_path: Path) -> None:
    """Before they are cached, not in the middle of a job."""
    state = {name: torch.full_like(tensor, value) for name, tensor in random_state(VGG16, WIDTHS).items()}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(WeightsCorrupt, match=message):
        load_weights("vgg16", tmp_path / "weights.pth")


def test_a_newly_fetched_file_replaces_the_older(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The weights in use are those that were fetched last."""
    monkeypatch.setenv("NST_CACHE_DIR", str(tmp_path / "nst"))
    for seed in (1, 2, 3):
        torch.save(random_state(VGG16, WIDTHS, seed), tmp_path / "weights.pth")
        assert cached_file("vgg16") != fetch("vgg16", tmp_path / "weights.pth") == cached_file("vgg16")
