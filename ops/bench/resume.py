"""Compare the output of a run that is killed and resumed several times with an undisturbed run.

    ops/bench/resume.py [--texts 20000] [--kills 3] [--seed N] [--json FILE]

Embeds docstrings with `embedq embed --local` twice: once undisturbed, once killed with SIGKILL at
random moments and started again. Exits with 1 unless the vectors are bit-identical and the items
agree on id, outcome and tokens. EMBEDQ_DEVICE=stub and EMBEDQ_MODEL=stub test the script quickly.
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

#: Fields of an item that must be equal in both runs.
FIELDS = ("id", "status", "code", "truncated", "n_tokens", "n_tokens_dropped")
#: Interval of polling the manifest, seconds.
POLL_INTERVAL_S = 0.02
#: Timeout without progress, seconds.
STUCK_S = 600.0


def start(source: Path, output: Path) -> subprocess.Popen[str]:
    """Start `embedq embed`."""
    command = [sys.executable, "-m", "embedq", "embed", source, "-o", output, "--local", "--json"]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a command and return its summary."""
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"The command failed with status {process.returncode}.")
    summary: dict[str, Any] = json.loads(out)
    return summary


def kill_at(process: subprocess.Popen[str], output: Path, rows: int, delay_s: float) -> int:
    """Kill a command `delay_s` after its manifest confirms so many rows; return the final count."""
    moved, seen = time.monotonic(), -1
    while (safe := safe_rows(output)) < rows:
        if process.poll() is not None:
            raise SystemExit("The command ended before it was killed. Raise --texts.")
        if safe != seen:
            moved, seen = time.monotonic(), safe
        if time.monotonic() - moved > STUCK_S:
            raise SystemExit(f"No progress for {STUCK_S:.0f} s, at {safe:,} rows.")
        time.sleep(POLL_INTERVAL_S)
    time.sleep(delay_s)
    process.kill()
    process.wait()
    return safe_rows(output)


def safe_rows(output: Path) -> int:
    """Return how many rows the manifest of an output confirms."""
    manifest = Manifest.load(manifest_path(output))
    return manifest.rows if manifest is not None else 0


def compare(texts: int, kills: int, choose: random.Random, folder: Path) -> dict[str, Any]:
    """Do both runs and return the figures."""
    source, whole, killed = (folder / name for name in ("in.jsonl", "whole.npy", "killed.npy"))
    with source.open("w", encoding="utf-8") as out:
        for number, text in enumerate(docstrings(texts)):
            out.write(json.dumps({"id": f"doc-{number}", "text": text}) + "\n")
    undisturbed = finish(start(source, whole))
    rate = undisturbed["docs_per_second"]
    killed_at = []
    for number in range(kills):
        # At a random place of this kill's share of the run, at any moment between checkpoints.
        least = int(texts * (number + 0.8 * choose.random()) / (kills + 1))
        process = start(source, killed)
        rows = max(least, safe_rows(killed) + 1)
        killed_at.append(kill_at(process, killed, rows, choose.random() * 0.05 * texts / rate))
        print(f"killed at {killed_at[-1]:,} of {texts:,} safe rows", file=sys.stderr, flush=True)
    resumed = finish(start(source, killed))
    items = [sidecar_path(path).read_text(encoding="utf-8") for path in (whole, killed)]
    agreeing = sum(
        all(json.loads(a)[key] == json.loads(b)[key] for key in FIELDS)
        for a, b in zip(*(lines.splitlines() for lines in items), strict=True)
    )
    return {
        "texts": texts,
        "killed_at_rows": killed_at,
        "rows_resumed": resumed["resumed"],
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
    parser.add_argument("--json", type=Path, help="output file of the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args.texts, args.kills, random.Random(args.seed), Path(folder))
    report = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "command": f"ops/bench/resume.py --texts {args.texts} --kills {args.kills} "
        f"--seed {args.seed}",
        **found,
    }
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(not (found["vectors_identical"] and found["items_agreeing"] == args.texts))


if __name__ == "__main__":
    main()
