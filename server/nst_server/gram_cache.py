"""Gram matrices on disk, keyed by the image file, the feature model and the size; shared by jobs and stored styles.

    grams/{model}-{format}.{weights}/{image}/{size}px-of-{base}-{pooling}-{padding}-{precision}/{layer}.safetensors

With each Gram matrix its features' mean is kept: every loss on first and second moments is made of the two. Coarser
scales of a run are scaled down from the style's full size, the base.

Whatever is here can be computed anew, so a damaged file is overwritten and a full disk costs only time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from nst_model.cache import FORMAT

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class GramKey(NamedTuple):
    """What a set of Gram matrices belongs to."""

    model: str
    weights_sha256: str
    image_sha256: str
    size_px: int
    base_px: int
    pooling: str
    padding: str  # with the margin's width, if it has one
    precision: str


@dataclass(frozen=True)
class GramCache:
    """The Gram matrices below one folder."""

    folder: Path

    def load(self, key: GramKey, layers: Iterable[str]) -> dict[str, dict[str, Tensor]]:
        """Return those of `layers` that are kept, layer → `mean` (C,) and `gram` (C, C), on the CPU."""
        import safetensors.torch  # noqa: PLC0415 - only workers have torch

        found = {}
        for layer in layers:
            file = self._folder(key) / f"{layer}.safetensors"
            try:
                found[layer] = _moments(safetensors.torch.load(file.read_bytes()))
                os.utime(file)
            except FileNotFoundError:
                continue
            except Exception as error:
                log.warning("%s is damaged and will be made anew: %s", file, error)
        return found

    def save(self, key: GramKey, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keep moments, layer → `mean` (C,) and `gram` (C, C)."""
        import safetensors.torch  # noqa: PLC0415

        folder = self._folder(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for layer, tensors in moments.items():
                partial = folder / f"{layer}.{os.getpid()}.partial"
                try:
                    partial.write_bytes(
                        safetensors.torch.save({name: t.cpu().contiguous() for name, t in tensors.items()})
                    )
                    partial.replace(folder / f"{layer}.safetensors")
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            log.warning("Gram matrices are not kept: %s", error)

    def prepared(self, image_sha256: str) -> dict[tuple[str, int], set[str]]:
        """Return the layers that are kept for an image, by model and size in pixels."""
        kept: dict[tuple[str, int], set[str]] = {}
        for folder in self.folder.glob(f"*/{image_sha256}/*px-of-*"):
            model = folder.parent.parent.name.rsplit("-", 1)[0]
            size_px, base_px = folder.name.split("-")[0].removesuffix("px"), folder.name.split("-")[2]
            if size_px != base_px:
                continue
            kept.setdefault((model, int(size_px)), set()).update(file.stem for file in folder.glob("*.safetensors"))
        return kept

    def trim(self, max_bytes: int) -> None:
        """Remove the images least recently used until at most `max_bytes` are kept."""
        images = []
        for folder in self.folder.glob("*/*"):
            try:
                files = [file.stat() for file in folder.rglob("*.safetensors")]
            except FileNotFoundError:  # another worker trims too
                continue
            images.append(
                (max((file.st_mtime for file in files), default=0.0), sum(file.st_size for file in files), folder)
            )
        total = sum(size for _, size, _ in images)
        for _, size, folder in sorted(images):
            if total <= max_bytes:
                return
            with contextlib.suppress(OSError):
                shutil.rmtree(folder)
                total -= size

    def _folder(self, key: GramKey) -> Path:
        size = f"{key.size_px}px-of-{key.base_px}-{key.pooling}-{key.padding}-{key.precision}"
        return self.folder / f"{key.model}-{FORMAT}.{key.weights_sha256[:16]}" / key.image_sha256 / size


def _moments(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file, in which nothing must be missing. Raises KeyError."""
    return {"mean": tensors["mean"], "gram": tensors["gram"]}
