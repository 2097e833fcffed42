"""The making of a picture as an animated image."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nst_client import Frame, ImageFormat, InvalidArgumentError, Result, StopReason
from nst_client.animation import MAX_FRAMES, FrameSampler, durations_ms, write_animation

HEAD: dict[str, Any] = {"sequence": 1, "attempt": 1, "time": datetime(2024, 1, 1, tzinfo=UTC)}


@pytest.fixture
def frame(picture: Callable[..., bytes]) -> Callable[[int], Frame]:
    """Return the maker of frames, each of another shade."""

    def make(iteration: int) -> Frame:
        data = picture("JPEG", size=(16, 12), shade=iteration * 30 % 256)
        return Frame(iteration=iteration, skipped=0, data=data, format=ImageFormat.JPEG, width=16, height=12, **HEAD)

    return make


@pytest.fixture
def result(picture: Callable[..., bytes]) -> Result:
    """Return the result of iteration 5, twice as large as the frames."""
    data = picture("PNG", size=(32, 24), shade=255)
    return Result(
        iteration=5,
        loss=1.0,
        stop_reason=StopReason.ITERATIONS,
        data=data,
        format=ImageFormat.PNG,
        width=32,
        height=24,
        **HEAD,
    )


@pytest.mark.parametrize(("name", "kind"), [("a.webp", "WEBP"), ("a.gif", "GIF"), ("a.png", "PNG"), ("a.APNG", "PNG")])
def test_animation_holds_its_ends(
    *, tmp_path: Path, frame: Callable[[int], Frame], result: Result, name: str, kind: str
) -> None:
    """Every format plays all frames for ever, holds the first and the last, and ends with the result."""
    write_animation(tmp_path / name, [frame(iteration) for iteration in range(6)], result)
    with Image.open(tmp_path / name) as animation:
        assert (animation.format, animation.size, animation.n_frames) == (kind, (16, 12), 6)
        assert animation.info["loop"] == 0
        durations = []
        for index in range(6):
            animation.seek(index)
            animation.load()
            durations.append(animation.info["duration"])
        red = animation.convert("RGB").getpixel((8, 6))[0]
    assert durations == [700, 200, 200, 200, 200, 2000]
    assert red > 240


def test_animation_of_nothing_but_the_result(tmp_path: Path, result: Result) -> None:
    """When the connection was too slow for any frame, the animation is the result."""
    write_animation(tmp_path / "a.webp", [], result)
    with Image.open(tmp_path / "a.webp") as animation:
        assert animation.size == (32, 24)


def test_transparent_result_lies_over_white(tmp_path: Path, result: Result) -> None:
    """A result with transparent parts ends the animation as it looks, not with what lies beneath them."""
    buffer = io.BytesIO()
    Image.new("RGBA", (32, 24), (200, 0, 0, 0)).save(buffer, "PNG")
    write_animation(tmp_path / "a.webp", [], replace(result, data=buffer.getvalue()))
    with Image.open(tmp_path / "a.webp") as animation:
        assert min(animation.convert("RGB").getpixel((8, 6))) > 245


def test_large_frames_are_reduced(tmp_path: Path, picture: Callable[..., bytes], result: Result) -> None:
    """An animation is at most 768 pixels wide, whatever the frames are."""
    data = picture("JPEG", size=(2000, 1000))
    large = Frame(iteration=0, skipped=0, data=data, format=ImageFormat.JPEG, width=2000, height=1000, **HEAD)
    write_animation(tmp_path / "a.gif", [large], result)
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.size == (768, 384)


def test_unknown_suffix_is_refused(tmp_path: Path, result: Result) -> None:
    """A file name that stands for no animated format is an error that lists those that do."""
    with pytest.raises(InvalidArgumentError, match=r"\.webp, \.gif, \.png, \.apng, not '\.mp4'"):
        write_animation(tmp_path / "a.mp4", [], result)


@pytest.mark.parametrize("count", [0, 1, 2, 119, 120, 121, 239, 240, 241, 1_000, 10_001])
def test_sampler_keeps_an_even_choice(frame: Callable[[int], Frame], count: int) -> None:
    """Of any number of frames at most 120 are kept, in order, evenly, the first and the last among them."""
    sampler = FrameSampler()
    first = frame(0)
    for iteration in range(count):
        sampler.add(Frame(**{**vars(first), "iteration": iteration}))
    kept = [entry.iteration for entry in sampler.frames()]
    assert len(kept) == min(count, MAX_FRAMES) or (count > MAX_FRAMES and MAX_FRAMES / 2 < len(kept) <= MAX_FRAMES)
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
        gaps = [later - earlier for earlier, later in itertools.pairwise(kept)]
        assert all(0 < gap <= 4 * count / MAX_FRAMES + 1 for gap in gaps)


@pytest.mark.parametrize(("count", "expected"), [(1, [2000]), (2, [700, 2000]), (3, [700, 200, 2000])])
def test_short_animations(count: int, expected: list[int]) -> None:
    """One, two or three pictures have sensible times too."""
    assert durations_ms(count) == expected


def test_long_animations_take_about_nine_seconds() -> None:
    """However many frames there are, nobody waits half a minute for the end."""
    assert 6_000 < sum(durations_ms(MAX_FRAMES)) < 9_000
