"""The service adds nothing to the numbers and the pictures, and takes nothing away."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import nst_model
from nst_client import Client, Encoding, Frame, Preview, Progress, Result
from nst_model import FeatureModel, Style, StylizeOptions
from nst_model.weights import load_weights
from tests.end_to_end.conftest import Running

SIZE_PX, ITERATIONS = 80, 12


def pixels_of(data: bytes) -> np.ndarray:
    """Decode an image file."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_streamed_run_is_the_cores_run(
    running_server: Running, tiny_weights_file: Path, photo: bytes, painting: bytes
) -> None:
    """Every loss and every picture received is, bit for bit, what the core yields without a server (fp32)."""
    torch.set_num_threads(1)  # as the server: sums depend on how they are split
    options = StylizeOptions(size_px=SIZE_PX, iterations=ITERATIONS, precision="fp32")
    model = FeatureModel(load_weights("vgg16", tiny_weights_file), "cpu")
    content, style = (
        nst_model.from_pixels(np.asarray(_scaled(Image.open(io.BytesIO(data)), SIZE_PX))) for data in (photo, painting)
    )
    expected = list(nst_model.stylize(model, content, [Style(style)], options))

    with Client(running_server.address) as client:
        preview = Preview(interval=1, size_px=4096, encoding=Encoding(format="png"))
        events = list(
            client.stylize(photo, painting, preview=preview, size_px=SIZE_PX, iterations=ITERATIONS, precision="fp32")
        )

    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.loss for event in progress] == [iterate.loss for iterate in expected]
    assert [event.content_loss for event in progress] == [iterate.content_loss for iterate in expected]
    assert [dict(event.style_losses) for event in progress] == [dict(iterate.style_losses) for iterate in expected]
    frames = [event for event in events if isinstance(event, Frame)]
    assert len(frames) > ITERATIONS / 3
    for frame in frames:
        assert (pixels_of(frame.data) == nst_model.to_pixels(expected[frame.iteration].picture)).all(), frame.iteration
    result = next(event for event in events if isinstance(event, Result))
    best = min(expected, key=lambda iterate: iterate.loss)
    assert result.iteration == best.index
    assert (pixels_of(result.data) == nst_model.to_pixels(best.picture)).all()


def _scaled(picture: Image.Image, longer_edge_px: int) -> Image.Image:
    scale = longer_edge_px / max(picture.size)
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
