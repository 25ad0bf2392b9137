"""Exit codes of `embedq-worker`, one per cause."""

from __future__ import annotations

OK = 0
#: Unexpected error; the supervisor restarts the worker.
FAILURE = 1
SETTINGS = 2
MODEL = 3
ENGINE = 4
CHECK = 5
#: No NPU exists, it may not be opened, or another process holds it.
DEVICE = 6
#: The NPU of a strict worker could not be opened or failed its self-test.
NPU_UNVERIFIED = 7
#: The worker crashed repeatedly and is not restarted.
CRASH_LOOP = 8
#: Codes after which the supervisor does not restart a worker: the next start would fail as well.
FINAL = frozenset((OK, SETTINGS, MODEL, ENGINE, CHECK, DEVICE, NPU_UNVERIFIED))

EPILOG = """\b
Exit codes:
  0  success
  1  Redis or worker unavailable, or unexpected error
  2  wrong setting, option or file
  3  model missing or damaged
  4  engine failed
  5  a check failed
  6  NPU missing, not permitted or in use
  7  NPU failed its self-test (strict)
  8  crashed repeatedly
  130, 131, 143  ended by a signal
"""
