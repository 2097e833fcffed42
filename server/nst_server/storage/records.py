"""What is stored, row by row. Every time is in UTC and knows it; every mapping is what JSON can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeAlias

Json: TypeAlias = Mapping[str, Any]

QUEUED = "queued"
RUNNING = "running"
PAUSED = "paused"
ENDED = ("succeeded", "failed", "cancelled")
"""States that a job never leaves."""

PROGRESS = "progress"
"""Kind of the events that compaction drops."""


@dataclass(frozen=True)
class JobRecord:
    """A job.

    Attributes:
        queue_position: jobs before it in its owner's queue.
        request_id: the caller's own name for the request, empty for none; unique for each caller.
        request_sha256: of the request, by which a repetition is told from a reuse of its id.
        request: what was asked for, as the server checked it.
        attempt: how often a worker took the job; with `owner` it is the fence of a worker's writes.
        owner: which server has the job until `lease_until`, whether it runs or waits there; empty for none.
        sequence: number of the last event; `compacted`: events of progress up to this one are gone.
        checkpoint: where to go on from; `command`: what its owner is still to be told.
    """

    id: str
    create_time: datetime
    caller: str = ""
    request_id: str = ""
    request_sha256: str = ""
    state: str = QUEUED
    model: str = ""
    width: int = 0
    height: int = 0
    request: Json = field(default_factory=dict)
    options: Json = field(default_factory=dict)
    start_time: datetime | None = None
    end_time: datetime | None = None
    attempt: int = 0
    owner: str = ""
    lease_until: datetime | None = None
    sequence: int = 0
    compacted: int = 0
    device: str = ""
    precision: str = ""
    progress: Json | None = None
    result: Json | None = None
    error: Json | None = None
    checkpoint: Json | None = None
    command: Json | None = None
    finishing: bool = False
    queue_position: int = 0


@dataclass(frozen=True)
class EventRecord:
    """What happened to a job: the `sequence`-th event, from 1 on without gaps."""

    sequence: int
    attempt: int
    time: datetime
    kind: str
    payload: Json


class Fence(NamedTuple):
    """Whose write it is: only the owner of the job's lease may write, and only of its newest attempt."""

    owner: str
    attempt: int


@dataclass(frozen=True)
class Batch:
    """Changes of one job that belong together.

    Attributes:
        events: numbered on from the job's last.
        changes: new values of columns of the job.
        images: SHA-256s of images that the job holds from now on.
        fence: None for whoever it is.
    """

    id: str
    events: Sequence[EventRecord] = ()
    changes: Json = field(default_factory=dict)
    images: Sequence[str] = ()
    fence: Fence | None = None


@dataclass(frozen=True)
class ImageRecord:
    """An image whose file is among the blobs. `last_used` is when it was last uploaded, made or given to a job."""

    sha256: str
    bytes: int
    width: int
    height: int
    mime: str
    caller: str
    create_time: datetime
    last_used: datetime


@dataclass(frozen=True)
class UploadRecord:
    """An image on its way here.

    Attributes:
        size: of the whole file, bytes; `received` of them are here.
        sha256: of the whole file if the caller said it, or if it is complete; else empty.
    """

    id: str
    caller: str
    size: int
    sha256: str
    create_time: datetime
    received: int = 0
