"""The gRPC process: convert, delegate, convert. The numerics run in worker processes."""

from nst_server.server import Server
from nst_server.settings import Settings

__all__ = ["Server", "Settings"]
