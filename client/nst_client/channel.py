"""How both clients connect."""

from __future__ import annotations

from typing import Any

from nst.v1 import (
    image_service_pb2_grpc,
    model_service_pb2_grpc,
    style_service_pb2_grpc,
    style_transfer_service_pb2_grpc,
)
from nst_client.errors import InvalidArgumentError

DEFAULT_ADDRESS = "localhost:50051"
DEFAULT_PORT = 50051

CONNECT_TIMEOUT_MS = 5_000
"""How long one attempt to connect may take, and the longest pause between two attempts."""

PATIENCE_S = 60.0
"""How long a client goes on trying when the connection broke, unless its caller says otherwise."""

CANCEL_TIMEOUT_S = 5.0
"""How long whoever leaves waits for the server to hear that a job is not wanted any more."""

KEEPALIVE_MS = 45_000
"""When nothing has come for this long the server is asked whether it is still there. gRPC's servers hang up on clients
that ask often while nothing else is said for minutes; but a stream has a heartbeat, and other calls end earlier."""

PING_TIMEOUT_MS = 30_000
"""How long the answer may take; the question waits behind images that are being sent."""

LOOPBACK = ("localhost", "127.", "[::1]")


def checked_address(address: str) -> str:
    """Return the address with its port: 50051 unless it names another. Raises InvalidArgumentError for a URL."""
    if not address or "://" in address:
        raise InvalidArgumentError(
            f"the server's address must be host:port, {DEFAULT_ADDRESS} for instance, not {address!r}", field="address"
        )
    has_port = ":" in address.rpartition("]")[2]
    return address if has_port else f"{address}:{DEFAULT_PORT}"


def channel_options(address: str) -> list[tuple[str, int | str]]:
    """Return gRPC's settings for a channel. The receive limit is left at gRPC's default, 4 MiB, on purpose."""
    import importlib.metadata  # noqa: PLC0415 - a tenth of what importing this package costs

    version = importlib.metadata.version("nst-service")
    return [
        ("grpc.primary_user_agent", f"nst-client/{version}"),
        # gRPC's name for it misleads: it bounds the time of one attempt to connect as well.
        ("grpc.min_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.initial_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", CONNECT_TIMEOUT_MS),
        ("grpc.dns_ares_query_timeout", CONNECT_TIMEOUT_MS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        # The question may ride on one that gRPC has asked for its own reasons, which has its own time limit.
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
        # gRPC would stop after two: a client that reads a stream sends nothing else.
        ("grpc.http2.max_pings_without_data", 0),
        # A new client tries at once, even if another in this process has just failed at the same address.
        ("grpc.use_local_subchannel_pool", 1),
        # gRPC sends even loopback connections through `http_proxy`.
        ("grpc.enable_http_proxy", int(not address.startswith(LOOPBACK))),
    ]


class Stubs:
    """The contract's methods on one channel, sync or async."""

    def __init__(self, channel: Any) -> None:
        self._services: tuple[Any, ...] = (
            style_transfer_service_pb2_grpc.StyleTransferServiceStub(channel),
            image_service_pb2_grpc.ImageServiceStub(channel),
            style_service_pb2_grpc.StyleServiceStub(channel),
            model_service_pb2_grpc.ModelServiceStub(channel),
        )

    def method(self, name: str) -> Any:
        """Return the method of that name, of whichever service: no two have the same."""
        return next(getattr(service, name) for service in self._services if hasattr(service, name))
