"""`embedq` run as a person runs it: in a folder, as a process, to the end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.servers import RedisProcess, environment


class Command:
    """Runs `embedq` in a folder, against the shared stub worker."""

    def __init__(self, folder: Path, redis: RedisProcess) -> None:
        self.folder = folder
        self.urls = {
            "EMBEDQ_BROKER_URL": redis.broker_url(),
            "EMBEDQ_RESULTS_URL": redis.results_url(),
            "EMBEDQ_MODEL": "stub",
        }

    def __call__(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            [sys.executable, "-m", "embedq", *arguments],
            cwd=self.folder,
            env=environment(**{**self.urls, **settings}),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def write(self, name: str, *lines: object) -> str:
        """Write a file of lines, as JSON unless they are text, and return its name."""
        text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (self.folder / name).write_text("".join(f"{line}\n" for line in text), "utf-8")
        return name

    def items(self, name: str = "out.items.jsonl") -> list[dict[str, Any]]:
        """Read the sidecar."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a failed command says."""
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [line] = done.stderr.splitlines()
    return line
