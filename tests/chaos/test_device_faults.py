"""Two NPUs that fail in every way we know, over one job: each text gets its vector, and once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "ops" / "chaos" / "device_faults.py"
#: Kinds of faults that the script knows.
KINDS = 13


@pytest.mark.redis
@pytest.mark.timeout(400)
def test_every_kind_of_fault_is_survived(tmp_path: Path) -> None:
    """Each kind strikes once; both NPUs come back each time, and drain the job once all are dead.

    How quickly is for the full run, which keeps its bounds as well.
    """
    if shutil.which("redis-server") is None and os.environ.get("CI") != "true":
        pytest.skip("redis-server is missing; Debian: apt install redis-server")
    command = [sys.executable, str(RUN), "--faults", str(KINDS), "--patience", "3"]

    run = subprocess.run(
        [*command, "--report", str(tmp_path)], capture_output=True, text=True, timeout=380
    )

    [report] = tmp_path.glob("*.json")
    found = json.loads(report.read_text())
    zero = ("wrong", "twice", "lost", "failed")
    assert {name: found[name] for name in zero} == dict.fromkeys(zero, 0), run.stdout
    assert [kind for kind, times in found["faults"].items() if not times] == []
    assert found["all NPUs dead"]["passed probes until the NPU served again"] == 1
    assert found["texts"] > 0
