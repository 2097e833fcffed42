"""The command line `nst`: pictures, jobs and styles from a terminal, a script or a pipe.

Exit codes: 0 what was asked for is done; 1 the job or the server failed; 2 the usage or an argument is wrong; 3 the
server cannot be reached or has no room, so try again later; 130 interrupted, whether the job goes on or not.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nst.v1 import model_service_pb2
from nst_client.animation import pillow_format
from nst_client.channel import DEFAULT_ADDRESS
from nst_client.client import Client
from nst_client.display import (
    Display,
    JsonLines,
    duration_text,
    numbers_text,
    printable,
    progress_display,
    size_text,
    state_text,
)
from nst_client.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    JobFailedError,
    MessageTooLargeError,
    NotFoundError,
    NstError,
    ResourceExhaustedError,
    UnavailableError,
)
from nst_client.flags import flag_values, with_option_flags
from nst_client.images import ImageFormat
from nst_client.inspection import description_lines, read_description
from nst_client.json_lines import json_line
from nst_client.like import Example, Order
from nst_client.options import OPTIONS
from nst_client.reference import field_comments
from nst_client.requests import STEERABLE, new_request_id
from nst_client.resources import (
    NO_PREVIEW,
    Encoding,
    ExportedFile,
    Job,
    JobState,
    OptionDescription,
    OptionType,
    OptionValue,
    Preset,
    Preview,
    Style,
    StyleInput,
    StyleName,
    Weighted,
)
from nst_client.retry import TimeLimit
from nst_client.watching import (
    STDIO,
    FileTarget,
    Interrupted,
    Recorder,
    Target,
    Watcher,
    cancel_request,
    check_directory,
    command_for,
    say,
    sigterm_as_interrupt,
    summary,
)

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TRY_LATER = 3
EXIT_INTERRUPTED = 130

EXIT_CODES = """
Exit codes: 0 done; 1 the job or the server failed; 2 the usage or an argument is wrong; 3 the server cannot be
reached or has no room: try again later; 130 interrupted.
"""

STORED_STYLE = re.compile(r"styles/[a-z][a-z0-9-]*")
PIPE_WIDTH = 160

STYLE_HELP = """
One style or several: image files or stored styles (styles/ID). A share in the mixture follows an @: waves.jpg@2
styles/starry@1. A file whose own name is like that: ./styles/ID, or odd@2@1. With --like it may be left out.
"""
LIKE_HELP = """
Make it like this picture, which nst made: model and options are those that it carries, and its styles, with their
shares, if no STYLE is named and all are kept on the server. Flags given here win; with --preset only its size_px and
seed are taken.
"""
REGION_HELP = """
Where in the picture the Nth STYLE belongs: an image of PHOTO's proportions, white there, black elsewhere. What the
regions leave over belongs to the styles without one. Once for each style.
"""
STYLE_REGION_HELP = """
Which part of the Nth STYLE's image to take the style from: an image of its proportions, white there, black elsewhere.
Once for each style.
"""
FORMATS = "jpeg|png|webp|tiff"
EXPORT = model_service_pb2.ExportModelRequest.DESCRIPTOR
EXPORT_FLAGS = ("graph", "format", "precision", "layers", "content_layers", "style_layers", "pooling", "padding")
STYLE_FILE_FLAGS = ("preset", "size_px", "first_size_px", "style_scale", "style_layers", "pooling", "padding")
"""The options that a style file depends on; see the contract's ExportStyleRequest."""
FORMAT_OF_SUFFIX = {".pt": "torchscript", ".onnx": "onnx", ".pt2": "pt2"}
JOB_STATES = [state for state in JobState if state is not JobState.UNKNOWN]


class ErrorsAsExitCodes(typer.core.TyperGroup):
    """Commands whose errors become one message on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise _failure("interrupted", EXIT_INTERRUPTED) from None
        except Interrupted as interruption:
            raise _failure(f"interrupted: {interruption}", EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # Whoever read our output has gone: say nothing, and let nothing be flushed at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(EXIT_FAILED) from None
        except NstError as error:
            raise _failure(_advice(error), _exit_code(error)) from None
        except OSError as error:
            place = "" if error.filename is None else f": {error.filename!r}"
            raise _failure(f"{error.strerror}{place}", EXIT_FAILED) from None


app = typer.Typer(
    name="nst",
    cls=ErrorsAsExitCodes,
    help=f"Neural style transfer: paint a photograph in the style of a picture.\n\n{EXIT_CODES}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
styles_app = typer.Typer(name="styles", help="Styles kept on the server.", no_args_is_help=True)
app.add_typer(styles_app)
jobs_app = typer.Typer(
    name="jobs",
    help="Jobs on the server. They need neither the terminal that began them nor a connection.",
    no_args_is_help=True,
)
app.add_typer(jobs_app)


def main() -> None:
    """Run the command line and exit."""
    try:
        app()
    except Exception as error:
        _print_traceback_if_asked()
        kind = type(error).__name__
        print(f"nst: internal error: {kind}: {error} (NST_DEBUG=1 shows where)", file=sys.stderr)
        sys.exit(EXIT_FAILED)


def _help(message: str, field: str) -> str:
    return escape(field_comments(message)[field])


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"nst {importlib.metadata.version('nst-service')}")
        raise typer.Exit


Server = Annotated[str, typer.Option("--server", envvar="NST_SERVER", metavar="HOST:PORT", help="Where the server is.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but errors.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="jobs/ID or just ID.")]
StyleArgument = Annotated[str, typer.Argument(metavar="STYLE", help="styles/ID or just ID.")]
FileOut = Annotated[
    str,
    typer.Option(
        "--out", "-o", metavar="OUT", help="A file, a directory, or - for stdout. The server proposes the file's name."
    ),
]
OUT_HELP = "The picture: .png, .jpg, .webp, .tif, or - for stdout."


@app.callback()
def nst(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Take the options that come before a command."""


@app.command(no_args_is_help=True)
@with_option_flags(OPTIONS, field_comments("StylizeOptions"))
def stylize(
    photo: Annotated[str, typer.Argument(metavar="PHOTO", help="The photograph: an image file, or - for stdin.")],
    styles: Annotated[
        list[str] | None, typer.Argument(metavar="STYLE", help=" ".join(STYLE_HELP.split()), show_default=False)
    ] = None,
    *,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="OUT", help=f"{OUT_HELP} Required, except with --detach.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's name and leave it running; see `nst jobs`.")
    ] = False,
    output_format: Annotated[
        ImageFormat | None,
        typer.Option(metavar=FORMATS, help="Format of the picture, where OUT does not say it."),
    ] = None,
    quality: Annotated[int | None, typer.Option(metavar="N", help=_help("Encoding", "quality"))] = None,
    bit_depth: Annotated[int | None, typer.Option(metavar="N", help=_help("Encoding", "bit_depth"))] = None,
    like: Annotated[Path | None, typer.Option(metavar="RESULT", help=" ".join(LIKE_HELP.split()))] = None,
    region: Annotated[
        list[str] | None, typer.Option(metavar="N=MASK", help=" ".join(REGION_HELP.split()), show_default=False)
    ] = None,
    style_region: Annotated[
        list[str] | None, typer.Option(metavar="N=MASK", help=" ".join(STYLE_REGION_HELP.split()), show_default=False)
    ] = None,
    init_image: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The picture to start from, an earlier OUT for instance. Implies --init image."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Feature model; `nst models` lists them. Default: the server's.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Give up after this time, waiting included.")
    ] = None,
    save_frames: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save every frame, named by its iteration.")
    ] = None,
    animation: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the frames as an animation: .webp, .gif, .png or .apng.")
    ] = None,
    preview_size: Annotated[
        int | None, typer.Option(metavar="PX", help=f"Of frames. {_help('Preview', 'size_px')}")
    ] = None,
    preview_interval: Annotated[
        int | None, typer.Option(metavar="N", help=f"Of frames. {_help('Preview', 'interval')}")
    ] = None,
    preview_format: Annotated[
        ImageFormat | None, typer.Option(metavar=FORMATS, help="Format of frames. Default: JPEG.")
    ] = None,
    quiet: Quiet = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print every event as a line of JSON instead of a progress bar.")
    ] = False,
    server: Server = DEFAULT_ADDRESS,
    **options: Any,
) -> None:
    """Paint PHOTO in the style of STYLE and write the picture to OUT.

    A lost connection and a server that restarts are waited out. Ctrl-C asks whether to cancel the job or to leave it
    running; without a terminal it cancels.
    """
    wants_frames = save_frames is not None or animation is not None
    if detach:
        _check_detached(out=out, timeout=timeout, wants_frames=wants_frames)
    elif out is None:
        raise typer.BadParameter("say where the picture goes, or --detach", param_hint="--out")
    target = Target.checked(out or STDIO, output_format)
    _check_places(save_frames, animation, preview_interval, json_on_stdout=json and target.path is None and not detach)
    preview = Preview(
        # Frames that nobody keeps are not asked for; but whoever watches a job later may want some.
        interval=preview_interval if wants_frames or detach or preview_interval is not None else 0,
        size_px=preview_size,
        encoding=None if preview_format is None else Encoding(format=preview_format),
        every_frame=wants_frames,
    )
    say_more = _stay_silent if quiet or json else say
    example = None if like is None else Example.of(like)
    order = Order(
        styles=_styles(styles or [], example),
        content=sys.stdin.buffer.read() if photo == STDIO else photo,
        init_image=init_image,
        model=model,
        options=flag_values(OPTIONS, options),
    )
    order = order if example is None else example.complete(order)
    order = _with_masks(order, regions=region or [], style_regions=style_region or []).read()
    encoding = Encoding(format=target.format, quality=quality, bit_depth=bit_depth)
    display, limit = _display(quiet=quiet, json=json), TimeLimit(timeout)
    with Client(server, on_connection=display.show_connection) as client, sigterm_as_interrupt():
        for difference in () if example is None else example.differences(order, client):
            say_more(f"note: {difference}")
        if detach:
            job = _created(client, order, preview, encoding)
            print(json_line(job) if json else job.name)
            return
        recorder = Recorder(save_frames, animation)
        with display:
            job = _created(client, order, preview, encoding, timeout_s=limit.remaining_s())
            stream = client.watch_job(job, preview=preview, timeout_s=limit.remaining_s())
            result = Watcher(client, display, owns_job=True, see=recorder.see).result(job, stream)
        target.write(result)
        say_more(summary(target, result, result, stream.job))
        for written in recorder.finish(result):
            say_more(f"wrote {written}")


@jobs_app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="|".join(JOB_STATES), help="Only jobs in this state. May be given several times."),
    ] = None,
    json: Json = False,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """List the jobs on the server, the newest first."""
    with Client(server) as client:
        jobs = client.list_jobs(state or [])
        if json:
            return _print_json(jobs)
        rows = [(job.name, _state(job), _iterations(job), f"{job.width}×{job.height}", _age(job)) for job in jobs]
    return _print_table(("name", "state", "iteration", "size", "age"), rows)


@jobs_app.command("show", no_args_is_help=True)
def show_job(name: JobName, json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """Show one job: where it stands, what was asked for, and what came of it."""
    with Client(server) as client:
        job = client.get_job(name)
    return _print_json([job]) if json else print("\n".join(_job_lines(job)))


@jobs_app.command("watch", no_args_is_help=True)
def watch_job(
    name: JobName,
    *,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="OUT", help=f"{OUT_HELP} Without it none is written.")
    ] = None,
    after: Annotated[
        int, typer.Option(metavar="N", help=_help("WatchJobRequest", "after_sequence"), show_default=False)
    ] = 0,
    quiet: Quiet = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print every event as a line of JSON instead of a progress bar.")
    ] = False,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Watch a job to its end, and write the picture to OUT.

    Ctrl-C asks whether to cancel the job or to leave it running; without a terminal it is left running.
    """
    target = None if out is None else Target.checked(out, None)
    if json and target is not None and target.path is None:
        raise typer.BadParameter("stdout cannot carry both the picture and JSON", param_hint="--json")
    display = _display(quiet=quiet, json=json)
    with Client(server, on_connection=display.show_connection) as client, sigterm_as_interrupt(), display:
        job = client.get_job(name)
        stream = client.watch_job(job, after_sequence=after, preview=NO_PREVIEW)
        result = Watcher(client, display, owns_job=False).result(job, stream)
    if target is not None:
        target.write(result)
        (_stay_silent if quiet or json else say)(summary(target, result, result, stream.job))


@jobs_app.command("cancel", no_args_is_help=True)
def cancel_job(name: JobName, json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """End a job, in whatever state it is. One that has ended stays as it ended."""
    with Client(server) as client:
        _print_changed(client.cancel_job(name), json=json)


@jobs_app.command("pause", no_args_is_help=True)
def pause_job(name: JobName, json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """Make a job wait. It gives its device back and keeps what it has done."""
    with Client(server) as client:
        _print_changed(client.update_job(name, paused=True), json=json)


@jobs_app.command("resume", no_args_is_help=True)
def resume_job(name: JobName, json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """Queue a paused job again."""
    with Client(server) as client:
        _print_changed(client.update_job(name, paused=False), json=json)


@jobs_app.command("update", no_args_is_help=True)
@with_option_flags(OPTIONS, field_comments("StylizeOptions"), only=STEERABLE)
def update_job(
    name: JobName,
    *,
    finish: Annotated[bool, typer.Option("--finish", help=_help("UpdateJobRequest", "finish"))] = False,
    json: Json = False,
    server: Server = DEFAULT_ADDRESS,
    **options: Any,
) -> None:
    """Change a job that has not ended. What is not given stays as it is; it follows from its next iteration on."""
    changes = flag_values(OPTIONS, options)
    if not (changes or finish):
        raise typer.BadParameter("name an option to change, or --finish", param_hint="OPTIONS")
    with Client(server) as client:
        _print_changed(client.update_job(name, finish=finish, **changes), json=json)


@jobs_app.command("delete", no_args_is_help=True)
def delete_job(name: JobName, server: Server = DEFAULT_ADDRESS) -> None:
    """Delete a job with its events and its picture. One that has not ended is cancelled first."""
    with Client(server) as client:
        client.delete_job(name)


@jobs_app.command("download", no_args_is_help=True)
def download_job(
    name: JobName,
    *,
    out: Annotated[str, typer.Option("--out", "-o", metavar="OUT", help=OUT_HELP)],
    quiet: Quiet = False,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Write the picture of a job that has ended to OUT."""
    target = Target.checked(out, None)
    with Client(server) as client:
        job = client.get_job(name)
        if job.error is not None:
            raise JobFailedError(f"{job.name} failed: {job.error.message}", job=job)
        if job.result is None:
            command = command_for("watch", job, client.address)
            hint = "" if job.state.is_terminal else f"; `{command} -o {out}` waits for it"
            raise FailedPreconditionError(f"{job.name} has no picture: it is {job.state}{hint}")
        picture = client.download_image(job.result)
    target.write(picture)
    (_stay_silent if quiet else say)(summary(target, picture, job.result, job))


@styles_app.command("create", no_args_is_help=True)
def create_style(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="One image file or several; a share may follow an @: waves.jpg@2."),
    ],
    style_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help=_help("CreateStyleRequest", "style_id"))
    ] = None,
    display_name: Annotated[str, typer.Option(metavar="NAME", help=_help("Style", "display_name"))] = "",
    json: Json = False,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Keep a style on the server and print its name."""
    sources: list[Any] = [_weighted(text, Path) for text in images]
    with Client(server) as client:
        style = client.create_style(sources, style_id=style_id, display_name=display_name)
    print(json_line(style) if json else style.name)


@styles_app.command("list")
def list_styles(json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """List the styles on the server."""
    with Client(server) as client:
        styles = client.list_styles()
        if json:
            return _print_json(styles)
        rows = [(style.name, style.display_name, _image_count(style), _date(style.create_time)) for style in styles]
    return _print_table(("name", "display name", "images", "created"), rows)


@styles_app.command("show", no_args_is_help=True)
def show_style(
    name: StyleArgument,
    json: Json = False,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Show one style."""
    with Client(server) as client:
        style = client.get_style(name)
    if json:
        return _print_json([style])
    return print("\n".join(map(printable, filter(None, _style_lines(style)))))


@styles_app.command("delete", no_args_is_help=True)
def delete_style(
    name: StyleArgument,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Delete a style from the server."""
    with Client(server) as client:
        client.delete_style(name)


@styles_app.command("export", no_args_is_help=True)
@with_option_flags(
    OPTIONS, field_comments("StylizeOptions"), only=STYLE_FILE_FLAGS, panel="Options of the pictures that it is for"
)
def export_style(
    name: StyleArgument,
    *,
    out: FileOut = os.curdir,
    model: Annotated[
        str | None, typer.Option(help="Feature model; `nst models` lists them. Default: the server's.")
    ] = None,
    quiet: Quiet = False,
    server: Server = DEFAULT_ADDRESS,
    **options: Any,
) -> None:
    """Write a style to a file, without its images, to be used on another server or in another program.

    The file serves pictures of the model, sizes, layers, pooling and padding named here.
    """
    target, display = FileTarget.checked(out), _display(quiet=quiet, json=False)
    wanted = flag_values(OPTIONS, options)
    with Client(server, on_connection=display.show_connection) as client, sigterm_as_interrupt(), display:
        file = client.export_style(name, model=model, on_progress=display.show_bytes, **wanted)
    _keep(file, target, quiet=quiet)


@styles_app.command("import", no_args_is_help=True)
def import_style(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A style file, as `nst styles export` writes it.")],
    style_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help=_help("ImportStyleRequest", "style_id"))
    ] = None,
    display_name: Annotated[
        str, typer.Option(metavar="NAME", help=_help("ImportStyleRequest", "display_name"), show_default=False)
    ] = "",
    json: Json = False,
    server: Server = DEFAULT_ADDRESS,
) -> None:
    """Keep a style file on the server as a style and print its name."""
    with Client(server) as client:
        style = client.import_style(file, style_id=style_id, display_name=display_name)
    print(json_line(style) if json else style.name)


@app.command(no_args_is_help=True)
@with_option_flags(EXPORT, field_comments("ExportModelRequest"), only=EXPORT_FLAGS, panel="Options of the file")
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Feature model, models/ID or just ID; `nst models` lists them.")
    ],
    *,
    out: FileOut = os.curdir,
    quiet: Quiet = False,
    server: Server = DEFAULT_ADDRESS,
    **options: Any,
) -> None:
    """Write a feature model, or all that an optimization evaluates, to a file for another runtime.

    --format may be left out where OUT ends in .pt, .onnx or .pt2. `nst inspect` says what a file contains.
    """
    if not model.removeprefix("models/"):
        raise typer.BadParameter("must not be empty; `nst models` lists the names", param_hint="MODEL")
    target, display = FileTarget.checked(out), _display(quiet=quiet, json=False)
    wanted = flag_values(EXPORT, options)
    wanted["format"] = _format(out, wanted.get("format"))
    with Client(server, on_connection=display.show_connection) as client, sigterm_as_interrupt(), display:
        file = client.export_model(model, on_progress=display.show_bytes, **wanted)
    _keep(file, target, quiet=quiet)


@app.command(no_args_is_help=True)
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An exported model, or a style file.")],
    json: Json = False,
) -> None:
    """Check an exported file, and say what it contains. Nothing in it is executed, and no server is asked."""
    described = read_description(file)
    print(json_line(described) if json else "\n".join(description_lines(file, described)))


@app.command()
def models(json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """List the feature models that the server knows."""
    with Client(server) as client:
        known = list(client.list_models())
    if json:
        return _print_json(known)
    rows = [
        (
            f"{model.name}{' (default)' if model.is_default else ''}",
            model.state.replace("_", " "),
            f"{model.layers[0].name} … {model.layers[-1].name}" if model.layers else "",
            model.description or model.display_name,
        )
        for model in known
    ]
    return _print_table(("name", "state", "layers", "description"), rows)


@app.command()
def options(json: Json = False, server: Server = DEFAULT_ADDRESS) -> None:
    """List the options of a picture with the server's defaults and bounds, and the presets with what they change."""
    with Client(server) as client:
        described, presets = client.describe_options(), client.describe_presets()
    if json:
        return _print_json([*described, *presets])
    rows = [(_flag(option.name), _plain(option.default), _allowed(option), option.description) for option in described]
    _print_table(("option", "default", "allowed", "meaning"), rows)
    defaults = {option.name: option.default for option in described}
    changes = [(preset.name, preset.description, _changes(preset, defaults)) for preset in presets]
    return _print_table(("preset", "meaning", "what it changes"), changes) if presets else None


def _format(out: str, wanted: str | None) -> str | None:
    meant = FORMAT_OF_SUFFIX.get(Path(out).suffix)
    if None not in {meant, wanted} and wanted != meant:
        raise typer.BadParameter(f"{out!r} does not name a file of format {wanted}", param_hint="--format")
    return wanted or meant


def _keep(file: ExportedFile, target: FileTarget, *, quiet: bool) -> None:
    written = target.write(file)
    (_stay_silent if quiet else say)(f"wrote {written}: {size_text(len(file.data))}, sha256 {file.sha256}")


def _display(*, quiet: bool, json: bool) -> Display:
    if json:
        return JsonLines(sys.stdout)
    return Display() if quiet else progress_display(sys.stderr)


def _check_detached(*, out: str | None, timeout: float | None, wants_frames: bool) -> None:
    if out is not None:
        problem = "writes no picture: leave out --out, and let `nst jobs watch` or `nst jobs download` write it"
    elif wants_frames:
        problem = "watches no frames: leave out --save-frames and --animation"
    elif timeout is not None:
        problem = "waits for nothing: leave out --timeout"
    else:
        return
    raise typer.BadParameter(problem, param_hint="--detach")


def _created(
    client: Client, order: Order, preview: Preview, output: Encoding, *, timeout_s: float | None = None
) -> Job:
    request_id = new_request_id()
    try:
        return client.create_job(
            order.content,
            order.styles,
            init_image=order.init_image,
            model=order.model,
            preview=preview,
            output=output,
            timeout_s=timeout_s,
            request_id=request_id,
            **order.options,
        )
    except KeyboardInterrupt:
        cancel_request(client, request_id)
        raise


def _print_changed(job: Job, *, json: bool) -> None:
    print(json_line(job) if json else f"{job.name} {state_text(job)}")


def _job_lines(job: Job) -> Iterable[str]:
    """Yield what people want to know of a job, line by line."""
    yield job.name
    progress = job.progress
    if progress is not None and job.state.is_terminal:
        progress = replace(progress, remaining_s=0)
    yield _state(job) + ("" if progress is None else f", {_iterations(job)}, {numbers_text(progress)}")
    yield f"{job.width}×{job.height}, {job.model}"
    moments = {"created": job.create_time, "started": job.start_time, "ended": job.end_time}
    if job.start_time is None:
        moments["to be started about"] = job.estimated_start_time
    yield ", ".join(f"{what} {_date(moment)}" for what, moment in moments.items() if moment is not None)
    if job.attempt > 1:
        yield f"attempt {job.attempt}"
    if job.error is not None:
        yield f"{job.error.reason}: {job.error.message}"
    if job.result is not None:
        yield f"{job.result.image}, {job.result.total_bytes} bytes, loss {job.result.loss:.4g}"
    yield "options " + " ".join(_written(name, value) for name, value in job.options.items())


def _state(job: Job) -> str:
    return str(job.state) if job.state.is_terminal else state_text(job)


def _iterations(job: Job) -> str:
    return "" if job.progress is None else f"{job.progress.iteration}/{job.progress.iterations}"


def _age(job: Job) -> str:
    if job.create_time is None:
        return ""
    return duration_text((datetime.now(UTC) - job.create_time).total_seconds())


def _image_count(style: Style) -> str:
    return str(len(style.images)) if style.file is None else "imported"


def _style_lines(style: Style) -> Iterable[str]:
    """Yield what people want to know of a style, line by line."""
    yield style.name
    yield style.display_name
    yield f"created {_date(style.create_time)}"
    if (file := style.file) is not None:
        yield f"imported, {size_text(file.total_bytes)}, sha256 {file.sha256}"
        yield f"for {file.model}, pooling {file.pooling}, padding {file.padding}; of weights {file.model_sha256}"
    for image in (*style.images, *(file.images if file is not None else ())):
        size = f" {image.width}×{image.height}" if image.width else ""
        weight = "" if image.weight is None else f", weight {image.weight:g}"
        yield f"image{size}{weight}, sha256 {image.sha256}"
    for grams in style.prepared:
        yield f"prepared for {grams.model} at {grams.size_px} px: {', '.join(grams.layers)}"


def _check_places(
    directory: Path | None, animation: Path | None, interval: int | None, *, json_on_stdout: bool
) -> None:
    if json_on_stdout:
        raise typer.BadParameter("stdout cannot carry both the picture and JSON", param_hint="--json")
    if interval == 0 and (directory is not None or animation is not None):
        raise typer.BadParameter("0 asks for no frames, so none could be kept", param_hint="--preview-interval")
    if animation is not None:
        pillow_format(animation)
        check_directory(animation)
    if directory is not None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(f"cannot make the directory {str(directory)!r}: {error.strerror}") from error


def _styles(texts: Sequence[str], example: Example | None) -> list[StyleInput]:
    if not texts and example is None:
        raise typer.BadParameter("name one at least, or a picture with --like", param_hint="STYLE")
    return [_style(text) for text in texts]


def _style(text: str) -> StyleInput:
    style = _weighted(text, _stored_or_file)
    return StyleInput(style.source, weight=style.weight) if isinstance(style, Weighted) else StyleInput(style)


def _with_masks(order: Order, *, regions: Sequence[str], style_regions: Sequence[str]) -> Order:
    count = len(order.styles)
    region = _masks(regions, count=count, flag="--region")
    style_region = _masks(style_regions, count=count, flag="--style-region")
    styles = [
        replace(style, region=region.get(number), style_region=style_region.get(number))
        for number, style in enumerate(order.styles, start=1)
    ]
    return replace(order, styles=styles)


def _masks(texts: Sequence[str], *, count: int, flag: str) -> dict[int, Path]:
    """Return the masks by the number of their style, from 1."""
    masks: dict[int, Path] = {}
    for text in texts:
        written, _, mask = text.partition("=")
        if not (mask and written.isascii() and written.isdigit()):
            raise typer.BadParameter(f"must be like 1=mask.png, not {text!r}", param_hint=flag)
        number = int(written)
        if not 1 <= number <= count:
            raise typer.BadParameter(f"{text!r}: styles are numbered 1 to {count}", param_hint=flag)
        if number in masks:
            raise typer.BadParameter(f"{text!r}: style {number} has a mask already", param_hint=flag)
        masks[number] = Path(mask)
    return masks


def _stored_or_file(name: str) -> StyleName | Path:
    return StyleName(name) if STORED_STYLE.fullmatch(name) else Path(name)


def _weighted(text: str, source: Callable[[str], Any]) -> Any:
    name, at, weight = text.rpartition("@")
    with suppress(ValueError):
        if at:
            return Weighted(source(name), float(weight))
    return source(text)


def _stay_silent(text: str) -> None:
    pass


def _failure(message: str, code: int) -> typer.Exit:
    _print_traceback_if_asked()
    typer.secho("nst: ", err=True, nl=False, bold=True)
    say(message)
    return typer.Exit(code)


def _print_traceback_if_asked() -> None:
    if os.environ.get("NST_DEBUG", "") not in {"", "0"}:
        traceback.print_exc()


def _advice(error: NstError) -> str:
    match error:
        case UnavailableError(job=Job() as job):
            return f"{error}\n`{command_for('watch', job, error.address)} -o OUT` takes it up again"
        case UnavailableError(reason="", retry_after_s=None):
            return f"{error}\nnst-server starts a server; --server or NST_SERVER names another"
        case UnavailableError(retry_after_s=float(wait)) | ResourceExhaustedError(retry_after_s=float(wait)):
            return f"{error}; try again in {duration_text(wait)}"
    return str(error)


def _exit_code(error: NstError) -> int:
    match error:
        case InvalidArgumentError() | NotFoundError() | AlreadyExistsError() | MessageTooLargeError():
            return EXIT_USAGE
        case UnavailableError() | ResourceExhaustedError():
            return EXIT_TRY_LATER
    return EXIT_FAILED


def _print_json(values: Iterable[object]) -> None:
    for value in values:
        print(json_line(value))


def _print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    listed = list(rows)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(headings):
        # The first is what people copy: however narrow the terminal, it is whole.
        width = max((len(row[0]) for row in listed), default=0) if index == 0 else None
        table.add_column(heading, min_width=width)
    for row in listed:
        table.add_row(*(escape(printable(cell)) for cell in row))
    # In a pipe there is no width to fit, and broken lines would be harder to read for programs.
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={weight:g}" for key, weight in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value)) or "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _changes(preset: Preset, defaults: Mapping[str, OptionValue | None]) -> str:
    """Return the flags that change the defaults as the preset does."""
    changed = {
        name: value for name, value in preset.options.items() if name != "preset" and value != defaults.get(name)
    }
    return " ".join(_written(name, value) for name, value in changed.items()) or "nothing"


def _written(name: str, value: OptionValue) -> str:
    if isinstance(value, bool):
        return _flag(name if value else f"no_{name}")
    return f"{_flag(name)} {_plain(value).replace(' ', '')}"


def _allowed(option: OptionDescription) -> str:
    if option.type is OptionType.BOOLEAN:
        return "true, false"
    return ", ".join(option.choices) or _range(option.minimum, option.maximum, option.unit)


def _range(minimum: float | None, maximum: float | None, unit: str) -> str:
    low, high = ("…" if bound is None else f"{bound:.10g}" for bound in (minimum, maximum))
    return f"{low} to {high} {unit}".strip()


def _date(moment: datetime | None) -> str:
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"
