"""The contract's servicers: convert, delegate, convert."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf import empty_pb2

from nst.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    style_service_pb2,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_server import convert
from nst_server.application import Application
from nst_server.errors import Internal, RequestError, Unread
from nst_server.jobs import Job, PreviewSpec
from nst_server.status import abort
from nst_server.styles import Style

log = structlog.get_logger()

STYLIZE = "/nst.v1.StyleTransferService/Stylize"

Method = TypeVar("Method", bound=Callable[..., Awaitable[Any]])

_place: contextvars.ContextVar[contextlib.ExitStack] = contextvars.ContextVar("place")
"""What the call that is being served holds in the queue."""


def refusing(method: Method) -> Method:
    """Turn a RequestError that leaves an RPC method into its status."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except RequestError as error:
            await abort(context, error)
        except (grpc.aio.BaseError, grpc.aio.AbortError):
            raise
        except Exception:
            # What went wrong inside is the operator's affair, and may name files.
            log.exception("call failed", method=method.__name__)
            await abort(context, Internal("the server failed to answer; its log says why"))

    return wrapped  # type: ignore[return-value]


class Admission(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Holds a place in the queue for each call of Stylize, or refuses it, before its images are received.

    gRPC receives a request before it calls the servicer, and a few hundred requests full of images fill the memory.
    """

    def __init__(self, application: Application, upload_timeout_s: float) -> None:
        self._application = application
        self._upload_timeout_s = upload_timeout_s

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        """Choose the handler of a call; see grpc.aio.ServerInterceptor."""
        if details.method == STYLIZE:
            held = contextlib.ExitStack()
            try:
                held.enter_context(self._application.place())
            except RequestError as error:
                return _refusal(error)
            _place.set(held)
            # The servicer gives the place back; this is for a client that goes away before its request is complete.
            task = asyncio.current_task()
            assert task is not None
            task.add_done_callback(lambda _: held.close())
            # And this for one that stays and never completes it.
            held.callback(asyncio.get_running_loop().call_later(self._upload_timeout_s, task.cancel).cancel)
        return await continuation(details)


def _refusal(error: RequestError) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)  # a stream's messages are received when they are asked for


class StyleTransferServicer(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Makes pictures."""

    def __init__(self, application: Application, write_timeout_s: float) -> None:
        self._application = application
        self._write_timeout_s = write_timeout_s

    @refusing
    async def Stylize(self, request: Any, context: Any) -> None:  # noqa: N802 - the contract's name
        """Stream a job's events; the job ends when the call does."""
        with _place.get():
            asked = convert.request_from_proto(request)
            job = await self._application.stylize(asked)
        try:
            await self._stream(job, asked.preview, context)
        except TimeoutError:
            log.warning("client cut off: it left its stream unread", job=job.name, seconds=self._write_timeout_s)
            # The status waits behind what was not read. A client that leaves it there too loses the call without one.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._write_timeout_s):
                    await abort(context, Unread(f"the stream was left unread for {self._write_timeout_s:g} s"))

    async def DescribeOptions(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Describe every option."""
        return style_transfer_service_pb2.DescribeOptionsResponse(
            options=convert.describe_options(), presets=convert.describe_presets()
        )

    async def _stream(self, job: Job, preview: PreviewSpec, context: Any) -> None:
        try:
            async with contextlib.aclosing(job.watch(preview)) as events:
                async for event in events:
                    for message in convert.event_to_proto(event):
                        # gRPC itself never gives up on a client that is connected and does not read.
                        async with asyncio.timeout(self._write_timeout_s):
                            await context.write(style_transfer_service_pb2.StylizeResponse(event=message))
        finally:
            # Not only on CancelledError: a client that dies during a blocked write raises other things, or nothing.
            self._application.cancel(job)


class StyleServicer(style_service_pb2_grpc.StyleServiceServicer):
    """Keeps styles."""

    def __init__(self, application: Application) -> None:
        self._application = application

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

    async def _described(self, style: Style) -> Any:
        return convert.style_to_proto(style, await asyncio.to_thread(self._application.prepared, style))


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """Lists feature models."""

    def __init__(self, application: Application) -> None:
        self._application = application

    @refusing
    async def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        """Return a page of models."""
        page_size = convert.page_from_proto(request.page_size)
        models, token = await self._application.list_models(page_size, request.page_token)
        default = self._application.default_model
        listed = [convert.model_to_proto(card, sha256, default=card.name == default) for card, sha256 in models]
        return model_service_pb2.ListModelsResponse(models=listed, next_page_token=token)
