"""Choose the CPU engine for an accuracy class: the fastest that passes its self-test.

A short benchmark decides. The choice is cached, so that a run that resumes gets the same engine;
where the cache is not writable, the choice does not depend on a measurement.
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
from embedq_worker.files import locked, read_private_json, replace_private
from embedq_worker.inference.embedder import CANARY_TEXT, Embedder
from embedq_worker.model.resolve import Model
from embedq_worker.settings import EngineChoice, PrecisionChoice, WorkerSettings

#: Default for EMBEDQ_TOKEN_BUDGET: padded tokens per inference.
DEFAULT_TOKEN_BUDGET: Final = 512


def engine_versions() -> str:
    """Return the versions of the installed runtimes, as part of the cache key."""
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

#: Texts of the benchmark: 5 to 200 words, most of them short and few of equal length, as in prose.
#: Equal lengths would favor onnxruntime, because they need no padding.
TEXTS: Final = tuple(" ".join(_WORDS[: round(5 * 40 ** (i / 127))]) for i in range(128))

#: Version of the benchmark. Raise it when its result may change, so that it runs again.
BENCHMARK_VERSION: Final = 2

#: Number of rounds; the fastest counts, because other processes can only slow an engine down.
ROUNDS: Final = 4

#: An engine is not measured further if it takes this many times as long as the fastest.
ELIMINATION_FACTOR: Final = 1.4


def benchmark(
    embedders: Mapping[Key, Embedder],
    model: Model,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, float]:
    """Return the seconds that each embedder needs, measured in turn so that drift affects all.

    Raises:
        EngineError: an embedder failed.
    """
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    batch = EmbedBatch("benchmark", 0, TEXTS, spec)
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

#: Name of the file in the cache folder.
FILE_NAME: Final = "engines.json"

#: Factor by which bf16 must be faster than f32 to be worth its rounding and a second engine.
BF16_MARGIN: Final = 1.1

#: Timeout for the benchmark of another worker, which takes about ten seconds, seconds.
LOCK_TIMEOUT_S: Final = 120.0


class Candidate(NamedTuple):
    """An engine on the CPU.

    Attributes:
        engine: ``openvino`` or ``onnxruntime``.
        precision: arithmetic of the engine.
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
    """List the engines that could serve an accuracy class, probably fastest first.

    bf16 is listed on every CPU: opening it fails where it is missing, and checking here would
    import a runtime at every start.

    Args:
        accuracy: accuracy class; ``exact`` ignores the precision.
        engine, precision: values of the settings.
        has_openvino: OpenVINO is installed.
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
    """Return the fastest candidate; bf16 only if it is faster by BF16_MARGIN."""
    return min(
        seconds,
        key=lambda one: seconds[one] * (BF16_MARGIN if one.precision is Precision.BF16 else 1),
    )


class TuningCache:
    """File with the engines chosen on this machine."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / FILE_NAME

    def get(self, key: str, candidates: Sequence[Candidate]) -> Candidate | None:
        """Return the choice for this key, if it is one of these candidates."""
        entry = read_private_json(self._path).get(key)
        found = entry if isinstance(entry, dict) else {}
        shown = {(str(one.engine), str(one.precision)): one for one in candidates}
        return shown.get((str(found.get("engine")), str(found.get("precision"))))

    def put(self, key: str, chosen: Candidate, figures: Mapping[str, float]) -> None:
        """Store a choice with its measurements; log a warning if the file cannot be written."""
        entry = {"engine": chosen.engine, "precision": chosen.precision, "seconds": dict(figures)}
        content = json.dumps({**read_private_json(self._path), key: entry}, indent=1)
        try:
            replace_private(self._path, content.encode())
        except OSError as error:
            log.warning("tuning_cache_write_failed path=%s reason=%s", self._path, error.strerror)

    def is_writable(self) -> bool:
        """Say whether a choice can be stored."""
        with suppress(OSError):
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self._path.parent).close()
            return True
        return False

    def lock(self) -> AbstractContextManager[None]:
        """Lock the cache, so that one worker measures and others wait for its choice."""
        return locked(self._path.with_suffix(".lock"), LOCK_TIMEOUT_S)


def choose(
    candidates: Sequence[Candidate],
    key: str,
    cache: TuningCache,
    measure: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    """Choose an engine; also return why: ``only``, ``cached``, ``measured`` or ``unmeasured``.

    Args:
        candidates: at least one engine, probably fastest first.
        key: cache key, from machine_key.
        cache: cache of this machine.
        measure: returns seconds for each candidate that passes its self-test.
    """
    if len(candidates) == 1:
        return candidates[0], "only"
    cached = cache.get(key, candidates)
    if cached:
        return cached, "cached"
    if not cache.is_writable():
        return candidates[0], "unmeasured"
    try:
        with cache.lock():
            cached = cache.get(key, candidates)
            return (cached, "cached") if cached else _measure(candidates, key, cache, measure)
    except TimeoutError:
        return candidates[0], "unmeasured"


def _measure(
    candidates: Sequence[Candidate],
    key: str,
    cache: TuningCache,
    measure: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    seconds = measure(candidates)
    if not seconds:
        return candidates[-1], "unmeasured"
    chosen = fastest(seconds)
    figures = {f"{one.engine} {one.precision}": took for one, took in seconds.items()}
    cache.put(key, chosen, figures)
    return chosen, "measured"


def machine_key(**facts: str) -> str:
    """Return a hash of this machine and of all other facts that could change a choice."""
    facts = {**facts, "machine": platform.machine(), "cpu": _cpu()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _cpu() -> str:
    # Model and features, the same at every start.
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        wanted = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
        return "".join(sorted(wanted))
    return platform.processor()
