"""What a child makes of the state that the one before it has left."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq_worker.child import Child
from embedq_worker.settings import WorkerSettings
from embedq_worker.state import NodeState, State, StateFile


@pytest.mark.parametrize("before", [None, *State])
def test_child_knows_whether_the_one_before_it_came_up(
    before: State | None, tmp_path: Path
) -> None:
    """Only one that died while it was starting counts; the first child of a node has none."""
    settings = WorkerSettings.load(name="one", runtime_dir=tmp_path / "run")
    if before:
        StateFile(settings.runtime_dir, "one").write(NodeState(before, 0.0, 1))

    child = Child(settings)

    assert child.follows_early_death == (before is State.STARTING)
