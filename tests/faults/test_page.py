"""The page that says which test shows what."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]

NAMED = re.compile(r"\[`([^`]+)`\]\(\.\./([^)]+)\)")


def test_every_row_of_the_page_names_tests_that_are_there() -> None:
    """Of docs/reliability.md; a test that is renamed is renamed there."""
    page = (PROJECT / "docs" / "reliability.md").read_text()
    rows = page.split("| fault |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 15
    for row in rows:
        named = NAMED.findall(row)
        assert named, row
        for name, file in named:
            assert name in (PROJECT / file).read_text(), f"{file} has no test {name!r}"
