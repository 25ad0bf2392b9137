"""Compiled models: from the cache where one is to be trusted, else from a compiler in a child."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from embedq_worker.blobs import GRAPH_VERSION, BlobKey, BlobStore, Bytes
from embedq_worker.compiling import Job
from embedq_worker.engines import openvino
from embedq_worker.engines.openvino import Compiled, Runtime
from embedq_worker.errors import CompileFailed, Reason
from embedq_worker.models import Model
from embedq_worker.packing import RowForm

log = logging.getLogger("embedq.worker")

#: Reasons of a refusal that tell nothing about the blob: the next process may import it.
NOT_THE_BLOB: Final = frozenset({Reason.DEVICE_LOST, Reason.OUT_OF_MEMORY})
#: Compiles a job within so many seconds.
Compile = Callable[[Job, float], Bytes]


def shapes_of(form: RowForm, width: int) -> dict[str, list[int]]:
    """Return the static shapes of the graph's inputs."""
    row = [1, width]
    segments = [form.segments(width)]
    return {"input_ids": row, "position_ids": row, "segment_ids": row, "segments": segments}


class Loader:
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
        self.store = BlobStore(cache_dir, model.identity)
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
            found = self._cached(key)  # another node may have compiled it meanwhile
            if found:
                return found
            blob = self._compile(shapes, deadline_s)
            self.store.store(key, blob)
        return self._runtime.import_blob(blob, self._properties)

    def _cached(self, key: BlobKey) -> Compiled | None:
        blob = self.store.load(key)
        if blob is None:
            return None
        try:
            return self._runtime.import_blob(blob, self._properties)
        except CompileFailed as error:
            if error.reason in NOT_THE_BLOB:
                raise
            log.warning("blob_refused folder=%s reason=%s", key.folder, error)
            self.store.discard(key)
            return None

    def _compile(self, shapes: Mapping[str, list[int]], deadline_s: float) -> Bytes:
        self.compiled += 1
        target = self._runtime.target
        job = Job.of(self._model, self._cache_dir, target, shapes, self._properties)
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

    def _key(self, shapes: Mapping[str, list[int]]) -> BlobKey:
        target = self._runtime.target
        what = {
            "device": target.device,
            "standin": target.standin,
            "shapes": str(sorted(shapes.items())),
            "properties": str(sorted({**self._properties, **target.forced}.items())),
            "graph": str(GRAPH_VERSION),
        }
        versions = {"openvino": openvino.VERSION, **self._runtime.traits()}
        return BlobKey(self._model.identity, what, versions)
