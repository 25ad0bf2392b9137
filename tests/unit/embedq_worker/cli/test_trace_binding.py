"""The trace counts what the plugin says of its command lists, and knows when nothing moved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from embedq_worker.cli.check_npu import PLUGIN
from embedq_worker.cli.trace_binding import BEGIN, END, LINES, Trace, count
from embedq_worker.errors import EngineError

#: Our counters when nothing moved.
STILL = {"inferences": 5, "binds": 0, "pointer_changes": 0, "shape_changes": 0, "stride_changes": 0}


def trace(*said: str, **counters: int) -> Trace:
    """Count what a child says: something while it warms, and these lines while it infers."""
    answer = json.dumps({"counters": {**STILL, **counters}, "details": {}})
    return count(["warming", *LINES.values(), BEGIN, *said, END + answer])


def test_lines_of_the_inferences_are_counted() -> None:
    """Each kind by itself; what the warm-up did is no business of the trace."""
    quiet, busy = trace(), trace(*LINES.values(), LINES["list_updates"] + " by index", "other")

    assert (quiet.plugin_lines, set(quiet.plugin.values())) == (0, {0})
    assert busy.plugin_lines == len(LINES) + 2
    assert busy.plugin == {**dict.fromkeys(LINES, 1), "list_updates": 2}


@pytest.mark.parametrize(
    ("said", "counters", "pinned"),
    [
        ((), {}, True),
        (("list_reuses", "tensor_syncs"), {}, True),
        (("list_updates",), {}, False),
        (("list_resets",), {}, False),
        (("copies",), {}, False),
        ((), {"binds": 4}, False),
        ((), {"pointer_changes": 1}, False),
    ],
)
def test_trace_is_pinned_when_nothing_moved(
    said: tuple[str, ...], counters: dict[str, int], pinned: bool
) -> None:
    """A list that is used again is what pinning is for; one that is changed is not."""
    found = trace(*(LINES[name] for name in said), **counters)

    assert found.is_pinned is pinned
    assert found.as_dict()["pinned"] is pinned
    assert list(found.lines())[-1].startswith("Nothing" if pinned else "Tensors")


def test_child_without_an_answer_is_an_error() -> None:
    """A child that crashed half way has counted nothing."""
    with pytest.raises(EngineError, match="without an answer"):
        count([BEGIN, *LINES.values()])


def test_plugin_still_speaks_these_lines() -> None:
    """Each is in the library of Intel's plugin; an OpenVINO that says it otherwise is noticed."""
    spec = importlib.util.find_spec("openvino")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("openvino is missing")
    plugin = Path(spec.submodule_search_locations[0], "libs", PLUGIN)
    if not plugin.exists():
        pytest.skip("this platform has no NPU plugin")
    library = plugin.read_bytes()

    missing = [name for name, words in LINES.items() if words.encode() not in library]

    assert missing == []
