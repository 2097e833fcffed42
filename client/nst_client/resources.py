"""What the server keeps and describes, and the small types with which a caller asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

from nst_client.files import write_whole
from nst_client.images import ImageFormat, ImageSource

OptionValue: TypeAlias = "bool | int | float | str | Mapping[str, float] | list[bool | int | float | str]"
"""The value of an option: a number, a choice in lower case (`"noise"`), layer names with weights, a truth value, or a
list of numbers."""


class JobState(StrEnum):
    """Where a job stands."""

    UNKNOWN = "unknown"
    """A state that is newer than this client."""
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    PAUSED = "paused"
    """Its caller wants it to wait."""

    @property
    def is_terminal(self) -> bool:
        """Whether the job has ended."""
        return self in {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}


class StopReason(StrEnum):
    """Why the optimization ended."""

    UNKNOWN = "unknown"
    """A reason that is newer than this client."""
    ITERATIONS = "iterations"
    """All iterations were made."""
    DIVERGED = "diverged"
    """The loss became infinite or NaN for good; the result is the best picture seen until then."""
    CONVERGED = "converged"
    """No further iteration would have changed the picture."""
    FINISHED = "finished"
    """The caller said that it is enough; the result is the best picture until then."""


class ModelState(StrEnum):
    """Whether a feature model can be used."""

    UNKNOWN = "unknown"
    """A state that is newer than this client."""
    AVAILABLE = "available"
    NOT_FETCHED = "not_fetched"
    """Its weights are not on the server."""


class OptionType(StrEnum):
    """What kind of value an option takes."""

    UNKNOWN = "unknown"
    """A type that is newer than this client."""
    INTEGER = "integer"
    NUMBER = "number"
    CHOICE = "choice"
    LAYER_WEIGHTS = "layer_weights"
    BOOLEAN = "boolean"
    INTEGERS = "integers"


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The numbers of one iteration."""

    iteration: int
    """0 for the starting picture, 1 after the first step."""
    iterations: int
    """Iterations the job will make, all scales together."""
    loss: float
    """The objective: weighted content loss, style loss and regularisers. It rises where a finer scale begins."""
    content_loss: float
    """Content loss before its weight."""
    tv_loss: float
    """Total variation before its weight."""
    laplacian_loss: float
    """Laplacian loss before its weight; 0 if its weight is."""
    style_losses: Mapping[str, float] = field(hash=False)
    """Style loss of each layer before any weight, by layer name."""
    elapsed_s: float
    """Seconds since the job got its device."""
    iterations_per_second: float
    """Averaged over the last few; 0 while unknown."""
    remaining_s: float
    """Estimated seconds until the result; 0 while unknown."""


@dataclass(frozen=True, kw_only=True)
class JobFailure:
    """Why a job failed."""

    code: str
    """Name of the google.rpc.Code that describes it best: `INTERNAL`, `UNAVAILABLE` …"""
    reason: str
    """For programs, stable: `WORKER_DIED`, `OUT_OF_MEMORY` …"""
    message: str
    """For people."""


@dataclass(frozen=True, kw_only=True)
class JobResult:
    """The result of a job, as the server keeps it: to be downloaded, or to be an image of another job."""

    image: str
    """Resource name, `images/{sha256}`."""
    total_bytes: int
    """Length of the file."""
    iteration: int
    """The iteration whose picture it is."""
    loss: float
    """The objective at that picture."""
    stop_reason: StopReason
    """Why the optimization ended there."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The making of one picture, as it stood when the server told of it."""

    name: str
    """Resource name, `jobs/{job}`."""
    state: JobState
    model: str
    """Resource name of the feature model, `models/{model}`."""
    options: Mapping[str, OptionValue] = field(hash=False)
    """The options in force, every one filled in."""
    width: int
    """Width of the picture, pixels."""
    height: int
    """Height of the picture, pixels."""
    create_time: datetime | None
    """When it was accepted, UTC."""
    start_time: datetime | None
    """When it got a device, UTC; None before."""
    end_time: datetime | None
    """When it ended, UTC; None before."""
    queue_position: int
    """Jobs before it in the queue; 0 when it is next or no longer queued."""
    device: str
    """`cpu`, `mps` or `cuda:0` for instance; empty while queued."""
    precision: str
    """The arithmetic really used, `fp32` or `bf16`; empty before it runs."""
    progress: Numbers | None
    """The newest numbers; None before the first."""
    error: JobFailure | None
    """Why it failed; None unless it did."""
    result: JobResult | None
    """None unless it succeeded."""
    attempt: int
    """Which attempt at it this is, from 1; 0 before it got a device."""
    estimated_start_time: datetime | None
    """When it will probably get a device, UTC; None unless it is queued."""
    sequence: int
    """The number of its last event."""
    request_id: str
    """The caller's own name for the request."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """An image on the server. Give it as it is wherever an image is asked for."""

    name: str
    """Resource name, `images/{sha256}`."""
    total_bytes: int
    """Length of the file."""
    width: int
    """Pixels, after any EXIF rotation."""
    height: int
    """Pixels, after any EXIF rotation."""
    media_type: str
    """`image/jpeg` for instance."""
    create_time: datetime | None
    """When it came, UTC."""


@dataclass(frozen=True, kw_only=True)
class PreparedGrams:
    """Gram matrices that the server has on disk."""

    model: str
    """Resource name of the feature model, `models/{model}`."""
    size_px: int
    """Longer edge the style images were brought to, pixels."""
    layers: tuple[str, ...]
    """The layers, in the model's order."""


@dataclass(frozen=True, kw_only=True)
class StyleImage:
    """One image of a stored style."""

    sha256: str
    """SHA-256 of the image file, 64 lowercase hexadecimal digits."""
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    weight: float | None
    """Share of this image relative to the others'; None if the server did not say."""


@dataclass(frozen=True, kw_only=True)
class StyleFile:
    """The file of an imported style: for what it can be used, and what it was made of."""

    sha256: str
    """SHA-256 of the file, 64 lowercase hexadecimal digits."""
    total_bytes: int
    """Length of the file."""
    model: str
    """Resource name of the feature model, `models/{model}`."""
    model_sha256: str
    """SHA-256 of the file that the model's weights were published in."""
    pooling: str
    """The option `pooling` of the jobs that it serves."""
    padding: str
    """The option `padding` of the jobs that it serves."""
    sizes_px: tuple[int, ...]
    """Longer edges that the style images were brought to, ascending."""
    layers: tuple[str, ...]
    """The layers, in the model's order."""
    images: tuple[StyleImage, ...]
    """The style images, as far as the file knows them."""


@dataclass(frozen=True, kw_only=True)
class Style:
    """A style kept on the server. Give it to `stylize` as it is."""

    name: str
    """Resource name, `styles/{style}`."""
    display_name: str
    """A name for people."""
    images: tuple[StyleImage, ...]
    """None for an imported style."""
    create_time: datetime | None
    """When it was created, UTC."""
    prepared: tuple[PreparedGrams, ...]
    """For what its Gram matrices are on disk."""
    file: StyleFile | None = None
    """What an imported style came in; None for one of images."""


@dataclass(frozen=True, kw_only=True)
class ExportedFile:
    """A file that the server made, whole and checked against its SHA-256."""

    data: bytes = field(repr=False)
    """The bytes of the file."""
    name: str
    """What the server would call it, `vgg16-hed-closure.onnx` for instance."""
    sha256: str
    """SHA-256 of `data`, 64 lowercase hexadecimal digits."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file in one step, into a directory by its own name, and return its path. Raises OSError."""
        target = Path(path)
        return write_whole(target / Path(self.name).name if target.is_dir() else target, self.data)


OnProgress: TypeAlias = "Callable[[int, int | None], object]"
"""Who is told how far a file has come: bytes that are here, and of how many; None while it is still being made."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a feature model: the output of a ReLU."""

    name: str
    """The literature's name, `relu4_2` for instance."""
    channels: int
    """Number of feature maps."""
    stride_px: int
    """Pixels of the picture between neighbouring positions."""
    receptive_field_px: int
    """Pixels of the picture, along each axis, that one position sees."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A feature model that the server knows."""

    name: str
    """Resource name, `models/{model}`."""
    display_name: str
    """A name for people."""
    description: str
    """What it is and where its weights come from."""
    state: ModelState
    is_default: bool
    """Whether jobs that name no model use it."""
    layers: tuple[Layer, ...]
    """The layers that options may name, from the image upwards."""
    license: str
    """Licence of the weights."""
    sha256: str
    """SHA-256 of the file that the weights were published in; empty if they are not on the server."""


@dataclass(frozen=True, kw_only=True)
class OptionDescription:
    """What the server says of one option of `stylize`."""

    name: str
    """The keyword argument of `stylize`, `size_px` for instance."""
    type: OptionType
    default: OptionValue | None = field(hash=False)
    """The value when it is left out."""
    minimum: float | None
    """Smallest allowed value (of each one, for layer weights and lists); None for choices and truth values."""
    maximum: float | None
    """Largest allowed value (of each one, for layer weights and lists); None for choices and truth values."""
    choices: tuple[str, ...]
    """The allowed choices; empty for the other types."""
    unit: str
    """Unit of the value, `px` for instance; empty for plain numbers."""
    description: str
    """What it does, in English."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A starting point for `stylize` that other options override: `stylize(photo, style, preset="gatys")`."""

    name: str
    """The value of the option `preset`."""
    description: str
    """What it is for, in English."""
    options: Mapping[str, OptionValue] = field(hash=False)
    """The options it stands for, every one filled in."""


@dataclass(frozen=True)
class StyleName:
    """The name of a style kept on the server: `StyleName("starry")` or `StyleName("styles/starry")`.

    A plain string would be the path of a file.
    """

    name: str


@dataclass(frozen=True)
class ImageName:
    """The name of an image on the server: `ImageName("images/{sha256}")`.

    A plain string would be the path of a file.
    """

    name: str


AnyImage: TypeAlias = "ImageSource | ImageName | StoredImage | JobResult"
"""An image brought along, or one on the server: uploaded, or the result of a job."""

SourceT = TypeVar("SourceT")


@dataclass(frozen=True)
class Weighted(Generic[SourceT]):
    """A style, or an image of one, with its share in a mixture: `Weighted("waves.jpg", 2)`.

    Shares are relative to each other; the server divides them by their sum. Without one it is 1.
    """

    source: SourceT
    weight: float


StyleSource: TypeAlias = "AnyImage | StyleName | Style"
"""A style for `stylize`: an image, or a style kept on the server."""


@dataclass(frozen=True)
class StyleInput:
    """A style with all that can be said of it: `StyleInput("waves.jpg", region="sky.png")`.

    A mask is an image, white where it holds, black elsewhere, grey in between.
    """

    source: StyleSource
    _: KW_ONLY
    weight: float | None = None
    """Share in a mixture, as in `Weighted`; None for the server's, 1."""
    region: AnyImage | None = None
    """Where in the picture the style belongs: a mask of the photograph's proportions; None for all that the other
    styles' regions leave."""
    style_region: AnyImage | None = None
    """Which part of the style image to take the style from: a mask of its proportions; None for all of it. Only for a
    style of one image."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a picture is to be encoded. What is left out is the server's choice: PNG for results, JPEG for previews."""

    format: ImageFormat | str | None = None
    """`"png"`, `"jpeg"`, `"webp"` or `"tiff"`."""
    quality: int | None = None
    """Quality of a lossy format, 1 to 100; PNG and TIFF ignore it."""
    bit_depth: int | None = None
    """Bits a channel, 8 or 16; 16 only for results in PNG and TIFF."""


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Which frames a stream carries. What is left out is the server's choice: every iteration, as JPEG."""

    interval: int | None = None
    """A frame every this many iterations; 0 for none."""
    size_px: int | None = None
    """Longer edge, pixels; never more than the picture's."""
    encoding: Encoding | None = None
    every_frame: bool = False
    """Leave none out, however slowly they are read: those that wait are kept on the server's disk."""


NO_PREVIEW = Preview(interval=0)
"""No frames: only the numbers and the result."""
