"""Requests that ask for what cannot be: each gets a status that names the field, and the server goes on."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from nst.v1 import job_pb2, model_service_pb2, style_service_pb2, style_transfer_service_pb2
from nst_server import errors, status
from tests.conftest import picture_bytes
from tests.server.conftest import Caller, noise

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

HUGE = "x" * 100_000


def refused(field: str, reason: str = "INVALID_FIELD", **request: Any) -> Any:
    """Return a case: the field at fault and the request's changed fields or options."""
    return pytest.param(field, reason, request, id=f"{field}-{request!r:.40}")


def image(data: bytes = b"", **fields: Any) -> dict[str, Any]:
    """Return a style brought along."""
    return {"image": {"data": data or picture_bytes(32, 32)}, **fields}


INVALID = [
    refused("content.data", content=b""),
    refused("content.data", content=b"GIF89a no image"),
    refused("content.data", content=picture_bytes(100, 100)[:-200]),
    refused("content.data", content=picture_bytes(1, 1)),
    refused("content.data", content=picture_bytes(1, 5000)),
    refused("content.data", content=picture_bytes(16, 5000), size_px=512),
    refused("styles", styles=[]),
    refused("styles", styles=[image()] * 17),
    refused("styles", styles=[image(weight=0), image(weight=0)]),
    refused("styles[0]", styles=[{}]),
    refused("styles[0].style", styles=[{"style": ""}]),
    refused("styles[1].image.data", styles=[image(), {"image": {}}]),
    refused("styles[1].image.data", styles=[image(), image(b"no image")]),
    refused("styles[0].image.data", styles=[image(picture_bytes(16, 5000))]),
    refused("styles[1].weight", styles=[image(), image(weight=math.nan)]),
    refused("styles[0].weight", styles=[image(weight=math.inf)]),
    refused("styles[0].weight", styles=[image(weight=-1.0)]),
    refused("styles[0].weight", styles=[image(weight=1.1e9)]),
    refused("options.iterations", iterations=0),
    refused("options.iterations", iterations=-1),
    refused("options.iterations", iterations=1_000_000_000),
    refused("options.size_px", size_px=15),
    refused("options.size_px", size_px=4097),
    refused("options.history", history=0),
    refused("options.style_weight", style_weight=math.nan),
    refused("options.style_weight", style_weight=-math.inf),
    refused("options.content_weight", content_weight=math.inf),
    refused("options.content_weight", content_weight=-0.1),
    refused("options.style_weight", content_weight=0.0, style_weight=0.0),
    refused("options.style_scale", style_scale=0.0),
    refused("options.style_scale", style_scale=math.nan),
    refused("options.style_scale", style_scale=2.5, size_px=2048),
    refused("options.style_layers[relu9_9]", style_layers={"relu9_9": 1.0}),
    refused("options.content_layers[conv1_1]", content_layers={"conv1_1": 1.0}),
    refused("options.content_layers[]", content_layers={"": 1.0}),
    refused("options.style_layers", style_layers={"relu1_1": 0.0}),
    refused("options.style_layers[relu1_1]", style_layers={"relu1_1": math.nan}),
    refused("options.style_layers[relu1_1]", style_layers={"relu1_1": -1.0}),
    refused("options.init", init=17),
    refused("options.pooling", pooling=-3),
    refused("options.precision", precision=99),
    refused("preview.interval", preview={"interval": -1}),
    refused("preview.interval", preview={"interval": 10_001}),
    refused("preview.size_px", preview={"size_px": 15}),
    refused("preview.size_px", preview={"size_px": 4097}),
    refused("preview.encoding.quality", preview={"encoding": {"quality": 0}}),
    refused("preview.encoding.format", preview={"encoding": {"format": 12}}),
    refused("output.quality", output={"quality": 101}),
    refused("output.format", output={"format": 12}),
    refused("output.bit_depth", output={"bit_depth": 0}),
    refused("output.bit_depth", output={"bit_depth": 12}),
    refused("output.bit_depth", output={"bit_depth": 16, "format": "IMAGE_FORMAT_JPEG"}),
    refused("output.bit_depth", output={"bit_depth": 16, "format": "IMAGE_FORMAT_WEBP"}),
    refused("preview.encoding.bit_depth", preview={"encoding": {"bit_depth": 16, "format": "IMAGE_FORMAT_PNG"}}),
    refused("preview.encoding.bit_depth", preview={"encoding": {"bit_depth": -8}}),
    refused("model", "NOT_FOUND", model="vgg99"),
    refused("model", "NOT_FOUND", model="models/../../etc/passwd"),
    refused("styles[0].style", "NOT_FOUND", styles=[{"style": "styles/none-such"}]),
    refused("styles[1].style", "NOT_FOUND", styles=[image(), {"style": "../../etc"}]),
]

CODES = {"INVALID_FIELD": grpc.StatusCode.INVALID_ARGUMENT, "NOT_FOUND": grpc.StatusCode.NOT_FOUND}


@pytest.mark.parametrize(("field", "reason", "changed"), INVALID)
async def test_bad_requests_are_refused_naming_the_field(
    caller: Caller, ask: Ask, field: str, reason: str, changed: dict[str, Any]
) -> None:
    """The right code, ErrorInfo, and BadRequest with the field's path; the message begins with it. Nothing started."""
    refusal = await caller.refusal(ask(**changed))

    assert refusal.code == CODES[reason], refusal
    assert (refusal.reason, refusal.domain) == (reason, "nst")
    assert refusal.field == field
    assert refusal.message.startswith(field)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"iterations": 0}, "options.iterations must be at least 1, not 0"),
        ({"iterations": 10**9}, "options.iterations must be at most 10000, not 1000000000"),
        ({"style_weight": math.nan}, "options.style_weight must be finite, not nan"),
        ({"style_layers": {"relu1_9": 1}}, "did you mean relu1_2"),
        ({"model": "vgg99"}, "vgg19"),
        ({"size_px": 2048, "style_scale": 2.5}, "5120 px large; at most 4096 px"),
        (
            {"output": {"bit_depth": 16, "format": "IMAGE_FORMAT_WEBP"}},
            "output.bit_depth must be 8, or 16 for results in PNG and TIFF, not 16",
        ),
        ({"preview": {"interval": -1}}, "preview.interval must be from 0 to 10000, not -1"),
    ],
)
async def test_messages_name_bound_and_value(caller: Caller, ask: Ask, changed: dict[str, Any], words: str) -> None:
    """A person can act on the message alone."""
    assert words in (await caller.refusal(ask(**changed))).message


async def test_a_server_goes_on_after_bad_requests(caller: Caller, ask: Ask) -> None:
    """All bad requests at once do not keep a good one from its picture."""
    bad = [asyncio.create_task(caller.refusal(ask(**case.values[2]))) for case in INVALID]
    await asyncio.gather(*bad)

    assert (await caller.told(ask())).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_a_model_that_is_not_fetched_is_a_failed_precondition(caller: Caller, ask: Ask) -> None:
    """A known model without weights: FAILED_PRECONDITION with the command that fetches them; no other model is used."""
    refusal = await caller.refusal(ask(model="vgg19"))

    assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
    assert (refusal.reason, refusal.domain) == ("MODEL_NOT_FETCHED", "nst")
    assert "nst-model fetch vgg19" in refusal.message


async def test_a_message_above_the_limit_is_refused(strict: Caller, ask: Ask) -> None:
    """RESOURCE_EXHAUSTED that names both sizes; a message below the limit passes."""
    small, large = noise(800, 800), noise(1300, 1300)
    assert len(small) < 4 * 2**20 < len(large)

    refusal = await strict.refusal(ask(content=large))

    assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(4 * 2**20) in refusal.message
    assert (await strict.told(ask(content=small))).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_an_operators_limits_hold(strict: Caller, ask: Ask) -> None:
    """A size and a number of pixels that the contract allows and this server does not."""
    refusal = await strict.refusal(ask(size_px=601))
    assert (refusal.field, refusal.code) == ("options.size_px", grpc.StatusCode.INVALID_ARGUMENT)
    assert "at most 600 px on this server, not 601" in refusal.message

    refusal = await strict.refusal(ask(content=picture_bytes(1500, 1500)))
    assert (refusal.field, refusal.code) == ("content.data", grpc.StatusCode.INVALID_ARGUMENT)
    assert "at most 2 megapixels" in refusal.message


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        ({"model": HUGE}, grpc.StatusCode.NOT_FOUND),
        ({"styles": [{"style": HUGE}]}, grpc.StatusCode.NOT_FOUND),
        ({"style_layers": {HUGE: 1.0}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"style_layers": {"🎨" * 5000: 1.0}}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"model": "\n\0é🎨" * 5000}, grpc.StatusCode.NOT_FOUND),
    ],
    ids=["model", "style", "layer", "layer of emoji", "model of odd characters"],
)
async def test_long_names_do_not_burst_the_status(
    caller: Caller, ask: Ask, request_: Any, code: grpc.StatusCode
) -> None:
    """A status travels in headers, which are short: what it quotes is cut, its code and details arrive."""
    refusal = await caller.refusal(ask(**request_))

    assert refusal.code == code
    assert refusal.domain == "nst"
    assert refusal.field


@pytest.mark.parametrize("edge", [16, 17, 31, 33])
async def test_the_smallest_pictures_work(caller: Caller, ask: Ask, edge: int) -> None:
    """16 px is enough for every layer, odd sizes too."""
    told = await caller.told(ask(content=picture_bytes(edge, edge), styles=[image()], size_px=edge))

    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert told.pixels.shape == (edge, edge, 3)


async def test_thin_pictures_work_at_coarse_scales(caller: Caller, ask: Ask) -> None:
    """A panorama and a thin style are large enough at the last scale, so they are at the coarser ones too."""
    request = ask(
        content=picture_bytes(160, 20),
        styles=[image(picture_bytes(24, 200))],
        preset="PRESET_FINE",
        size_px=160,
        first_size_px=16,
    )
    told = await caller.told(request)

    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED, told.job.error
    assert told.pixels.shape == (20, 160, 3)


async def test_sixteen_styles_are_not_too_many(caller: Caller, ask: Ask) -> None:
    """The limit itself is allowed, and a style of weight 0 is one of them."""
    styles = [image(picture_bytes(32, 32, seed=seed), weight=1.0) for seed in range(15)]
    told = await caller.told(ask(styles=[*styles, image(weight=0.0)]))

    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_stored_styles_do_not_get_round_the_limit(caller: Caller, ask: Ask) -> None:
    """Three styles of 16 images are 48 images: refused, naming the bound."""
    images = [image(picture_bytes(16, 16, seed=seed)) for seed in range(16)]
    request = style_service_pb2.CreateStyleRequest(style_id="sixteen", style={"images": images})
    await caller.styles.CreateStyle(request)

    refusal = await caller.refusal(ask(styles=[{"style": "sixteen"}] * 3))

    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "styles")
    assert "at most 32 images" in refusal.message
    await caller.styles.DeleteStyle(style_service_pb2.DeleteStyleRequest(name="sixteen"))


async def test_largest_allowed_weights_give_a_picture(caller: Caller, ask: Ask) -> None:
    """Weights at their bounds: no infinite loss, no NaN, a result."""
    told = await caller.told(ask(content_weight=1e9, style_weight=1e9, styles=[image(weight=1e9), image(weight=1e-9)]))

    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
    assert all(math.isfinite(progress.loss) for progress in told.progress)


async def test_unknown_calls_are_unimplemented(caller: Caller) -> None:
    """A method that is not in the contract, and bytes that are no message, end in a status."""
    call = caller.channel.unary_unary("/nst.v1.StyleTransferService/Paint")
    assert (await caller.refusal(call(b""))).code == grpc.StatusCode.UNIMPLEMENTED
    call = caller.channel.unary_stream("/nst.v1.StyleTransferService/Stylize")(b"\xff\xff\xff no message")
    assert (await caller.refusal(call.read())).code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@pytest.mark.parametrize("token", ["!", "%%%%", "nonsense", "AAA", "é", "/w=="])
@pytest.mark.parametrize("call", ["ListStyles", "ListModels"])
async def test_bad_page_tokens_are_refused(caller: Caller, call: str, token: str) -> None:
    """What no response ever gave as its token is INVALID_ARGUMENT."""
    refusal = await caller.refusal(listing(caller, call, page_token=token))

    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "page_token")


@pytest.mark.parametrize("size", [-1, 101, 2**31 - 1])
@pytest.mark.parametrize("call", ["ListStyles", "ListModels"])
async def test_bad_page_sizes_are_refused(caller: Caller, call: str, size: int) -> None:
    """INVALID_ARGUMENT with the range."""
    refusal = await caller.refusal(listing(caller, call, page_size=size))

    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "page_size")
    assert "from 0 to 100, not" in refusal.message


def test_every_refusal_has_a_status_and_a_reason() -> None:
    """The table covers each subclass of RequestError, and no two share a reason."""
    refusals = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind is not errors.RequestError]

    assert set(status.CODES) == set(refusals)
    assert len({kind.reason for kind in refusals}) == len(refusals)


def listing(caller: Caller, call: str, **fields: Any) -> Any:
    """Return a call that lists something."""
    if call == "ListModels":
        return caller.models.ListModels(model_service_pb2.ListModelsRequest(**fields))
    return caller.styles.ListStyles(style_service_pb2.ListStylesRequest(**fields))
