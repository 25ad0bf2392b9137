"""An end to engine calls that never return.

A call that hangs inside a driver cannot be interrupted from Python, and may hold the interpreter's
lock while it hangs. So the guard is a C thread of the interpreter, which ends the process; the
parent replaces it and the batch comes back.
"""

from __future__ import annotations

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: Where the traceback goes: the process' own standard error, whatever Python made of sys.stderr.
STDERR: Final = 2


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """End this process if the body takes longer; what hung is printed as a traceback of code."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
