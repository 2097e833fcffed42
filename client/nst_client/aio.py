"""The client for asyncio: `nst_client.client` with `await`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from nst.v1 import model_service_pb2, style_service_pb2, style_transfer_service_pb2
from nst_client import convert
from nst_client.channel import DEFAULT_ADDRESS, Stubs, channel_options, checked_address
from nst_client.errors import ClientClosedError, UnavailableError
from nst_client.events import Event, Result
from nst_client.images import ImageSource
from nst_client.requests import StyleImages, Styles, create_style_request, style_name, stylize_request
from nst_client.resources import Encoding, Job, Model, OptionDescription, Preset, Preview, Style, StyleName
from nst_client.status import nst_error
from nst_client.stream import JobStream


class AsyncClient:
    """A connection to a neural-style-transfer server, for asyncio.

    ```python
    async with AsyncClient("localhost:50051") as client:
        result = await client.stylize("photo.jpg", "waves.jpg", iterations=100).result()
    ```

    Everything is as in `Client`; one client belongs to one event loop.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        self.address = checked_address(address)
        self.timeout_s = timeout_s
        self._credentials = credentials
        self._channel: grpc.aio.Channel = None
        self._stubs: Stubs | None = None
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()
        self._closed = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; jobs whose streams are open are cancelled."""
        self._closed = True
        # Closing a channel of older releases of gRPC leaves its streams alone.
        for call in list(self._calls):
            call.cancel()
        if self._channel is not None:
            await self._channel.close()

    async def connect(self, *, timeout_s: float = 5.0) -> None:
        """Wait until the connection stands, for a server that is just starting. Raises UnavailableError if not."""
        try:
            self._open()
            await asyncio.wait_for(self._channel.channel_ready(), timeout_s)
        except TimeoutError as error:
            message = f"cannot reach a server at {self.address} within {timeout_s:g} s"
            raise UnavailableError(message, address=self.address) from error

    def stylize(
        self,
        content: ImageSource,
        styles: Styles,
        *,
        init_image: ImageSource | None = None,
        model: str | None = None,
        preview: Preview | None = None,
        output: Encoding | str | None = None,
        timeout_s: float | None = None,
        **options: object,
    ) -> AsyncStylization:
        """Return the stream that makes a picture, as `Client.stylize` does; it starts when first awaited.

        So everything that is wrong with the arguments is raised by the stream.
        """

        async def start() -> Any:
            stubs = self._open()
            # In a thread: reading files and encoding PIL images would hold up the event loop.
            request = await asyncio.to_thread(
                stylize_request,
                content,
                styles,
                init_image=init_image,
                model=model,
                preview=preview,
                output=output,
                options=options,
            )
            call = stubs.transfer.Stylize(request, timeout=timeout_s)
            self._calls.add(call)
            return call

        return AsyncStylization(start, address=self.address)

    async def describe_options(self) -> list[OptionDescription]:
        """Return what the server says of every option of `stylize`, in the order of the contract."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = await self._call(self._open().transfer.DescribeOptions, request)
        return [convert.option_description(option) for option in response.options]

    async def describe_presets(self) -> list[Preset]:
        """Return the presets that the server knows, each with all the options it stands for."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = await self._call(self._open().transfer.DescribeOptions, request)
        return [convert.preset(preset) for preset in response.presets]

    async def create_style(self, images: StyleImages, *, style_id: str | None = None, display_name: str = "") -> Style:
        """Keep a style on the server and return it; see `Client.create_style`."""
        request = await asyncio.to_thread(create_style_request, images, style_id=style_id, display_name=display_name)
        return convert.style(await self._call(self._open().styles.CreateStyle, request))

    async def get_style(self, style: str | StyleName | Style) -> Style:
        """Return the style of that name, with or without `styles/`. Raises NotFoundError."""
        request = style_service_pb2.GetStyleRequest(name=style_name(style))
        return convert.style(await self._call(self._open().styles.GetStyle, request))

    async def list_styles(self) -> AsyncIterator[Style]:
        """Yield the styles on the server in the order of their names, fetching page after page."""
        request = style_service_pb2.ListStylesRequest()
        async for page in self._pages(self._open().styles.ListStyles, request):
            for style in page.styles:
                yield convert.style(style)

    async def delete_style(self, style: str | StyleName | Style) -> None:
        """Delete a style from the server. Raises NotFoundError."""
        request = style_service_pb2.DeleteStyleRequest(name=style_name(style))
        await self._call(self._open().styles.DeleteStyle, request)

    async def list_models(self) -> AsyncIterator[Model]:
        """Yield the feature models that the server knows, the default one first."""
        request = model_service_pb2.ListModelsRequest()
        async for page in self._pages(self._open().models.ListModels, request):
            for model in page.models:
                yield convert.model(model)

    def _open(self) -> Stubs:
        # Not in the constructor: a channel belongs to the event loop that runs when it is made.
        if self._closed:
            raise ClientClosedError(f"the client of {self.address} is closed")
        if self._stubs is None:
            self._channel = _open_channel(self.address, self._credentials)
            self._stubs = Stubs(self._channel)
        return self._stubs

    async def _call(self, method: Callable[..., Any], request: object) -> Any:
        try:
            return await method(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise nst_error(error, address=self.address) from error

    async def _pages(self, method: Callable[..., Any], request: Any) -> AsyncIterator[Any]:
        while True:
            page = await self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


class AsyncStylization(AsyncIterator[Event]):
    """A picture being made, for asyncio: `Stylization` with `async with`, `async for` and `await result()`.

    To be read by one task; cancelling that task cancels the job, and so does dropping the last reference.
    """

    def __init__(self, start: Callable[[], Awaitable[Any]], *, address: str) -> None:
        self._start = start
        self._call: Any = None
        self._stream = JobStream(address)

    @property
    def job(self) -> Job | None:
        """The job as it was last seen; None before the first event."""
        return self._stream.job

    async def __aenter__(self) -> Self:
        await self._started()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            if (event := await self._read()) is not None:
                return event
        except grpc.RpcError as error:
            self._stream.break_off(error)
        except asyncio.CancelledError:
            if self._is_task_cancelled():
                self.cancel()
                raise
            self._stream.hang_up()
        except BaseException:
            self.cancel()
            raise
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Cancel the job; a job that has ended stays as it ended. Iterating then ends, and `result` raises."""
        self._stream.cancelled = True
        if self._call is not None:
            self._call.cancel()

    async def aclose(self) -> None:
        """Hang up: `cancel` under the name that `contextlib.aclosing` knows."""
        self.cancel()

    async def result(self) -> Result:
        """Read the stream to its end and return the finished picture; raises as `Stylization.result` does."""
        async for _ in self:
            pass
        return self._stream.outcome()

    async def _started(self) -> Any:
        if self._call is None:
            self._call = await self._start()
            weakref.finalize(self, _hang_up, self._call, asyncio.get_running_loop()).atexit = False
            if self._stream.cancelled:
                self._call.cancel()
        return self._call

    async def _read(self) -> Event | None:
        if self._stream.cancelled and self._call is None:
            return None
        call = await self._started()
        while (response := await call.read()) is not grpc.aio.EOF:
            if (event := self._stream.receive(response.event)) is not None:
                return event
        self._stream.end()
        return None

    def _is_task_cancelled(self) -> bool:
        # gRPC raises CancelledError too when the call, and not the task, was cancelled: by `cancel` in another
        # task, or because the client was closed.
        task = asyncio.current_task()
        return self._call is None or not self._call.cancelled() or (task is not None and task.cancelling() > 0)


def _hang_up(call: Any, loop: asyncio.AbstractEventLoop) -> None:
    # The garbage collector may run in any thread; an RPC of asyncio is to be touched in its own only.
    if not loop.is_closed():
        loop.call_soon_threadsafe(call.cancel)


def _open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options = channel_options(address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)
