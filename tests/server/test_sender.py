"""The worker's sender: what goes to the front, in which order, and what is never made."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from nst_model import StylizeOptions
from nst_server.messages import Done, Pictured, Steered
from nst_server.worker import _Sender

PICTURE = np.zeros((2, 2, 3), np.uint8)


@pytest.fixture
def pipe() -> Iterator[tuple[_Sender, Connection]]:
    """A sender, and the front's end of its pipe."""
    front, back = multiprocessing.Pipe()
    sender = _Sender(back)
    yield sender, front
    sender.close()


def picture(index: int, made: list[int], wait: threading.Event | None = None) -> Callable[[], Pictured]:
    """Return what makes the picture of an iteration, notes it, and takes as long as it takes."""

    def make() -> Pictured:
        made.append(index)
        if wait is not None:
            assert wait.wait(10)
        return Pictured("jobs/1", index, PICTURE)

    return make


def test_a_picture_that_a_newer_one_replaces_is_never_made(pipe: tuple[_Sender, Connection]) -> None:
    """Nor does whoever computes wait for one that is being made. An ending goes last."""
    sender, front = pipe
    made: list[int] = []
    free = threading.Event()
    sender.send_picture(picture(1, made, free))
    while not made:
        pass
    for index in (2, 3, 4):
        sender.send_picture(picture(index, made))
    sender.send(Done("jobs/1"))
    free.set()
    received = [front.recv() for _ in range(3)]
    assert [getattr(message, "iteration", None) for message in received[:2]] == [1, 4]
    assert isinstance(received[2], Done)
    assert made == [1, 4]


def test_every_picture_is_made_where_each_is_wanted(pipe: tuple[_Sender, Connection]) -> None:
    """In order, between other messages."""
    sender, front = pipe
    made: list[int] = []
    for index in (1, 2, 3):
        sender.send(picture(index, made))
    assert [front.recv().iteration for _ in range(3)] == made == [1, 2, 3]


def test_a_picture_that_cannot_be_made_is_left_out(pipe: tuple[_Sender, Connection]) -> None:
    """For a moment without memory, say. The messages after it arrive."""
    sender, front = pipe

    def impossible() -> Pictured:
        raise RuntimeError("out of memory")

    sender.send_picture(impossible)
    sender.send(Steered("jobs/1", StylizeOptions(), 20))
    assert isinstance(front.recv(), Steered)
    sender.send(Steered("jobs/1", StylizeOptions(), 20))
    assert isinstance(front.recv(), Steered)
