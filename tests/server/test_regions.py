"""Regions, masks of styles, and pictures to start from, by the contract."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nst.v1 import job_pb2, options_pb2, style_service_pb2, style_transfer_service_pb2
from tests.conftest import picture_bytes
from tests.server.conftest import Caller, Told, noise, opened, saved

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

COLOURED = {"style_layers": {"relu1_1": 1.0}, "content_weight": 0.0, "tv_weight": 0.0, "iterations": 30}
"""Options that make of a picture little but the style's colours."""


def flat(colour: tuple[int, int, int], size: tuple[int, int] = (48, 48)) -> bytes:
    """Return a picture of one colour."""
    return saved(Image.new("RGB", size, colour))


def left_half(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Return a mask that is white on the left and black on the right."""
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def style(data: bytes, **masks: bytes) -> dict[str, Any]:
    """Return a style brought along, with masks."""
    return {"image": {"data": data}, **{name: {"data": mask} for name, mask in masks.items()}}


def redness(told: Told) -> tuple[float, float]:
    """Return by how much red is above blue on the left and on the right of a result, [-255, 255]."""
    pixels = told.pixels.astype(float)
    across = (pixels[..., 0] - pixels[..., 2]).mean(axis=0)
    third = len(across) // 3
    return float(across[:third].mean()), float(across[-third:].mean())


async def test_each_region_takes_its_own_style(caller: Caller, ask: Ask) -> None:
    """Red on the left and blue on the right; the mask may be smaller than the picture, and the rest needs none."""
    mask = saved(left_half((24, 16)))
    red, blue = flat((200, 40, 40)), flat((40, 40, 200))
    left, right = redness(await caller.told(ask(styles=[style(red, region=mask), style(blue)], **COLOURED)))
    assert left > 30
    assert right < -30


async def test_where_all_have_a_region_the_rest_is_left_alone(caller: Caller, ask: Ask) -> None:
    """No style, no content weight: the right of the photo stays what it was."""
    content = noise(48, 32)
    request = ask(content=content, styles=[style(flat((200, 40, 40)), region=saved(left_half()))], **COLOURED)
    change = np.abs((await caller.told(request)).pixels.astype(float) - np.asarray(opened(content)))
    assert change[:, :16].mean() > 20
    assert change[:, 32:].max() <= 1


async def test_a_style_region_chooses_part_of_the_style(caller: Caller, ask: Ask) -> None:
    """Of a style half red and half blue, the red; and what is kept of styles on disk is not touched by it."""
    both = Image.new("RGB", (64, 64), (40, 40, 200))
    both.paste((200, 40, 40), (0, 0, 32, 64))
    whole = [style(saved(both))]
    before = await caller.told(ask(styles=whole, **COLOURED))
    masked = redness(
        await caller.told(ask(styles=[style(saved(both), style_region=saved(left_half((64, 64))))], **COLOURED))
    )
    assert sum(masked) > 60 + sum(redness(before))
    assert (await caller.told(ask(styles=whole, **COLOURED))).result == before.result


async def test_a_result_says_which_masks_it_was_made_with(caller: Caller, ask: Ask) -> None:
    """By their hashes."""
    mask, start = saved(left_half()), noise(48, 32)
    request = ask(styles=[style(noise(32, 32, 1), region=mask), style(noise(32, 32, 2))])
    request.init_image.data = start
    told = await caller.told(request)
    said = json.loads(opened(told.result).getexif()[0x010E])
    assert said["styles"][0]["region_sha256"] == hashlib.sha256(mask).hexdigest()
    assert "region_sha256" not in said["styles"][1]
    assert said["init_image_sha256"] == hashlib.sha256(start).hexdigest()
    assert said["options"]["init"] == "image"


async def test_a_picture_to_start_from_is_what_it_starts_from(caller: Caller, ask: Ask) -> None:
    """Scaled to the content's shape; `init` is implied, or may be said."""
    start = noise(96, 64, 5)
    for init in (options_pb2.INIT_UNSPECIFIED, options_pb2.INIT_IMAGE):
        request = ask(init=init, preview={"every_frame": True, "encoding": {"format": "IMAGE_FORMAT_PNG"}})
        request.init_image.data = start
        told = await caller.told(request)
        assert told.job.options.init == options_pb2.INIT_IMAGE
        first = np.asarray(opened(told.frames[0][3])).astype(float)
        wanted = np.asarray(Image.open(io.BytesIO(start)).resize((48, 32), Image.Resampling.LANCZOS)).astype(float)
        assert np.abs(first - wanted).max() <= 1


@pytest.mark.parametrize("init", ["INIT_GRAY", "INIT_STYLE_STATISTICS"])
async def test_other_starts_work(caller: Caller, ask: Ask, init: str) -> None:
    """By name."""
    assert (await caller.told(ask(init=init))).states[-1] == job_pb2.JOB_STATE_SUCCEEDED


@pytest.mark.parametrize("color", ["LUMINANCE", "CHOLESKY", "PCA", "SYMMETRIC", "HISTOGRAM"])
async def test_colour_modes_work(caller: Caller, ask: Ask, color: str) -> None:
    """A green photo and a red style: with its colours kept the picture stays greener than with the style's."""
    green, red = flat((60, 160, 60), (48, 32)), flat((200, 40, 40))

    async def greenness(**options: Any) -> float:
        pixels = (await caller.told(ask(content=green, styles=[style(red)], **COLOURED, **options))).pixels.astype(
            float
        )
        return float((pixels[..., 1] - pixels[..., 0]).mean())

    assert await greenness(color=f"COLOR_{color}") > 8 + await greenness()


async def test_masks_and_starts_that_cannot_be_are_refused(caller: Caller, ask: Ask) -> None:
    """Each with the field at fault, and nothing is started."""
    picture = picture_bytes(32, 32)
    half = saved(left_half())

    async def refused(field: str, text: str, request: style_transfer_service_pb2.StylizeRequest) -> None:
        refusal = await caller.refusal(request)
        assert (refusal.field, refusal.reason) == (field, "INVALID_FIELD"), refusal
        assert text in refusal.message

    await refused("styles[0].region.data", "is empty", ask(styles=[style(picture, region=b"")]))
    await refused("styles[0].region.data", "no image", ask(styles=[style(picture, region=b"no image")]))
    await refused(
        "styles[0].region.data",
        "32×32 px; it must have the proportions of 48×32",
        ask(styles=[style(picture, region=picture)]),
    )
    black = flat((0, 0, 0), (48, 32))
    await refused("styles[0].region.data", "black everywhere", ask(styles=[style(picture, region=black)]))
    await refused("styles[0].style_region.data", "48×32", ask(styles=[style(picture, style_region=half)]))
    for loss in ("STYLE_LOSS_DIRECT", "STYLE_LOSS_CROSS"):
        request = ask(styles=[style(picture, style_region=picture)], style_loss=loss)
        await refused("options.style_loss", "style_region", request)
    await refused("init_image", "is missing", ask(init=options_pb2.INIT_IMAGE))
    request = ask(init=options_pb2.INIT_NOISE)
    request.init_image.data = picture
    await refused("init_image", "options.init is not image", request)
    request = ask()
    request.init_image.data = b"no image"
    await refused("init_image.data", "no image", request)


async def test_a_style_region_needs_a_style_of_one_image(caller: Caller, ask: Ask) -> None:
    """There would be no telling which image it is of."""
    images = [{"image": {"data": picture_bytes(32, 32, seed=seed)}} for seed in (1, 2)]
    created = await caller.styles.CreateStyle(style_service_pb2.CreateStyleRequest(style={"images": images}))
    request = ask(styles=[{"style": created.name, "style_region": {"data": picture_bytes(32, 32)}}])
    refusal = await caller.refusal(request)
    assert refusal.field == "styles[0].style_region"
    await caller.styles.DeleteStyle(style_service_pb2.DeleteStyleRequest(name=created.name))
