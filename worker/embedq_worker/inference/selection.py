"""Choose engine and CPU configuration, and remember the choice.

How the engines of a model use the cores of this worker, by its settings and what tuning kept.

How an engine uses the cores of this machine, and when another way is better. Pure.

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
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from embedq.protocol.contract import Accuracy, Precision, VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq_worker.files import locked, read_private, replace_private
from embedq_worker.inference.embedder import CANARY_TEXT, Embedder
from embedq_worker.model.resolve import Model
from embedq_worker.settings import EngineChoice, PrecisionChoice, WorkerSettings

#: Padded tokens of one inference, where the settings name none; why: see engines/onnxruntime.py.
DEFAULT_TOKEN_BUDGET: Final = 512


class CpuConfigs:
    """The layouts of one model's engines."""

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self._settings = settings
        self._model = model

    def of(self, one: Candidate, accuracy: Accuracy) -> CpuConfig:
        """Return how an engine is to use the cores: as the settings say, as tuned, or as usual."""
        settings = self._settings
        kept = TuningCache(settings.cache_dir).get_entry(self.key(one, accuracy))
        usual = CpuConfig(settings.cores(), settings.cores(), DEFAULT_TOKEN_BUDGET)
        tuned = CpuConfig.from_entry(kept, settings.cores()) or usual
        return tuned.overridden(settings.threads, settings.streams, settings.token_budget)

    def key(self, one: Candidate, accuracy: Accuracy) -> str:
        """Name everything that could change what is the best layout."""
        return machine_key(
            what="layout",
            model=self._model.identity,
            accuracy=str(accuracy),
            engine=f"{one.engine} {one.precision}",
            versions=engine_versions(),
            cores=str(self._settings.cores()),
        )


def engine_versions() -> str:
    """Name the runtimes that are installed; another one may want another choice."""
    return str([_version(name) for name in ("onnxruntime", "openvino")])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


#: Padded tokens of one inference that are tried.
BUDGETS: Final = (256, 512, 1024, 2048)


#: Least gain for which the usual layout is left.
MIN_GAIN: Final = 0.03


class CpuConfig(NamedTuple):
    """How an engine uses the cores.

    Attributes:
        cores: that it computes on.
        streams: inferences at a time; they share the cores.
        token_budget: most padded tokens of one inference.
        source: ``usual``, ``tuned`` or ``settings``.
    """

    cores: int
    streams: int
    token_budget: int
    source: str = "usual"

    def describe(self) -> str:
        """Say it in a few words."""
        return (
            f"{self.streams} streams on {self.cores} cores, {self.token_budget} tokens "
            f"({self.source})"
        )

    @classmethod
    def from_entry(cls, entry: Mapping[str, object], most: int) -> CpuConfig | None:
        """Read what was kept; None for what is no layout for this many cores."""
        found = [entry.get(name) for name in ("cores", "streams", "token_budget")]
        numbers = [value for value in found if type(value) is int and value > 0]
        if len(numbers) != len(found) or numbers[0] > most or numbers[1] > numbers[0]:
            return None
        return cls(numbers[0], numbers[1], numbers[2], "tuned")

    def overridden(self, cores: int, streams: int, token_budget: int) -> CpuConfig:
        """Return this layout with what the settings say; 0 says nothing."""
        if not (cores or streams or token_budget):
            return self
        wanted = cores or self.cores
        return CpuConfig(
            wanted,
            min(streams or (wanted if cores else self.streams), wanted),
            token_budget or self.token_budget,
            "settings",
        )

    def entry(self) -> dict[str, Any]:
        """Return what is kept of it."""
        return {"cores": self.cores, "streams": self.streams, "token_budget": self.token_budget}


class Timing(NamedTuple):
    """What was measured of a layout.

    Attributes:
        layout: which.
        seconds: of each round.
        gain: median over the rounds of the usual layout's seconds by this one's, less 1.
        noise: half of what lies between the quartiles of that.
    """

    layout: CpuConfig
    seconds: tuple[float, ...]
    gain: float
    noise: float


def layouts(cores: int, usual_budget: int) -> list[CpuConfig]:
    """List what is worth trying on this many cores, the usual one first."""
    usual = CpuConfig(cores, cores, usual_budget)
    streams = sorted({cores, max(1, cores // 2), 1}, reverse=True)
    tried = [CpuConfig(cores, count, budget) for count in streams for budget in BUDGETS]
    return [usual, *(each for each in tried if each != usual)]


def timings(rounds: Mapping[CpuConfig, Sequence[float]], default: CpuConfig) -> list[Timing]:
    """Compare each layout with the usual one, round by round: a drift of the machine meets both."""
    found = []
    for layout, seconds in rounds.items():
        gains = [u / s - 1 for u, s in zip(rounds[default], seconds, strict=True)]
        low, _, high = statistics.quantiles(gains, n=4) if len(gains) > 1 else (0.0, 0.0, 0.0)
        found.append(
            Timing(layout, tuple(seconds), statistics.median(gains), max(0.0, high - low) / 2)
        )
    return found


def decide(found: Sequence[Timing], default: CpuConfig) -> CpuConfig:
    """Choose the layout with the largest gain that noise does not explain, else the usual one."""
    better = [each for each in found if each.gain > max(MIN_GAIN, each.noise)]
    return max(better, key=lambda each: each.gain).layout if better else default


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

    def get_entry(self, key: str) -> dict[str, object]:
        """Return whatever is kept under this key; empty for nothing."""
        entry = self._read().get(key)
        return entry if isinstance(entry, dict) else {}

    def put_entry(self, key: str, entry: Mapping[str, object]) -> bool:
        """Keep something else of this machine; False if the file cannot be written."""
        try:
            with self.lock():
                content = json.dumps({**self._read(), key: dict(entry)}, indent=1)
                replace_private(self._path, content.encode())
        except (OSError, TimeoutError) as error:
            log.warning("tuning_cache_write_failed path=%s reason=%s", self._path, error)
            return False
        return True

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
