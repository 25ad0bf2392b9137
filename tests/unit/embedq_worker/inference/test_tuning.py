"""A layout is left only for one that is better by more than noise; what was tuned is used."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq.errors import SettingsError
from embedq.protocol.contract import Accuracy
from embedq_worker.cli.tune import MIN_ROUNDS, Wanted, run
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.selection import CpuConfig, decide, layouts, timings
from embedq_worker.model.resolve import Model
from embedq_worker.settings import DeviceChoice, EngineChoice, WorkerSettings

USUAL, OTHER = CpuConfig(2, 2, 512), CpuConfig(2, 1, 1024)


def settings(model: Model, cache: Path, **others: object) -> WorkerSettings:
    """Return the settings of a worker on two cores with onnxruntime."""
    values = {"device": DeviceChoice.CPU, "engine": EngineChoice.ONNXRUNTIME, **others}
    return WorkerSettings(model=str(model.folder), cache_dir=cache, **values)  # type: ignore[arg-type]


def chosen(usual: list[float], other: list[float]) -> CpuConfig:
    """Decide between two layouts by their seconds."""
    return decide(timings({USUAL: usual, OTHER: other}, USUAL), USUAL)


def test_clear_gain_is_taken() -> None:
    """A tenth faster in every round."""
    assert chosen([1.1] * 5, [1.0] * 5) == OTHER


def test_small_gain_is_not_worth_a_change() -> None:
    """Two in a hundred are below what a machine drifts."""
    assert chosen([1.02] * 5, [1.0] * 5) == USUAL


def test_gain_within_the_noise_is_not_believed() -> None:
    """Its median is a tenth, and its rounds are apart by more."""
    assert chosen([1.0, 1.5, 1.1, 0.8, 1.4], [1.0] * 5) == USUAL


def test_drift_of_the_machine_meets_both() -> None:
    """Rounds twice as slow say nothing as long as both are."""
    assert chosen([1.1, 2.2, 1.1, 2.2, 4.4], [1.0, 2.0, 1.0, 2.0, 4.0]) == OTHER


def test_layouts_share_the_cores() -> None:
    """No layout asks for more streams than cores, the usual is first, and none comes twice."""
    for cores in (1, 2, 8):
        found = layouts(cores, 512)

        assert found[0] == CpuConfig(cores, cores, 512)
        assert len(set(found)) == len(found)
        assert all(1 <= each.streams <= each.cores == cores for each in found)


@pytest.mark.parametrize(
    "entry",
    [{}, {"cores": 4, "streams": 1, "token_budget": 512}, {"cores": 2, "streams": 3},
     {"cores": 2, "streams": True, "token_budget": 512}],
)  # fmt: skip
def test_entry_that_does_not_fit_is_not_used(entry: dict[str, object]) -> None:
    """One for more cores than there are, or half of one."""
    assert CpuConfig.from_entry(entry, 2) is None


def test_tuned_layout_is_used_and_settings_win(model: Model, tmp_path: Path) -> None:
    """After a run of tune, the engine opens as it says, unless a setting says otherwise."""
    wanted = Wanted(Accuracy.STANDARD, texts=4, seconds=0)
    mine = settings(model, tmp_path)

    found = run(mine, wanted, print)
    proven = EngineOpener(mine, model).open_cpu(Accuracy.STANDARD)
    pinned = settings(model, tmp_path, streams=1, token_budget=300)
    other = EngineOpener(pinned, model).open_cpu(Accuracy.STANDARD)

    assert found.kept and len(found.timings[0].seconds) == MIN_ROUNDS
    assert proven.layout == found.chosen._replace(source="tuned")
    assert proven.engine.concurrency == found.chosen.streams
    assert other.layout is not None
    assert (other.layout.source, other.layout.token_budget) == ("settings", 300)
    assert other.engine.concurrency == 1
    assert found.as_dict()["chosen"] == found.chosen.entry()
    assert any("<- chosen" in line for line in found.lines())
    proven.close()
    other.close()


def test_reserved_cores_are_left_alone(model: Model, tmp_path: Path) -> None:
    """With none left, the message has both numbers."""
    with pytest.raises(SettingsError, match="--reserve-cores 5000 leaves none"):
        run(settings(model, tmp_path), Wanted(reserve=5000), print)
