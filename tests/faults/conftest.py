"""What goes wrong around a server: real processes, signals and disks. The fixtures are those of its other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytest_asyncio

from tests.server.conftest import ask, serve
from tests.server.test_process import launch

__all__ = ["ask", "launch", "serve"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of this folder on the session's loop, where the servers of the fixtures run."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)
