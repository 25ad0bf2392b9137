"""`embedq-worker health`: should this node be started anew? Standard library only, for it is quick.

Containers ask it every few seconds: `celery inspect ping` costs more than a second of processor
each time, and the parent answers it while its child hangs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, Final

from embedq_worker import pulse
from embedq_worker.runtime_dir import default_runtime_dir

#: Exit codes.
WELL, UNWELL = 0, 1
HELP: Final = "Say whether the nodes of this machine live: exit code 0, or 1 and why."


def main(arguments: list[str]) -> int:
    """Check and return the exit code."""
    parser = argparse.ArgumentParser("embedq-worker health", description=HELP)
    parser.add_argument("--max-age-s", type=float, default=30.0, help="Oldest sign of life.")
    parser.add_argument("--json", action="store_true", help="One JSON object with readiness.")
    parser.add_argument("--name", default="", help="Of several nodes, only this. [EMBEDQ_NAME]")
    options = parser.parse_args(arguments)
    folder = Path(os.environ.get("EMBEDQ_RUNTIME_DIR") or default_runtime_dir())
    name = options.name or os.environ.get("EMBEDQ_NAME", "")
    found = [_judge(each, options.max_age_s) for each in pulse.read_all(folder, name)]
    well = bool(found) and all(node["well"] for node in found)
    if options.json:
        ready = well and all(node["ready"] for node in found)
        print(json.dumps({"well": well, "ready": ready, "nodes": found}))
    elif not found:
        print(f"no node{' ' + name if name else ''} has run in {folder} (EMBEDQ_RUNTIME_DIR)")
    else:
        for node in found:
            print(f"{node['node']} {node['state']}: {node['objection'] or 'lives'}")
    return WELL if well else UNWELL


def _judge(node: pulse.Pulse, max_age_s: float) -> dict[str, Any]:
    now_s = time.monotonic()
    objection = node.objection(now_s, max_age_s)
    shown = node._asdict()
    for key in ("at", "batch_since", "engine_since"):
        since_s = shown.pop(key)
        # Ages, for the clock itself means nothing to anybody else.
        name = {"at": "age_s"}.get(key, key.replace("since", "age_s"))
        shown[name] = None if since_s is None else round(now_s - since_s, 3)
    return {
        **shown,
        "well": objection is None,
        "ready": objection is None and node.may_serve(),
        "objection": objection or "",
    }
