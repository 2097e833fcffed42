"""Changes whose answer may be lost: asked for again, they find their own work done. No network here."""

from __future__ import annotations

from typing import Any

from nst.v1 import job_pb2, style_transfer_service_pb2
from nst_client.errors import FailedPreconditionError, NotFoundError
from nst_client.transfers import Calls


def deleting(method: str, request: Any) -> Calls:
    """Yield the call that deletes something. Raises NotFoundError if there was nothing from the beginning."""
    try:
        yield method, request
    except NotFoundError as error:
        if not error.is_repeated:
            raise


def updating(request: style_transfer_service_pb2.UpdateJobRequest) -> Calls:
    """Yield the calls that change a job; return the job.

    One that has ended cannot be changed; but if it was to finish, that is what came of it.
    """
    try:
        return (yield "UpdateJob", request)
    except FailedPreconditionError as error:
        if not (request.finish and error.is_repeated):
            raise
        job = yield "GetJob", style_transfer_service_pb2.GetJobRequest(name=request.name)
        if job.state != job_pb2.JOB_STATE_SUCCEEDED:
            raise
        return job
