"""What a worker keeps of one job for the next one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import safetensors.torch

from nst_model import StylizeOptions
from nst_model.architecture import VGG19
from nst_server.messages import WorkerConfig
from nst_server.worker import Worker, _Sender
from tests.conftest import TINY_WIDTHS, random_state


def test_recordings_are_of_one_feature_model_at_a_time(tmp_path: Path, tiny_weights_file: Path) -> None:
    """They hold the device's memory: a job with another model gives back what was left."""
    other = tmp_path / "tiny-vgg19.safetensors"
    safetensors.torch.save_file(random_state(VGG19, TINY_WIDTHS), other)
    _, back = multiprocessing.Pipe()
    sender = _Sender(back)
    weights = {"vgg16": tiny_weights_file, "vgg19": other}
    worker = Worker(WorkerConfig("cpu", 1, "vgg16", weights, tmp_path / "grams", 0), sender)
    kept = [worker.model(name).loops(StylizeOptions(), 40, 48) for name in ("vgg16", "vgg16", "vgg19", "vgg16")]
    assert kept[0] is kept[1]
    assert kept[1] is not kept[2]
    assert kept[3] is not kept[1]
    sender.close()
