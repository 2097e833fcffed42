"""The server as a whole: workers, scheduler, application, gRPC front; started and stopped in that order."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import structlog
from filelock import BaseFileLock, FileLock, Timeout
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nst.v1 import (
    image_service_pb2,
    image_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    style_service_pb2,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_server.application import Application
from nst_server.executor import ProcessExecutor
from nst_server.housekeeping import Housekeeper
from nst_server.ledger import Ledger
from nst_server.library import Library
from nst_server.messages import WorkerConfig
from nst_server.services import (
    Admission,
    ImageServicer,
    ModelServicer,
    Streams,
    StyleServicer,
    StyleTransferServicer,
)
from nst_server.settings import Settings
from nst_server.storage.blobs import MEMORY, Blobs
from nst_server.storage.database import JobStore

log = structlog.get_logger()

DESCRIPTORS = (
    style_transfer_service_pb2.DESCRIPTOR.services_by_name["StyleTransferService"],
    style_service_pb2.DESCRIPTOR.services_by_name["StyleService"],
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"],
    image_service_pb2.DESCRIPTOR.services_by_name["ImageService"],
)
SERVICES = tuple(service.full_name for service in DESCRIPTORS)
AFTERMATH_S = 4.0
"""Of the grace at a stop: what is left when the jobs are done with, for their last events to be written and delivered,
for the workers and the storage to be closed, and for the process to end, seconds; at most half of it."""

STREAMS_S = 1.0
"""Of that: how long streams get to deliver their last events at most, seconds."""

LEAST_AFTERMATH_S = 1.0
"""A stop without any grace takes so long if a client or the storage does not answer."""

KEEPALIVE_S = 30
"""A client that says nothing for so long is asked whether it is still there: one whose machine has lost its power or
network says no goodbye."""

MAX_OTHER_CALLS = 1000
"""Calls served at once beside the streams. gRPC itself refuses more, in its own words."""

MAX_PORT = 65_535


class AddressInUse(Exception):
    """The address to listen on cannot be had."""


class DataFolderInUse(Exception):
    """Another server uses the data folder."""


class Server:
    """A server in this process, with its workers beside it. An async context manager.

    Attributes:
        address: where it listens, once started; its port is the real one if 0 was asked for.
        starting: whether `start` is still at work.
        executors: the workers.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.address = settings.listen
        self.starting = True
        self.executors: list[ProcessExecutor] = []
        self._stopped = False
        self._lock: BaseFileLock | None = None
        self._ledger: Ledger | None = None
        self._housekeeping: asyncio.Task[None] | None = None
        self._application: Application | None = None
        self._health = health.aio.HealthServicer()
        self._grpc: grpc.aio.Server | None = None

    @property
    def _blobs(self) -> Path | str:
        settings = self._settings
        return MEMORY if settings.ephemeral else settings.blobs or settings.data_dir / "objects"

    async def _open(self) -> Ledger:
        """Open the database and the blobs, which nobody else may use if they are in the data folder."""
        settings = self._settings
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(settings.data_dir / "lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise DataFolderInUse(f"another nst-server uses the data folder {settings.data_dir}") from error
        store = await JobStore.open(
            MEMORY if settings.ephemeral else settings.database or settings.data_dir / "jobs.sqlite3"
        )
        return Ledger(store, Blobs.open(self._blobs), None if settings.ephemeral else settings.data_dir / "spool")

    async def start(self) -> None:
        """Listen, and start the workers; returns when jobs can be computed.

        Raises AddressInUse, DataFolderInUse, OSError and RequestError for unusable storage, ValueError for a malformed
        URL of it, SchemaNewer for a database of a newer server, ModuleNotFoundError for one whose driver is missing,
        ExecutorUnavailable for a device or feature model that cannot be had.
        """
        settings = self._settings
        self._ledger = await self._open()
        self._application = application = Application(settings, self._ledger)
        keep = timedelta(days=settings.keep_days) if settings.keep_days else None
        keep_bytes = round(settings.keep_gib * 2**30) if settings.keep_gib else None
        housekeeper = Housekeeper(self._ledger, application.delete_job, keep, keep_bytes)
        self._grpc = grpc.aio.server(
            interceptors=[
                Streams(_streaming(), settings.max_streams),
                Admission(application, settings.write_timeout_s),
            ],
            maximum_concurrent_rpcs=settings.max_streams + MAX_OTHER_CALLS,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_mib * 1024 * 1024),
                ("grpc.so_reuseport", 0),
                # gRPC would widen each call's window with the link, and so receive much of what is refused: 256 KiB
                # are 2.5 MB/s at a round trip of 100 ms.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", 256 * 1024),
                ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
                # The question waits behind unread pictures, so its answer may take as long as a write may.
                ("grpc.keepalive_timeout_ms", round(settings.write_timeout_s * 1000)),
                ("grpc.http2.ping_timeout_ms", round(settings.write_timeout_s * 1000)),
            ],
        )
        style_transfer_service_pb2_grpc.add_StyleTransferServiceServicer_to_server(
            StyleTransferServicer(application, settings.write_timeout_s), self._grpc
        )
        style_service_pb2_grpc.add_StyleServiceServicer_to_server(
            StyleServicer(application, settings.write_timeout_s), self._grpc
        )
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(
            ModelServicer(application, settings.write_timeout_s), self._grpc
        )
        max_bytes = settings.max_image_mib * 1024 * 1024
        library = Library(self._ledger, max_bytes, settings.max_megapixels * 1_000_000)
        image_service_pb2_grpc.add_ImageServiceServicer_to_server(
            ImageServicer(library, settings.write_timeout_s), self._grpc
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)
        self.address = self._bind(settings.listen)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await application.take_up()  # before anybody can ask for what is taken up
        await self._grpc.start()
        await self._start_workers()
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)
        self._housekeeping = asyncio.create_task(housekeeper.run(), name="housekeeping")
        self.starting = False
        log.info("serving", address=self.address, devices=[executor.device for executor in self.executors])

    async def stop(self, grace_s: float | None = None) -> None:
        """Take no more jobs, let the running ones go on for a while, tell every stream how its job ended, and stop.

        Whatever does not answer (a worker, a client, the storage), all of that takes no longer than the grace.
        """
        if self._stopped:
            return
        grace_s = self._settings.grace_s if grace_s is None else grace_s
        aftermath_s = max(LEAST_AFTERMATH_S, min(AFTERMATH_S, grace_s / 2))
        end = time.monotonic() + max(grace_s, aftermath_s)
        served = not self.starting  # else whoever called `start` has the one line that matters
        if served:
            log.info("stopping")
        await self._health.enter_graceful_shutdown()
        if self._housekeeping is not None:
            self._housekeeping.cancel()
            await asyncio.wait([self._housekeeping])
        if self._application is not None:
            await self._application.stop(max(0.0, grace_s - aftermath_s))
        streams = [] if self._grpc is None else [self._grpc.stop(min(STREAMS_S, _half_until(end)))]
        await asyncio.gather(*streams, *(executor.close() for executor in self.executors))
        if self._ledger is not None:
            try:
                async with asyncio.timeout(2 * _half_until(end)):
                    await self._ledger.close(_half_until(end))
            except TimeoutError:
                log.error("the storage does not answer; jobs not given up")
        if self._lock is not None:
            self._lock.release()
        self._stopped = True
        if served:
            log.info("stopped")

    async def wait(self) -> None:
        """Wait until the server has been stopped."""
        assert self._grpc is not None
        await self._grpc.wait_for_termination()

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop(0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(0)

    def _bind(self, listen: str) -> str:
        assert self._grpc is not None
        _check_free(listen)
        try:
            port = self._grpc.add_insecure_port(listen)
        except RuntimeError as error:
            raise AddressInUse(f"cannot listen on {listen}: {error}") from error
        return f"{listen.rpartition(':')[0]}:{port}" if port > 1 else listen  # a Unix socket's port is 1

    async def _start_workers(self) -> None:
        names = [name for name in self._settings.devices if name != "auto"]
        if "auto" in self._settings.devices:
            first = await self._start_worker("auto")
            names += [device for device in first.devices if device != first.device]
        await asyncio.gather(*(self._start_worker(name) for name in names))

    async def _start_worker(self, device: str) -> ProcessExecutor:
        settings = self._settings
        executor = ProcessExecutor(
            WorkerConfig(
                device=device,
                threads=settings.threads,
                model=settings.default_model,
                weights=settings.weights,
                grams=settings.data_dir / "grams",
                grams_max_bytes=settings.gram_cache_mib * 1024 * 1024,
                blobs=None if settings.ephemeral else self._blobs,
                checkpoint_interval_s=settings.checkpoint_interval_s,
                memory_bytes=int(settings.memory_gib * 2**30),
            )
        )
        self.executors.append(executor)
        await executor.start()
        assert self._application is not None
        self._application.scheduler.add(executor)
        return executor

    async def _set_health(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        for service in ("", *SERVICES):
            await self._health.set(service, status)


def _streaming() -> list[str]:
    """Return the full names of the contract's methods that stream."""
    return [
        f"/{service.full_name}/{method.name}"
        for service in DESCRIPTORS
        for method in service.methods
        if method.server_streaming
    ]


def _half_until(end: float) -> float:
    """Return half of the seconds until a time of the monotonic clock; something, even if it has passed."""
    return max(0.1, end - time.monotonic()) / 2


def _check_free(listen: str) -> None:
    """Raise AddressInUse if another program listens on one of the addresses that a host name stands for.

    gRPC is content with any of them; then clients that try another first reach the other program.
    """
    if listen.startswith(("unix:", "unix-abstract:", "vsock:")):
        return
    host, _, port = listen.rpartition(":")
    if not (host and port.isdecimal() and int(port) <= MAX_PORT):
        raise AddressInUse(f"cannot listen on {listen}: it is no host:port and no unix:path")
    # "localhost" is both of these to gRPC, whatever the machine's resolver says.
    for name in ("127.0.0.1", "::1") if host == "localhost" else (host.strip("[]"),):
        try:
            for family, kind, _, _, address in socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM):
                with socket.socket(family, kind) as probe:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind(address)
        except socket.gaierror as error:
            raise AddressInUse(f"cannot listen on {listen}: {error}") from error
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"cannot listen on {listen}: another program does") from error
