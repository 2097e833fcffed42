"""A job's stream without its network: messages in, typed events and an outcome out. Both clients read through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from nst.v1 import job_pb2
from nst_client import convert
from nst_client.errors import BrokenStreamError, JobCancelledError, JobFailedError, NstError
from nst_client.events import Event, Frame, Progress, Result, Snapshot, StateChange
from nst_client.parts import PartBuffer
from nst_client.resources import Job, JobState, StopReason
from nst_client.status import nst_error


class JobStream:
    """What is known of a job from the messages of its stream so far."""

    def __init__(self, address: str) -> None:
        self.job: Job | None = None
        """The job as it was last seen."""
        self.result: Result | None = None
        """The finished picture, once it is whole."""
        self.cancelled = False
        """Whether the caller has cancelled the job."""
        self.failure: NstError | None = None
        """What broke the stream."""
        self._address = address
        self._frame_parts = PartBuffer()
        self._result_parts = PartBuffer()
        self._readers: dict[str, Callable[[Any, dict[str, Any]], Event | None]] = {
            "snapshot": self._snapshot,
            "state_change": self._state_change,
            "progress": self._progress,
            "frame": self._frame,
            "result": self._result,
        }

    def receive(self, message: job_pb2.JobEvent) -> Event | None:
        """Return the event that a message completes: None for a part of a picture and for kinds unknown here.

        Raises BrokenStreamError.
        """
        kind = message.WhichOneof("event")
        if kind not in self._readers:
            return None
        head = {
            "sequence": message.sequence,
            "attempt": message.attempt,
            "time": convert.time(message.event_time),
        }
        try:
            return self._readers[kind](getattr(message, kind), head)
        except NstError as error:
            self.failure = error
            raise

    def end(self) -> None:
        """Note that the stream ended with OK. Raises BrokenStreamError if the job had not ended."""
        parts_missing = not (self._frame_parts.is_empty and self._result_parts.is_empty)
        if parts_missing or self.job is None or not self.job.state.is_terminal:
            self.failure = BrokenStreamError(f"the stream from {self._address} ended before the job did")
            raise self.failure

    def break_off(self, error: grpc.RpcError) -> None:
        """Note that the stream ended with an error, and raise ours; return if that is what the caller asked for."""
        if self.failure is None and not self.cancelled:
            self.failure = nst_error(error, address=self._address, connected=self.job is not None, job=self.job)
        if self.failure is not None:
            raise self.failure

    def hang_up(self) -> None:
        """Note that this side ended the call, and raise if not by `cancel`: the client was closed."""
        if not self.cancelled:
            self.failure = JobCancelledError(f"{self._name()} was cancelled: the client was closed", job=self.job)
            raise self.failure

    def outcome(self) -> Result:
        """Return the result, once the stream has ended.

        Raises JobFailedError, JobCancelledError, or what broke the stream.
        """
        state = JobState.UNKNOWN if self.job is None else self.job.state
        if state is JobState.FAILED:
            raise _job_failed(self.job)
        if state is JobState.SUCCEEDED and self.result is not None:
            return self.result
        if self.failure is not None:
            raise self.failure
        if state is JobState.CANCELLED or self.cancelled:
            raise JobCancelledError(f"{self._name()} was cancelled", job=self.job, code="CANCELLED")
        raise BrokenStreamError(f"{self._name()} ended without a result")

    def _name(self) -> str:
        return "the job" if self.job is None else self.job.name

    def _snapshot(self, message: job_pb2.Job, head: dict[str, Any]) -> Event:
        self.job = convert.job(message)
        return Snapshot(job=self.job, **head)

    def _state_change(self, message: job_pb2.StateChange, head: dict[str, Any]) -> Event:
        self.job = convert.job(message.job)
        return StateChange(job=self.job, **head)

    def _progress(self, message: job_pb2.Progress, head: dict[str, Any]) -> Event:
        return Progress(**convert.numbers(message), **head)

    def _frame(self, message: job_pb2.Frame, head: dict[str, Any]) -> Event | None:
        whole = self._frame_parts.add(message.image, of=message.iteration)
        if whole is None:
            return None
        return Frame(iteration=message.iteration, skipped=message.skipped, **whole, **head)

    def _result(self, message: job_pb2.Result, head: dict[str, Any]) -> Event | None:
        whole = self._result_parts.add(message.image, of=message.iteration)
        if whole is None:
            return None
        reason = convert.named(StopReason, job_pb2.StopReason.DESCRIPTOR, message.stop_reason)
        self.result = Result(iteration=message.iteration, loss=message.loss, stop_reason=reason, **whole, **head)
        return self.result


def _job_failed(job: Job | None) -> JobFailedError:
    assert job is not None
    if job.error is None:
        return JobFailedError(f"{job.name} failed; the server does not say why", job=job)
    return JobFailedError(job.error.message, job=job, code=job.error.code, reason=job.error.reason)
