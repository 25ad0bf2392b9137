"""OpenVINO on the NPU.

Which properties a plugin is sent, and which it does not know. Pure.

The NPU through OpenVINO: static rows, compiled elsewhere, in requests that never move.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq.protocol.contract import Device, Precision
from embedq_worker.device.discovery import OLDEST, build_day, is_too_old
from embedq_worker.engines import openvino_runtime
from embedq_worker.engines.base import RowSpec, TokenBatch, correct_rounding
from embedq_worker.engines.compiler import Compile, CompiledModelLoader, compile_in_child, shapes_of
from embedq_worker.engines.infer_requests import Counters, PinnedRequest, RequestPool, request_count
from embedq_worker.engines.openvino_runtime import Compiled, DeviceTarget, Runtime
from embedq_worker.errors import DeviceLost
from embedq_worker.model.resolve import Model


@dataclass(frozen=True, slots=True)
class Properties:
    """What was asked of a plugin.

    Attributes:
        applied: properties that it knows and is sent.
        ignored: properties that it does not know; sending them would fail the compile.
    """

    applied: Mapping[str, str]
    ignored: Mapping[str, str]

    def details(self) -> dict[str, str]:
        """Describe both for log and check."""
        parts = {"applied": self.applied, "ignored": self.ignored}
        return {
            name: " ".join(f"{key}={value}" for key, value in sorted(part.items()))
            for name, part in parts.items()
            if part
        }


def npu_properties(
    supported: Collection[str], extra: Mapping[str, str], commandlist_mode: str = ""
) -> Properties:
    """Decide what an NPU plugin is sent.

    Args:
        supported: the properties that it knows.
        extra: what the operator wants; wins over our defaults.
        commandlist_mode: one of the names of OpenVINO pull request 35626, which no released plugin
            knows; empty for none.
    """
    wanted = {
        # Requests in flight instead of the quickest single answer: 4 or 8 instead of 1.
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": str(Precision.F16),
    }
    if commandlist_mode:
        wanted["NPU_COMMANDLIST_MODE"] = commandlist_mode
    wanted.update(extra)
    return Properties(
        {key: value for key, value in wanted.items() if key in supported},
        {key: value for key, value in wanted.items() if key not in supported},
    )


def precision_of(shown: str, otherwise: Precision) -> Precision:
    """Read the precision that a compiled model says it uses; a plugin may not say."""
    return Precision(shown) if shown in set(Precision) else otherwise


log = logging.getLogger(__name__)


#: Seconds that the first inference of a request may take; the kernel gives up after 60.
WARM_DEADLINE_S: Final = 60.0


#: Least seconds until an inference counts as hung, and how many times the slowest of the warm-up.
MIN_DEADLINE_S, DEADLINE_FACTOR = 2.0, 20.0


#: Models whose requests hang: their destructors would hang too, so they are kept for ever.
_ABANDONED: list[object] = []


@dataclass(frozen=True, slots=True)
class NpuOptions:
    """How to use an NPU.

    Attributes:
        target: the device.
        requests: inference requests; 0 for as many as the device likes.
        commandlist_mode: for plugins that know it; empty for none.
        properties: further ones for the plugin.
        compile_timeout_s: seconds until a compiler counts as hung.
        infer_timeout_s: the same for an inference; 0 measures it.
        compile_in_child: what compiles.
    """

    target: DeviceTarget
    requests: int = 0
    commandlist_mode: str = ""
    properties: Mapping[str, str] = field(default_factory=dict)
    compile_timeout_s: float = 600.0
    infer_timeout_s: float = 0.0
    compile_in_child: Compile = compile_in_child


class OpenVinoNpuEngine:
    """One compiled model for each width of a row, each with its requests."""

    name = "openvino"
    device = Device.NPU

    def __init__(
        self,
        compiled: Mapping[int, Compiled],
        model: Model,
        row_spec: RowSpec,
        options: NpuOptions,
        details: Mapping[str, str],
    ) -> None:
        """Make the requests, take their tensors and warm each.

        Args:
            compiled: by width.
            model: what was compiled.
            row_spec: shape of the rows.
            options: how to use the device.
            details: what is known of the device so far.

        Raises:
            EngineError: a request cannot be made, or does not end.
        """
        self.dim, self.row_spec = model.dim, row_spec
        self._normalize = model.normalize
        self._compiled = dict(compiled)
        first = next(iter(compiled.values()))
        self.precision = precision_of(first.get("INFERENCE_PRECISION_HINT"), Precision.F16)
        optimal = first.get("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self.concurrency = request_count(optimal, options.requests)
        self._pools: dict[int, RequestPool] = {}
        self._deadlines: dict[int, float] = {}
        for width in compiled:
            slowest = self._open_pool(width)
            measured = max(MIN_DEADLINE_S, DEADLINE_FACTOR * slowest)
            self._deadlines[width] = options.infer_timeout_s or measured
        self.details = {
            **details,
            "requests": str(self.concurrency),
            "deadline_s": f"{max(self._deadlines.values()):.1f}",
        }

    def infer(self, batch: TokenBatch) -> npt.NDArray[np.float32]:
        """Turn one static row into vectors, float32 [1, S, D].

        Raises:
            InferFailed: the inference failed, or the engine is closed.
            DeviceLost: the device is gone or did not answer in time.
        """
        width = batch.input_ids.shape[1]
        with self._pools[width].checkout() as slot:
            vectors = slot.run(batch, self._deadlines[width])
        return correct_rounding(vectors) if self._normalize else vectors

    def counters(self) -> Counters:
        """Return what the device was asked since it was warmed."""
        return Counters.total([pool.counters() for pool in self._pools.values()])

    def close(self) -> None:
        """Give the device back, unless a request still runs: then only the process's end does."""
        if any(pool.lost for pool in self._pools.values()):
            _ABANDONED.append((self._compiled, dict(self._pools)))
        for pool in self._pools.values():
            pool.close()
        self._compiled = {}

    def _open_pool(self, width: int) -> float:
        """Make and warm the requests of one width; return the seconds of the slowest."""
        model = self._compiled[width]
        requests = [model.create_request() for _ in range(self.concurrency)]
        slots = [PinnedRequest(request, model.inputs) for request in requests]
        pool = self._pools[width] = RequestPool(slots)
        try:
            return pool.warm(TokenBatch.one_text(width, self.row_spec), WARM_DEADLINE_S)
        except DeviceLost:
            _ABANDONED.append((self._compiled, self._pools))
            raise


def open_npu(model: Model, options: NpuOptions, cache_dir: Path) -> OpenVinoNpuEngine:
    """Open the device and load the model into it, compiled now or before.

    Raises:
        ModelError: the files of the model are damaged.
        NoDevice: there is none.
        EngineError: it cannot be compiled, loaded or warmed.
    """
    began = time.monotonic()
    runtime = Runtime(options.target)
    driver = runtime.get("NPU_DRIVER_VERSION")
    if is_too_old(driver):
        log.warning("driver_outdated built=%s oldest=%s", build_day(driver), OLDEST)
    properties = npu_properties(runtime.supported, options.properties, options.commandlist_mode)
    row_spec = _row_spec(model)
    loader = CompiledModelLoader(
        runtime, model, properties.applied, cache_dir, options.compile_in_child
    )
    deadline_s = options.compile_timeout_s
    compiled = {
        width: loader.load(shapes_of(row_spec, width), deadline_s) for width in row_spec.widths
    }
    details = {
        **{name.lower(): value for name, value in runtime.traits().items() if value},
        **properties.details(),
        "openvino": openvino_runtime.VERSION,
        "rows": f"{row_spec.format} {'x'.join(map(str, row_spec.widths))}",
        "blob": "compiled" if loader.compiled else "cached",
        "cache": loader.store.error or str(loader.store.folder),
    }
    if options.target.emulation:
        details["standin"] = options.target.emulation
    engine = OpenVinoNpuEngine(compiled, model, row_spec, options, details)
    shown = " ".join(f"{key}={value!r}" for key, value in engine.details.items())
    log.info("npu_opened seconds=%.2f %s", time.monotonic() - began, shown)
    return engine


def _row_spec(model: Model) -> RowSpec:
    if not model.packable:
        return RowSpec.buckets(model.max_length)
    return RowSpec.packed(model.max_length)
