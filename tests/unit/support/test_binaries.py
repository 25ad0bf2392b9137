"""Tests of the lookup of programs that tests need."""

from __future__ import annotations

import pytest
from tests.support.binaries import program


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_missing_program_skips_locally_and_fails_in_ci(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CI", ci)

    with pytest.raises(outcome, match="chromium-shell is missing; Debian: apt install chromium"):
        program("chromium-shell", "chromium")
