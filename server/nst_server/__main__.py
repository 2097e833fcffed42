"""`nst-server`: run the server until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from typing import Any

import structlog
from pydantic import ValidationError
from pydantic_settings import SettingsError

from nst_server.errors import RequestError
from nst_server.executor import ExecutorUnavailable
from nst_server.server import AddressInUse, DataFolderInUse, Server
from nst_server.settings import Settings, load_settings
from nst_server.storage.faults import SchemaNewer


def main() -> None:
    """Run the server; what an operator can mend is one line, exit code 2 for settings and 1 for the rest."""
    try:
        settings = load_settings(sys.argv[1:])
    except ValidationError as error:
        for problem in error.errors():
            reason = problem["msg"].removeprefix("Value error, ")
            where = "".join(f"{part}: " for part in problem["loc"])
            given = problem["input"] if problem["loc"] and isinstance(problem["input"], str | int | float) else None
            print(f"nst-server: {where}{reason}{'' if given is None else f', not {given!r}'}", file=sys.stderr)
        sys.exit(2)
    except (SettingsError, FileNotFoundError) as error:
        print(f"nst-server: {error}", file=sys.stderr)
        sys.exit(2)
    configure_log(settings.log_format)
    try:
        asyncio.run(serve(settings))
    except (
        AddressInUse,
        DataFolderInUse,
        ExecutorUnavailable,
        ModuleNotFoundError,
        OSError,
        RequestError,
        SchemaNewer,
    ) as error:
        print(f"nst-server: {error}", file=sys.stderr)
        sys.exit(1)


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then stop gracefully; a second signal stops at once."""
    stopping = asyncio.Event()
    server = Server(settings)
    running = asyncio.create_task(_run(server, stopping))
    signals = 0

    def on_signal() -> None:
        nonlocal signals
        signals += 1
        stopping.set()
        # Once only: what it cancels is the wait, and the stop that follows must not be broken off too.
        if signals == (1 if server.starting else 2):
            running.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    with contextlib.suppress(asyncio.CancelledError):
        await running


async def _run(server: Server, stopping: asyncio.Event) -> None:
    try:
        await server.start()
        await stopping.wait()
        await server.stop()
    except BaseException:
        await server.stop(0)
        raise


def configure_log(log_format: str) -> None:
    """Send the log to standard error. Local variables are left out: pictures and passwords are among them."""
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    match log_format:
        case "json":
            dictionaries = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
            processors += [structlog.processors.ExceptionRenderer(dictionaries), structlog.processors.JSONRenderer()]
        case _:
            plain = structlog.dev.plain_traceback
            processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain))
    structlog.configure(processors=processors, logger_factory=structlog.PrintLoggerFactory(sys.stderr))


if __name__ == "__main__":
    main()
