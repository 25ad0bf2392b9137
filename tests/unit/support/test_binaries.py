"""Programs that a machine lacks: a laptop goes on without them, CI does not."""

from __future__ import annotations

import pytest
from tests.support.binaries import program


@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)]
)
def test_missing_program_fails_in_ci_alone(
    ci: str, outcome: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either way the reason names the Debian package that brings it."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CI", ci)

    with pytest.raises(outcome, match="chromium-shell is missing; Debian: apt install chromium"):
        program("chromium-shell", "chromium")
