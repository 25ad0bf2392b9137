"""embedq end to end, through Celery and Redis, against other embedders in process.

    ops/bench/peers.py [--texts 1000] [--rounds 3] [--json FILE]

Every peer lives in a virtual environment of its own, gets the same texts, model files and
truncation, and runs in turn with the others, so that a drift of the machine meets all alike. Quote
the ratios; the vectors of each peer are compared with embedq's in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from corpus import docstrings

from embedq import Client
from embedq.contract import Accuracy
from embedq.local import LocalFleet
from embedq.settings import DEFAULT_MODEL, ProducerSettings, cache_home
from embedq_worker import models

#: What a peer runs: reads texts once, then a line a round; answers seconds and saves vectors.
_PEER = """
import json, sys, time
import numpy as np
task = json.loads(sys.stdin.readline())
texts = json.load(open(task["texts"]))
{load}
encode(texts[:64])
print(json.dumps({{"ready": True}}), flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    vectors = encode(texts)
    seconds = time.perf_counter() - began
    np.save(task["vectors"], np.asarray(vectors, np.float32))
    print(json.dumps({{"seconds": seconds}}), flush=True)
"""


@dataclass(frozen=True)
class Peer:
    """Another embedder.

    Attributes:
        name: as in the table.
        requirements: what its environment needs.
        load: source that defines ``encode(texts)``; ``task["model"]`` is the folder.
    """

    name: str
    requirements: tuple[str, ...]
    load: str


PEERS = (
    Peer(
        "sentence-transformers torch",
        # The CPU build where the installer finds one; the version is pinned for comparisons.
        ("torch==2.13.0", "sentence-transformers>=5,<7"),
        """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(task["model"], device="cpu")
def encode(texts): return model.encode(texts, normalize_embeddings=True)
""",
    ),
)


class RunningPeer:
    """A peer in its process, loaded and warm."""

    def __init__(self, peer: Peer, python: Path, model: Path, texts: Path, folder: Path) -> None:
        self.name = peer.name
        self._vectors = folder / f"{peer.name.replace(' ', '-')}.npy"
        command = [str(python), "-c", _PEER.format(load=peer.load)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        task = {"texts": str(texts), "model": str(model), "vectors": str(self._vectors)}
        self._ask(json.dumps(task))

    def run(self) -> float:
        """Embed all texts once and return the seconds it took."""
        return float(self._ask("go")["seconds"])

    def vectors(self) -> np.ndarray:
        """Return the vectors of the last run, float32 [n, D]."""
        return cast(np.ndarray, np.load(self._vectors))

    def close(self) -> None:
        """End the process."""
        cast(IO[str], self._process.stdin).close()
        self._process.wait(30)

    def _ask(self, line: str) -> dict[str, float]:
        stdin, stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        stdin.write(line + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} ended with status {self._process.wait()}.")
        return cast(dict[str, float], json.loads(answer))


def environment_of(peer: Peer, folder: Path) -> Path:
    """Return the Python of a peer's environment, made on first use."""
    python = folder / peer.name.replace(" ", "-") / "bin" / "python"
    stamp = python.parent.parent / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(peer.requirements):
        print(f"making the environment of {peer.name}; this takes minutes", file=sys.stderr)
        venv.create(python.parent.parent, with_pip=True)
        for requirement in peer.requirements:  # in order: the first may decide the build
            command = [str(python), "-m", "pip", "install", "--quiet", requirement]
            subprocess.run(command, check=True)
        stamp.write_text("\n".join(peer.requirements))
    return python


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Run everyone in turn and return the figures."""
    texts = docstrings(args.texts)
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    texts_path = folder / "texts.json"
    texts_path.write_text(json.dumps(texts))
    wheel = os.environ.get("EMBEDQ_WHEEL_DIR")
    model = models.resolve(
        os.environ.get("EMBEDQ_MODEL", DEFAULT_MODEL),
        None,
        cache_dir=cache_home(),
        wheel_dir=Path(wheel) if wheel else None,
    )
    running = [
        RunningPeer(peer, environment_of(peer, folder), model.folder, texts_path, folder)
        for peer in PEERS
    ]
    seconds: dict[str, list[float]] = {}
    with LocalFleet(warn=print) as fleet:
        settings = ProducerSettings.load(
            broker_url=fleet.broker_url, results_url=fleet.results_url, accuracy=Accuracy.EXACT
        )
        with Client(settings=settings, on_idle=fleet.check) as client:
            client.encode(texts[:64])
            for _ in range(args.rounds):
                began = time.perf_counter()
                ours = client.encode(texts)
                name = "embedq exact, end to end"
                seconds.setdefault(name, []).append(time.perf_counter() - began)
                for peer in running:
                    seconds.setdefault(peer.name, []).append(peer.run())
    parity = {peer.name: _min_cosine(ours, peer.vectors()) for peer in running}
    for peer in running:
        peer.close()
    return _figures(args, texts, seconds, parity)


def _figures(
    args: argparse.Namespace,
    texts: list[str],
    seconds: dict[str, list[float]],
    parity: dict[str, float],
) -> dict[str, object]:
    ours = next(iter(seconds))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {_cpu_name()}",
        "command": f"ops/bench/peers.py --texts {args.texts} --rounds {args.rounds}",
        "texts": len(texts),
        "rows": [
            {
                "name": name,
                "docs_per_second": round(len(texts) / statistics.median(runs), 1),
                # Pair by pair within a round, because the machine drifts between rounds.
                "embedq_is_faster_by": round(
                    statistics.median(t / o for t, o in zip(runs, seconds[ours], strict=True)), 2
                ),
                "min_cosine_to_embedq": round(parity.get(name, 1.0), 6),
                "seconds": [round(run, 2) for run in runs],
            }
            for name, runs in seconds.items()
        ],
    }


def _min_cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / lengths).min())


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=1000, help="how many docstrings (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (%(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument(
        "--folder",
        type=Path,
        default=cache_home() / "bench",
        help="where the environments of the peers are kept (%(default)s)",
    )
    args = parser.parse_args()
    figures = measure(args)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{figures['date']}, {figures['machine']}: {figures['command']}")
    print(f"{'':36}{'docs/s':>8}{'ratio':>8}{'min cosine':>12}")
    for row in cast(list[dict[str, object]], figures["rows"]):
        print(
            f"{row['name']:36}{row['docs_per_second']:8}{row['embedq_is_faster_by']:8}"
            f"{row['min_cosine_to_embedq']:12}"
        )


if __name__ == "__main__":
    main()
