"""Write the report of a chaos run as JSON and as Markdown, without host names and paths."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from ops.chaos import judge
from ops.chaos.fleet import SHORTENED
from ops.chaos.servers import MAXMEMORY
from ops.chaos.state import Run

from embedq.jobs.sender import PAUSE_RATIO

#: Faults that send SIGKILL to a process of a worker or a producer.
_KILLS = ("kill_pool_process", "kill_worker", "swallow_message", "kill_producer")


def facts(run: Run, seconds: float) -> dict[str, Any]:
    """Return the content of the report."""
    tasks, found, options = run.done, run.findings, run.options
    executions = judge.count_executions(tasks, run.watch)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": f"ops/chaos/run --minutes {options.minutes:g} --seed {options.seed} "
        f"--workers {options.workers} --engine {options.engine}",
        "seed": options.seed,
        "machine": machine(),
        "settings": {**SHORTENED, "workers": options.workers, "engine": options.engine},
        "seconds": round(seconds),
        "jobs": len(tasks),
        "batches": sum(task.batches()[0] for task in tasks),
        "texts": sum(len(task.texts) for task in tasks),
        "poisoned_texts": sum(len(task.poisoned) for task in tasks),
        "faults": dict(sorted(run.faults.items())),
        "kills": sum(run.faults[kind] for kind in _KILLS),
        "redis_restarts": sum(server.restarts for server in run.fleet.servers),
        "resumes": sum(len(task.jobs) - 1 for task in tasks),
        "lost": found.lost,
        "delivered_twice": found.twice,
        "wrong": found.wrong,
        "wrongly_set_aside": found.wrongly_set_aside,
        "poison_not_set_aside": found.not_set_aside,
        "not_bit_identical": found.not_identical,
        "executions": {
            "batches_without_poison": executions.batches,
            "started": executions.started,
            "finished": executions.finished,
            "extra_percent": round(executions.extra_percent, 2),
            "by_verdict": dict(run.watch.verdicts),
            "committed_again": executions.committed_twice,
        },
        "recovery_s": {
            kind: _spread(of) for kind, of in judge.recoveries(tasks, run.watch).items()
        },
        "longest_silence_s": round(run.watch.longest_silence_s, 1),
        "peak_memory": {
            server.name: {
                "bytes": server.peak_bytes,
                "bound": int(MAXMEMORY * PAUSE_RATIO),
                "maxmemory": MAXMEMORY,
            }
            for server in run.fleet.servers
        },
        "producer_peak_rss_bytes": max(p.peak_rss_bytes for p in run.producers),
        "producers_refused_at_start": _sum(p.refused for p in run.producers),
        "producers_gave_up": _sum(p.gave_up for p in run.producers),
        "unexpected_worker_exits": _sum(
            Counter({f"exit {code}": n for code, n in worker.unexpected_exits.items()})
            for worker in run.fleet.workers
        ),
        "isolated_executions": run.watch.events["isolation_started"],
        "left_in_redis": run.left,
        "breaches": run.breaches(),
    }


def write(of: dict[str, Any], folder: Path) -> str:
    """Write both files and return their name without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{of['date'][:10]}-seed{of['seed']}-{round(of['seconds'] / 60)}min"
    (folder / f"{name}.json").write_text(json.dumps(of, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(page(of), encoding="utf-8")
    return name


def page(of: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    run = of["executions"]
    verdict = "FAILED" if of["breaches"] else "passed"
    zeros = {
        "lost": of["lost"],
        "delivered twice": of["delivered_twice"],
        "wrong": of["wrong"],
        "wrongly dead-lettered": of["wrongly_set_aside"],
        "poison not dead-lettered": of["poison_not_set_aside"],
        "not bit-identical": of["not_bit_identical"],
    }
    sizes = {
        "batches": f"{of['batches']:,}",
        "texts": f"{of['texts']:,}",
        "jobs": f"{of['jobs']:,}, resumed {of['resumes']:,} times",
        "kills": f"{of['kills']:,} of workers and producers",
        "Redis restarts": f"{of['redis_restarts']:,}",
        "extra executions": f"{run['extra_percent']:.1f} % "
        f"({run['started']:,} for {run['batches_without_poison']:,} batches without poison)",
        "executions in isolation mode": f"{of['isolated_executions']:,} "
        f"for {of['poisoned_texts']:,} poisoned texts",
        "longest time without a commit": f"{of['longest_silence_s']} s",
        "producer, peak RSS": f"{of['producer_peak_rss_bytes'] / 2**20:.0f} MiB",
    }
    for name, peak in of["peak_memory"].items():
        sizes[f"Redis {name}, peak"] = (
            f"{peak['bytes'] / 2**20:.1f} MiB; producers pause at {peak['bound'] / 2**20:.1f} MiB"
        )
    parts = [
        f"# Chaos run of {of['date']}: {verdict}\n",
        f"`{of['command']}` on {of['machine']}, {of['seconds'] / 60:.0f} minutes.\n",
        *(f"**Breach**: {breach}\n" for breach in of["breaches"]),
        _table("must be zero", "texts", zeros),
        _table("size of the run", "", sizes),
        _table("fault", "times", of["faults"]),
        "| killed | recovered batches | p50 | p99 | longest |\n|---|---|---|---|---|\n"
        + "".join(_recovery(kind, spread) for kind, spread in of["recovery_s"].items()),
        _table("setting", "value", of["settings"]),
        _table("unexpected worker exits", "times", of["unexpected_worker_exits"]),
        _table("producers refused at the start", "times", of["producers_refused_at_start"]),
    ]
    return "\n".join(parts)


def machine() -> str:
    """Return the processor model and number of cores."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {"n": 0}
    p50, p99 = np.percentile(seconds, [50, 99])
    parts = {"p50": float(p50), "p99": float(p99), "max": max(seconds)}
    return {"n": len(seconds), **{name: round(value, 2) for name, value in parts.items()}}


def _recovery(kind: str, of: dict[str, float]) -> str:
    name = "Redis (until the next commit)" if kind == "redis" else kind
    cells = [f"{of[part]:.1f} s" if part in of else "" for part in ("p50", "p99", "max")]
    return f"| {name} | {of['n']} | {' | '.join(cells)} |\n"


def _table(head: str, value: str, of: dict[str, Any]) -> str:
    rows = "".join(f"| {key} | {cell} |\n" for key, cell in of.items())
    return f"| {head} | {value} |\n|---|---|\n{rows}" if of else ""


def _sum(counters: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for counter in counters:
        total.update(counter)
    return dict(total)
