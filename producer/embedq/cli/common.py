"""Functions that the commands `embedq` and `embedq-worker` share."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NoReturn

import click

from embedq.errors import EmbedqError

if TYPE_CHECKING:
    from embedq.settings import SettingInfo

#: Exit code of both commands for a wrong setting or option.
EXIT_SETTINGS = 2


def exit_code(error: BaseException, codes: Mapping[type[EmbedqError], int]) -> int:
    """Return the code of the first class that matches an error, or 1."""
    return next((code for kind, code in codes.items() if isinstance(error, kind)), 1)


def exit_with_error(
    program: str, error: EmbedqError, codes: Mapping[type[EmbedqError], int]
) -> NoReturn:
    """Print an error and exit with its code; see exit_code."""
    click.echo(f"{program}: {error}", err=True)
    sys.exit(exit_code(error, codes))


def exit_on_windows(program: str) -> None:
    """Exit with an error on Windows, which lacks the signals and locks that both commands need."""
    if os.name == "nt":
        click.echo(f"{program}: Windows is not supported; use Linux or WSL 2.", err=True)
        sys.exit(EXIT_SETTINGS)


def print_settings(settings: Iterable[SettingInfo], *, as_json: bool) -> None:
    """Print settings with their values and sources, one per line or as a JSON list."""
    shown = list(settings)
    if as_json:
        click.echo(json.dumps([setting._asdict() for setting in shown]))
        return
    width = max(len(setting.name) for setting in shown)
    for setting in shown:
        click.echo(f"{setting.name:<{width}}  {setting.value}  ({setting.source})")
