"""Tests that several threads may use OpenVINO types at the same time."""

import subprocess
import sys

#: Four threads use their first type at once, while Python switches threads as often as possible.
SCRIPT = """
import sys, threading
from embedq_worker.engines.openvino_runtime import ov

sys.setswitchinterval(1e-6)
threading.Thread(target=lambda: [sum(range(50)) for _ in range(10**6)], daemon=True).start()
barrier = threading.Barrier(4)

def use_type():
    barrier.wait()
    ov.Type.i64.to_dtype()

threads = [threading.Thread(target=use_type) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("done", flush=True)
"""


def test_concurrent_first_use_of_types_does_not_deadlock() -> None:
    # Without the workaround, OpenVINO 2026.4 deadlocks in most runs: its lock against the GIL.
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True
    )

    assert found.stdout == "done\n"
