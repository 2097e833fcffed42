"""gRPC's errors, made into this package's. One table from status to exception."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from nst_client.errors import (
    AlreadyExistsError,
    BrokenStreamError,
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    JobCancelledError,
    MessageTooLargeError,
    NotFoundError,
    NstError,
    QueueFullError,
    ResourceExhaustedError,
    ServerError,
    UnavailableError,
)
from nst_client.resources import Job

# gRPC's own words, at the end that receives: "CLIENT" is us.
TOO_LARGE = re.compile(
    r"(?P<end>CLIENT|SERVER)?:? ?Received message larger than max \((?P<size>\d+) vs\. (?P<limit>\d+)\)"
)

NEVER_REACHED = re.compile("failed to connect to all addresses|DNS resolution failed|errors resolving")
"""gRPC's own words for a connection that never stood; there is no other sign of it."""

BROKEN = re.compile("RST_STREAM|GOAWAY|stream removed|socket closed|connection reset", re.IGNORECASE)
"""gRPC's own words for a call that broke on the way, which comes under several statuses."""

BROKEN_STATUSES = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED})

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class _Status:
    """One error of gRPC, taken apart."""

    code: grpc.StatusCode
    message: str
    address: str
    job: Job | None
    reason: str = ""
    """Of the detail ErrorInfo, which only this service's own errors have."""
    field: str = ""
    """Of the detail BadRequest."""
    retry_after_s: float | None = None
    """Of the detail RetryInfo."""


def nst_error(error: grpc.RpcError, *, address: str, job: Job | None = None) -> NstError:
    """Return the exception for an error of gRPC: a call's (sync or async) after it has ended.

    `job` is the job that the call was about.
    """
    status = _Status(
        code=error.code(),
        message=error.details() or error.code().name,
        address=address,
        job=job,
        **_details(error),
    )
    if status.code in BROKEN_STATUSES and not status.reason and BROKEN.search(status.message):
        return _unavailable(status)
    return EXCEPTIONS.get(status.code, _server_error)(status)


def _details(error: grpc.RpcError) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for detail in _unpacked(error):
        match detail:
            case error_details_pb2.ErrorInfo():
                found["reason"] = detail.reason
            case error_details_pb2.BadRequest() if detail.field_violations:
                found["field"] = detail.field_violations[0].field
            case error_details_pb2.RetryInfo():
                found["retry_after_s"] = detail.retry_delay.ToTimedelta().total_seconds()
    return found


def _unpacked(error: grpc.RpcError) -> list[Message]:
    try:
        status = rpc_status.from_call(error)
    except (DecodeError, ValueError):
        # Details that contradict the status, from a proxy for instance: the status itself is enough.
        return []
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    found = []
    for detail in status.details if status is not None else ():
        for kind in kinds:
            message = kind()
            if detail.Unpack(message):
                found.append(message)
    return found


def _invalid_argument(status: _Status) -> NstError:
    return InvalidArgumentError(status.message, field=status.field, code=status.code.name, reason=status.reason)


def _plain(kind: type[NstError]) -> Callable[[_Status], NstError]:
    return lambda status: kind(status.message, code=status.code.name, reason=status.reason)


def _resource_exhausted(status: _Status) -> NstError:
    if too_large := TOO_LARGE.search(status.message):
        return _too_large(status, too_large)
    kind = ResourceExhaustedError if status.retry_after_s is None else QueueFullError
    return kind(status.message, retry_after_s=status.retry_after_s, code=status.code.name, reason=status.reason)


def _too_large(status: _Status, match: re.Match[str]) -> NstError:
    size, limit = (f"{int(match[name]) / MEBIBYTE:.1f} MiB" for name in ("size", "limit"))
    if match["end"] == "CLIENT":
        return BrokenStreamError(f"the server sent a message of {size}; gRPC takes {limit}", code=status.code.name)
    return MessageTooLargeError(
        f"the request takes {size}, and the server at {status.address} takes {limit}: bring smaller images, or upload"
        " them before; a style file of fewer layers or sizes; or let the operator raise max_message_mib",
        code=status.code.name,
    )


def _unavailable(status: _Status) -> NstError:
    # The server's own refusals carry ErrorInfo; what has none came from the network.
    if status.reason:
        message = f"the server at {status.address} is not available: {status.message}"
    elif NEVER_REACHED.search(status.message):
        message = f"cannot reach a server at {status.address}: {status.message}"
    else:
        message = f"the connection to the server at {status.address} broke: {status.message}"
    if status.job is not None:
        message += f"; {status.job.name} may still be running"
    return UnavailableError(
        message,
        job=status.job,
        address=status.address,
        retry_after_s=status.retry_after_s,
        code=status.code.name,
        reason=status.reason,
    )


def _deadline_exceeded(status: _Status) -> NstError:
    what = "the call" if status.job is None else status.job.name
    message = f"{what} took longer than its time limit at {status.address}"
    return DeadlineExceededError(message, code=status.code.name, reason=status.reason)


def _cancelled(status: _Status) -> NstError:
    name = "the call" if status.job is None else status.job.name
    return JobCancelledError(f"{name} was cancelled: {status.message}", job=status.job, code=status.code.name)


def _unimplemented(status: _Status) -> NstError:
    message = f"the server at {status.address} does not know this call; it may be older than this client"
    return ServerError(f"{message} ({status.message})", code=status.code.name, reason=status.reason)


def _server_error(status: _Status) -> NstError:
    message = f"the server at {status.address} failed with {status.code.name}: {status.message}"
    return ServerError(message, code=status.code.name, reason=status.reason)


EXCEPTIONS: dict[grpc.StatusCode, Callable[[_Status], NstError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: _invalid_argument,
    grpc.StatusCode.OUT_OF_RANGE: _invalid_argument,
    grpc.StatusCode.NOT_FOUND: _plain(NotFoundError),
    grpc.StatusCode.ALREADY_EXISTS: _plain(AlreadyExistsError),
    grpc.StatusCode.FAILED_PRECONDITION: _plain(FailedPreconditionError),
    grpc.StatusCode.RESOURCE_EXHAUSTED: _resource_exhausted,
    grpc.StatusCode.UNAVAILABLE: _unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: _deadline_exceeded,
    grpc.StatusCode.CANCELLED: _cancelled,
    grpc.StatusCode.UNIMPLEMENTED: _unimplemented,
}
