"""What can only be seen on a GPU; everything else is tested on the CPU, by the same code."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from nst_model import FeatureModel, Style, StyleLoss, StylizeOptions, to_pixels
from nst_model.devices import lasting_memory_bytes, memory_bytes
from nst_model.graphs import RECORDERS, WARM_UP, Recorded
from nst_model.lbfgs import combined, products
from nst_model.memory import peak_bytes
from nst_model.stylization import Stylization
from nst_model.weights import FeatureWeights

Picture = Callable[[int, int, int], torch.Tensor]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def run(model: FeatureModel, picture: Picture, **options: Any) -> Stylization:
    """Return a small run at one scale, always of the same pictures."""
    styles = [Style(picture(40, 48, 2))]
    return Stylization(
        model, picture(40, 48, 1), styles, StylizeOptions.of(**{"first_size_px": 512, "iterations": 14, **options})
    )


@pytest.mark.parametrize("kept", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [
        {"color": "luminance"},
        {"preset": "gatys"},
        {"optimizer": "adam", "averaging": 0.5},
        *({"style_loss": loss, "laplacian_weight": 1.0} for loss in StyleLoss),
    ],
    ids=str,
)
def test_no_iterate_waits_for_the_device(
    tiny_weights: FeatureWeights, picture: Picture, caplog: pytest.LogCaptureFixture, options: dict[str, Any], kept: str
) -> None:
    """As users run it: what the device is good at, recorded; the one wait is for numbers that are on their way."""
    given = StylizeOptions.of(**{"first_size_px": 512, "iterations": 14, **options})
    limit = peak_bytes(given, 40, 48, tiny_weights.architecture) - 1 if kept == "bf16" else 0
    model = FeatureModel(tiny_weights, "cuda", limit)
    assert model.memory(given, 40, 48).number_bytes == (2 if kept == "bf16" else 4)
    iterates = iter(Stylization(model, picture(40, 48, 1), [Style(picture(40, 48, 2))], given))
    list(itertools.islice(iterates, WARM_UP + 3))  # PyTorch waits before it records
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(iterates)) == 15 - WARM_UP - 3
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not caplog.records


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [100, 4096, 20_000])
def test_the_products_over_the_memory_are_those_of_float64(stored: torch.dtype, count: int) -> None:
    """By whatever kernels, of fewer columns than a block has, of whole blocks, and of blocks and a rest."""
    random = torch.Generator().manual_seed(count)
    rows = torch.randn(7, count, generator=random).to(stored)
    vector, coefficients = torch.randn(count, generator=random), torch.randn(7, generator=random, dtype=torch.float64)
    found = products(rows.cuda(), vector.cuda()), combined(coefficients.cuda(), rows.cuda())
    exact = rows.double() @ vector.double(), coefficients @ rows.double()
    for on_device, expected in zip(found, exact, strict=True):
        assert on_device.dtype == torch.float32
        error = torch.linalg.vector_norm(on_device.cpu().double() - expected) / torch.linalg.vector_norm(expected)
        assert float(error) < 1e-5


def test_work_that_waits_is_done_as_it_is(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused, on whatever stream; everything after it is where it would have been."""
    monkeypatch.setattr("nst_model.graphs.RECORDERS", dict(RECORDERS))
    counter, before = torch.zeros(1, device="cuda"), torch.cuda.current_stream()

    def work() -> torch.Tensor:
        counter.add_(1)
        return counter * counter.item()

    recorded = Recorded(work, counter.device)
    found = [recorded() for _ in range(WARM_UP + 3)]
    assert torch.cuda.current_stream() == before
    assert [float(vector) for vector in found] == [float(n * n) for n in range(1, WARM_UP + 4)]
    assert len(caplog.records) == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("preset", ["fine", "gatys"])
def test_every_device_computes_the_same(
    tiny_weights: FeatureWeights, picture: Picture, caplog: pytest.LogCaptureFixture, preset: str
) -> None:
    """Recorded on a device that is not the current one, the run is that of the current one."""
    options = {"preset": preset, "precision": "fp32"}
    first, second = (
        [iterate.loss for iterate in run(FeatureModel(tiny_weights, device), picture, **options)]
        for device in ("cuda:0", "cuda:1")
    )
    assert second == pytest.approx(first, rel=0.01)
    assert second[-1] < second[WARM_UP]
    assert torch.cuda.current_device() == 0
    assert not caplog.records


def test_a_frame_takes_no_memory_anew(picture: Picture) -> None:
    """However many have been made: what one has taken serves the next."""
    shown = picture(300, 400, 1).cuda()
    first = to_pixels(shown)
    reserved = torch.cuda.memory_reserved()
    for _ in range(40):
        assert np.array_equal(to_pixels(shown), first)
    assert torch.cuda.memory_reserved() == reserved


def test_memory_that_is_not_in_use_may_be_taken() -> None:
    """Whether it is the system's or PyTorch's; what there is at any time does not change."""
    device = torch.device("cuda", 0)
    torch.cuda.empty_cache()
    before, lasting = memory_bytes(device), lasting_memory_bytes(device)
    taken = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert memory_bytes(device) <= before - 2**27
    del taken
    assert memory_bytes(device) > before - 2**27
    assert lasting_memory_bytes(device) == lasting
