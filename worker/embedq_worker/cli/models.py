"""Commands about models: list the known ones, show one on this machine, download one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from embedq.errors import EmbedqError
from embedq_worker.cli.common import EPILOG, fail, load
from embedq_worker.settings import DeviceChoice, WorkerSettings

if TYPE_CHECKING:
    from embedq_worker.model.resolve import Model

_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object instead of lines.")


@click.group(invoke_without_command=True, epilog=EPILOG)
@click.pass_context
def models(context: click.Context) -> None:
    """List models that people run, show one on this machine, or download one."""
    if context.invoked_subcommand is None:
        context.invoke(ls)


@models.command(epilog=EPILOG)
@_JSON
def ls(as_json: bool = False) -> None:
    """List models that people run: family, pooling, length, prompts and licence."""
    from embedq_worker.model.families import FAMILIES
    from embedq_worker.model.known_models import KNOWN_MODELS

    if as_json:
        click.echo(json.dumps({"models": [model._asdict() for model in KNOWN_MODELS]}))
        return
    width = max(len(model.name) for model in KNOWN_MODELS)
    click.echo(
        f"{'model':<{width}}  {'family':<11}  {'pooling':<9}  {'tokens':>6}  {'prompts':<7}  "
        "licence"
    )
    for model in KNOWN_MODELS:
        click.echo(
            f"{model.name:<{width}}  {model.family:<11}  {model.pooling:<9}  "
            f"{model.max_length:>6,}  {model.prompts:<7}  {model.licence}"
        )
    click.echo(f"\nBuilt by embedq, several texts per row: {', '.join(FAMILIES)}.")
    click.echo("Others are served from an ONNX file, one text per row.")
    click.echo(
        "prompts: files = a job chooses them by name; another word = with EMBEDQ_PROMPTS set to it."
    )


@models.command(epilog=EPILOG)
@click.argument("name")
@_JSON
def show(name: str, as_json: bool) -> None:
    """Show how NAME, a folder or a hub id on this machine, makes vectors."""
    settings = _load({"model": name})
    _print(_find(settings.model_copy(update={"offline": True})), as_json)


@models.command(epilog=EPILOG)
@click.argument("name")
@click.option("--revision", help="Commit, branch or tag.  [EMBEDQ_MODEL_REVISION]")
@_JSON
def pull(name: str, revision: str | None, as_json: bool) -> None:
    """Download NAME from the hub and verify that embedq can serve it."""
    _print(_find(_load({"model": name, "model_revision": revision})), as_json)


def _load(options: dict[str, str | None]) -> WorkerSettings:
    # The stub serves no model, so its setting must not decide here.
    settings = load(options)
    return settings.model_copy(update={"device": DeviceChoice.CPU})


def _find(settings: WorkerSettings) -> Model:
    from embedq_worker.model.resolve import find_model

    try:
        found = find_model(settings)
    except EmbedqError as error:
        fail(error)
    assert found is not None  # only the stub has no model, and these commands name one
    return found


def _print(model: Model, as_json: bool) -> None:
    shown: dict[str, Any] = {
        "model": model.label,
        "family": model.architecture.get("model_type", "onnx"),
        "rows": "several texts" if model.packable else "one text",
        "pooling": model.pooling,
        "modules": [module.kind for module in model.modules],
        "dim": model.dim,
        "max_length": model.max_length,
        "prompts": dict(model.prompts),
        "default_prompt": model.default_prompt,
        "licence": model.licence(),
        "identity": model.identity,
        "folder": str(model.folder),
    }
    if as_json:
        click.echo(json.dumps(shown, ensure_ascii=False))
        return
    for name, value in shown.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {text!r}" for key, text in value.items())
        elif isinstance(value, list):
            value = ", ".join(value)
        click.echo(f"{name:<15} {value or '-'}")
