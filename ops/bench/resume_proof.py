"""The long proof of resuming: real texts, killed again and again, against a run left in peace.

    python ops/bench/resume_proof.py [--texts 20000] [--kills 3] [--seed N] [--json FILE]

Embeds docstrings with `embedq embed --local` twice: once undisturbed, once killed with SIGKILL at
random moments and started again each time. Both must give the same bytes of vectors, and items that
agree on id, outcome and tokens. With the real model 20,000 texts take minutes; EMBEDQ_DEVICE=stub
and EMBEDQ_MODEL=stub rehearse the proof in seconds. Exits with 1 if anything differs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from corpus import docstrings

from embedq.bulk.checkpoint import Manifest, manifest_path
from embedq.bulk.writers import sidecar_path

#: What must agree of an item; the rest is its row, its hash and where it was computed.
AGREE = ("id", "status", "code", "truncated", "n_tokens", "n_tokens_dropped")
#: Seconds between two looks at the manifest.
LOOK_EVERY_S = 0.02
#: Seconds without any progress after which a run counts as stuck.
STUCK_S = 600.0


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "-m", "embedq", "embed", source, "-o", output, "--local", "--json"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)


def finish(child: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for the summary of a command."""
    out, _ = child.communicate()
    if child.returncode:
        raise SystemExit(f"The command failed with {child.returncode}.")
    summary: dict[str, Any] = json.loads(out)
    return summary


def kill_at(child: subprocess.Popen[str], output: Path, rows: int, more_s: float) -> int:
    """Kill a command some moments after so many rows are safe; return how many were then."""
    moved, seen = time.monotonic(), -1
    while (safe := safe_rows(output)) < rows:
        if child.poll() is not None:
            raise SystemExit("The command ended before it was killed; give it more texts.")
        if safe != seen:
            moved, seen = time.monotonic(), safe
        if time.monotonic() - moved > STUCK_S:
            raise SystemExit(f"The command is stuck at {safe:,} rows.")
        time.sleep(LOOK_EVERY_S)
    time.sleep(more_s)
    child.kill()
    child.wait()
    return safe_rows(output)


def safe_rows(output: Path) -> int:
    """Return how many rows the manifest vouches for."""
    manifest = Manifest.load(manifest_path(output))
    return manifest.rows if manifest is not None else 0


def prove(texts: int, kills: int, choose: random.Random, folder: Path) -> dict[str, Any]:
    """Run both and compare."""
    source, whole, killed = (folder / name for name in ("in.jsonl", "whole.npy", "killed.npy"))
    with source.open("w", encoding="utf-8") as out:
        for number, text in enumerate(docstrings(texts)):
            out.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
    undisturbed = finish(start(source, whole))
    rate = undisturbed["docs_per_second"]
    killed_at = []
    for number in range(kills):
        # Somewhere in its share of the run, at any moment between two checkpoints.
        least = int(texts * (number + 0.8 * choose.random()) / (kills + 1))
        child = start(source, killed)
        rows = max(least, safe_rows(killed) + 1)
        killed_at.append(kill_at(child, killed, rows, choose.random() * 0.05 * texts / rate))
        print(f"killed at {killed_at[-1]:,} of {texts:,} safe rows", file=sys.stderr, flush=True)
    resumed = finish(start(source, killed))
    items = [sidecar_path(path).read_text(encoding="utf-8") for path in (whole, killed)]
    agreeing = sum(
        all(json.loads(a)[key] == json.loads(b)[key] for key in AGREE)
        for a, b in zip(*(lines.splitlines() for lines in items), strict=True)
    )
    return {
        "texts": texts,
        "killed_at_rows": killed_at,
        "rows_kept_by_the_last_run": resumed["resumed"],
        "docs_per_second": rate,
        "devices": undisturbed["devices"],
        "vectors_identical": whole.read_bytes() == killed.read_bytes(),
        "vectors_sha256": hashlib.sha256(killed.read_bytes()).hexdigest(),
        "items_agreeing": agreeing,
        "sidecars_identical": items[0] == items[1],
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = prove(args.texts, args.kills, random.Random(args.seed), Path(folder))
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "command": f"ops/bench/resume_proof.py --texts {args.texts} --kills {args.kills} "
        f"--seed {args.seed}",
        **found,
    }
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(not (found["vectors_identical"] and found["items_agreeing"] == args.texts))


if __name__ == "__main__":
    main()
