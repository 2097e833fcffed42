"""A worker whose iterations sleep as long as real ones take, and whose clock stands still while it waits for a core.

What is left of a slow-down is what the product is to blame for: a full pipe, the interpreter's lock, copies.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from nst_server.executor import _worker_main
from nst_server.messages import WorkerConfig

ITERATION_S = 0.1


class Clock:
    """Stands in for `time` in the worker."""

    def __init__(self) -> None:
        self._schedstat = Path(f"/proc/self/task/{os.getpid()}/schedstat")

    def monotonic(self) -> float:
        """Return the seconds that the main thread has run, slept or waited for anything but a core."""
        _, waited_ns, _ = self._schedstat.read_text().split()
        return time.monotonic() - int(waited_ns) / 1e9

    def sleep(self, seconds: float) -> None:
        """Sleep."""
        time.sleep(seconds)


def slow_worker_main(connection: Connection, config: WorkerConfig, environment: dict[str, str]) -> None:
    """Run a worker, in the child process, in place of `_worker_main`."""
    from nst_model import Iterate
    from nst_server import worker

    class Slow(worker.Stylization):
        def __iter__(self) -> Iterator[Iterate]:
            for iterate in super().__iter__():
                time.sleep(ITERATION_S)
                yield iterate

    worker.Stylization = Slow  # type: ignore[misc]
    worker.time = Clock()  # type: ignore[assignment]
    _worker_main(connection, config, environment)
