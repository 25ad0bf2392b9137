"""Where a node's small files are when nobody says otherwise. Standard library only: health asks."""

from __future__ import annotations

import os
from pathlib import Path


def default_runtime_dir() -> Path:
    """Return the folder for files that live as long as a node: short, private, in memory if any."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "embedq"
    import tempfile  # costs a third of a health check that is told its folder

    return Path(tempfile.gettempdir()) / f"embedq-{os.getuid()}"
