"""What a process that computes asks of its machine."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from nst_model.devices import reuse_memory, return_memory

def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fill(mib):
    torch.empty(mib * 2**20, dtype=torch.uint8).fill_(1)

torch.set_num_threads(1)
fill(128)
print(faults(lambda: fill(64)))
reuse_memory()
fill(128)
print(faults(lambda: fill(64)))
return_memory()
print(faults(lambda: fill(64)))
"""


OF_A_THREAD = """
import os, threading
from nst_model.devices import reuse_memory, return_memory

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

reuse_memory()
before = resident_mib()
thread = threading.Thread(target=lambda: [bytearray(2**20) for _ in range(50)])
thread.start()
thread.join()
kept = resident_mib() - before
return_memory()
print(kept, resident_mib() - before)
"""


GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="how other C libraries keep memory is theirs")


@GLIBC
def test_memory_that_a_thread_freed_is_given_back() -> None:
    """All 50 MiB of it, as if the main thread had taken it."""
    found = subprocess.run([sys.executable, "-c", OF_A_THREAD], check=True, capture_output=True, text=True)
    kept, left = map(int, found.stdout.split())
    assert kept > 45
    assert left < 5


@GLIBC
def test_memory_that_is_freed_serves_the_next_block() -> None:
    """A block of 64 MiB is 16,384 pages: asked for each time, then never again, until they are given back."""
    found = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    before, kept, returned = map(int, found.stdout.split())
    assert kept < 100 < min(before, returned)
