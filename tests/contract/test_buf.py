"""The contract is well formed and does not break its users: `buf` says so, and would say otherwise."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUF = Path(sys.executable).parent / "buf"


def buf(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run buf."""
    return subprocess.run([BUF, *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_removing_a_field_is_a_breaking_change(tmp_path: Path) -> None:
    """The comparison with the baseline notices what it is there for."""
    copy = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", copy, ignore=shutil.ignore_patterns("*.py", "*.pyi", "*.binpb", "__pycache__"))
    baseline = ROOT / "tests" / "contract" / "baseline.binpb"
    assert buf("breaking", "--against", baseline, folder=copy).returncode == 0

    options = copy / "nst" / "v1" / "options.proto"
    options.write_text(options.read_text().replace("optional int32 history = 12;", ""))

    broken = buf("breaking", "--against", baseline, folder=copy)
    assert broken.returncode != 0
    assert "history" in broken.stdout


def test_an_uncommented_field_does_not_pass_the_lint(tmp_path: Path) -> None:
    """Comments are the reference, so each field must have one."""
    copy = tmp_path / "proto"
    shutil.copytree(ROOT / "proto", copy, ignore=shutil.ignore_patterns("*.py", "*.pyi", "*.binpb", "__pycache__"))
    image = copy / "nst" / "v1" / "image.proto"
    image.write_text(image.read_text().replace("  // Format of the file.\n", ""))
    assert "COMMENT_FIELD" in buf("lint", "--error-format", "json", folder=copy).stdout
