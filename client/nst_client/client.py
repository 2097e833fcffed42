"""The client for ordinary code. `nst_client.aio` has the one for asyncio."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

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


class Client:
    """A connection to a neural-style-transfer server.

    ```python
    with Client("localhost:50051") as client:
        client.stylize("photo.jpg", "waves.jpg", iterations=100).result().save("out.png")
    ```

    It connects at the first call, may be used by several threads at once, and is to be closed: by `with` or `close`.

    `address` is `host:port`; the port may be left out (50051). `credentials` encrypt the connection and say who the
    server must be (`grpc.ssl_channel_credentials()`); without them it is neither encrypted nor authenticated.
    `timeout_s` bounds every call but those that last as long as a job or a file: `stylize`, `create_job`, `watch_job`,
    `download_image`, `export_model` and `export_style`.

    A connection that breaks and a server that restarts are not noticed: what was under way is taken up again where it
    stood, for up to `patience_s` seconds without an answer; 0 to give up at once. `on_connection` is called, in the
    thread that waits, with the UnavailableError when the connection breaks and at each vain attempt, and with None
    when it stands again.

    Every method raises NstError and nothing else for what goes wrong outside: UnavailableError within seconds if
    nothing has ever answered at the address, else after `patience_s`.
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
        self._closed = threading.Event()
        self._channel = _open_channel(self.address, credentials)
        self._stubs = Stubs(self._channel)
        self._connection = Connection(self.address, patience_s=patience_s, on_connection=on_connection)
        self._streams: weakref.WeakSet[Stylization] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; jobs that `stylize` began and whose streams are open are cancelled, if possible."""
        for stream in list(self._streams):
            stream._close_client()
        self._closed.set()
        self._channel.close()

    def connect(self, *, timeout_s: float = 5.0) -> None:
        """Wait until the connection stands, for a server that is just starting. Raises UnavailableError if not."""
        self._open()
        ready = grpc.channel_ready_future(self._channel)
        try:
            ready.result(timeout=timeout_s)
        except grpc.FutureTimeoutError as error:
            message = f"cannot reach a server at {self.address} within {timeout_s:g} s"
            raise UnavailableError(message, address=self.address) from error
        finally:
            ready.cancel()

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
    ) -> Stylization:
        """Start making a picture and return the stream that tells of it.

        `content` is the photograph; `styles` is one style or several, each an image, a stored style (`StyleName`,
        `Style`), or one of these in `Weighted` or, with regions, in `StyleInput`. Images are paths, the bytes of a
        file, PIL images, pictures that came from a server, or images on it: `ImageName`, what `upload_image`
        returned, or another job's `result`. If they are too large for one message they are uploaded before, which
        this method waits for.

        `init_image` is the picture to start from, another run's result for instance; it implies `init="image"`.

        `model` names the feature model, `preview` says which frames to stream, `output` how to encode the result
        (an `Encoding` or just a format, `"jpeg"`). `timeout_s` bounds the whole job, waiting included; None for no
        bound. `request_id` is a name for this request, 1 to 64 of A–Z, a–z, 0–9, `-`, `_` and `.`: asking again with
        the same one does not make a second job; by default each request has a new one. `options` are the fields of
        StylizeOptions: `iterations=100`, `init="noise"`, `style_layers={"relu1_1": 1, "relu2_1": 0.5}`;
        `describe_options` lists them with defaults and bounds.

        Raises InvalidArgumentError and its kind for what is wrong here; what the server refuses is raised by the
        stream.
        """
        self._open()
        stream = JobStream(self._connection, owns_job=True, timeout_s=timeout_s)
        request = stylize_request(
            content,
            styles,
            init_image=init_image,
            model=model,
            preview=preview,
            output=output,
            request_id=request_id,
            options=options,
        )
        self._run(uploading_large_images(request), self._call)
        return self._opened(stream, request)

    def create_job(
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
        """Start making a picture and return its job, which depends neither on this client nor on its connection.

        The arguments are those of `stylize`. `timeout_s` bounds the sending, not the job; of `preview` only the
        interval counts: how often there is a picture for those who watch. Raises what the server refuses:
        InvalidArgumentError and NotFoundError naming the field, QueueFullError, AlreadyExistsError if the
        `request_id` stands for another request …
        """
        self._open()
        limit = TimeLimit(timeout_s)
        request = stylize_request(
            content,
            styles,
            init_image=init_image,
            model=model,
            preview=preview,
            output=output,
            request_id=request_id,
            options=options,
        )
        self._run(uploading_large_images(request), self._call)
        create = style_transfer_service_pb2.CreateJobRequest(request=request)
        return convert.job(self._call("CreateJob", create, limit=limit))

    def watch_job(
        self,
        job: str | Job,
        *,
        after_sequence: int = 0,
        preview: Preview | None = None,
        timeout_s: float | None = None,
    ) -> Stylization:
        """Return the stream that tells of a job, that of another client too: a snapshot, what was, and what happens.

        `job` is its name, with or without `jobs/`. `after_sequence` is the number of the last event that is known
        already. `timeout_s` bounds the watching. Closing the stream does nothing to the job.

        Raises InvalidArgumentError; what the server refuses, NotFoundError for instance, is raised by the stream.
        """
        self._open()
        stream = JobStream(self._connection, owns_job=False, timeout_s=timeout_s)
        return self._opened(stream, watch_request(job, after_sequence=after_sequence, preview=preview))

    def get_job(self, job: str | Job) -> Job:
        """Return a job as it is now. Raises NotFoundError."""
        request = style_transfer_service_pb2.GetJobRequest(name=job_name(job))
        return convert.job(self._call("GetJob", request))

    def list_jobs(self, states: Iterable[JobState | str] = ()) -> Iterator[Job]:
        """Yield the jobs on the server, the newest first, fetching page after page; of these states only, if any."""
        request = list_jobs_request(states)
        for page in self._pages("ListJobs", request):
            yield from map(convert.job, page.jobs)

    def update_job(self, job: str | Job, *, paused: bool | None = None, finish: bool = False, **options: object) -> Job:
        """Change a job that has not ended, and return it; a running one follows from its next iteration on.

        `paused` makes it wait without a device, or go on. `finish` says that the best picture so far is enough.
        `options` are new values of `content_weight`, `style_weight`, `tv_weight`, `laplacian_weight`,
        `content_layers`, `style_layers`, `iterations` or `scale_iterations`.

        Raises InvalidArgumentError for another option or a value out of range, FailedPreconditionError if the job has
        ended, NotFoundError.
        """
        request = update_request(job, paused=paused, finish=finish, options=options)
        return convert.job(self._run(updating(request), self._call))

    def cancel_job(self, job: str | Job) -> Job:
        """End a job and return it; one that has ended stays as it ended. Raises NotFoundError."""
        request = style_transfer_service_pb2.CancelJobRequest(name=job_name(job))
        return convert.job(self._call("CancelJob", request))

    def delete_job(self, job: str | Job) -> None:
        """Delete a job with its events and its result; it is cancelled before if need be. Raises NotFoundError."""
        request = style_transfer_service_pb2.DeleteJobRequest(name=job_name(job))
        self._run(deleting("DeleteJob", request), self._call)

    def upload_image(self, source: ImageSource) -> StoredImage:
        """Bring an image to the server, in parts, and return it, to be used instead of the file in any request.

        An image that is there already is not sent again, and neither is what had arrived when the connection broke.
        The server removes it some time after it was last used. Raises ImageNotReadableError, InvalidArgumentError if
        the server takes no such file, ResourceExhaustedError if it has no room.
        """
        self._open()
        return self.get_image(self._run(uploading(read_image(source, field="source")), self._call))

    def get_image(self, image: str | AnyImage) -> StoredImage:
        """Return what the server says of an image on it: of a name, or of what has one. Raises NotFoundError."""
        request = image_service_pb2.GetImageRequest(name=stored_image_name(image))
        return convert.stored_image(self._call("GetImage", request))

    def download_image(self, image: str | AnyImage) -> Picture:
        """Return an image on the server, a job's `result` for instance: whole, and checked against its name.

        Raises NotFoundError, and BrokenStreamError if it arrived damaged.
        """
        return self._downloaded(ImageDownload(stored_image_name(image)))

    def describe_options(self) -> list[OptionDescription]:
        """Return what the server says of every option of `stylize`, in the order of the contract."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = self._call("DescribeOptions", request)
        return [convert.option_description(option) for option in response.options]

    def describe_presets(self) -> list[Preset]:
        """Return the presets that the server knows, each with all the options it stands for."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = self._call("DescribeOptions", request)
        return [convert.preset(preset) for preset in response.presets]

    def create_style(self, images: StyleImages, *, style_id: str | None = None, display_name: str = "") -> Style:
        """Keep a style on the server and return it; the same images and weights give the same style again.

        `images` is one image or several, each with or without a weight (`Weighted`). `style_id` is 1 to 63 of a–z,
        0–9 and hyphen; without it the server makes one from the content. Raises AlreadyExistsError if the id
        stands for another style, InvalidArgumentError naming the field.
        """
        request = create_style_request(images, style_id=style_id, display_name=display_name)
        return convert.style(self._call("CreateStyle", request))

    def get_style(self, style: str | StyleName | Style) -> Style:
        """Return the style of that name, with or without `styles/`. Raises NotFoundError."""
        request = style_service_pb2.GetStyleRequest(name=style_name(style))
        return convert.style(self._call("GetStyle", request))

    def list_styles(self) -> Iterator[Style]:
        """Yield the styles on the server in the order of their names, fetching page after page."""
        request = style_service_pb2.ListStylesRequest()
        for page in self._pages("ListStyles", request):
            yield from map(convert.style, page.styles)

    def delete_style(self, style: str | StyleName | Style) -> None:
        """Delete a style from the server. Raises NotFoundError."""
        request = style_service_pb2.DeleteStyleRequest(name=style_name(style))
        self._run(deleting("DeleteStyle", request), self._call)

    def export_style(
        self,
        style: str | StyleName | Style,
        *,
        model: str | None = None,
        on_progress: OnProgress | None = None,
        **options: object,
    ) -> ExportedFile:
        """Return a style as a style file: means and Gram matrices, no images. `import_style` takes it, on any server.

        `options` are those of the jobs that it is to serve. What matters of them is `preset`, `size_px`,
        `first_size_px`, `style_scale`, `style_layers`, `pooling` and `padding`; `model` is the jobs' too.

        Raises NotFoundError, InvalidArgumentError naming the field, FailedPreconditionError if the model's weights
        are not on the server, QueueFullError if too many files wait to be made, and BrokenStreamError if it
        arrived damaged.
        """
        request = export_style_request(style, model=model, options=options)
        return self._downloaded(FileDownload("ExportStyle", request, on_progress))

    def import_style(self, source: StyleFileSource, *, style_id: str | None = None, display_name: str = "") -> Style:
        """Keep a style file on the server as a style, and return that; the same file gives the same style again.

        `source` is the path of the file, its bytes, or what `export_style` returned. `style_id` is 1 to 63 of a–z,
        0–9 and hyphen; without it the server makes one from the content. Raises AlreadyExistsError if the id stands
        for another style, InvalidArgumentError if the file is damaged, or none of these.
        """
        request = import_style_request(source, style_id=style_id, display_name=display_name)
        return convert.style(self._call("ImportStyle", request))

    def list_models(self) -> Iterator[Model]:
        """Yield the feature models that the server knows, the default one first."""
        request = model_service_pb2.ListModelsRequest()
        for page in self._pages("ListModels", request):
            yield from map(convert.model, page.models)

    def export_model(
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
        """Return a feature model, or all that an optimization evaluates, as a file for another runtime.

        `graph` is `"features"`, `"grams"`, `"objective"` or `"closure"` (losses and their gradient); `format` is
        `"onnx"`, `"torchscript"` or `"pt2"`; `precision` is `"fp32"` or, of ONNX, `"fp16"`. `layers` are those that
        `"features"` returns, `style_layers` those of `"grams"`, and with `content_layers` what the two others compare
        pictures at. `pooling` and `padding` are as in `stylize`. What is left out is the server's choice.

        The server makes one file at a time, which takes it seconds to minutes; closing the client ends that. A file
        that breaks off on the way is taken up where it broke. `on_progress` is called with the bytes that are here
        and how many there will be, None while the file is being made.

        Raises NotFoundError, InvalidArgumentError naming the field, FailedPreconditionError if the model's weights
        are not on the server, QueueFullError if too many files wait to be made, and BrokenStreamError if it
        arrived damaged.
        """
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
        return self._downloaded(FileDownload("ExportModel", request, on_progress))

    def _open(self) -> Stubs:
        if self._closed.is_set():
            raise ClientClosedError(f"the client of {self.address} is closed")
        return self._stubs

    def _call(self, method: str, request: Any, *, limit: TimeLimit | None = None) -> Any:
        patience = Patience(self._connection)
        while True:
            timeout_s = self.timeout_s if limit is None else limit.remaining_s()
            try:
                response = self._open().method(method)(request, timeout=timeout_s)
            except grpc.RpcError as error:
                pause_s = patience.pause_s(error)
                self._wait(pause_s if limit is None else limit.capped_s(pause_s))
            else:
                patience.renew()
                return response

    def _downloaded(self, download: Download[T]) -> T:
        patience = Patience(self._connection)
        while True:
            call = self._open().method(download.method)(download.request())
            try:
                for part in call:
                    patience.renew()
                    download.receive(part)
                return download.whole()
            except grpc.RpcError as error:
                self._open()  # else what went wrong is that it was closed
                self._wait(patience.pause_s(error))
            finally:
                call.cancel()  # if it is not over: nobody reads on

    def _tell(self, method: str, request: Any) -> Any:
        """Call once, for somebody who is about to leave."""
        try:
            return self._open().method(method)(request, timeout=CANCEL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise nst_error(error, address=self.address) from error

    def _run(self, calls: Calls, call: Callable[[str, Any], Any]) -> Any:
        try:
            method, request = next(calls)
            while True:
                try:
                    answer = call(method, request)
                except NstError as error:
                    method, request = calls.throw(error)
                else:
                    method, request = calls.send(answer)
        except StopIteration as done:
            return done.value

    def _wait(self, pause_s: float) -> None:
        if self._closed.wait(pause_s):
            raise ClientClosedError(f"the client of {self.address} was closed")

    def _pages(self, method: str, request: Any) -> Iterator[Any]:
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _opened(self, stream: JobStream, opening: Opening) -> Stylization:
        stream.open(opening)
        stylization = Stylization(self, stream)
        self._streams.add(stylization)
        return stylization


class Stylization(Iterator[Event]):
    """A picture being made: iterate over its events, or ask for its `result`.

    ```python
    with client.stylize("photo.jpg", "waves.jpg") as stylization:
        for event in stylization:
            match event:
                case Progress():
                    print(event.iteration, event.loss)
                case Frame():
                    event.save("now.jpg")
        stylization.result().save("out.png")
    ```

    A connection that breaks is taken up again by itself: no numbered event is missing or comes twice. Iterating raises
    for what breaks the stream for good (UnavailableError, QueueFullError, InvalidArgumentError from the server …),
    which leaves the job as it is, and not for a job that failed: that is an event, and `result` raises it.

    Leaving the `with` block, `close`, an interrupt while it waits (Ctrl-C), or dropping the last reference cancels a
    job that `stylize` began and that is still running; `detach` leaves it. A process that is killed leaves it, too. A
    job that is only watched goes on, whatever becomes of the stream, and after an interrupt the stream may be read on.
    To be read by one thread; `cancel` may be called by any.
    """

    def __init__(self, client: Client, stream: JobStream) -> None:
        self._client = client
        self._stream = stream
        self._left = threading.Event()
        self._telling = threading.RLock()
        weakref.finalize(self, stream.abandon).atexit = False
        self._take_up()

    @property
    def job(self) -> Job | None:
        """The job as it was last seen; None before the first event."""
        return self._stream.job

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        try:
            while not self._stream.is_over:
                if (event := self._read()) is not None:
                    return event
        except DeadlineExceededError:
            if self._stream.owns_job:
                self._cancel_job_if_possible()
            raise
        except NstError:
            self._stream.hang_up()
            raise
        except BaseException:
            # Also KeyboardInterrupt: whoever stops reading does not want the job.
            if self._stream.interrupt():
                self._cancel_job_if_possible()
            raise
        raise StopIteration

    def cancel(self) -> None:
        """Cancel the job; a job that has ended stays as it ended. Iterating then ends, and `result` raises.

        Raises UnavailableError, DeadlineExceededError if the server cannot be told within seconds.
        """
        if self._stream.cancel():
            self._left.set()
            self._cancel_job()

    def close(self) -> None:
        """Hang up, and cancel the job if `stylize` began it and the server can be told."""
        if self._stream.close():
            self._cancel_job_if_possible()
        self._left.set()

    def detach(self) -> Job:
        """Hang up and leave the job running; return it. Iterating then ends.

        Waits for the job if it has not been created yet, and raises what iterating would.
        """
        while self._stream.job is None:
            next(self)
        self._stream.detach()
        self._left.set()
        return self._stream.job

    def result(self) -> Result:
        """Read the stream to its end and return the finished picture.

        Raises JobFailedError with the server's reason, JobCancelledError, or what broke the stream.
        """
        for _ in self:
            pass
        if (kept := self._stream.missing_result()) is not None:
            self._stream.fetched(self._client.download_image(kept))
        return self._stream.outcome()

    def _read(self) -> Event | None:
        try:
            for response in self._stream.call or self._take_up():
                if (event := self._stream.receive(response.event)) is not None:
                    return event
            self._stream.end()
        except grpc.RpcError as error:
            self._left.wait(self._stream.broke(error))
        return None

    def _take_up(self) -> Any:
        method, request = self._stream.next_call()
        call = self._client._open().method(method)(request, timeout=self._stream.limit.remaining_s())
        self._stream.call = call
        # gRPC runs this in its own thread; the garbage collector, which may stop any thread anywhere, must not call.
        call.add_callback(functools.partial(_cancel_if_abandoned, self._stream, self._client._stubs))
        if self._stream.is_over:
            call.cancel()
        return call

    def _cancel_job(self) -> None:
        with self._telling:
            self._client._run(self._stream.cancelling(), self._client._tell)

    def _cancel_job_if_possible(self) -> None:
        with suppress(NstError):
            self._cancel_job()

    def _close_client(self) -> None:
        if self._stream.close_client():
            self._cancel_job_if_possible()
        self._left.set()
        # Another thread may be cancelling the job, which needs the connection.
        with self._telling:
            pass


def _cancel_if_abandoned(stream: JobStream, stubs: Stubs) -> None:
    if stream.is_abandoned and stream.job is not None:
        request = style_transfer_service_pb2.CancelJobRequest(name=stream.job.name)
        # A client that has been closed in the meantime raises ValueError.
        with suppress(ValueError):
            stubs.method("CancelJob").future(request, timeout=CANCEL_TIMEOUT_S).add_done_callback(grpc.Future.exception)


def _open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    options = channel_options(address)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)
