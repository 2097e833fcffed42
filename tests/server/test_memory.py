"""Jobs that would not fit are refused before they wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from nst.v1 import job_pb2, style_transfer_service_pb2
from nst_model import StylizeOptions
from nst_model.architecture import VGG16, VGG19
from nst_model.memory import (
    FIXED_BYTES,
    Memory,
    fitting_memory,
    full_memory,
    largest_size_px,
    least_memory,
    peak_bytes,
)

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

MEMORY_GIB = 0.3


async def test_a_job_that_cannot_fit_is_refused_naming_what_fits(serve: Callable[..., Any], ask: Ask) -> None:
    """INVALID_ARGUMENT on size_px, at once; with the size that it names the job is accepted and ends well."""
    _, client = await serve(memory_gib=MEMORY_GIB)
    refusal = await client.refusal(ask(size_px=2048))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "options.size_px")
    assert "2048 px would take about" in refusal.message
    assert "0.3 GiB here" in refusal.message
    fitting = int(refusal.message.rpartition("at most ")[2].split()[0])
    assert 64 < fitting < 512
    assert (await client.refusal(ask(size_px=fitting + 16))).field == "options.size_px"
    told = await client.told(ask(size_px=fitting, iterations=1))
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_where_no_size_fits_that_is_said(serve: Callable[..., Any], ask: Ask) -> None:
    """Not a size that there is not."""
    _, client = await serve(memory_gib=0.001)
    refusal = await client.refusal(ask(size_px=64))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "options.size_px")
    assert refusal.message.endswith("of which a job may take 0.001 GiB here: with these options no size fits")


async def test_workers_say_what_memory_there_is(shared: Any) -> None:
    """So that nothing needs to be set."""
    (executor,) = shared.executors
    assert executor.memory_bytes > 2**30
    assert shared._application.scheduler.memory_bytes() == executor.memory_bytes


def test_what_grows_is_reckoned_with() -> None:
    """Size, layers, history, losses of positions, precision and the margin; nothing else."""
    plain = StylizeOptions(precision="fp32")
    reference = peak_bytes(plain, 384, 512, VGG16)
    assert peak_bytes(plain, 768, 1024, VGG16) - FIXED_BYTES == pytest.approx(4 * (reference - FIXED_BYTES), rel=0.1)
    for changes, more in (
        ({"history": 100}, True),
        ({"style_loss": "sliced"}, True),
        ({"style_loss": "direct"}, True),
        ({"precision": "bf16"}, False),
        ({"padding": "zeros"}, False),
        ({"optimizer": "adam"}, False),
        ({"style_layers": {"relu1_1": 1}, "content_layers": {"relu2_1": 1}}, False),
    ):
        other = peak_bytes(StylizeOptions(**{"precision": "fp32", **changes}), 384, 512, VGG16)  # type: ignore[arg-type]
        assert (other > reference) is more, changes
    assert peak_bytes(plain, 384, 512, VGG19) > reference


def test_the_largest_size_is_the_largest() -> None:
    """It fits, and one pixel more does not; where nothing fits it is 0."""
    options, limit = StylizeOptions(), 2 * 2**30
    least = least_memory(options)
    found = largest_size_px(options, 3000, 4000, VGG16, limit)
    assert peak_bytes(options, round(found * 3 / 4), found, VGG16, least) <= limit
    assert peak_bytes(options, round((found + 2) * 3 / 4), found + 2, VGG16, least) > limit
    assert largest_size_px(options, 3000, 4000, VGG16, FIXED_BYTES / 2) == 0
    assert largest_size_px(options, 30, 40, VGG16, limit) == 40


def test_the_memory_of_lbfgs_is_what_fits() -> None:
    """All pairs in fp32, then all in bf16, then as many as fit, and never fewer than ten unless asked for."""
    options = StylizeOptions(history=100)
    size = (768, 1024, VGG16)

    def limit(memory: Memory) -> int:
        return peak_bytes(options, *size, memory)

    assert fitting_memory(options, *size, limit(Memory(100, 4))) == full_memory(options) == (100, 4)
    assert fitting_memory(options, *size, limit(Memory(100, 4)) - 1) == (100, 2)
    assert fitting_memory(options, *size, limit(Memory(60, 2))) == (60, 2)
    assert fitting_memory(options, *size, limit(Memory(60, 2)) - 100) == (59, 2)
    assert fitting_memory(options, *size, 1) == least_memory(options) == (10, 2)
    assert fitting_memory(StylizeOptions(history=4), *size, 1) == (4, 2)


async def test_a_job_that_fits_with_less_memory_of_lbfgs_ends_well(serve: Callable[..., Any], ask: Ask) -> None:
    """It is not refused for what it can do without."""
    _, client = await serve(memory_gib=MEMORY_GIB)
    told = await client.told(ask(size_px=128, history=1000, iterations=12, first_size_px=512))
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
