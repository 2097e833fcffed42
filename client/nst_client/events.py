"""What a stylization tells while it runs.

Order: a `Snapshot`; then state changes, progress and frames; then the `Result`; last the `StateChange` to a terminal
state. On a slow connection frames are left out, and nothing else is.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from nst_client.images import Picture
from nst_client.resources import Job, Numbers, StopReason


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a job."""

    sequence: int
    """State changes, progress and the result count 1, 2, 3 …; a snapshot or frame has the number before it."""
    attempt: int
    """Which attempt at the job this is, from 1; it rises when the job had to go back."""
    time: datetime
    """When it happened, by the server's clock, UTC."""


@dataclass(frozen=True, kw_only=True)
class Snapshot(Event):
    """The job when the stream began: the first event."""

    job: Job


@dataclass(frozen=True, kw_only=True)
class StateChange(Event):
    """The job entered another state, or moved up in the queue."""

    job: Job
    """The job after the change."""


@dataclass(frozen=True, kw_only=True)
class Progress(Numbers, Event):
    """An iteration was made."""


@dataclass(frozen=True, kw_only=True)
class Frame(Picture, Event):
    """The picture at one iteration, whole."""

    iteration: int
    """The iteration whose picture this is."""
    skipped: int
    """Frames left out before this one because the client, the network or the encoder was too slow."""


@dataclass(frozen=True, kw_only=True)
class Result(Picture, Event):
    """The finished picture, whole."""

    iteration: int
    """The iteration whose picture this is."""
    loss: float
    """The objective at that picture."""
    stop_reason: StopReason
    """Why the optimization ended there."""
