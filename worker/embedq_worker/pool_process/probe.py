"""Open the NPU once in a process of its own and report the result.

The main process starts it: an NPU context does not survive a fork, and the plugin finds a device
that came back only in a new process.
"""

import json
import os
import sys
import time

from embedq.errors import EmbedqError
from embedq.protocol.contract import Device
from embedq_worker import process
from embedq_worker.device.placement import choose_placement
from embedq_worker.errors import FailureReason, describe
from embedq_worker.inference import opener
from embedq_worker.main_process.probe import ProbeResult
from embedq_worker.process import die_with_parent
from embedq_worker.settings import WorkerSettings


def look(settings: WorkerSettings) -> ProbeResult:
    """Open the NPU of the settings, run the self-test and close it."""
    began = time.monotonic()
    claim = None
    try:
        placement = choose_placement(settings, wait_s=opener.LOCK_TIMEOUT_S)
        if placement.assigned_device is not Device.NPU:  # auto, and the NPU is not there any more
            return ProbeResult(False, "no_device", placement.reason, time.monotonic() - began)
        claim = opener.claim_device(settings, placement)
        opener.open_placed(settings, placement).close()
    except Exception as error:  # whatever it is, the worker must hear of it
        code, reason = describe(error, FailureReason.INIT_FAILED)
        return ProbeResult(False, code, reason, time.monotonic() - began)
    finally:
        if claim is not None:
            claim.release()
    return ProbeResult(True, seconds=time.monotonic() - began)


def main() -> None:
    """Write the finding as one line of JSON to stdout."""
    die_with_parent()
    if os.getppid() != int(sys.argv[1]):  # it died before the line above
        return
    out = os.dup(1)
    process.send_native_to_stderr()
    try:
        settings = WorkerSettings.load()
    except EmbedqError as error:
        finding = ProbeResult(False, error.code, str(error))
    else:
        process.set_up(str(settings.log_level))
        finding = look(settings)
    os.write(out, json.dumps(finding._asdict()).encode() + b"\n")
    os._exit(0)  # a runtime whose device is gone may hang in its own clean-up


if __name__ == "__main__":
    main()
