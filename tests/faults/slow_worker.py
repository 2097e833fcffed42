"""A worker whose iterations take as long as real ones, but sleep: how long one takes says nothing of who else computes.

What is left of a slow-down is what the worker waits for: its pipe, its interpreter's lock, its own copies.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from nst_server.executor import _worker_main
from nst_server.messages import WorkerConfig

ITERATION_S = 0.1


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
    _worker_main(connection, config, environment)
