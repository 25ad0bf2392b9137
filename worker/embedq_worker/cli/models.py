"""Commands about models: list the known ones, show one on this machine, download one."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from embedq.errors import EmbedqError
from embedq_worker.cli.common import EPILOG, fail, load
from embedq_worker.settings import DeviceChoice, WorkerSettings

if TYPE_CHECKING:
    from embedq_worker.model.resolve import Model

#: Models that people run in bulk: hub id, family, pooling, tokens, prompts, licence. Prompts are
#: ``files`` if its files carry them, a value of EMBEDQ_PROMPTS if only its model card asks for
#: them, or ``-``. Serving never reads this list.
#: Source: the model card and the files of each model on the hub, as of 2026-11.
_KNOWN: Final = """
sentence-transformers/all-MiniLM-L6-v2 bert mean 256 - apache-2.0
sentence-transformers/all-MiniLM-L12-v2 bert mean 128 - apache-2.0
sentence-transformers/all-mpnet-base-v2 mpnet mean 384 - apache-2.0
sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2 bert mean 128 - apache-2.0
sentence-transformers/paraphrase-multilingual-mpnet-base-v2 xlm-roberta mean 128 - apache-2.0
BAAI/bge-small-en-v1.5 bert cls 512 bge-en mit
BAAI/bge-base-en-v1.5 bert cls 512 bge-en mit
BAAI/bge-large-en-v1.5 bert cls 512 bge-en mit
BAAI/bge-m3 xlm-roberta cls 8192 - mit
intfloat/e5-small-v2 bert mean 512 e5 mit
intfloat/e5-base-v2 bert mean 512 e5 mit
intfloat/e5-large-v2 bert mean 512 e5 mit
intfloat/multilingual-e5-small bert mean 512 e5 mit
intfloat/multilingual-e5-base xlm-roberta mean 512 e5 mit
intfloat/multilingual-e5-large xlm-roberta mean 512 e5 mit
thenlper/gte-base bert mean 512 - mit
mixedbread-ai/mxbai-embed-large-v1 bert cls 512 files apache-2.0
Snowflake/snowflake-arctic-embed-l-v2.0 xlm-roberta cls 8192 files apache-2.0
Alibaba-NLP/gte-modernbert-base modernbert cls 8192 - apache-2.0
nomic-ai/modernbert-embed-base modernbert mean 8192 nomic apache-2.0
nomic-ai/nomic-embed-text-v1.5 nomic_bert mean 8192 nomic apache-2.0
Qwen/Qwen3-Embedding-0.6B qwen3 lasttoken 32768 files apache-2.0
google/embeddinggemma-300m gemma3_text mean 2048 files gemma
"""

#: Columns of _KNOWN, which are also the keys of --json.
_COLUMNS: Final = ("name", "family", "pooling", "max_length", "prompts", "licence")

#: Maximum size of the part of a model card that is read, bytes.
MAX_CARD_BYTES: Final = 16_384

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

    rows = [line.split() for line in _KNOWN.split("\n") if line]
    if as_json:
        known: list[dict[str, Any]] = [dict(zip(_COLUMNS, row, strict=True)) for row in rows]
        for one in known:
            one |= {"max_length": int(one["max_length"]), "prompts": one["prompts"].strip("-")}
        click.echo(json.dumps({"models": known}))
        return
    table = [("model", "family", "pooling", "tokens", "prompts", "licence"), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  ".join(cells).rstrip())
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
        "licence": _licence(model.folder),
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


def _licence(folder: Path) -> str:
    # The licence field of the model card; empty if there is none.
    with suppress(OSError), (folder / "README.md").open("rb") as file:
        head = file.read(MAX_CARD_BYTES).decode(errors="replace")
        if found := re.match(r"---\n(?:.*\n)*?license: *([\w.-]+)", head):
            return found[1]
    return ""
