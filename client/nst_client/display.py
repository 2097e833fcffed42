"""How the command line shows a job or a file on its way: a live bar in a terminal, plain lines, JSON, or nothing."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from nst_client import events
from nst_client.errors import UnavailableError
from nst_client.json_lines import json_line
from nst_client.resources import Job, JobState, Numbers

PLAIN_LINES = 10
"""Where there is no terminal, a job's progress takes about this many lines."""

MAKING = "the server is making the file"

RECONNECTING = "connection lost, trying again"

NARROWEST_BAR = 8
"""Characters of the live bar that remain in a narrow terminal."""


def printable(text: str) -> str:
    """Return a text with all that a terminal would not show as a character written as an escape."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


class Display:
    """Shows nothing; the base of those that do."""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Begin to show, or go on."""

    def stop(self) -> None:
        """Leave the terminal to others. Once or again and again."""

    def show(self, event: events.Event) -> None:
        """Show an event."""

    def show_bytes(self, received: int, total: int | None) -> None:
        """Show how far a file has come; `total` is None while the server is making it."""

    def show_connection(self, error: UnavailableError | None) -> None:
        """Show that the connection is broken, or with None that it stands again."""


class JsonLines(Display):
    """Every event as a line of JSON on a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: events.Event) -> None:
        """Write the event and flush: whoever reads wants it now."""
        print(json_line(event), file=self._stream, flush=True)


class PlainLines(Display):
    """State changes and every tenth of the way as plain lines, for logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said = ""
        self._tenth = -1

    def show(self, event: events.Event) -> None:
        """Write a line if the event is worth one."""
        match event:
            case events.Snapshot() | events.StateChange():
                self._say(state_text(event.job))
            case events.Progress():
                tenth = event.iteration * PLAIN_LINES // max(1, event.iterations)
                if tenth > self._tenth:
                    self._tenth = tenth
                    self._say(f"iteration {event.iteration}/{event.iterations}, {numbers_text(event)}")

    def show_bytes(self, received: int, total: int | None) -> None:  # noqa: ARG002 - a file is here soon
        """Write a line if the file is not there yet."""
        if total is None:
            self._say(MAKING)

    def show_connection(self, error: UnavailableError | None) -> None:
        """Write a line when the connection breaks, and one when it stands again."""
        self._say("connected again" if error is None else RECONNECTING)

    def _say(self, line: str) -> None:
        if line != self._said:
            self._said = line
            print(line, file=self._stream, flush=True)


class LiveBar(Display):
    """A bar that moves, with the newest numbers beside it."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            # In a narrow terminal the text gives way, from its end.
            BarColumn(bar_width=None, table_column=Column(min_width=NARROWEST_BAR, ratio=1)),
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
        )
        self._task: TaskID = self._progress.add_task("connecting", total=None)
        self._state = "connecting"
        self._text = self._state

    def start(self) -> None:
        """Draw the bar."""
        self._progress.start()

    def stop(self) -> None:
        """Leave the bar as it is, and the cursor below it."""
        self._progress.stop()

    def show(self, event: events.Event) -> None:
        """Move the bar."""
        match event:
            case events.Snapshot() | events.StateChange():
                self._state = self._text = state_text(event.job)
                self._progress.update(self._task, description=escape(self._text))
            case events.Progress():
                self._text = f"{self._state}, {event.iteration}/{event.iterations}, {numbers_text(event)}"
                self._progress.update(
                    self._task, total=event.iterations, completed=event.iteration, description=escape(self._text)
                )

    def show_bytes(self, received: int, total: int | None) -> None:
        """Move the bar."""
        self._text = MAKING if total is None else f"{size_text(received)} of {size_text(total)}"
        self._progress.update(self._task, total=total, completed=received, description=escape(self._text))

    def show_connection(self, error: UnavailableError | None) -> None:
        """Say beside the bar that the connection is broken; what was there comes back when it stands again."""
        self._progress.update(self._task, description=escape(self._text if error is None else RECONNECTING))


def progress_display(stream: TextIO) -> Display:
    """Return the display that suits a stream: a live bar in a terminal, plain lines elsewhere."""
    console = Console(file=stream)
    return LiveBar(console) if stream.isatty() and not console.is_dumb_terminal else PlainLines(stream)


def state_text(job: Job) -> str:
    """Return where a job stands, in a few words."""
    if job.state is JobState.QUEUED:
        return "queued, next" if job.queue_position == 0 else f"queued, {job.queue_position} ahead"
    if job.state is JobState.RUNNING:
        return f"running on {job.device}"
    return str(job.state)


def numbers_text(numbers: Numbers) -> str:
    """Return an iteration's numbers in a few words; what is not known yet is left out."""
    parts = [f"loss {numbers.loss:.4g}"]
    if numbers.iterations_per_second > 0:
        parts.append(f"{numbers.iterations_per_second:.2f} it/s")
    if numbers.remaining_s > 0:
        parts.append(f"{duration_text(numbers.remaining_s)} left")
    return ", ".join(parts)


def size_text(count: int) -> str:
    """Return a number of bytes as people say it: `512 bytes`, `41.2 MB`."""
    return f"{count} bytes" if count < 100_000 else f"{count / 1e6:.1f} MB"


def duration_text(seconds: float) -> str:
    """Return a duration as people say it: `45 s`, `2 min 5 s`, `1 h 4 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
