"""Benchmarks: see the README beside."""

from __future__ import annotations

import os

# As a worker has it, see server/nst_server/executor.py: seconds of processor would be full of threads that wait.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
