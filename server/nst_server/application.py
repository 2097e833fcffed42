"""What the server can do, whatever the transport: jobs, styles, models."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import math
import os
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from nst_model import (
    CARDS,
    Init,
    InvalidOption,
    ModelCard,
    StyleCard,
    StyleLoss,
    StylizeOptions,
    UnknownModel,
    model_card,
)
from nst_model.cache import cached_file, published_sha256
from nst_model.export_spec import ExportSpec
from nst_model.memory import largest_size_px, least_memory, peak_bytes
from nst_model.options import bounds_of, plain, relative, steered
from nst_model.scales import scaled_edge, scales
from nst_model.style_card import STYLE_SUFFIX, is_line
from nst_server import images, style_files
from nst_server.errors import InvalidField, JobEnded, ModelNotFetched, Moved, NotFound, RequestError
from nst_server.exports import ExportedFile, ExportOrder, Exports
from nst_server.frames import PreviewSpec
from nst_server.gram_cache import GramCache
from nst_server.images import Encoding, ImageFormat
from nst_server.jobs import Event, Job, JobSnapshot, JobSpec, JobState
from nst_server.ledger import Ledger
from nst_server.messages import ModelExport, PrepareTask, StyleExport, StyleImage, StyleMoments
from nst_server.requests import ImageName, JobRequest, JobStyle, JobUpdate, Source, fingerprint
from nst_server.scheduler import STOPPING, Scheduler
from nst_server.settings import Settings
from nst_server.styles import StoredImage, Style, StyleStore

if TYPE_CHECKING:
    from nst_server.images import Mask, Pixels

log = structlog.get_logger()

MAX_STYLES = 16
MAX_STYLE_IMAGES = 32
MAX_STYLE_SIZE_PX = 4096
MAX_DISPLAY_NAME = 200
GIB = 2**30

TEND_S = 2.0
"""How often a server that shares its database looks after its leases; far less than a lease lasts."""

FLUSH_S = 1.0
"""How long the last events may take to be written at a stop. Those that are not come again from the last checkpoint."""

UPDATE, CANCEL = "update", "cancel"
"""What one server may want of another: a JobUpdate, or an end."""

EVERYBODY = ""
"""Whose the jobs and images are: all callers see all of them."""

STYLE_FILE = images.Kind(0, 0, "application/vnd.safetensors")
"""What is noted of a style file that a job holds, among images."""

NO_PREVIEW = PreviewSpec(0, images.MIN_EDGE_PX, Encoding(ImageFormat.JPEG, 1))

PAGE_TOKEN = "after:"
NO_TOKEN = "is not the next_page_token of a previous response"

T = TypeVar("T")


class Application:
    """The application core. Its methods run on the event loop and raise RequestError for what they refuse."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self._settings = settings
        self._ledger = ledger
        self._alone = not settings.database  # the data folder is locked
        self._tasks: set[asyncio.Task[None]] = set()
        self._jobs: dict[str, Job] = {}  # those that have not ended
        self._accepting: set[asyncio.Task[tuple[Job, bool]]] = set()
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()  # by request_id
        self._obeying: set[str] = set()  # jobs, of which another server wants something
        self._elsewhere: weakref.WeakSet[Job] = weakref.WeakSet()  # other servers' that are watched here
        self.scheduler = Scheduler(settings.queue_size, ledger, self._load)
        self._max_pixels = settings.max_megapixels * 1_000_000
        self.exports = Exports(settings.data_dir / "exports", settings.export_cache_mib * 2**20, settings.threads)
        self._styles = StyleStore(settings.data_dir / "styles")
        self._grams = GramCache(settings.data_dir / "grams")
        self._styles.clean()
        self.exports.clean()
        # A pool of its own: a flood of large pictures must not hold up frames, results and the workers' pipes.
        self._stopped = False
        self._decoding = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")

    def place(self) -> AbstractContextManager[None]:
        """Hold a place in the queue for a request, within the block; to be entered before its images are received.

        Raises QueueFull or Stopping at once, so that a server with no place spends nothing on a request.
        """
        return self.scheduler.place()

    async def take_up(self) -> None:
        """Queue what servers that are gone have left undone, and go on doing so where there may be others."""
        await self._claim(alone=self._alone)
        if not self._alone:
            self._begin(self._tend())

    async def stop(self, grace_s: float) -> None:
        """Take no more jobs, keep what those that run have done, and end every stream; see `Scheduler.stop`."""
        for job in list(self._jobs.values()):
            if job.state is not JobState.RUNNING:  # nothing will happen to it here any more
                job.lost(STOPPING)
        await self.exports.close()
        await self.scheduler.stop(grace_s)
        with contextlib.suppress(TimeoutError):  # a store that takes nothing must not hold up the end
            async with asyncio.timeout(FLUSH_S):
                await self._ledger.journal.flush()
        for task in self._tasks:
            task.cancel()
        for job in (*self._jobs.values(), *self._elsewhere):
            job.lost(STOPPING)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._stopped = True
        self._decoding.shutdown(wait=False, cancel_futures=True)

    async def create_job(
        self, request: JobRequest, caller: str = "", *, owned: bool = False, placed: bool = True
    ) -> tuple[Job, bool]:
        """Check a request and queue its job; return it and True.

        If the request made a job before, return that one and False: only a new one needs a place, which the call holds
        if it is `placed`.
        The jobs that wait of each `caller` take turns with those of others.
        Who is cancelled while the job is being stored leaves it to go on, or, if it is `owned`, to be cancelled.
        Raises RequestError, having started nothing.
        """
        request = await (await self._decode(self._with_stored_styles, request)).resolved(self._file)
        described, files = request.stored()
        sha256 = fingerprint(described)
        create = functools.partial(self._create, request, described, files, sha256, caller, owned=owned)
        place = contextlib.nullcontext() if placed else self.place()
        if not request.request_id:
            with place:
                return await create()
        async with self._asking.setdefault(request.request_id, asyncio.Lock()):  # it may be on its way already
            if there := await self._ledger.find(EVERYBODY, request.request_id, sha256):
                return await self._known(there), False
            with place:
                return await create()

    async def _create(
        self,
        request: JobRequest,
        described: dict[str, Any],
        files: Mapping[str, bytes],
        sha256: str,
        caller: str,
        *,
        owned: bool,
    ) -> tuple[Job, bool]:
        spec = await self._decode(self._checked, request)
        snapshot = JobSnapshot.queued(spec, request.request_id, self.scheduler.next_position(caller))
        await self._keep(files, described)
        if self.scheduler.stopping:
            raise STOPPING
        job = Job(snapshot, self._ledger, spec, caller=caller)
        stored = described | {"machine": caller}  # to take turns after a restart, too
        self._accepting.add(accepting := asyncio.create_task(self._accept(job, stored, sha256, files)))
        accepting.add_done_callback(self._accepting.discard)
        try:
            job, new = await asyncio.shield(accepting)
            return await self._known(job), new
        except asyncio.CancelledError:  # what is being written will be there nevertheless
            accepting.add_done_callback(functools.partial(self._left, owned=owned))
            raise

    async def _keep(self, files: Mapping[str, bytes], request: Mapping[str, Any]) -> None:
        """Keep the files of a request as it is stored, by SHA-256: images, and files of imported styles."""
        style_files = {style.get("moments") for style in request["styles"]}
        for sha256, data in files.items():
            kind = STYLE_FILE if sha256 in style_files else await self._decode(images.kind_of, data)
            await self._ledger.keep_image(data, kind.width, kind.height, kind.media_type, sha256=sha256)

    async def _accept(
        self, job: Job, request: dict[str, Any], sha256: str, files: Mapping[str, bytes]
    ) -> tuple[Job, bool]:
        """Store a new job and queue it; return it, or the one that is there for its `request_id` and False."""
        while True:
            try:
                record, new = await self._ledger.create(job.now, request, sha256, list(files), EVERYBODY)
                break
            except NotFound:  # a job that was deleted took one of its images along
                await self._keep(files, request)
        if not new:
            return self._ledger.job(record), False
        if self.scheduler.stopping:  # the next server has it
            job.lost(STOPPING)
        else:
            self._hold(job)
            self.scheduler.submit(job)
        return job, True

    def _left(self, accepting: asyncio.Task[tuple[Job, bool]], *, owned: bool) -> None:
        """Note that the caller of a job left before it was stored."""
        if not accepting.cancelled() and accepting.exception() is None and owned:
            job, new = accepting.result()
            if new:
                self.cancel(job)

    async def get_job(self, name: str) -> Job:
        """Return a job. Raises NotFound."""
        name = f"jobs/{name.removeprefix('jobs/')}"
        return self._jobs.get(name) or await self._known(await self._ledger.get(name))

    async def list_jobs(self, states: Sequence[JobState], page_size: int, page_token: str) -> tuple[list[Job], str]:
        """Return a page of the jobs, the newest first, and the token of the next. Raises InvalidField."""
        jobs = await self._ledger.page(EVERYBODY, states, page_size + 1, _job_token(page_token))
        more = jobs[page_size:]
        page = [self._jobs.get(job.name, job) for job in jobs[:page_size]]
        return page, _token(f"{page[-1].now.create_time.isoformat()} {page[-1].name}") if more else ""

    async def update_job(self, name: str, update: JobUpdate) -> Job:
        """Change a job, and return when that is so, and durable: a worker obeys after the evaluation that it is at.

        Raises NotFound, JobEnded, InvalidField, QueueFull, Stopping.
        """
        job = await self.get_job(name)
        job.check()
        if job.state.terminal:
            raise JobEnded(f"{job.name} is {job.state} and changes no more")
        options = self.scheduler.options(job)
        if update.changes:
            try:
                options = steered(options, update.changes)
                options.check_layers(model_card(job.now.model).architecture.layers)
            except InvalidOption as error:
                raise InvalidField(f"options.{error.field}", error.reason) from error
        if "style_layers" in update.changes:
            await self._check_style_files(job, options)
        if job.elsewhere:
            await self._ledger.command(job, {UPDATE: dataclasses.asdict(update)})
            return await self.get_job(name)
        done = []
        if update.finish:  # first what may be refused
            done.append(self.scheduler.finish(job))
        elif update.paused is False:
            self.scheduler.resume(job)
        if update.changes:
            done.append(self.scheduler.steer(job, options, update.changes))
        if update.paused and not update.finish:
            done.append(self.scheduler.pause(job))
        for wait in done:
            if wait is not None:
                await asyncio.shield(wait)
        await self._ledger.journal.durable(self._ledger.journal.flush())
        job.check()
        return job

    async def _check_style_files(self, job: Job, options: StylizeOptions) -> None:
        """Raise InvalidField unless the imported styles of a job have every layer of some options."""
        for style in (await self._ledger.request(job)).styles:
            if isinstance(style.moments, ImageName):
                data = await self._file(style.moments, "name")
                card = await self._decode(style_files.read_card, data, "name")
                _check_serves(card, options, job.now.model)

    async def cancel_job(self, name: str) -> Job:
        """End a job, if it has not ended yet, and return it. Raises NotFound."""
        job = await self.get_job(name)
        if job.elsewhere and not job.state.terminal:
            await self._ledger.command(job, {CANCEL: True})
            async with contextlib.aclosing(job.watch(NO_PREVIEW, job.snapshot().sequence)) as events:
                async for _ in events:
                    continue
            return await self.get_job(name)
        job.check()
        self.scheduler.cancel(job)
        await self._ledger.journal.durable(job.ended())
        job.check()
        return job

    async def delete_job(self, name: str) -> int:
        """Delete a job, ending it first; return how many bytes that made free. Raises NotFound."""
        job = await self.get_job(name)
        if job.elsewhere:
            await self.cancel_job(name)
        else:
            job.check()
            self.scheduler.cancel(job)
            await self._ledger.over(job)
        freed = await self._ledger.delete(job.name)
        if not job.snapshot().state.terminal:
            job.lost(NotFound("name", f"{job.name} has been deleted"))
        return freed

    def watch(self, job: Job, preview: PreviewSpec, after: int = 0) -> AsyncGenerator[Event]:
        """Return what happens to a job after an event; see `Job.watch`."""
        if job.elsewhere:
            self._elsewhere.add(job)
        elif preview.every_frame and preview.interval:
            self.scheduler.every_frame(job)
        return job.watch(preview, after)

    def cancel(self, job: Job) -> None:
        """End a job that nobody wants any more; does nothing if it has ended."""
        if not job.elsewhere:
            self.scheduler.cancel(job)
        elif not job.state.terminal:
            self._begin(self._cancel_elsewhere(job))

    async def _cancel_elsewhere(self, job: Job) -> None:
        try:
            await self._ledger.command(job, {CANCEL: True})
        except RequestError as error:
            log.info("job not cancelled", job=job.name, error=str(error))

    async def _known(self, job: Job) -> Job:
        """Return a stored job as this server has it; the archive tells of one that it does not have."""
        if self._accepting:  # it may be one of them, stored and not yet queued
            await asyncio.wait(self._accepting)
        job.elsewhere = job.name not in self._jobs
        return self._jobs.get(job.name, job)

    def _hold(self, job: Job) -> None:
        """Answer for a job until it has ended, or another server has it."""

        async def forget() -> None:
            await job.ended()
            if job.gone:
                self.scheduler.drop(job)
            if not self.scheduler.stopping:  # else it is this server's to the end, which refuses what is wanted of it
                del self._jobs[job.name]

        self._jobs[job.name] = job
        self._begin(forget())

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)

    async def _claim(self, *, alone: bool) -> None:
        for job, command in await self._ledger.claim(alone=alone):
            log.info("job taken up", job=job.name, state=job.state, sequence=job.now.sequence)
            self._hold(job)
            if job.state is JobState.RUNNING:
                job.queued()
            if job.state is JobState.QUEUED:
                self.scheduler.submit(job)
            if command is not None:
                self._begin(self._obey(job.name, command))

    async def _tend(self) -> None:
        """Prolong leases, do what callers of other servers want, and take up what those servers leave behind."""
        while True:
            await asyncio.sleep(TEND_S)
            try:
                here = list(self._jobs.values())
                held = await self._ledger.renew()
                for job in here:
                    if job.name not in held and not job.state.terminal:
                        job.lost(Moved(f"{job.name} has been taken over by another server"))
                for name, command in held.items():
                    if command is not None:
                        self._begin(self._obey(name, command))
                await self._claim(alone=False)
            except RequestError as error:
                log.error("leases not renewed", error=str(error))
            except Exception:  # without leases everything here would be another server's soon
                log.exception("leases not renewed")

    async def _obey(self, name: str, command: Mapping[str, Any]) -> None:
        """Carry out a command and note that; one that must wait is found again by the next renewal, or a successor."""
        if name in self._obeying or (job := self._jobs.get(name)) is None:
            return
        self._obeying.add(name)
        try:
            if CANCEL in command:
                await self.cancel_job(name)
            else:
                await self.update_job(name, JobUpdate(**command[UPDATE]))
            await self._ledger.obeyed(job)
        except (InvalidField, JobEnded) as error:  # it was checked when it was given, and the job has moved on since
            log.info("command came too late", job=name, error=str(error))
            await self._ledger.obeyed(job)
        except RequestError as error:
            log.info("command must wait", job=name, error=str(error))
        finally:
            self._obeying.discard(name)

    async def _load(self, job: Job) -> None:
        """Make the spec of a job out of its stored request."""
        request = await (await self._ledger.request(job)).resolved(self._file)
        job.spec = await self._decode(self._spec, request)

    async def _file(self, source: ImageName, field: str) -> bytes:
        """Return the file of an image on this server. Raises NotFound."""
        return await self._ledger.image_file(source.name, f"{field}.name")

    async def create_style(self, style_id: str, display_name: str, sources: Sequence[tuple[Source, float]]) -> Style:
        """Store a style; its Gram matrices for the defaults are computed when a device is idle."""
        files = [
            (
                await self._file(source, f"style.images[{index}].image") if isinstance(source, ImageName) else source,
                weight,
            )
            for index, (source, weight) in enumerate(sources)
        ]
        style, pictures = await self._decode(self._create_style, style_id, display_name, files)
        for picture in pictures:
            self.scheduler.prepare(PrepareTask(style.name, self._settings.default_model, (picture,), StylizeOptions()))
        return style

    async def import_style(self, style_id: str, display_name: str, data: bytes) -> Style:
        """Store the style in a style file, for ever as it is. Raises InvalidField, AlreadyExists, StorageFull."""
        return await self._decode(self._import_style, style_id, display_name, data)

    async def export_style(
        self, name: str, model: str, options: StylizeOptions | None
    ) -> AsyncGenerator[ExportedFile | None]:
        """Return what yields a style file for jobs with some options, None for the defaults; see `Exports.made`.

        Of an imported style it is the file that it came in. Raises NotFound, InvalidField, ModelNotFetched.
        """
        style = await self.get_style(name)
        file_name = f"{style.id}{STYLE_SUFFIX}"
        if style.file is not None:
            path = await self._decode(self._imported_file, style, model, options)
            return self.exports.kept(path, file_name, style.file.sha256)
        task, depends_on = await self._decode(self._style_export, style, model, options or StylizeOptions())
        return self.exports.made(ExportOrder(task, file_name, depends_on))

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
        if (file := style.file) is not None:
            return {(file.model, size_px): list(file.layers) for size_px in file.sizes_px}
        kept = [self._grams.prepared(image.sha256) for image in style.images]
        common = functools.reduce(lambda left, right: left & right, (set(image) for image in kept))
        found = {}
        for model, size_px in common:
            layers = set.intersection(*(image[model, size_px] for image in kept))
            order = CARDS[model].architecture.layers if model in CARDS else ()
            if listed := [layer for layer in order if layer in layers]:
                found[model, size_px] = listed
        return found

    async def export_model(self, spec: ExportSpec) -> AsyncGenerator[ExportedFile | None]:
        """Return what yields a file of a feature model; see `Exports.made`. Raises ModelNotFetched."""
        await self._decode(self._usable_model, spec.model)
        sha256 = await self._decode(self._weights_sha256, spec.model)
        depends_on = {"spec": dataclasses.asdict(spec), "weights": sha256}
        task = ModelExport(spec, self._settings.weights.get(spec.model))
        return self.exports.made(ExportOrder(task, spec.file_name, depends_on))

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
        if self._stopped:
            raise STOPPING
        return await asyncio.get_running_loop().run_in_executor(self._decoding, work, *arguments)

    def _checked(self, request: JobRequest) -> JobSpec:
        """Return what a new request asks for, if it is within this server's limits."""
        card = self._usable_model(request.model)
        options = request.options
        self._check_size(options)
        spec = self._spec(request)
        height, width = spec.content.shape[:2]
        self._check_memory(options, height, width, card)
        return spec

    def _spec(self, request: JobRequest) -> JobSpec:
        """Return what a request asks for. One that was accepted before is not held to the limits of today."""
        card = self._usable_model(request.model)
        options = request.options
        _check_layers(options, card)
        picture = images.decode_with_alpha(_resolved(request.content), "content.data", self._max_pixels)
        content, alpha = images.fit_with_alpha(picture, options.size_px, "content.data")
        height, width = content.shape[:2]
        styles, described = self._job_styles(request.styles, options, (width, height), card)
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

    def _check_size(self, options: StylizeOptions) -> None:
        if options.size_px > self._settings.max_size_px:
            raise InvalidField(
                "options.size_px",
                f"must be at most {self._settings.max_size_px} px on this server, not {options.size_px}",
            )

    def _check_memory(self, options: StylizeOptions, height: int, width: int, card: ModelCard) -> None:
        """Refuse a job that cannot fit, rather than let it fail after it has waited."""
        limit = self._settings.memory_gib * GIB or self.scheduler.memory_bytes()
        needed = peak_bytes(options, height, width, card.architecture, least_memory(options))
        if limit and needed > limit:
            fitting = largest_size_px(options, height, width, card.architecture, limit)
            fits = f"at most {fitting} px fit" if fitting >= (bounds_of("size_px").minimum or 0) else "no size fits"
            raise InvalidField(
                "options.size_px",
                f"{options.size_px} px would take about {needed / GIB:.3g} GiB of memory, of which a job may take "
                f"{limit / GIB:.3g} GiB here: with these options {fits}",
            )

    def _parameters(self, model: str, request: JobRequest, styles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return what a result's file says of its request, ready for JSON; see the contract's Encoding."""
        return {
            "nst": importlib.metadata.version("nst-service"),
            "model": model,
            "model_sha256": self._weights_sha256(model),
            "options": plain(request.options),
            "content_sha256": hashlib.sha256(_resolved(request.content)).hexdigest(),
            "styles": styles,
            **_hashes(init_image_sha256=request.init_image or None),
        }

    def _start(self, request: JobRequest, size: tuple[int, int]) -> Pixels | None:
        if request.options.init is not Init.IMAGE:
            return None
        picture = images.decode_with_alpha(_resolved(request.init_image), "init_image.data", self._max_pixels)
        return images.stretch(picture, size)

    def _mask(self, source: Source | None, size: tuple[int, int], field: str) -> Mask | None:
        if source is None:
            return None
        return images.mask(images.decode(_resolved(source), f"{field}.data", self._max_pixels), size, f"{field}.data")

    def _job_styles(
        self, styles: Sequence[JobStyle], options: StylizeOptions, size: tuple[int, int], model: ModelCard
    ) -> tuple[tuple[StyleImage | StyleMoments, ...], list[dict[str, Any]]]:
        """Return the images of a request's styles, and for each style what the result's file says of it."""
        size_px = _style_size_px(options)
        _check_count("styles", len(styles))
        found: list[StyleImage | StyleMoments] = []
        described: list[dict[str, Any]] = []
        shares = _shares([style.weight for style in styles], "styles")
        for index, (style, share) in enumerate(zip(styles, shares, strict=True)):
            field = f"styles[{index}]"
            files, recorded = self._style_files(style, share, field)
            described.append(recorded)
            region = self._mask(style.region, size, f"{field}.region")
            if style.moments is not None:
                if style.style_region is not None:
                    raise InvalidField(f"{field}.style_region", "needs the style's image; an imported style has none")
                file = _resolved(style.moments)
                self._check_moments(file, options, size, model, f"{field}.style")
                if share > 0 or region is not None:
                    found.append(StyleMoments(file, size_px, share, region))
                continue
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

    def _check_moments(
        self, data: bytes, options: StylizeOptions, size: tuple[int, int], model: ModelCard, field: str
    ) -> None:
        """Raise InvalidField unless a style file can serve a job whose picture has a width and height."""
        card = style_files.read_card(data, field)
        sizes_px = _style_sizes_px(options, size)
        _check_serves(card, options, model.name, self._weights_sha256(model.name), sizes_px)

    def _with_stored_styles(self, request: JobRequest) -> JobRequest:
        """Return a request with the files of the stored styles that it names, and with its model's id.

        So a request that is sent again is the same, whichever way it names them.
        """
        return dataclasses.replace(
            request,
            styles=[self._with_files(style, f"styles[{n}].style") for n, style in enumerate(request.styles)],
            model=self._model(request.model).name,
        )

    def _with_files(self, style: JobStyle, field: str) -> JobStyle:
        if not style.name or style.files or style.moments is not None:
            return style
        stored = self._styles.get(style.name, field)
        files = self._styles.files(stored, field)
        if stored.file is not None:
            return dataclasses.replace(style, name=stored.name, moments=files[0])
        weighted = tuple((data, image.weight) for data, image in zip(files, stored.images, strict=True))
        return dataclasses.replace(style, name=stored.name, files=weighted)

    def _style_files(
        self, style: JobStyle, share: float, field: str
    ) -> tuple[list[tuple[bytes, float, str]], dict[str, Any]]:
        """Return a style's image files, each with its share and its field, and what the result's file says of them."""
        name = {"name": style.name} if style.name else {}
        masks = _hashes(region_sha256=style.region, style_region_sha256=style.style_region)
        if style.moments is not None:
            return [], {"sha256": list(_hashes(file=style.moments).values()), "weight": style.weight, **name, **masks}
        place = f"{field}.style" if style.name else f"{field}.image.data"
        inner = _shares([weight for _, weight in style.files], place)
        files = [(_resolved(source), share * part, place) for (source, _), part in zip(style.files, inner, strict=True)]
        sha256 = [hashlib.sha256(data).hexdigest() for data, _, _ in files]
        return files, {"sha256": sha256, "weight": style.weight, **name, **masks}

    def _style_image(self, data: bytes, weight: float, size_px: int, field: str) -> StyleImage:
        picture = images.decode(data, field, self._max_pixels)
        return StyleImage(images.fit(picture, size_px, field), hashlib.sha256(data).hexdigest(), size_px, weight)

    def _create_style(
        self, style_id: str, display_name: str, files: Sequence[tuple[bytes, float]]
    ) -> tuple[Style, list[StyleImage]]:
        _check_count("style.images", len(files))
        _check_display_name(display_name, "style.display_name")
        _shares([weight for _, weight in files], "style.images")  # refuses what cannot be mixed
        stored, prepared = [], []
        for index, (data, weight) in enumerate(files):
            field = f"style.images[{index}].image.data"
            picture = images.decode(data, field, self._max_pixels)
            sha256 = hashlib.sha256(data).hexdigest()
            stored.append(StoredImage(sha256, weight, *picture.size))
            size_px = StylizeOptions().size_px
            prepared.append(StyleImage(images.fit(picture, size_px, field), sha256, size_px, 1.0))
        style = Style(style_id, display_name, tuple(stored), datetime.now(UTC))
        return self._styles.create(style, [data for data, _ in files]), prepared

    def _import_style(self, style_id: str, display_name: str, data: bytes) -> Style:
        _check_display_name(display_name, "display_name")
        file, own_name = style_files.read_file(data, "data")
        style = Style(style_id, display_name or own_name[:MAX_DISPLAY_NAME], (), datetime.now(UTC), file)
        return self._styles.create(style, [data])

    def _imported_file(self, style: Style, model: str, options: StylizeOptions | None) -> Path:
        """Return where the file of an imported style is. Raises InvalidField unless it serves what is named."""
        (data,) = self._styles.files(style)
        card = style_files.read_card(data, "name")
        if model.removeprefix("models/") not in ("", card.model):
            raise InvalidField("model", f"must be {card.model}, for which the style was imported, not {model}")
        if options is not None:
            _check_serves(card, options, card.model, None, _style_sizes_px(options, (options.size_px, options.size_px)))
        return self._styles.paths(style)[0]

    def _style_export(self, style: Style, model: str, options: StylizeOptions) -> tuple[StyleExport, dict[str, Any]]:
        """Return how the file of a style is made, and all that it depends on."""
        card = self._usable_model(model)
        self._check_size(options)
        _check_layers(options, card)
        size_px = _style_size_px(options)
        shares = _shares([image.weight for image in style.images], "name")
        files = zip(self._styles.files(style), shares, strict=True)
        pictures = tuple(self._style_image(data, share, size_px, "name") for data, share in files if share > 0)
        task = StyleExport(card.name, self._settings.weights.get(card.name), pictures, options, style.display_name)
        return task, {
            "style": [(image.sha256, image.weight) for image in pictures],
            "display_name": style.display_name,
            "model": card.name,
            "weights": self._weights_sha256(card.name),
            "sizes_px": [options.size_px, options.first_size_px, size_px],
            "layers": sorted(relative(options.style_layers)),
            "network": [options.pooling, options.padding],
        }

    def _model(self, name: str) -> ModelCard:
        try:
            return model_card(name.removeprefix("models/") or self._settings.default_model)
        except UnknownModel as error:
            raise NotFound("model", str(error)) from error

    def _usable_model(self, name: str) -> ModelCard:
        card = self._model(name)
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


def _resolved(source: Source) -> bytes:
    assert isinstance(source, bytes), "resolved before"
    return source


def _hashes(**files: Source | None) -> dict[str, str]:
    """Return the SHA-256 of each file that there is."""
    return {name: hashlib.sha256(_resolved(data)).hexdigest() for name, data in files.items() if data is not None}


def _check_layers(options: StylizeOptions, card: ModelCard) -> None:
    try:
        options.check_layers(card.architecture.layers)
    except InvalidOption as error:
        raise InvalidField(f"options.{error.field}", error.reason) from error


def _check_serves(
    card: StyleCard,
    options: StylizeOptions,
    model: str,
    weights_sha256: str | None = None,
    sizes_px: Sequence[int] = (),
) -> None:
    """Raise InvalidField unless a style file can serve a job; see `StyleCard.check`."""
    try:
        card.check(options, model=model, weights_sha256=weights_sha256, sizes_px=sizes_px)
    except InvalidOption as error:
        raise InvalidField("model" if error.field == "model" else f"options.{error.field}", error.reason) from error


def _check_display_name(text: str, field: str) -> None:
    if len(text) > MAX_DISPLAY_NAME:
        raise InvalidField(field, f"must have at most {MAX_DISPLAY_NAME} characters, not {len(text)}")
    if not is_line(text):
        raise InvalidField(field, f"must be one line of text, not {text!r}")


def _style_size_px(options: StylizeOptions) -> int:
    """Return the longer edge that a style image has beside the finished picture. Raises InvalidField."""
    size_px = max(images.MIN_EDGE_PX, round(options.size_px * options.style_scale))
    if size_px > MAX_STYLE_SIZE_PX:
        raise InvalidField(
            "options.style_scale",
            f"would make the styles {size_px} px large; at most {MAX_STYLE_SIZE_PX} px are allowed",
        )
    return size_px


def _style_sizes_px(options: StylizeOptions, size: tuple[int, int]) -> list[int]:
    """Return the longer edge that a style image has at each scale of a job whose picture has a width and height."""
    edges = scales(max(size), min(size), options.first_size_px)
    return [scaled_edge(_style_size_px(options), edge / edges[-1]) for edge in edges]


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
    after = _after(page_token)
    rest = [item for item in items if key(item) > after]
    page = rest[:page_size]
    more = len(rest) > len(page)
    return page, _token(key(page[-1])) if more else ""


def _token(last: str) -> str:
    """Return the token of the page after an item."""
    return base64.urlsafe_b64encode((PAGE_TOKEN + last).encode()).decode()


def _after(page_token: str) -> str:
    """Return the item that a token stands for, an empty string for none. Raises InvalidField."""
    try:
        token = base64.b64decode(page_token.encode(), altchars=b"-_", validate=True).decode()
    except (binascii.Error, UnicodeError):
        token = "malformed"
    if token and not token.startswith(PAGE_TOKEN):
        raise InvalidField("page_token", NO_TOKEN)
    return token.removeprefix(PAGE_TOKEN)


def _job_token(page_token: str) -> tuple[datetime, str] | None:
    """Return the time and id of the job that a token stands for, None for none. Raises InvalidField."""
    if not (last := _after(page_token)):
        return None
    time, _, name = last.partition(" ")
    try:
        there = datetime.fromisoformat(time)
        if there.tzinfo is None:
            raise ValueError("without a zone")
        if "\0" in name:  # PostgreSQL takes no such text
            raise ValueError("no id")
        return there.astimezone(UTC), name.removeprefix("jobs/")
    except (ValueError, OverflowError) as error:
        raise InvalidField("page_token", NO_TOKEN) from error
