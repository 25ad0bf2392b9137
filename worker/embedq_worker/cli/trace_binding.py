"""Counts what an NPU plugin says of its command lists while rows pass through the serving path.

Our own counters see the pointers that we hand over; only the plugin's debug lines tell what it made
of them. They go to stdout and cannot be had in another way, so the inferences run in a child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from embedq.errors import SettingsError
from embedq.protocol.contract import Device
from embedq_worker.engines.base import RaggedTokens, RowSpec, TokenBatch
from embedq_worker.errors import EngineError
from embedq_worker.inference.packing import build_rows
from embedq_worker.process import die_with_parent
from embedq_worker.settings import WorkerSettings

#: What runs this file.
COMMAND: Final = (sys.executable, "-m", "embedq_worker.cli.trace_binding")


#: Lines of the plugin, by what they count (OpenVINO 2026.4.1).
LINES: Final[Mapping[str, str]] = {
    "list_updates": "update_graph_arguments - update command list",
    "copies": "prepare_inputs - tensor is not allocated in the current Level Zero context",
    "tensor_syncs": "sync_zero_tensor_with_graph",
    "list_reuses": "Reuse command list without update",
    "list_resets": "Reset command list",
}


#: Around the lines that count: before them the requests are warmed.
BEGIN, END = "embedq-trace-begin", "embedq-trace-end "


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened in a number of inferences.

    Attributes:
        counters: ours, by name.
        plugin: lines of the plugin, by what they count.
        plugin_lines: all lines of the plugin about these inferences; without any, its counts mean
            nothing.
        details: of the engine.
    """

    counters: Mapping[str, int]
    plugin: Mapping[str, int]
    plugin_lines: int
    details: Mapping[str, str]

    @property
    def is_pinned(self) -> bool:
        """Say whether nothing moved: no tensor given or found elsewhere, no list changed."""
        moved = [value for name, value in self.counters.items() if name != "inferences"]
        changed = [self.plugin[name] for name in ("list_updates", "list_resets", "copies")]
        return not any(moved) and not any(changed)

    def lines(self) -> Iterator[str]:
        """Yield the trace for people."""
        yield ", ".join(f"{name} {value}" for name, value in self.details.items())
        for name, value in {**self.counters, **self.plugin}.items():
            yield f"{name.replace('_', ' '):<16}{value:>8,}"
        if not self.plugin_lines:
            yield "The plugin said nothing of them: an emulated NPU has no command lists."
        yield "Nothing moved." if self.is_pinned else "Tensors moved, or command lists changed."

    def as_dict(self) -> dict[str, Any]:
        """Return the trace for JSON."""
        return {**asdict(self), "pinned": self.is_pinned}


def trace(settings: WorkerSettings, device: Device, inferences: int) -> Trace:
    """Run inferences in a child with the settings of the environment, and count.

    Args:
        settings: what the environment says.
        device: where the worker would compute.
        inferences: how many.

    Raises:
        SettingsError: there is no NPU to trace.
        EngineError: the child did not end in good order.
    """
    if device is not Device.NPU:
        raise SettingsError(
            f"Only an NPU has tensors to trace; this worker computes on {device}. Use --device npu."
        )
    deadline_s = settings.compile_timeout_s + inferences * (settings.infer_timeout_s or 2.0)
    environment = {**os.environ, "OV_NPU_LOG_LEVEL": "LOG_DEBUG"}
    try:
        done = subprocess.run(
            [*COMMAND, str(inferences)],
            env=environment,
            capture_output=True,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"The trace did not end within {deadline_s:.0f} s.") from None
    if done.returncode:
        words = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise EngineError(f"The trace ended with status {done.returncode}: {words}")
    return count(done.stdout.decode(errors="replace").splitlines())


def count(lines: Iterable[str]) -> Trace:
    """Count the lines of a child; those before BEGIN belong to compiling and warming."""
    counting, plugin_lines = False, 0
    plugin = dict.fromkeys(LINES, 0)
    for line in lines:
        if line.startswith(BEGIN):
            counting = True
        elif line.startswith(END):
            answer = json.loads(line.removeprefix(END))
            return Trace(answer["counters"], plugin, plugin_lines, answer["details"])
        elif counting:
            plugin_lines += 1
            for name, words in LINES.items():
                plugin[name] += words in line
    raise EngineError("The trace ended without an answer.")


def main() -> None:
    """Run as many inferences as the argument says, and say so on stdout."""
    # Imported by the child only: the parent needs no runtime.
    from embedq_worker import process
    from embedq_worker.engines.openvino_npu import OpenVinoNpuEngine
    from embedq_worker.inference.opener import EngineOpener
    from embedq_worker.model.resolve import find_model

    die_with_parent()  # which holds the lock of the NPU
    settings = WorkerSettings.load()
    process.set_up(str(settings.log_level))
    model = find_model(settings)
    if model is None:
        raise SystemExit("Only an NPU, or its emulated NPU, can be traced.")
    engine = EngineOpener(settings, model).open_npu().engine
    assert isinstance(engine, OpenVinoNpuEngine)
    asked = int(sys.argv[1])
    before = asdict(engine.counters())
    print(BEGIN, flush=True)
    for number in range(asked):
        engine.infer(_row(engine.form, number))
    counters = {name: n - before[name] for name, n in asdict(engine.counters()).items()}
    print(END + json.dumps({"counters": counters, "details": dict(engine.details)}), flush=True)
    os._exit(0)  # not through destructors: the answer is given


def _row(form: RowSpec, number: int) -> TokenBatch:
    """Build a row that differs from the one before in tokens and in length."""
    width = form.widths[-1]
    length = 2 + number % (width - 1)
    ids = np.full(length, 1 + number % 100, np.int32)
    tokens = RaggedTokens(ids, np.array([0, length], np.int64), np.zeros(1, np.uint32))
    return build_rows(tokens, [[0]], 0, form)[0]


if __name__ == "__main__":
    main()
