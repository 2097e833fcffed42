"""Between what the server knows of jobs and what the store keeps of it: JSON, that a later version can read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from nst_model.options import StylizeOptions, plain
from nst_server.images import ImageFormat
from nst_server.jobs import (
    Event,
    Finished,
    JobError,
    JobSnapshot,
    JobState,
    Payload,
    StateChanged,
    StoredResult,
)
from nst_server.messages import Checkpoint, Progressed
from nst_server.storage.records import PROGRESS, EventRecord, JobRecord

STATE, RESULT = "state", "result"


def event_to_record(event: Event) -> EventRecord:
    """Return what is stored of a numbered event."""
    kind, payload = _payload_to_json(event.payload)
    return EventRecord(event.sequence, event.attempt, event.time, kind, payload)


def event_from_record(record: EventRecord) -> Event:
    """Return the event that `event_to_record` stored."""
    return Event(record.sequence, record.attempt, record.time, _payload_from_json(record.kind, record.payload))


def snapshot_from_record(record: JobRecord) -> JobSnapshot:
    """Return a job as the store has it."""
    return JobSnapshot(
        name=f"jobs/{record.id}",
        state=JobState(record.state),
        model=record.model,
        options=options_from_json(record.options),
        width=record.width,
        height=record.height,
        create_time=record.create_time,
        start_time=record.start_time,
        end_time=record.end_time,
        queue_position=record.queue_position,
        device=record.device,
        precision=record.precision,
        progress=None if record.progress is None else progress_from_json(record.progress),
        error=None if record.error is None else JobError(**record.error),
        result=None if record.result is None else result_from_json(record.result),
        attempt=record.attempt,
        sequence=record.sequence,
        request_id=record.request_id,
        finishing=record.finishing,
    )


def columns(snapshot: JobSnapshot) -> dict[str, Any]:
    """Return the columns of a job that its events change."""
    return {
        "state": snapshot.state.value,
        "options": plain(snapshot.options),
        "start_time": snapshot.start_time,
        "end_time": snapshot.end_time,
        "device": snapshot.device,
        "precision": snapshot.precision,
        "progress": None if snapshot.progress is None else dataclasses.asdict(snapshot.progress),
        "error": None if snapshot.error is None else dataclasses.asdict(snapshot.error),
        "result": None if snapshot.result is None else dataclasses.asdict(snapshot.result),
        "finishing": snapshot.finishing,
        "queue_position": snapshot.queue_position,
    }


def checkpoint_to_json(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what is stored of a checkpoint whose state is among the blobs."""
    names = ("key", "iteration", "elapsed_s", "attempt")
    return {name: getattr(checkpoint, name) for name in names}


def checkpoint_from_json(values: Mapping[str, Any] | None) -> Checkpoint | None:
    """Return a stored checkpoint, None if there is none."""
    return None if values is None else Checkpoint(**values)


def options_from_json(values: Mapping[str, Any]) -> StylizeOptions:
    """Return stored options."""
    return StylizeOptions(**values)


def progress_from_json(values: Mapping[str, Any]) -> Progressed:
    """Return the stored numbers of an iteration."""
    return Progressed(**values)


def result_from_json(values: Mapping[str, Any]) -> StoredResult:
    """Return a stored result, without its file."""
    return StoredResult(**{**values, "format": ImageFormat(values["format"])})


def _payload_to_json(payload: Payload) -> tuple[str, dict[str, Any]]:
    match payload:
        case Progressed():
            return PROGRESS, dataclasses.asdict(payload)
        case Finished():
            return RESULT, dataclasses.asdict(payload.result)
        case StateChanged():
            return STATE, _snapshot_to_json(payload.job)
    raise TypeError(f"{type(payload).__name__} has no number of its own")


def _payload_from_json(kind: str, values: Mapping[str, Any]) -> Payload:
    match kind:
        case "progress":
            return progress_from_json(values)
        case "result":
            return Finished(result_from_json(values))
    return StateChanged(_snapshot_from_json(values))


def _snapshot_to_json(snapshot: JobSnapshot) -> dict[str, Any]:
    times = {name: _time_to_json(getattr(snapshot, name)) for name in ("create_time", "start_time", "end_time")}
    rest = {name: getattr(snapshot, name) for name in ("name", "model", "width", "height", "attempt")}
    return {**columns(snapshot), **rest, **times, "sequence": snapshot.sequence, "request_id": snapshot.request_id}


def _snapshot_from_json(values: Mapping[str, Any]) -> JobSnapshot:
    return JobSnapshot(
        **{
            **values,
            "state": JobState(values["state"]),
            "options": options_from_json(values["options"]),
            "create_time": datetime.fromisoformat(values["create_time"]),
            "start_time": _time_from_json(values["start_time"]),
            "end_time": _time_from_json(values["end_time"]),
            "progress": None if values["progress"] is None else progress_from_json(values["progress"]),
            "error": None if values["error"] is None else JobError(**values["error"]),
            "result": None if values["result"] is None else result_from_json(values["result"]),
        }
    )


def _time_to_json(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _time_from_json(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
