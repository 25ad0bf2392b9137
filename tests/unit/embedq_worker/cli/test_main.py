"""Tests of how `embedq-worker` reports missing modules."""

from __future__ import annotations

from typing import NoReturn

import pytest

from embedq_worker import exit_codes
from embedq_worker.cli import main


def test_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raise_module_not_found(*_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError("No module named 'tokenizers'", name="tokenizers")

    monkeypatch.setattr(main, "cli", raise_module_not_found)

    with pytest.raises(SystemExit) as caught:
        main.run(["check"])

    assert caught.value.code == exit_codes.SETTINGS
    assert "pip install 'embedq[cpu]'" in capsys.readouterr().err


def test_missing_module_of_embedq_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_module_not_found(*_: object, **__: object) -> NoReturn:
        raise ModuleNotFoundError("No module named 'embedq_worker.gone'", name="embedq_worker.gone")

    monkeypatch.setattr(main, "cli", raise_module_not_found)

    with pytest.raises(ModuleNotFoundError):
        main.run(["check"])
