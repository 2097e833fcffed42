"""What a worker is told on the way: steer, finish, suspend; and its checkpoints, from which another goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from nst_model import StylizeOptions
from nst_model.state import State
from nst_server.executor import ProcessExecutor
from nst_server.messages import (
    FINISHED,
    Cancel,
    Cancelled,
    Checkpoint,
    Done,
    Ending,
    Failed,
    Finish,
    Kept,
    Message,
    Progressed,
    Steer,
    Steered,
    StyleImage,
    StylizeTask,
    Suspend,
    Suspended,
    WorkerConfig,
)
from nst_server.storage.blobs import Blobs

OPTIONS = StylizeOptions(iterations=40, size_px=96, first_size_px=64, precision="fp32")


def task(**changed: Any) -> StylizeTask:
    """Return a task of a fraction of a second."""
    random = np.random.default_rng(1)
    content, style = (random.integers(0, 256, (72, 96, 3), dtype=np.uint8) for _ in range(2))
    given: dict[str, Any] = {
        "id": "jobs/one",
        "model": "vgg16",
        "content": content,
        "styles": (StyleImage(style, "0" * 64, 96, 1.0),),
        "options": OPTIONS,
        "frame_interval": 0,
    }
    return StylizeTask(**(given | changed))


@pytest_asyncio.fixture(loop_scope="session")
async def executor(tiny_weights_file: Path, tmp_path: Path) -> AsyncIterator[ProcessExecutor]:
    """A worker that keeps a checkpoint whenever it can."""
    config = WorkerConfig(
        "cpu", 1, "vgg16", {"vgg16": tiny_weights_file}, tmp_path / "grams", 1 << 20, tmp_path / "blobs", 0.0
    )
    made = ProcessExecutor(config)
    await made.start()
    yield made
    await made.close()


class Heard:
    """The messages of one task, and what to do when a certain one comes."""

    def __init__(self, on: Callable[[Message], None] = lambda _: None) -> None:
        self.messages: list[Message] = []
        self._on = on

    def __call__(self, message: Message) -> None:
        """Take a message."""
        self.messages.append(message)
        self._on(message)

    @property
    def iterations(self) -> list[int]:
        """Of the numbers that came."""
        return [message.iteration for message in self.messages if isinstance(message, Progressed)]

    @property
    def kept(self) -> list[Checkpoint]:
        """The checkpoints."""
        return [message.checkpoint for message in self.messages if isinstance(message, Kept)]


async def ended(executor: ProcessExecutor, one: StylizeTask, heard: Heard) -> Ending:
    """Run a task to its end."""
    return await asyncio.wait_for(executor.run(one, heard), 60)


def at(iteration: int, act: Callable[[], None]) -> Callable[[Message], None]:
    """Do something when the numbers of an iteration come."""

    def on(message: Message) -> None:
        if isinstance(message, Progressed) and message.iteration == iteration:
            act()

    return on


def same(one: Ending, other: Ending) -> None:
    """Check that two pictures are alike to the bit."""
    assert isinstance(one, Done)
    assert isinstance(other, Done)
    assert np.array_equal(np.asarray(one.pixels), np.asarray(other.pixels))
    assert (one.iteration, one.loss, one.stop_reason) == (other.iteration, other.loss, other.stop_reason)


async def test_killed_and_taken_up_from_its_checkpoint_a_task_ends_the_same(executor: ProcessExecutor) -> None:
    """To the bit, whichever scale it was at; and goes on from there, not from the beginning."""
    undisturbed = await ended(executor, task(), Heard())
    for iteration in (7, 30, 60):
        heard = Heard(at(iteration, lambda: os.kill(executor.pid or 0, signal.SIGKILL)))
        ending = await ended(executor, task(), heard)
        assert isinstance(ending, Failed)
        assert ending.reason == "WORKER_DIED"
        last = heard.kept[-1]
        assert 0 <= last.iteration <= iteration + 5
        await executor.ready()
        again = Heard()
        same(await ended(executor, task(checkpoint=last, attempt=2), again), undisturbed)
        assert again.iterations == list(range(last.iteration + 1, 81))
        elapsed = next(message.elapsed_s for message in again.messages if isinstance(message, Progressed))
        assert elapsed > last.elapsed_s


async def test_suspended_it_goes_on_where_it_was(executor: ProcessExecutor) -> None:
    """No iteration is made twice."""
    undisturbed = await ended(executor, task(), Heard())
    heard = Heard(at(20, lambda: executor.order(Suspend("jobs/one"))))
    assert isinstance(await ended(executor, task(), heard), Suspended)
    again = Heard()
    same(await ended(executor, task(checkpoint=heard.kept[-1], attempt=2), again), undisturbed)
    assert heard.iterations + again.iterations == list(range(81))


async def test_without_a_place_to_keep_it_the_front_gets_its_state(tiny_weights_file: Path, tmp_path: Path) -> None:
    """When it is suspended, and then only; it goes on from that on another worker."""
    config = WorkerConfig("cpu", 1, "vgg16", {"vgg16": tiny_weights_file}, tmp_path / "grams", 1 << 20, None, 0.0)
    heard = Heard(at(20, lambda: first.order(Suspend("jobs/one"))))
    first, second = ProcessExecutor(config), ProcessExecutor(config)
    for one in (first, second):
        await one.start()
    undisturbed = await ended(second, task(), Heard())
    assert isinstance(await ended(first, task(), heard), Suspended)
    (checkpoint,) = heard.kept
    again = Heard()
    same(await ended(second, task(checkpoint=checkpoint, attempt=2), again), undisturbed)
    assert heard.iterations + again.iterations == list(range(81))
    for one in (first, second):
        await one.close()


async def test_finished_early_it_has_its_best_picture_in_full_size(executor: ProcessExecutor) -> None:
    """Also at a coarser scale."""
    for iteration in (10, 60):
        heard = Heard(at(iteration, lambda: executor.order(Finish("jobs/one"))))
        ending = await ended(executor, task(), heard)
        assert isinstance(ending, Done)
        assert ending.stop_reason == FINISHED
        assert np.asarray(ending.pixels).shape == (72, 96, 3)
        assert ending.iteration <= heard.iterations[-1] < iteration + 20


async def test_steered_it_says_so_and_goes_on(executor: ProcessExecutor) -> None:
    """With other weights and fewer iterations, before the next ones."""
    changes = {"content_weight": 3.0, "iterations": 30}
    heard = Heard(at(45, lambda: executor.order(Steer("jobs/one", changes))))
    ending = await ended(executor, task(), heard)
    assert isinstance(ending, Done)
    (told,) = (message for message in heard.messages if isinstance(message, Steered))
    assert (told.options.content_weight, told.options.iterations) == (3.0, 30)
    place = heard.messages.index(told)
    before, after = (
        [m.iterations for m in part if isinstance(m, Progressed)]
        for part in (heard.messages[:place], heard.messages[place + 1 :])
    )
    assert set(before) == {80}
    assert set(after) == {70}
    assert heard.iterations == list(range(71))


async def test_orders_for_another_task_and_after_a_cancel_do_nothing(executor: ProcessExecutor) -> None:
    """A cancel goes before whatever else was said."""

    def all_at_once() -> None:
        executor.order(Finish("jobs/other"))
        executor.order(Cancel("jobs/one"))
        executor.order(Finish("jobs/one"))

    assert isinstance(await ended(executor, task(), Heard(at(5, all_at_once))), Cancelled)
    assert isinstance(await ended(executor, task(), Heard()), Done)


async def test_a_checkpoint_that_cannot_be_read_costs_time_only(
    executor: ProcessExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torn, of an older version, or not there: the task begins anew and ends the same."""
    undisturbed = await ended(executor, task(), Heard())
    torn = Blobs.open(tmp_path / "blobs")
    torn.write_now("checkpoints/one/torn", b"\x00" * 100)
    monkeypatch.setattr("nst_model.state.FORMAT", "1")
    torn.write_now("checkpoints/one/older", State({}, {}).to_bytes())
    for key in ("checkpoints/one/torn", "checkpoints/one/older", "checkpoints/one/9-9"):
        heard = Heard()
        same(await ended(executor, task(checkpoint=Checkpoint(key, 5, 1.0)), heard), undisturbed)
        assert heard.iterations == list(range(81))


async def test_a_full_disk_costs_checkpoints_only(executor: ProcessExecutor, tmp_path: Path) -> None:
    """The task goes on."""
    (tmp_path / "blobs" / "checkpoints").parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "blobs" / "checkpoints").write_text("a file where the folder should be")
    heard = Heard()
    assert isinstance(await ended(executor, task(), heard), Done)
    assert not heard.kept
