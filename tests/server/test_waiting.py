"""Turns: fair between callers, in order for each."""

from __future__ import annotations

import random

import pytest

from nst_server.waiting import Waiting


def filled(text: str) -> Waiting[str]:
    """Return a queue of items like `a1`, sent in this order, the letter being the caller."""
    queue: Waiting[str] = Waiting()
    for item in text.split():
        queue.add(item[0], item)
    return queue


def taken(queue: Waiting[str]) -> list[str]:
    """Take everything."""
    return [queue.take() for _ in range(len(queue))]


@pytest.mark.parametrize(
    ("sent", "order"),
    [
        ("a1 a2 a3", "a1 a2 a3"),
        ("a1 a2 a3 b1", "a1 b1 a2 a3"),
        ("a1 a2 b1 b2 c1", "a1 b1 c1 a2 b2"),
        ("", ""),
    ],
)
def test_callers_take_turns(sent: str, order: str) -> None:
    """What is foretold is what comes."""
    queue = filled(sent)
    assert list(queue) == order.split()
    assert taken(queue) == order.split()
    assert len(queue) == 0


def test_who_was_served_waits_behind_who_came_later() -> None:
    """Whoever has had a turn goes to the end."""
    queue = filled("a1 a2 a3")
    assert queue.take() == "a1"
    queue.add("b", "b1")
    assert list(queue) == ["a2", "b1", "a3"]


def test_items_leave_out_of_turn_and_come_back_first() -> None:
    """Cancelled, or taken up again."""
    queue = filled("a1 a2 b1")
    queue.remove("b1")
    assert "b1" not in queue
    queue.add("a", "a0", first=True)
    assert taken(queue) == ["a0", "a1", "a2"]
    with pytest.raises(LookupError):
        queue.take()
    with pytest.raises(LookupError):
        queue.remove("a1")


def test_the_place_of_the_next_item_is_known_before() -> None:
    """For every caller, in whatever state the queue is."""
    dice = random.Random(1)
    for _ in range(300):
        waiting: Waiting[int] = Waiting()
        for number in range(dice.randrange(9)):
            waiting.add(dice.choice("abc"), number)
            if dice.random() < 0.3:
                waiting.take()
        caller = dice.choice("abcd")
        expected = waiting.place(caller)
        waiting.add(caller, 99)
        assert list(waiting).index(99) == expected
