"""Why a request is refused. The servicers turn these into status codes by one table, in `status.py`.

RequestError
├── InvalidField         a field is missing, malformed or out of range
├── NotFound             a named resource does not exist
├── AlreadyExists        an id stands for something else
├── RequestIdReused      a request_id came before, with another request
├── JobEnded             a job has ended and changes no more
├── ModelNotFetched      a known feature model whose weights are not on this server
├── QueueFull            too many jobs, or exports, wait already
├── StorageFull          the data folder takes no more
├── StorageReadOnly      the data folder cannot be written to
├── StorageDamaged       what is stored is not what was written
├── StorageUnavailable   the database or the object store does not answer
├── Unread               the caller left its stream unread for too long
├── PartMissing          a part of an upload before this one is not here
├── Moved                another server has taken a job over
├── Internal             something nobody foresaw
└── Stopping             the server is about to stop
"""

from __future__ import annotations


class RequestError(Exception):
    """Base of every refusal. `reason` is for programs, the message for people."""

    reason = "INTERNAL"


class InvalidField(RequestError):
    """A field is missing, malformed or out of range.

    Attributes:
        field: path of the field in the request, `styles[0].image.data` for instance.
    """

    reason = "INVALID_FIELD"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field} {problem}")
        self.field = field
        self.problem = problem


class NotFound(RequestError):
    """A named resource does not exist."""

    reason = "NOT_FOUND"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class AlreadyExists(RequestError):
    """An id stands for something else already."""

    reason = "ALREADY_EXISTS"


class RequestIdReused(RequestError):
    """A caller's `request_id` came before, with another request."""

    reason = "REQUEST_ID_REUSED"

    def __init__(self, request_id: str, job_id: str) -> None:
        super().__init__(
            f"request_id {request_id!r} belongs to job {job_id!r}, which was asked for by another request; "
            "use a new request_id for a new request"
        )


class JobEnded(RequestError):
    """A job has ended and changes no more."""

    reason = "JOB_ENDED"


class ModelNotFetched(RequestError):
    """The weights of a known feature model are not on this server."""

    reason = "MODEL_NOT_FETCHED"


class QueueFull(RequestError):
    """Too many jobs, or exports, wait already.

    Attributes:
        retry_after_s: when a place may be free, seconds from now.
    """

    reason = "QUEUE_FULL"

    def __init__(self, waiting: int, retry_after_s: float, what: str = "jobs") -> None:
        super().__init__(f"the queue is full: {waiting} {what} wait already; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class TooManyStreams(RequestError):
    """As many streams are open as the server serves."""

    reason = "TOO_MANY_STREAMS"

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} streams are open already, as many as this server serves; try again later")
        self.limit = limit


class StorageFull(RequestError):
    """The data folder takes no more."""

    reason = "STORAGE_FULL"


class StorageReadOnly(RequestError):
    """The data folder cannot be written to."""

    reason = "STORAGE_READ_ONLY"


class StorageDamaged(RequestError):
    """What is stored is not what was written."""

    reason = "STORAGE_DAMAGED"


class StorageUnavailable(RequestError):
    """The database or the object store does not answer; it may in a moment."""

    reason = "STORAGE_UNAVAILABLE"


class Unread(RequestError):
    """The caller left its stream unread for too long."""

    reason = "STREAM_UNREAD"


class PartMissing(RequestError):
    """A part of an upload before this one is not here.

    Attributes:
        received_bytes: how many bytes, from the first on, are.
    """

    reason = "PART_MISSING"

    def __init__(self, received_bytes: int) -> None:
        super().__init__(f"offset: only {received_bytes} bytes are here; go on from there")
        self.received_bytes = received_bytes


class Moved(RequestError):
    """Another server has taken a job over; watch it there."""

    reason = "JOB_MOVED"


class Stopping(RequestError):
    """The server is about to stop and takes no more jobs."""

    reason = "SERVER_STOPPING"


class Internal(RequestError):
    """The server failed in a way that nobody foresaw."""

    reason = "INTERNAL"
