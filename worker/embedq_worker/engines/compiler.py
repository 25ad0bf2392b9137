"""Compile in a child process, load from the cache.

Compiles a model in a process of its own, because compilers abort, segfault and hang.

Run as ``python -m embedq_worker.compiling``: one JSON object on stdin says what to compile, the
blob goes into an inherited file descriptor, one JSON object on stdout says how it went.

Compiled models: from the cache where one is to be trusted, else from a compiler in a child.
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
import numpy.typing as npt

from embedq.errors import EmbedqError
from embedq_worker.engines import openvino_runtime
from embedq_worker.engines.base import RowSpec
from embedq_worker.engines.model_cache import GRAPH_VERSION, CacheKey, CompiledModelCache
from embedq_worker.engines.openvino_runtime import Compiled, DeviceTarget, Runtime
from embedq_worker.errors import CompileFailed, FailureReason, ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model.resolve import Model, load_model
from embedq_worker.process import die_with_parent

#: What runs this file.
COMMAND: Final = (sys.executable, "-m", "embedq_worker.engines.compiler")


#: Most characters of the child's own words in a message.
MAX_ERROR_TAIL: Final = 300


Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What to compile.

    Attributes:
        folder, label, identity: of the model.
        cache_dir: where digests are remembered.
        target: the device.
        shapes: of the inputs, by name.
        properties: for the plugin.
    """

    folder: str
    label: str
    identity: str
    cache_dir: str
    target: dict[str, Any]
    shapes: dict[str, list[int]]
    properties: dict[str, str]

    @classmethod
    def of(
        cls,
        model: Model,
        cache_dir: Path,
        target: DeviceTarget,
        shapes: Mapping[str, list[int]],
        properties: Mapping[str, str],
    ) -> CompileRequest:
        """Describe a job in types of JSON."""
        return cls(
            os.fspath(model.folder),
            model.label,
            model.identity,
            os.fspath(cache_dir),
            target.to_message(),
            dict(shapes),
            dict(properties),
        )


def compile_in_child(
    job: CompileRequest, deadline_s: float, command: Sequence[str] = COMMAND
) -> Bytes:
    """Compile in a child process and return the blob.

    Args:
        job: what to compile.
        deadline_s: seconds after which the child is killed.
        command: what to run; tests run compilers that misbehave.

    Raises:
        ModelError: the files of the model are damaged.
        CompileFailed: the compiler refused, crashed or hung; ``reason`` says which.
    """
    with _scratch_file() as file:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(file.fileno(),),
            start_new_session=True,
        )
        told = {**asdict(job), "blob_fd": file.fileno(), "parent": os.getpid()}
        message = json.dumps(told).encode()
        try:
            out, errors = child.communicate(message, timeout=deadline_s)
        except subprocess.TimeoutExpired:
            raise CompileFailed(
                f"Compiling {job.label} did not end within {deadline_s:.0f} s and was stopped. "
                "Update the NPU driver, or allow more in EMBEDQ_COMPILE_TIMEOUT_S.",
                FailureReason.COMPILE_DEADLINE,
            ) from None
        finally:
            _end(child)
        _raise_failure(job, child.returncode, out, errors)
        file.seek(0)
        return np.frombuffer(bytearray(file.read()), np.uint8)


def _raise_failure(job: CompileRequest, status: int, out: bytes, errors: bytes) -> None:
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
    words = " ".join(errors.decode(errors="replace").split())[-MAX_ERROR_TAIL:]
    died = f"died of {_signal(-status)}" if status < 0 else f"ended with status {status}"
    raise CompileFailed(
        f"The compiler {died} while it compiled {job.label}. {words}".strip(),
        FailureReason.COMPILE_CRASHED,
    )


def _signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child, and of what it started."""
    if child.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


def _scratch_file() -> IO[bytes]:
    """Open a file that no disk can be too full for, where the system has such."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("embedq-blob"), "w+b")
    return tempfile.TemporaryFile()


def _compile(message: Mapping[str, Any]) -> dict[str, Any]:
    from embedq_worker.engines.openvino_runtime import Runtime  # heavy, and only the child needs it
    from embedq_worker.model.bert import build_graph

    began = time.monotonic()
    fields = {name: message[name] for name in CompileRequest.__slots__}
    job = CompileRequest(**fields)
    model = load_model(Path(job.folder), job.label, DigestCache(Path(job.cache_dir)))
    if model.identity != job.identity:
        raise ModelError(f"{job.folder} has changed since it was checked. Start anew.")
    runtime = Runtime(DeviceTarget(**job.target))
    graph = build_graph(model)
    blob = runtime.compile(graph, job.properties, job.shapes).export()
    # A blob that crashes the plugin must do so here and not in the process that serves.
    runtime.import_blob(np.frombuffer(bytearray(blob), np.uint8), job.properties).create_request()
    with os.fdopen(message["blob_fd"], "wb", closefd=False) as file:
        file.write(blob)
    return {"ok": True, "bytes": len(blob), "seconds": time.monotonic() - began}


def main() -> None:
    """Compile what stdin says."""
    die_with_parent()
    # OpenVINO logs to stdout, where the answer belongs.
    answer_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    message = json.load(sys.stdin)
    if os.getppid() != message["parent"]:  # it died before the first line
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
    # Not through destructors: a driver may hang in them, and the work is done.
    os._exit(0)


log = logging.getLogger(__name__)


#: Reasons of a refusal that tell nothing about the blob: the next process may import it.
NOT_THE_BLOB: Final = frozenset({FailureReason.DEVICE_LOST, FailureReason.OUT_OF_MEMORY})


#: Compiles a job within so many seconds.
Compile = Callable[[CompileRequest, float], Bytes]


def shapes_of(row_spec: RowSpec, width: int) -> dict[str, list[int]]:
    """Return the static shapes of the graph's inputs."""
    row = [1, width]
    segments = [row_spec.segments(width)]
    return {"input_ids": row, "position_ids": row, "segment_ids": row, "segments": segments}


class CompiledModelLoader:
    """Brings compiled models from the cache, or from a compiler."""

    def __init__(
        self,
        runtime: Runtime,
        model: Model,
        properties: Mapping[str, str],
        cache_dir: Path,
        compile_in_child: Compile,
    ) -> None:
        """Prepare for a model on a device.

        Args:
            runtime: the device.
            model: what to load.
            properties: what the plugin is sent.
            cache_dir: where compiled models are kept.
            compile_in_child: what compiles, with the deadline in seconds as its second argument.
        """
        self.store = CompiledModelCache(cache_dir, model.identity)
        self.compiled = 0
        self._runtime, self._model, self._cache_dir = runtime, model, cache_dir
        self._properties = properties
        self._compile_in_child = compile_in_child

    def load(self, shapes: Mapping[str, list[int]], deadline_s: float) -> Compiled:
        """Return the model compiled for these shapes.

        Raises:
            ModelError: the files of the model are damaged.
            CompileFailed: it cannot be compiled or loaded.
        """
        key = self._key(shapes)
        found = self._cached(key)
        if found:
            return found
        with self.store.lock(key, deadline_s):
            found = self._cached(key)  # another worker may have compiled it meanwhile
            if found:
                return found
            blob = self._compile(shapes, deadline_s)
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

    def _compile(self, shapes: Mapping[str, list[int]], deadline_s: float) -> Bytes:
        self.compiled += 1
        target = self._runtime.target
        job = CompileRequest.of(self._model, self._cache_dir, target, shapes, self._properties)
        began = time.monotonic()
        log.info("compile_started device=%s shape=%s", target.device, shapes["input_ids"])
        blob = self._compile_in_child(job, deadline_s)
        log.info(
            "compile_done device=%s seconds=%.1f bytes=%d",
            target.device,
            time.monotonic() - began,
            blob.size,
        )
        return blob

    def _key(self, shapes: Mapping[str, list[int]]) -> CacheKey:
        target = self._runtime.target
        what = {
            "device": target.device,
            "standin": target.emulation,
            "shapes": str(sorted(shapes.items())),
            "properties": str(sorted({**self._properties, **target.forced}.items())),
            "graph": str(GRAPH_VERSION),
        }
        versions = {"openvino": openvino_runtime.VERSION, **self._runtime.traits()}
        return CacheKey(self._model.identity, what, versions)


if __name__ == "__main__":
    main()
