"""Jobs in SQLite, in PostgreSQL and in memory behave alike."""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from nst_server.errors import JobEnded, NotFound, RequestIdReused, StorageUnavailable
from nst_server.storage.database import MEMORY, JobStore
from nst_server.storage.faults import LeaseLost, OutOfSequence, SchemaNewer
from nst_server.storage.records import Batch, EventRecord, Fence, ImageRecord, JobRecord, UploadRecord
from nst_server.storage.tables import metadata

NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
SECOND = timedelta(seconds=1)
IMAGES = ["0" * 64, "1" * 64, "2" * 64, "3" * 64]


def job(id: str = "a", after_s: float = 0, **fields: Any) -> JobRecord:
    """Return a new job, created some seconds after the others."""
    return JobRecord(id, NOW + after_s * SECOND, **fields)


def events(first: int, last: int, kind: str = "progress") -> list[EventRecord]:
    """Return events with the given numbers."""
    return [
        EventRecord(number, 1, NOW + number * SECOND, kind, {"iteration": number}) for number in range(first, last + 1)
    ]


def image(sha256: str, last_used_s: float = 0, size: int = 10) -> ImageRecord:
    """Return an image that was last used some seconds from NOW."""
    return ImageRecord(sha256, size, 3, 4, "image/png", "me", NOW, NOW + last_used_s * SECOND)


async def nothing(sha256s: Sequence[str]) -> None:
    """Remove no blobs: there are none."""


async def leased(store: JobStore, id: str = "a", owner: str = "w") -> Fence:
    """Take the jobs that nobody has, and begin an attempt at one; return the fence of its holder."""
    await store.claim(owner, NOW + 10 * SECOND, NOW)
    taken = await store.attempt(id, owner)
    assert taken is not None
    return Fence(taken.owner, taken.attempt)


async def ended(store: JobStore, id: str, after_s: float, images: Sequence[str] = ()) -> None:
    """Store a job that holds images and has ended."""
    await store.create(job(id))
    await store.append(id, changes={"state": "succeeded", "end_time": NOW + after_s * SECOND}, images=images)


async def test_a_job_comes_back_as_it_was_stored(store: JobStore) -> None:
    """Every column, losses that are no numbers and times of other zones among them."""
    full = JobRecord(
        id="a",
        create_time=NOW.astimezone(timezone(timedelta(hours=5))),
        caller="me ☃",
        request_id="r",
        request_sha256="5" * 64,
        model="vgg19",
        width=640,
        height=480,
        request={"styles": [{"weight": 0.1}], "text": "ä\0\n"},
        options={"iterations": 2**53},
        start_time=NOW,
        end_time=NOW + SECOND,
        attempt=3,
        owner="w",
        lease_until=NOW,
        device="cuda:0",
        precision="fp32",
        progress={"loss": math.inf},
        result={},
        error={"reason": "X"},
        checkpoint={"key": "k"},
        command={"pause": True},
    )

    stored, new = await store.create(full)

    assert new
    assert stored == await store.get("a") == full
    assert stored.create_time.tzinfo == stored.lease_until.tzinfo == UTC
    await store.append("a", changes={"progress": {"loss": math.nan}, "error": None})
    changed = await store.get("a")
    assert math.isnan(changed.progress["loss"])
    assert changed.error is None


async def test_a_time_without_a_zone_is_refused(store: JobStore) -> None:
    """Nobody could say later which moment it was."""
    with pytest.raises(Exception, match="has no time zone"):
        await store.create(JobRecord("a", datetime(2026, 1, 1)))

    assert await store.list() == []


async def test_a_repeated_request_gives_the_same_job(store: JobStore) -> None:
    """With another payload it is an error; other callers, and jobs without request ids, are apart."""
    await store.create(job("a", caller="me", request_id="r", request_sha256="1"), events(1, 2))

    again, new = await store.create(job("b", caller="me", request_id="r", request_sha256="1"), events(1, 1))
    assert (again.id, new) == ("a", False)
    assert await store.find("me", "r") == again
    assert [event.sequence for event in await store.events("a")] == [1, 2]
    with pytest.raises(RequestIdReused, match="'r' belongs to job 'a'"):
        await store.create(job("c", caller="me", request_id="r", request_sha256="2"))
    assert (await store.create(job("d", caller="you", request_id="r", request_sha256="2")))[1]
    assert (await store.create(job("e")))[1]
    assert (await store.create(job("f")))[1]
    assert await store.find("", "") is None
    assert {record.id for record in await store.list()} == {"a", "d", "e", "f"}


async def test_one_request_from_32_threads_is_one_job(shared_where: Path | str) -> None:
    """Each with a connection of its own, the first that comes makes the database; all learn of the same job."""
    gate = threading.Barrier(32)

    async def create(number: int) -> tuple[JobRecord, bool]:
        gate.wait()
        store = await JobStore.open(shared_where)
        try:
            return await store.create(job(f"job{number}", request_id="r", request_sha256="1"), events(1, 1))
        finally:
            await store.close()

    with ThreadPoolExecutor(32) as threads:
        made = await asyncio.gather(
            *[asyncio.get_running_loop().run_in_executor(threads, asyncio.run, create(number)) for number in range(32)]
        )

    assert sum(new for _, new in made) == 1
    assert len({record.id for record, _ in made}) == 1
    store = await JobStore.open(shared_where)
    assert [record.id for record in await store.list()] == [made[0][0].id]
    await store.close()


async def test_one_request_from_32_tasks_is_one_job(store: JobStore) -> None:
    """In memory too, where there is one connection for all."""
    made = await asyncio.gather(*[store.create(job(f"{n}", request_id="r", request_sha256="1")) for n in range(32)])

    assert sum(new for _, new in made) == 1
    assert len(await store.list()) == 1


async def test_jobs_are_listed_newest_first_page_by_page(store: JobStore) -> None:
    """By caller and by state; jobs of the same moment by id."""
    for id, after_s, caller in (("a", 0, "me"), ("b", 1, "you"), ("c", 1, "me"), ("d", 2, "me")):
        await store.create(job(id, after_s, caller=caller))
    await store.append("c", changes={"state": "cancelled"})

    async def listed(*arguments: Any) -> str:
        return "".join(record.id for record in await store.list(*arguments))

    assert await listed() == "dcba"
    assert await listed("me") == "dca"
    assert await listed("nobody") == ""
    assert await listed(None, ["queued"]) == "dba"
    assert await listed("me", ["cancelled", "failed"]) == "c"
    assert await listed(None, [], 2) == "dc"
    assert await listed(None, [], 2, (NOW + SECOND, "c")) == "ba"
    assert await listed(None, [], 2, (NOW, "a")) == ""


async def test_what_is_not_there_is_not_found(store: JobStore) -> None:
    """A job, an image, an upload; nothing is made by looking."""
    for missing in (
        store.get("x"),
        store.delete("x", nothing),
        store.append("x", changes={"device": "cpu"}),
        store.image(IMAGES[0]),
        store.upload("x"),
    ):
        with pytest.raises(NotFound, match="there is no"):
            await missing
    assert await store.attempt("x", "w") is None
    assert not await store.command("x", {"cancel": True})
    assert await store.events("x") == []


async def test_a_deleted_job_takes_its_events_along(store: JobStore) -> None:
    """And is gone after that."""
    await store.create(job(), events(1, 3))

    await store.delete("a", nothing)

    assert await store.events("a") == []
    with pytest.raises(NotFound):
        await store.delete("a", nothing)


async def test_a_job_is_claimed_once(store: JobStore) -> None:
    """By one of many who try; it can be renewed, and each attempt has a number of its own."""
    for id, after_s in (("b", 1), ("a", 0), ("c", 2)):
        await store.create(job(id, after_s))

    claims = await asyncio.gather(*[store.claim(f"w{number}", NOW + SECOND, NOW) for number in range(8)])

    (taken,) = [records for records in claims if records]
    assert [record.id for record in taken] == ["a", "b", "c"]
    owner = taken[0].owner
    assert [(record.attempt, record.lease_until, record.state) for record in taken] == [(0, NOW + SECOND, "queued")] * 3
    assert await store.attempt("a", "w99") is None
    begun = await asyncio.gather(*[store.attempt("a", owner) for _ in range(3)])
    assert sorted(record.attempt for record in begun if record) == [1, 2, 3]
    await store.append("a", Fence(owner, 3), changes={"state": "running"})
    assert await store.attempt("a", owner) is None
    assert await store.renew(owner, NOW + 5 * SECOND) == {"a": None, "b": None, "c": None}
    assert (await store.get("a")).lease_until == NOW + 5 * SECOND
    assert await store.renew("w99", NOW) == {}


async def test_a_lost_lease_is_claimed(store: JobStore) -> None:
    """When its time is over or its owner gives it up, and only then; the job is as it was, paused or not."""
    for id, owner in (("a", "w1"), ("b", "w2"), ("c", "w2")):
        await store.create(job(id))
        fence = await leased(store, id, owner)
        await store.append(id, fence, changes={"state": "paused" if id == "c" else "running"})
    await store.renew("w2", NOW + 100 * SECOND)

    assert await store.claim("w3", NOW + 99 * SECOND, NOW + 10 * SECOND) == []
    (back,) = await store.claim("w3", NOW + 99 * SECOND, NOW + 11 * SECOND)
    assert (back.id, back.state, back.owner, back.attempt) == ("a", "running", "w3", 1)
    assert await store.release("w1") == []
    assert sorted(await store.release("w2")) == ["b", "c"]
    found = await store.claim("w4", NOW + 99 * SECOND, NOW)
    assert [(record.id, record.state) for record in found] == [("b", "running"), ("c", "paused")]
    assert [record.id for record in await store.claim("w5", NOW + 99 * SECOND)] == ["a", "b", "c"]


async def test_a_command_stays_until_it_is_obeyed(store: JobStore) -> None:
    """The owner hears of it with each renewal of its leases; a second one has to wait, and an ended job takes none."""
    for id in "ab":
        await store.create(job(id))
        await leased(store, id)

    assert await store.command("a", {"cancel": True})
    assert not await store.command("a", {"finish": True})
    assert await store.renew("other", NOW) == {}
    for _ in range(2):
        assert await store.renew("w", NOW + SECOND) == {"a": {"cancel": True}, "b": None}
    await store.obeyed("a", "other")
    assert not await store.command("a", {"finish": True})
    await store.obeyed("a", "w")
    assert await store.renew("w", NOW + SECOND) == {"a": None, "b": None}
    assert await store.command("a", {"finish": True})
    (left,) = [record for record in await store.claim("next", NOW + SECOND) if record.id == "a"]
    assert left.command == {"finish": True}
    await store.append("b", changes={"state": "failed"})
    assert not await store.command("b", {"cancel": True})


async def test_a_stale_worker_is_refused(store: JobStore) -> None:
    """What it still writes after its lease was lost harms nothing, even if it is itself the next to take the job."""
    await store.create(job(), events(1, 1, "state"))
    stale = await leased(store)
    await store.append("a", stale, events(2, 3), {"state": "running"})
    await store.append("a", stale, changes={"state": "queued"})
    await store.release("w")

    with pytest.raises(LeaseLost, match="nobody has attempt 1"):
        await store.append("a", stale, events(4, 4), {"progress": {"iteration": 4}})
    fresh = await leased(store)
    with pytest.raises(LeaseLost, match="w lost attempt 1 of job 'a'; w has attempt 2"):
        await store.append("a", stale, events(4, 4), {"checkpoint": {"key": "stale"}})
    await store.append("a", fresh, events(4, 5), {"checkpoint": {"key": "fresh"}})

    assert [event.sequence for event in await store.events("a")] == [1, 2, 3, 4, 5]
    now = await store.get("a")
    assert (now.checkpoint, now.progress, now.sequence) == ({"key": "fresh"}, None, 5)


async def test_events_are_numbered_without_gaps(store: JobStore) -> None:
    """One that repeats a number, leaves one out or comes too late is refused with all that came along."""
    await store.create(job(), events(1, 2))

    for wrong in (
        events(2, 3),
        events(4, 4),
        [*events(3, 3), *events(5, 5)],
        [*events(3, 3), *events(3, 3)],
    ):
        with pytest.raises(OutOfSequence, match="the next event of job 'a' is 3; these are"):
            await store.append("a", None, wrong, {"device": "cpu"})
    with pytest.raises(OutOfSequence):
        await store.create(job("b"), events(2, 2))
    await store.append("a", None, events(1, 2), {"device": "cpu"})  # as after a commit whose answer was lost

    assert await store.events("a") == events(1, 2)
    assert [record.device for record in await store.list()] == [""]


async def test_events_are_replayed_from_any_number(store: JobStore) -> None:
    """In order, at most as many as wanted."""
    await store.create(job(), events(1, 25))

    assert await store.events("a", 20) == events(21, 25)
    assert await store.events("a", 10, 3) == events(11, 13)
    assert await store.events("a", 25) == []


async def test_compaction_drops_progress_only(store: JobStore) -> None:
    """Up to a number, which the job remembers and which never falls."""
    await store.create(job(), [*events(1, 1, "state"), *events(2, 5), *events(6, 6, "state"), *events(7, 9)])

    await store.compact("a", 7)
    await store.compact("a", 3)

    assert [event.sequence for event in await store.events("a")] == [1, 6, 8, 9]
    assert (await store.get("a")).compacted == 7
    await store.append("a", None, events(10, 10))


@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
async def test_an_ended_job_stays_ended(store: JobStore, end: str) -> None:
    """No event follows, no state; its lease is gone. Columns can still be cleared."""
    await store.create(job(), events(1, 1))
    fence = await leased(store)
    await store.append("a", fence, events(2, 2), {"state": end, "end_time": NOW, "checkpoint": {"key": "k"}})

    for late in ("queued", "running", "succeeded", "failed", "cancelled"):
        with pytest.raises(JobEnded, match=f"'a' has {end}"):
            await store.append("a", fence, events(3, 3), {"state": late})
    with pytest.raises(JobEnded):
        await store.append("a", None, events(3, 3))
    with pytest.raises(LeaseLost):
        await store.append("a", fence, changes={"checkpoint": {"key": "late"}})
    await store.append("a", changes={"checkpoint": None})

    now = await store.get("a")
    assert (now.state, now.owner, now.lease_until, now.checkpoint) == (end, "", None, None)
    assert await store.claim("w2", NOW + 99 * SECOND) == await store.release("w") == []
    assert await store.attempt("a", "w") is None


async def test_a_job_ends_once_when_cancel_races_with_finish(store: JobStore, where: Path | str) -> None:
    """20 times, the two on different connections: one wins, the other is told, and the log has one end."""
    other = store if where == MEMORY else await JobStore.open(where)
    won = []
    for number in range(20):
        id = f"job{number}"
        await store.create(job(id), events(1, 1))
        fence = await leased(store, id)
        outcomes = await asyncio.gather(
            store.append(id, fence, events(2, 3, "finish"), {"state": "succeeded"}),
            other.append(id, None, events(2, 2, "cancel"), {"state": "cancelled"}),
            return_exceptions=True,
        )
        (winner,) = [index for index, outcome in enumerate(outcomes) if outcome is None]
        assert isinstance(outcomes[1 - winner], JobEnded)
        won.append(("succeeded", "cancelled")[winner])
        assert (await store.get(id)).state == won[-1]
        assert [event.kind for event in await store.events(id)][1:] == (["finish"] * 2, ["cancel"])[winner]
    if other is not store:
        await other.close()


async def test_a_bad_batch_does_not_hurt_the_others(store: JobStore) -> None:
    """Of many jobs written together, each is written whole or not at all, and told why not."""
    for id in "abcdef":
        await store.create(job(id))
    await store.append("b", changes={"state": "failed"})
    fence = await leased(store, "c")

    failures = await store.append_many(
        [
            Batch("f", events(1, 3), {"device": "cpu"}),
            Batch("b", events(1, 1)),
            Batch("c", events(1, 1), fence=Fence("w", 9)),
            Batch("x", events(1, 1)),
            Batch("d", events(1, 1), {"progress": {"bad": object()}}),
            Batch("e", events(1, 1), {"nonsense": 1}),
            Batch("a", events(2, 2)),
            Batch("d", events(1, 1), images=IMAGES[:1]),
            Batch("c", events(1, 1), fence=fence),
            Batch("c", events(2, 2), {"state": "succeeded"}, fence=fence),
        ]
    )

    kinds = [type(failure).__name__ if failure else "" for failure in failures]
    assert kinds[:4] == ["", "JobEnded", "LeaseLost", "NotFound"]
    assert kinds[4] and kinds[5]
    assert kinds[6:] == ["OutOfSequence", "NotFound", "", ""]
    counts = {id: len(await store.events(id)) for id in "abcdef"}
    assert counts == {"a": 0, "b": 0, "c": 2, "d": 0, "e": 0, "f": 3}
    assert ((await store.get("f")).device, (await store.get("d")).progress) == ("cpu", None)
    assert await store.append_many([]) == []


async def test_a_write_is_finished_when_its_caller_leaves(store: JobStore) -> None:
    """And the store goes on: in memory, to lose the connection would be to lose everything."""
    await store.create(job())
    for number in range(1, 21):
        writing = asyncio.create_task(store.append("a", None, events(number, number)))
        await asyncio.sleep(0.0003 * (number % 5))
        writing.cancel()
        await asyncio.wait([writing])
        while (await store.get("a")).sequence < number:
            await asyncio.sleep(0.001)

    assert len(await store.events("a")) == 20


async def test_jobs_at_rest_are_found_by_how_long_they_have_been(store: JobStore) -> None:
    """Those that ended, and an owner's that were paused, the longest first; not what runs or waits."""
    await ended(store, "old", 1)
    await ended(store, "new", 3)
    for id, owner, state in (("mine", "w", "paused"), ("theirs", "v", "paused"), ("running", "w", "running")):
        await store.create(job(id, owner=owner), events(1, 1))
        await store.append(id, events=[EventRecord(2, 1, NOW + 2 * SECOND, "state", {})], changes={"state": state})

    assert await store.at_rest(NOW + 9 * SECOND, "w") == ["old", "mine", "new"]
    assert await store.at_rest(NOW + 3 * SECOND, "w") == ["old", "mine"]
    assert await store.at_rest(NOW + 2 * SECOND, "w") == ["old"]


async def test_a_deleted_job_takes_its_images_along(store: JobStore) -> None:
    """Those that no other job holds, and no upload; their blobs are removed before anybody can add them anew."""
    for number in range(4):
        await store.add_image(image(IMAGES[number], 99, size=10**number))
    await ended(store, "a", 1, IMAGES)
    await ended(store, "b", 2, IMAGES[:1])
    await store.add_upload(UploadRecord("u", "me", 10, IMAGES[1], NOW))
    removed: list[str] = []

    async def remove(sha256s: Sequence[str]) -> None:
        removed.extend(sha256s)

    assert await store.delete("a", remove) == 1100
    assert (sorted(removed), await store.known(IMAGES)) == (IMAGES[2:], set(IMAGES[:2]))
    await store.delete("b", remove)
    assert await store.known(IMAGES) == {IMAGES[1]}


async def test_a_job_holds_its_result_before_it_says_so(store: JobStore) -> None:
    """So the deletion of another with the same picture does not take it; of a job that is gone there is no result."""
    await store.create(job("a"))
    await store.add_image(image(IMAGES[0]), "a")
    await ended(store, "twin", 1, IMAGES[:1])
    await store.delete("twin", nothing)
    await store.append("a", events=events(1, 1), changes={"state": "succeeded"}, images=IMAGES[:1])
    with pytest.raises(NotFound):
        await store.add_image(image(IMAGES[1]), "b")
    assert await store.known(IMAGES) == {IMAGES[0]}


async def test_deletions_and_uses_of_an_image_wait_for_one_another(store: JobStore, where: Path | str) -> None:
    """50 times, on two connections: the new job has its image, or it is told that there is none; nothing else."""
    other = store if where == MEMORY else await JobStore.open(where)
    for number in range(50):
        await store.add_image(image(IMAGES[0]))
        await ended(store, f"old{number}", 1, IMAGES[:1])
        freed, created = await asyncio.gather(
            store.delete(f"old{number}", nothing),
            other.create(job(f"new{number}"), images=IMAGES[:1]),
            return_exceptions=True,
        )
        if isinstance(created, NotFound):
            assert freed == 10
        else:
            assert (freed, await store.known(IMAGES)) == (0, {IMAGES[0]})
            assert await store.delete(f"new{number}", nothing) == 10
    if other is not store:
        await other.close()


async def test_everybody_goes_by_one_clock(store: JobStore) -> None:
    """PostgreSQL's, where several machines may share it; it is a time in UTC."""
    now = await store.now()
    assert now.utcoffset() == timedelta()
    assert abs(now - datetime.now(UTC)) < 5 * SECOND


async def test_loose_images_are_collected(store: JobStore) -> None:
    """Those that no job holds and nobody used lately; a job that comes first keeps its own."""
    for number, used_s in enumerate((2, 1, 0, 9)):
        await store.add_image(image(IMAGES[number], used_s))
    await store.create(job(), images=[IMAGES[0], IMAGES[0]])
    removed: list[str] = []

    async def remove(sha256s: Sequence[str]) -> None:
        await asyncio.sleep(0.01)
        removed.extend(sha256s)

    async def broken(sha256s: Sequence[str]) -> None:
        raise OSError(5, "Input/output error")

    limit = NOW + 5 * SECOND
    assert await store.unreferenced(limit) == [IMAGES[2], IMAGES[1]]
    assert not await store.collect(IMAGES[0], limit, remove)
    assert not await store.collect(IMAGES[3], limit, remove)
    assert await store.collect(IMAGES[2], limit, remove) == 10
    with pytest.raises(Exception, match="Input/output"):
        await store.collect(IMAGES[1], limit, broken)
    assert (await store.image(IMAGES[1])).bytes == 10
    await store.append("a", images=[IMAGES[1]])
    assert not await store.collect(IMAGES[1], limit, remove)
    assert removed == [IMAGES[2]]
    with pytest.raises(NotFound, match="there is no image '2222"):
        await store.create(job("b"), images=IMAGES[:3])
    assert [record.id for record in await store.list()] == ["a"]


async def test_an_image_added_during_its_collection_waits(store: JobStore, where: Path | str) -> None:
    """Until its blob is gone, so that what it puts then is not removed after it."""
    await store.add_image(image(IMAGES[0]))
    other = store if where == MEMORY else await JobStore.open(where)
    told: list[str] = []
    begun = asyncio.Event()

    async def remove(sha256s: Sequence[str]) -> None:
        begun.set()
        await asyncio.sleep(0.1)
        told.append("removed")

    async def add() -> None:
        await begun.wait()
        await other.add_image(image(IMAGES[0], 20))
        told.append("added")

    assert (await asyncio.gather(store.collect(IMAGES[0], NOW + SECOND, remove), add()))[0] == 10

    assert told == ["removed", "added"]
    assert (await store.image(IMAGES[0])).last_used == NOW + 20 * SECOND
    if other is not store:
        await other.close()


async def test_an_image_is_noted_once(store: JobStore) -> None:
    """As it came first, but last used when it came last."""
    await store.add_image(image(IMAGES[0], 1))
    again = await store.add_image(image(IMAGES[0], 2, size=99))

    assert again == await store.image(IMAGES[0]) == image(IMAGES[0], 2)


async def test_an_upload_advances_in_order(store: JobStore) -> None:
    """Each byte once, whoever sends it twice, and none beyond the end."""
    upload = UploadRecord("u", "me", 100, "", NOW)
    await store.add_upload(upload)

    assert await store.upload("u") == upload
    assert sorted(await asyncio.gather(*[store.advance_upload("u", 0, 60) for _ in range(4)])) == [False] * 3 + [True]
    assert not await store.advance_upload("u", 70, 10)
    assert not await store.advance_upload("u", 60, 41)
    assert await store.advance_upload("u", 60, 40)
    assert (await store.upload("u")).received == 100
    assert await store.uploads_before(NOW) == []
    assert await store.uploads_before(NOW + SECOND) == ["u"]
    await store.delete_upload("u")
    await store.delete_upload("u")
    assert await store.uploads_before(NOW + SECOND) == []


async def test_migrations_make_the_schema(store: JobStore) -> None:
    """What they leave is what the code believes; running them again changes nothing."""

    def differences(connection: Any) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata))

    assert await store._read(differences) == []


async def test_a_newer_schema_is_refused(shared_where: Path | str) -> None:
    """With both versions named, and left as it is."""
    store = await JobStore.open(shared_where)
    await store.create(job())
    await store._write(lambda connection: connection.execute(text("UPDATE alembic_version SET version_num = '9999'")))
    await store.close()

    for _ in range(2):
        with pytest.raises(SchemaNewer, match="schema 9999, this one knows 0002"):
            await JobStore.open(shared_where)


async def test_jobs_are_there_when_the_database_is_opened_again(shared_where: Path | str) -> None:
    """And not in memory."""
    store = await JobStore.open(shared_where)
    await store.create(job(), events(1, 3))
    await store.close()

    again = await JobStore.open(shared_where)
    assert await again.events("a") == events(1, 3)
    await again.close()
    memory = await JobStore.open(MEMORY)
    assert await memory.list() == []
    await memory.close()


@pytest.mark.parametrize("url", ["mysql://a:secret@h/d", "nonsense", "postgresql+nonsense://h/d", ""])
async def test_other_databases_are_refused(url: str) -> None:
    """Without repeating the password."""
    with pytest.raises(ValueError, match=r"postgresql://… or sqlite:///…, not at") as caught:
        await JobStore.open(url)
    assert "secret" not in str(caught.value)


async def test_a_database_that_does_not_answer_is_said() -> None:
    """Without repeating the password."""
    with pytest.raises(StorageUnavailable, match="cannot be reached") as caught:
        await JobStore.open("postgresql://me:secret@127.0.0.1:1/nst")
    assert "secret" not in str(caught.value)


WRITER = """
import asyncio, sys
from datetime import datetime, UTC
from pathlib import Path
from nst_server.storage.database import JobStore
from nst_server.storage.records import EventRecord, Fence, JobRecord

async def main(where):
    store = await JobStore.open(where)
    job, _ = await store.create(JobRecord("a", datetime.now(UTC), request_id="r"))
    await store.claim("w", datetime.now(UTC))
    job = await store.attempt("a", "w")
    number = job.sequence
    while True:
        batch = [EventRecord(number + n, job.attempt, datetime.now(UTC), "progress", {"number": number + n})
                 for n in (1, 2, 3)]
        await store.append("a", Fence("w", job.attempt), batch, {"progress": {"number": number + 3}})
        number += 3
        print(number, flush=True)

where = sys.argv[1]
asyncio.run(main(where if "://" in where else Path(where)))
"""


async def test_what_was_acknowledged_survives_kill_9(shared_where: Path | str) -> None:
    """Three times, some moment in the midst of writing: every event that was reported is there, and none by half."""
    for kill in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(shared_where)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout
            for _ in range(3 + 7 * kill):
                told = writer.stdout.readline()
            writer.kill()
            told = (writer.stdout.read().split("\n")[:-1] or [told])[-1]
        store = await JobStore.open(shared_where)
        found = [event.payload["number"] for event in await store.events("a", limit=100_000)]
        record = await store.get("a")
        await store.close()
        assert found == list(range(1, len(found) + 1))
        assert len(found) == record.sequence == record.progress["number"] >= int(told)
        assert record.attempt == kill + 1
