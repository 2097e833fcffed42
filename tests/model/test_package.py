"""The package's borders."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import nst_model
from nst_model import DeviceUnavailable, Precision, resolve_device, resolve_precision

PUBLIC = [
    "CARDS",
    "Color",
    "ContentLoss",
    "Curvature",
    "DEFAULT_MODEL",
    "DeviceUnavailable",
    "ExportFormat",
    "ExportGraph",
    "ExportPrecision",
    "ExportSpec",
    "FeatureModel",
    "FeatureWeights",
    "Init",
    "InvalidArtifact",
    "InvalidImage",
    "InvalidOption",
    "Iterate",
    "KeptStyle",
    "Losses",
    "ModelCard",
    "NstModelError",
    "Objective",
    "Optimizer",
    "Padding",
    "Pooling",
    "Precision",
    "Preset",
    "StopReason",
    "Style",
    "StyleCard",
    "StyleFile",
    "StyleLoss",
    "StyleSource",
    "StylizeOptions",
    "TvNorm",
    "UnknownModel",
    "WeightsCorrupt",
    "WeightsUnavailable",
    "available_devices",
    "export",
    "fetch",
    "from_pixels",
    "gram",
    "load_graph",
    "load_weights",
    "model_card",
    "prepare_style",
    "read_description",
    "resolve_device",
    "resolve_precision",
    "script",
    "stylize",
    "to_pixels",
    "write_artifact",
]


def test_public_names_are_these() -> None:
    """Adding or removing one is a decision; every one of them is there."""
    assert sorted(nst_model.__all__) == PUBLIC
    assert all(hasattr(nst_model, name) for name in PUBLIC)


def test_options_and_models_cost_no_import_of_torch() -> None:
    """The server's front reads them and stays small."""
    program = (
        "import sys, nst_model, nst_model.cache, nst_model.style_card, nst_model.scales\n"
        "nst_model.StylizeOptions(); nst_model.model_card('vgg19')\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(("name", "message"), [("cuda:99", "cuda:99 is not here"), ("tpu!", "is no device; use auto")])
def test_devices_that_are_not_here_are_named(name: str, message: str) -> None:
    """DeviceUnavailable says what is missing."""
    with pytest.raises(DeviceUnavailable, match=message):
        resolve_device(name)


def test_given_precision_is_kept_and_auto_resolves() -> None:
    """AUTO is never left over."""
    cpu = torch.device("cpu")
    assert resolve_precision(Precision.BF16, cpu) is Precision.BF16
    assert resolve_precision(Precision.AUTO, cpu) in (Precision.FP32, Precision.BF16)


def test_command_line_lists_and_calibrates(tiny_weights_file: str) -> None:
    """`nst-model fetch --file`, `list` and `calibrate` work from the shell; the last reproduces the cached values."""
    command = [sys.executable, "-m", "nst_model"]
    fetched = subprocess.run(
        [*command, "fetch", "vgg16", "--file", tiny_weights_file], capture_output=True, text=True, check=True
    )
    assert fetched.stdout.strip().endswith(".safetensors")
    listed = subprocess.run([*command, "list"], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in listed.splitlines()] == ["vgg16-hed", "vgg19", "vgg16"]
    calibrated = subprocess.run([*command, "calibrate", "vgg16"], capture_output=True, text=True, check=True).stdout
    assert "largest relative difference: " in calibrated
    assert float(calibrated.split()[-1]) < 1e-4


def test_command_line_errors_are_one_line() -> None:
    """No traceback for what a person can mend."""
    done = subprocess.run(
        [sys.executable, "-m", "nst_model", "fetch", "vgg"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("nst-model: no feature model is called 'vgg'")
    assert len(done.stderr.splitlines()) == 1
