"""Stub engine and its fault script.

The fault script of the stub device: a file that breaks it while workers run.

For tests and rehearsals. EMBEDQ_STUB_FAULTS names the file; it is read before each start of the
device and before each inference, so whoever replaces it switches faults on and off at once. A file
that is missing or empty is a sound device. One fault a line:

    init=segfault first=2      the first two starts die of SIGSEGV
    init=slow seconds=3        every start takes three seconds longer
    infer=device_lost          every inference fails as on a device that is gone

`first=N` counts from when the script was last replaced, over all processes that read it. What has
struck is in a file beside the script with the suffix `.struck`, one line each.

    raise           the call raises
    exit            the process exits with status 70
    segfault        the process dies of SIGSEGV
    hang            the call never returns
    slow            it takes `seconds` longer, 1 if not said
    device_lost, device_unknown, out_of_memory      it fails with what Level Zero says for that
    nan, wrong      the vectors are not numbers, or those of other texts; for infer only

An engine without a model: exact, cheap vectors, scripted delays and faults.

It ships with the worker, so that queueing, health and routing can be rehearsed on any machine.
A text that starts with one of these makes the stub, and only the stub, misbehave:

    embedq-fault:raise      the inference raises InferFailed
    embedq-fault:exit       the process exits with status 70
    embedq-fault:segfault   the process dies of SIGSEGV
    embedq-fault:hang       the inference never returns
    embedq-fault:nan        the vector of this text is not a number

Faults of the device as a whole are in a script that can change at any moment: see script.py.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq.errors import SettingsError, did_you_mean
from embedq.protocol.contract import Device, Precision
from embedq.protocol.worker import ModelInfo
from embedq.testing import STUB_DIM, stub_hashes, vectors_of_hashes
from embedq_worker.engines.base import RaggedTokens, RowSpec, TokenBatch
from embedq_worker.engines.openvino_errors import compile_failed, infer_failed
from embedq_worker.errors import InferFailed
from embedq_worker.files import replace_private

#: When a fault may strike.
INIT, INFER = "init", "infer"


#: Exit status of the scripted exit.
EXIT_STATUS: Final = 70


#: What Level Zero says, as the plugin words it.
DRIVER_SAYS: Final[Mapping[str, str]] = {
    "device_lost": "ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001",
    "device_unknown": "ZE_RESULT_ERROR_UNKNOWN, code 0x7ffffffe",
    "out_of_memory": "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY, code 0x70000003",
}


#: Faults of the vectors, which only an inference has; the engine spoils them.
SPOILT: Final = ("nan", "wrong")


SCRIPT_FAULTS: Final = ("raise", "exit", "segfault", "hang", "slow", *DRIVER_SAYS, *SPOILT)


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a script.

    Attributes:
        when: ``init`` or ``infer``.
        kind: one of FAULTS.
        seconds: how long ``slow`` is.
        first: how often it strikes; 0 for always.
    """

    when: str
    kind: str
    seconds: float = 1.0
    first: int = 0


class FaultScript:
    """A script as the device of one process reads it."""

    def __init__(self, path: Path) -> None:
        """Prepare to read a file, which may come and go."""
        self._path = path
        self._struck = path.with_name(path.name + ".struck")

    def replace(self, *lines: str) -> None:
        """Write the script anew in one step; without lines, the device is sound.

        Raises:
            SettingsError: a line is none of the language.
        """
        text = "".join(f"{line}\n" for line in lines)
        for line in _lines(text):
            _parse(line)
        replace_private(self._path, text.encode())

    def strike(self, when: str) -> str:
        """Do what the script says for this moment.

        Args:
            when: INIT or INFER.

        Returns:
            One of SPOILT if the vectors are to be spoilt, else nothing.

        Raises:
            SettingsError: the script is none.
            EngineError: the script says so.
        """
        spoilt = ""
        for fault in self._due(when):
            spoilt = _commit(fault) or spoilt
        return spoilt

    def _due(self, when: str) -> list[Fault]:
        """Return the faults of this moment that have not struck often enough, and note them."""
        try:
            text = self._path.read_text(encoding="utf-8")
            edition = str(self._path.stat().st_mtime_ns)
        except OSError:
            return []
        due = []
        for line in _lines(text):
            fault, note = _parse(line), f"{edition} {line}\n"
            if fault.when == when and not (fault.first and self._count(note) >= fault.first):
                due.append(fault)
                self._note(note)
        return due

    def _count(self, note: str) -> int:
        try:
            return self._struck.read_text(encoding="utf-8").count(note)
        except OSError:
            return 0

    def _note(self, note: str) -> None:
        # One short write to the end of a file: whole, whoever else writes and however we end.
        with self._struck.open("ab", buffering=0) as out:
            out.write(note.encode())


def _lines(text: str) -> list[str]:
    """Return the lines of a script without remarks and empty ones."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


def _parse(line: str) -> Fault:
    """Read one line.

    Raises:
        SettingsError: it is none.
    """
    word, *others = line.split()
    when, _, kind = word.partition("=")
    if when not in (INIT, INFER) or kind not in SCRIPT_FAULTS or (when == INIT and kind in SPOILT):
        hint = did_you_mean(kind, SCRIPT_FAULTS)
        raise SettingsError(
            f"EMBEDQ_STUB_FAULTS: expected init=FAULT or infer=FAULT, got {word}.{hint}"
        )
    options = dict(other.partition("=")[::2] for other in others)
    try:
        seconds = float(options.pop("seconds", 1.0))
        first = int(options.pop("first", 0))
    except ValueError:
        raise SettingsError(f"EMBEDQ_STUB_FAULTS: expected a number in {line!r}.") from None
    if options:
        raise SettingsError(
            f"EMBEDQ_STUB_FAULTS: expected seconds=S or first=N, got {' '.join(options)}."
        )
    return Fault(when, kind, seconds, first)


def _commit(fault: Fault) -> str:
    """Do what a fault says; faults of the vectors come back to the caller."""
    if fault.kind in SPOILT:
        return fault.kind
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return ""
    commit_native(fault.kind)
    text = DRIVER_SAYS.get(fault.kind, "")
    if fault.when == INIT:
        raise compile_failed(text or "the fault script says so", "Opening the stub device")
    if text:
        raise infer_failed(RuntimeError(text))
    raise InferFailed("The stub device raised because its fault script says so.")


def commit_native(kind: str) -> None:
    """End or hang this process if the fault is of that kind."""
    if kind == "exit":
        os._exit(EXIT_STATUS)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        threading.Event().wait()


#: sha256 of the words "embedq stub engine 1": the identity of the stub's model.
STUB_IDENTITY: Final = "87162452be8ddf00ee52e28c1ef13dfcbf264052e47e4101c3021e8741aaa8de"


#: Tokens the stub takes.
STUB_MAX_LENGTH: Final = 256


#: What a text must start with to ask for a fault.
FAULT_PREFIX: Final = "embedq-fault:"


#: The faults, by the reserved number that the stub tokenizer gives them.
TEXT_FAULTS: Final = ("raise", "exit", "segfault", "hang", "nan")


#: Inferences that a stub of some speed takes at once: one runs, the others wait, as on an NPU.
QUEUED: Final = 4


#: Upper half of the hash that marks a fault, the lower half says which. Five hashes in 2**64.
_FAULT_MARK: Final = 0xFFFF_FFFF


def stub_model_info(tokenizer: bytes = b"") -> ModelInfo:
    """Return what a worker with a stub engine announces.

    Args:
        tokenizer: content of another tokenizer.json than the stub's own; vectors differ with it.
    """
    identity = STUB_IDENTITY
    if tokenizer:
        identity = hashlib.sha256(identity.encode() + tokenizer).hexdigest()
    return ModelInfo(
        label="stub",
        identity=identity,
        dim=STUB_DIM,
        max_length=STUB_MAX_LENGTH,
        quantized="stub",
    )


class StubTokenizer:
    """Encodes the hash of a text in its first two tokens; each word adds one more.

    Attributes:
        max_length: tokens a text may have, those two included.
        pad_id: token that fills a row.
    """

    def __init__(self, max_length: int = STUB_MAX_LENGTH) -> None:
        self.max_length = max_length
        self.pad_id = 0

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens:
        """Tokenize as Tokenizer does: same arguments, same result, no vocabulary."""
        words = np.array([len(text.split()) for text in texts], np.int64)
        kept = np.minimum(words, self.max_length - 2)
        offsets = np.concatenate([[0], np.cumsum(kept + 2)]).astype(np.int64)
        ids = np.ones(int(offsets[-1]), np.int32)
        hashes = stub_hashes(texts)
        for row, text in enumerate(texts):
            if text.startswith(FAULT_PREFIX):
                hashes[row] = _fault_hash(text, hashes[row])
        halves = hashes.astype("<u8", copy=False).view("<i4").reshape(-1, 2)
        ids[offsets[:-1]] = halves[:, 0]
        ids[offsets[:-1] + 1] = halves[:, 1]
        return RaggedTokens(ids, offsets, (words - kept).astype(np.uint32))


class StubEngine:
    """Answers ``embedq.testing.stub_vectors`` from the tokens alone."""

    name = "stub"
    precision = Precision.F32
    concurrency = 1
    row_spec = RowSpec()
    details: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        dim: int = STUB_DIM,
        delay_s: float = 0.0,
        texts_per_s: float = 0.0,
        script: FaultScript | None = None,
        device: Device = Device.STUB,
    ) -> None:
        """Open a device with a speed and faults.

        Args:
            dim: components of a vector.
            delay_s: seconds that every inference takes.
            texts_per_s: texts a second, 0 for no limit; callers share it as they share a device,
                which begins the next inference when the last ends if somebody has asked by then.
            script: its faults; None for a sound device.
            device: what it says it is; the CPU, where a degraded stub goes.

        Raises:
            SettingsError: the script is none.
            EngineError: the script says so.
        """
        if script is not None:
            script.strike(INIT)
        self.dim = dim
        self.device = device
        if texts_per_s:
            self.concurrency = QUEUED
        self._free_at = 0.0
        self._delay_s = delay_s
        self._texts_per_s = texts_per_s
        self._script = script
        self._device = threading.Lock()

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Answer the vectors of a token batch, float32 [B, S, D].

        Raises:
            EngineError: a text or the script asked for it.
        """
        spoilt = self._script.strike(INFER) if self._script is not None else ""
        self._take_time(batch.n_texts)
        # The first two tokens of each segment are the halves of its hash.
        rows, places = np.nonzero((batch.position_ids == 0) & (batch.segment_ids > 0))
        low = batch.input_ids[rows, places] & 0xFFFF_FFFF
        high = batch.input_ids[rows, places + 1] & 0xFFFF_FFFF
        hashes = ((high << 32) | low).view(np.uint64)
        vectors = vectors_of_hashes(hashes, self.dim)
        faults = (high == _FAULT_MARK) & (low < len(TEXT_FAULTS))
        for text in np.nonzero(faults)[0]:
            _commit_fault(TEXT_FAULTS[int(low[text])])
            vectors[text] = np.nan
        if spoilt:
            vectors = _spoil(vectors, spoilt)
        out = np.zeros((*batch.members.shape, self.dim), np.float32)
        out[rows, batch.segment_ids[rows, places] - 1] = vectors
        return out

    def close(self) -> None:
        """Do nothing: there is no device to give back."""

    def _take_time(self, n_texts: int) -> None:
        seconds = self._delay_s + (n_texts / self._texts_per_s if self._texts_per_s else 0.0)
        if seconds:
            with self._device:
                # On a clock of its own: a sleeper that wakes late does not slow the device down.
                self._free_at = max(time.monotonic(), self._free_at) + seconds
                until = self._free_at
            time.sleep(max(0.0, until - time.monotonic()))


def _fault_hash(text: str, otherwise: np.uint64) -> np.uint64:
    name = text[len(FAULT_PREFIX) :].split(maxsplit=1)
    if not name or name[0] not in TEXT_FAULTS:
        return otherwise
    return np.uint64((_FAULT_MARK << 32) | TEXT_FAULTS.index(name[0]))


def _commit_fault(fault: str) -> None:
    """Do what the fault says; ``nan`` returns and leaves the vector to the caller."""
    if fault == "raise":
        raise InferFailed("The stub engine raised because a text asked it to (embedq-fault:raise).")
    commit_native(fault)


def _spoil(vectors: npt.NDArray[np.float32], how: str) -> npt.NDArray[np.float32]:
    """Make vectors [n, D] those of a broken device: no numbers, or wrong and of unit length."""
    return np.full_like(vectors, np.nan) if how == "nan" else np.roll(vectors, 1, axis=1)
