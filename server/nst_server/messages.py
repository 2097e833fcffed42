"""What the front and its worker processes say to each other, over a pipe. Free of torch.

The front sends tasks, one at a time, and orders for the current one; the worker answers each task with exactly one of
the endings, and before that with `Started`, `Progressed`, `Pictured`, `Kept` and `Steered`.

The process that exports is sent one `ExportTask` and answers with `Exported` or `NotExported`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nst_model.export_spec import ExportSpec
from nst_model.options import StylizeOptions

if TYPE_CHECKING:
    from nst_server.deep_images import DeepPixels
    from nst_server.images import Mask, Pixels


FINISHED = "finished"
"""The reason to stop of a task that was told to finish."""


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker process is started with.

    Attributes:
        device: `auto` or a device's name.
        threads: CPU threads; 0 leaves the choice to PyTorch.
        model: feature model to load at once.
        weights: files of feature weights by model.
        grams: folder of the Gram cache.
        grams_max_bytes: its size limit.
        blobs: where checkpoints are kept, as `Blobs.open` takes it; None for nowhere.
        checkpoint_interval_s: a running task's state is kept this often at most, seconds.
        memory_bytes: what a task may take of the device's memory; 0 for what it has.
    """

    device: str
    threads: int
    model: str
    weights: Mapping[str, Path]
    grams: Path
    grams_max_bytes: int
    blobs: Path | str | None = None
    checkpoint_interval_s: float = 5.0
    memory_bytes: int = 0


@dataclass(frozen=True)
class StyleImage:
    """A style image of a task.

    Attributes:
        pixels: HWC uint8 RGB, already of the size to be used.
        sha256: of the image file.
        size_px: the longer edge of `pixels`.
        weight: share of this image in the task; the shares sum to 1.
        region: HW uint8 of the content's size, where the style belongs; None for wherever no other does.
        mask: HW uint8 of `pixels`' size, which part of it makes the style; None for all.
    """

    pixels: Pixels
    sha256: str
    size_px: int
    weight: float
    region: Mask | None = None
    mask: Mask | None = None


@dataclass(frozen=True)
class StyleMoments:
    """A style of a task without its images: what a style file holds.

    Attributes:
        file: the style file.
        size_px: longer edge that the style has beside the finished picture.
        weight: share of this style in the task; the shares sum to 1.
        region: HW uint8 of the content's size, where the style belongs; None for wherever no other does.
    """

    file: bytes
    size_px: int
    weight: float
    region: Mask | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A task's state after one iteration, among the blobs.

    Attributes:
        key: the blob's name.
        iteration: the last one made.
        elapsed_s: seconds spent on the task until then.
        data: the state itself, where there are no blobs to keep it in.
        attempt: which attempt at the task it was made in.
    """

    key: str
    iteration: int
    elapsed_s: float
    data: bytes = b""
    attempt: int = 0


@dataclass(frozen=True)
class StylizeTask:
    """Make a picture.

    Attributes:
        id: the job's name.
        content: HWC uint8 RGB, of the result's size.
        frame_interval: a picture is wanted every this many iterations; 0 for none.
        start: HWC uint8 RGB, of the result's size, the picture that Init.IMAGE starts from.
        bit_depth: bits a channel of the result's pixels, 8 or 16.
        checkpoint: where to go on from; None to begin.
        attempt: tells the checkpoints of one attempt at the job from those of another.
        every_frame: send each picture that is wanted, however slow the pipe.
    """

    id: str
    model: str
    content: Pixels
    styles: tuple[StyleImage | StyleMoments, ...]
    options: StylizeOptions
    frame_interval: int
    start: Pixels | None = None
    bit_depth: int = 8
    checkpoint: Checkpoint | None = None
    attempt: int = 1
    every_frame: bool = False


@dataclass(frozen=True)
class PrepareTask:
    """Compute and keep the Gram matrices of images."""

    id: str
    model: str
    styles: tuple[StyleImage, ...]
    options: StylizeOptions


Task = StylizeTask | PrepareTask


@dataclass(frozen=True)
class Cancel:
    """End the task of that id before its next evaluation."""

    id: str


@dataclass(frozen=True)
class Steer:
    """Change options of the task of that id before its next evaluation."""

    id: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Finish:
    """End the task of that id before its next evaluation, with the best picture so far."""

    id: str


@dataclass(frozen=True)
class Suspend:
    """Keep the state of the task of that id, and end it before its next evaluation."""

    id: str


@dataclass(frozen=True)
class EveryFrame:
    """From now on, send each picture of the task of that id that is wanted, however slow the pipe."""

    id: str


Order = Cancel | Steer | Finish | Suspend | EveryFrame


@dataclass(frozen=True)
class Ready:
    """The worker takes tasks.

    Attributes:
        devices: all those that `auto` stands for on this machine.
        memory_bytes: what tasks may take of the device's memory; 0 if nobody knows.
    """

    device: str
    devices: tuple[str, ...]
    memory_bytes: int = 0


@dataclass(frozen=True)
class Refused:
    """The worker cannot start; it ends after saying so."""

    message: str


@dataclass(frozen=True)
class Started:
    """The task has begun. `precision` is the arithmetic in use, `fp32` or `bf16`."""

    id: str
    precision: str


@dataclass(frozen=True)
class Progressed:
    """The numbers of one iteration; see the contract's Progress."""

    id: str
    iteration: int
    iterations: int
    loss: float
    content_loss: float
    tv_loss: float
    laplacian_loss: float
    style_losses: Mapping[str, float]
    elapsed_s: float
    iterations_per_second: float
    remaining_s: float


@dataclass(frozen=True)
class Pictured:
    """The picture of one iteration. Pictures that the pipe is too slow for are left out."""

    id: str
    iteration: int
    pixels: Pixels


@dataclass(frozen=True)
class Kept:
    """The task's state is kept; what was kept before is needed no more."""

    id: str
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Steered:
    """The task goes on with these options, which make so many iterations, those that were made included."""

    id: str
    options: StylizeOptions
    iterations: int


@dataclass(frozen=True)
class Done:
    """The task ended well. The fields after `id` are set for pictures only; `pixels` are of the task's bit depth."""

    id: str
    pixels: Pixels | DeepPixels | None = None
    iteration: int = 0
    loss: float = 0.0
    stop_reason: str = ""


@dataclass(frozen=True)
class Cancelled:
    """The task ended because it was cancelled."""

    id: str


@dataclass(frozen=True)
class Suspended:
    """The task ended because it was suspended; it can go on from its last checkpoint, or begin anew without one."""

    id: str


@dataclass(frozen=True)
class Failed:
    """The task failed; the worker goes on. `reason` and `message` as in the contract's JobError."""

    id: str
    reason: str
    message: str


Ending = Done | Cancelled | Suspended | Failed
Message = Ready | Refused | Started | Progressed | Pictured | Kept | Steered | Ending


@dataclass(frozen=True)
class ModelExport:
    """Write a feature model to a file. `weights` is the file that they are in, None for the cache."""

    spec: ExportSpec
    weights: Path | None


@dataclass(frozen=True)
class StyleExport:
    """Write the moments of a style to a file.

    Attributes:
        model: the feature model.
        weights: the file that its weights are in, None for the cache.
        images: the style's, of the size that they have beside a finished picture, with their shares.
        options: of the jobs that the file is to serve.
        display_name: a name of the style for people.
    """

    model: str
    weights: Path | None
    images: tuple[StyleImage, ...]
    options: StylizeOptions
    display_name: str


ExportTask = ModelExport | StyleExport


@dataclass(frozen=True)
class Exported:
    """The file is written. `size` is in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class NotExported:
    """The file was not written. `reason` and `message` as in `nst_server.errors`."""

    reason: str
    message: str
