"""Build hook: makes the Python code of the contract, next to its .proto files.

Runs at every build and install, editable ones included. What it writes is ignored by git and packed into the wheel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

GENERATED = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "contract.binpb")


class ContractBuildHook(BuildHookInterface):
    """Runs protoc over `proto/nst/v1`."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Generate messages, stubs, type stubs, and the descriptor set whose comments are the command line's help."""
        root = Path(self.root) / "proto"
        generate(root)
        build_data["artifacts"] += [f"proto/nst/v1/{pattern}" for pattern in GENERATED]


def generate(root: Path) -> None:
    """Run protoc over every .proto file below `root`; raise RuntimeError if it fails."""
    import grpc_tools  # noqa: PLC0415 - only the build environment has it
    from grpc_tools import protoc  # noqa: PLC0415

    sources = sorted(str(path) for path in (root / "nst" / "v1").glob("*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    status = protoc.main(
        [
            "protoc",
            f"-I{root}",
            f"-I{well_known}",
            f"--python_out={root}",
            f"--pyi_out={root}",
            f"--grpc_python_out={root}",
            f"--descriptor_set_out={root / 'nst' / 'v1' / 'contract.binpb'}",
            "--include_imports",
            "--include_source_info",
            *sources,
        ]
    )
    if status != 0:
        raise RuntimeError(f"protoc failed with exit code {status}")
