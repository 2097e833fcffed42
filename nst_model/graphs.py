"""Work that is the same each time, recorded once and then launched as a whole.

To launch an iteration's kernels one by one takes a processor longer than a fast GPU takes to compute them. A CUDA
graph launches them together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Work = Callable[[], Tensor]
"""Reads and writes the same memory at each call, asks for no number, and returns a vector for the host."""

WARM_UP = 2
"""Calls before the recording: what libraries allocate and choose at first must not be recorded."""


class Recorder(Protocol):
    """Records work on one kind of device."""

    def __call__(self, work: Work) -> tuple[Callable[[], None], Tensor]:
        """Record `work` without doing it; return what does it, and where its vector will then be."""


def cuda_graph(work: Work) -> tuple[Callable[[], None], Tensor]:
    """Record work on the current CUDA device, on a stream of its own."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the device: one sends pictures.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        vector = work()
    return graph.replay, vector


RECORDERS: Mapping[str, Recorder] = {"cuda": cuda_graph}
"""By the kind of device; elsewhere nothing is recorded."""


class Recorded:
    """Work that is done as it is written at first, and from a recording after WARM_UP calls.

    If it cannot be recorded it goes on as it is, and the log says so.

    Args:
        work: what is to be done.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work = work
        self._recorder = RECORDERS.get(device.type)
        self._calls = 0
        self._recording: tuple[Callable[[], None], Tensor] | None = None

    @property
    def possible(self) -> bool:
        """Whether there is a recording, or will be one."""
        return self._recorder is not None

    @property
    def made(self) -> bool:
        """Whether there is a recording."""
        return self._recording is not None

    def __call__(self) -> Tensor:
        """Do it; return its vector, which no other call will touch."""
        if self._recording is None and self._recorder is not None and self._calls >= WARM_UP:
            self._record(self._recorder)
        self._calls += 1
        if self._recording is None:
            return self._work()
        replay, vector = self._recording
        replay()
        return vector.clone()

    def _record(self, recorder: Recorder) -> None:
        try:
            self._recording = recorder(self._work)
        except RuntimeError as error:  # whatever the reason, the work can be done without
            self._recorder = None
            log.warning("an iteration cannot be recorded, and is launched kernel by kernel: %s", error)
