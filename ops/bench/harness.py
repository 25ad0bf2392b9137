"""What all benchmarks share: options, rounds in turn, ratios, the machine, a table, JSON, a plot.

Figures are ratios taken in one run, round by round, because the machine drifts between rounds.
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

#: What decides how fast a CPU multiplies, the best first, as Linux names it.
INSTRUCTIONS: Final = ("amx_bf16", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


@dataclass
class Table:
    """What a benchmark found.

    Attributes:
        title: a sentence for the plot.
        columns: names, the first of the rows' own names.
        rows: as shown; numbers are rounded where they are written.
        plot: column that is drawn, with its unit as its name.
        floor: of that column, drawn as a line; 0 for none.
        notes: sentences under the table.
        more: whatever else belongs into the JSON.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str | float]]
    plot: str
    floor: float = 0.0
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


def options(name: str, doc: str, *, rounds: int) -> argparse.ArgumentParser:
    """Return a parser with what every benchmark takes."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.set_defaults(name=name)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--rounds", type=int, default=rounds, help="rounds (%(default)s)")
    where = "ops/bench/results, by machine"
    parser.add_argument("--json", type=Path, help=f"file for the figures ({where})")
    parser.add_argument("--plot", type=Path, help=f"file for the drawing ({where})")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; a quick run has one round and overwrites nothing by default."""
    args = parser.parse_args()
    folder = results()
    if args.quick:
        args.rounds = 1
        folder = cache_home() / "bench" / "quick"
    # Texts of another kind do not overwrite the figures of the usual ones.
    corpus = getattr(args, "corpus", None)
    stem = args.name if corpus == parser.get_default("corpus") else f"{args.name}_{corpus}"
    args.json = args.json or folder / f"{stem}.json"
    args.plot = args.plot or folder / f"{stem}.svg"
    return args


def in_turn(rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run everything once a round, so that a drift meets all alike; odd rounds go backwards."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for at in range(rounds):
        for name in sorted(runs, key=list(runs).index, reverse=at % 2 == 1):
            found[name].append(runs[name]())
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the median over the rounds of one figure over another."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def by_precision(
    names: Sequence[str], measure: Callable[[Precision], list[str | float]]
) -> tuple[list[list[str | float]], list[str]]:
    """Return a row for each precision, and a note for each that this machine does not have."""
    rows, notes = [], []
    for precision in map(Precision, names):
        try:
            rows.append(measure(precision))
        except EngineError as error:
            notes.append(f"{precision}: {error}")
    return rows, notes


def find_model() -> resolve.Model:
    """Return the model that the environment names, as a worker would; end if there is none."""
    try:
        return resolve.resolve(
            os.environ.get("EMBEDQ_MODEL", DEFAULT_MODEL),
            None,
            cache_dir=cache_home(),
        )
    except EmbedqError as error:
        raise SystemExit(f"embedq: {error}") from None


@contextmanager
def stub_client(
    tokenizer: Path, texts_per_s: float = 0, log: list[str] | None = None
) -> Iterator[Client]:
    """Run a worker whose device is a stub and whose tokenizer is real, and yield a client of it.

    Args:
        tokenizer: tokenizer.json.
        texts_per_s: speed of the device; 0 costs nothing.
        log: gets the worker's lines at the end.
    """
    environment = {
        "EMBEDQ_DEVICE": "stub",
        "EMBEDQ_MODEL": "stub",
        "EMBEDQ_STUB_TEXTS_PER_S": str(texts_per_s),
        "EMBEDQ_STUB_TOKENIZER": str(tokenizer),
        # The stub's product is tiny: a second thread of BLAS would only wait for it, and burn CPU.
        "OPENBLAS_NUM_THREADS": "1",
    }
    with (
        LocalFleet(environment=environment, redis="server", warn=print) as fleet,
        client_of(fleet, model="stub") as client,
    ):
        yield client
        if log is not None:
            log += fleet.log_path.read_text().splitlines()


def client_of(fleet: LocalFleet, **settings: Any) -> Client:
    """Return a client of a fleet."""
    urls = {"broker_url": fleet.broker_url, "results_url": fleet.results_url}
    return Client(settings=ProducerSettings.load(**urls, **settings), on_idle=fleet.check)


def machine() -> str:
    """Name the machine: cores, processor, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores, {cpu_name()}, Python {platform.python_version()}"


def results() -> Path:
    """Return where figures and plots of this kind of machine go."""
    plain = re.sub(r"\((R|TM)\)|Processor|CPU|@.*?Hz", "", cpu_name())
    slug = re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")
    return Path(__file__).parent / "results" / slug


def cpu_name() -> str:
    """Return what the processor calls itself, its family, and its best instructions.

    A VM hides the model; the family of an AMD still tells Zen 4 (25) from Zen 5 (26), and that of
    an Intel is 6 for all.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name") or platform.processor() or platform.machine()
    best = next((each for each in INSTRUCTIONS if each in told.get("flags", "").split()), "")
    family = told.get("cpu family", "6")
    known = [f"family {family}" if family != "6" else "", best]
    return f"{name} ({', '.join(filter(None, known))})" if any(known) else name


def report(args: argparse.Namespace, table: Table) -> None:
    """Print the table; write the figures and the plot."""
    command = f"ops/bench/{Path(sys.argv[0]).name}"
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "command": " ".join([command, *sys.argv[1:]]),
    }
    print(f"{head['date']}, {head['machine']}: {head['command']}")
    print(_lines(table))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    figures = {**head, "title": table.title, "rows": rows, "notes": table.notes, **table.more}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(figures, indent=1) + "\n")
    draw(args.plot, table, f"{head['date']}, {head['machine']}")


def _lines(table: Table) -> str:
    shown = [list(table.columns), *([_shown(cell) for cell in row] for row in table.rows)]
    widths = [max(len(row[at]) for row in shown) for at in range(len(table.columns))]
    lines = [
        "  ".join(
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in shown
    ]
    return "\n".join([table.title, *lines, *table.notes])


def _shown(cell: str | float) -> str:
    if isinstance(cell, str):
        return cell
    return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.4g}"


def draw(path: Path, table: Table, foot: str) -> None:
    """Draw one bar a row; without matplotlib say so and draw nothing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("No plot: it needs matplotlib. Install it: pip install 'embedq[bench]'.")
        return
    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams.update({"svg.hashsalt": "embedq", "svg.fonttype": "none"})
    from matplotlib import pyplot

    at = list(table.columns).index(table.plot)
    rows = [row for row in table.rows if not isinstance(row[at], str)]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
    names = [str(row[0]) for row in rows]
    bars = axes.barh(range(len(rows)), [float(row[at]) for row in rows], color="#3b6ea5")
    axes.set_yticks(range(len(rows)), names)
    axes.bar_label(bars, labels=[_shown(row[at]) for row in rows], padding=3)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    if table.floor:
        axes.axvline(table.floor, color="#a33", linestyle="--", linewidth=1)
    axes.set_xlabel(f"{table.plot}\n{foot}")
    # Over the whole figure: beside long names, the axes are too narrow for it.
    figure.suptitle(table.title, x=0.01, ha="left", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
