"""What a job can fail of is what the contract says."""

from __future__ import annotations

import re
from pathlib import Path

from google.rpc import code_pb2

from nst_server.convert import JOB_ERROR_CODES
from nst_server.errors import RequestError
from nst_server.status import CODES

ROOT = Path(__file__).parent.parent.parent
SERVER = ROOT / "server" / "nst_server"


def documented() -> set[str]:
    """Return the reasons that the comment of JobError.reason names."""
    proto = (ROOT / "proto" / "nst" / "v1" / "job.proto").read_text()
    (message,) = re.findall(r"message JobError \{(.*?)\n\}", proto, re.DOTALL)
    (comment,) = re.findall(r"// For programs, stable(.*?)string reason", message, re.DOTALL)
    return set(re.findall(r"\b[A-Z]{2,}(?:_[A-Z]+)*\b", comment))


def test_the_contract_lists_what_jobs_fail_of() -> None:
    """All of it, and nothing else."""
    assert documented() == set(JOB_ERROR_CODES)


def test_every_reason_in_the_code_has_a_status_code() -> None:
    """Those that workers, executors and the scheduler give by name."""
    named = set()
    for file in SERVER.glob("*.py"):
        named |= set(re.findall(r'(?:Failed\([^()]*?|JobError\()"([A-Z_]{3,})"', file.read_text()))
    assert {"WORKER_DIED", "OUT_OF_MEMORY", "MODEL_UNAVAILABLE", "INTERNAL"} <= named
    assert named <= set(JOB_ERROR_CODES)


def test_a_job_fails_with_the_code_that_a_request_is_refused_with() -> None:
    """For the reasons that both can have."""
    for kind in RequestError.__subclasses__():
        if kind.reason in JOB_ERROR_CODES:
            assert JOB_ERROR_CODES[kind.reason] == CODES[kind].value[0], kind.reason
    assert all(code in code_pb2.Code.values() for code in JOB_ERROR_CODES.values())
