"""Which engine computes an accuracy class on this CPU: the faster of those that are proven.

The answer is kept for the machine, because a run that resumes wants the engine that began it.
Where it cannot be kept, it is decided without measuring, so that it is still the same next time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from embedq.contract import Accuracy, Precision
from embedq_worker.choices import EngineChoice, PrecisionChoice
from embedq_worker.file_lock import locked
from embedq_worker.private_files import read_private, replace_private

log = logging.getLogger("embedq.worker")

#: Name of the memory inside the cache folder.
FILE_NAME: Final = "engines.json"
#: Most bytes of it; a larger one is not ours.
MAX_BYTES: Final = 1024 * 1024
#: How much faster bf16 must be than f32 before it is worth its rounding and a second engine.
BF16_MARGIN: Final = 1.1
#: Seconds to wait for another node's measurement, which takes some ten.
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


class Memory:
    """The choices of this machine."""

    def __init__(self, cache_dir: Path) -> None:
        self._path = cache_dir / FILE_NAME

    def recall(self, key: str, among: Sequence[Candidate]) -> Candidate | None:
        """Return what was chosen under this key, if it is still to be had."""
        entry = self._read().get(key)
        found = entry if isinstance(entry, dict) else {}
        shown = {(str(one.engine), str(one.precision)): one for one in among}
        return shown.get((str(found.get("engine")), str(found.get("precision"))))

    def keep(self, key: str, chosen: Candidate, figures: Mapping[str, float]) -> None:
        """Remember a choice with what was measured; a file that cannot be written is logged."""
        entry = {"engine": chosen.engine, "precision": chosen.precision, "seconds": dict(figures)}
        content = json.dumps({**self._read(), key: entry}, indent=1)
        try:
            replace_private(self._path, content.encode())
        except OSError as error:
            log.warning("choice_not_kept path=%s reason=%s", self._path, error.strerror)

    def recall_entry(self, key: str) -> dict[str, object]:
        """Return whatever is kept under this key; empty for nothing."""
        entry = self._read().get(key)
        return entry if isinstance(entry, dict) else {}

    def keep_entry(self, key: str, entry: Mapping[str, object]) -> bool:
        """Keep something else of this machine; False if the file cannot be written."""
        try:
            with self.lock():
                content = json.dumps({**self._read(), key: dict(entry)}, indent=1)
                replace_private(self._path, content.encode())
        except (OSError, TimeoutError) as error:
            log.warning("choice_not_kept path=%s reason=%s", self._path, error)
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
        """Let one node measure at a time; the others find its answer."""
        return locked(self._path.with_suffix(".lock"), LOCK_DEADLINE_S)

    def _read(self) -> dict[str, object]:
        with suppress(ValueError):
            known = json.loads(read_private(self._path, MAX_BYTES) or b"{}")
            return known if isinstance(known, dict) else {}
        return {}


def choose(
    among: Sequence[Candidate],
    key: str,
    memory: Memory,
    measure: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    """Choose an engine, and say why: ``only``, ``kept``, ``measured`` or ``unmeasured``.

    Args:
        among: at least one, the best guess first.
        key: names everything that could change the answer.
        memory: of this machine.
        measure: returns seconds for each that is proven, leaving out the others.
    """
    if len(among) == 1:
        return among[0], "only"
    kept = memory.recall(key, among)
    if kept:
        return kept, "kept"
    if not memory.is_writable():
        return among[0], "unmeasured"
    try:
        with memory.lock():
            kept = memory.recall(key, among)
            return (kept, "kept") if kept else _measure(among, key, memory, measure)
    except TimeoutError:
        return among[0], "unmeasured"


def _measure(
    among: Sequence[Candidate],
    key: str,
    memory: Memory,
    measure: Callable[[Sequence[Candidate]], Mapping[Candidate, float]],
) -> tuple[Candidate, str]:
    seconds = measure(among)
    if not seconds:
        return among[-1], "unmeasured"
    chosen = fastest(seconds)
    figures = {f"{one.engine} {one.precision}": took for one, took in seconds.items()}
    memory.keep(key, chosen, figures)
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
