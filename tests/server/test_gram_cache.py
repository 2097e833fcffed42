"""Gram matrices on disk."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest
import torch

from nst_server.gram_cache import GramCache, GramKey

KEY = GramKey("vgg16-hed", "w" * 64, "i" * 64, 512, 512, "max", "zeros", "fp32")
GRAMS = {
    "relu1_1": {"mean": torch.arange(4.0), "gram": torch.arange(16.0).reshape(4, 4)},
    "relu2_1": {"mean": torch.ones(6), "gram": torch.ones(6, 6)},
}


@pytest.fixture
def cache(tmp_path: Path) -> GramCache:
    """An empty cache."""
    return GramCache(tmp_path / "grams")


def test_what_is_saved_is_loaded(cache: GramCache) -> None:
    """Bit for bit, those layers that are asked for and there."""
    cache.save(KEY, GRAMS)
    loaded = cache.load(KEY, ["relu1_1", "relu5_1"])
    assert list(loaded) == ["relu1_1"]
    for name, tensor in GRAMS["relu1_1"].items():
        assert torch.equal(loaded["relu1_1"][name], tensor)


@pytest.mark.parametrize("part", GramKey._fields)
def test_every_part_of_the_key_matters(cache: GramCache, part: str) -> None:
    """Another model, image, size, pooling, padding or precision is another matrix."""
    cache.save(KEY, GRAMS)
    other = KEY._replace(**{part: 256 if part.endswith("_px") else "other"})
    assert cache.load(other, GRAMS) == {}


@pytest.mark.parametrize("damage", [b"", b"x", b"\xff" * 100])
def test_damaged_files_are_as_good_as_none(cache: GramCache, damage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """They are left out with a warning that names the file, and can be overwritten."""
    cache.save(KEY, GRAMS)
    (file,) = cache.folder.rglob("relu1_1.safetensors")
    file.write_bytes(damage)
    assert list(cache.load(KEY, GRAMS)) == ["relu2_1"]
    assert str(file) in caplog.text
    cache.save(KEY, GRAMS)
    assert len(cache.load(KEY, GRAMS)) == 2


def test_prepared_lists_layers_by_model_and_size(cache: GramCache) -> None:
    """For one image; a model's name may contain hyphens."""
    cache.save(KEY, GRAMS)
    cache.save(KEY._replace(size_px=256, base_px=256), {"relu1_1": GRAMS["relu1_1"]})
    cache.save(KEY._replace(image_sha256="j" * 64), GRAMS)
    assert cache.prepared("i" * 64) == {("vgg16-hed", 512): {"relu1_1", "relu2_1"}, ("vgg16-hed", 256): {"relu1_1"}}
    assert cache.prepared("k" * 64) == {}


def test_trim_removes_the_images_least_recently_used(cache: GramCache) -> None:
    """Whole images, oldest use first, until the rest fits; loading counts as use."""
    keys = [KEY._replace(image_sha256=letter * 64) for letter in "abcd"]
    for age, key in enumerate(reversed(keys)):
        cache.save(key, GRAMS)
        for file in cache.folder.rglob(f"{key.image_sha256}/*/*"):
            os.utime(file, (1_000_000 - age, 1_000_000 - age))
    size = sum(file.stat().st_size for file in cache.folder.rglob("*.safetensors")) // 4
    cache.trim(4 * size)
    assert kept(cache) == "abcd"
    cache.load(keys[0], GRAMS)  # the oldest becomes the newest
    cache.trim(4 * size - 1)
    assert kept(cache) == "acd"
    cache.trim(2 * size)
    assert kept(cache) == "ad"
    cache.trim(0)
    assert kept(cache) == ""


def test_a_full_disk_costs_only_time(
    cache: GramCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Saving says so in the log and leaves nothing half written."""
    original = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        original(path, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        cache.save(KEY, GRAMS)
    assert "No space left" in caplog.text
    assert not [path for path in cache.folder.rglob("*") if path.is_file()]


def kept(cache: GramCache) -> str:
    """Return the first letters of the images that are kept."""
    return "".join(sorted(folder.name[0] for folder in cache.folder.glob("*/*")))
