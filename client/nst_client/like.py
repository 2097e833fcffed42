"""`nst stylize --like`: what is taken from the parameters in a picture, and what is no longer as it was."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from nst_client.client import Client
from nst_client.errors import InvalidArgumentError
from nst_client.images import read_image
from nst_client.parameters import Parameters, StyleRecord, read_parameters
from nst_client.requests import image_name
from nst_client.resources import AnyImage, Style, StyleInput, StyleName, StyleSource

KEPT_BESIDE_A_PRESET = frozenset({"size_px", "seed"})
"""What a preset asked for by name leaves of an example's options."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is going to be asked for."""

    content: AnyImage
    styles: Sequence[StyleInput]
    init_image: AnyImage | None
    model: str | None
    """None for the server's choice."""
    options: Mapping[str, Any]

    def read(self) -> Order:
        """Return the order with every file read, so that what is compared is what is sent.

        Raises ImageNotReadableError.
        """
        return replace(
            self,
            content=_read(self.content, field="content"),
            styles=[_read_style(style, field=f"styles[{index}]") for index, style in enumerate(self.styles)],
            init_image=_read_optional(self.init_image, field="init_image"),
        )


@dataclass(frozen=True, kw_only=True)
class Example:
    """The picture that another is to be like."""

    name: str
    """What people call it: its file's name."""
    parameters: Parameters

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the example in a file. Raises as `read_parameters` does."""
        return cls(name=path.name, parameters=read_parameters(path))

    def complete(self, order: Order) -> Order:
        """Return the order with what it leaves open taken from this picture.

        Raises InvalidArgumentError if this picture's styles, or what it was started from, are needed and not at hand.
        """
        return replace(
            order,
            styles=order.styles or self._stored_styles(),
            model=order.model or self.parameters.model,
            options={**self._options(order), **order.options},
        )

    def differences(self, order: Order, client: Client) -> Iterator[str]:
        """Yield, for people, what is another thing than when this picture was made; the order's files are read."""
        recorded = self.parameters
        if _sha256(order.content) != recorded.content_sha256:
            yield f"another photograph than {self.name}'s"
        if order.init_image is not None and recorded.init_image_sha256 not in {None, _sha256(order.init_image)}:
            yield f"another picture to start from than {self.name}'s"
        if _bare(order.model) == _bare(recorded.model) and _has_other_weights(recorded, client):
            yield f"the model {recorded.model} has other weights than {self.name}'s"
        if len(order.styles) == len(recorded.styles):
            yield from self._style_differences(order.styles, client)
        else:
            yield f"another number of styles ({len(order.styles)}) than {self.name}'s ({len(recorded.styles)})"

    def _options(self, order: Order) -> dict[str, Any]:
        options = dict(self.parameters.options)
        if "preset" in order.options:
            return {name: value for name, value in options.items() if name in KEPT_BESIDE_A_PRESET}
        if "iterations" in order.options:
            # These would take precedence on the server.
            options.pop("scale_iterations", None)
        if order.init_image is not None:
            options.pop("init", None)
        elif options.get("init") == "image" and "init" not in order.options:
            raise InvalidArgumentError(
                f"{self.name} was started from a picture (SHA-256 {self.parameters.init_image_sha256}):"
                " bring it with --init-image, or choose another start with --init",
                field="init_image",
            )
        return options

    def _stored_styles(self) -> list[StyleInput]:
        styles = []
        for number, record in enumerate(self.parameters.styles, start=1):
            if record.name is None:
                raise InvalidArgumentError(
                    f"style {number} of {self.name} is an image that is not kept on the server: name every STYLE",
                    field="styles",
                )
            styles.append(StyleInput(StyleName(record.name), weight=record.weight))
        return styles

    def _style_differences(self, styles: Sequence[StyleInput], client: Client) -> Iterator[str]:
        records = self.parameters.styles
        for number, (style, record) in enumerate(zip(styles, records, strict=True), start=1):
            if _sha256s(style.source, client) != record.sha256:
                yield f"style {number} is another than {self.name}'s"
            masks = (
                ("region", style.region, record.region_sha256),
                ("style region", style.style_region, record.style_region_sha256),
            )
            for what, mask, was in masks:
                # A mask where there was none has been asked for: nobody needs to be told.
                if was is not None and mask is None:
                    yield f"style {number} has no {what}; {self.name}'s has one"
                elif was is not None and mask is not None and _sha256(mask) != was:
                    yield f"the {what} of style {number} is another than {self.name}'s"
        if not _same_shares(styles, records):
            yield f"the styles are mixed in other shares than {self.name}'s"


def _has_other_weights(recorded: Parameters, client: Client) -> bool:
    known = [model.sha256 for model in client.list_models() if _bare(model.name) == _bare(recorded.model)]
    return any(sha256 and sha256 != recorded.model_sha256 for sha256 in known)


def _same_shares(styles: Sequence[StyleInput], records: Sequence[StyleRecord]) -> bool:
    now = _shares([1.0 if style.weight is None else style.weight for style in styles])
    return all(map(math.isclose, now, _shares([record.weight for record in records])))


def _shares(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights] if total > 0 else list(weights)


def _sha256s(source: StyleSource, client: Client) -> tuple[str, ...]:
    if isinstance(source, StyleName | Style):
        style = client.get_style(source)
        return tuple(part.sha256 for part in (style.images if style.file is None else [style.file]))
    return (_sha256(source),)


def _sha256(source: AnyImage) -> str:
    if (name := image_name(source)) is not None:
        return name.removeprefix("images/")
    return hashlib.sha256(read_image(source, field="")).hexdigest()


def _bare(model: str | None) -> str:
    return (model or "").removeprefix("models/")


def _read_style(style: StyleInput, *, field: str) -> StyleInput:
    return replace(
        style,
        source=style.source if isinstance(style.source, StyleName | Style) else _read(style.source, field=field),
        region=_read_optional(style.region, field=f"{field}.region"),
        style_region=_read_optional(style.style_region, field=f"{field}.style_region"),
    )


def _read_optional(source: AnyImage | None, *, field: str) -> AnyImage | None:
    return None if source is None else _read(source, field=field)


def _read(source: AnyImage, *, field: str) -> AnyImage:
    return read_image(source, field=field) if image_name(source) is None else source
