"""From refusals to gRPC status codes with google.rpc details: one table, used by every servicer."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from nst_server.errors import (
    AlreadyExists,
    Internal,
    InvalidField,
    JobEnded,
    ModelNotFetched,
    Moved,
    NotFound,
    PartMissing,
    QueueFull,
    RequestError,
    RequestIdReused,
    Stopping,
    StorageDamaged,
    StorageFull,
    StorageReadOnly,
    StorageUnavailable,
    TooManyStreams,
    Unread,
)

DOMAIN = "nst"

CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidField: grpc.StatusCode.INVALID_ARGUMENT,
    NotFound: grpc.StatusCode.NOT_FOUND,
    AlreadyExists: grpc.StatusCode.ALREADY_EXISTS,
    RequestIdReused: grpc.StatusCode.ALREADY_EXISTS,
    JobEnded: grpc.StatusCode.FAILED_PRECONDITION,
    ModelNotFetched: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TooManyStreams: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StorageFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StorageReadOnly: grpc.StatusCode.FAILED_PRECONDITION,
    StorageDamaged: grpc.StatusCode.DATA_LOSS,
    StorageUnavailable: grpc.StatusCode.UNAVAILABLE,
    Unread: grpc.StatusCode.UNAVAILABLE,
    Moved: grpc.StatusCode.UNAVAILABLE,
    PartMissing: grpc.StatusCode.OUT_OF_RANGE,
    Internal: grpc.StatusCode.INTERNAL,
    Stopping: grpc.StatusCode.UNAVAILABLE,
}

RETRY_S = 5.0

MAX_TEXT_BYTES = 1000
"""A status travels in HTTP/2 headers, of which clients accept 8 KiB, and each text in it two or three times."""


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: RequestError) -> None:
    """End an RPC with the status that stands for `error`; never returns normally."""
    status = rpc_status.to_status(
        status_pb2.Status(
            code=CODES[type(error)].value[0],
            message=_short(str(error)),
            details=[_packed(detail) for detail in _details(error)],
        )
    )
    await context.abort(status.code, status.details, status.trailing_metadata)


def _details(error: RequestError) -> list[Any]:
    metadata = {"received_bytes": str(error.received_bytes)} if isinstance(error, PartMissing) else {}
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)]
    if isinstance(error, InvalidField | NotFound):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_short(error.field), description=_short(error.problem)
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if isinstance(error, TooManyStreams):
        quota = error_details_pb2.QuotaFailure.Violation(subject="streams", description=str(error))
        details.append(error_details_pb2.QuotaFailure(violations=[quota]))
    if isinstance(error, QueueFull):
        details.append(_retry(error.retry_after_s))
    if isinstance(error, Stopping | Moved | StorageUnavailable):
        details.append(_retry(RETRY_S))
    return details


def _retry(seconds: float) -> Any:
    whole = int(seconds)
    delay = duration_pb2.Duration(seconds=whole, nanos=int((seconds - whole) * 1e9))
    return error_details_pb2.RetryInfo(retry_delay=delay)


def _short(text: str) -> str:
    """Return a text that may quote what a caller sent, cut if that was long."""
    encoded = text.encode()
    if len(encoded) <= MAX_TEXT_BYTES:
        return text
    half = MAX_TEXT_BYTES // 2
    return f"{encoded[:half].decode(errors='ignore')} … {encoded[-half:].decode(errors='ignore')}"


def _packed(detail: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
