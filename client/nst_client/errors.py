"""What can go wrong. Nothing else leaves the client: no `grpc.RpcError`, no `OSError` from reading an image.

```
NstError
├── InvalidArgumentError          a value is missing, malformed or out of range; found here or by the server
│   ├── UnknownOptionError        no option has that name (also a TypeError)
│   └── ImageNotReadableError     an image that was brought along is not a readable file
├── NotFoundError                 the job, image, style or model does not exist
├── AlreadyExistsError            the id stands for another style, or for another request
├── FailedPreconditionError       it cannot be done now: a model's weights are not fetched, a job has ended
├── ResourceExhaustedError        the server has no room
│   ├── QueueFullError            too many jobs, or exports, wait; come back after `retry_after_s`
│   └── MessageTooLargeError      images, or a style file, are larger than the server takes in one message
├── UnavailableError              the server cannot be reached, is starting or is stopping, and did not come back
├── DeadlineExceededError         `timeout_s` passed
├── ServerError                   the server failed, or answered with something this client does not expect
├── BrokenStreamError             the stream contradicts the contract: missing parts, a wrong checksum, an early end
├── ClientClosedError             the client, or the stream, was closed before the call
└── JobEndedError                 the job ended without a result
    ├── JobFailedError            it failed; `reason` and `code` say why
    └── JobCancelledError         it was cancelled
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nst_client.resources import Job


class NstError(Exception):
    """Base of everything this package raises.

    Its text is for people and says what to do; the attributes are for programs.

    `code` is the name of the gRPC status (`INVALID_ARGUMENT`), empty if the client found the error by itself.
    `reason` is the server's stable word for it (`google.rpc.ErrorInfo.reason`), empty if there is none.
    `is_repeated` says that the call was sent before, and that its answer was lost: it may have been carried out.
    """

    def __init__(self, message: str, *, code: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.is_repeated = False


class InvalidArgumentError(NstError, ValueError):
    """A value is missing, malformed or out of range. Nothing was started.

    `field` is the path of the field in the request (`options.iterations`, `content`), empty if it is not known.
    """

    def __init__(self, message: str, *, field: str = "", code: str = "", reason: str = "") -> None:
        super().__init__(message, code=code, reason=reason)
        self.field = field


class UnknownOptionError(InvalidArgumentError, TypeError):
    """No option has that name. `closest` is the most similar name there is, or None."""

    def __init__(self, message: str, *, field: str = "", closest: str | None = None) -> None:
        super().__init__(message, field=field)
        self.closest = closest


class ImageNotReadableError(InvalidArgumentError):
    """An image that was brought along is missing, is not a file, or cannot be read."""


class NotFoundError(NstError):
    """The named job, image, style or model does not exist, or no longer."""


class AlreadyExistsError(NstError):
    """The id stands for a style with other images, weights or display name, or the `request_id` for another request."""


class FailedPreconditionError(NstError):
    """The server, or the job, is not in a state for this: `reason` is MODEL_NOT_FETCHED or JOB_ENDED, for instance."""


class ResourceExhaustedError(NstError):
    """The server has no room. `retry_after_s` is the server's advice in seconds, None if it gave none."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, code: str = "", reason: str = "") -> None:
        super().__init__(message, code=code, reason=reason)
        self.retry_after_s = retry_after_s


class QueueFullError(ResourceExhaustedError):
    """Too many jobs, or exports, wait already. Nothing was started; try again after `retry_after_s`."""


class MessageTooLargeError(ResourceExhaustedError):
    """The images are larger than the server takes in one message: bring smaller ones, or upload them before.

    Or it is a style file: one of fewer layers or sizes is smaller.
    """


class UnavailableError(NstError):
    """The server cannot be reached, is starting or is stopping, or the connection broke.

    `address` is where it was sought; `retry_after_s` is the server's advice in seconds, None if it gave none; `job` is
    the job that the call was about, as it was last seen: it may still be running, and `watch_job` takes it up again.
    None if there was none yet.
    """

    def __init__(
        self,
        message: str,
        *,
        address: str = "",
        retry_after_s: float | None = None,
        job: Job | None = None,
        code: str = "",
        reason: str = "",
    ) -> None:
        super().__init__(message, code=code, reason=reason)
        self.address = address
        self.retry_after_s = retry_after_s
        self.job = job


class DeadlineExceededError(NstError, TimeoutError):
    """The call took longer than its `timeout_s`. A job that `stylize` had begun is cancelled."""


class ServerError(NstError):
    """The server failed, or answered with a status this client does not expect; `code` names it."""


class BrokenStreamError(NstError):
    """The stream contradicts the contract: parts that do not fit, a wrong checksum, an end before the job's."""


class ClientClosedError(NstError):
    """The client, or the stream, was closed before the call. The job, if there was one, goes on."""


class JobEndedError(NstError):
    """The job ended without a result. `job` is the job as it was last seen, None if it was never seen."""

    def __init__(self, message: str, *, job: Job | None = None, code: str = "", reason: str = "") -> None:
        super().__init__(message, code=code, reason=reason)
        self.job = job


class JobFailedError(JobEndedError):
    """The job failed on the server.

    `reason` is stable, for programs (`WORKER_DIED`, `OUT_OF_MEMORY`, …); `code` names the google.rpc.Code that
    describes it best.
    """


class JobCancelledError(JobEndedError):
    """The job was cancelled, here or on the server."""
