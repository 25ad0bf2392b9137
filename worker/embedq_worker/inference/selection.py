"""Choose engine and CPU configuration, and remember the choice.

A short race between engines on this machine.

Which engine computes an accuracy class on this CPU: the faster of those that are proven.

The answer is kept for the machine, because a run that resumes wants the engine that began it.
Where it cannot be kept, it is decided without measuring, so that it is still the same next time.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from embedq.protocol.contract import Accuracy, Precision, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq_worker.files import locked, read_private, replace_private
from embedq_worker.inference.embedder import CANARY_TEXT, Embedder
from embedq_worker.model.resolve import Model
from embedq_worker.settings import EngineChoice, PrecisionChoice, WorkerSettings

#: Padded tokens of one inference, where the settings name none; why: see engines/onnxruntime.py.
DEFAULT_TOKEN_BUDGET: Final = 512


def engine_versions() -> str:
    """Name the runtimes that are installed; another one may want another choice."""
    return str([_version(name) for name in ("onnxruntime", "openvino")])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


class CpuConfig(NamedTuple):
    """How an engine uses the cores of this machine.

    Attributes:
        cores: number of cores the engine computes on.
        streams: number of concurrent inferences; they share the cores.
        token_budget: maximum number of padded tokens per inference.
    """

    cores: int
    streams: int
    token_budget: int

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> CpuConfig:
        """Return the settings, with one stream per core and the default token budget for 0."""
        cores = settings.cores()
        streams = min(settings.streams or cores, cores)
        return cls(cores, streams, settings.token_budget or DEFAULT_TOKEN_BUDGET)

    def describe(self) -> str:
        """Return the three numbers in words."""
        return f"{self.streams} streams on {self.cores} cores, {self.token_budget} tokens"


Key = TypeVar("Key")


_WORDS: Final = CANARY_TEXT.split() * 20


#: What they embed: 128 texts of 5 to 200 words, most of them short and few of equal length, as
#: prose has them; about as much as a batch of real work keeps all cores at full token batches
#: with. With a quarter of it the tail decided, and noise. With five lengths only, onnxruntime had
#: nothing to pad and won by 0.3 %, and with docstrings it was 8 % behind (f32, two Zen 4 cores,
#: measured 2026-11-28).
TEXTS: Final = tuple(" ".join(_WORDS[: round(5 * 40 ** (i / 127))]) for i in range(128))


#: Raised whenever another race may have another winner, so that it is run again.
BENCHMARK_VERSION: Final = 2


#: The best of so many rounds counts: others can only make an engine slower.
ROUNDS: Final = 4


#: An engine whose best is so many times that of the fastest is out of the race.
ELIMINATION_FACTOR: Final = 1.4


def benchmark(
    embedders: Mapping[Key, Embedder],
    model: Model,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """Return the seconds each needs, taken in turn, so that a drift of the machine meets all.

    Raises:
        EngineError: one of them fails.
    """
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    batch = EmbedBatch("race", 0, TEXTS, spec)
    seconds: dict[Key, float] = {}
    running = dict(embedders)
    for _ in range(ROUNDS):
        for key, embedder in running.items():
            began = clock()
            embedder.embed(batch)
            seconds[key] = min(seconds.get(key, float("inf")), clock() - began)
        limit = ELIMINATION_FACTOR * min(seconds.values(), default=0.0)
        running = {key: each for key, each in running.items() if seconds[key] <= limit}
    return seconds


log = logging.getLogger(__name__)


#: Name of the memory inside the cache folder.
FILE_NAME: Final = "engines.json"


#: Most bytes of it; a larger one is not ours.
MAX_BYTES: Final = 1024 * 1024


#: How much faster bf16 must be than f32 before it is worth its rounding and a second engine.
BF16_MARGIN: Final = 1.1


#: Seconds to wait for another worker's measurement, which takes some ten.
LOCK_DEADLINE_S: Final = 120.0


class Candidate(NamedTuple):
    """An engine on the CPU.

    Attributes:
        engine: ``openvino`` or ``onnxruntime``.
        precision: the arithmetic.
    """

    engine: EngineChoice
    precision: Precision


def candidates(
    accuracy: Accuracy,
    engine: EngineChoice,
    precision: PrecisionChoice,
    *,
    has_openvino: bool,
) -> list[Candidate]:
    """List what could serve a class, the best guess first.

    Args:
        accuracy: the class; ``exact`` is f32 whatever else is asked for.
        engine, precision: what the settings say.
        has_openvino: it is installed.

    Returns:
        What to try. A CPU without bf16 is found out by opening: asking would cost every start the
        import of a runtime that it may not use.
    """
    found = [Candidate(EngineChoice.ONNXRUNTIME, Precision.F32)]
    if has_openvino:
        found.insert(0, Candidate(EngineChoice.OPENVINO, Precision.F32))
        if accuracy is not Accuracy.EXACT:
            found.insert(0, Candidate(EngineChoice.OPENVINO, Precision.BF16))
    if engine is not EngineChoice.AUTO:
        found = [one for one in found if one.engine is engine]
    if precision is not PrecisionChoice.AUTO and accuracy is not Accuracy.EXACT:
        found = [one for one in found if str(one.precision) == str(precision)]
    return found


def fastest(seconds: Mapping[Candidate, float]) -> Candidate:
    """Choose by time; bf16 must win clearly."""
    return min(
        seconds,
        key=lambda one: seconds[one] * (BF16_MARGIN if one.precision is Precision.BF16 else 1),
    )


class TuningCache:
    """The choices of this machine."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / FILE_NAME

    def get(self, key: str, among: Sequence[Candidate]) -> Candidate | None:
        """Return what was chosen under this key, if it is still to be had."""
        entry = self._read().get(key)
        found = entry if isinstance(entry, dict) else {}
        shown = {(str(one.engine), str(one.precision)): one for one in among}
        return shown.get((str(found.get("engine")), str(found.get("precision"))))

    def put(self, key: str, chosen: Candidate, figures: Mapping[str, float]) -> None:
        """Remember a choice with what was measured; a file that cannot be written is logged."""
        entry = {"engine": chosen.engine, "precision": chosen.precision, "seconds": dict(figures)}
        content = json.dumps({**self._read(), key: entry}, indent=1)
        try:
            replace_private(self._path, content.encode())
        except OSError as error:
            log.warning("tuning_cache_write_failed path=%s reason=%s", self._path, error.strerror)

    def is_writable(self) -> bool:
        """Say whether a choice could be kept."""
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._path.parent).close()
            return True
        return False

    def lock(self) -> AbstractContextManager[None]:
        """Let one worker measure at a time; the others find its answer."""
        return locked(self._path.with_suffix(".lock"), LOCK_DEADLINE_S)

    def _read(self) -> dict[str, object]:
        with suppress(ValueError):
            known = json.loads(read_private(self._path, MAX_BYTES) or b"{}")
            return known if isinstance(known, dict) else {}
        return {}


def choose(
    candidates: Sequence[Candidate],
    key: str,
    memory: TuningCache,
    measure: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    """Choose an engine, and say why: ``only``, ``kept``, ``measured`` or ``unmeasured``.

    Args:
        among: at least one, the best guess first.
        key: names everything that could change the answer.
        memory: of this machine.
        measure: returns seconds for each that is proven, leaving out the others.
    """
    if len(candidates) == 1:
        return candidates[0], "only"
    kept = memory.get(key, candidates)
    if kept:
        return kept, "kept"
    if not memory.is_writable():
        return candidates[0], "unmeasured"
    try:
        with memory.lock():
            kept = memory.get(key, candidates)
            return (kept, "kept") if kept else _measure(candidates, key, memory, measure)
    except TimeoutError:
        return candidates[0], "unmeasured"


def _measure(
    candidates: Sequence[Candidate],
    key: str,
    memory: TuningCache,
    measure: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    seconds = measure(candidates)
    if not seconds:
        return candidates[-1], "unmeasured"
    chosen = fastest(seconds)
    figures = {f"{one.engine} {one.precision}": took for one, took in seconds.items()}
    memory.put(key, chosen, figures)
    return chosen, "measured"


def machine_key(**facts: str) -> str:
    """Name this machine and everything else that could change a choice."""
    known = {**facts, "machine": platform.machine(), "cpu": _cpu()}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _cpu() -> str:
    """Name the kind of CPU with what it can do; the same on every start."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return "".join(sorted(wanted))
    return platform.processor()
