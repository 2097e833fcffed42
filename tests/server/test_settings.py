"""Settings: from the command line, the environment and a file; and what is said of wrong ones."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nst_server import Settings
from nst_server.__main__ import main
from nst_server.settings import load_settings


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `nst-server` to its end."""
    command = [sys.executable, "-m", "nst_server", *arguments]
    environment = {**os.environ, "COLUMNS": "100"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what runs `nst-server` with arguments it refuses, and returns the one line that it says."""

    def main_of(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["nst-server", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 2
        written = capsys.readouterr()
        assert not written.out
        assert written.err.startswith("nst-server: ")
        assert written.err.count("\n") == 1
        return written.err.removeprefix("nst-server: ")

    return main_of


def test_help_names_and_describes_every_setting() -> None:
    """One flag for each field of Settings, with its description; exit code 0."""
    finished = run("--help")

    assert finished.returncode == 0
    words = " ".join(finished.stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in words
        assert field.description
        assert " ".join(field.description.split()) in words
    assert "NST_QUEUE_SIZE" in words
    assert "lambda" not in words


def test_defaults_are_in_force_when_nothing_is_said() -> None:
    """A loopback address, a queue of 16, all devices that are there."""
    settings = load_settings([])
    assert settings.listen == "localhost:50051"
    assert settings.queue_size == 16
    assert settings.devices == ["auto"]
    assert settings.data_dir.name == "nst"


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each source alone is heard, and where several speak the first of them wins."""
    file = tmp_path / "nst.toml"
    file.write_text('queue_size = 1\ngrace_s = 1\nthreads = 1\ndevices = ["cpu"]\n')
    monkeypatch.setenv("NST_GRACE_S", "2")
    monkeypatch.setenv("NST_THREADS", "2")

    settings = load_settings([f"--config={file}", "--threads=3"])

    assert (settings.queue_size, settings.grace_s, settings.threads) == (1, 2, 3)
    assert settings.devices == ["cpu"]


def test_the_file_may_be_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NST_CONFIG does what --config does, which goes first."""
    for name, size in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"queue_size = {size}")
    monkeypatch.setenv("NST_CONFIG", str(tmp_path / "a"))
    assert load_settings([]).queue_size == 1
    assert load_settings(["--config", str(tmp_path / "b")]).queue_size == 2


def test_lists_and_tables_come_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices and weights: repeated or as JSON on the command line, as JSON in the environment, as TOML in the file."""
    weights = tmp_path / "w.pth"
    weights.touch()
    assert load_settings(["--devices=cpu", "--devices=cuda:0"]).devices == ["cpu", "cuda:0"]
    assert load_settings(['--devices=["cpu", "mps"]']).devices == ["cpu", "mps"]
    assert load_settings([f"--weights=vgg19={weights}"]).weights == {"vgg19": weights}
    monkeypatch.setenv("NST_DEVICES", '["cuda:1"]')
    monkeypatch.setenv("NST_WEIGHTS", f'{{"vgg16": "{weights}"}}')
    assert load_settings([]).devices == ["cuda:1"]
    assert load_settings([]).weights == {"vgg16": weights}
    file = tmp_path / "nst.toml"
    file.write_text(f'[weights]\nvgg19 = "{weights}"\n')
    monkeypatch.delenv("NST_WEIGHTS")
    assert load_settings([f"--config={file}"]).weights == {"vgg19": weights}


def test_other_variables_that_begin_alike_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """NST_CACHE_DIR belongs to the core, and others may have theirs."""
    monkeypatch.setenv("NST_CACHE_DIR", "/somewhere")
    monkeypatch.setenv("NST_COLOUR", "red")
    load_settings([])


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["--queue-size=many"], {}, "queue_size: Input should be a valid integer"),
        (["--queue-size=-1"], {}, "queue_size: Input should be greater than or equal to 0"),
        ([], {"NST_GRACE_S": "-1"}, "grace_s: Input should be greater than or equal to 0"),
        ([], {"NST_DEVICES": "cpu"}, 'error parsing value for field "devices"'),
        (["--default-model=vgg99"], {}, "default_model: no feature model is called 'vgg99'; there are vgg16-hed"),
        (["--weights=vgg19=/none/such.pth"], {}, "weights: /none/such.pth, the weights of vgg19, does not exist"),
        (["--log-format=xml"], {}, "log_format: Input should be 'console' or 'json'"),
        (["--config=/none/such.toml"], {}, "config: /none/such.toml does not exist"),
    ],
)
def test_a_bad_value_is_one_line_that_names_the_setting(
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    line: str,
) -> None:
    """Exit code 2, wherever the value came from; no traceback."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert refused(*arguments).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("queue_size = ", "config: {file} is no TOML"),
        ("colour = 'red'", "colour: Extra inputs are not permitted"),
        ("queue_size = 'x'", "queue_size: Input should be a valid integer"),
        ("\udcff", "config: {file} is no TOML"),
    ],
)
def test_a_bad_file_is_one_line(refused: Callable[..., str], tmp_path: Path, text: str, line: str) -> None:
    """Exit code 2; what is wrong in the file is named."""
    file = tmp_path / "nst.toml"
    file.write_text(text, errors="surrogateescape")
    assert refused(f"--config={file}").startswith(line.format(file=file))


def test_an_unknown_flag_is_an_error() -> None:
    """Exit code 2, and the flag is named."""
    finished = run("--colour=red")
    assert finished.returncode == 2
    assert "--colour" in finished.stderr


@pytest.mark.parametrize("listen", ["nonsense", "no-such-host.invalid:50051", "localhost:123456"])
def test_an_address_that_cannot_be_had_is_one_line(tmp_path: Path, listen: str) -> None:
    """Exit code 1, and the address is named."""
    finished = run(f"--listen={listen}", f"--data-dir={tmp_path}")
    assert finished.returncode == 1
    assert finished.stderr.startswith(f"nst-server: cannot listen on {listen}: ")
    assert finished.stderr.count("\n") == 1
