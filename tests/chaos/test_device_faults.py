"""A job survives every scripted fault of two emulated NPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "ops" / "chaos" / "device_faults.py"
#: Number of kinds in device_faults.FAULTS.
KINDS = 13


@pytest.mark.redis
@pytest.mark.timeout(400)
def test_job_survives_every_kind_of_fault(tmp_path: Path) -> None:
    # Time bounds are not asserted: they need an idle machine.
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
