"""Work that is the same each time, recorded once and then launched as a whole.

To launch an iteration's kernels one by one takes a processor longer than a fast GPU takes to compute them. A CUDA
graph launches them together.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
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

    def __call__(self, work: Work, device: torch.device) -> tuple[Callable[[], None], Tensor]:
        """Record `work` on `device` without doing it; return what does it, and where its vector will then be.

        Raises RuntimeError, or a warning as an error, if it cannot be recorded.
        """


def cuda_graph(work: Work, device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """Record work on a CUDA device, whichever is the current one."""
    stream = _recording_stream(device)
    # The stream once more than `torch.cuda.graph` does, which leaves it as the current one when a recording fails.
    with warnings.catch_warnings(), torch.cuda.device(device), torch.cuda.stream(stream):
        # A graph into which nothing was recorded would do nothing, each time; PyTorch only warns.
        warnings.filterwarnings("error", message="The CUDA Graph is empty")
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on using the device: one sends pictures.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            vector = work()
    return graph.replay, vector


@functools.cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for recording: always the same, since libraries keep memory for each stream that they see."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}
"""By the kind of device; elsewhere nothing is recorded, nor any more where a recording was refused."""


class Recorded:
    """Work that is done as it is written at first, and from a recording after WARM_UP calls.

    If it cannot be recorded it goes on as it is, the log says so, and nothing is recorded any more in this process: it
    would be refused again, and older versions of PyTorch do not quite recover from that (pytorch#180395). If memory is
    wanting, another recording may do with less.

    Args:
        work: what is to be done.
        device: where.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work = work
        self._device = device
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
            self._recording = recorder(self._work, self._device)
        except (RuntimeError, UserWarning) as error:  # whatever the reason, the work can be done without
            self._recorder = None
            if not isinstance(error, torch.OutOfMemoryError):
                RECORDERS.pop(self._device.type, None)
            log.warning("an iteration cannot be recorded, and is launched kernel by kernel: %s", error)
