"""Exit codes of `embedq-worker`: one per cause. Plain numbers, for the supervisor imports them."""

from __future__ import annotations

OK = 0


#: Something nobody foresaw; a worker is started again.
FAILURE = 1


SETTINGS = 2


MODEL = 3


ENGINE = 4


CHECK = 5


#: No NPU, no permission, or another process holds it.
DEVICE = 6


#: The NPU is there and cannot be proven, and the worker is strict.
NPU_UNPROVEN = 7


#: The worker died again and again and is kept off.
CRASH_LOOP = 8


#: Codes after which starting again would end the same way.
FINAL = frozenset((OK, SETTINGS, MODEL, ENGINE, CHECK, DEVICE, NPU_UNPROVEN))


EPILOG = """\b
Exit codes:
  0 done    1 Redis took no order, or no worker lives    2 wrong setting, option or file
  3 model missing or damaged
  4 engine failed    5 a check is red    6 no NPU, no permission, or it is taken
  7 NPU not proven (strict)    8 died again and again    130, 131, 143 ended by a signal
"""
