"""Where fetched feature weights are kept, and which are there. Free of torch."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import safetensors

FORMAT = "2"
"""Version of the cached files and of the calibration in them. Raised when either changes."""


def cache_folder() -> Path:
    """Return the folder of the weights: `models` in `NST_CACHE_DIR`, or in `nst` in the user's cache folder."""
    return Path(os.environ.get("NST_CACHE_DIR") or platformdirs.user_cache_path("nst")) / "models"


PUBLISHED = "published"


def cached_file(name: str, source: str = PUBLISHED) -> Path | None:
    """Return the cached file of model `name`, or None if it is not there.

    `source` is PUBLISHED for the weights that `nst-model fetch` brought, or the SHA-256 of a local file.
    """
    found = sorted(cache_folder().glob(f"{name}.v{FORMAT}.{source}.*.safetensors"))
    return found[-1] if found else None


def cache_name(name: str, source: str, content_sha256: str) -> str:
    """Return the name of a cached file; it ends in the SHA-256 that its content must have."""
    return f"{name}.v{FORMAT}.{source}.{content_sha256}.safetensors"


def published_sha256(file: Path) -> str:
    """Return the SHA-256 of the published weights that the cached `file` was made from."""
    with safetensors.safe_open(file, framework="np") as archive:
        return str(archive.metadata()["sha256"])
