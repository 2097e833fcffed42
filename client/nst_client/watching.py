"""A job before the eyes of whoever runs the command line: its events shown, its picture written, Ctrl-C asked about."""

from __future__ import annotations

import itertools
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from nst_client.animation import FrameSampler, write_animation
from nst_client.channel import CANCEL_TIMEOUT_S, DEFAULT_ADDRESS
from nst_client.client import Client, Stylization
from nst_client.display import Display, duration_text
from nst_client.errors import InvalidArgumentError, JobEndedError, NstError, UnavailableError
from nst_client.events import Event, Frame, Result
from nst_client.files import write_all, write_whole
from nst_client.images import ImageFormat, Picture, format_of_path
from nst_client.resources import ExportedFile, Job, JobResult
from nst_client.stream import RECENT_JOBS

STDIO = "-"


class Interrupted(Exception):
    """Whoever watched does not any more. Its text says what has become of the job."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C, but there is nobody to be asked."""


class Answer(Enum):
    """What is to become of a job when its watcher presses Ctrl-C."""

    CANCEL = "c"
    LEAVE = "l"
    GO_ON = "g"


@dataclass(frozen=True)
class Watcher:
    """How a job is watched."""

    client: Client
    display: Display
    owns_job: bool
    """Whether the job is to end when nobody can be asked, or something here fails."""
    see: Callable[[Event], None] = field(default=lambda _: None)
    """Is shown every event, too."""

    def result(self, job: Job, stream: Stylization) -> Result:
        """Show a job to its end and return the picture.

        Raises Interrupted, and what `Stylization.result` raises.
        """
        try:
            while True:
                try:
                    return self._watched(stream)
                except KeyboardInterrupt as interrupt:
                    self.display.stop()
                    self._settle(job, self._asked(job, interrupt))
                    self.display.start()
        except (Interrupted, UnavailableError, JobEndedError):
            raise
        except BaseException:
            # Time is up, the disk is full, the reader of our output has gone …
            if self.owns_job:
                with suppress(NstError):
                    self._cancel(job)
            raise

    def _watched(self, stream: Stylization) -> Result:
        for event in stream:
            self.display.show(event)
            self.see(event)
        return stream.result()

    def _asked(self, job: Job, interrupt: KeyboardInterrupt) -> Answer:
        unasked = Answer.CANCEL if self.owns_job else Answer.LEAVE
        if isinstance(interrupt, Terminated) or not (sys.stdin.isatty() and sys.stderr.isatty()):
            return unasked
        try:
            return asked(job)
        except KeyboardInterrupt:
            say("")
            return unasked

    def _settle(self, job: Job, answer: Answer) -> None:
        """Do what was answered. Raises Interrupted, but for going on."""
        match answer:
            case Answer.GO_ON:
                return
            case Answer.LEAVE:
                command = command_for("watch", job, self.client.address)
                raise Interrupted(f"{job.name} goes on; `{command} -o OUT` takes it up again")
        try:
            ended = self._cancel(job)
        except NstError as error:
            command = command_for("cancel", job, self.client.address)
            raise Interrupted(f"{job.name} could not be cancelled, `{command}` does it later: {error}") from None
        raise Interrupted(f"{job.name} is {ended.state}")

    def _cancel(self, job: Job) -> Job:
        # Whoever leaves does not wait until a server comes back.
        with Client(self.client.address, timeout_s=CANCEL_TIMEOUT_S, patience_s=0) as client:
            return client.cancel_job(job)


def cancel_request(client: Client, request_id: str) -> None:
    """Cancel the job that a request may have made whose answer nobody waited for."""
    with suppress(NstError):
        for job in itertools.islice(client.list_jobs(), RECENT_JOBS):
            if job.request_id == request_id:
                client.cancel_job(job)


def asked(job: Job) -> Answer:
    """Ask in the terminal what is to become of the job."""
    while True:
        sys.stderr.write(f"{job.name}: [c]ancel it, [l]eave it running, or [g]o on watching? ")
        sys.stderr.flush()
        line = typed_line()
        if not line:
            # The terminal has nothing more to say, and never will.
            say("")
            return Answer.LEAVE
        for answer in Answer:
            if line.strip().lower() in {answer.value, answer.name.lower().replace("_", " ")}:
                return answer


def typed_line() -> str:
    """Wait for a line on stdin and return it; "" at its end.

    A signal that comes just before reading begins would be handled only after it; a wait for it as well as for the
    line sees both.
    """
    if sys.platform != "win32":  # which waits for sockets only
        signalled, by_signals = socket.socketpair()
        with signalled, by_signals:
            by_signals.setblocking(False)
            before = signal.set_wakeup_fd(by_signals.fileno(), warn_on_full_buffer=False)
            try:
                while sys.stdin not in select.select([sys.stdin, signalled], [], [])[0]:
                    signalled.recv(1)  # its handler has been called, and raised nothing
            finally:
                signal.set_wakeup_fd(before)
    return sys.stdin.readline()


def command_for(verb: str, job: Job, address: str) -> str:
    """Return the command that does something to a job from this shell."""
    named = os.environ.get("NST_SERVER") or DEFAULT_ADDRESS
    return f"nst jobs {verb} {job.name}" + ("" if address == named else f" --server {address}")


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raise Terminated in the block on SIGTERM."""

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True)
class Target:
    """Where the picture goes, and in which format."""

    path: Path | None
    """None for stdout."""
    format: ImageFormat | None
    """None for the server's choice."""

    @classmethod
    def checked(cls, out: str, wanted: ImageFormat | None) -> Target:
        """Return the target for `--out` and `--output-format`; raise InvalidArgumentError if it cannot work."""
        if out == STDIO:
            return cls(None, wanted)
        path = Path(out)
        check_directory(path)
        if wanted is None:
            return cls(path, format_of_path(path))
        with suppress(InvalidArgumentError):
            if format_of_path(path) is not wanted:
                raise typer.BadParameter(f"{out!r} does not name a {wanted} file", param_hint="--output-format")
        return cls(path, wanted)

    def write(self, picture: Picture) -> None:
        """Write the picture."""
        if self.path is None:
            write_all(sys.stdout.buffer, picture.data)
        elif self.format is None or self.format is picture.format:
            write_whole(self.path, picture.data)
        else:
            # Of a job whose format was settled when it was created.
            picture.save(self.path)


@dataclass(frozen=True)
class FileTarget:
    """Where a file goes that the server makes."""

    path: Path | None
    """A file or a directory; None for stdout."""

    @classmethod
    def checked(cls, out: str) -> FileTarget:
        """Return the target for `--out`; raise InvalidArgumentError if it cannot work."""
        if out == STDIO:
            return cls(None)
        path = Path(out)
        check_directory(path / "file" if path.is_dir() else path)
        return cls(path)

    def write(self, file: ExportedFile) -> str:
        """Write the file and return where it is."""
        if self.path is None:
            write_all(sys.stdout.buffer, file.data)
            return "stdout"
        return str(file.save(self.path))


class Recorder:
    """Keeps the frames that were asked for: as files, for an animation, or both."""

    def __init__(self, directory: Path | None, animation: Path | None) -> None:
        self._directory = directory
        self._animation = animation
        self._sampler = FrameSampler()

    def see(self, event: Event) -> None:
        """Keep a frame."""
        if not isinstance(event, Frame):
            return
        if self._directory is not None:
            suffix = "jpg" if event.format is ImageFormat.JPEG else event.format
            write_whole(self._directory / f"{event.iteration:06d}.{suffix}", event.data)
        if self._animation is not None:
            self._sampler.add(event)

    def finish(self, result: Result) -> Iterator[str]:
        """Write the animation; yield what has been written, for people."""
        if self._directory is not None:
            yield f"the frames to {self._directory}"
        if self._animation is not None:
            yield f"the animation to {write_animation(self._animation, self._sampler.frames(), result)}"


def check_directory(path: Path) -> None:
    """Raise InvalidArgumentError if no file can be written under this name."""
    if path.is_dir():
        raise InvalidArgumentError(f"{str(path)!r} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"there is no directory {str(path.parent)!r}")
    if not os.access(path.parent, os.W_OK):
        raise InvalidArgumentError(f"the directory {str(path.parent)!r} cannot be written to")


def summary(target: Target, picture: Picture, made: Result | JobResult, job: Job | None) -> str:
    """Return what was written, in a line."""
    took = ""
    if job is not None and job.start_time is not None and job.end_time is not None:
        took = f" in {duration_text((job.end_time - job.start_time).total_seconds())}"
    stopped = "" if made.stop_reason == "iterations" else f" ({made.stop_reason})"
    place = "stdout" if target.path is None else str(target.path)
    numbers = f"{picture.width}×{picture.height}, iteration {made.iteration}{stopped}, loss {made.loss:.4g}{took}"
    return f"wrote {place}: {numbers}"


def say(text: str) -> None:
    """Say something to whoever runs the command."""
    typer.echo(text, err=True)
