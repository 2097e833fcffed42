"""What a caller asks for, and the form in which it is stored: JSON, with images by the SHA-256 of their files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nst_model import StylizeOptions
from nst_model.options import plain
from nst_server.frames import PreviewSpec
from nst_server.images import Encoding, ImageFormat


@dataclass(frozen=True)
class ImageName:
    """An image that is on the server already, by its resource name, `images/{sha256}`."""

    name: str


Source = bytes | ImageName
"""An image of a request: its file, or its name."""


@dataclass(frozen=True)
class JobStyle:
    """A style of a request: the name of a stored one, image files with their weights, or a style file."""

    weight: float
    name: str = ""
    files: tuple[tuple[Source, float], ...] = ()
    region: Source | None = None
    style_region: Source | None = None
    moments: Source | None = None


@dataclass(frozen=True)
class JobRequest:
    """What a caller asks for; the image files are not looked into yet."""

    content: Source
    styles: Sequence[JobStyle]
    model: str
    options: StylizeOptions
    preview: PreviewSpec
    output: Encoding
    init_image: Source = b""
    request_id: str = ""
    cancel_on_disconnect: bool = True

    async def resolved(self, fetch: Callable[[ImageName, str], Awaitable[bytes]]) -> JobRequest:
        """Return the request with a file for every image; `fetch` gets a name and the field that it stands in."""

        async def file(source: Source | None, field: str) -> Any:
            return await fetch(source, field) if isinstance(source, ImageName) else source

        styles = []
        for number, style in enumerate(self.styles):
            field = f"styles[{number}]"
            files = tuple([(await file(source, f"{field}.image"), weight) for source, weight in style.files])
            masks = {name: await file(getattr(style, name), f"{field}.{name}") for name in ("region", "style_region")}
            moments = await file(style.moments, f"{field}.style")
            styles.append(dataclasses.replace(style, files=files, moments=moments, **masks))
        content, start = await file(self.content, "content"), await file(self.init_image, "init_image")
        return dataclasses.replace(self, content=content, init_image=start, styles=styles)

    def stored(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return a resolved request as JSON, and its files by SHA-256."""
        files: dict[str, bytes] = {}

        def kept(source: Source | None) -> str | None:
            if not source:
                return None
            assert isinstance(source, bytes), "resolved"
            sha256 = hashlib.sha256(source).hexdigest()
            files[sha256] = source
            return sha256

        described = {
            "content": kept(self.content),
            "init_image": kept(self.init_image),
            "styles": [
                {
                    "weight": style.weight,
                    "name": style.name,
                    "files": [[kept(source), weight] for source, weight in style.files],
                    "region": kept(style.region),
                    "style_region": kept(style.style_region),
                    # Only where there is one: a request must not become another with another version of the server.
                    **({} if style.moments is None else {"moments": kept(style.moments)}),
                }
                for style in self.styles
            ],
            "model": self.model,
            "options": plain(self.options),
            "preview": dataclasses.asdict(self.preview),
            "output": dataclasses.asdict(self.output),
            "cancel_on_disconnect": self.cancel_on_disconnect,
        }
        return described, files

    @classmethod
    def restored(cls, described: Mapping[str, Any]) -> JobRequest:
        """Return the request that `stored` described, with names in place of files."""

        def named(sha256: str | None) -> Any:
            return None if sha256 is None else ImageName(f"images/{sha256}")

        return cls(
            content=named(described["content"]),
            init_image=named(described["init_image"]) or b"",
            styles=[
                JobStyle(
                    style["weight"],
                    style["name"],
                    tuple((named(sha256), weight) for sha256, weight in style["files"]),
                    named(style["region"]),
                    named(style["style_region"]),
                    named(style.get("moments")),
                )
                for style in described["styles"]
            ],
            model=described["model"],
            options=StylizeOptions(**described["options"]),
            preview=PreviewSpec(**{**described["preview"], "encoding": _encoding(described["preview"]["encoding"])}),
            output=_encoding(described["output"]),
            cancel_on_disconnect=described["cancel_on_disconnect"],
        )


@dataclass(frozen=True)
class JobUpdate:
    """Changes of a job: options by name, whether it is to wait (None: as it does now), whether it is enough."""

    changes: Mapping[str, Any]
    paused: bool | None = None
    finish: bool = False


def fingerprint(described: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a stored request, by which a repetition is told from another request.

    How a call watches its job is not part of it, but for how often there is a picture.
    """
    asked = {**described, "preview": described["preview"]["interval"], "cancel_on_disconnect": None}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _encoding(values: Mapping[str, Any]) -> Encoding:
    return Encoding(**{**values, "format": ImageFormat(values["format"])})
