"""Styles that travel without their images: exported by one server, imported by another, and what they then serve."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import pickle
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import safetensors.numpy
import torch

from nst.v1 import (
    image_service_pb2,
    image_service_pb2_grpc,
    job_pb2,
    options_pb2,
    style_service_pb2,
    style_transfer_service_pb2,
)
from nst_model import StyleFile, artifact, read_description
from tests.conftest import picture_bytes
from tests.server.conftest import Caller, opened, read_until, watched
from tests.server.test_exports import whole
from tests.server.test_styles import create, creation, delete, get, small_disk

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]
Serve = Callable[..., Any]

OPTIONS = {"size_px": 96, "first_size_px": 48, "iterations": 3, "precision": "PRECISION_FP32", "preset": "PRESET_FINE"}
"""Options of a job of three scales."""


async def exported(caller: Caller, name: str, *, model: str = "", offset: int = 0, **options: Any) -> bytes:
    """Return a style file."""
    request = style_service_pb2.ExportStyleRequest(name=name, model=model, offset=offset, options=options or None)
    return whole([part async for part in caller.styles.ExportStyle(request)])


def importing(caller: Caller, data: bytes, style_id: str = "", display_name: str = "") -> Any:
    """Return the call that imports a style file."""
    request = style_service_pb2.ImportStyleRequest(data=data, style_id=style_id, display_name=display_name)
    return caller.styles.ImportStyle(request)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def file(shared: Any) -> bytes:
    """A style file for OPTIONS, of a style that the shared server has not."""
    client = Caller(shared.address)
    async with client.channel:
        await create(client, "travelling", picture_bytes(64, 80, seed=21), display_name="A travelling style")
        data = await exported(client, "travelling", **OPTIONS)
        await delete(client, "travelling")
    return data


def changed(data: bytes, alter: Callable[[Any], object] | None = None, **card: Any) -> bytes:
    """Return a well-formed style file that says, or after `alter` of its moments holds, something else."""
    style = StyleFile.from_bytes(data)
    if alter is not None:
        alter(style.moments)
    return replace(style, card=replace(style.card, **card)).to_bytes()


def resealed(data: bytes, **said: Any) -> bytes:
    """Return a style file whose description says something else, its digest being right."""
    tensors = safetensors.numpy.load(data)
    described = {name: value for name, value in read_description(data).items() if name != "content_sha256"}
    kept = {name: artifact.Fp32(tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}
    return artifact.sealed_safetensors(kept, described | said)


# There and back


@pytest.mark.parametrize("images", [1, 2], ids=["one image", "two images"])
@pytest.mark.parametrize(
    "options",
    [
        OPTIONS,
        {"preset": "PRESET_GATYS", "size_px": 64, "iterations": 3, "precision": "PRECISION_FP32"},
        OPTIONS | {"style_scale": 0.7, "style_loss": "STYLE_LOSS_GRAM", "style_layers": {"relu2_2": 1, "relu3_3": 2}},
    ],
    ids=["fine", "gatys", "other layers, smaller style"],
)
async def test_an_imported_style_makes_the_styles_picture(
    serve: Serve, caller: Caller, tmp_path: Path, ask: Ask, images: int, options: dict[str, Any]
) -> None:
    """One server exports, another imports: the picture is the one that the style itself makes, to the bit."""
    pictures = [picture_bytes(64, 80, seed=seed) for seed in range(31, 31 + images)]
    weights = (3.0, 1.0)[:images]
    source = f"source-{images}"
    await create(caller, source, *pictures, weights=weights)
    told = await caller.told(ask(styles=[{"style": source}], **options))
    data = await exported(caller, source, **{name: value for name, value in options.items() if name != "iterations"})

    _, other = await serve(data_dir=tmp_path / "other")
    style = await importing(other, data, "brought")
    again = await other.told(ask(styles=[{"style": style.name}], **options))

    assert again.job.state == job_pb2.JOB_STATE_SUCCEEDED, again.job.error
    assert [progress.loss for progress in again.progress] == [progress.loss for progress in told.progress]
    assert np.array_equal(again.pixels, told.pixels)


async def test_a_style_file_is_the_same_each_time(serve: Serve, tmp_path: Path) -> None:
    """Two servers that never met write the same bytes; other options give another file."""
    found = []
    for name in ("one", "two"):
        _, client = await serve(data_dir=tmp_path / name)
        await create(client, "same", picture_bytes(64, 80, seed=41), display_name="The same")
        found.append(await exported(client, "same", **OPTIONS))
    assert found[0] == found[1]
    assert await exported(client, "same", **(OPTIONS | {"size_px": 64})) != found[0]


async def test_a_style_file_says_what_it_is(file: bytes, tiny_weights_file: Path) -> None:
    """Sizes of all scales, layers, model and weights, pooling and padding, and the hashes of the images."""
    description = read_description(file)
    assert (description["kind"], description["display_name"]) == ("style", "A travelling style")
    assert (description["sizes_px"], description["precision"]) == ([48, 68, 96], "fp32")
    assert description["layers"] == ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]
    assert (description["model"], description["pooling"], description["padding"]) == ("vgg16", "max", "mirror")
    assert description["weights_sha256"] == hashlib.sha256(tiny_weights_file.read_bytes()).hexdigest()
    sha256 = hashlib.sha256(picture_bytes(64, 80, seed=21)).hexdigest()
    assert description["images"] == [{"sha256": sha256, "share": 1.0}]


async def test_an_imported_style_tells_what_it_is_for(caller: Caller, file: bytes) -> None:
    """In `file` and in `prepared`; it has no images, and the name in the file unless another is given."""
    style = await importing(caller, file, "file-told")
    assert (style.name, style.display_name, len(style.images)) == ("styles/file-told", "A travelling style", 0)
    assert style.HasField("create_time")
    about = style.file
    assert (about.sha256, about.total_bytes) == (hashlib.sha256(file).hexdigest(), len(file))
    assert (about.model, about.pooling, about.padding) == (
        "models/vgg16",
        options_pb2.POOLING_MAX,
        options_pb2.PADDING_MIRROR,
    )
    assert about.model_sha256 == read_description(file)["weights_sha256"]
    assert (list(about.sizes_px), about.layers[0], about.layers[-1]) == ([48, 68, 96], "relu1_1", "relu5_1")
    assert [(image.sha256, image.weight) for image in about.images] == [
        (read_description(file)["images"][0]["sha256"], 1.0)
    ]
    assert [(grams.model, grams.size_px, list(grams.layers)) for grams in style.prepared] == [
        ("models/vgg16", size_px, list(about.layers)) for size_px in about.sizes_px
    ]
    assert await get(caller, "file-told") == style
    listed = await caller.styles.ListStyles(style_service_pb2.ListStylesRequest())
    assert style in list(listed.styles)
    assert (await importing(caller, file, "file-renamed", "Another name")).display_name == "Another name"


async def test_importing_again_gives_the_same_style(caller: Caller, file: bytes) -> None:
    """Under the same id, or under none; an id stands for one style, whether it has images or was imported."""
    first = await importing(caller, file, "file-again")
    assert await importing(caller, file, "file-again") == first
    nameless = [await importing(caller, file) for _ in range(2)]
    assert nameless[0] == nameless[1]

    other = changed(file, display_name="Another")
    await create(caller, "file-with-images", picture_bytes(32, 32))
    for call in (
        importing(caller, other, "file-again"),
        importing(caller, file, "file-again", "Another name"),
        importing(caller, file, "file-with-images"),
        caller.styles.CreateStyle(creation("file-again", picture_bytes(32, 32))),
    ):
        refusal = await caller.refusal(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS")


async def test_an_imported_style_is_exported_as_it_came(caller: Caller, file: bytes) -> None:
    """The same bytes, from any offset; refused if it does not serve what is named."""
    await importing(caller, file, "file-back")
    assert await exported(caller, "file-back") == file
    nothing_named = style_service_pb2.ExportStyleRequest(name="file-back", options={})
    assert whole([part async for part in caller.styles.ExportStyle(nothing_named)]) == file
    assert await exported(caller, "styles/file-back", model="models/vgg16", **OPTIONS) == file
    request = style_service_pb2.ExportStyleRequest(name="file-back", offset=100)
    assert whole([part async for part in caller.styles.ExportStyle(request)], file[:100]) == file
    for fields, field in (
        ({"model": "vgg19"}, "model"),
        ({"size_px": 64}, "options.size_px"),
        ({**OPTIONS, "pooling": "POOLING_L2"}, "options.pooling"),
    ):
        refusal = await caller.refusal(exported(caller, "file-back", **fields))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


# What it serves


async def test_mixed_with_other_styles(caller: Caller, file: bytes, painting: bytes, ask: Ask) -> None:
    """By weight, in a region, and beside images; a weight of 0 leaves it out."""
    await importing(caller, file, "file-mixed")
    mask = picture_bytes(96, 64, seed=5, mode="L")
    for styles in (
        [{"style": "file-mixed", "weight": 2}, {"image": {"data": painting}}],
        [{"style": "file-mixed", "region": {"data": mask}}, {"image": {"data": painting}}],
        [{"style": "file-mixed", "weight": 0}, {"image": {"data": painting}}],
    ):
        told = await caller.told(ask(styles=styles, **OPTIONS))
        assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED, told.job.error
        pixels = told.pixels
    alone = await caller.told(ask(styles=[{"image": {"data": painting}}], **OPTIONS))
    assert np.array_equal(pixels, alone.pixels)


@pytest.mark.parametrize(
    ("options", "field", "has"),
    [
        ({"size_px": 128}, "options.size_px", "48, 68, 96 px"),
        ({"first_size_px": 24}, "options.size_px", "48, 68, 96 px"),
        ({"style_scale": 0.5}, "options.size_px", "48, 68, 96 px"),
        ({"pooling": "POOLING_AVERAGE"}, "options.pooling", "must be max"),
        ({"padding": "PADDING_ZEROS"}, "options.padding", "must be mirror"),
        ({"style_layers": {"relu1_2": 1}}, "options.style_layers[relu1_2]", "relu1_1, relu2_1, relu3_1, relu4_1"),
        ({"style_loss": "STYLE_LOSS_SLICED"}, "options.style_loss", "gram"),
        ({"style_loss": "STYLE_LOSS_DIRECT"}, "options.style_loss", "wasserstein"),
        ({"color": "COLOR_CHOLESKY"}, "options.color", "only its moments"),
        ({"color": "COLOR_LUMINANCE"}, "options.color", "only its moments"),
        ({"init": "INIT_STYLE_STATISTICS"}, "options.init", "only its moments"),
    ],
    ids=str,
)
async def test_what_it_cannot_serve_is_refused_at_once(
    caller: Caller, file: bytes, ask: Ask, options: dict[str, Any], field: str, has: str
) -> None:
    """INVALID_ARGUMENT before anything is queued, naming the option and what the file has."""
    await importing(caller, file, "file-limited")
    refusal = await caller.refusal(ask(styles=[{"style": "file-limited"}], **(OPTIONS | options)))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert has in refusal.message


async def test_it_has_no_image_to_take_a_part_of(caller: Caller, file: bytes, ask: Ask) -> None:
    """A `style_region` is refused, naming it."""
    await importing(caller, file, "file-whole")
    style = {"style": "file-whole", "style_region": {"data": picture_bytes(64, 80)}}
    refusal = await caller.refusal(ask(styles=[style], **OPTIONS))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "styles[0].style_region")


async def test_other_weights_of_the_same_model_are_refused(caller: Caller, file: bytes, ask: Ask) -> None:
    """Moments of one network are nonsense for another, whatever both are called."""
    other = changed(file, weights_sha256="ab" * 32)
    await importing(caller, other, "file-foreign")
    refusal = await caller.refusal(ask(styles=[{"style": "file-foreign"}], **OPTIONS))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "model")
    assert "ab" * 32 in refusal.message


async def test_a_running_job_cannot_be_given_layers_that_it_lacks(
    serve: Serve, file: bytes, ask: Ask, tmp_path: Path
) -> None:
    """UpdateJob refuses them, whether the job runs, waits or was taken up by another server; others are taken."""
    server, client = await serve(data_dir=tmp_path / "kept")
    await importing(client, file, "steered")
    request = ask(styles=[{"style": "steered"}], **(OPTIONS | {"iterations": 5000}))
    job = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))

    async def update(caller: Caller, **layers: float) -> Any:
        options = options_pb2.StylizeOptions(style_layers=layers)
        return await caller.jobs.UpdateJob(style_transfer_service_pb2.UpdateJobRequest(name=job.name, options=options))

    async def refused(caller: Caller) -> None:
        refusal = await caller.refusal(update(caller, relu1_1=1, relu4_3=1))
        assert (refusal.code, refusal.field) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "options.style_layers[relu4_3]",
        )

    call = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=job.name))
    await read_until(call, "progress")
    call.cancel()
    await refused(client)
    assert dict((await update(client, relu1_1=2)).options.style_layers) == {"relu1_1": 2}
    paused = style_transfer_service_pb2.UpdateJobRequest(name=job.name, paused=True)
    await client.jobs.UpdateJob(paused)
    await refused(client)
    await delete(client, "steered")
    await server.stop(0)

    server, client = await serve(data_dir=tmp_path / "kept")
    await refused(client)
    assert dict((await update(client, relu2_1=1)).options.style_layers) == {"relu2_1": 1}
    await client.jobs.CancelJob(style_transfer_service_pb2.CancelJobRequest(name=job.name))


async def test_jobs_with_it_survive_a_restart(serve: Serve, file: bytes, ask: Ask, tmp_path: Path) -> None:
    """They go on at the next server, to the same picture, even if the style was deleted meanwhile."""
    server, client = await serve(data_dir=tmp_path / "kept", checkpoint_interval_s=0.1)
    await importing(client, file, "lasting")
    options = OPTIONS | {"iterations": 80}
    undisturbed = await client.told(ask(styles=[{"style": "lasting"}], **options))
    before = await get(client, "lasting")
    request = ask(styles=[{"style": "lasting"}], **options)
    job = await client.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=request))
    call = client.jobs.WatchJob(style_transfer_service_pb2.WatchJobRequest(name=job.name))
    while (await read_until(call, "progress")).progress.iteration < 20:
        pass
    call.cancel()
    await server.stop(0)

    server, client = await serve(data_dir=tmp_path / "kept")
    assert await get(client, "lasting") == before
    await delete(client, "lasting")
    told = await watched(client, job.name)
    assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED, told.job.error
    assert told.job.attempt == 2
    assert np.array_equal(told.pixels, undisturbed.pixels)


async def test_a_result_names_the_file(caller: Caller, file: bytes, ask: Ask) -> None:
    """Its parameters have the style's name and the SHA-256 of the style file."""
    await importing(caller, file, "file-named")
    told = await caller.told(ask(styles=[{"style": "file-named"}], **OPTIONS))
    parameters = json.loads(opened(told.result).getexif()[0x010E])
    sha256 = hashlib.sha256(file).hexdigest()
    assert parameters["styles"] == [{"sha256": [sha256], "weight": 1.0, "name": "styles/file-named"}]


async def test_the_same_request_is_the_same_job(caller: Caller, file: bytes, ask: Ask) -> None:
    """Idempotence holds for imported styles, too; another style under the same `request_id` is another request."""
    await importing(caller, file, "file-idempotent")
    other = changed(file, display_name="Other")
    await importing(caller, other, "file-different")
    first, second, third = (
        ask(styles=[{"style": style}], **OPTIONS) for style in ("file-idempotent", "file-idempotent", "file-different")
    )
    names = []
    for request in (first, second):
        request.request_id = "style-file-1"
        creation = style_transfer_service_pb2.CreateJobRequest(request=request)
        names.append((await caller.jobs.CreateJob(creation)).name)
    assert names[0] == names[1]
    third.request_id = "style-file-1"
    refusal = await caller.refusal(caller.jobs.CreateJob(style_transfer_service_pb2.CreateJobRequest(request=third)))
    assert refusal.reason == "REQUEST_ID_REUSED"
    await watched(caller, names[0])


async def test_the_file_that_a_job_holds_is_no_image(caller: Caller, file: bytes, ask: Ask) -> None:
    """It is kept with the job, and cannot be had or used as an image."""
    await importing(caller, file, "file-held")
    await caller.told(ask(styles=[{"style": "file-held"}], **OPTIONS))
    name = f"images/{hashlib.sha256(file).hexdigest()}"
    stub = image_service_pb2_grpc.ImageServiceStub(caller.channel)
    refusal = await caller.refusal(stub.GetImage(image_service_pb2.GetImageRequest(name=name)))
    assert refusal.code == grpc.StatusCode.NOT_FOUND
    request = ask(**OPTIONS)
    request.content.name = name
    refusal = await caller.refusal(request)
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "content.data")


# Bad files


def bad_files(data: bytes) -> dict[str, bytes]:
    """Return files that are no style files, or not as they were written."""
    nan = changed(data, lambda moments: moments[48]["relu1_1"]["mean"].fill_(float("nan")))
    return {
        "empty": b"",
        "text": b"a style, honestly",
        "zeros": bytes(1000),
        "an image": picture_bytes(32, 32),
        "a pickle": pickle.dumps({"relu1_1": [1.0]}),
        "a zip": b"PK\x03\x04" + bytes(100),
        "a zip bomb": zip_bomb(),
        "a zip of overlapping members": overlapping_zip(),
        "a huge header": (2**62).to_bytes(8, "little") + b'{"__metadata__":{}}',
        "a deep header": (200_000).to_bytes(8, "little") + b"{" + b'"a":{' * 39_999 + b" " * 4,
        "half": data[: len(data) // 2],
        "all but a byte": data[:-1],
        "a byte more": data + b"\0",
        "an altered description": data.replace(b"A travelling style", b"A travelling stule"),
        "an altered moment": data[:-4] + b"\x11" + data[-3:],
        "another version": data.replace(b'format_version\\":1', b'format_version\\":2'),
        "not a number": nan,
        "a layer less": changed(data, lambda moments: moments[68].pop("relu2_1")),
        "a matrix of another shape": changed(data, lambda m: m[48]["relu1_1"].update(mean=torch.zeros(3))),
        "an unknown model": resealed(data, model="vgg17"),
        "fewer channels at one size": changed(data, lambda m: m[48].update(relu5_1=moments_of(1))),
        "more channels than published": changed(data, lambda m: [m[edge].update(relu1_1=moments_of(65)) for edge in m]),
        "no channels": changed(data, lambda m: [m[edge].update(relu1_1=moments_of(0)) for edge in m]),
        "a layer twice": resealed(data, layers=["relu1_1"] * 2),
        "a size twice": resealed(data, sizes_px=[48, 48, 68, 96]),
        "a path for a hash": resealed(data, images=[{"sha256": "../../etc/passwd", "share": 1.0}]),
        "a name for terminals": resealed(data, display_name="\x1b]0;owned\x07"),
        "a name of half a character": half_a_character(),
        "many fields": b"\x0a\x00" * (2 << 20),
    }


def moments_of(channels: int) -> dict[str, torch.Tensor]:
    """Return the moments of a layer with that many channels."""
    return {"mean": torch.ones(channels), "gram": torch.eye(channels)}


def half_a_character() -> bytes:
    """Return a style file with a tensor whose name is half of a surrogate pair."""
    header = b'{"__metadata__":{"nst.json":"{}"},"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    return struct.pack("<Q", len(header)) + header


WORDS = {
    "a pickle": "never loaded",
    "a zip bomb": "more in it than its members",
    "fewer channels at one size": "at 68 px have 8 channels",
    "more channels than published": "relu1_1 at 48 px have 65 channels; the layer has at most 64",
    "a path for a hash": "64 hexadecimal digits",
    "half": "truncated",
    "an altered moment": "altered",
    "another version": "version 2",
    "not a number": "relu1_1 at 48 px are not finite",
    "an unknown model": "vgg17",
}
"""What the refusal of some bad files says."""


def zip_bomb() -> bytes:
    """Return a small archive of a large member."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/extra/nst.json", bytes(200 << 20))
    return buffer.getvalue()


def overlapping_zip(members: int = 40) -> bytes:
    """Return an archive in which each member contains all that come after it, without any compression."""
    body, central, offsets = bytes(1000), b"", []
    for number in reversed(range(members)):
        name = f"archive/{number:03}".encode()
        fixed = struct.pack("<HHHHHIIIHH", 20, 0, 0, 0, 33, zlib.crc32(body), len(body), len(body), len(name), 0)
        body = b"PK\x03\x04" + fixed + name + body
        offsets.append((len(body), fixed, name))
    for length, fixed, name in offsets:
        central += b"PK\x01\x02" + struct.pack("<H", 20) + fixed + struct.pack("<HHHII", 0, 0, 0, 0, len(body) - length)
        central += name
    return body + central + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, members, members, len(central), len(body), 0)


async def test_bad_files_are_refused(caller: Caller, file: bytes, tmp_path: Path) -> None:
    """INVALID_ARGUMENT naming `data`, whatever is wrong with it; nothing is stored."""
    bad = bad_files(file)
    assert len({file, *bad.values()}) == len(bad) + 1, "each is another, and none is the file itself"
    for what, data in bad.items():
        refusal = await caller.refusal(importing(caller, data, "bad"))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "data"), (what, refusal)
        if what in WORDS:
            assert WORDS[what] in refusal.message
    assert (await caller.refusal(get(caller, "bad"))).code == grpc.StatusCode.NOT_FOUND


async def test_a_pickle_in_disguise_is_not_executed(caller: Caller, tmp_path: Path) -> None:
    """Whatever it would do when it is loaded, it does not."""
    trace = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (trace,)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refusal = await caller.refusal(importing(caller, pickle.dumps(Trap(), protocol)))
        assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT
    assert not trace.exists()


async def test_random_damage_is_never_taken_for_a_style(caller: Caller, file: bytes) -> None:
    """A bit flipped anywhere, a piece cut out or doubled anywhere: INVALID_ARGUMENT, never INTERNAL, never a style."""
    chance = random.Random(0)
    for _ in range(60):
        at, length = chance.randrange(len(file)), chance.randrange(1, 200)
        flipped = file[:at] + bytes([file[at] ^ 1 << chance.randrange(8)]) + file[at + 1 :]
        cut = file[:at] + file[at + length :]
        doubled = file[:at] + file[at : at + length] + file[at:]
        for data in (flipped, cut, doubled):
            refusal = await caller.refusal(importing(caller, data))
            assert refusal.code == grpc.StatusCode.INVALID_ARGUMENT, (at, length, refusal)


async def test_bad_fields_are_refused(caller: Caller, file: bytes) -> None:
    """The id and the name, as of any style."""
    for call, field in (
        (importing(caller, file, "Capital"), "style_id"),
        (importing(caller, file, "x", "n" * 201), "display_name"),
        (importing(caller, file, "x", "two\nlines"), "display_name"),
    ):
        refusal = await caller.refusal(call)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)


@pytest.mark.parametrize(
    ("fields", "code", "field"),
    [
        ({"model": "vgg17"}, "NOT_FOUND", "model"),
        ({"model": "vgg19"}, "FAILED_PRECONDITION", None),
        ({"size_px": 15}, "INVALID_ARGUMENT", "options.size_px"),
        ({"size_px": 4000, "style_scale": 4}, "INVALID_ARGUMENT", "options.style_scale"),
        ({"style_layers": {"relu6_1": 1}}, "INVALID_ARGUMENT", "options.style_layers[relu6_1]"),
        ({"pooling": 9}, "INVALID_ARGUMENT", "options.pooling"),
        ({"size_px": 32, "style_scale": 0.5}, "INVALID_ARGUMENT", "name"),
        ({"offset": -1}, "INVALID_ARGUMENT", "offset"),
        ({"offset": 2**40}, "INVALID_ARGUMENT", "offset"),
    ],
    ids=str,
)
async def test_bad_exports_are_refused(caller: Caller, fields: dict[str, Any], code: str, field: str | None) -> None:
    """Each field; a style that would be too thin to be seen by the model is named, too."""
    await create(caller, "file-exportable", picture_bytes(64, 24, seed=3))
    refusal = await caller.refusal(exported(caller, "file-exportable", **{"size_px": 64, **fields}))
    assert (refusal.code.name, refusal.field) == (code, field)


async def test_styles_that_are_not_there_are_not_found(caller: Caller) -> None:
    """NOT_FOUND naming the field, whatever the name."""
    for name in ("", "none", "styles/none", "../escape", "a\0b"):
        refusal = await caller.refusal(exported(caller, name))
        assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, "name")


# What is kept


async def test_a_damaged_style_file_is_said(serve: Serve, file: bytes, ask: Ask) -> None:
    """A job is refused, and so is an export; deleting and importing again mends it."""
    server, client = await serve()
    await importing(client, file, "damaged")
    (kept,) = (server._settings.data_dir / "styles" / "damaged").glob("*.safetensors")
    assert kept.read_bytes() == file
    kept.write_bytes(file[:-1] + b"x")
    request = ask(styles=[{"style": "damaged"}], **OPTIONS)
    for call, field in ((request, "styles[0].style"), (exported(client, "damaged"), "name")):
        refusal = await client.refusal(call)
        assert (refusal.code, refusal.field) == (grpc.StatusCode.NOT_FOUND, field)
        assert "delete it and import it again" in refusal.message
    await delete(client, "damaged")
    await importing(client, file, "damaged")
    assert (await client.told(request)).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_a_full_disk_is_said(serve: Serve, file: bytes, tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED, and nothing of the style is left."""
    (tmp_path / "data").mkdir()
    with small_disk(tmp_path / "data" / "styles") as folder:
        server, client = await serve(data_dir=tmp_path / "data")
        with contextlib.suppress(OSError), (folder / "filling").open("wb") as stream:
            while True:
                stream.write(bytes(4096))
                stream.flush()
        refusal = await client.refusal(importing(client, file, "large"))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert [entry.name for entry in folder.iterdir()] == ["filling"]
        (folder / "filling").unlink()
        assert (await importing(client, file, "large")).name == "styles/large"
        await server.stop(0)


async def test_importing_is_cheap_for_the_front(caller: Caller, file: bytes) -> None:
    """Many at once do not keep it from answering."""
    imports = asyncio.gather(*(importing(caller, file, f"many-{number}") for number in range(20)))
    began = asyncio.get_running_loop().time()
    await get(caller, (await importing(caller, file)).name)
    assert asyncio.get_running_loop().time() - began < 5
    assert len(await imports) == 20
    for number in range(20):
        await delete(caller, f"many-{number}")
