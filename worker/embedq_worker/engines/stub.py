"""Simulate an engine: exact, cheap vectors without a model, with a set speed and scripted faults.

The stub ships with the worker, so that queueing, health and routing can be tested on any machine.

EMBEDQ_STUB_FAULTS names a fault script. It is read before each start of the device and before each
inference, so replacing the file switches faults on and off. Without the file, or with an empty
one, the device has no faults. Each line is one fault:

    init=segfault first=2      the first two starts die of SIGSEGV
    init=slow seconds=3        every start takes three seconds longer
    infer=device_lost          every inference fails with a lost device

`first=N` counts the faults of all processes since the script was last replaced. The file with the
suffix `.struck` beside the script has one line per fault that happened. Faults are:

    raise           the call raises an error
    exit            the process exits with status 70
    segfault        the process dies of SIGSEGV
    hang            the call never returns
    slow            the call takes `seconds` longer, 1 by default
    device_lost, device_unknown, out_of_memory      the call fails with this Level Zero error
    nan, wrong      vectors are NaN, or those of other texts; for infer only

A text that starts with one of these causes a fault, in the stub only:

    embedq-fault:raise      the inference raises InferFailed
    embedq-fault:exit       the process exits with status 70
    embedq-fault:segfault   the process dies of SIGSEGV
    embedq-fault:hang       the inference never returns
    embedq-fault:nan        the vector of this text is NaN
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

#: Identity of the stub's model: sha256 of "embedq stub engine 1".
STUB_IDENTITY: Final = "87162452be8ddf00ee52e28c1ef13dfcbf264052e47e4101c3021e8741aaa8de"

#: Maximum length of a text, tokens.
STUB_MAX_LENGTH: Final = 256

#: Moments of a fault.
INIT, INFER = "init", "infer"

#: Exit status of the fault ``exit``.
EXIT_STATUS: Final = 70

#: Level Zero errors in the plugin's words, by fault.
DRIVER_ERRORS: Final[Mapping[str, str]] = {
    "device_lost": "ZE_RESULT_ERROR_DEVICE_LOST, code 0x70000001",
    "device_unknown": "ZE_RESULT_ERROR_UNKNOWN, code 0x7ffffffe",
    "out_of_memory": "ZE_RESULT_ERROR_OUT_OF_DEVICE_MEMORY, code 0x70000003",
}

#: Faults that change the vectors of an inference.
VECTOR_FAULTS: Final = ("nan", "wrong")

#: Faults of a script.
SCRIPT_FAULTS: Final = ("raise", "exit", "segfault", "hang", "slow", *DRIVER_ERRORS, *VECTOR_FAULTS)

#: Prefix of a text that causes a fault.
FAULT_PREFIX: Final = "embedq-fault:"

#: Faults of a text; the index is the lower half of the text's hash.
TEXT_FAULTS: Final = ("raise", "exit", "segfault", "hang", "nan")

#: Upper half of the hash of a text that causes a fault.
_FAULT_MARK: Final = 0xFFFF_FFFF

#: Concurrent inferences of a stub with a set speed: as on an NPU, one runs and the others wait.
CONCURRENCY: Final = 4


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of a fault script.

    Attributes:
        when: INIT or INFER.
        kind: one of SCRIPT_FAULTS.
        seconds: delay of ``slow``.
        first: maximum number of times that the fault happens; 0 for no maximum.
    """

    when: str
    kind: str
    seconds: float = 1.0
    first: int = 0


class FaultScript:
    """A fault script, read anew for each start and each inference."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._struck = path.with_name(path.name + ".struck")

    def replace(self, *lines: str) -> None:
        """Replace the script atomically; without lines, the device has no faults.

        Raises:
            SettingsError: a line is not a valid fault.
        """
        text = "".join(f"{line}\n" for line in lines)
        for line in _lines(text):
            _parse(line)
        replace_private(self._path, text.encode())

    def inject(self, when: str) -> str:
        """Inject the faults that are due at this moment.

        Args:
            when: INIT or INFER.

        Returns:
            One of VECTOR_FAULTS for the caller to apply, or an empty string.

        Raises:
            SettingsError: a line is not a valid fault.
            EngineError: a fault of the script.
        """
        vector_fault = ""
        for fault in self._due(when):
            vector_fault = _inject(fault) or vector_fault
        return vector_fault

    def _due(self, when: str) -> list[Fault]:
        try:
            text = self._path.read_text(encoding="utf-8")
            version = str(self._path.stat().st_mtime_ns)
        except OSError:
            return []
        due = []
        for line in _lines(text):
            fault, record = _parse(line), f"{version} {line}\n"
            if fault.when == when and not (fault.first and self._count(record) >= fault.first):
                due.append(fault)
                self._append(record)
        return due

    def _count(self, record: str) -> int:
        try:
            return self._struck.read_text(encoding="utf-8").count(record)
        except OSError:
            return 0

    def _append(self, record: str) -> None:
        # One short append is atomic, also if several processes write or this one dies next.
        with self._struck.open("ab", buffering=0) as out:
            out.write(record.encode())


def _lines(text: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return [line for line in lines if line]


def _parse(line: str) -> Fault:
    word, *others = line.split()
    when, _, kind = word.partition("=")
    if (
        when not in (INIT, INFER)
        or kind not in SCRIPT_FAULTS
        or (when == INIT and kind in VECTOR_FAULTS)
    ):
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


def _inject(fault: Fault) -> str:
    if fault.kind in VECTOR_FAULTS:
        return fault.kind
    if fault.kind == "slow":
        time.sleep(fault.seconds)
        return ""
    _exit_or_hang(fault.kind)
    text = DRIVER_ERRORS.get(fault.kind, "")
    if fault.when == INIT:
        raise compile_failed(text or "fault of EMBEDQ_STUB_FAULTS", "Opening the stub device")
    if text:
        raise infer_failed(RuntimeError(text))
    raise InferFailed("The stub device raised the fault raise of EMBEDQ_STUB_FAULTS.")


def _exit_or_hang(kind: str) -> None:
    if kind == "exit":
        os._exit(EXIT_STATUS)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "hang":
        threading.Event().wait()


def stub_model_info(tokenizer: bytes = b"") -> ModelInfo:
    """Return the model info of a worker with a stub engine.

    Args:
        tokenizer: content of a tokenizer.json used instead of StubTokenizer; it changes the
            identity because it changes the vectors.
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
    """A tokenizer that encodes the hash of a text in two tokens and adds one token per word.

    Attributes:
        max_length: maximum number of tokens of a text, those two included.
        pad_id: padding token.
    """

    def __init__(self, max_length: int = STUB_MAX_LENGTH) -> None:
        self.max_length = max_length
        self.pad_id = 0

    def tokenize(self, texts: Sequence[str]) -> RaggedTokens:
        """Tokenize texts as `Tokenizer.tokenize` does."""
        words = np.array([len(text.split()) for text in texts], np.int64)
        used = np.minimum(words, self.max_length - 2)
        offsets = np.concatenate([[0], np.cumsum(used + 2)]).astype(np.int64)
        ids = np.ones(int(offsets[-1]), np.int32)
        hashes = stub_hashes(texts)
        for row, text in enumerate(texts):
            if text.startswith(FAULT_PREFIX):
                hashes[row] = _fault_hash(text, hashes[row])
        halves = hashes.astype("<u8", copy=False).view("<i4").reshape(-1, 2)
        ids[offsets[:-1]] = halves[:, 0]
        ids[offsets[:-1] + 1] = halves[:, 1]
        return RaggedTokens(ids, offsets, (words - used).astype(np.uint32))


class StubEngine:
    """An engine that returns the vectors of `embedq.testing.stub_vectors`."""

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
        """Open a simulated device.

        Args:
            dim: components of a vector.
            delay_s: duration added to every inference.
            texts_per_s: speed, shared by all callers as on a device that runs one inference at a
                time; 0 for no limit.
            script: faults of the device; None for none.
            device: device that the engine reports.

        Raises:
            SettingsError: a line of the script is not a valid fault.
            EngineError: a fault of the script.
        """
        if script is not None:
            script.inject(INIT)
        self.dim = dim
        self.device = device
        if texts_per_s:
            self.concurrency = CONCURRENCY
        self._free_at = 0.0
        self._delay_s = delay_s
        self._texts_per_s = texts_per_s
        self._script = script
        self._device = threading.Lock()

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Return the vectors of a token batch, float32 [B, S, D].

        Raises:
            EngineError: a fault of a text or of the script.
        """
        vector_fault = self._script.inject(INFER) if self._script is not None else ""
        self._wait(batch.n_texts)
        # The first two tokens of each segment are the halves of its hash.
        rows, places = np.nonzero((batch.position_ids == 0) & (batch.segment_ids > 0))
        low = batch.input_ids[rows, places] & 0xFFFF_FFFF
        high = batch.input_ids[rows, places + 1] & 0xFFFF_FFFF
        hashes = ((high << 32) | low).view(np.uint64)
        vectors = vectors_of_hashes(hashes, self.dim)
        faults = (high == _FAULT_MARK) & (low < len(TEXT_FAULTS))
        for text in np.nonzero(faults)[0]:
            kind = TEXT_FAULTS[int(low[text])]
            if kind == "raise":
                raise InferFailed("The stub engine raised the fault of a text, embedq-fault:raise.")
            _exit_or_hang(kind)
            vectors[text] = np.nan
        if vector_fault == "nan":
            vectors = np.full_like(vectors, np.nan)
        elif vector_fault == "wrong":
            vectors = np.roll(vectors, 1, axis=1)
        out = np.zeros((*batch.members.shape, self.dim), np.float32)
        out[rows, batch.segment_ids[rows, places] - 1] = vectors
        return out

    def close(self) -> None:
        """Do nothing, because there is no device to release."""

    def _wait(self, n_texts: int) -> None:
        seconds = self._delay_s + (n_texts / self._texts_per_s if self._texts_per_s else 0.0)
        if seconds:
            with self._device:
                # Add to the planned end of the previous inference, so that a thread that wakes
                # late does not slow down the device.
                self._free_at = max(time.monotonic(), self._free_at) + seconds
                until = self._free_at
            time.sleep(max(0.0, until - time.monotonic()))


def _fault_hash(text: str, default: np.uint64) -> np.uint64:
    name = text[len(FAULT_PREFIX) :].split(maxsplit=1)
    if not name or name[0] not in TEXT_FAULTS:
        return default
    return np.uint64((_FAULT_MARK << 32) | TEXT_FAULTS.index(name[0]))
