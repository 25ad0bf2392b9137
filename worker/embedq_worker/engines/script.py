"""The fault script of the stub device: a file that breaks it while nodes run.

For tests and rehearsals. EMBEDQ_STUB_FAULTS names the file; it is read before each start of the
device and before each inference, so whoever replaces it switches faults on and off at once. A file
that is missing or empty is a sound device. One fault a line:

    init=segfault first=2      the first two starts die of SIGSEGV
    init=slow seconds=3        every start takes three seconds longer
    infer=device_lost          every inference fails as on a device that is gone

`first=N` counts from when the script was last replaced, over all processes that read it. What has
struck is in a file beside the script with the suffix `.struck`, one line each.

    raise           the call raises
    exit            the process exits with status 70
    segfault        the process dies of SIGSEGV
    hang            the call never returns
    slow            it takes `seconds` longer, 1 if not said
    device_lost, device_unknown, out_of_memory      it fails with what Level Zero says for that
    nan, wrong      the vectors are not numbers, or those of other texts; for infer only
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from embedq.errors import SettingsError
from embedq.hints import nearest
from embedq_worker.engines.faults import compile_failed, infer_failed
from embedq_worker.errors import InferFailed
from embedq_worker.private_files import replace_private

#: When a fault may strike.
INIT, INFER = "init", "infer"
#: Exit status of the scripted exit.
EXIT_STATUS: Final = 70
#: What Level Zero says, as the plugin words it.
DRIVER_SAYS: Final[Mapping[str, str]] = {
    "device_lost": "ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001",
    "device_unknown": "ZE_RESULT_ERROR_UNKNOWN, code 0x7ffffffe",
    "out_of_memory": "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY, code 0x70000003",
}
#: Faults of the vectors, which only an inference has; the engine spoils them.
SPOILT: Final = ("nan", "wrong")
FAULTS: Final = ("raise", "exit", "segfault", "hang", "slow", *DRIVER_SAYS, *SPOILT)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script.

    Attributes:
        when: ``init`` or ``infer``.
        kind: one of FAULTS.
        seconds: how long ``slow`` is.
        first: how often it strikes; 0 for always.
    """

    when: str
    kind: str
    seconds: float = 1.0
    first: int = 0


class FaultScript:
    """A script as the device of one process reads it."""

    def __init__(self, path: Path) -> None:
        """Prepare to read a file, which may come and go."""
        self._path = path
        self._struck = path.with_name(path.name + ".struck")

    def replace(self, *lines: str) -> None:
        """Write the script anew in one step; without lines, the device is sound.

        Raises:
            SettingsError: a line is none of the language.
        """
        text = "".join(f"{line}\n" for line in lines)
        for line in _lines(text):
            _parse(line)
        replace_private(self._path, text.encode())

    def strike(self, when: str) -> str:
        """Do what the script says for this moment.

        Args:
            when: INIT or INFER.

        Returns:
            One of SPOILT if the vectors are to be spoilt, else nothing.

        Raises:
            SettingsError: the script is none.
            EngineError: the script says so.
        """
        spoilt = ""
        for fault in self._due(when):
            spoilt = _commit(fault) or spoilt
        return spoilt

    def _due(self, when: str) -> list[Fault]:
        """Return the faults of this moment that have not struck often enough, and note them."""
        try:
            text = self._path.read_text(encoding="utf-8")
            edition = str(self._path.stat().st_mtime_ns)
        except OSError:
            return []
        due = []
        for line in _lines(text):
            fault, note = _parse(line), f"{edition} {line}\n"
            if fault.when == when and not (fault.first and self._count(note) >= fault.first):
                due.append(fault)
                self._note(note)
        return due

    def _count(self, note: str) -> int:
        try:
            return self._struck.read_text(encoding="utf-8").count(note)
        except OSError:
            return 0

    def _note(self, note: str) -> None:
        # One short write to the end of a file: whole, whoever else writes and however we end.
        with self._struck.open("ab", buffering=0) as out:
            out.write(note.encode())


def _lines(text: str) -> list[str]:
    """Return the lines of a script without remarks and empty ones."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


def _parse(line: str) -> Fault:
    """Read one line.

    Raises:
        SettingsError: it is none.
    """
    word, *others = line.split()
    when, _, kind = word.partition("=")
    if when not in (INIT, INFER) or kind not in FAULTS or (when == INIT and kind in SPOILT):
        hint = nearest(kind, FAULTS)
        raise SettingsError(
            f"EMBEDQ_STUB_FAULTS: expected init=FAULT or infer=FAULT, got {word}.{hint}"
        )
    options = dict(other.partition("=")[::2] for other in others)
    try:
        seconds = float(options.pop("seconds", 1.0))
        first = int(options.pop("first", 0))
    except ValueError:
        raise SettingsError(f"EMBEDQ_STUB_FAULTS: expected a number in {line!r}.") from None
    if options:
        raise SettingsError(
            f"EMBEDQ_STUB_FAULTS: expected seconds=S or first=N, got {' '.join(options)}."
        )
    return Fault(when, kind, seconds, first)


def _commit(fault: Fault) -> str:
    """Do what a fault says; faults of the vectors come back to the caller."""
    if fault.kind in SPOILT:
        return fault.kind
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return ""
    commit_native(fault.kind)
    text = DRIVER_SAYS.get(fault.kind, "")
    if fault.when == INIT:
        raise compile_failed(text or "the fault script says so", "Opening the stub device")
    if text:
        raise infer_failed(RuntimeError(text))
    raise InferFailed("The stub device raised because its fault script says so.")


def commit_native(kind: str) -> None:
    """End or hang this process if the fault is of that kind."""
    if kind == "exit":
        os._exit(EXIT_STATUS)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        threading.Event().wait()
