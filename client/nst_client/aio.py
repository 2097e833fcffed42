"""The client for asyncio: `nst_client.client` with `await`."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio

from nst.v1 import image_service_pb2, model_service_pb2, style_service_pb2, style_transfer_service_pb2
from nst_client import convert
from nst_client.changes import deleting, updating
from nst_client.channel import CANCEL_TIMEOUT_S, DEFAULT_ADDRESS, PATIENCE_S, Stubs, channel_options, checked_address
from nst_client.errors import ClientClosedError, DeadlineExceededError, NstError, UnavailableError
from nst_client.events import Event, Result
from nst_client.images import ImageSource, Picture, read_image
from nst_client.requests import (
    StyleFileSource,
    StyleImages,
    Styles,
    create_style_request,
    export_model_request,
    export_style_request,
    import_style_request,
    job_name,
    list_jobs_request,
    stored_image_name,
    style_name,
    stylize_request,
    update_request,
    watch_request,
)
from nst_client.resources import (
    AnyImage,
    Encoding,
    ExportedFile,
    Job,
    JobState,
    Model,
    OnProgress,
    OptionDescription,
    Preset,
    Preview,
    StoredImage,
    Style,
    StyleName,
)
from nst_client.retry import Connection, OnConnection, Patience, TimeLimit
from nst_client.status import nst_error
from nst_client.stream import JobStream, Opening
from nst_client.transfers import Calls, Download, FileDownload, ImageDownload, uploading, uploading_large_images

T = TypeVar("T")


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
        patience_s: float = PATIENCE_S,
        on_connection: OnConnection | None = None,
    ) -> None:
        self.address = checked_address(address)
        self.timeout_s = timeout_s
        self._credentials = credentials
        self._channel: grpc.aio.Channel = None
        self._stubs: Stubs | None = None
        self._connection = Connection(self.address, patience_s=patience_s, on_connection=on_connection)
        self._streams: weakref.WeakSet[AsyncStylization] = weakref.WeakSet()
        self._chores: set[asyncio.Task[None]] = set()
        self._closed = asyncio.Event()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; see `Client.close`."""
        await asyncio.gather(*(stream._close_client() for stream in list(self._streams)), *self._chores)
        self._closed.set()
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
        content: AnyImage,
        styles: Styles,
        *,
        init_image: AnyImage | None = None,
        model: str | None = None,
        preview: Preview | None = None,
        output: Encoding | str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: object,
    ) -> AsyncStylization:
        """Return the stream that makes a picture, as `Client.stylize` does; it starts when first awaited.

        So everything that is wrong with the arguments is raised by the stream.
        """

        async def opening() -> Opening:
            return await self._job_request(
                content,
                styles,
                init_image=init_image,
                model=model,
                preview=preview,
                output=output,
                request_id=request_id,
                options=options,
            )

        stream = JobStream(self._connection, owns_job=True, timeout_s=timeout_s)
        return AsyncStylization(self, stream, opening)

    async def create_job(
        self,
        content: AnyImage,
        styles: Styles,
        *,
        init_image: AnyImage | None = None,
        model: str | None = None,
        preview: Preview | None = None,
        output: Encoding | str | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: object,
    ) -> Job:
        """Start making a picture and return its job; see `Client.create_job`."""
        limit = TimeLimit(timeout_s)
        request = await self._job_request(
            content,
            styles,
            init_image=init_image,
            model=model,
            preview=preview,
            output=output,
            request_id=request_id,
            options=options,
        )
        create = style_transfer_service_pb2.CreateJobRequest(request=request)
        return convert.job(await self._call("CreateJob", create, limit=limit))

    def watch_job(
        self,
        job: str | Job,
        *,
        after_sequence: int = 0,
        preview: Preview | None = None,
        timeout_s: float | None = None,
    ) -> AsyncStylization:
        """Return the stream that tells of a job, as `Client.watch_job` does; it starts when first awaited."""

        async def opening() -> Opening:
            return watch_request(job, after_sequence=after_sequence, preview=preview)

        stream = JobStream(self._connection, owns_job=False, timeout_s=timeout_s)
        return AsyncStylization(self, stream, opening)

    async def get_job(self, job: str | Job) -> Job:
        """Return a job as it is now. Raises NotFoundError."""
        request = style_transfer_service_pb2.GetJobRequest(name=job_name(job))
        return convert.job(await self._call("GetJob", request))

    async def list_jobs(self, states: Iterable[JobState | str] = ()) -> AsyncIterator[Job]:
        """Yield the jobs on the server; see `Client.list_jobs`."""
        request = list_jobs_request(states)
        async for page in self._pages("ListJobs", request):
            for job in page.jobs:
                yield convert.job(job)

    async def update_job(
        self, job: str | Job, *, paused: bool | None = None, finish: bool = False, **options: object
    ) -> Job:
        """Change a job that has not ended, and return it; see `Client.update_job`."""
        request = update_request(job, paused=paused, finish=finish, options=options)
        return convert.job(await self._run(updating(request), self._call))

    async def cancel_job(self, job: str | Job) -> Job:
        """End a job and return it; one that has ended stays as it ended. Raises NotFoundError."""
        request = style_transfer_service_pb2.CancelJobRequest(name=job_name(job))
        return convert.job(await self._call("CancelJob", request))

    async def delete_job(self, job: str | Job) -> None:
        """Delete a job with its events and its result; it is cancelled before if need be. Raises NotFoundError."""
        request = style_transfer_service_pb2.DeleteJobRequest(name=job_name(job))
        await self._run(deleting("DeleteJob", request), self._call)

    async def upload_image(self, source: ImageSource) -> StoredImage:
        """Bring an image to the server and return it; see `Client.upload_image`."""
        data = await asyncio.to_thread(read_image, source, field="source")
        return await self.get_image(await self._run(uploading(data), self._call))

    async def get_image(self, image: str | AnyImage) -> StoredImage:
        """Return what the server says of an image on it: of a name, or of what has one. Raises NotFoundError."""
        request = image_service_pb2.GetImageRequest(name=stored_image_name(image))
        return convert.stored_image(await self._call("GetImage", request))

    async def download_image(self, image: str | AnyImage) -> Picture:
        """Return an image on the server; see `Client.download_image`."""
        return await self._downloaded(ImageDownload(stored_image_name(image)))

    async def describe_options(self) -> list[OptionDescription]:
        """Return what the server says of every option of `stylize`, in the order of the contract."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = await self._call("DescribeOptions", request)
        return [convert.option_description(option) for option in response.options]

    async def describe_presets(self) -> list[Preset]:
        """Return the presets that the server knows, each with all the options it stands for."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = await self._call("DescribeOptions", request)
        return [convert.preset(preset) for preset in response.presets]

    async def create_style(self, images: StyleImages, *, style_id: str | None = None, display_name: str = "") -> Style:
        """Keep a style on the server and return it; see `Client.create_style`."""
        request = await asyncio.to_thread(create_style_request, images, style_id=style_id, display_name=display_name)
        return convert.style(await self._call("CreateStyle", request))

    async def get_style(self, style: str | StyleName | Style) -> Style:
        """Return the style of that name, with or without `styles/`. Raises NotFoundError."""
        request = style_service_pb2.GetStyleRequest(name=style_name(style))
        return convert.style(await self._call("GetStyle", request))

    async def list_styles(self) -> AsyncIterator[Style]:
        """Yield the styles on the server in the order of their names, fetching page after page."""
        request = style_service_pb2.ListStylesRequest()
        async for page in self._pages("ListStyles", request):
            for style in page.styles:
                yield convert.style(style)

    async def delete_style(self, style: str | StyleName | Style) -> None:
        """Delete a style from the server. Raises NotFoundError."""
        request = style_service_pb2.DeleteStyleRequest(name=style_name(style))
        await self._run(deleting("DeleteStyle", request), self._call)

    async def export_style(
        self,
        style: str | StyleName | Style,
        *,
        model: str | None = None,
        on_progress: OnProgress | None = None,
        **options: object,
    ) -> ExportedFile:
        """Return a style as a style file; see `Client.export_style`."""
        request = export_style_request(style, model=model, options=options)
        return await self._downloaded(FileDownload("ExportStyle", request, on_progress))

    async def import_style(
        self, source: StyleFileSource, *, style_id: str | None = None, display_name: str = ""
    ) -> Style:
        """Keep a style file on the server as a style; see `Client.import_style`."""
        request = await asyncio.to_thread(import_style_request, source, style_id=style_id, display_name=display_name)
        return convert.style(await self._call("ImportStyle", request))

    async def list_models(self) -> AsyncIterator[Model]:
        """Yield the feature models that the server knows, the default one first."""
        request = model_service_pb2.ListModelsRequest()
        async for page in self._pages("ListModels", request):
            for model in page.models:
                yield convert.model(model)

    async def export_model(
        self,
        model: str | Model | None = None,
        *,
        graph: str | None = None,
        format: str | None = None,
        precision: str | None = None,
        layers: Iterable[str] = (),
        content_layers: Iterable[str] = (),
        style_layers: Iterable[str] = (),
        pooling: str | None = None,
        padding: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> ExportedFile:
        """Return a feature model as a file for another runtime; see `Client.export_model`."""
        request = export_model_request(
            model,
            graph=graph,
            format=format,
            precision=precision,
            layers=layers,
            content_layers=content_layers,
            style_layers=style_layers,
            pooling=pooling,
            padding=padding,
        )
        return await self._downloaded(FileDownload("ExportModel", request, on_progress))

    def _open(self) -> Stubs:
        # Not in the constructor: a channel belongs to the event loop that runs when it is made.
        if self._closed.is_set():
            raise ClientClosedError(f"the client of {self.address} is closed")
        if self._stubs is None:
            self._channel = _open_channel(self.address, self._credentials)
            self._stubs = Stubs(self._channel)
        return self._stubs

    async def _job_request(
        self,
        content: AnyImage,
        styles: Styles,
        **arguments: Any,
    ) -> style_transfer_service_pb2.StylizeRequest:
        self._open()
        # In a thread: reading files and encoding PIL images would hold up the event loop.
        request = await asyncio.to_thread(stylize_request, content, styles, **arguments)
        await self._run(uploading_large_images(request), self._call)
        return request

    async def _call(self, method: str, request: Any, *, limit: TimeLimit | None = None) -> Any:
        patience = Patience(self._connection)
        while True:
            timeout_s = self.timeout_s if limit is None else limit.remaining_s()
            try:
                response = await self._open().method(method)(request, timeout=timeout_s)
            except grpc.RpcError as error:
                pause_s = patience.pause_s(error)
                await self._wait(pause_s if limit is None else limit.capped_s(pause_s))
            else:
                patience.renew()
                return response

    async def _downloaded(self, download: Download[T]) -> T:
        patience = Patience(self._connection)
        while True:
            call = self._open().method(download.method)(download.request())
            try:
                async for part in call:
                    patience.renew()
                    download.receive(part)
                return download.whole()
            except grpc.RpcError as error:
                self._open()  # else what went wrong is that it was closed
                await self._wait(patience.pause_s(error))
            finally:
                call.cancel()  # if it is not over: nobody reads on

    async def _tell(self, method: str, request: Any) -> Any:
        """Call once, for somebody who is about to leave."""
        try:
            return await self._open().method(method)(request, timeout=CANCEL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise nst_error(error, address=self.address) from error

    async def _run(self, calls: Calls, call: Callable[[str, Any], Awaitable[Any]]) -> Any:
        try:
            method, request = next(calls)
            while True:
                try:
                    answer = await call(method, request)
                except NstError as error:
                    method, request = calls.throw(error)
                else:
                    method, request = calls.send(answer)
        except StopIteration as done:
            return done.value

    def _tell_later(self, calls: Calls) -> None:
        async def tell() -> None:
            with suppress(NstError):
                await self._run(calls, self._tell)

        self._chores.add(task := asyncio.create_task(tell()))
        task.add_done_callback(self._chores.discard)

    async def _wait(self, pause_s: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), pause_s)
            raise ClientClosedError(f"the client of {self.address} was closed")

    async def _pages(self, method: str, request: Any) -> AsyncIterator[Any]:
        while True:
            page = await self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


class AsyncStylization(AsyncIterator[Event]):
    """A picture being made, for asyncio: `Stylization` with `async with`, `async for` and `await result()`.

    To be read by one task; cancelling that task cancels the job if `stylize` began it.
    """

    def __init__(self, client: AsyncClient, stream: JobStream, opening: Callable[[], Awaitable[Opening]]) -> None:
        self._client = client
        self._stream = stream
        self._opening: Callable[[], Awaitable[Opening]] | None = opening
        self._left = asyncio.Event()
        self._telling = asyncio.Lock()

    @property
    def job(self) -> Job | None:
        """The job as it was last seen; None before the first event."""
        return self._stream.job

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        try:
            while not self._stream.is_over:
                if (event := await self._read()) is not None:
                    return event
        except DeadlineExceededError:
            if self._stream.owns_job:
                await self._cancel_job_if_possible()
            raise
        except NstError:
            self._stream.hang_up()
            raise
        except BaseException:
            # Also CancelledError: whoever stops reading does not want the job.
            if self._stream.interrupt():
                await self._cancel_job_if_possible()
            raise
        raise StopAsyncIteration

    async def cancel(self) -> None:
        """Cancel the job; a job that has ended stays as it ended. Iterating then ends, and `result` raises.

        Raises UnavailableError, DeadlineExceededError if the server cannot be told within seconds.
        """
        if self._stream.cancel():
            self._left.set()
            await self._cancel_job()

    async def aclose(self) -> None:
        """Hang up, and cancel the job if `stylize` began it and the server can be told."""
        if self._stream.close():
            await self._cancel_job_if_possible()
        self._left.set()

    async def detach(self) -> Job:
        """Hang up and leave the job running; return it. See `Stylization.detach`."""
        while self._stream.job is None:
            await anext(self)
        self._stream.detach()
        self._left.set()
        return self._stream.job

    async def result(self) -> Result:
        """Read the stream to its end and return the finished picture; raises as `Stylization.result` does."""
        async for _ in self:
            pass
        if (kept := self._stream.missing_result()) is not None:
            self._stream.fetched(await self._client.download_image(kept))
        return self._stream.outcome()

    async def _read(self) -> Event | None:
        try:
            await self._begin()
            if self._stream.is_over:
                return None
            call = self._stream.call or self._take_up()
            while (response := await call.read()) is not grpc.aio.EOF:
                if (event := self._stream.receive(response.event)) is not None:
                    return event
            self._stream.end()
        except grpc.RpcError as error:
            pause_s = self._stream.broke(error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), pause_s)
        except asyncio.CancelledError:
            # gRPC raises it, too, when the call, and not this task, was cancelled: by another task.
            task = asyncio.current_task()
            if not self._stream.is_over or (task is not None and task.cancelling() > 0):
                raise
            if self._stream.failure is not None:
                raise self._stream.failure from None
        return None

    async def _begin(self) -> None:
        if self._opening is None:
            return
        self._stream.open(await self._opening())
        self._opening = None
        weakref.finalize(self, _abandon, self._stream, self._client, asyncio.get_running_loop()).atexit = False
        self._client._streams.add(self)
        if not self._stream.is_over:
            self._take_up()

    def _take_up(self) -> Any:
        method, request = self._stream.next_call()
        self._stream.call = self._client._open().method(method)(request, timeout=self._stream.limit.remaining_s())
        return self._stream.call

    async def _cancel_job(self) -> None:
        async with self._telling:
            await self._client._run(self._stream.cancelling(), self._client._tell)

    async def _cancel_job_if_possible(self) -> None:
        with suppress(NstError):
            await self._cancel_job()

    async def _close_client(self) -> None:
        if self._stream.close_client():
            await self._cancel_job_if_possible()
        self._left.set()
        # Another task may be cancelling the job, which needs the connection.
        async with self._telling:
            pass


def _abandon(stream: JobStream, client: AsyncClient, loop: asyncio.AbstractEventLoop) -> None:
    def leave() -> None:
        stream.abandon()
        if stream.is_abandoned:
            client._tell_later(stream.cancelling())

    # The garbage collector may run in any thread; an RPC of asyncio is to be touched in its own only.
    if not loop.is_closed():
        loop.call_soon_threadsafe(leave)


def _open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options = channel_options(address)
    if credentials is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, credentials, options)
