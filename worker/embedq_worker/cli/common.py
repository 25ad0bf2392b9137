"""Options, epilog and error handling of the `embedq-worker` commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NoReturn

import click

from embedq.cli.common import exit_with_error
from embedq.errors import EmbedqError, InputError, SettingsError
from embedq_worker import exit_codes
from embedq_worker.errors import DeviceError, EngineError, ModelError, NpuUnverified
from embedq_worker.settings import DeviceChoice, WorkerSettings

EXIT_CODES: dict[type[EmbedqError], int] = {
    SettingsError: exit_codes.SETTINGS,
    InputError: exit_codes.SETTINGS,
    ModelError: exit_codes.MODEL,
    NpuUnverified: exit_codes.NPU_UNVERIFIED,
    DeviceError: exit_codes.DEVICE,
    EngineError: exit_codes.ENGINE,
}

#: Exit codes and examples, below the help of every command.
EPILOG = f"""\
{exit_codes.EPILOG}
\b
Examples:
  embedq-worker check
  EMBEDQ_BROKER_URL=redis://queue:6379/0 embedq-worker start --device cpu
  embedq-worker start --all
  embedq-worker degrade npu0 --reason "a new driver"
  celery --app embedq_worker.main_process.app worker --concurrency 1
"""


def model_options(command: click.decorators.FC) -> click.decorators.FC:
    """Add the options --model and --device to a command."""
    model = click.option("--model", help="Hub id or folder of the model.  [EMBEDQ_MODEL]")
    device = click.option(
        "--device", metavar="|".join(DeviceChoice), help="Device to compute on.  [EMBEDQ_DEVICE]"
    )
    return device(model(command))


def export(options: Mapping[str, str | int | bool | None]) -> None:
    """Set options as environment variables, from which the main and pool process read them."""
    for name, value in options.items():
        if value is not None:
            os.environ[f"EMBEDQ_{name.upper()}"] = str(value)


def load(options: Mapping[str, str | int | bool | None]) -> WorkerSettings:
    """Return the settings with these options; exit with an error if one is wrong."""
    export(options)
    try:
        return WorkerSettings.load()
    except SettingsError as error:
        fail(error)


def fail(error: EmbedqError) -> NoReturn:
    """Print an error and exit with the code of its class."""
    exit_with_error("embedq-worker", error, EXIT_CODES)
