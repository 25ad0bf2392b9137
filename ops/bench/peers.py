"""Measure embedq end to end, through Celery and Redis, against other embedders in process.

    ops/bench/peers.py [--texts 1000] [--rounds 3] [--corpus docstrings] [--only NAME ...] [--quick]

Each peer has its own virtual environment and gets the same texts, model files and truncation. All
take turns, so that a drift of the machine affects them equally, and only ratios are comparable.
Vectors are compared with those of embedq's class `exact`. Peers that cannot be installed or started
are listed with the reason.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
import venv
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
from common import Table, client_of, find_model, in_turn, options, parse, ratio, report
from corpus import CORPORA, docstrings

from embedq.local.fleet import LocalFleet
from embedq.protocol.contract import Accuracy
from embedq.settings import cache_home
from embedq_worker.engines.model_cache import QuantizedModelStore

#: Program of a peer: loads the texts, then embeds them once per line of stdin, prints the seconds
#: and saves the vectors.
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
        name: name in the table.
        environment: name of its virtual environment, which peers may share.
        requirements: packages to install one after the other; the first may decide the build.
        load: source that defines ``encode(texts)``; ``task`` has the folders ``model`` and
            ``export``, and the URL ``broker``.
    """

    name: str
    environment: str
    requirements: tuple[str, ...]
    load: str


#: Packages with torch, whose version is pinned so that figures stay comparable.
_TORCH = ("torch==2.13.0", "sentence-transformers>=5,<7", "celery[redis]>=5.7,<5.8")
_OPTIMUM = ("torch==2.13.0", "sentence-transformers[onnx,openvino]>=5,<7")
_OPENVINO = """
from sentence_transformers import SentenceTransformer
options = {{"export": True, "ov_config": {config}}}
model = SentenceTransformer(task["model"], backend="openvino", model_kwargs=options)
def encode(texts): return model.encode(texts, normalize_embeddings=True)
"""
#: The simplest Celery task with a model: 64 texts per message, vectors as JSON.
_CELERY = """
import atexit, os, subprocess, tempfile
folder = tempfile.mkdtemp()
open(folder + "/plain_task.py", "w").write('''
import os
from celery import Celery
app = Celery("plain", broker=os.environ["BROKER"], backend=os.environ["BROKER"])
app.conf.update(task_serializer="json", result_serializer="json", worker_prefetch_multiplier=1)
model = None
@app.task(name="embed")
def embed(texts):
    global model
    if model is None:
        from sentence_transformers import SentenceTransformer
        model = SentenceTransformer(os.environ["MODEL"], device="cpu")
    return model.encode(texts, normalize_embeddings=True).tolist()
''')
os.environ.update(BROKER=task["broker"], MODEL=task["model"])
sys.path.insert(0, folder)
command = [sys.executable, "-m", "celery", "-A", "plain_task", "worker", "-c", "1"]
worker = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
atexit.register(worker.kill)
from plain_task import embed
def encode(texts):
    sent = [embed.delay(texts[at : at + 64]) for at in range(0, len(texts), 64)]
    return [vector for each in sent for vector in each.get(timeout=600)]
"""

PEERS = (
    Peer(
        "sentence-transformers torch",
        "sentence-transformers-torch",
        _TORCH,
        """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(task["model"], device="cpu")
def encode(texts): return model.encode(texts, normalize_embeddings=True)
""",
    ),
    Peer("plain Celery task, JSON", "sentence-transformers-torch", _TORCH, _CELERY),
    Peer(
        "sentence-transformers onnx",
        "sentence-transformers-optimum",
        _OPTIMUM,
        """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(task["model"], backend="onnx", model_kwargs={"export": True})
model.save_pretrained(task["export"])
# FastEmbed applies the length of these files, 128 tokens; the model's maximum is 256.
from pathlib import Path
for name, wrong in (("tokenizer_config", "max_length"), ("tokenizer", "padding truncation")):
    path = Path(task["export"]) / (name + ".json")
    content = json.loads(path.read_text())
    content.update(dict.fromkeys(wrong.split()))
    path.write_text(json.dumps(content))
def encode(texts): return model.encode(texts, normalize_embeddings=True)
""",
    ),
    Peer(
        "sentence-transformers openvino f32",
        "sentence-transformers-optimum",
        _OPTIMUM,
        _OPENVINO.format(config={"INFERENCE_PRECISION_HINT": "f32"}),
    ),
    Peer(
        "sentence-transformers openvino",
        "sentence-transformers-optimum",
        _OPTIMUM,
        _OPENVINO.format(config={}),
    ),
    Peer(
        "fastembed",
        "fastembed",
        ("fastembed>=0.7,<1",),
        # FastEmbed reads ONNX only: the file that "sentence-transformers onnx" exported.
        """
import os
if not os.path.exists(task["export"]):
    sys.exit("needs the export of 'sentence-transformers onnx'; name both in --only")
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
TextEmbedding.add_custom_model(
    model="local/model", pooling=PoolingType.MEAN, normalization=True,
    sources=ModelSource(hf="local/model"), dim=384, model_file="onnx/model.onnx",
)
model = TextEmbedding("local/model", specific_model_path=task["export"])
def encode(texts): return list(model.embed(texts))
""",
    ),
)

#: Accuracy classes of embedq, the reference first.
CLASSES = (Accuracy.EXACT, Accuracy.STANDARD, Accuracy.INT8)
#: Number of texts for `embedq-worker quantize`, if there is no quantized model yet.
CALIBRATION_TEXTS = 1300


class Unavailable(Exception):
    """A peer cannot be installed, or its process ended."""


class RunningPeer:
    """A peer, loaded and warmed up in its process."""

    def __init__(self, peer: Peer, python: Path, task: dict[str, str], folder: Path) -> None:
        self.name = peer.name
        self._log = folder / f"{peer.name.replace(' ', '-')}.log"
        self._vectors = folder / f"{peer.name.replace(' ', '-')}.npy"
        command = [str(python), "-c", _PEER.format(load=peer.load)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("w"),
            text=True,
            env=environment,
        )
        self._call(json.dumps({**task, "vectors": str(self._vectors)}))

    def run(self) -> float:
        """Embed all texts once and return the seconds."""
        return float(self._call("go")["seconds"])

    def vectors(self) -> np.ndarray:
        """Return the vectors of the last run, float32 [n, D]."""
        return cast(np.ndarray, np.load(self._vectors))

    def close(self) -> None:
        """End the process."""
        cast(IO[str], self._process.stdin).close()
        self._process.wait(30)

    def _call(self, line: str) -> dict[str, float]:
        stdin, stdout = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        with suppress(BrokenPipeError):  # the missing answer is reported below
            stdin.write(line + "\n")
            stdin.flush()
        # Libraries may print to stdout too; only the answers are JSON objects.
        answer = next((line for line in stdout if line.startswith("{")), "")
        if not answer:
            last = self._log.read_text().strip().splitlines()[-1:]
            raise Unavailable(f"ended with status {self._process.wait()}: {' '.join(last)[:200]}")
        return cast(dict[str, float], json.loads(answer))


def environment_of(peer: Peer, folder: Path) -> Path:
    """Return the Python of a peer's virtual environment, creating it on first use.

    Raises:
        Unavailable: a package cannot be installed.
    """
    python = folder / peer.environment / "bin" / "python"
    stamp = python.parent.parent / "requirements.txt"
    if not stamp.exists() or stamp.read_text() != "\n".join(peer.requirements):
        print(f"Installing {peer.name}; this takes minutes.", file=sys.stderr)
        if not python.exists():
            venv.create(python.parent.parent, with_pip=True)
        for requirement in peer.requirements:
            command = [str(python), "-m", "pip", "install", "--quiet", requirement]
            if subprocess.run(command, check=False).returncode:
                raise Unavailable(f"pip cannot install {requirement} here")
        stamp.write_text("\n".join(peer.requirements))
    return python


def start(
    peers: list[Peer], task: dict[str, str], folder: Path
) -> tuple[list[RunningPeer], list[str]]:
    """Start the peers; return those that run, and why the others do not."""
    running, absent = [], []
    for peer in peers:
        try:
            running.append(RunningPeer(peer, environment_of(peer, folder), task, folder))
        except Unavailable as error:
            absent.append(f"{peer.name}: not measured: {error}")
    return running, absent


def quantize(folder: Path, n: int) -> str:
    """Quantize the model if it is not, with docstrings beyond the first n.

    Returns:
        Why there is no quantized model; empty if there is one.
    """
    if QuantizedModelStore(cache_home(), find_model()).current():
        return ""
    lines = folder / "calibration.jsonl"
    texts = docstrings(n + CALIBRATION_TEXTS)[n:]
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [sys.executable, "-m", "embedq_worker", "quantize", str(lines)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    return f"embedq-worker quantize ended with {done.returncode}" if done.returncode else ""


def measure(args: argparse.Namespace) -> Table:
    """Run embedq and all peers in turn and return the figures."""
    texts = CORPORA[args.corpus](64 if args.quick else args.texts)
    folder: Path = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "texts.json").write_text(json.dumps(texts))
    export = folder / "export"
    shutil.rmtree(export, ignore_errors=True)
    absent = []
    if Accuracy.INT8 in args.classes and (why := quantize(folder, len(texts))):
        args.classes.remove(Accuracy.INT8)
        absent.append(f"embedq int8: not measured: {why}")
    chosen = [peer for peer in PEERS if not args.only or peer.name in args.only]
    found: dict[str, np.ndarray] = {}
    with (
        LocalFleet(environment={"EMBEDQ_DEVICE": "cpu"}, redis="server", warn=print) as fleet,
        client_of(fleet) as client,
    ):
        task = {
            "texts": str(folder / "texts.json"),
            "model": str(find_model().folder),
            "export": str(export),
            "broker": fleet.broker_url.replace("virtual_host=0", "virtual_host=2"),
        }
        running, missing = start(chosen, task, folder)
        absent += missing

        def encode(accuracy: Accuracy) -> float:
            began = time.perf_counter()
            found[f"embedq {accuracy}"] = client.encode(texts, accuracy=accuracy)
            return time.perf_counter() - began

        runs = {f"embedq {each}": functools.partial(encode, each) for each in args.classes}
        for run in runs.values():
            run()  # opens the engine of the class
        seconds = in_turn(args.rounds, {**runs, **{peer.name: peer.run for peer in running}})
        found |= {peer.name: peer.vectors() for peer in running}
        for peer in running:
            peer.close()
    return _table(args, texts, seconds, found, absent)


def _table(
    args: argparse.Namespace,
    texts: list[str],
    seconds: dict[str, list[float]],
    found: dict[str, np.ndarray],
    absent: list[str],
) -> Table:
    classes = [f"embedq {each}" for each in args.classes]
    reference = found[classes[0]]
    rows: list[list[str | float]] = [
        [
            name,
            len(texts) / statistics.median(runs),
            *(ratio(runs, seconds[each]) for each in classes),
            _min_cosine(reference, found[name]),
            _overlap(reference, found[name]),
        ]
        for name, runs in seconds.items()
    ]
    faster = [f"{each} is faster by" for each in classes]
    return Table(
        f"embedq through Celery and Redis against others in process, {len(texts):,} {args.corpus}",
        ["embedder", "texts/s", *faster, f"min cosine to {args.classes[0]}", "top-10 overlap"],
        rows,
        plot="texts/s",
        notes=absent,
        more={"corpus": args.corpus, "texts": len(texts), "seconds": seconds},
    )


def _min_cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / lengths).min())


def _overlap(a: np.ndarray, b: np.ndarray, n: int = 10) -> float:
    # Share of the n nearest neighbors of a text that both agree on.

    def nearest(vectors: np.ndarray) -> np.ndarray:
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        near = unit @ unit.T
        np.fill_diagonal(near, -2)
        return np.argsort(-near, axis=1)[:, :n]

    pairs = zip(nearest(a), nearest(b), strict=True)
    return statistics.fmean(len(set(one) & set(other)) / len(one) for one, other in pairs)


def main() -> None:
    """Run the command line."""
    parser = options("peers", __doc__ or "", rounds=3)
    parser.add_argument("--texts", type=int, default=1000, help="number of texts (%(default)s)")
    parser.add_argument("--corpus", choices=CORPORA, default="docstrings", help="%(default)s")
    parser.add_argument("--only", nargs="+", help="names of the peers to run (all)")
    parser.add_argument(
        "--classes",
        nargs="+",
        type=Accuracy,
        help="accuracy classes of embedq, the first is the reference (all; --quick: no int8)",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=cache_home() / "bench",
        help="folder of the virtual environments (%(default)s)",
    )
    args = parse(parser)
    if args.classes is None:
        args.classes = [each for each in CLASSES if not (args.quick and each is Accuracy.INT8)]
    report(args, measure(args))


if __name__ == "__main__":
    main()
