"""Gram matrices on disk, keyed by the image file, the feature model and the size; shared by jobs and stored styles.

    grams/{model}-{weights}/{image sha256}/{size}px-{pooling}-{precision}/{layer}.safetensors

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

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class GramKey(NamedTuple):
    """What a set of Gram matrices belongs to."""

    model: str
    weights_sha256: str
    image_sha256: str
    size_px: int
    pooling: str
    precision: str


@dataclass(frozen=True)
class GramCache:
    """The Gram matrices below one folder."""

    folder: Path

    def load(self, key: GramKey, layers: Iterable[str]) -> dict[str, Tensor]:
        """Return those of `layers` that are kept, layer → (C, C), on the CPU."""
        import safetensors.torch  # noqa: PLC0415 - only workers have torch

        found = {}
        for layer in layers:
            file = self._folder(key) / f"{layer}.safetensors"
            try:
                found[layer] = safetensors.torch.load(file.read_bytes())["gram"]
                os.utime(file)
            except FileNotFoundError:
                continue
            except Exception as error:
                log.warning("%s is damaged and will be made anew: %s", file, error)
        return found

    def save(self, key: GramKey, grams: Mapping[str, Tensor]) -> None:
        """Keep Gram matrices, layer → (C, C)."""
        import safetensors.torch  # noqa: PLC0415

        folder = self._folder(key)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for layer, gram in grams.items():
                partial = folder / f"{layer}.{os.getpid()}.partial"
                try:
                    partial.write_bytes(safetensors.torch.save({"gram": gram.cpu().contiguous()}))
                    partial.replace(folder / f"{layer}.safetensors")
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            log.warning("Gram matrices are not kept: %s", error)

    def prepared(self, image_sha256: str) -> dict[tuple[str, int], set[str]]:
        """Return the layers that are kept for an image, by model and size in pixels."""
        kept: dict[tuple[str, int], set[str]] = {}
        for folder in self.folder.glob(f"*/{image_sha256}/*px-*"):
            model = folder.parent.parent.name.rsplit("-", 1)[0]
            size_px = int(folder.name.split("px-")[0])
            kept.setdefault((model, size_px), set()).update(file.stem for file in folder.glob("*.safetensors"))
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
        size = f"{key.size_px}px-{key.pooling}-{key.precision}"
        return self.folder / f"{key.model}-{key.weights_sha256[:16]}" / key.image_sha256 / size
