"""`nst jobs`, `nst stylize --detach`, and what becomes of a job when its watcher leaves. A real server behind it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import ErrorInfo
from PIL import Image
from typer.testing import CliRunner

from nst.v1 import image_pb2, image_service_pb2_grpc, job_pb2, style_transfer_service_pb2_grpc
from nst_client import cli
from nst_client.options import OPTIONS
from nst_client.requests import STEERABLE

NST = [sys.executable, "-c", "from nst_client.cli import main; main()"]
CODE = grpc.StatusCode


@pytest.fixture
def nst(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object, address: str) -> Any:
        monkeypatch.setenv("NST_SERVER", address)
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])

    return run


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments: object, address: str, columns: int = 100) -> None:
        self._primary, secondary = os.openpty()
        environment = {**os.environ, "NST_SERVER": address, "TERM": "xterm-256color", "COLUMNS": str(columns)}
        command = [*NST, *map(str, arguments)]
        ends = {"stdin": secondary, "stdout": secondary, "stderr": secondary}
        self.process = subprocess.Popen(command, **ends, env=environment)
        os.close(secondary)
        self.text = ""

    def shows(self, text: str, *, seconds: float = 10) -> None:
        """Wait until the terminal shows a text, and forget what came until then."""
        self._read(seconds, until=text)
        assert text in self.text, self.text
        self.text = self.text.partition(text)[2]

    def press_ctrl_c(self) -> None:
        """Send what Ctrl-C sends."""
        self.process.send_signal(signal.SIGINT)

    def type(self, text: str) -> None:
        """Type a text."""
        os.write(self._primary, text.encode())

    def ended(self) -> tuple[int, str]:
        """Return the exit code and what the terminal shows at the end."""
        try:
            code = self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
        self._read(0.1, until="\0")
        os.close(self._primary)
        return code, self.text.replace("\r\n", "\n")

    def _read(self, seconds: float, *, until: str) -> None:
        deadline = time.monotonic() + seconds
        while until not in self.text and (rest := deadline - time.monotonic()) > 0:
            if select.select([self._primary], [], [], rest)[0]:
                try:
                    self.text += os.read(self._primary, 1 << 16).decode(errors="ignore")
                except OSError:
                    return


@pytest.fixture
def running(serve: Any, story: Any) -> Any:
    """Return a server whose job runs for long."""
    return serve(story.snapshot().state("RUNNING", device="cpu").progress(1).then(30))


# Detached


def test_detach_prints_the_name(nst: Any, running: Any, photo: Path, wave: Path) -> None:
    """`--detach` creates the job, prints its name and nothing else, and leaves it running."""
    done = nst(
        "stylize", photo, wave, "--detach", "--iterations", 7, "--output-format", "jpeg", address=running.address
    )
    assert (done.exit_code, done.stdout, done.stderr) == (0, "jobs/j1\n", "")
    (request,) = running.requests
    assert (request.options.iterations, request.output.format) == (7, 1)
    # Whoever watches the job may want frames.
    assert not request.preview.HasField("interval")
    assert [type(call).__name__ for call in running.calls] == ["CreateJobRequest"]


def test_detach_as_json(nst: Any, running: Any, photo: Path, wave: Path) -> None:
    """`--detach --json` prints the whole job."""
    done = nst("stylize", photo, wave, "--detach", "--json", address=running.address)
    job = json.loads(done.stdout)
    assert (job["name"], job["state"], job["result"]) == ("jobs/j1", "queued", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "o.png"], "writes no picture: leave out --out"),
        (["--save-frames", "frames"], "watches no frames"),
        (["--animation", "a.gif"], "watches no frames"),
        (["--timeout", "3"], "waits for nothing"),
    ],
)
def test_what_does_not_go_with_detach(
    nst: Any, running: Any, photo: Path, wave: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    """What needs somebody who watches is refused before anything is sent."""
    done = nst("stylize", photo, wave, "--detach", *arguments, address=running.address)
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.replace("│", "").split())
    assert running.calls == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.png", "wave.jpg"]


# Jobs


def test_jobs_list(nst: Any, running: Any, photo: Path, wave: Path) -> None:
    """A table for people, JSON for programs, states by name."""
    nst("stylize", photo, wave, "--detach", "-q", address=running.address)
    done = nst("jobs", "list", "--state", "running", "--state", "paused", address=running.address)
    assert done.exit_code == 0
    assert "name" in done.stdout
    assert "queued, next" in done.stdout
    assert list(running.asked("ListJobs")[0].states) == [2, 6]
    job = json.loads(nst("jobs", "list", "--json", address=running.address).stdout)
    assert job["name"] == "jobs/j1"
    done = nst("jobs", "list", "--state", "asleep", address=running.address)
    assert done.exit_code == 2
    assert "must be one of queued, running, succeeded, failed, cancelled, paused, not 'asleep'" in done.stderr


def test_names_are_whole_in_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What people copy is never cut."""
    monkeypatch.setattr(cli, "PIPE_WIDTH", 50)
    name = f"jobs/{'a' * 32}"
    cli._print_table(("name", "state", "iteration"), [(name, "running on cuda:0", "1000/3000")])
    assert name in capsys.readouterr().out


def test_jobs_show(nst: Any, serve: Any, story: Any) -> None:
    """One job in a few lines: state, numbers, size, times, options as flags."""
    done = nst("jobs", "show", "j1", address=serve(story.whole()).address)
    lines = done.stdout.splitlines()
    assert lines[:3] == ["jobs/j1", "queued, next", "8×6, models/tiny"]
    assert lines[3] == "created 2023-11-14 22:13 UTC"
    assert lines[4] == "options --iterations 4 --style-layers relu1_1=1 --init noise"
    assert (
        json.loads(nst("jobs", "show", "jobs/j1", "--json", address=os.environ["NST_SERVER"]).stdout)["sequence"] == 0
    )


def test_jobs_cancel_pause_resume_update_delete(nst: Any, running: Any) -> None:
    """Each says in a line how the job stands afterwards; delete says nothing."""
    said = {
        ("cancel",): "jobs/j1 cancelled\n",
        ("pause",): "jobs/j1 paused\n",
        ("resume",): "jobs/j1 queued, next\n",
        ("update", "--content-weight", "2", "--scale-iterations", "9,5", "--finish"): "jobs/j1 queued, next\n",
        ("delete",): "",
    }
    for (verb, *options), line in said.items():
        done = nst("jobs", verb, "j1", *options, address=running.address)
        assert (done.exit_code, done.stdout) == (0, line), done.stderr
    pause, resume, update = running.asked("UpdateJob")
    assert (pause.paused, resume.paused, update.HasField("paused")) == (True, False, False)
    assert (update.options.content_weight, list(update.options.scale_iterations), update.finish) == (2, [9, 5], True)
    assert json.loads(nst("jobs", "pause", "j1", "--json", address=running.address).stdout)["state"] == "paused"


def test_jobs_update_offers_what_can_be_changed(nst: Any, running: Any) -> None:
    """There is a flag for each option that a job may be given anew, and for no other; one at least is to be given."""
    from nst_model import options

    assert options.STEERABLE == STEERABLE
    shown = nst("jobs", "update", "--help", address=running.address).stdout
    flags = {f"--{name.replace('_', '-')} " for name in STEERABLE}
    others = {f"--{field.name.replace('_', '-')} " for field in OPTIONS.fields} - flags
    assert all(flag in shown for flag in flags)
    assert not any(flag in shown for flag in others)
    done = nst("jobs", "update", "j1", address=running.address)
    assert done.exit_code == 2
    assert "name an option to change, or --finish" in done.stderr
    assert running.calls == []


def test_jobs_watch(nst: Any, serve: Any, story: Any, tmp_path: Path) -> None:
    """A job is watched to its end, and its picture written, in another format if OUT says so."""
    server = serve(story.whole())
    done = nst("jobs", "watch", "j1", "-o", tmp_path / "o.jpg", address=server.address)
    assert done.exit_code == 0, done.stderr
    assert done.stderr.splitlines()[-2:] == ["succeeded", f"wrote {tmp_path}/o.jpg: 8×6, iteration 4, loss 0.125"]
    with Image.open(tmp_path / "o.jpg") as image:
        assert image.format == "JPEG"
    (watch,) = server.asked("WatchJob")
    assert (watch.name, watch.preview.interval, watch.preview.HasField("interval")) == ("jobs/j1", 0, True)


def test_jobs_watch_as_json(nst: Any, serve: Any, story: Any) -> None:
    """`--json` and `--after`, for scripts that take a job up again; without OUT nothing is written."""
    server = serve(story.after(3).snapshot().progress(2).result().state("SUCCEEDED"))
    done = nst("jobs", "watch", "j1", "--json", "--after", 3, address=server.address)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["sequence"] for event in events] == [3, 4, 5, 6]
    assert server.asked("WatchJob")[0].after_sequence == 3
    assert done.stderr == ""
    done = nst("jobs", "watch", "j1", "--json", "-o", "-", address=server.address)
    assert (done.exit_code, done.stdout) == (2, "")


def test_jobs_download(nst: Any, serve: Any, story: Any, tmp_path: Path) -> None:
    """A picture that is there is written; of one that is not, it is said why."""
    server = serve(story.whole())
    done = nst("jobs", "download", "j1", "-o", tmp_path / "o.png", address=server.address)
    assert done.exit_code == 1
    waiting = f"`nst jobs watch jobs/j1 -o {tmp_path}/o.png` waits for it"
    assert done.stderr == f"nst: jobs/j1 has no picture: it is queued; {waiting}\n"


class OneJob(style_transfer_service_pb2_grpc.StyleTransferServiceServicer):
    """Has one job that has ended."""

    def __init__(self, job: job_pb2.Job) -> None:
        self._job = job

    def GetJob(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """Return it."""
        return self._job


class OneImage(image_service_pb2_grpc.ImageServiceServicer):
    """Has one image."""

    def __init__(self, parts: list[image_pb2.ImagePart]) -> None:
        self._parts = parts

    def DownloadImage(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802, ARG002
        """Send it."""
        return iter(self._parts)


def test_jobs_download_of_what_is_there(
    nst: Any, serve: Any, story: Any, parts: Any, picture: Any, tmp_path: Path
) -> None:
    """The file is written as it is, or encoded anew if OUT names another format."""
    pieces = parts(picture(), "PNG", 3)
    kept = {
        "image": f"images/{pieces[-1].sha256}",
        "iteration": 4,
        "loss": 0.125,
        "stop_reason": "STOP_REASON_FINISHED",
    }
    server = serve(OneJob(story.job("SUCCEEDED", result=kept)), OneImage(pieces))
    for name, kind in (("o.png", "PNG"), ("o.jpg", "JPEG")):
        done = nst("jobs", "download", "j1", "-o", tmp_path / name, address=server.address)
        assert done.exit_code == 0, done.stderr
        assert done.stderr == f"wrote {tmp_path}/{name}: 8×6, iteration 4 (finished), loss 0.125\n"
        with Image.open(tmp_path / name) as image:
            assert image.format == kind
    assert (tmp_path / "o.png").read_bytes() == picture()


def test_jobs_download_of_a_job_that_failed(nst: Any, serve: Any, story: Any, tmp_path: Path) -> None:
    """A job that failed says why; so does `show`."""
    error = {"code": 8, "reason": "OUT_OF_MEMORY", "message": "too little memory for 4096 px"}
    server = serve(OneJob(story.job("FAILED", error=error, attempt=3)))
    done = nst("jobs", "download", "j1", "-o", tmp_path / "o.png", address=server.address)
    assert (done.exit_code, done.stderr) == (1, "nst: jobs/j1 failed: too little memory for 4096 px\n")
    shown = nst("jobs", "show", "j1", address=server.address).stdout.splitlines()
    assert shown[1] == "failed"
    assert "attempt 3" in shown
    assert "OUT_OF_MEMORY: too little memory for 4096 px" in shown


def test_errors_of_jobs(nst: Any, serve: Any, story: Any, aborted: Any) -> None:
    """A job that is not there is a mistake in the command."""
    server = serve(story.then(aborted(CODE.NOT_FOUND, "name: there is no job 'j9'", ErrorInfo(reason="NOT_FOUND"))))
    done = nst("jobs", "watch", "j9", address=server.address)
    assert (done.exit_code, done.stderr) == (2, "nst: name: there is no job 'j9'\n")


# Leaving


@pytest.fixture
def stylizing(running: Any, photo: Path, wave: Path) -> Iterator[Terminal]:
    """Return a terminal in which a job is being made."""
    terminal = Terminal("stylize", photo, wave, "-o", photo.with_name("o.png"), address=running.address)
    terminal.shows("running on cpu, 1/4")
    yield terminal
    terminal.process.kill()
    terminal.process.wait()


QUESTION = "jobs/j1: [c]ancel it, [l]eave it running, or [g]o on watching? "


def test_ctrl_c_asks_and_cancels(stylizing: Terminal, running: Any) -> None:
    """Ctrl-C asks; what is no answer is asked again; `c` cancels."""
    stylizing.press_ctrl_c()
    stylizing.shows(QUESTION)
    assert not running.cancelled.is_set()
    stylizing.type("what?\n")
    stylizing.shows(QUESTION)
    stylizing.type("C\n")
    code, text = stylizing.ended()
    assert code == 130
    assert text.endswith("interrupted: jobs/j1 is cancelled\n")
    assert running.cancelled.is_set()


def test_ctrl_c_asks_and_leaves(stylizing: Terminal, running: Any) -> None:
    """`l` leaves the job running, and says what takes it up again."""
    stylizing.press_ctrl_c()
    stylizing.shows(QUESTION)
    stylizing.type("l\n")
    code, text = stylizing.ended()
    assert code == 130
    assert text.endswith("interrupted: jobs/j1 goes on; `nst jobs watch jobs/j1 -o OUT` takes it up again\n")
    assert not running.cancelled.is_set()


def test_ctrl_c_asks_and_goes_on(serve: Any, tell: Any, photo: Path, wave: Path) -> None:
    """`g` goes on after the last event, and the picture is made."""
    server = serve(
        tell().snapshot().state("RUNNING", device="cpu").progress(1).then(30),
        tell().after(2).snapshot().progress(3).then(0.3).result().state("SUCCEEDED"),
    )
    terminal = Terminal("stylize", photo, wave, "-o", photo.with_name("o.png"), address=server.address)
    terminal.shows("1/4")
    terminal.press_ctrl_c()
    terminal.shows(QUESTION)
    terminal.type("g\n")
    terminal.shows("3/4")
    code, text = terminal.ended()
    assert code == 0, text
    assert photo.with_name("o.png").exists()
    assert [watch.after_sequence for watch in server.asked("WatchJob")] == [0, 2]
    assert not server.cancelled.is_set()


def test_second_ctrl_c_cancels(stylizing: Terminal, running: Any) -> None:
    """Who presses Ctrl-C twice wants out: of `nst stylize` with its job."""
    stylizing.press_ctrl_c()
    stylizing.shows(QUESTION)
    stylizing.press_ctrl_c()
    code, text = stylizing.ended()
    assert (code, running.cancelled.is_set()) == (130, True)
    assert text.endswith("interrupted: jobs/j1 is cancelled\n")


def test_second_ctrl_c_leaves_a_job_that_is_watched(running: Any) -> None:
    """Who presses Ctrl-C twice wants out: of `nst jobs watch` without its job."""
    watch_and_leave(running)


def watch_and_leave(running: Any) -> None:
    """Watch a job and press Ctrl-C twice: the command must end, and its job go on."""
    terminal = Terminal("jobs", "watch", "j1", address=running.address)
    terminal.shows("running on cpu, 1/4")
    terminal.press_ctrl_c()
    terminal.shows(QUESTION)
    terminal.press_ctrl_c()
    code, text = terminal.ended()
    assert (code, running.cancelled.is_set()) == (130, False)
    assert "jobs/j1 goes on" in text


LATE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/select.h>
#include <time.h>
#include <unistd.h>

static void late(void) {
    struct timespec left = {0, 500000000};
    while (nanosleep(&left, &left));
}

ssize_t read(int fd, void *to, size_t size) {
    if (fd == 0) late();
    return ((ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read"))(fd, to, size);
}

int select(int count, fd_set *in, fd_set *out, fd_set *odd, struct timeval *within) {
    if (in && FD_ISSET(0, in)) late();
    return ((int (*)(int, fd_set *, fd_set *, fd_set *, struct timeval *))dlsym(RTLD_NEXT, "select"))(
        count, in, out, odd, within);
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="how a library is put before the C library is Linux's affair")
def test_second_ctrl_c_counts_however_early(running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the process has begun to wait for the answer: here it waits half a second later than it would."""
    assert shutil.which("gcc"), "gcc is missing; install it: apt-get update && apt-get install -y g++"
    tmp_path.joinpath("late.c").write_text(LATE)
    subprocess.run(["gcc", "-shared", "-fPIC", "late.c", "-o", "late.so", "-ldl"], cwd=tmp_path, check=True)
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "late.so"))
    watch_and_leave(running)


def test_sigterm_asks_nobody(stylizing: Terminal, running: Any) -> None:
    """Whoever sends SIGTERM to a command in a terminal does not sit before it."""
    stylizing.process.terminate()
    code, text = stylizing.ended()
    assert (code, running.cancelled.is_set()) == (130, True)
    assert "[c]ancel" not in text
    assert text.endswith("interrupted: jobs/j1 is cancelled\n")


@pytest.mark.parametrize(("how", "cancels"), [("stylize", True), ("watch", False)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_leaving_without_a_terminal(
    running: Any, photo: Path, wave: Path, how: str, number: signal.Signals, cancels: bool
) -> None:
    """Where nobody can be asked `nst stylize` cancels its job and `nst jobs watch` leaves it, on SIGTERM as well."""
    out = photo.with_name("o.png")
    arguments = ["stylize", photo, wave, "-o", out] if how == "stylize" else ["jobs", "watch", "j1"]
    environment = {**os.environ, "NST_SERVER": running.address}
    process = subprocess.Popen([*NST, *map(str, arguments)], stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    while b"iteration 1/4" not in process.stderr.readline():
        pass
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, running.cancelled.is_set()) == (130, cancels)
    fate = "is cancelled" if cancels else "goes on; `nst jobs watch jobs/j1 -o OUT` takes it up again"
    assert said.decode() == f"nst: interrupted: jobs/j1 {fate}\n"


def test_interrupt_before_there_is_a_job(serve: Any, story: Any, photo: Path, wave: Path) -> None:
    """Ctrl-C while the job is being created: if it came to be, it is found by its request and cancelled."""
    server = serve(story.then(1.0).whole())
    environment = {**os.environ, "NST_SERVER": server.address}
    command = [*NST, "stylize", str(photo), str(wave), "-o", str(photo.with_name("o.png"))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
    while not server.requests:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (130, b"nst: interrupted\n")
    assert server.cancelled.is_set()


def test_lost_connection_is_shown(serve: Any, tell: Any, aborted: Any, photo: Path, wave: Path) -> None:
    """While the command waits for a server to come back, the bar says so, and goes on where it was."""
    broken = aborted(CODE.UNAVAILABLE, "Socket closed")
    server = serve(
        tell().snapshot().state("RUNNING", device="cpu").progress(1).then(0.5).then(broken),
        *(tell().then(broken) for _ in range(2)),
        tell().after(2).snapshot().progress(3).then(0.5).result().state("SUCCEEDED"),
    )
    terminal = Terminal("stylize", photo, wave, "-o", photo.with_name("o.png"), address=server.address)
    terminal.shows("running on cpu, 1/4")
    terminal.shows("connection lost, trying again")
    terminal.shows("running on cpu, 3/4")
    code, text = terminal.ended()
    assert code == 0, text
