"""The contract's servicers: convert, delegate, convert."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from typing import Any, Self, TypeVar

import grpc
import structlog
from google.protobuf import empty_pb2

from nst.v1 import (
    file_pb2,
    image_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    style_service_pb2,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_server import convert
from nst_server.application import Application
from nst_server.errors import (
    Internal,
    InvalidField,
    Moved,
    QueueFull,
    RequestError,
    Stopping,
    TooManyStreams,
    Unread,
)
from nst_server.exports import ExportedFile
from nst_server.frames import PreviewSpec
from nst_server.jobs import Event, Job, StateChanged
from nst_server.library import Library
from nst_server.status import abort
from nst_server.styles import Style

log = structlog.get_logger()

JOB_MAKERS = ("/nst.v1.StyleTransferService/Stylize", "/nst.v1.StyleTransferService/CreateJob")
"""Methods that need a place in the queue."""

STATUS_TIMEOUT_S = 10.0
"""How long a status may wait behind what a client has not read."""

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])

ASKING = 2
"""Requests that are received at once while the queue is full, to see whether they have made a job before."""

ASKING_S = 10.0
"""How long one of them waits for that."""


class _Place(contextlib.ExitStack):
    """What a call that makes a job holds until it is answered: its place in the queue.

    Attributes:
        taken: whether it holds one; if not, it may ask for a job that it made before.
        upload: what ends a call whose request is never complete.
    """

    taken = True
    upload: asyncio.TimerHandle

    def __enter__(self) -> Self:
        self.upload.cancel()
        return super().__enter__()


_place: contextvars.ContextVar[_Place] = contextvars.ContextVar("place")


def refusing(method: Method) -> Method:
    """Turn a RequestError that leaves an RPC method into its status."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except RequestError as error:
            refusal = error
        except (grpc.aio.BaseError, grpc.aio.AbortError):
            raise
        except Exception:
            # What went wrong inside is the operator's affair, and may name files.
            log.exception("call failed", method=method.__name__)
            refusal = Internal("the server failed to answer; its log says why")
        # gRPC keeps what aborts a call, and with it all frames that it came through: no image must be in them.
        del request
        refusal.__traceback__ = refusal.__context__ = refusal.__cause__ = None
        if not isinstance(refusal, Unread):
            await abort(context, refusal)
        # The status waits behind what was not read. A client that leaves it there too loses the call without one.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                await abort(context, refusal)
        return None

    return wrapped  # type: ignore[return-value]


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Holds a place in the queue for each call that makes a job, or refuses it, before its images are received.

    gRPC receives a request before it calls the servicer, and a few hundred requests full of images fill the memory.
    One that was sent before needs no place. Which are those only their `request_id` tells, so with a full queue they
    are received too, a few at a time.
    """

    def __init__(self, application: Application, upload_timeout_s: float) -> None:
        self._application = application
        self._upload_timeout_s = upload_timeout_s
        self._asking = asyncio.Semaphore(ASKING)

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Choose the handler of a call; see grpc.aio.ServerInterceptor."""
        if details.method in JOB_MAKERS:
            held = _Place()
            # The servicer gives the place back; this is for a client that goes away before its request is complete.
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda _: held.close())
            try:
                await self._admit(held)
            except RequestError as error:
                return _refusal(error)
            # And this for one that stays and never completes it.
            held.upload = asyncio.get_running_loop().call_later(self._upload_timeout_s, task.cancel)
            held.callback(held.upload.cancel)
            _place.set(held)
        return await continuation(details)

    async def _admit(self, held: _Place) -> None:
        """Let a call hold a place, or the right to ask without one. Raises RequestError."""
        try:
            held.enter_context(self._application.place())
        except QueueFull as full:
            try:
                async with asyncio.timeout(ASKING_S):
                    await self._asking.acquire()
            except TimeoutError:
                raise full from None
            held.callback(self._asking.release)
            held.taken = False


class Streams(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses streams beyond a number. Other calls pass: whoever has filled it with streams must be able to cancel.

    Args:
        methods: full names of those that stream, `/nst.v1.StyleTransferService/WatchJob` for instance.
        limit: how many calls of them there may be at once.
    """

    def __init__(self, methods: Collection[str], limit: int) -> None:
        self._methods = frozenset(methods)
        self._limit = limit
        self._open = 0

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Choose the handler of a call; see grpc.aio.ServerInterceptor."""
        if details.method in self._methods:
            if self._open >= self._limit:
                return _refusal(TooManyStreams(self._limit))
            self._open += 1
            task = asyncio.current_task()
            assert task is not None, "gRPC serves each call in a task"
            task.add_done_callback(self._close)
        return await continuation(details)

    def _close(self, _: object) -> None:
        self._open -= 1


def _refusal(error: RequestError) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)  # a stream's messages are received when they are asked for


def _caller(context: Any) -> str:
    """Return the machine that a call comes from."""
    return str(context.peer()).rpartition(":")[0]


async def _write(context: Any, message: Any, timeout_s: float, resource: str) -> None:
    """Write to a stream. Raises Unread if the client does not read: gRPC never gives up on one that is connected."""
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        log.warning("client cut off: it left its stream unread", resource=resource, seconds=timeout_s)
        raise Unread(f"the stream was left unread for {timeout_s:g} s") from None
    except grpc.aio.BaseError:  # a client that is gone; gRPC's log need not say so at length
        raise asyncio.CancelledError from None


async def _send_file(made: AsyncGenerator[ExportedFile | None], request: Any, context: Any, timeout_s: float) -> None:
    """Write a file to a stream, from the request's offset on, with signs of life while it is being made.

    Who breaks off the call does not want the file any more. Raises InvalidField, Unread, and what `made` does.
    """
    async with contextlib.aclosing(made):
        if request.offset < 0:
            raise InvalidField("offset", f"must be at least 0, not {request.offset}")
        async for file in made:
            if file is None:
                await _write(context, file_pb2.FilePart(), timeout_s, "an export")
                continue
            offset = request.offset if request.sha256.lower() in ("", file.sha256) else 0
            if offset > file.size:
                raise InvalidField("offset", f"must be from 0 to {file.size}, not {offset}")
            whole = False
            while not whole:
                data = await file.read(offset, convert.PART_BYTES)
                await _write(context, convert.file_part_to_proto(file, offset, data), timeout_s, file.name)
                offset += len(data)
                whole = offset >= file.size


class StyleTransferServicer(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Makes pictures."""

    def __init__(self, application: Application, write_timeout_s: float) -> None:
        self._application = application
        self._write_timeout_s = write_timeout_s

    @refusing
    async def Stylize(self, request: Any, context: Any) -> None:  # noqa: N802 - the contract's name
        """Create a job and stream its events; unless the caller wants otherwise the job ends when the call does."""
        with _place.get() as place:
            asked = convert.request_from_proto(request)
            job, new = await self._application.create_job(
                asked, _caller(context), owned=asked.cancel_on_disconnect, placed=place.taken
            )
        try:
            await self._stream(job, asked.preview, 0, style_transfer_service_pb2.StylizeResponse, context)
        except (Moved, Stopping):  # which is no wish of the caller: the job goes on
            raise
        except BaseException:
            # Not only on CancelledError: a client that dies during a blocked write raises other things, or nothing.
            if new and asked.cancel_on_disconnect:  # another call's job is not this one's
                self._application.cancel(job)
            raise

    @refusing
    async def CreateJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Create a job."""
        with _place.get() as place:
            asked = convert.request_from_proto(request.request)
            job, _ = await self._application.create_job(asked, _caller(context), placed=place.taken)
        return self._described(job)

    @refusing
    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return a job."""
        return self._described(await self._application.get_job(request.name))

    @refusing
    async def ListJobs(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return a page of jobs."""
        states, page_size = convert.states_from_proto(request.states), convert.page_from_proto(request.page_size)
        jobs, token = await self._application.list_jobs(states, page_size, request.page_token)
        return style_transfer_service_pb2.ListJobsResponse(
            jobs=[self._described(job) for job in jobs], next_page_token=token
        )

    @refusing
    async def WatchJob(self, request: Any, context: Any) -> None:  # noqa: N802
        """Stream a job's events, from any one on."""
        preview = convert.preview_from_proto(request.preview)
        job = await self._application.get_job(request.name)
        if not 0 <= request.after_sequence <= job.snapshot().sequence:
            bounds = f"from 0 to {job.snapshot().sequence}, the job's last event"
            raise InvalidField("after_sequence", f"must be {bounds}, not {request.after_sequence}")
        response = style_transfer_service_pb2.WatchJobResponse
        await self._stream(job, preview, request.after_sequence, response, context)

    @refusing
    async def UpdateJob(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Change a job."""
        update = convert.update_from_proto(request)
        return self._described(await self._application.update_job(request.name, update))

    @refusing
    async def CancelJob(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """End a job."""
        return self._described(await self._application.cancel_job(request.name))

    @refusing
    async def DeleteJob(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Delete a job."""
        await self._application.delete_job(request.name)
        return empty_pb2.Empty()

    async def DescribeOptions(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Describe every option."""
        return style_transfer_service_pb2.DescribeOptionsResponse(
            options=convert.describe_options(), presets=convert.describe_presets()
        )

    def _described(self, job: Job) -> Any:
        return convert.job_to_proto(job.snapshot(), self._application.scheduler.estimated_start_s(job))

    def _estimated_start_s(self, job: Job, event: Event) -> float | None:
        """Return what `Scheduler.estimated_start_s` does, for an event that says how the job is now."""
        told = event.payload.job if isinstance(event.payload, StateChanged) else event.payload
        return self._application.scheduler.estimated_start_s(job) if told == job.snapshot() else None

    async def _stream(
        self, job: Job, preview: PreviewSpec, after: int, response: Callable[..., Any], context: Any
    ) -> None:
        """Write a job's events. Raises Unread if the client does not read them."""
        async with contextlib.aclosing(self._application.watch(job, preview, after)) as events:
            async for event in events:
                for message in convert.event_to_proto(event, self._estimated_start_s(job, event)):
                    await _write(context, response(event=message), self._write_timeout_s, job.name)


class ImageServicer(image_service_pb2_grpc.ImageServiceServicer):
    """Takes and gives images that are larger than one message."""

    def __init__(self, library: Library, write_timeout_s: float) -> None:
        self._library = library
        self._write_timeout_s = write_timeout_s

    @refusing
    async def CreateUpload(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Begin an upload."""
        return convert.upload_to_proto(await self._library.create(request.total_bytes, request.sha256))

    @refusing
    async def GetUpload(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return how far an upload has come."""
        return convert.upload_to_proto(await self._library.get(request.name))

    @refusing
    async def WriteUpload(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Add a part to an upload."""
        return convert.upload_to_proto(await self._library.write(request.name, request.offset, request.data))

    @refusing
    async def GetImage(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Describe an image."""
        return convert.image_record_to_proto(await self._library.describe(request.name))

    @refusing
    async def DownloadImage(self, request: Any, context: Any) -> None:  # noqa: N802
        """Stream an image's file."""
        image = await self._library.describe(request.name)
        if not 0 <= request.offset <= image.bytes:
            raise InvalidField("offset", f"must be from 0 to {image.bytes}, not {request.offset}")
        async for offset, data in self._library.read(image, request.offset):
            part = convert.stored_part_to_proto(image, offset, data)
            await _write(context, part, self._write_timeout_s, f"images/{image.sha256}")


class StyleServicer(style_service_pb2_grpc.StyleServiceServicer):
    """Keeps styles."""

    def __init__(self, application: Application, write_timeout_s: float) -> None:
        self._application = application
        self._write_timeout_s = write_timeout_s

    @refusing
    async def CreateStyle(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Store a style."""
        files = convert.style_images_from_proto(request.style)
        return await self._described(
            await self._application.create_style(request.style_id, request.style.display_name, files)
        )

    @refusing
    async def GetStyle(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return a style."""
        return await self._described(await self._application.get_style(request.name))

    @refusing
    async def ListStyles(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return a page of styles."""
        page_size = convert.page_from_proto(request.page_size)
        styles, token = await self._application.list_styles(page_size, request.page_token)
        return style_service_pb2.ListStylesResponse(
            styles=[await self._described(style) for style in styles], next_page_token=token
        )

    @refusing
    async def DeleteStyle(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Delete a style."""
        await self._application.delete_style(request.name)
        return empty_pb2.Empty()

    @refusing
    async def ExportStyle(self, request: Any, context: Any) -> None:  # noqa: N802
        """Make a style file and stream it."""
        options = convert.options_from_proto(request.options) if request.options.ListFields() else None
        made = await self._application.export_style(request.name, request.model, options)
        await _send_file(made, request, context, self._write_timeout_s)

    @refusing
    async def ImportStyle(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Store the style in a style file."""
        style = await self._application.import_style(request.style_id, request.display_name, request.data)
        return await self._described(style)

    async def _described(self, style: Style) -> Any:
        return convert.style_to_proto(style, await asyncio.to_thread(self._application.prepared, style))


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Lists and exports feature models."""

    def __init__(self, application: Application, write_timeout_s: float) -> None:
        self._application = application
        self._write_timeout_s = write_timeout_s

    @refusing
    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return a page of models."""
        page_size = convert.page_from_proto(request.page_size)
        models, token = await self._application.list_models(page_size, request.page_token)
        default = self._application.default_model
        listed = [convert.model_to_proto(card, sha256, default=card.name == default) for card, sha256 in models]
        return model_service_pb2.ListModelsResponse(models=listed, next_page_token=token)

    @refusing
    async def ExportModel(self, request: Any, context: Any) -> None:  # noqa: N802
        """Make a file of a feature model and stream it."""
        spec = convert.export_from_proto(request, self._application.default_model)
        made = await self._application.export_model(spec)
        await _send_file(made, request, context, self._write_timeout_s)
