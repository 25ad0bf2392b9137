"""Probe the NPU in a process of its own.

The plugin initializes its driver once per process, so only a new process can open a device that
came back. `embedq-worker warm` does all a probe needs: it locks the device, opens the engine, runs
the self-test and closes it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

_COMMAND = (sys.executable, "-m", "embedq_worker", "warm", "--json", "--probe")


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Result of a probe.

    Attributes:
        passed: the NPU can be used.
        code, reason: why not, as one word and as a sentence.
        seconds: duration.
    """

    passed: bool
    code: str = ""
    reason: str = ""
    seconds: float = 0.0


class DeviceProbe:
    """A running probe, polled from an event loop."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        """Start the process.

        Args:
            timeout_s: of the probe.
            now_s: monotonic time in seconds.
        """
        self._deadline_s = now_s + timeout_s
        self._timeout_s = timeout_s
        self._process = subprocess.Popen(
            [*_COMMAND, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def poll(self, now_s: float) -> ProbeResult | None:
        """Return the result, or None while the probe runs."""
        status = self._process.poll()
        if status is None and now_s < self._deadline_s:
            return None
        if status is None:
            self.stop()
            reason = f"The probe took longer than {self._timeout_s:g} s."
            return ProbeResult(False, "init_timeout", reason)
        # The result is shorter than a pipe's buffer, so the process never waited for this read.
        output = self._process.stdout.read() if self._process.stdout else b""
        self.stop()
        try:
            found = json.loads(output.splitlines()[-1])
            if status == 0:
                return ProbeResult(True, seconds=float(found["seconds"]))
            return ProbeResult(False, str(found["code"]), str(found["reason"]))
        except (ValueError, TypeError, KeyError, IndexError):
            how = f"signal {-status}" if status < 0 else f"exit code {status}"
            return ProbeResult(False, "init_failed", f"The probe ended with {how}.")

    def stop(self) -> None:
        """Kill the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
