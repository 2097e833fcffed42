"""The server's settings: from the command line, else from the environment (`NST_…`), else from a TOML file."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import platformdirs
from pydantic import Field, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from nst_model import CARDS, DEFAULT_MODEL

ENVIRONMENT_PREFIX = "NST_"

BLOBS = ("s3://", "gs://", "az://", "file://")
DATABASES = ("postgresql://", "postgres://", "sqlite:///")


class Settings(BaseSettings):
    """Every setting of the server. The descriptions are what `nst-server --help` prints."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid")

    config: Path | None = Field(
        None, description="TOML file with any of these settings, `queue_size = 4` for instance."
    )
    listen: str = Field("localhost:50051", description="Address and port to listen on; port 0 takes a free one.")
    data_dir: Path = Field(
        platformdirs.user_data_path("nst"),
        description="Folder of jobs, images, stored styles, their Gram matrices and exports; made if it is not there. "
        "One server uses it at a time.",
    )
    database: str = Field(
        "",
        description="URL of the database of jobs, `postgresql://…`; by default an SQLite file in the data folder.",
    )
    blobs: str = Field(
        "",
        description="URL of where images and checkpoints are kept, `s3://…`, `gs://…`, `az://…`, `file://…`; "
        "by default the data folder.",
    )
    checkpoint_interval_s: float = Field(
        5, ge=0.1, le=3600, description="A running job's state is kept this often at most, seconds."
    )
    ephemeral: bool = Field(
        default=False, description="Keep jobs, images and checkpoints in memory only: they end with the server."
    )
    keep_days: float = Field(
        30,
        ge=0,
        le=36_500,
        description="A job is deleted so many days after it ended or was paused; 0 keeps it for ever.",
    )
    keep_gib: float = Field(
        20,
        ge=0,
        le=1_000_000,
        description="Images, uploads and checkpoints may take so much together, GiB: what nobody holds goes, then "
        "jobs that ended or are paused, the oldest first; what comes is refused if that is not enough. 0 for no limit.",
    )
    devices: list[str] = Field(
        ["auto"],
        min_length=1,
        description='Devices to compute on, one worker process each: `["cuda:0", "cuda:1"]`, `["cpu"]`, `["mps"]`. '
        "`auto` means every CUDA device, else Apple's GPU, else the CPU.",
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of each worker; 0 leaves the choice to PyTorch.")
    default_model: str = Field(
        DEFAULT_MODEL, description=f"Feature model of requests that name none: {', '.join(CARDS)}."
    )
    weights: dict[str, Path] = Field(
        {}, description='Files of feature weights by model, used in place of the cache: `{"vgg19": "/path/vgg19.pth"}`.'
    )
    queue_size: int = Field(16, ge=0, le=10_000, description="Jobs that may wait; one more is refused, with RetryInfo.")
    max_message_mib: int = Field(32, ge=4, le=1024, description="Largest request, MiB.")
    max_image_mib: int = Field(256, ge=1, le=1024, description="Largest image file that may be uploaded in parts, MiB.")
    max_megapixels: int = Field(100, ge=1, le=1000, description="Largest picture a request may bring, million pixels.")
    max_size_px: int = Field(4096, ge=16, le=4096, description="Largest `size_px` a job may ask for, pixels.")
    memory_gib: float = Field(
        0,
        ge=0,
        le=100_000,
        description="Memory that a job may take of its device, GiB; one that would take more is refused. "
        "0 stands for what the device has.",
    )
    max_streams: int = Field(1000, ge=1, le=100_000, description="Streams served at once; one more is refused.")
    gram_cache_mib: int = Field(
        1024, ge=16, le=1_048_576, description="Disk space for Gram matrices, MiB; the oldest go first."
    )
    export_cache_mib: int = Field(
        1024, ge=1, le=1_048_576, description="Disk space for exported files, MiB; those not used for longest go first."
    )
    write_timeout_s: float = Field(
        60,
        ge=1,
        le=86_400,
        description="How long a client may leave its request unfinished or its stream unread, seconds.",
    )
    grace_s: float = Field(
        15,
        ge=0,
        le=86_400,
        description="How long a stop takes at most after SIGTERM, seconds. Running jobs may go on for all of it but "
        "the last 4 s (or half of it, if that is less).",
    )
    log_format: Literal["console", "json"] = Field("console", description="How the log is written.")

    _toml: ClassVar[Path | None] = None

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        for name in ("database", "blobs"):
            if self.ephemeral and getattr(self, name):
                raise ValueError(f"ephemeral keeps everything in memory and must not go with {name}")
        if self.blobs and not self.blobs.startswith(BLOBS):
            raise ValueError(f"blobs must be {', '.join(f'{scheme}…' for scheme in BLOBS)}, not {self.blobs!r}")
        if self.database and not self.database.startswith(DATABASES):
            raise ValueError(f"database must be postgresql://… or sqlite:///…, not {self.database.split('@')[-1]!r}")
        if self.database and not self.blobs:
            raise ValueError("database needs blobs: servers that share one must share the other, s3://… or file://…")
        return self

    @field_validator("default_model")
    @classmethod
    def _known_model(cls, name: str) -> str:
        if name not in CARDS:
            raise ValueError(f"no feature model is called {name!r}; there are {', '.join(CARDS)}")
        return name

    @field_validator("weights")
    @classmethod
    def _known_models(cls, weights: dict[str, Path]) -> dict[str, Path]:
        for name, file in weights.items():
            cls._known_model(name)
            if not file.is_file():
                raise ValueError(f"{file}, the weights of {name}, does not exist")
        return weights

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic passes it by name
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Rank the sources: arguments, environment, file."""
        return (init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=cls._toml))


def load_settings(arguments: Sequence[str]) -> Settings:
    """Return the settings for a command line. Exits with a message for `--help` and for malformed arguments.

    Raises FileNotFoundError for a `--config` that is not there, SettingsError for one that is no TOML, and pydantic's
    ValidationError.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path, default=os.environ.get(ENVIRONMENT_PREFIX + "CONFIG"))
    config = early.parse_known_args(arguments)[0].config
    if config is not None and not Path(config).is_file():
        raise FileNotFoundError(f"config: {config} does not exist")

    class FromFile(Settings):
        _toml: ClassVar[Path | None] = config

    FromFile.__doc__ = Settings.__doc__
    try:
        return FromFile(_cli_settings_source=_command_line(FromFile)(args=list(arguments)))  # type: ignore[call-arg]
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"config: {config} is no TOML: {error}") from error


def _command_line(settings: type[Settings]) -> CliSettingsSource[argparse.ArgumentParser]:
    return CliSettingsSource(
        settings,
        cli_prog_name="nst-server",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_avoid_json=False,
        cli_implicit_flags=True,
        root_parser=argparse.ArgumentParser(
            prog="nst-server",
            description="Neural style transfer as a gRPC service. Each setting may also come from the environment "
            "(NST_QUEUE_SIZE=4) or from a TOML file named by --config (queue_size = 4); the command line goes first.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
    )
