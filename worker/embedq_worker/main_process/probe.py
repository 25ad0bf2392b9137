"""One look at the NPU by a process that lives no longer: is it back?

A plugin initializes its driver once for each process, so only a fresh one can see a device that
has come back. It holds the device's lock while it looks, proves the engine as a child would, says
what it found as one line of JSON, and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import NamedTuple


class ProbeResult(NamedTuple):
    """What a probe found.

    Attributes:
        passed: the NPU may be trusted.
        code, reason: why not, as a word and as a sentence.
        seconds: how long it took.
    """

    passed: bool
    code: str = ""
    reason: str = ""
    seconds: float = 0.0


class DeviceProbe:
    """A probe under way, watched from an event loop."""

    def __init__(self, deadline_s: float, now_s: float) -> None:
        """Start the process.

        Args:
            deadline_s: how long it may take.
            now_s: seconds on a clock that never goes back.
        """
        self._until = now_s + deadline_s
        self._deadline_s = deadline_s
        self._process = subprocess.Popen(
            [sys.executable, "-m", "embedq_worker.pool_process.probe", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def poll(self, now_s: float) -> ProbeResult | None:
        """Return what it found, or None while it looks."""
        status = self._process.poll()
        if status is None and now_s < self._until:
            return None
        if status is None:
            self.stop()
            return ProbeResult(
                False, "init_timeout", f"The probe took longer than {self._deadline_s:g} s."
            )
        # A line is far shorter than a pipe, so the process never waited for us to read.
        out = self._process.stdout.read() if self._process.stdout else b""
        self.stop()
        try:
            return ProbeResult(**json.loads(out.splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return ProbeResult(False, "init_failed", f"The probe ended with {how}.")

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
