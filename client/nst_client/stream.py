"""A job's stream without its network: messages in, typed events and an outcome out. Both clients read through it.

A stream may be carried by several calls, one after another: when one breaks, the next goes on after the last event that
had arrived whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import grpc

from nst.v1 import job_pb2, style_transfer_service_pb2
from nst_client import convert
from nst_client.errors import BrokenStreamError, ClientClosedError, JobCancelledError, JobFailedError, NstError
from nst_client.events import Event, Frame, Progress, Result, Snapshot, StateChange
from nst_client.images import Picture
from nst_client.parts import PartBuffer
from nst_client.resources import Job, JobResult, JobState, StopReason
from nst_client.retry import Connection, Patience, TimeLimit
from nst_client.transfers import Calls

NUMBERED = frozenset({"state_change", "progress", "result"})
"""The kinds of events that have a number of their own."""

RECENT_JOBS = 100
"""A job whose name never arrived is sought among so many; the server lists the newest first."""

Opening: TypeAlias = "style_transfer_service_pb2.StylizeRequest | style_transfer_service_pb2.WatchJobRequest"
"""What a stream begins with: a job to be made, which then belongs to the stream, or one that is there."""


class JobStream:
    """What is known of a job from the messages of its stream so far, and how the stream stands."""

    def __init__(self, connection: Connection, *, owns_job: bool, timeout_s: float | None = None) -> None:
        self.job: Job | None = None
        """The job as it was last seen."""
        self.result: Result | None = None
        """The finished picture, once it is whole."""
        self.owns_job = owns_job
        """Whether the job is to end when the stream is closed."""
        self.sequence = 0
        """The number of the last event that arrived whole."""
        self.call: Any = None
        """The call that carries the stream now; None between two."""
        self.failure: NstError | None = None
        """What broke the stream for good."""
        self.is_abandoned = False
        """Whether nobody holds the stream any more, and its job is therefore to end."""
        self._is_ended = False
        self._is_cancelled = False
        self._is_closed = False
        self._is_told_whole = False
        self._opening: Opening | None = None
        self._preview: style_transfer_service_pb2.Preview | None = None
        self.limit = TimeLimit(timeout_s)
        """How long the whole stream may last."""
        self._connection = connection
        self._patience = Patience(connection)
        self._last_frame: int | None = None
        self._goes_on = False
        self._frame_parts = PartBuffer()
        self._result_parts = PartBuffer()
        self._readers: dict[str, Callable[[Any, dict[str, Any]], Event | None]] = {
            "snapshot": self._snapshot,
            "state_change": self._state_change,
            "progress": self._progress,
            "frame": self._frame,
            "result": self._result,
        }

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be read."""
        return self._is_ended or self._is_cancelled or self._is_closed or self.failure is not None

    # What to send

    def open(self, opening: Opening) -> None:
        """Set what the stream begins with."""
        self._opening = opening
        self._preview = opening.preview if opening.HasField("preview") else None
        if isinstance(opening, style_transfer_service_pb2.WatchJobRequest):
            self.sequence = opening.after_sequence

    def next_call(self) -> tuple[str, Opening]:
        """Return the method and the request of the call that is to carry the stream from here on."""
        self._frame_parts.clear()
        self._result_parts.clear()
        self._goes_on = self.job is not None
        opening = self._opening
        assert opening is not None
        if isinstance(opening, style_transfer_service_pb2.StylizeRequest):
            return "Stylize", opening
        opening.after_sequence = self.sequence
        return "WatchJob", opening

    def cancelling(self) -> Calls:
        """Yield the calls that end the job."""
        match self._opening:
            case style_transfer_service_pb2.WatchJobRequest(name=name):
                yield "CancelJob", style_transfer_service_pb2.CancelJobRequest(name=name)
            case style_transfer_service_pb2.StylizeRequest(request_id=request_id):
                # The call was hung up before it named the job. If there is one nevertheless, it has our id.
                page = yield "ListJobs", style_transfer_service_pb2.ListJobsRequest(page_size=RECENT_JOBS)
                for job in page.jobs:
                    if job.request_id == request_id:
                        yield "CancelJob", style_transfer_service_pb2.CancelJobRequest(name=job.name)

    # What arrives

    def receive(self, message: job_pb2.JobEvent) -> Event | None:
        """Return the event that a message completes.

        None for a part of a picture, for what has been told before, and for kinds unknown here. Raises
        BrokenStreamError.
        """
        self._connection.works()
        kind = message.WhichOneof("event")
        if kind != "snapshot":
            # A server that fails whenever it is asked for this job gets as far as that, too.
            self._patience.renew()
        if kind not in self._readers or (kind in NUMBERED and message.sequence <= self.sequence):
            return None
        head = {
            "sequence": message.sequence,
            "attempt": message.attempt,
            "time": convert.time(message.event_time),
        }
        try:
            event = self._readers[kind](getattr(message, kind), head)
        except NstError as error:
            self.failure = error
            raise
        if event is not None and kind in NUMBERED:
            self.sequence = event.sequence
        return event

    def end(self) -> None:
        """Note that the stream ended with OK. Raises BrokenStreamError if the job had not ended."""
        parts_missing = not (self._frame_parts.is_empty and self._result_parts.is_empty)
        if parts_missing or self.job is None or not self.job.state.is_terminal:
            self.failure = BrokenStreamError(f"the stream from {self._connection.address} ended before the job did")
            raise self.failure
        self._is_ended = True

    def broke(self, error: grpc.RpcError) -> float:
        """Note that a call ended with an error, and return after how many seconds to go on; 0 if the stream is over.

        Raises our exception if it broke for good.
        """
        self.call = None
        if self.failure is not None:
            raise self.failure
        if self._is_told_whole:
            self._is_ended = True
        if self.is_over:
            return 0.0
        try:
            return self.limit.capped_s(self._patience.pause_s(error, self.job))
        except NstError as failure:
            self.failure = failure
            raise

    # Leaving

    def cancel(self) -> bool:
        """Note that the job is not wanted any more, and hang up. Return whether the server is still to be told."""
        if self._is_told_whole or self._is_cancelled:
            return False
        self._is_cancelled = True
        self.hang_up()
        return True

    def close(self) -> bool:
        """Hang up. Return whether the job is to be cancelled; one whose stream broke is left alone."""
        if self.is_over:
            return False
        if self.owns_job:
            return self.cancel()
        self.detach()
        return False

    def interrupt(self) -> bool:
        """Note that the reader was stopped. Return whether the job is to be cancelled; else it may read on."""
        if self.owns_job:
            return self.close()
        self.hang_up()
        self.call = None
        return False

    def detach(self) -> None:
        """Hang up, and leave the job alone."""
        if not self.is_over:
            self._is_closed = True
            self.hang_up()

    def close_client(self) -> bool:
        """Note that the client is being closed, and hang up. Return whether the job is to be cancelled."""
        if self.is_over:
            return False
        if self.owns_job:
            self.failure = JobCancelledError(f"{self._name()} was cancelled: the client was closed", job=self.job)
        else:
            self.failure = ClientClosedError(f"the client was closed; {self._name()} goes on")
        self.hang_up()
        return self.owns_job

    def abandon(self) -> None:
        """Note that nobody holds the stream any more, and hang up."""
        self.is_abandoned = self.owns_job and not self.is_over and not self._is_told_whole
        self.close()

    def hang_up(self) -> None:
        """End the call."""
        if self.call is not None:
            self.call.cancel()

    # What came of it

    def missing_result(self) -> JobResult | None:
        """Return where the job's result is if it came before the stream began, else None."""
        is_missing = self._is_ended and self.result is None and self.job is not None
        return self.job.result if is_missing and self.job is not None else None

    def fetched(self, picture: Picture) -> None:
        """Take the result, which was fetched elsewhere."""
        job = self.job
        assert job is not None
        assert job.result is not None
        assert job.end_time is not None
        self.result = Result(
            data=picture.data,
            format=picture.format,
            width=picture.width,
            height=picture.height,
            iteration=job.result.iteration,
            loss=job.result.loss,
            stop_reason=job.result.stop_reason,
            # The last event is that it ended.
            sequence=job.sequence - 1,
            attempt=job.attempt,
            time=job.end_time,
        )

    def outcome(self) -> Result:
        """Return the result, once the stream has ended.

        Raises JobFailedError, JobCancelledError, what broke the stream, or ClientClosedError if it was left.
        """
        state = JobState.UNKNOWN if self.job is None else self.job.state
        if state is JobState.FAILED:
            raise _job_failed(self.job)
        if state is JobState.SUCCEEDED and self.result is not None:
            return self.result
        if self.failure is not None:
            raise self.failure
        if state is JobState.CANCELLED or self._is_cancelled:
            raise JobCancelledError(f"{self._name()} was cancelled", job=self.job, code="CANCELLED")
        if self._is_closed:
            raise ClientClosedError(f"the stream of {self._name()} was closed before the job ended; the job goes on")
        raise BrokenStreamError(f"{self._name()} ended without a result")

    def _name(self) -> str:
        return "the job" if self.job is None else self.job.name

    # Events

    def _see(self, message: job_pb2.Job) -> Job:
        seen = convert.job(message)
        # After a break, what is told again is older than the snapshot that came before it.
        if self.job is None or seen.sequence >= self.job.sequence:
            self.job = seen
        return seen

    def _snapshot(self, message: job_pb2.Job, head: dict[str, Any]) -> Event | None:
        is_first = self.job is None
        job = self._see(message)
        if isinstance(self._opening, style_transfer_service_pb2.StylizeRequest):
            # It has the images, which have arrived.
            self._opening = style_transfer_service_pb2.WatchJobRequest(name=job.name, preview=self._preview)
        return Snapshot(job=job, **head) if is_first else None

    def _state_change(self, message: job_pb2.StateChange, head: dict[str, Any]) -> Event:
        job = self._see(message.job)
        self._is_told_whole = job.state.is_terminal
        return StateChange(job=job, **head)

    def _progress(self, message: job_pb2.Progress, head: dict[str, Any]) -> Event:
        return Progress(**convert.numbers(message), **head)

    def _frame(self, message: job_pb2.Frame, head: dict[str, Any]) -> Event | None:
        whole = self._frame_parts.add(message.image, of=message.iteration)
        iteration, last, skipped = message.iteration, self._last_frame, message.skipped
        if whole is None or (last is not None and iteration <= last):
            return None
        if self._goes_on and last is not None:
            # The server does not know what came before the break.
            interval = 1 if self._preview is None else self._preview.interval or 1
            skipped = min(skipped, (iteration - last - 1) // interval)
        self._goes_on = False
        self._last_frame = iteration
        return Frame(iteration=iteration, skipped=skipped, **whole, **head)

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
