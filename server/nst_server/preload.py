"""What the process that worker processes are forked from has imported, so that a new one is there in a moment.

It imports torch and touches no device: a process that has done so must not be forked.
"""

from __future__ import annotations

import signal

import nst_server.worker  # noqa: F401

# A signal for the whole process group is the front's affair; when the front ends, so does this.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
