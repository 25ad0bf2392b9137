"""Define the command line of ops/chaos/run."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ops.chaos.fleet import ROOT

from embedq.settings import DEFAULT_MODEL

DESCRIPTION = "Inject random faults into running workers and check every vector that they return."


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="ops/chaos/run", description=DESCRIPTION)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0, help="How long faults are injected.")
    length.add_argument("--hour", dest="minutes", action="store_const", const=60.0)
    parser.add_argument("--seed", type=int, default=1, help="Seed of inputs and faults.")
    parser.add_argument("--workers", type=int, default=4, help="Number of workers.")
    parser.add_argument("--engine", choices=["stub", "model"], default="stub")
    parser.add_argument("--report", type=Path, default=ROOT / "ops" / "chaos" / "reports")
    parser.add_argument("--keep", action="store_true", help="Keep logs and outputs.")
    return parser.parse_args()


def engine_settings(name: str) -> dict[str, str]:
    """Return the settings of workers with this engine; the model is EMBEDQ_TEST_MODEL."""
    if name == "stub":
        return {
            "EMBEDQ_DEVICE": "stub",
            "EMBEDQ_MODEL": "stub",
            "EMBEDQ_STUB_DELAY_S": "0.05",
        }
    engine = {"EMBEDQ_DEVICE": "cpu", "EMBEDQ_MODEL": DEFAULT_MODEL, "EMBEDQ_THREADS": "1"}
    if folder := os.environ.get("EMBEDQ_TEST_MODEL"):
        engine["EMBEDQ_MODEL"] = folder
    return engine
