"""The client for ordinary code. `nst_client.aio` has the one for asyncio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

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

ResponseT = TypeVar("ResponseT")


class Client:
    """A connection to a neural-style-transfer server.

    ```python
    with Client("localhost:50051") as client:
        client.stylize("photo.jpg", "waves.jpg", iterations=100).result().save("out.png")
    ```

    It connects at the first call, may be used by several threads at once, and is to be closed: by `with` or `close`.

    `address` is `host:port`; the port may be left out (50051). `credentials` encrypt the connection and say who the
    server must be (`grpc.ssl_channel_credentials()`); without them it is neither encrypted nor authenticated.
    `timeout_s` bounds every call but `stylize`, which has its own.

    Every method raises NstError and nothing else for what goes wrong outside: UnavailableError within seconds if
    nothing answers at the address.
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
        self._closed = False
        self._channel = _open_channel(self.address, credentials)
        self._stubs = Stubs(self._channel)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.address!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; jobs whose streams are open are cancelled."""
        self._closed = True
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
        content: ImageSource,
        styles: Styles,
        *,
        init_image: ImageSource | None = None,
        model: str | None = None,
        preview: Preview | None = None,
        output: Encoding | str | None = None,
        timeout_s: float | None = None,
        **options: object,
    ) -> Stylization:
        """Start making a picture and return the stream that tells of it.

        `content` is the photograph; `styles` is one style or several, each an image, a stored style (`StyleName`,
        `Style`), or one of these in `Weighted` or, with regions, in `StyleInput`. Images are paths, the bytes of a
        file or PIL images.

        `init_image` is the picture to start from, another run's result for instance; it implies `init="image"`.

        `model` names the feature model, `preview` says which frames to stream, `output` how to encode the result
        (an `Encoding` or just a format, `"jpeg"`). `timeout_s` bounds the whole job, waiting included; None for no
        bound. `options` are the fields of StylizeOptions: `iterations=100`, `init="noise"`,
        `style_layers={"relu1_1": 1, "relu2_1": 0.5}`; `describe_options` lists them with defaults and bounds.

        Raises InvalidArgumentError and its kind for what is wrong here; what the server refuses is raised by the
        stream.
        """
        stubs = self._open()
        request = stylize_request(
            content, styles, init_image=init_image, model=model, preview=preview, output=output, options=options
        )
        return Stylization(stubs.transfer.Stylize(request, timeout=timeout_s), address=self.address)

    def describe_options(self) -> list[OptionDescription]:
        """Return what the server says of every option of `stylize`, in the order of the contract."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = self._call(self._open().transfer.DescribeOptions, request)
        return [convert.option_description(option) for option in response.options]

    def describe_presets(self) -> list[Preset]:
        """Return the presets that the server knows, each with all the options it stands for."""
        request = style_transfer_service_pb2.DescribeOptionsRequest()
        response = self._call(self._open().transfer.DescribeOptions, request)
        return [convert.preset(preset) for preset in response.presets]

    def create_style(self, images: StyleImages, *, style_id: str | None = None, display_name: str = "") -> Style:
        """Keep a style on the server and return it; the same images and weights give the same style again.

        `images` is one image or several, each with or without a weight (`Weighted`). `style_id` is 1 to 63 of a–z,
        0–9 and hyphen; without it the server makes one from the content. Raises AlreadyExistsError if the id
        stands for another style, InvalidArgumentError naming the field.
        """
        request = create_style_request(images, style_id=style_id, display_name=display_name)
        return convert.style(self._call(self._open().styles.CreateStyle, request))

    def get_style(self, style: str | StyleName | Style) -> Style:
        """Return the style of that name, with or without `styles/`. Raises NotFoundError."""
        request = style_service_pb2.GetStyleRequest(name=style_name(style))
        return convert.style(self._call(self._open().styles.GetStyle, request))

    def list_styles(self) -> Iterator[Style]:
        """Yield the styles on the server in the order of their names, fetching page after page."""
        request = style_service_pb2.ListStylesRequest()
        for page in self._pages(self._open().styles.ListStyles, request):
            yield from map(convert.style, page.styles)

    def delete_style(self, style: str | StyleName | Style) -> None:
        """Delete a style from the server. Raises NotFoundError."""
        request = style_service_pb2.DeleteStyleRequest(name=style_name(style))
        self._call(self._open().styles.DeleteStyle, request)

    def list_models(self) -> Iterator[Model]:
        """Yield the feature models that the server knows, the default one first."""
        request = model_service_pb2.ListModelsRequest()
        for page in self._pages(self._open().models.ListModels, request):
            yield from map(convert.model, page.models)

    def _open(self) -> Stubs:
        if self._closed:
            raise ClientClosedError(f"the client of {self.address} is closed")
        return self._stubs

    def _call(self, method: Callable[..., ResponseT], request: object) -> ResponseT:
        try:
            return method(request, timeout=self.timeout_s)
        except grpc.RpcError as error:
            raise nst_error(error, address=self.address) from error

    def _pages(self, method: Callable[..., Any], request: Any) -> Iterator[Any]:
        while True:
            page = self._call(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token


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

    Iterating raises for what breaks the stream (UnavailableError, QueueFullError, InvalidArgumentError from the
    server …), not for a job that failed: that is an event, and `result` raises it. Leaving the `with` block, `close`,
    or dropping the last reference cancels a job that is still running. To be read by one thread; `cancel` may be
    called by any.
    """

    def __init__(self, call: Any, *, address: str) -> None:
        # gRPC cancels a call that nobody holds any more.
        self._call = call
        self._stream = JobStream(address)

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
            for response in self._call:
                if (event := self._stream.receive(response.event)) is not None:
                    return event
            self._stream.end()
        except grpc.RpcError as error:
            self._stream.break_off(error)
        except BaseException:
            # Also KeyboardInterrupt: whoever stops reading has stopped the job.
            self.cancel()
            raise
        raise StopIteration

    def cancel(self) -> None:
        """Cancel the job; a job that has ended stays as it ended. Iterating then ends, and `result` raises."""
        self._stream.cancelled = True
        self._call.cancel()

    def close(self) -> None:
        """Hang up: `cancel` under the name that `contextlib.closing` knows."""
        self.cancel()

    def result(self) -> Result:
        """Read the stream to its end and return the finished picture.

        Raises JobFailedError with the server's reason, JobCancelledError, or what broke the stream.
        """
        for _ in self:
            pass
        return self._stream.outcome()


def _open_channel(address: str, credentials: grpc.ChannelCredentials | None) -> grpc.Channel:
    options = channel_options(address)
    if credentials is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, credentials, options)
