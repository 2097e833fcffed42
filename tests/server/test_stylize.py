"""The Stylize stream: order, numbering, previews, parts, ends."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import pyvips
from PIL import Image, ImageDraw

from nst.v1 import image_pb2, job_pb2, options_pb2, style_service_pb2, style_transfer_service_pb2
from nst_model import StylizeOptions
from nst_server import Server, convert, services
from tests.server.conftest import (
    FOREVER,
    STRICT_TIMEOUT_S,
    Caller,
    Refusal,
    Told,
    noise,
    opened,
    read_until,
    saved,
    until,
)

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

MESSAGE_BYTES = 3 * 1024 * 1024


async def test_stream_tells_the_whole_story_in_order(caller: Caller, ask: Ask) -> None:
    """Snapshot, running, one progress for each iteration, result, succeeded."""
    told = await caller.told(ask(iterations=4))

    assert told.kinds[0] == "snapshot"
    assert told.kinds[-2:] == ["result", "state_change"]
    assert told.states == [job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED]
    assert [progress.iteration for progress in told.progress] == [0, 1, 2, 3, 4]
    assert {progress.iterations for progress in told.progress} == {4}


async def test_numbers_have_no_gaps(caller: Caller, ask: Ask) -> None:
    """State changes, progress and the result are numbered from 1 by one; the rest carry the last number before."""
    told = await caller.told(ask(iterations=6))

    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    last = 0
    for event in told.events:
        if event.WhichOneof("event") in ("snapshot", "frame"):
            assert event.sequence == last
        last = event.sequence
    assert {event.attempt for event in told.of("progress")} == {1}
    times = [event.event_time.ToNanoseconds() for event in told.events]
    assert times[0] > 0
    assert [progress.elapsed_s for progress in told.progress] == sorted(
        progress.elapsed_s for progress in told.progress
    )


async def test_snapshot_has_every_option_filled_in(caller: Caller, ask: Ask) -> None:
    """The first event is the job with all options, defaults too, and the result's size."""
    told = await caller.told(ask(iterations=1, style_layers={"relu1_1": 2.0}))

    job = told.events[0].snapshot
    assert job.name.startswith("jobs/")
    assert job.state == job_pb2.JOB_STATE_QUEUED
    assert job.model == "models/vgg16"
    assert (job.width, job.height) == (48, 32)
    assert job.HasField("create_time")
    assert not job.HasField("start_time")
    for field in options_pb2.StylizeOptions.DESCRIPTOR.fields:
        if field.enum_type is not None:
            assert getattr(job.options, field.name), field.name
        elif not field.is_repeated:
            assert job.options.HasField(field.name), field.name
    assert dict(job.options.content_layers) == {"relu4_2": 1.0}
    assert dict(job.options.style_layers) == {"relu1_1": 2.0}


async def test_last_event_tells_all_about_the_job(caller: Caller, ask: Ask) -> None:
    """The terminal state change carries times in order, device, precision and the newest progress."""
    job = (await caller.told(ask(iterations=3))).job

    assert job.create_time.ToNanoseconds() <= job.start_time.ToNanoseconds() <= job.end_time.ToNanoseconds()
    assert job.device == "cpu"
    assert job.precision == options_pb2.PRECISION_FP32
    assert job.progress.iteration == 3
    assert not job.HasField("error")


async def test_auto_precision_is_resolved_in_the_running_job(caller: Caller, ask: Ask) -> None:
    """While queued the options say auto; once running, `precision` is what is really used."""
    told = await caller.told(ask(iterations=1, precision="PRECISION_AUTO"))

    assert told.events[0].snapshot.options.precision == options_pb2.PRECISION_AUTO
    assert told.job.precision in (options_pb2.PRECISION_FP32, options_pb2.PRECISION_BF16)


async def test_loss_is_the_weighted_sum_that_the_contract_says(caller: Caller, ask: Ask) -> None:
    """Loss = content_weight · content_loss + style_weight · Σ layer weight · style loss / Σ layer weight."""
    layers = {"relu1_1": 3.0, "relu2_1": 1.0}
    told = await caller.told(ask(iterations=3, content_weight=2.0, style_weight=5.0, style_layers=layers))

    for progress in told.progress:
        style = (3 * progress.style_losses["relu1_1"] + progress.style_losses["relu2_1"]) / 4
        assert progress.loss == pytest.approx(2 * progress.content_loss + 5 * style, rel=1e-5)
        assert set(progress.style_losses) == set(layers)


async def test_a_seed_repeats_bit_for_bit(caller: Caller, ask: Ask) -> None:
    """Two jobs with one seed give one picture, a third with another seed gives another."""
    noisy = {"init": "INIT_NOISE", "iterations": 3}
    first, second, other = [await caller.told(ask(seed=seed, **noisy)) for seed in (7, 7, 8)]

    assert np.array_equal(first.pixels, second.pixels)
    assert not np.array_equal(first.pixels, other.pixels)


async def test_model_may_be_named_bare_or_in_full(caller: Caller, ask: Ask) -> None:
    """`vgg16` and `models/vgg16` are the same."""
    told = [await caller.told(ask(model=model)) for model in ("", "vgg16", "models/vgg16")]

    assert {one.job.model for one in told} == {"models/vgg16"}
    assert len({one.result for one in told}) == 1


async def test_coarse_scales_are_streamed_like_the_last(caller: Caller, ask: Ask) -> None:
    """The default preset: iterations count on through all scales, frames have one size, the last scale's best wins."""
    told = await caller.told(ask(preset="PRESET_FINE", size_px=96, first_size_px=32, iterations=3))

    total = told.progress[0].iterations
    assert total > 3, "there were no scales"
    assert [progress.iteration for progress in told.progress] == list(range(len(told.progress)))
    assert told.progress[-1].iteration == total
    assert {(part.width, part.height) for _, _, part, _ in told.frames} == {(96, 64)}
    assert_skips(told, 1)
    assert told.pixels.shape == (64, 96, 3)
    assert told.of("result")[0].result.iteration >= total - 3, "the best of the last scale, not of a coarser one"


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
async def test_previews_come_in_the_format_and_size_asked_for(caller: Caller, ask: Ask, file_format: str) -> None:
    """Every frame is a file of that format whose longer edge is `preview.size_px`."""
    encoding = {"format": f"IMAGE_FORMAT_{file_format}", "quality": 70}
    told = await caller.told(ask(size_px=96, preview={"size_px": 24, "encoding": encoding}))

    assert told.frames
    for _, _, part, data in told.frames:
        assert (part.width, part.height) == (24, 16)
        assert opened(data).format == file_format


async def test_previews_are_jpeg_and_never_larger_than_the_picture(caller: Caller, ask: Ask) -> None:
    """Nothing asked: JPEG, no upscaling to the default of 512 px."""
    told = await caller.told(ask())

    assert {(part.format, part.width, part.height) for _, _, part, _ in told.frames} == {
        (image_pb2.IMAGE_FORMAT_JPEG, 48, 32)
    }


async def test_preview_quality_matters(caller: Caller, ask: Ask) -> None:
    """A lower quality makes smaller files of the same starting picture."""
    sizes = []
    for quality in (5, 95):
        told = await caller.told(ask(size_px=192, iterations=1, preview={"encoding": {"quality": quality}}))
        sizes.append(len(told.frames[0][3]))

    assert sizes[0] < sizes[1]


async def test_frame_shows_the_picture_of_its_iteration(caller: Caller, ask: Ask, photo: bytes) -> None:
    """Iteration 0 from the content is the content itself; a PNG frame of the last iteration is the result."""
    preview = {"encoding": {"format": "IMAGE_FORMAT_PNG"}, "every_frame": True}
    told = await caller.told(ask(size_px=96, iterations=5, preview=preview))
    frames = {iteration: np.asarray(opened(data)) for iteration, _, _, data in told.frames}

    assert np.array_equal(frames[0], np.asarray(opened(photo)))
    (result,) = told.of("result")
    assert np.array_equal(frames[result.result.iteration], told.pixels)
    assert result.result.loss == told.progress[result.result.iteration].loss
    assert result.result.stop_reason == job_pb2.STOP_REASON_ITERATIONS


async def test_result_is_the_best_picture(caller: Caller, ask: Ask) -> None:
    """The result's loss is the lowest of all iterations; here any step away from the content raises it."""
    told = await caller.told(ask(iterations=1, content_weight=1e6, style_weight=1.0))

    losses = [progress.loss for progress in told.progress]
    assert losses[0] < losses[1]
    (result,) = told.of("result")
    assert (result.result.iteration, result.result.loss) == (0, losses[0])


@pytest.mark.parametrize(("interval", "expected"), [(1, range(11)), (3, [0, 3, 6, 9]), (10, [0, 10]), (100, [0])])
async def test_previews_come_at_the_interval(caller: Caller, ask: Ask, interval: int, expected: Any) -> None:
    """Every frame's iteration is a multiple of the interval, and those left out are counted."""
    told = await caller.told(ask(iterations=10, preview={"interval": interval}))

    assert_skips(told, interval)
    due = len(expected)
    assert sum(1 + skipped for _, skipped, _, _ in told.frames) == due
    assert told.frames[-1][0] == expected[-1], "the last frame always arrives when the job succeeds"


async def test_interval_0_means_no_previews(caller: Caller, ask: Ask) -> None:
    """No frames, all else as ever."""
    told = await caller.told(ask(preview={"interval": 0}))

    assert "frame" not in told.kinds
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
async def test_result_comes_in_the_format_asked_for(caller: Caller, ask: Ask, file_format: str) -> None:
    """The same job gives the same picture in each format, up to compression."""
    output = {"format": f"IMAGE_FORMAT_{file_format}", "quality": 100}
    told = await caller.told(ask(size_px=96, output=output))
    reference = await caller.told(ask(size_px=96))

    assert opened(told.result).format == file_format
    assert opened(reference.result).format == "PNG"
    difference = np.abs(told.pixels.astype(float) - reference.pixels)
    assert difference.mean() < (0.01 if file_format in ("PNG", "TIFF") else 4)


def cutout() -> bytes:
    """Return a PNG, 96×64 px: a disc of one colour, its edge soft, white stored around it."""
    alpha = Image.new("L", (960, 640))
    ImageDraw.Draw(alpha).ellipse((300, 100, 700, 500), fill=255)
    picture = Image.new("RGBA", (96, 64), (255, 255, 255, 0))
    picture.paste((200, 30, 60), mask=alpha.resize((96, 64), Image.Resampling.BOX).point(lambda value: value and 255))
    picture.putalpha(alpha.resize((96, 64), Image.Resampling.BOX))
    return saved(picture)


@pytest.mark.parametrize(
    ("file_format", "bit_depth"), [("PNG", 8), ("WEBP", 8), ("TIFF", 8), ("PNG", 16), ("TIFF", 16)]
)
async def test_transparency_is_carried_through(caller: Caller, ask: Ask, file_format: str, bit_depth: int) -> None:
    """Result and previews have the content's alpha, at their size; where anything is seen there is no fringe."""
    output = {"format": f"IMAGE_FORMAT_{file_format}", "bit_depth": bit_depth}
    preview = {"size_px": 24, "encoding": {"format": "IMAGE_FORMAT_PNG"}}
    told = await caller.told(
        ask(content=cutout(), style_weight=0.0, size_px=96, preview=preview, output=output, iterations=1)
    )

    original = np.asarray(opened(cutout()))
    assert np.array_equal(told.pixels[..., 3], original[..., 3])
    seen = told.pixels[told.pixels[..., 3] > 0]
    assert np.abs(seen[:, :3].astype(int) - (200, 30, 60)).max() <= (12 if file_format == "WEBP" else 2)
    frame = opened(told.frames[0][3])
    assert (frame.mode, frame.size) == ("RGBA", (24, 16))
    expected = np.asarray(opened(cutout()).getchannel("A").resize((24, 16), Image.Resampling.BOX))
    assert np.array_equal(np.asarray(frame)[..., 3], expected)


async def test_transparency_is_white_in_a_jpeg(caller: Caller, ask: Ask) -> None:
    """JPEG has no alpha: results and previews in it are laid over white."""
    told = await caller.told(ask(content=cutout(), size_px=96, output={"format": "IMAGE_FORMAT_JPEG"}))

    for data in (told.result, told.frames[0][3]):
        corner = np.asarray(opened(data))[:8, :8]
        assert corner.shape[2] == 3
        assert corner.min() > 245


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
async def test_sixteen_bits_are_not_eight(caller: Caller, ask: Ask, file_format: str) -> None:
    """A result of 16 bits is the one of 8 bits, with more levels between."""
    output = {"format": f"IMAGE_FORMAT_{file_format}", "bit_depth": 16}
    told = await caller.told(ask(size_px=96, iterations=5, output=output))
    rounded = await caller.told(ask(size_px=96, iterations=5))

    pixels = pyvips.Image.new_from_buffer(told.result, "").numpy()
    assert pixels.dtype == np.uint16
    assert np.abs(pixels / 257 - rounded.pixels).max() <= 0.51
    assert len(np.unique(pixels)) > 3000
    assert told.result != rounded.result


@pytest.mark.parametrize(
    ("file_format", "bit_depth"), [("PNG", 8), ("JPEG", 8), ("WEBP", 8), ("TIFF", 8), ("PNG", 16), ("TIFF", 16)]
)
async def test_a_result_says_how_it_was_made(
    caller: Caller, ask: Ask, shared: Server, photo: bytes, painting: bytes, file_format: str, bit_depth: int
) -> None:
    """Enough to make it again: model, options, images by their hashes; what came of it; previews say nothing."""
    style = {"style_id": "two", "style": {"images": [{"image": {"data": data}} for data in (painting, photo)]}}
    await caller.styles.CreateStyle(style_service_pb2.CreateStyleRequest(**style))
    request = ask(
        styles=[{"style": "two", "weight": 3}, {"image": {"data": painting}}],
        output={"format": f"IMAGE_FORMAT_{file_format}", "bit_depth": bit_depth},
        style_layers={"relu1_1": 2.0},
    )
    told = await caller.told(request)

    exif = opened(told.result).getexif()
    version = importlib.metadata.version("nst-service")
    assert exif[0x0131] == f"nst {version}"
    found = json.loads(exif[0x010E])
    options = found.pop("options")
    hashes = [hashlib.sha256(data).hexdigest() for data in (photo, painting)]
    (result,) = told.of("result")
    assert found == {
        "nst": version,
        "model": "vgg16",
        "model_sha256": hashlib.sha256(shared._settings.weights["vgg16"].read_bytes()).hexdigest(),
        "content_sha256": hashes[0],
        "styles": [
            {"sha256": hashes[::-1], "weight": 3.0, "name": "styles/two"},
            {"sha256": [hashes[1]], "weight": 1.0},
        ],
        "loss": result.result.loss,
        "iteration": result.result.iteration,
        "stop_reason": "iterations",
    }
    assert StylizeOptions(**options) == convert.options_from_proto(told.job.options)
    assert (options["preset"], options["style_layers"]) == ("gatys", {"relu1_1": 2.0})
    assert not opened(told.frames[0][3]).getexif()
    await caller.styles.DeleteStyle(style_service_pb2.DeleteStyleRequest(name="styles/two"))


async def test_result_quality_matters(caller: Caller, ask: Ask) -> None:
    """A lower quality makes a smaller result."""
    results = [
        (await caller.told(ask(size_px=192, output={"format": "IMAGE_FORMAT_JPEG", "quality": quality}))).result
        for quality in (5, 95)
    ]

    assert len(results[0]) < len(results[1])


async def test_a_large_result_passes_a_stock_client(caller: Caller, ask: Ask) -> None:
    """2048 px of noise as PNG: many MiB, in parts that gRPC's default limit lets through, all of one number."""
    request = ask(
        content=noise(2048, 1056),
        size_px=2048,
        iterations=1,
        style_weight=0.0,
        history=1,
        preview={"size_px": 2048, "encoding": {"format": "IMAGE_FORMAT_PNG"}, "interval": 10_000},
    )
    told = await caller.told(request)

    parts = told.of("result")
    assert len(told.result) > 5 * 1024 * 1024
    assert len(parts) > 2
    assert len({event.sequence for event in parts}) == 1
    assert len(told.frames[0][3]) > 5 * 1024 * 1024
    assert max(told.sizes) <= MESSAGE_BYTES
    assert [event.sequence for event in told.numbered] == list(range(1, len(told.numbered) + 1))
    positions = [index for index, kind in enumerate(told.kinds) if kind == "result"]
    assert positions == list(range(positions[0], positions[0] + len(parts))), "parts come one after another"


async def test_a_slow_reader_skips_frames_and_nothing_else(caller: Caller, ask: Ask) -> None:
    """Behind a slow reader frames are left out and counted; every iteration's numbers and the result arrive."""
    request = ask(
        content=noise(384, 384),
        size_px=384,
        iterations=45,
        init="INIT_NOISE",
        preview={"encoding": {"format": "IMAGE_FORMAT_PNG"}},
    )
    call, responses = caller.jobs.Stylize(request), []
    while (response := await call.read()) is not grpc.aio.EOF:
        responses.append(response)
        if response.event.HasField("frame"):
            await asyncio.sleep(0.25 if len(responses) < 40 else 0)

    told = Told(responses)
    assert [progress.iteration for progress in told.progress] == list(range(46))
    assert_skips(told, 1)
    assert any(skipped for _, skipped, _, _ in told.frames), "the reader was not slow enough to show anything"
    assert told.kinds[-2:] == ["result", "state_change"]
    assert told.frames[-1][0] == 45


async def test_a_stalled_client_is_cut_off_and_costs_others_nothing(
    strict: Caller, strict_server: Server, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its job goes on at full speed, until the write times out; then the job ends, and the call is UNAVAILABLE."""
    monkeypatch.setattr(services, "STATUS_TIMEOUT_S", 1.5)
    client = strict
    preview = {"encoding": {"format": "IMAGE_FORMAT_PNG"}}
    call = client.jobs.Stylize(ask(content=noise(512, 512), preview=preview, **(FOREVER | {"size_px": 512})))
    await read_until(call, "progress")
    (job,) = [run.job for run in strict_server._application.scheduler._running.values()]

    began = job.now.progress.iteration
    await until(lambda: bool(job.state.terminal), within_s=20)

    assert job.state == "cancelled"
    assert job.now.progress.iteration > began + 5, "the job stood still while its client did"
    await until(lambda: not job._watchers)
    quick = await asyncio.wait_for(client.told(ask()), 5)
    assert quick.job.state == job_pb2.JOB_STATE_SUCCEEDED

    await asyncio.sleep(2)  # past the time that the status itself may wait for the client
    assert not [
        task for task in asyncio.all_tasks() if "Stylize" in task.get_name() or "Stylize" in repr(task.get_coro())
    ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        while await call.read() is not grpc.aio.EOF:
            pass
    refusal = Refusal(caught.value)
    assert refusal.code == grpc.StatusCode.UNAVAILABLE
    assert (refusal.reason, refusal.domain) == ("STREAM_UNREAD", "nst")
    assert f"{STRICT_TIMEOUT_S} s" in refusal.message


async def test_a_reader_that_pauses_briefly_is_not_cut_off(caller: Caller, ask: Ask, shared: Server) -> None:
    """Idle streams are fine: a client that reads late gets everything."""
    call = caller.jobs.Stylize(ask(iterations=20))
    await asyncio.sleep(1)
    told = Told([response async for response in call])

    assert [progress.iteration for progress in told.progress] == list(range(21))
    assert_skips(told, 1)


def assert_skips(told: Told, interval: int) -> None:
    """Assert that each frame says how many due ones were left out since the one before."""
    iterations = [-interval, *(iteration for iteration, *_ in told.frames)]
    for (before, now), (_, skipped, _, _) in zip(itertools.pairwise(iterations), told.frames, strict=True):
        assert now % interval == 0
        assert skipped == (now - before) // interval - 1


async def test_a_run_that_gets_no_further_ends_early_and_never_goes_back(caller: Caller, ask: Ask) -> None:
    """Its numbers rise to the end, the result is the best of them, and it says that it converged."""
    told = await caller.told(
        ask(iterations=10_000, init="INIT_NOISE", style_layers={"relu1_1": 1.0}, content_weight=0.0)
    )

    iterations = [progress.iteration for progress in told.progress]
    assert iterations == sorted(set(iterations))
    assert iterations[-1] < 10_000
    assert min(progress.iterations_per_second for progress in told.progress) >= 0
    result = told.of("result")[0].result
    assert result.stop_reason == job_pb2.STOP_REASON_CONVERGED
    assert result.loss == min(progress.loss for progress in told.progress)


async def test_an_average_is_returned_as_it_is_at_the_end(caller: Caller, ask: Ask) -> None:
    """Of the last iterate, although another had the lowest loss."""
    options = {"optimizer": "OPTIMIZER_ADAM", "learning_rate": 0.3, "averaging": 0.9, "iterations": 12}
    told = await caller.told(ask(preview={"interval": 1, "encoding": {"format": "IMAGE_FORMAT_PNG"}}, **options))

    result = told.of("result")[0].result
    assert result.iteration == 12
    assert np.array_equal(told.pixels, np.asarray(opened(told.frames[-1][3])))
