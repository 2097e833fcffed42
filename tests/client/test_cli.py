"""The command line `nst`: exit codes, what goes to stdout and to stderr, and files. A real server behind all of it."""

from __future__ import annotations

import functools
import importlib.metadata
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import ListValue, Value
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from PIL import Image
from typer.testing import CliRunner

from nst.v1 import (
    image_pb2,
    model_service_pb2,
    model_service_pb2_grpc,
    options_pb2,
    style_service_pb2,
    style_service_pb2_grpc,
    style_transfer_service_pb2,
    style_transfer_service_pb2_grpc,
)
from nst_client import Client, cli

NST = [sys.executable, "-c", "from nst_client.cli import main; main()"]


@pytest.fixture
def nst(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, address: str = "localhost:1", stdin: bytes = b"") -> Any:
        monkeypatch.setenv("NST_SERVER", address)
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)

    return run


def spawned(*arguments: object, address: str, unbuffered: bool = False, **options: Any) -> subprocess.Popen[bytes]:
    """Return a running command line, in a process of its own."""
    environment = {**os.environ, "NST_SERVER": address} | ({"PYTHONUNBUFFERED": "1"} if unbuffered else {})
    return subprocess.Popen(
        [*NST, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def ended(process: subprocess.Popen[bytes], stdin: bytes | None = None) -> tuple[int, bytes, str]:
    """Return exit code, stdout and stderr of a process once it has ended."""
    out, err = process.communicate(stdin, timeout=20)
    return process.returncode, out, err.decode()


# Making a picture


def test_picture_is_written(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """`nst stylize PHOTO STYLE -o OUT` writes OUT, says so on stderr, and leaves stdout and the directory clean."""
    server = serve(story.whole(iterations=20))
    out = photo.parent / "out.png"
    done = nst("stylize", photo, wave, "-o", out, address=server.address)
    assert (done.exit_code, done.stdout) == (0, "")
    with Image.open(out) as image:
        assert (image.format, image.size) == ("PNG", (8, 6))
    assert done.stderr.splitlines()[0] == "queued, 1 ahead"
    assert f"wrote {out}: 8×6, iteration 20, loss 0.125" in done.stderr
    assert sorted(path.name for path in photo.parent.iterdir()) == ["out.png", "photo.png", "wave.jpg"]


def test_plain_lines_are_few(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """Without a terminal a job of any length takes about ten lines of progress."""
    server = serve(story.whole(iterations=300))
    done = nst("stylize", photo, wave, "-o", photo.parent / "out.png", address=server.address)
    lines = [line for line in done.stderr.splitlines() if line.startswith("iteration ")]
    assert len(lines) == 11
    assert lines[5].startswith("iteration 150/300, loss 0.05298, 2.00 it/s, 1 min 15 s left")
    assert "\x1b" not in done.stderr


def test_flags_arrive_in_the_request(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """Every flag reaches its field, made from the contract or not."""
    server = serve(story.whole(kind="JPEG"))
    flags = ["--iterations", 5, "--style-weight", 2.5, "--init", "noise", "--style-layers", "relu1_1=1,relu2_1=0.5"]
    flags += ["--seed", 3, "--quality", 80, "--model", "vgg19"]
    flags += ["--preview-size", 64, "--preview-interval", 2, "--preview-format", "webp"]
    styles = [f"{wave}@2", "styles/starry@0.5", "styles/night"]
    done = nst("stylize", photo, *styles, "-o", photo.parent / "o.jpg", *flags, address=server.address)
    assert done.exit_code == 0, done.stderr
    [request] = server.requests
    assert request.options == options_pb2.StylizeOptions(
        iterations=5, style_weight=2.5, init="INIT_NOISE", seed=3, style_layers={"relu1_1": 1, "relu2_1": 0.5}
    )
    assert request.output == image_pb2.Encoding(format="IMAGE_FORMAT_JPEG", quality=80)
    assert (request.model, request.preview.size_px, request.preview.interval) == ("vgg19", 64, 2)
    assert request.preview.encoding.format == image_pb2.IMAGE_FORMAT_WEBP
    assert [style.weight for style in request.styles] == [2, 0.5, 0]
    assert [style.style for style in request.styles] == ["", "styles/starry", "styles/night"]
    assert request.styles[0].image.data == wave.read_bytes()


def test_flags_not_given_are_not_sent(
    *, nst: Any, serve: Any, story: Any, photo: Path, wave: Path, tmp_path: Path
) -> None:
    """Defaults are the server's; frames that nobody keeps are not asked for."""
    server = serve(story.whole())
    nst("stylize", photo, wave, "-o", tmp_path / "o.png", address=server.address)
    [request] = server.requests
    assert request.options == options_pb2.StylizeOptions()
    assert request.preview == style_transfer_service_pb2.Preview(interval=0)


def test_file_named_like_a_weight_or_a_style(
    nst: Any, serve: Any, story: Any, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd file names can be said: ./styles/x is a file, odd@2@1 the file odd@2, a@b.png just itself."""
    monkeypatch.chdir(photo.parent)
    names = ["styles/x", "odd@2", "a@b.png"]
    (photo.parent / "styles").mkdir()
    for name in names:
        (photo.parent / name).write_bytes(name.encode())
    server = serve(story.whole())
    done = nst("stylize", photo, "./styles/x", "odd@2@1", "a@b.png", "-o", "o.png", address=server.address)
    assert done.exit_code == 0, done.stderr
    assert [style.image.data.decode() for style in server.requests[0].styles] == names


def test_frames_and_animation(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """`--save-frames` keeps every frame by its iteration; `--animation` shows them and ends with the result."""
    server = serve(story.whole(iterations=4))
    kept = ["--save-frames", photo.parent / "deep" / "frames", "--animation", photo.parent / "a.webp"]
    done = nst("stylize", photo, wave, "-o", photo.parent / "o.png", *kept, address=server.address)
    assert done.exit_code == 0, done.stderr
    assert not server.requests[0].preview.HasField("interval")
    names = sorted(path.name for path in (photo.parent / "deep" / "frames").iterdir())
    assert names == [f"{iteration:06d}.jpg" for iteration in range(5)]
    with Image.open(photo.parent / "a.webp") as animation:
        assert animation.n_frames == 5
    assert f"wrote the animation to {photo.parent / 'a.webp'}" in done.stderr


def test_quiet_says_nothing(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """`--quiet` is silent when all is well."""
    done = nst("stylize", photo, wave, "-q", "-o", photo.parent / "o.png", address=serve(story.whole()).address)
    assert (done.exit_code, done.output) == (0, "")


def test_json_is_a_line_for_every_event(
    *, nst: Any, serve: Any, story: Any, photo: Path, wave: Path, tmp_path: Path
) -> None:
    """`--json` prints one object a line, with all numbers and no image bytes, and nothing else anywhere."""
    server = serve(story.whole(iterations=1))
    done = nst("stylize", photo, wave, "--json", "-o", tmp_path / "o.png", address=server.address)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = ["snapshot", "state_change", "progress", "frame", "progress", "frame", "result", "state_change"]
    assert [event["event"] for event in events] == kinds
    assert events[0]["job"]["options"]["init"] == "noise"
    assert events[2]["style_losses"] == {"relu1_1": 0.25}
    assert events[2]["time"] == "2023-11-14T22:13:20+00:00"
    assert events[3]["bytes"] > 100
    assert (events[6]["stop_reason"], "data" in events[6]) == ("iterations", False)
    assert done.stderr == ""
    assert (tmp_path / "o.png").exists()


def test_json_has_no_words_that_json_lacks(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """A loss that is not a number is null, so that every JSON parser reads the line."""
    progress = {"iteration": 1, "iterations": 2, "loss": float("nan"), "content_loss": float("inf")}
    server = serve(story.snapshot().event(numbered=True, progress=progress).result().state("SUCCEEDED"))
    done = nst("stylize", photo, wave, "--json", "-o", photo.with_name("o.png"), address=server.address)
    event = json.loads(done.stdout.splitlines()[1])
    assert (event["loss"], event["content_loss"]) == (None, None)


def test_pipes_on_both_sides(serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """`nst stylize - STYLE -o -` reads the photograph from stdin and writes nothing but the picture to stdout."""
    server = serve(story.whole())
    process = spawned("stylize", "-", wave, "-o", "-", address=server.address, stdin=subprocess.PIPE)
    code, out, err = ended(process, photo.read_bytes())
    assert code == 0, err
    with Image.open(io.BytesIO(out)) as image:
        assert image.format == "PNG"
    assert server.requests[0].content.data == photo.read_bytes()
    assert "wrote stdout: 8×6" in err


def test_reader_that_leaves(serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """When the reader of the pipe goes away, the job is cancelled and nothing is said."""
    story.snapshot()
    for iteration in range(400):
        story.progress(iteration, of=400).then(0.02)
    server = serve(story.then(30))
    process = spawned("stylize", photo, wave, "--json", "-o", photo.parent / "o.png", address=server.address)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b'{"event": "snapshot"')
    process.stdout.close()
    assert process.wait(20) == 1
    with process.stderr as stderr:
        assert stderr.read() == b""
    assert server.hung_up.wait(5)


def test_interrupt_cancels_the_job(serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """Ctrl-C cancels the job, says so, exits with 130, and leaves no file behind."""
    server = serve(story.snapshot().state("RUNNING", device="cpu").progress(0).then(30))
    process = spawned("stylize", photo, wave, "-o", photo.parent / "o.png", address=server.address)
    assert process.stderr is not None
    while b"iteration 0/4" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert (code, out, err) == (130, b"", "nst: interrupted: jobs/j1 is cancelled\n")
    assert server.hung_up.wait(5)
    assert not (photo.parent / "o.png").exists()


def test_live_bar_in_a_terminal(serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """In a terminal a bar moves: state, iteration, loss, iterations per second, time left."""
    story.snapshot(queue_position=2).then(0.3).state("RUNNING", device="cuda:0")
    story.progress(3, of=40).then(0.3).progress(40, of=40).result(iteration=40).state("SUCCEEDED")
    server = serve(story)
    primary, secondary = os.openpty()
    environment = {**os.environ, "NST_SERVER": server.address, "TERM": "xterm-256color", "COLUMNS": "120"}
    arguments = ["stylize", str(photo), str(wave), "-o", str(photo.parent / "o.png")]
    process = subprocess.Popen([*NST, *arguments], stdout=secondary, stderr=secondary, env=environment)
    os.close(secondary)
    shown = b""
    with open(primary, "rb", buffering=0) as terminal:  # noqa: PTH123 - a file descriptor, not a path
        while process.poll() is None or not shown.endswith(b"\n"):
            try:
                shown += terminal.read(1 << 16)
            except OSError:
                break
    text = shown.decode()
    assert process.wait(20) == 0, text
    assert "queued, 2 ahead" in text
    assert "running on cuda:0, 3/40, loss 2, 2.00 it/s, 18 s left" in text
    assert "━" in text
    assert "wrote" in text


# Errors

CODE = grpc.StatusCode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope.jpg", "WAVE", "-o", "o.png"], "content: there is no file 'nope.jpg'"),
        (["PHOTO", "nope.jpg@2", "-o", "o.png"], "styles[0]: there is no file 'nope.jpg'"),
        (["PHOTO", "WAVE", "-o", "o.pdf"], "'o.pdf' must end in one of .jpg, .jpeg, .png, .webp, .tif, .tiff"),
        (["PHOTO", "WAVE", "-o", "no/o.png"], "there is no directory 'no'"),
        (["PHOTO", "WAVE", "-o", "."], "'.' is a directory; name a file in it"),
        (["PHOTO", "WAVE", "-o", "o.jpg", "--output-format", "png"], "'o.jpg' does not name a png file"),
        (["PHOTO", "WAVE", "-o", "-", "--json"], "stdout cannot carry both the picture and JSON"),
        (["PHOTO", "WAVE", "-o", "o.png", "--animation", "a.mp4"], "must end in one of .webp, .gif, .png, .apng"),
        (["PHOTO", "WAVE", "-o", "o.png", "--animation", "no/a.gif"], "there is no directory 'no'"),
        (["PHOTO", "WAVE", "-o", "o.png", "--save-frames", "PHOTO"], "cannot make the directory"),
        (["PHOTO", "WAVE", "-o", "o.png", "--save-frames", "f", "--preview-interval", "0"], "0 asks for no frames"),
        (["PHOTO", "WAVE", "-o", "o.png", "--init", "foo"], "'content'"),
        (["PHOTO", "WAVE", "-o", "o.png", "--iterations", "many"], "--iterations"),
        (["PHOTO", "WAVE", "-o", "o.png", "--style-layers", "relu1_1=x"], "the weight 'x' is not a number"),
        (["PHOTO", "WAVE", "-o", "o.png", "--server", "http://x"], "must be host:port"),
        (["PHOTO", "WAVE"], "--out"),
        (["PHOTO", "-o", "o.png"], "name one at least, or a picture with --like"),
    ],
)
def test_wrong_usage_exits_with_2(
    *,
    nst: Any,
    serve: Any,
    story: Any,
    photo: Path,
    wave: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    """What is wrong with the command is found before anything is sent, said on stderr, and exits with 2."""
    monkeypatch.chdir(tmp_path)
    server = serve(story.whole())
    given = [{"PHOTO": str(photo), "WAVE": str(wave)}.get(argument, argument) for argument in arguments]
    done = nst("stylize", *given, address=server.address)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert server.requests == []


OUR_WORD = ErrorInfo(reason="R", domain="nst")
STATUSES: list[Any] = [
    (CODE.INVALID_ARGUMENT, "iterations must be at least 1, not 0", 2, "nst: iterations must be at least 1, not 0\n"),
    (CODE.NOT_FOUND, "there is no styles/x", 2, "nst: there is no styles/x\n"),
    (CODE.FAILED_PRECONDITION, "vgg19 is not fetched", 1, "nst: vgg19 is not fetched\n"),
    (CODE.RESOURCE_EXHAUSTED, "the queue is full", 3, "nst: the queue is full; try again in 7 s\n"),
    (CODE.UNAVAILABLE, "stopping", 3, "is not available: stopping; try again in 1 h 56 min\n"),
    (CODE.INTERNAL, "oh", 1, "failed with INTERNAL: oh\n"),
]


@pytest.mark.parametrize(("code", "words", "exit_code", "message"), STATUSES)
def test_the_servers_errors_have_exit_codes(
    *,
    nst: Any,
    serve: Any,
    story: Any,
    aborted: Any,
    photo: Path,
    wave: Path,
    code: Any,
    words: str,
    exit_code: int,
    message: str,
) -> None:
    """What the server says reaches the person, in one line, with an exit code that a script can act on."""
    details = [OUR_WORD]
    if exit_code == 3:
        # More than anybody's patience, where the server may come back.
        seconds = 7000 if code is CODE.UNAVAILABLE else 7
        details.append(RetryInfo(retry_delay=Duration(seconds=seconds)))
    server = serve(story.then(aborted(code, words, *details)))
    done = nst("stylize", photo, wave, "-o", photo.with_name("o.png"), address=server.address)
    assert (done.exit_code, done.stdout) == (exit_code, "")
    assert done.stderr.endswith(message)
    assert not photo.with_name("o.png").exists()


def test_failed_job_exits_with_1(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """A job that failed says why, and an old picture stays as it was."""
    out = photo.with_name("o.png")
    out.write_bytes(b"old")
    error = {"code": 8, "reason": "OUT_OF_MEMORY", "message": "too little memory for 4096 px"}
    server = serve(story.snapshot().state("FAILED", error=error))
    done = nst("stylize", photo, wave, "-o", out, address=server.address)
    assert done.exit_code == 1
    assert done.stderr.endswith("nst: too little memory for 4096 px\n")
    assert out.read_bytes() == b"old"


def test_unreachable_server_exits_with_3(photo: Path, wave: Path) -> None:
    """Without a server: the address, what to do, exit code 3, and no word of gRPC's own log."""
    with closing(socket.create_server(("localhost", 0))) as free:
        address = f"localhost:{free.getsockname()[1]}"
    code, out, err = ended(spawned("stylize", photo, wave, "-o", photo.with_name("o.png"), address=address))
    assert (code, out) == (3, b"")
    first, second = err.splitlines()
    assert first.startswith(f"nst: cannot reach a server at {address}")
    assert second == "nst-server starts a server; --server or NST_SERVER names another"


def test_server_that_does_not_come_back_exits_with_3(
    nst: Any, serve: Any, story: Any, photo: Path, wave: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that goes away is waited for, for a while; then the job is named, and what takes it up again."""
    monkeypatch.setattr(cli, "Client", functools.partial(Client, patience_s=0.5))
    server = serve(story.snapshot().progress(0).then(30))
    threading.Timer(0.5, server.grpc_server.stop, [0]).start()
    done = nst("stylize", photo, wave, "-o", photo.with_name("o.png"), address=server.address)
    assert done.exit_code == 3
    *shown, sentence, advice = done.stderr.splitlines()
    assert "connection lost, trying again" in shown
    assert sentence.startswith("nst: ")
    assert sentence.endswith("jobs/j1 may still be running")
    assert advice == "`nst jobs watch jobs/j1 -o OUT` takes it up again"


def test_mistake_of_ours_is_a_sentence(nst: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A bug shows no traceback unless NST_DEBUG is set."""

    def fail() -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", fail)
    for debug, traceback_shown in (("", False), ("1", True)):
        monkeypatch.setenv("NST_DEBUG", debug)
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err
        assert left.value.code == 1
        assert "nst: internal error: KeyError: 'a bug' (NST_DEBUG=1 shows where)" in said
        assert ("Traceback" in said) == traceback_shown


def test_disk_that_is_full(nst: Any, serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """A picture that cannot be written is a sentence and exit code 1."""
    server = serve(story.whole())
    done = nst("stylize", photo, wave, "-o", "/dev/full", "--output-format", "png", "-q", address=server.address)
    assert (done.exit_code, done.stderr) == (1, "nst: No space left on device: '/dev/full'\n")


# Help


def test_help_names_the_exit_codes(nst: Any) -> None:
    """`nst --help` says what a script needs to know."""
    done = nst("--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    for phrase in (
        "0 done",
        "1 the job or the server failed",
        "2 the usage",
        "3 the server cannot be",
        "130 interrupted",
    ):
        assert phrase in text


def test_version(nst: Any) -> None:
    """`nst --version` prints the installed version."""
    assert nst("--version").stdout == f"nst {importlib.metadata.version('nst-service')}\n"


# Styles, models, options


class Shelf(style_service_pb2_grpc.StyleServiceServicer):
    """Knows one style."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.sea = style_service_pb2.Style(name="styles/sea", display_name="The [sea]")
        self.sea.images.add(sha256="ab" * 32, width=8, height=6, weight=2)
        self.sea.create_time.FromSeconds(1_700_000_000)
        self.sea.prepared.add(model="models/tiny", size_px=512, layers=["relu1_1", "relu2_1"])

    def CreateStyle(self, request: Any, _context: Any) -> Any:  # noqa: N802
        """Create it."""
        self.requests.append(request)
        return self.sea

    def GetStyle(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Show it."""
        if request.name != "sea":
            context.abort(CODE.NOT_FOUND, f"there is no styles/{request.name}")
        return self.sea

    def ListStyles(self, _request: Any, _context: Any) -> Any:  # noqa: N802
        """List it."""
        return style_service_pb2.ListStylesResponse(styles=[self.sea])

    def DeleteStyle(self, request: Any, _context: Any) -> Any:  # noqa: N802
        """Delete it."""
        self.requests.append(request)
        return Empty()


def test_styles_create(nst: Any, serve: Any, photo: Path, wave: Path) -> None:
    """`nst styles create` prints the name alone, so that a script can use it."""
    shelf = Shelf()
    arguments = ["styles", "create", photo, f"{wave}@3", "--id", "sea", "--display-name", "The sea"]
    done = nst(*arguments, address=serve(shelf).address)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "styles/sea\n", "")
    [request] = shelf.requests
    assert (request.style_id, request.style.display_name) == ("sea", "The sea")
    assert [image.weight for image in request.style.images] == [0, 3]


def test_styles_list_show_delete(nst: Any, serve: Any) -> None:
    """The other commands of `nst styles`, for people and as JSON."""
    shelf = Shelf()
    address = serve(shelf).address
    listed = nst("styles", "list", address=address).stdout
    assert "styles/sea" in listed
    assert "The [sea]" in listed
    assert "2023-11-14 22:13 UTC" in listed
    shown = nst("styles", "show", "sea", address=address).stdout.splitlines()
    assert shown[3] == f"image 8×6, weight 2, sha256 {'ab' * 32}"
    assert shown[4] == "prepared for models/tiny at 512 px: relu1_1, relu2_1"
    for command in (["list"], ["show", "sea"]):
        [line] = nst("styles", *command, "--json", address=address).stdout.splitlines()
        assert json.loads(line)["name"] == "styles/sea"
    assert nst("styles", "delete", "sea", address=address).exit_code == 0
    assert shelf.requests[-1].name == "sea"
    missing = nst("styles", "show", "moon", address=address)
    assert (missing.exit_code, missing.stderr) == (2, "nst: there is no styles/moon\n")


def test_models(nst: Any, serve: Any) -> None:
    """`nst models` shows which there are, which is the default, and which can be used."""

    class Models(model_service_pb2_grpc.ModelServiceServicer):
        def ListModels(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            layers = [model_service_pb2.Layer(name=name) for name in ("relu1_1", "relu5_4")]
            return model_service_pb2.ListModelsResponse(
                models=[
                    model_service_pb2.Model(name="models/a", state="MODEL_STATE_AVAILABLE", is_default=True),
                    model_service_pb2.Model(name="models/b", state="MODEL_STATE_NOT_FETCHED", layers=layers),
                ]
            )

    address = serve(Models()).address
    shown = nst("models", address=address).stdout
    assert "models/a (default)" in shown
    assert "not fetched" in shown
    assert "relu1_1 … relu5_4" in shown
    assert [json.loads(line)["name"] for line in nst("models", "--json", address=address).stdout.splitlines()] == [
        "models/a",
        "models/b",
    ]


def test_options(nst: Any, serve: Any) -> None:
    """`nst options` shows flags, defaults and bounds, and the presets by the flags that would do the same."""

    class Describer(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
        def DescribeOptions(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            kinds = options_pb2.OptionType
            size = options_pb2.OptionDescription(
                name="size_px", type=kinds.OPTION_TYPE_INTEGER, minimum=16, maximum=4096, unit="px"
            )
            size.default_value.CopyFrom(Value(number_value=512))
            init = options_pb2.OptionDescription(
                name="init", type=kinds.OPTION_TYPE_CHOICE, choices=["content", "noise"], description="Start [here]."
            )
            init.default_value.CopyFrom(Value(string_value="content"))
            exact = options_pb2.OptionDescription(name="deterministic", type=kinds.OPTION_TYPE_BOOLEAN)
            exact.default_value.CopyFrom(Value(bool_value=True))
            scales = options_pb2.OptionDescription(
                name="scale_iterations", type=kinds.OPTION_TYPE_INTEGERS, minimum=1, maximum=100
            )
            scales.default_value.CopyFrom(Value(list_value=ListValue()))
            same = options_pb2.StylizeOptions(
                size_px=512, init="INIT_CONTENT", deterministic=True, preset="PRESET_FINE"
            )
            changed = options_pb2.StylizeOptions(
                size_px=256,
                init="INIT_CONTENT",
                deterministic=False,
                preset="PRESET_GATYS",
                scale_iterations=[9, 5],
                style_layers={"relu1_1": 2, "relu2_1": 0.5},
            )
            describe = style_transfer_service_pb2.PresetDescription
            return style_transfer_service_pb2.DescribeOptionsResponse(
                options=[size, init, exact, scales],
                presets=[
                    describe(name="fine", description="The [best].", options=same),
                    describe(name="gatys", description="The paper.", options=changed),
                ],
            )

    address = serve(Describer()).address
    shown = " ".join(nst("options", address=address).stdout.split())
    assert "--size-px 512 16 to 4096 px" in shown
    assert "--init content content, noise Start [here]." in shown
    assert "--deterministic true true, false" in shown
    assert "--scale-iterations none 1 to 100" in shown
    changes = "--size-px 256 --style-layers relu1_1=2,relu2_1=0.5 --scale-iterations 9,5 --no-deterministic"
    assert "fine The [best]. nothing" in shown
    assert f"gatys The paper. {changes}" in shown
    lines = [json.loads(line) for line in nst("options", "--json", address=address).stdout.splitlines()]
    assert [line["name"] for line in lines] == ["size_px", "init", "deterministic", "scale_iterations", "fine", "gatys"]
    assert (lines[0]["default"], lines[0]["type"]) == (512, "integer")
    assert (lines[2]["default"], lines[3]["default"]) == (True, [])
    assert (lines[5]["options"]["size_px"], lines[5]["options"]["scale_iterations"]) == (256, [9, 5])


def test_options_of_a_server_without_presets(nst: Any, serve: Any) -> None:
    """Where there are none, there is no table of them."""

    class Describer(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
        def DescribeOptions(self, _request: Any, _context: Any) -> Any:  # noqa: N802
            return style_transfer_service_pb2.DescribeOptionsResponse()

    done = nst("options", address=serve(Describer()).address)
    assert (done.exit_code, "preset" in done.stdout) == (0, False)
