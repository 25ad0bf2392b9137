"""Run a model on an NPU through OpenVINO.

Rows have static shapes, models are compiled in another process or loaded from the cache, and
infer requests always use their own tensors.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq.protocol.contract import Device, Precision
from embedq_worker.device.discovery import OLDEST_DRIVER, build_date
from embedq_worker.engines import openvino_runtime
from embedq_worker.engines.base import RowSpec, TokenBatch, coarser, correct_rounding
from embedq_worker.engines.compiler import CompiledModelLoader, shapes_of
from embedq_worker.engines.infer_requests import Counters, PinnedRequest, RequestPool, request_count
from embedq_worker.engines.openvino_runtime import Compiled, Runtime
from embedq_worker.errors import DeviceLost
from embedq_worker.model.resolve import Model
from embedq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Timeout of the first inference of a request, seconds; the kernel driver gives up after 60.
WARM_TIMEOUT_S: Final = 60.0

#: Minimum timeout of an inference, seconds.
MIN_TIMEOUT_S: Final = 2.0

#: Timeout of an inference as a multiple of the slowest inference of the warm-up.
TIMEOUT_FACTOR: Final = 20.0

#: Models with hung requests. Their destructors would hang too, so these references are never
#: dropped.
_ABANDONED: list[object] = []


def npu_properties(
    supported: Collection[str], extra: Mapping[str, str], commandlist_mode: str = ""
) -> tuple[dict[str, str], dict[str, str]]:
    """Choose the properties for an NPU plugin.

    Args:
        supported: names of the properties that the plugin supports.
        extra: properties set by the operator; they override the defaults.
        commandlist_mode: a mode of OpenVINO pull request 35626, which no released plugin
            supports; empty for none.

    Returns:
        Properties to apply, and those to ignore because they would fail the compilation.
    """
    wanted = {
        # Optimize for 4 to 8 requests in flight instead of the latency of one.
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": str(Precision.F16),
    }
    if commandlist_mode:
        wanted["NPU_COMMANDLIST_MODE"] = commandlist_mode
    wanted.update(extra)
    return (
        {key: value for key, value in wanted.items() if key in supported},
        {key: value for key, value in wanted.items() if key not in supported},
    )


def precision_of(reported: str) -> Precision:
    """Parse the precision that a compiled model reports; f16 if it reports none."""
    return Precision(reported) if reported in set(Precision) else Precision.F16


class OpenVinoNpuEngine:
    """An engine with one compiled model, and its infer requests, per row width."""

    name = "openvino"
    device = Device.NPU

    def __init__(
        self,
        compiled: Mapping[int, Compiled],
        model: Model,
        row_spec: RowSpec,
        settings: WorkerSettings,
        details: Mapping[str, str],
    ) -> None:
        """Create the infer requests of each compiled model, by row width, and warm up each.

        Raises:
            EngineError: a request cannot be created, or its first inference does not end.
        """
        self.dim, self.row_spec = model.dim, row_spec
        self._normalize = model.normalize
        self._compiled = dict(compiled)
        first = next(iter(compiled.values()))
        computed = precision_of(first.get("INFERENCE_PRECISION_HINT"))
        self.precision = coarser(computed, model.weights_precision)
        optimal = first.get("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.concurrency = request_count(optimal, settings.npu_requests)
        self._pools: dict[int, RequestPool] = {}
        self._timeouts: dict[int, float] = {}
        for width in compiled:
            slowest = self._open_pool(width)
            derived = max(MIN_TIMEOUT_S, TIMEOUT_FACTOR * slowest)
            self._timeouts[width] = settings.infer_timeout_s or derived
        self.details: Mapping[str, str] = {
            **details,
            "requests": str(self.concurrency),
            "infer_timeout_s": f"{max(self._timeouts.values()):.1f}",
        }

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Compute the vectors of one static row, float32 [1, S, D].

        Raises:
            InferFailed: the inference failed, or the engine is closed.
            DeviceLost: the device is gone, or the inference timed out.
        """
        width = batch.input_ids.shape[1]
        with self._pools[width].checkout() as slot:
            vectors = slot.run(batch, self._timeouts[width])
        return correct_rounding(vectors) if self._normalize else vectors

    def counters(self) -> Counters:
        """Return the counters of all requests since the warm-up."""
        return Counters.total([pool.counters() for pool in self._pools.values()])

    def close(self) -> None:
        """Release the device; if a request hangs, only the end of the process releases it."""
        if any(pool.lost for pool in self._pools.values()):
            _ABANDONED.append((self._compiled, dict(self._pools)))
        for pool in self._pools.values():
            pool.close()
        self._compiled = {}

    def _open_pool(self, width: int) -> float:
        model = self._compiled[width]
        requests = [model.create_request() for _ in range(self.concurrency)]
        slots = [PinnedRequest(request, model.inputs) for request in requests]
        pool = self._pools[width] = RequestPool(slots)
        try:
            return pool.warm(TokenBatch.one_text(width, self.row_spec), WARM_TIMEOUT_S)
        except DeviceLost:
            _ABANDONED.append((self._compiled, self._pools))
            raise


def open_npu(model: Model, settings: WorkerSettings) -> OpenVinoNpuEngine:
    """Open the NPU, real or emulated, and load the model from the cache or after compiling it.

    Raises:
        ModelError: the files of the model are damaged.
        NoDevice: OpenVINO lists no such device.
        EngineError: the model cannot be compiled, loaded or warmed up.
    """
    began = time.monotonic()
    target = openvino_runtime.TARGETS[settings.npu_emulation]
    runtime = Runtime(target)
    driver = runtime.get("NPU_DRIVER_VERSION")
    built = build_date(driver)
    if built is not None and built < OLDEST_DRIVER:
        log.warning("driver_outdated built=%s oldest=%s", built, OLDEST_DRIVER)
    applied, ignored = npu_properties(
        runtime.supported, settings.npu_properties, str(settings.npu_commandlist_mode or "")
    )
    row_spec = (RowSpec.packed if model.packable else RowSpec.buckets)(model.max_length)
    loader = CompiledModelLoader(runtime, model, applied, settings.cache_dir)
    timeout_s = settings.compile_timeout_s
    compiled = {
        width: loader.load(shapes_of(row_spec, width), timeout_s) for width in row_spec.widths
    }
    details = {
        **{name.lower(): value for name, value in runtime.traits().items()},
        "applied": _as_text(applied),
        "ignored": _as_text(ignored),
        "openvino": openvino_runtime.VERSION,
        "rows": f"{row_spec.format} {'x'.join(map(str, row_spec.widths))}",
        "blob": "compiled" if loader.compiled else "cached",
        "cache": loader.store.error or str(loader.store.folder),
        "emulation": target.emulation,
    }
    details = {name: value for name, value in details.items() if value}
    engine = OpenVinoNpuEngine(compiled, model, row_spec, settings, details)
    shown = " ".join(f"{key}={value!r}" for key, value in engine.details.items())
    log.info("npu_opened seconds=%.2f %s", time.monotonic() - began, shown)
    return engine


def _as_text(properties: Mapping[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(properties.items()))
