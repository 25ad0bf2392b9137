"""Share options, alternating rounds, stub workers and reports among the benchmarks.

Figures are ratios within each round of one run, because the speed of a machine drifts over time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from embedq import Client
from embedq.errors import EmbedqError
from embedq.local.fleet import LocalFleet
from embedq.protocol.contract import Precision
from embedq.settings import DEFAULT_MODEL, ProducerSettings, cache_home
from embedq_worker.errors import EngineError
from embedq_worker.model import resolve

#: Instruction sets that decide how fast a CPU multiplies, best first, as in /proc/cpuinfo.
INSTRUCTIONS: Final = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


@dataclass
class Table:
    """Figures of a benchmark.

    Attributes:
        title: title of table and plot.
        columns: column names; the first column holds the names of the rows.
        rows: cells, not rounded.
        plot: name of the column to plot.
        floor: target of that column, drawn as a line; 0 for none.
        notes: sentences below the table.
        more: further content of the JSON file.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str | float]]
    plot: str
    floor: float = 0.0
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def options(name: str, doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """Create a parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.set_defaults(name=name)
    parser.add_argument("--quick", action="store_true", help="run tiny sizes, to test the script")
    parser.add_argument("--rounds", type=int, default=rounds, help="number of rounds (%(default)s)")
    where = "default: in ops/bench/results, by machine"
    parser.add_argument("--json", type=Path, help=f"output file of the figures ({where})")
    parser.add_argument("--plot", type=Path, help=f"output file of the plot ({where})")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and set default file names.

    A quick run has one round and writes into the cache folder instead of the results.
    """
    args = parser.parse_args()
    folder = results()
    if args.quick:
        args.rounds = 1
        folder = cache_home() / "bench" / "quick"
    # Another corpus has its own files, so that it does not overwrite those of the default.
    corpus = getattr(args, "corpus", None)
    stem = args.name if corpus == parser.get_default("corpus") else f"{args.name}_{corpus}"
    args.json = args.json or folder / f"{stem}.json"
    args.plot = args.plot or folder / f"{stem}.svg"
    return args


def in_turn(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run everything once per round and return the figures by name.

    Every other round runs in reverse order, so that a drift of the machine affects all equally.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(rounds):
        for name in sorted(runs, key=list(runs).index, reverse=at % 2 == 1):
            found[name].append(runs[name]())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def add_precisions(parser: argparse.ArgumentParser) -> None:
    """Add the option whose value is for `by_precision`."""
    parser.add_argument("--precisions", nargs="+", default=["f32", "bf16"], help="%(default)s")


def by_precision(
    names: Sequence[str], measure: Callable[[Precision], list[str | float]]
) -> tuple[list[list[str | float]], list[str]]:
    """Measure each precision; return the rows, and a note per precision that cannot be used."""
    rows, notes = [], []
    for precision in map(Precision, names):
        try:
            rows.append(measure(precision))
        except EngineError as error:
            notes.append(f"{precision}: {error}")
    return rows, notes


def find_model() -> resolve.Model:
    """Resolve the model of EMBEDQ_MODEL, or exit if there is none."""
    try:
        return resolve.resolve(
            os.environ.get("EMBEDQ_MODEL", DEFAULT_MODEL),
            None,
            cache_dir=cache_home(),
        )
    except EmbedqError as error:
        raise SystemExit(f"embedq: {error}") from None


def stub_environment(texts_per_s: float) -> dict[str, str]:
    """Return the environment of a worker with a stub engine of this speed; 0 for no limit."""
    return {
        "EMBEDQ_DEVICE": "stub",
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_STUB_TEXTS_PER_S": str(texts_per_s),
        # The stub's matrix product is tiny: further BLAS threads would only spin.
        "OPENBLAS_NUM_THREADS": "1",
    }


@contextmanager
def stub_client(
    tokenizer: Path,
    texts_per_s: float = 0,
    log: list[str] | None = None,
    settings: Mapping[str, str] | None = None,
) -> Iterator[Client]:
    """Run a worker with a stub engine and a real tokenizer, and yield a client.

    Args:
        tokenizer: path of tokenizer.json.
        texts_per_s: speed of the stub; 0 for no limit.
        log: list to which the worker's log lines are appended at the end.
        settings: further environment variables of the worker.
    """
    environment = {
        **stub_environment(texts_per_s),
        "EMBEDQ_STUB_TOKENIZER": str(tokenizer),
        **(settings or {}),
    }
    with (
        LocalFleet(environment=environment, redis="server", warn=print) as fleet,
        client_of(fleet, model="stub") as client,
    ):
        yield client
        if log is not None:
            log += fleet.log_path.read_text().splitlines()


def client_of(fleet: LocalFleet, **settings: Any) -> Client:
    """Return a client of a local fleet."""
    urls = {"broker_url": fleet.broker_url, "results_url": fleet.results_url}
    return Client(settings=ProducerSettings.load(**urls, **settings), on_idle=fleet.check)


def machine() -> str:
    """Describe the machine: number of cores, processor, version of Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {cpu_name()}, Python {platform.python_version()}"


def results() -> Path:
    """Return the results folder of this type of processor."""
    plain = re.sub(r"\((R|TM)\)|Processor|CPU|@.*?Hz", "", cpu_name())
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    return Path(__file__).parent / "results" / slug


def cpu_name() -> str:
    """Return the processor's name, family and best instruction set.

    A VM hides the model, but AMD's family distinguishes Zen 4 (25) from Zen 5 (26). Intel's family
    is always 6 and therefore omitted.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = info.get("model name") or platform.processor() or platform.machine()
    best = next((each for each in INSTRUCTIONS if each in info.get("flags", "").split()), "")
    family = info.get("cpu family", "6")
    traits = [f"family {family}" if family != "6" else "", best]
    return f"{name} ({', '.join(filter(None, traits))})" if any(traits) else name


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process; 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(args: argparse.Namespace, table: Table) -> None:
    """Print the table, and write the figures and the plot."""
    command = f"ops/bench/{Path(sys.argv[0]).name}"
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "command": " ".join([command, *sys.argv[1:]]),
    }
    print(f"{head['date']}, {head['machine']}: {head['command']}")
    print(_format(table))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    figures = {**head, "title": table.title, "rows": rows, "notes": table.notes, **table.more}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    draw(args.plot, table, f"{head['date']}, {head['machine']}")


def _format(table: Table) -> str:
    shown = [list(table.columns), *([_format_cell(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[at]) for row in shown) for at in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in shown
    ]
    return "\n".join([table.title, *lines, *table.notes])


def _format_cell(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"


def draw(path: Path, table: Table, foot: str) -> None:
    """Plot one bar per row; without matplotlib, print how to install it."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("No plot, because matplotlib is missing. Install it: pip install 'embedq[bench]'.")
        return
    matplotlib.use("svg")
    # Equal figures give equal files.
    matplotlib.rcParams.update({"svg.hashsalt": "embedq", "svg.fonttype": "none"})
    from matplotlib import pyplot

    at = list(table.columns).index(table.plot)
    rows = [row for row in table.rows if not isinstance(row[at], str)]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    names = [str(row[0]) for row in rows]
    bars = axes.barh(range(len(rows)), [float(row[at]) for row in rows], color="#3b6ea5")
    axes.set_yticks(range(len(rows)), names)
    axes.bar_label(bars, labels=[_format_cell(row[at]) for row in rows], padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if table.floor:
        axes.axvline(table.floor, color="#a33", linestyle="--", linewidth=1)
    axes.set_xlabel(f"{table.plot}\n{foot}")
    # Above the whole figure: beside long row names the axes are too narrow for the title.
    figure.suptitle(table.title, x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
