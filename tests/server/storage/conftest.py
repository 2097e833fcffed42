"""A store in each kind of database, a real PostgreSQL among them, and an S3 endpoint on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from nst_server.storage.database import MEMORY, JobStore

ROOT = os.geteuid() == 0

ENDPOINT = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
input()
"""


def postgresql_program(name: str) -> str:
    """Return the path of one of PostgreSQL's programs, which Debian keeps off the PATH."""
    found = [str(file) for file in sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))]
    if program := shutil.which(name) or (found and found[-1]):
        return program
    pytest.fail("PostgreSQL is missing; on Debian: apt-get update && apt-get install -y postgresql")


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[..., None]]:
    """A PostgreSQL on a Unix socket of its own; what runs SQL in it. As root it would refuse to run."""
    postgresql_program("initdb")
    folder = Path(tempfile.mkdtemp(prefix="nst-", dir="/tmp"))  # a socket's path is at most 107 bytes long
    if ROOT:
        shutil.chown(folder, "postgres")
    # Not subprocess's own `user`, which forks this process, and with it gRPC's threads.
    prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if ROOT else []

    def run(name: str, *arguments: str) -> None:
        command = [*prefix, postgresql_program(name), *arguments]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr

    def sql(statement: str, database: str = "postgres") -> None:
        run("psql", "-h", str(folder), "-U", "postgres", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", statement)

    options = f"-k {folder} -c listen_addresses= -c max_connections=200 -c shared_buffers=16MB -c fsync=off"
    try:
        run(
            "initdb", "-D", f"{folder}/data", "-U", "postgres", "--auth=trust", "--no-sync", "-E", "UTF8", "--no-locale"
        )
        run("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            sql.folder = folder  # type: ignore[attr-defined]
            sql("CREATE DATABASE nst")
            yield sql
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def postgresql_url(postgresql: Any) -> str:
    """URL of a database in it, emptied: a new one for each test would take longer than the tests."""
    postgresql("ALTER DATABASE nst RESET ALL")
    postgresql("DROP SCHEMA public CASCADE; CREATE SCHEMA public", "nst")
    return f"postgresql://postgres@/nst?host={postgresql.folder}"


@pytest.fixture(params=["memory", "sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a new database is to be, of each kind."""
    match request.param:
        case "memory":
            return MEMORY
        case "sqlite":
            return tmp_path / "data #1%?" / "nst.sqlite3"
        case _:
            return str(request.getfixturevalue("postgresql_url"))


@pytest.fixture(params=["sqlite", "postgresql"])
def shared_where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where a new database is to be that several processes can open."""
    if request.param == "sqlite":
        return tmp_path / "nst.sqlite3"
    return str(request.getfixturevalue("postgresql_url"))


@pytest_asyncio.fixture(loop_scope="session")
async def store(where: Path | str) -> AsyncIterator[JobStore]:
    """A new store in each kind of database."""
    opened = await JobStore.open(where)
    yield opened
    await opened.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """An S3 endpoint with an empty bucket; its URL. Whatever opens a bucket's URL finds it."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDPOINT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin and server.stdout
        endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", endpoint)
            patch.setenv("AWS_ALLOW_HTTP", "true")
            patch.setenv("AWS_ACCESS_KEY_ID", "nst")
            patch.setenv("AWS_SECRET_ACCESS_KEY", "nst")
            patch.setenv("AWS_REGION", "us-east-1")
            yield endpoint
        server.stdin.close()
