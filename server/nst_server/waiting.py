"""The order in which waiting jobs get their turn: callers take turns, and each caller's jobs come as they were sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Waiting(Generic[Item]):
    """A queue that is fair between callers: a thousand jobs of one hold up the next of another by one turn only."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Item]] = {}  # the caller whose turn it is first

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def __contains__(self, item: object) -> bool:
        return any(item in line for line in self._lines.values())

    def __iter__(self) -> Iterator[Item]:
        """Yield the items in the order in which they would be taken."""
        for turn in range(max(map(len, self._lines.values()), default=0)):
            for line in self._lines.values():
                yield from line[turn : turn + 1]

    def place(self, caller: str) -> int:
        """Return how many items would be taken before the next one of a caller."""
        callers = list(self._lines)
        turn = len(self._lines.get(caller, ()))
        ahead = callers.index(caller) if caller in self._lines else len(callers)
        others = [min(len(self._lines[other]), turn + (place < ahead)) for place, other in enumerate(callers)]
        return sum(others)  # its own line counts with all it has, which is `turn`

    def add(self, caller: str, item: Item, *, first: bool = False) -> None:
        """Let an item wait behind the others of its caller, or before them."""
        line = self._lines.setdefault(caller, [])
        line.insert(0 if first else len(line), item)

    def take(self) -> Item:
        """Take the item whose turn it is. Raises LookupError if there is none."""
        if not self._lines:
            raise LookupError("nothing waits")
        caller = next(iter(self._lines))
        line = self._lines.pop(caller)
        item = line.pop(0)
        if line:
            self._lines[caller] = line  # behind all others
        return item

    def remove(self, item: Item) -> None:
        """Take an item out of its turn. Raises LookupError if it does not wait."""
        caller = next((caller for caller, line in self._lines.items() if item in line), None)
        if caller is None:
            raise LookupError(f"{item} does not wait")
        self._lines[caller].remove(item)
        if not self._lines[caller]:
            del self._lines[caller]
