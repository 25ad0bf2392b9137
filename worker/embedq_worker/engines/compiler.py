"""Load compiled models from the cache, or compile them in a subprocess.

NPU compilers abort, segfault and hang, so each compilation runs in a process of its own:
``python -m embedq_worker.engines.compiler`` reads a request as one JSON object from stdin, writes
the blob to an inherited file descriptor and the outcome as one JSON object to stdout.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np

from embedq.errors import EmbedqError
from embedq_worker.engines import openvino_runtime
from embedq_worker.engines.base import Bytes, RowSpec
from embedq_worker.engines.model_cache import GRAPH_VERSION, CacheKey, CompiledModelCache
from embedq_worker.engines.openvino_runtime import Compiled, DeviceTarget, Runtime
from embedq_worker.errors import CompileFailed, FailureReason, ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model.config import NO_CHOICES, ModelChoices
from embedq_worker.model.resolve import Model, load_model
from embedq_worker.process import die_with_parent

#: Command that runs this module.
COMMAND: Final = (sys.executable, "-m", "embedq_worker.engines.compiler")

#: Maximum length of the compiler's stderr in an error message, characters.
MAX_ERROR_TAIL: Final = 300

#: Reasons of a failed import that are no fault of the blob: another process may import it.
NOT_THE_BLOB: Final = frozenset({FailureReason.DEVICE_LOST, FailureReason.OUT_OF_MEMORY})

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """Arguments of one compilation; `dataclasses.asdict` turns them into JSON types.

    Attributes:
        folder, label, identity: the model.
        cache_dir: folder of the digest cache.
        target: device to compile for.
        shapes: input shapes by name.
        properties: properties for the plugin.
        choices: what the user decided about the model.
    """

    folder: str
    label: str
    identity: str
    cache_dir: str
    target: DeviceTarget
    shapes: Mapping[str, list[int]]
    properties: Mapping[str, str]
    choices: ModelChoices = NO_CHOICES


#: Compiles a request within a timeout in seconds.
CompileFunction = Callable[[CompileRequest, float], Bytes]


def compile_in_subprocess(
    request: CompileRequest, timeout_s: float, command: Sequence[str] = COMMAND
) -> Bytes:
    """Compile in a subprocess and return the blob.

    Args:
        request: arguments of the compilation.
        timeout_s: time after which the subprocess is killed.
        command: command of the subprocess; tests pass compilers that misbehave.

    Raises:
        ModelError: the files of the model are damaged.
        CompileFailed: the compiler rejected the model, crashed or hung; see ``reason``.
    """
    with _scratch_file() as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(file.fileno(),),
            start_new_session=True,
        )
        message = {**asdict(request), "blob_fd": file.fileno(), "parent": os.getpid()}
        try:
            out, errors = process.communicate(json.dumps(message).encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise CompileFailed(
                f"Compiling {request.label} did not end within {timeout_s:.0f} s and was stopped. "
                "Update the NPU driver, or raise EMBEDQ_COMPILE_TIMEOUT_S.",
                FailureReason.COMPILE_DEADLINE,
            ) from None
        finally:
            _end(process)
        _raise_failure(request, process.returncode, out, errors)
        file.seek(0)
        return np.frombuffer(bytearray(file.read()), np.uint8)


def _raise_failure(request: CompileRequest, status: int, out: bytes, errors: bytes) -> None:
    try:
        answer = json.loads(out)
    except ValueError:
        answer = {}
    if status == 0 and answer.get("ok"):
        return
    if answer.get("kind") == "model":
        raise ModelError(str(answer["message"]))
    if "message" in answer:
        raise CompileFailed(str(answer["message"]), FailureReason(answer["reason"]))
    tail = " ".join(errors.decode(errors="replace").split())[-MAX_ERROR_TAIL:]
    died = f"died of {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
    raise CompileFailed(
        f"The compiler {died} while it compiled {request.label}. {tail}".strip(),
        FailureReason.COMPILE_CRASHED,
    )


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _scratch_file() -> IO[bytes]:
    # A file in memory, where the system supports it: no disk can be too full for it.
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("embedq-blob"), "w+b")
    return tempfile.TemporaryFile()


def _compile(message: Mapping[str, Any]) -> dict[str, Any]:
    from embedq_worker.model.graph import build_graph  # imports onnx, which a cached start avoids

    fields = {name: message[name] for name in CompileRequest.__slots__}
    nested = {
        "choices": ModelChoices(**message["choices"]),
        "target": DeviceTarget(**message["target"]),
    }
    request = CompileRequest(**{**fields, **nested})
    digests = DigestCache(Path(request.cache_dir))
    model = load_model(Path(request.folder), request.label, digests, request.choices)
    if model.identity != request.identity:
        raise ModelError(
            f"The model in {request.folder} changed while the worker started. Restart the worker."
        )
    runtime = Runtime(request.target)
    blob = runtime.compile(build_graph(model), request.properties, request.shapes).export()
    # A blob that crashes the plugin must do so here, not in the pool process.
    compiled = runtime.import_blob(np.frombuffer(bytearray(blob), np.uint8), request.properties)
    compiled.create_request()
    with os.fdopen(message["blob_fd"], "wb", closefd=False) as file:
        file.write(blob)
    return {"ok": True}


def main() -> None:
    """Compile the request on stdin and write the outcome to stdout."""
    die_with_parent()
    # OpenVINO logs to stdout, which must hold only the outcome.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    message = json.load(sys.stdin)
    if os.getppid() != message["parent"]:  # the parent died before die_with_parent took effect
        return
    try:
        answer = _compile(message)
    except ModelError as error:
        answer = {"kind": "model", "message": str(error)}
    except EmbedqError as error:
        reason = getattr(error, "reason", FailureReason.COMPILE_FAILED)
        answer = {"kind": "engine", "message": str(error), "reason": str(reason)}
    json.dump(answer, answer_to)
    answer_to.flush()
    # Skip destructors: a driver may hang in them.
    os._exit(0)


def shapes_of(row_spec: RowSpec, width: int) -> dict[str, list[int]]:
    """Return the static input shapes for rows of one width."""
    row = [1, width]
    segments = [row_spec.segments(width)]
    return {"input_ids": row, "position_ids": row, "segment_ids": row, "segments": segments}


class CompiledModelLoader:
    """Loads compiled models of one model on one device."""

    def __init__(
        self,
        runtime: Runtime,
        model: Model,
        properties: Mapping[str, str],
        cache_dir: Path,
        compile_function: CompileFunction = compile_in_subprocess,
    ) -> None:
        self.store = CompiledModelCache(cache_dir, model.identity)
        self.compiled = 0
        self._runtime, self._model, self._cache_dir = runtime, model, cache_dir
        self._properties = properties
        self._compile_function = compile_function

    def load(self, shapes: Mapping[str, list[int]], timeout_s: float) -> Compiled:
        """Return the model compiled for these shapes.

        Raises:
            ModelError: the files of the model are damaged.
            CompileFailed: the model cannot be compiled or loaded.
        """
        key = self._key(shapes)
        if found := self._cached(key):
            return found
        with self.store.lock(key, timeout_s):
            # Another worker may have compiled it in the meantime.
            if found := self._cached(key):
                return found
            blob = self._compile(shapes, timeout_s)
            self.store.store(key, blob)
        return self._runtime.import_blob(blob, self._properties)

    def _cached(self, key: CacheKey) -> Compiled | None:
        blob = self.store.load(key)
        if blob is None:
            return None
        try:
            return self._runtime.import_blob(blob, self._properties)
        except CompileFailed as error:
            if error.reason in NOT_THE_BLOB:
                raise
            log.warning("cache_entry_invalid folder=%s reason=%s", key.folder, error)
            self.store.discard(key)
            return None

    def _compile(self, shapes: Mapping[str, list[int]], timeout_s: float) -> Bytes:
        self.compiled += 1
        target = self._runtime.target
        request = CompileRequest(
            os.fspath(self._model.folder),
            self._model.label,
            self._model.identity,
            os.fspath(self._cache_dir),
            target,
            shapes,
            self._properties,
            self._model.choices,
        )
        began = time.monotonic()
        log.info("compile_started device=%s shape=%s", target.device, shapes["input_ids"])
        blob = self._compile_function(request, timeout_s)
        seconds = time.monotonic() - began
        log.info("compile_done device=%s seconds=%.1f bytes=%d", target.device, seconds, blob.size)
        return blob

    def _key(self, shapes: Mapping[str, list[int]]) -> CacheKey:
        target = self._runtime.target
        request = {
            "device": target.device,
            "emulation": target.emulation,
            "shapes": str(sorted(shapes.items())),
            "properties": str(sorted({**self._properties, **target.forced}.items())),
            "graph": str(GRAPH_VERSION),
        }
        versions = {"openvino": openvino_runtime.VERSION, **self._runtime.traits()}
        return CacheKey(self._model.identity, request, versions)


if __name__ == "__main__":
    main()
