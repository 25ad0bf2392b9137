"""One look at the NPU by a process that lives no longer: is it back?

A plugin initialises its driver once for each process, so only a fresh one can see a device that
has come back. It holds the device's lock while it looks, proves the engine as a child would, says
what it found as one line of JSON, and ends.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

from embedq.contract import Device
from embedq.errors import EmbedqError
from embedq_worker.orphans import die_with_parent


class Finding(NamedTuple):
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


class Probe:
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
            [sys.executable, "-m", "embedq_worker.probing", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )

    def poll(self, now_s: float) -> Finding | None:
        """Return what it found, or None while it looks."""
        status = self._process.poll()
        if status is None and now_s < self._until:
            return None
        if status is None:
            self.stop()
            return Finding(
                False, "init_deadline", f"The probe took longer than {self._deadline_s:g} s."
            )
        # A line is far shorter than a pipe, so the process never waited for us to read.
        out = self._process.stdout.read() if self._process.stdout else b""
        self.stop()
        try:
            return Finding(**json.loads(out.splitlines()[-1]))
        except (ValueError, TypeError, IndexError):
            how = f"signal {-status}" if status < 0 else f"status {status}"
            return Finding(False, "init_failed", f"The probe ended with {how}.")

    def stop(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()


def look(settings: Any) -> Finding:
    """Open the NPU of the settings, prove it, and give it back."""
    # Here, because the parent of a node imports this file and must never import a runtime.
    from embedq_worker import placed_serving
    from embedq_worker.child import describe
    from embedq_worker.errors import Reason
    from embedq_worker.placement import place

    began = time.monotonic()
    claim = None
    try:
        placement = place(settings, wait_s=placed_serving.CLAIM_PATIENCE_S)
        if placement.home is not Device.NPU:  # auto, and the NPU is not there any more
            return Finding(False, "no_device", placement.reason, time.monotonic() - began)
        claim = placed_serving.claim_device(settings, placement)
        placed_serving.open_placed(settings, placement).close()
    except Exception as error:  # whatever it is, the node must hear of it
        code, reason = describe(error, Reason.INIT_FAILED)
        return Finding(False, code, reason, time.monotonic() - began)
    finally:
        if claim is not None:
            claim.release()
    return Finding(True, seconds=time.monotonic() - began)


def main() -> None:
    """Look, and say what was found."""
    from embedq_worker import logs
    from embedq_worker.settings import WorkerSettings

    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it died before the line above
        return
    out = os.dup(1)
    logs.send_native_to_stderr()
    try:
        settings = WorkerSettings.load()
    except EmbedqError as error:
        finding = Finding(False, error.code, str(error))
    else:
        logs.set_up(str(settings.log_level))
        finding = look(settings)
    os.write(out, json.dumps(finding._asdict()).encode() + b"\n")
    os._exit(0)  # a runtime whose device is gone may hang in its own clean-up


if __name__ == "__main__":
    main()
