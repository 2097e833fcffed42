"""When a call that broke is tried again, and when it is given up. No network here."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeAlias

import grpc

from nst_client.errors import NstError, QueueFullError, UnavailableError
from nst_client.resources import Job
from nst_client.status import NEVER_REACHED, nst_error

FIRST_PAUSE_S = 0.2
"""Before the second attempt; each pause is twice as long as the one before, less up to a half by chance."""

LONGEST_PAUSE_S = 4.0

OnConnection: TypeAlias = "Callable[[UnavailableError | None], object]"
"""Who is told how the connection does: the error when it breaks and at each vain attempt, None when it stands again."""


class Connection:
    """What a client knows of the way to its server."""

    def __init__(self, address: str, *, patience_s: float, on_connection: OnConnection | None) -> None:
        self.address = address
        self.patience_s = patience_s
        self.has_answered = False
        """Whether anything has ever come from there."""
        self._is_broken = False
        self._on_connection = on_connection

    def works(self) -> None:
        """Note that something came from the server."""
        self.has_answered = True
        if self._is_broken:
            self._is_broken = False
            self._tell(None)

    def breaks(self, error: UnavailableError) -> None:
        """Note that the connection broke, or does not come back yet."""
        self._is_broken = True
        self._tell(error)

    def _tell(self, error: UnavailableError | None) -> None:
        if self._on_connection is not None:
            self._on_connection(error)


class TimeLimit:
    """How long something may last as a whole, attempts and pauses together; None for as long as it takes."""

    def __init__(self, timeout_s: float | None) -> None:
        self._end = None if timeout_s is None else time.monotonic() + timeout_s

    def remaining_s(self) -> float | None:
        """Return how much is left, seconds; None if there is no limit."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())

    def capped_s(self, pause_s: float) -> float:
        """Return a pause that does not go beyond the limit, seconds."""
        remaining_s = self.remaining_s()
        return pause_s if remaining_s is None else min(pause_s, remaining_s)


class Patience:
    """How often one call is tried, and for how long."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._attempts = 0
        self._since = 0.0
        self._may_be_done = False

    def renew(self) -> None:
        """Note that the call came on: if it breaks again, that is another time."""
        self._connection.works()
        self._attempts = 0

    def pause_s(self, error: grpc.RpcError, job: Job | None = None) -> float:
        """Return how long to wait before the next attempt, seconds. Raises our exception if there is to be none.

        `job` is the job that the call is about.
        """
        connection = self._connection
        ours = nst_error(error, address=connection.address, job=job)
        ours.is_repeated = self._may_be_done
        words = error.details() or ""
        if not self._is_passing(ours, words):
            raise ours
        self._may_be_done |= isinstance(ours, UnavailableError) and not NEVER_REACHED.search(words)
        now = time.monotonic()
        if self._attempts == 0:
            self._since = now
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**self._attempts) * random.uniform(0.5, 1)
        advice: float | None = getattr(ours, "retry_after_s", None)
        if advice is not None:
            # The clients of a server that restarts should not all come back at the same moment.
            pause = max(pause, advice * random.uniform(1, 1.2))
        if now + pause > self._since + connection.patience_s:
            raise ours
        self._attempts += 1
        if isinstance(ours, UnavailableError):
            connection.breaks(ours)
        return pause

    def _is_passing(self, error: NstError, words: str) -> bool:
        """Whether the error may be another one in a while."""
        if isinstance(error, QueueFullError):
            # What was asked for before the connection broke may be in the queue; the server looks only if it has room.
            return self._attempts > 0
        if not isinstance(error, UnavailableError):
            return False
        # Where nothing has ever answered there may be no server: that is to be said at once.
        self._connection.has_answered = self._connection.has_answered or not NEVER_REACHED.search(words)
        return self._connection.has_answered
