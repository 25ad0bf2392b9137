"""No process of a node outlives the one that started it: a model or a device would go with it."""

from __future__ import annotations

import ctypes
import signal
import sys

#: prctl(2): choose the signal that a process gets when the thread that forked it ends.
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
