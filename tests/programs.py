"""Programs of the machine that tests need: a laptop may lack them, CI may not."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str, package: str) -> str:
    """Return the path of a program of a Debian package; without it skip, or fail in CI."""
    path = shutil.which(name)
    if path is None:
        reason = f"{name} is missing; Debian: apt install {package}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
