"""Stored styles: created once, kept on disk, listed in pages, deleted; their Gram matrices computed once."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import safetensors.torch

from nst.v1 import job_pb2, style_service_pb2, style_transfer_service_pb2
from nst_server import Server
from tests.conftest import picture_bytes
from tests.server.conftest import FOREVER, QUEUE_SIZE, QUICK, Caller, noise, read_until, until

Ask = Callable[..., style_transfer_service_pb2.StylizeRequest]

DEFAULT_STYLE_LAYERS = ["relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"]


def creation(style_id: str = "", *images: bytes, weights: tuple[float, ...] = (), **fields: Any) -> Any:
    """Return a CreateStyle request; a picture of its own for each id if no images are given."""
    files = images or (picture_bytes(64, 48, seed=int.from_bytes(style_id.encode()[:4])),)
    described = [{"image": {"data": data}} for data in files]
    for image, weight in zip(described, weights, strict=bool(weights)):
        image["weight"] = weight
    return style_service_pb2.CreateStyleRequest(style_id=style_id, style={"images": described, **fields})


async def create(caller: Caller, *arguments: Any, **fields: Any) -> style_service_pb2.Style:
    """Create a style and return it as the server does."""
    return await caller.styles.CreateStyle(creation(*arguments, **fields))


async def get(caller: Caller, name: str) -> style_service_pb2.Style:
    """Return a style."""
    return await caller.styles.GetStyle(style_service_pb2.GetStyleRequest(name=name))


async def delete(caller: Caller, name: str) -> None:
    """Delete a style."""
    await caller.styles.DeleteStyle(style_service_pb2.DeleteStyleRequest(name=name))


async def prepared(caller: Caller, name: str) -> style_service_pb2.Style:
    """Wait until the Gram matrices for the defaults are on disk; return the style."""
    async with asyncio.timeout(20):
        while True:
            style = await get(caller, name)
            if style.prepared and len(style.prepared[0].layers) == len(DEFAULT_STYLE_LAYERS):
                return style
            await asyncio.sleep(0.02)


async def test_a_created_style_tells_what_it_is(caller: Caller) -> None:
    """Name, hashes, sizes and weights; never the image itself."""
    wide, tall = picture_bytes(80, 40, seed=3), picture_bytes(40, 60, seed=4, format="JPEG")
    style = await create(caller, "two-images", wide, tall, weights=(3.0, 1.0), display_name="Zwei Bilder")

    assert style.name == "styles/two-images"
    assert style.display_name == "Zwei Bilder"
    assert [image.sha256 for image in style.images] == [hashlib.sha256(data).hexdigest() for data in (wide, tall)]
    assert [(image.width, image.height) for image in style.images] == [(80, 40), (40, 60)]
    assert [image.weight for image in style.images] == [3.0, 1.0]
    assert not any(image.HasField("image") for image in style.images)
    assert style.HasField("create_time")
    assert await get(caller, "styles/two-images") == await get(caller, "two-images")


async def test_grams_for_the_defaults_are_prepared_when_a_device_is_idle(caller: Caller) -> None:
    """`prepared` lists the server's default model, the default size and the default layers, in the model's order."""
    await create(caller, "prepared")
    (grams,) = (await prepared(caller, "prepared")).prepared

    assert (grams.model, grams.size_px) == ("models/vgg16", 512)
    assert list(grams.layers) == DEFAULT_STYLE_LAYERS


async def test_every_image_of_a_style_is_prepared(caller: Caller) -> None:
    """Also when there are more of them than jobs may wait: a style is prepared only if all its images are."""
    await create(caller, "manifold", *(picture_bytes(24, 24, seed=seed) for seed in range(100, 100 + 2 * QUEUE_SIZE)))
    assert (await prepared(caller, "manifold")).prepared


async def test_a_busy_device_does_not_prepare(caller: Caller, shared: Server) -> None:
    """A running job goes first; what was to be prepared is prepared once it has ended."""
    request = style_transfer_service_pb2.StylizeRequest(
        content={"data": picture_bytes(64, 64)},
        styles=[{"image": {"data": picture_bytes(64, 64, seed=2)}}],
        options=QUICK | FOREVER,
    )
    call = caller.jobs.Stylize(request)
    await read_until(call, "progress")
    await create(caller, "patient")
    await asyncio.sleep(0.3)
    assert not (await get(caller, "patient")).prepared
    call.cancel()
    assert (await prepared(caller, "patient")).prepared


async def test_creating_again_gives_the_same_style(caller: Caller) -> None:
    """Same content under the same id, or under none: the same style, with its first create_time."""
    first = await create(caller, "again")
    second = await create(caller, "again")
    assert (second.name, second.create_time) == (first.name, first.create_time)

    nameless = [await create(caller, "", picture_bytes(50, 40, seed=9)) for _ in range(2)]
    assert nameless[0].name == nameless[1].name
    assert nameless[0].create_time == nameless[1].create_time
    other = await create(caller, "", picture_bytes(50, 40, seed=10))
    assert other.name != nameless[0].name


@pytest.mark.parametrize(
    "changed",
    [
        creation("taken", picture_bytes(64, 48, seed=99)),
        creation("taken", picture_bytes(64, 48, seed=1), picture_bytes(64, 48, seed=2)),
        creation("taken", picture_bytes(64, 48, seed=1), display_name="Another"),
    ],
    ids=["image", "number of images", "display name"],
)
async def test_an_id_stands_for_one_style(caller: Caller, changed: Any) -> None:
    """Other content under a taken id is ALREADY_EXISTS, and the style stays as it was."""
    await create(caller, "taken", picture_bytes(64, 48, seed=1))
    before = await get(caller, "taken")

    refusal = await caller.refusal(caller.styles.CreateStyle(changed))

    assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
    assert (refusal.reason, refusal.domain) == ("ALREADY_EXISTS", "nst")
    after = await get(caller, "taken")
    assert (after.images, after.create_time) == (before.images, before.create_time)


async def test_one_of_many_creators_at_once_wins(caller: Caller) -> None:
    """Ten with the same id and different content: one succeeds, nine are refused; ten with the same content agree."""
    calls = [caller.styles.CreateStyle(creation("race", picture_bytes(64, 48, seed=seed))) for seed in range(10)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
    assert len(refused) == 9
    assert {error.code() for error in refused} == {grpc.StatusCode.ALREADY_EXISTS}

    same = await asyncio.gather(*(create(caller, "agreement") for _ in range(10)))
    assert len({style.create_time.ToNanoseconds() for style in same}) == 1


@pytest.mark.parametrize(
    "style_id", ["Capital", "1st", "-a", "a-", "a_b", "a/b", "..", "ä", "a" * 64, "a\n", " ", "styles/x"]
)
async def test_malformed_ids_are_refused(caller: Caller, style_id: str) -> None:
    """INVALID_ARGUMENT naming `style_id`; and nothing is found under such a name."""
    refusal = await caller.refusal(caller.styles.CreateStyle(creation(style_id, picture_bytes(32, 32))))
    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, "style_id")

    for call in (get(caller, style_id), delete(caller, style_id)):
        refusal = await caller.refusal(call)
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "NOT_FOUND")
        assert refusal.field == "name"


@pytest.mark.parametrize("style_id", ["a", "a" * 63, "starry-night-2"])
async def test_well_formed_ids_are_taken(caller: Caller, style_id: str) -> None:
    """From one letter to 63 characters."""
    assert (await create(caller, style_id)).name == f"styles/{style_id}"
    await delete(caller, style_id)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (style_service_pb2.CreateStyleRequest(), "style.images"),
        (creation("x", *[picture_bytes(32, 32)] * 17), "style.images"),
        (creation("x", b"no image"), "style.images[0].image.data"),
        (creation("x", picture_bytes(32, 32), b""), "style.images[1].image.data"),
        (creation("x", picture_bytes(15, 200)), "style.images[0].image.data"),
        (creation("x", picture_bytes(16, 5000)), "style.images[0].image.data"),
        (creation("x", picture_bytes(32, 32), weights=(float("nan"),)), "style.images[0].weight"),
        (creation("x", picture_bytes(32, 32), weights=(-1.0,)), "style.images[0].weight"),
        (creation("x", picture_bytes(32, 32), weights=(0.0,)), "style.images"),
        (creation("x", picture_bytes(32, 32), display_name="n" * 201), "style.display_name"),
        (creation("x", picture_bytes(32, 32), display_name="two\nlines"), "style.display_name"),
    ],
)
async def test_bad_styles_are_refused_naming_the_field(caller: Caller, request_: Any, field: str) -> None:
    """INVALID_ARGUMENT, and nothing is stored."""
    refusal = await caller.refusal(caller.styles.CreateStyle(request_))

    assert (refusal.code, refusal.field) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert (await caller.refusal(get(caller, "x"))).code == grpc.StatusCode.NOT_FOUND


async def test_styles_are_listed_in_pages(caller: Caller) -> None:
    """In the order of their names, each once, whatever the page size; also while some are deleted between pages."""
    for letter in "dbca":
        await create(caller, f"page-{letter}")
    whole = (await caller.styles.ListStyles(style_service_pb2.ListStylesRequest())).styles
    names = [style.name for style in whole]
    assert names == sorted(names)
    assert [name for name in names if "page-" in name] == [f"styles/page-{letter}" for letter in "abcd"]

    for page_size in (1, 2, len(names), 100):
        listed, token = [], ""
        while True:
            request = style_service_pb2.ListStylesRequest(page_size=page_size, page_token=token)
            response = await caller.styles.ListStyles(request)
            assert len(response.styles) <= page_size
            listed += [style.name for style in response.styles]
            if not (token := response.next_page_token):
                break
        assert listed == names

    first = await caller.styles.ListStyles(
        style_service_pb2.ListStylesRequest(page_size=names.index("styles/page-b") + 1)
    )
    await delete(caller, "page-b")
    request = style_service_pb2.ListStylesRequest(page_size=1, page_token=first.next_page_token)
    assert [style.name for style in (await caller.styles.ListStyles(request)).styles] == ["styles/page-c"]


async def test_a_deleted_style_is_gone(caller: Caller, ask: Ask) -> None:
    """NOT_FOUND for every later use, and its id is free for another."""
    await create(caller, "gone", picture_bytes(64, 48, seed=1))
    await delete(caller, "styles/gone")

    for call in (get(caller, "gone"), delete(caller, "gone"), caller.told(ask(styles=[{"style": "gone"}]))):
        assert (await caller.refusal(call)).code == grpc.StatusCode.NOT_FOUND
    await create(caller, "gone", picture_bytes(64, 48, seed=2))
    await delete(caller, "gone")


async def test_a_job_goes_on_when_its_style_is_deleted(caller: Caller, ask: Ask) -> None:
    """Jobs already accepted have what they need, running or queued."""
    await create(caller, "fleeting")
    await prepared(caller, "fleeting")
    running = caller.jobs.Stylize(ask(styles=[{"style": "fleeting"}], **FOREVER))
    await read_until(running, "progress")
    queued = asyncio.create_task(caller.told(ask(styles=[{"style": "styles/fleeting"}])))
    await asyncio.sleep(0.2)

    await delete(caller, "fleeting")

    assert (await read_until(running, "progress")).progress.iteration > 0
    running.cancel()
    assert (await queued).job.state == job_pb2.JOB_STATE_SUCCEEDED


async def test_a_stored_style_gives_the_same_picture_as_its_images(caller: Caller, ask: Ask) -> None:
    """Bit for bit: one image or several with weights, stored or brought along; bare id or full name."""
    wide, tall = picture_bytes(80, 40, seed=5), picture_bytes(40, 60, seed=6)
    await create(caller, "mixed", wide, tall, weights=(3.0, 1.0))
    await create(caller, "single", wide)

    def inline(data: bytes, weight: float) -> dict[str, Any]:
        return {"image": {"data": data}, "weight": weight}

    async def losses(styles: Any) -> tuple[bytes, list[float]]:
        told = await caller.told(ask(styles=styles, size_px=64, iterations=3))
        return told.pixels.tobytes(), [progress.loss for progress in told.progress]

    assert await losses([{"style": "mixed"}]) == await losses([inline(wide, 6.0), inline(tall, 2.0)])
    assert await losses([{"style": "styles/single"}]) == await losses([inline(wide, 1.0)])
    halves = [{"style": "single", "weight": 3.0}, inline(tall, 1.0)]
    assert await losses(halves) == await losses([{"style": "mixed"}])
    assert await losses([{"style": "single"}]) != await losses([{"style": "mixed"}])


async def test_gram_matrices_are_computed_once(caller: Caller, ask: Ask, shared: Server) -> None:
    """A second job reads the file that the first one wrote: with another Gram matrix in it, the loss is another."""
    await create(caller, "once")
    style = await prepared(caller, "once")
    request = ask(styles=[{"style": "once"}], size_px=64, iterations=1, style_layers={"relu2_1": 1.0})
    first = await caller.told(request)
    (file,) = gram_files(shared, style.images[0].sha256, "64px-of-64-*/relu2_1")

    moments = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor * 2 for name, tensor in moments.items()}, file)
    second = await caller.told(request)

    assert second.progress[0].loss != first.progress[0].loss
    safetensors.torch.save_file(moments, file)
    third = await caller.told(request)
    assert third.progress[0].loss == first.progress[0].loss


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None], ids=["empty", "garbage", "cut"])
async def test_a_damaged_gram_file_is_made_anew(caller: Caller, ask: Ask, shared: Server, damage: bytes | None) -> None:
    """The job that finds it computes the matrix, gets the same picture as before, and the file is whole again."""
    await create(caller, "damaged")
    style = await prepared(caller, "damaged")
    request = ask(styles=[{"style": "damaged"}], size_px=64)
    before = await caller.told(request)
    (file,) = gram_files(shared, style.images[0].sha256, "64px-of-64-*/relu1_1")
    whole = file.read_bytes()

    file.write_bytes(whole[:-10] if damage is None else damage)
    after = await caller.told(request)

    assert np.array_equal(before.pixels, after.pixels)
    assert file.read_bytes() == whole


async def test_styles_survive_a_restart(serve: Callable[..., Any], tmp_path: Path, ask: Ask) -> None:
    """A new server on the same folder has them with all they were, prepared Grams too; what was half done is gone."""
    server, client = await serve(data_dir=tmp_path / "kept")
    created = await create(client, "lasting", picture_bytes(64, 48), display_name="Lasting")
    await prepared(client, "lasting")
    picture = (await client.told(ask(styles=[{"style": "lasting"}]))).pixels
    before = await get(client, "lasting")
    await server.stop(0)
    styles = tmp_path / "kept" / "styles"
    (styles / ".new-torn").mkdir()
    (styles / ".new-torn" / "x.image").write_bytes(b"half")
    (styles / "torn").mkdir()
    (styles / "torn" / "x.image").write_bytes(b"half")
    shutil.copytree(styles / "lasting", styles / "broken")
    (styles / "broken" / "style.json").write_text('{"id": "broken", "imag')

    _, client = await serve(data_dir=tmp_path / "kept")

    after = await get(client, "lasting")
    assert after == before
    assert [grams.size_px for grams in after.prepared] == [48, 512]
    assert after.create_time == created.create_time
    assert np.array_equal((await client.told(ask(styles=[{"style": "lasting"}]))).pixels, picture)
    assert not (styles / ".new-torn").exists()
    # A folder that is damaged hides no other style, is not found, and can be deleted.
    listed = await client.styles.ListStyles(style_service_pb2.ListStylesRequest())
    assert [style.name for style in listed.styles] == ["styles/lasting"]
    for damaged in ("torn", "broken"):
        assert (await client.refusal(get(client, damaged))).code == grpc.StatusCode.NOT_FOUND
        refusal = await client.refusal(client.styles.CreateStyle(creation(damaged, picture_bytes(32, 32))))
        assert refusal.code == grpc.StatusCode.ALREADY_EXISTS
        assert "damaged" in refusal.message
        await delete(client, damaged)
        assert (await create(client, damaged)).name == f"styles/{damaged}"


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of one MiB. Skips the test where that cannot be had."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only a superuser can mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_a_full_or_read_only_data_folder_is_said_clearly(
    serve: Callable[..., Any], tmp_path: Path, ask: Ask
) -> None:
    """RESOURCE_EXHAUSTED or FAILED_PRECONDITION, for jobs too, which must be durable; deleting makes room."""
    with small_disk(tmp_path / "disk") as disk:
        server, client = await serve(data_dir=disk / "data")
        await create(client, "fits", noise(300, 300))
        await prepared(client, "fits")

        refusal = await client.refusal(client.styles.CreateStyle(creation("large", noise(900, 900))))
        assert refusal.code == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (refusal.reason, refusal.domain) == ("STORAGE_FULL", "nst")
        assert not list((disk / "data" / "styles").glob(".*"))

        filling = disk / "filling"
        with contextlib.suppress(OSError), filling.open("wb") as stream:
            while True:
                stream.write(bytes(4096))
                stream.flush()
        refusal = await client.refusal(ask(styles=[{"style": "fits"}], size_px=80))
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
        assert not list((disk / "data" / "grams").rglob("*.partial"))
        await delete(client, "fits")
        filling.unlink()
        await create(client, "fits", noise(300, 300))
        await until(lambda: not server._application.scheduler._preparations)

        told = await client.told(ask(styles=[{"style": "fits"}], size_px=80))
        assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
        await server.stop(0)


async def test_a_read_only_folder_of_styles_is_said_clearly(
    serve: Callable[..., Any], tmp_path: Path, ask: Ask
) -> None:
    """FAILED_PRECONDITION for what would write there; jobs go on."""
    (tmp_path / "data").mkdir()
    with small_disk(tmp_path / "data" / "styles") as styles:
        server, client = await serve(data_dir=tmp_path / "data")
        await create(client, "fits", noise(300, 300))
        subprocess.run(["mount", "-o", "remount,ro", str(styles)], check=True)
        for call in (client.styles.CreateStyle(creation("more")), delete(client, "fits")):
            refusal = await client.refusal(call)
            assert refusal.code == grpc.StatusCode.FAILED_PRECONDITION
            assert (refusal.reason, refusal.domain) == ("STORAGE_READ_ONLY", "nst")
            assert "cannot be written to" in refusal.message
        told = await client.told(ask(styles=[{"style": "fits"}], size_px=96))
        assert told.job.state == job_pb2.JOB_STATE_SUCCEEDED
        await server.stop(0)


def gram_files(server: Server, sha256: str, pattern: str) -> list[Path]:
    """Return the Gram files of an image."""
    return list(server._settings.data_dir.glob(f"grams/*/{sha256}/{pattern}.safetensors"))
