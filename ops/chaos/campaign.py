"""Run ops/chaos/run: start workers and producers, inject random faults, report the outcome."""

from __future__ import annotations

import argparse
import itertools
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NoReturn

from ops.chaos import report
from ops.chaos.fleet import Fleet
from ops.chaos.options import engine_settings, parse
from ops.chaos.producers import Producer, make_task
from ops.chaos.state import Run
from ops.chaos.watch import Watch

#: Jobs that run at once. A job waits while the batch that it needs next is recovered, so one job
#: would leave the workers idle.
PRODUCERS: Final = 6


def main() -> NoReturn:
    """Run, write the report, and exit with 1 if a check failed."""
    options = parse()
    # Turned into an exception, so that `finally` stops the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="eq-"))
    print(f"logs and outputs are in {folder}", file=sys.stderr)
    began = time.monotonic()
    run = _prepare(options, folder)
    try:
        run.inject_faults()
        run.finish_jobs()
        run.judge()
    finally:
        run.fleet.stop()
        for producer in run.producers:
            producer.kill()
    facts = report.facts(run, time.monotonic() - began)
    print(report.page(facts))
    print(f"report: {report.write(facts, options.report)}", file=sys.stderr)
    if not options.keep and not facts["breaches"]:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if facts["breaches"] else 0)


def _prepare(options: argparse.Namespace, folder: Path) -> Run:
    engine = engine_settings(options.engine)
    fleet = Fleet(folder, options.workers, engine)
    poison = options.engine == "stub"
    least, most = (10, 40) if options.minutes < 2 else (100, 400)
    sizes = random.Random(f"{options.seed} sizes")
    tasks = (
        make_task(folder, number, sizes.randint(least, most), poison, options.seed)
        for number in itertools.count()
    )
    model = engine["EMBEDQ_MODEL"]
    producers = [
        Producer(tasks, folder / f"producer{i}.log", fleet.urls, model) for i in range(PRODUCERS)
    ]
    watch = Watch({worker.name: worker.log_path for worker in fleet.workers})
    log = (folder / "faults.log").open("w", buffering=1, encoding="utf-8")
    return Run(options, fleet, producers, watch, log)
