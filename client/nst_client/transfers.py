"""Images up and down in parts, and other files down, taken up again where they broke. No network here."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from typing import Any, Protocol, TypeAlias, TypeVar

from nst.v1 import file_pb2, image_pb2, image_service_pb2, style_transfer_service_pb2
from nst_client.errors import BrokenStreamError, InvalidArgumentError, NotFoundError
from nst_client.images import Picture
from nst_client.parts import PartBuffer
from nst_client.requests import images_to_upload
from nst_client.resources import ExportedFile, OnProgress

PART_BYTES = 1 << 20

MAX_UPLOADS = 3
"""How often an upload is begun: the server may lose one that it holds, but not again and again."""

Calls: TypeAlias = Generator[tuple[str, Any], Any, Any]
"""Calls, one after another, each a method's name and its request: the answer is to be sent in, an error thrown in."""


def uploading(data: bytes) -> Calls:
    """Yield the calls that bring an image file to the server; return the image's name.

    Raises InvalidArgumentError if it is no image, and BrokenStreamError if the server loses what it was sent.
    """
    asked = image_service_pb2.CreateUploadRequest(total_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    for _ in range(MAX_UPLOADS):
        upload = yield "CreateUpload", asked
        try:
            while not upload.image:
                upload = yield from _next_part(upload, data)
        except NotFoundError:
            # Gone, or complete, and the answer that would have said so was lost: beginning anew tells.
            continue
        return upload.image
    raise BrokenStreamError(f"the server lost an upload of {len(data)} bytes {MAX_UPLOADS} times")


def uploading_large_images(request: style_transfer_service_pb2.StylizeRequest) -> Calls:
    """Yield the calls that bring the images for which a request has no room, and put their names in their places."""
    for field, image in images_to_upload(request):
        try:
            image.name = yield from uploading(image.data)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(
                f"{field}: {error}", field=field, code=error.code, reason=error.reason
            ) from error


def _next_part(upload: Any, data: bytes) -> Calls:
    begin = upload.received_bytes
    part = data[begin : begin + PART_BYTES]
    if not part:
        raise BrokenStreamError(f"the server has received all {len(data)} bytes of {upload.name} and names no image")
    try:
        return (yield "WriteUpload", image_service_pb2.WriteUploadRequest(name=upload.name, offset=begin, data=part))
    except InvalidArgumentError as error:
        if error.code != "OUT_OF_RANGE":
            raise
        # Another server than before may be behind in what it has.
        return (yield "GetUpload", image_service_pb2.GetUploadRequest(name=upload.name))


WholeT_co = TypeVar("WholeT_co", covariant=True)


class Download(Protocol[WholeT_co]):
    """Something on its way from the server, in the parts of a stream that may break."""

    method: str
    """The method that streams it."""

    def request(self) -> Any:
        """Return the request for what is missing."""

    def receive(self, part: Any) -> None:
        """Take the next part. Raises BrokenStreamError if it does not continue."""

    def whole(self) -> WholeT_co:
        """Return what has come, once a stream has ended. Raises BrokenStreamError if it is not whole."""


class ImageDownload:
    """An image on its way from the server."""

    method = "DownloadImage"

    def __init__(self, name: str) -> None:
        self.name = name
        self.picture: Picture | None = None
        """The image, once it is whole."""
        self._parts = PartBuffer()

    def request(self) -> image_service_pb2.DownloadImageRequest:
        """Return the request for what is missing."""
        return image_service_pb2.DownloadImageRequest(name=self.name, offset=self._parts.received_bytes)

    def receive(self, part: image_pb2.ImagePart) -> None:
        """Take the next part. Raises BrokenStreamError if it does not continue, or the whole is not what was named."""
        whole = self._parts.add(part, of=self.name)
        if whole is None:
            return
        if part.sha256 != self.name.removeprefix("images/"):
            raise BrokenStreamError(f"{self.name} arrived as another file, with SHA-256 {part.sha256}")
        self.picture = Picture(**whole)

    def whole(self) -> Picture:
        """Return the image, once the stream has ended. Raises BrokenStreamError if it ended too early."""
        if self.picture is None:
            raise BrokenStreamError(f"{self.name} ended after {self._parts.received_bytes} bytes")
        return self.picture


class FileDownload:
    """A file that the server makes, on its way here.

    `request` is for the whole file; `on_progress` is told of every part.
    """

    def __init__(self, method: str, request: Any, on_progress: OnProgress | None) -> None:
        self.method = method
        self._request = request
        self._on_progress = on_progress
        self._data = bytearray()
        self._total_bytes = 0
        self._name = ""

    def request(self) -> Any:
        """Return the request for what is missing; its `sha256` is that of the file that has begun to come."""
        self._request.offset = len(self._data)
        return self._request

    def receive(self, part: file_pb2.FilePart) -> None:
        """Take the next part. Raises BrokenStreamError if it does not continue what came before."""
        if part.total_bytes:
            if part.sha256 != self._request.sha256 and part.offset == 0:
                # After an interruption there may be another server, which makes another file.
                self._data.clear()
                self._request.sha256, self._total_bytes, self._name = part.sha256, part.total_bytes, part.file_name
            whole = (part.sha256, part.total_bytes) == (self._request.sha256, self._total_bytes)
            if not whole or part.offset != len(self._data):
                raise BrokenStreamError(
                    f"a file's part at byte {part.offset} of {part.total_bytes} does not continue"
                    f" the {len(self._data)} bytes that came before"
                )
            self._data += part.data
        if self._on_progress is not None:
            self._on_progress(len(self._data), self._total_bytes or None)

    def whole(self) -> ExportedFile:
        """Return the file, once a stream has ended. Raises BrokenStreamError if it is not whole, or damaged."""
        data = bytes(self._data)
        if not self._total_bytes or len(data) != self._total_bytes:
            raise BrokenStreamError(f"the file ended after {len(data)} of {self._total_bytes} bytes")
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != self._request.sha256:
            raise BrokenStreamError(
                f"{self._name} arrived damaged: its SHA-256 is {sha256}, {self._request.sha256} was announced"
            )
        return ExportedFile(data=data, name=self._name, sha256=sha256)
