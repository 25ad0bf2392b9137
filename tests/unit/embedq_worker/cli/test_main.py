"""The command as a whole: what it says where something is not installed."""

from __future__ import annotations

from typing import NoReturn

import pytest

from embedq_worker import exit_codes
from embedq_worker.cli import main


def test_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that has the exporter's packages only is told what else to install."""

    def check(*_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(main, "cli", check)

    with pytest.raises(SystemExit) as ended:
        main.run(["check"])

    assert ended.value.code == exit_codes.SETTINGS
    assert "pip install 'embedq[cpu]'" in capsys.readouterr().err


def test_a_module_that_is_ours_to_have_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    """No advice hides it."""

    def check(*_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError("No module named 'embedq_worker.gone'", name="embedq_worker.gone")

    monkeypatch.setattr(main, "cli", check)

    with pytest.raises(ModuleNotFoundError):
        main.run(["check"])
