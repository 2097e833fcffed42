"""What the server can do, whatever the transport: jobs, styles, models."""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nst_model import CARDS, Init, InvalidOption, ModelCard, StyleLoss, StylizeOptions, UnknownModel, model_card
from nst_model.cache import cached_file, published_sha256
from nst_model.options import plain
from nst_server import images
from nst_server.errors import InvalidField, ModelNotFetched, NotFound
from nst_server.gram_cache import GramCache
from nst_server.images import Encoding
from nst_server.jobs import Job, JobSpec, PreviewSpec
from nst_server.messages import PrepareTask, StyleImage
from nst_server.scheduler import Scheduler
from nst_server.settings import Settings
from nst_server.styles import StoredImage, Style, StyleStore

if TYPE_CHECKING:
    from nst_server.images import Mask, Pixels

MAX_STYLES = 16
MAX_STYLE_IMAGES = 32
MAX_STYLE_SIZE_PX = 4096
MAX_DISPLAY_NAME = 200
PAGE_TOKEN = "after:"

T = TypeVar("T")


@dataclass(frozen=True)
class JobStyle:
    """A style of a request: the name of a stored one, or an image file."""

    weight: float
    name: str = ""
    data: bytes = b""
    region: bytes | None = None
    style_region: bytes | None = None


@dataclass(frozen=True)
class JobRequest:
    """What a caller asks for; the image files are not looked into yet."""

    content: bytes
    styles: Sequence[JobStyle]
    model: str
    options: StylizeOptions
    preview: PreviewSpec
    output: Encoding
    init_image: bytes = b""


class Application:
    """The application core. Its methods run on the event loop and raise RequestError for what they refuse."""

    def __init__(self, settings: Settings, scheduler: Scheduler) -> None:
        self._settings = settings
        self._scheduler = scheduler
        self._max_pixels = settings.max_megapixels * 1_000_000
        self._styles = StyleStore(settings.data_dir / "styles")
        self._grams = GramCache(settings.data_dir / "grams")
        self._styles.clean()
        # A pool of its own: a flood of large pictures must not hold up frames, results and the workers' pipes.
        self._decoding = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def place(self) -> AbstractContextManager[None]:
        """Hold a place in the queue for a request, within the block; to be entered before its images are received.

        Raises QueueFull or Stopping at once, so that a server with no place spends nothing on a request.
        """
        return self._scheduler.place()

    async def stylize(self, request: JobRequest) -> Job:
        """Check a request for which a place is held, and queue its job. Raises RequestError, having started nothing."""
        job = Job(await self._decode(self._checked, request))
        self._scheduler.submit(job)
        return job

    def cancel(self, job: Job) -> None:
        """End a job that nobody wants any more; does nothing if it has ended."""
        self._scheduler.cancel(job)

    async def create_style(self, style_id: str, display_name: str, files: Sequence[tuple[bytes, float]]) -> Style:
        """Store a style; its Gram matrices for the defaults are computed when a device is idle."""
        style, pictures = await self._decode(self._create_style, style_id, display_name, files)
        for picture in pictures:
            self._scheduler.prepare(PrepareTask(style.name, self._settings.default_model, (picture,), StylizeOptions()))
        return style

    async def get_style(self, name: str) -> Style:
        """Return a stored style. Raises NotFound."""
        return await asyncio.to_thread(self._styles.get, name)

    async def list_styles(self, page_size: int, page_token: str) -> tuple[list[Style], str]:
        """Return a page of styles and the token of the next. Raises InvalidField."""
        return _page(await asyncio.to_thread(self._styles.list), lambda style: style.id, page_size, page_token)

    async def delete_style(self, name: str) -> None:
        """Delete a stored style. Raises NotFound."""
        await asyncio.to_thread(self._styles.delete, name)

    def prepared(self, style: Style) -> dict[tuple[str, int], list[str]]:
        """Return the layers whose Gram matrices are on disk for all images of a style, by (model, size in px)."""
        kept = [self._grams.prepared(image.sha256) for image in style.images]
        common = functools.reduce(lambda left, right: left & right, (set(image) for image in kept))
        found = {}
        for model, size_px in common:
            layers = set.intersection(*(image[model, size_px] for image in kept))
            order = CARDS[model].architecture.layers if model in CARDS else ()
            if listed := [layer for layer in order if layer in layers]:
                found[model, size_px] = listed
        return found

    async def list_models(self, page_size: int, page_token: str) -> tuple[list[tuple[ModelCard, str]], str]:
        """Return a page of models, the default first, each with its SHA-256 or, not being here, an empty string."""
        cards = sorted(CARDS.values(), key=lambda card: card.name != self._settings.default_model)
        found = [(card, await asyncio.to_thread(self._weights_sha256, card.name)) for card in cards]
        # The order is not that of the names, so a token is a place in it.
        places = {card.name: f"{place:04}" for place, card in enumerate(cards)}
        return _page(found, lambda item: places[item[0].name], page_size, page_token)

    @property
    def default_model(self) -> str:
        """Name of the model of requests that name none."""
        return self._settings.default_model

    async def _decode(self, work: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoding, work, *arguments)

    def _checked(self, request: JobRequest) -> JobSpec:
        card = self._usable_model(request.model)
        options = request.options
        if options.size_px > self._settings.max_size_px:
            raise InvalidField(
                "options.size_px",
                f"must be at most {self._settings.max_size_px} px on this server, not {options.size_px}",
            )
        try:
            options.check_layers(card.architecture.layers)
        except InvalidOption as error:
            raise InvalidField(f"options.{error.field}", error.reason) from error
        picture = images.decode_with_alpha(request.content, "content.data", self._max_pixels)
        content, alpha = images.fit_with_alpha(picture, options.size_px, "content.data")
        height, width = content.shape[:2]
        styles, described = self._job_styles(request.styles, options, (width, height))
        return JobSpec(
            model=card.name,
            options=options,
            content=content,
            styles=styles,
            preview_interval=request.preview.interval,
            output=request.output,
            start=self._start(request, (width, height)),
            alpha=alpha,
            parameters=self._parameters(card.name, request, described),
        )

    def _parameters(self, model: str, request: JobRequest, styles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a result's file says of its request, ready for JSON; see the contract's Encoding."""
        return {
            "nst": importlib.metadata.version("nst-service"),
            "model": model,
            "model_sha256": self._weights_sha256(model),
            "options": plain(request.options),
            "content_sha256": hashlib.sha256(request.content).hexdigest(),
            "styles": styles,
            **_hashes(init_image_sha256=request.init_image or None),
        }

    def _start(self, request: JobRequest, size: tuple[int, int]) -> Pixels | None:
        if request.options.init is not Init.IMAGE:
            return None
        picture = images.decode_with_alpha(request.init_image, "init_image.data", self._max_pixels)
        return images.stretch(picture, size)

    def _mask(self, data: bytes | None, size: tuple[int, int], field: str) -> Mask | None:
        if data is None:
            return None
        return images.mask(images.decode(data, f"{field}.data", self._max_pixels), size, f"{field}.data")

    def _job_styles(
        self, styles: Sequence[JobStyle], options: StylizeOptions, size: tuple[int, int]
    ) -> tuple[tuple[StyleImage, ...], list[dict[str, Any]]]:
        """Return the images of a request's styles, and for each style what the result's file says of it."""
        size_px = max(images.MIN_EDGE_PX, round(options.size_px * options.style_scale))
        if size_px > MAX_STYLE_SIZE_PX:
            raise InvalidField(
                "options.style_scale",
                f"would make the styles {size_px} px large; at most {MAX_STYLE_SIZE_PX} px are allowed",
            )
        _check_count("styles", len(styles))
        found: list[StyleImage] = []
        described: list[dict[str, Any]] = []
        shares = _shares([style.weight for style in styles], "styles")
        for index, (style, share) in enumerate(zip(styles, shares, strict=True)):
            field = f"styles[{index}]"
            files, recorded = self._style_files(style, share, field)
            described.append(recorded)
            region = self._mask(style.region, size, f"{field}.region")
            if style.style_region is not None and options.style_loss in (StyleLoss.DIRECT, StyleLoss.CROSS):
                raise InvalidField(
                    "options.style_loss",
                    f"{options.style_loss} compares position by position; it must not go with {field}.style_region",
                )
            if style.style_region is not None and len(files) > 1:
                raise InvalidField(f"{field}.style_region", f"needs a style of one image; this one has {len(files)}")
            for data, weight, place in files:
                if weight == 0 and region is None:
                    continue
                image = self._style_image(data, weight, size_px, place)
                height, width = image.pixels.shape[:2]
                mask = self._mask(style.style_region, (width, height), f"{field}.style_region")
                found.append(dataclasses.replace(image, region=region, mask=mask))
            if len(found) > MAX_STYLE_IMAGES:
                raise InvalidField(
                    "styles", f"must have at most {MAX_STYLE_IMAGES} images, those of stored styles counted"
                )
        return tuple(found), described

    def _style_files(
        self, style: JobStyle, share: float, field: str
    ) -> tuple[list[tuple[bytes, float, str]], dict[str, Any]]:
        """Return a style's image files, each with its share and its field, and what the result's file says of them."""
        if style.name:
            place = f"{field}.style"
            stored = self._styles.get(style.name, place)
            inner = _shares([image.weight for image in stored.images], place)
            files = [
                (data, share * part, place) for data, part in zip(self._styles.files(stored, place), inner, strict=True)
            ]
            name = {"name": stored.name}
        else:
            files, name = [(style.data, share, f"{field}.image.data")], {}
        sha256 = [hashlib.sha256(data).hexdigest() for data, _, _ in files]
        masks = _hashes(region_sha256=style.region, style_region_sha256=style.style_region)
        return files, {"sha256": sha256, "weight": style.weight, **name, **masks}

    def _style_image(self, data: bytes, weight: float, size_px: int, field: str) -> StyleImage:
        picture = images.decode(data, field, self._max_pixels)
        return StyleImage(images.fit(picture, size_px, field), hashlib.sha256(data).hexdigest(), size_px, weight)

    def _create_style(
        self, style_id: str, display_name: str, files: Sequence[tuple[bytes, float]]
    ) -> tuple[Style, list[StyleImage]]:
        _check_count("style.images", len(files))
        if len(display_name) > MAX_DISPLAY_NAME:
            raise InvalidField(
                "style.display_name", f"must have at most {MAX_DISPLAY_NAME} characters, not {len(display_name)}"
            )
        _shares([weight for _, weight in files], "style.images")  # refuses what cannot be mixed
        stored, prepared = [], []
        for index, (data, weight) in enumerate(files):
            field = f"style.images[{index}].image.data"
            picture = images.decode(data, field, self._max_pixels)
            sha256 = hashlib.sha256(data).hexdigest()
            stored.append((StoredImage(sha256, weight, *picture.size), data))
            size_px = StylizeOptions().size_px
            prepared.append(StyleImage(images.fit(picture, size_px, field), sha256, size_px, 1.0))
        return self._styles.create(style_id, display_name, stored), prepared

    def _usable_model(self, name: str) -> ModelCard:
        try:
            card = model_card(name.removeprefix("models/") or self._settings.default_model)
        except UnknownModel as error:
            raise NotFound("model", str(error)) from error
        if card.name not in self._settings.weights and cached_file(card.name) is None:
            raise ModelNotFetched(
                f"model: the weights of {card.name} are not on this server; "
                f"its operator can run `nst-model fetch {card.name}`"
            )
        return card

    def _weights_sha256(self, name: str) -> str:
        if (file := self._settings.weights.get(name)) is not None:
            return _file_sha256(file)
        return published_sha256(cached) if (cached := cached_file(name)) else ""


@functools.cache
def _file_sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _hashes(**files: bytes | None) -> dict[str, str]:
    """Return the SHA-256 of each file that there is."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if data is not None}


def _check_count(field: str, count: int) -> None:
    if count == 0:
        raise InvalidField(field, "must have at least one entry")
    if count > MAX_STYLES:
        raise InvalidField(field, f"must have at most {MAX_STYLES} entries, not {count}")


def _shares(weights: Sequence[float], field: str) -> list[float]:
    total = math.fsum(weights)
    if not total > 0:
        raise InvalidField(field, "must have at least one weight above 0")
    return [weight / total for weight in weights]


def _page(items: Sequence[T], key: Callable[[T], str], page_size: int, page_token: str) -> tuple[list[T], str]:
    """Return the items after those that the token covers, and the token of the next page. `items` are in key order."""
    try:
        token = base64.b64decode(page_token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        token = "malformed"
    if token and not token.startswith(PAGE_TOKEN):
        raise InvalidField("page_token", "is not the next_page_token of a previous response")
    after = token.removeprefix(PAGE_TOKEN)
    rest = [item for item in items if key(item) > after]
    page = rest[:page_size]
    more = len(rest) > len(page)
    return page, base64.urlsafe_b64encode((PAGE_TOKEN + key(page[-1])).encode()).decode() if more else ""
