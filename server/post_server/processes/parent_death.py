"""Makes a child process end with its parent, whatever kills the parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

PARENT = "POST_PARENT_PID"
"""Environment variable with the parent's process id, so that a child can't miss an early death of its parent."""
ABANDONED = 77
"""Exit status of a child that ended because its parent was gone."""

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.2


def environment_for_child() -> dict[str, str]:
    """The variables that a parent adds to its child's environment."""
    return {PARENT: str(os.getpid())}


def die_with_parent(grace: float | None, signal_number: int = signal.SIGTERM) -> None:
    """Receive ``signal_number`` when the parent dies, and exit hard ``grace`` seconds later (None: only the signal).

    On Linux the kernel sends the signal; polling the parent's id works everywhere. Only the first survives an
    ``exec`` of another program.
    """
    expected = int(os.environ.get(PARENT, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != expected:  # it died before the line above
        os._exit(ABANDONED)
    if grace is not None:
        threading.Thread(target=_watch, args=(expected, grace, signal_number), daemon=True).start()


def _watch(expected: int, grace: float, signal_number: int) -> None:
    while os.getppid() == expected:
        time.sleep(_POLL_SECONDS)
    os.kill(os.getpid(), signal_number)
    time.sleep(grace)
    os._exit(ABANDONED)
