"""Tests that README.md and docs/ agree with the code: tables, diagrams, links and file names.

`python tests/unit/test_docs.py` rewrites the generated tables and diagrams.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from pydantic_settings import BaseSettings

from embedq.cli import console
from embedq.cli.main import cli as producer_cli
from embedq.observability import metrics
from embedq.protocol.contract import Code
from embedq.settings import INTERNAL, PREFIX, ProducerSettings, unit_of
from embedq_worker import exit_codes
from embedq_worker.cli.main import cli as worker_cli
from embedq_worker.errors import FailureReason
from embedq_worker.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ]
)
#: Modules that every other one may import; the diagrams leave them out.
COMMON = {
    *("errors", "settings", "testing", "__init__", "__main__"),
    *("exit_codes", "files", "process"),
}
#: Packages of embedq that all of the worker may use.
COMMON_OF_PRODUCER = {"errors", "settings", "testing", "protocol"}
#: A generated block: rows of a table, or edges of a diagram.
BLOCK = re.compile(r"(?:(?:\|| {4}\S+ --> ).*\n)*")


def settings_table(kind: type[BaseSettings], *, for_tests: bool) -> str:
    lines = ["| variable | default | unit | meaning |", "|---|---|---|---|"]
    for name, info in kind.model_fields.items():
        if (info.json_schema_extra == INTERNAL) is not for_tests:
            continue
        # A computed default depends on the machine; its meaning says how.
        default = "by machine" if info.default_factory else info.default
        shown = "" if default in (None, "") else f"`{default}`"
        lines.append(
            f"| `{PREFIX}{name.upper()}` | {shown} | {unit_of(name, info)} | {info.description} |"
        )
    return "\n".join(lines)


def commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    """Yield every command that `--help` lists, with the words that call it."""
    for name, command in group.commands.items():
        if command.hidden:
            continue
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


COMMANDS = {**dict(commands(producer_cli, "embedq")), **dict(commands(worker_cli, "embedq-worker"))}


def command_table(command: click.Command) -> str:
    lines = ["| argument or option | default | meaning |", "|---|---|---|"]
    for param in command.params:
        if isinstance(param, click.Option):
            if param.hidden:
                continue
            meaning = " ".join((param.help or "").split())
            shown = ", ".join(param.opts)
            if not (param.is_flag or param.count):
                shown += f" {value_name(param)}"
        else:
            meaning = ""
            shown = value_name(param)
        default = param.default
        has_default = isinstance(default, str | int | float) and not isinstance(default, bool)
        shown_default = (
            f"`{default}`"
            if has_default and default != ""
            else "required"
            if param.required
            else ""
        )
        lines.append(f"| `{shown}` | {shown_default} | {meaning} |")
    return "\n".join(lines)


def value_name(param: click.Parameter) -> str:
    """Return how a value is written; choices with slashes, because tables use bars."""
    if isinstance(param.type, click.Choice):
        return "/".join(str(choice) for choice in param.type.choices)
    name = (param.metavar or (param.name or "").upper().strip("_")).replace("|", "/")
    if isinstance(param, click.Option) and not param.metavar:
        name = {"INT": "N", "INTEGER RANGE": "N", "FLOAT RANGE": "X"}.get(
            param.type.name.upper(), param.type.name.upper()
        )
    return name if param.nargs == 1 or name.endswith("...") else f"{name}..."


def command_list(group: click.Group, path: str) -> str:
    lines = ["| command | what it does |", "|---|---|"]
    for words, command in commands(group, path):
        lines.append(f"| `{words}` | {command.get_short_help_str(limit=200)} |")
    return "\n".join(lines)


def edges(folder: Path, package: str) -> str:
    """Return the imports between the packages of a folder, and into embedq, as mermaid edges."""
    found: set[tuple[str, str]] = set()
    for path in folder.rglob("*.py"):
        source = path.relative_to(folder).with_suffix("").parts[0]
        for name in imported_names(path):
            top, _, rest = name.partition(".")
            target = rest.partition(".")[0]
            if top == "embedq" != package and target not in COMMON_OF_PRODUCER:
                target = f"embedq.{target}"
            elif top != package:
                continue
            if source not in COMMON and target not in COMMON | {"", source}:
                found.add((source, target))
    return "\n".join(f"    {source} --> {target}" for source, target in sorted(found))


def imported_names(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports anywhere in it: modules, and names in them."""
    for statement in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            inner = "." in statement.module
            yield from (
                statement.module if inner else f"{statement.module}.{alias.name}"
                for alias in statement.names
            )


#: (page, marker before the block) -> function that returns the block.
GENERATED: dict[tuple[str, str], Callable[[], str]] = {
    ("settings.md", "<!-- settings: embedq.settings.ProducerSettings -->"): lambda: settings_table(
        ProducerSettings, for_tests=False
    ),
    (
        "settings.md",
        "<!-- settings: embedq_worker.settings.WorkerSettings -->",
    ): lambda: settings_table(WorkerSettings, for_tests=False),
    (
        "npu-emulation.md",
        "<!-- settings for tests: embedq_worker.settings.WorkerSettings -->",
    ): lambda: settings_table(WorkerSettings, for_tests=True),
    ("metrics.md", "<!-- metrics: embedq.observability.metrics -->"): metrics.table,
    ("cli.md", "<!-- commands: embedq -->"): lambda: command_list(producer_cli, "embedq"),
    ("cli.md", "<!-- commands: embedq-worker -->"): lambda: command_list(
        worker_cli, "embedq-worker"
    ),
    ("architecture.md", "    %% imports of producer/embedq"): lambda: edges(
        ROOT / "producer" / "embedq", "embedq"
    ),
    ("architecture.md", "    %% imports of worker/embedq_worker"): lambda: edges(
        ROOT / "worker" / "embedq_worker", "embedq_worker"
    ),
    **{
        ("cli.md", f"<!-- command: {words} -->"): lambda command=command: command_table(command)  # type: ignore[misc]
        for words, command in COMMANDS.items()
        if any(not getattr(param, "hidden", False) for param in command.params)
    },
}


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def block_after(text: str, marker: str) -> str:
    """Return the generated block that follows a marker."""
    _, found, rest = text.partition(marker + "\n")
    assert found, f"no line {marker}"
    match = BLOCK.match(rest)
    return match.group(0).strip("\n") if match else ""


def codes_after(page: str, marker: str) -> list[str]:
    """Return the first column of a hand-written table."""
    rows = block_after(read(page), marker).splitlines()[2:]
    return [row.split("|")[1].strip().strip("`") for row in rows]


@pytest.mark.parametrize(("page", "marker"), GENERATED)
def test_generated_block_is_up_to_date(page: str, marker: str) -> None:
    assert block_after(read(page), marker) == GENERATED[page, marker]()


def test_every_command_in_the_page_exists() -> None:
    assert set(re.findall(r"<!-- command: (.+) -->", read("cli.md"))) <= set(COMMANDS)


def test_exit_codes_of_embedq_are_listed() -> None:
    known = {value for name, value in vars(console).items() if name.startswith("EXIT_")}

    assert {int(code) for code in codes_after("cli.md", "<!-- exit codes: embedq -->")} == known


def test_exit_codes_of_embedq_worker_are_listed() -> None:
    known = {
        value
        for name, value in vars(exit_codes).items()
        if name.isupper() and isinstance(value, int)
    }

    assert {
        int(code) for code in codes_after("cli.md", "<!-- exit codes: embedq-worker -->")
    } == known


def test_failure_reasons_are_listed() -> None:
    found = codes_after("device-health.md", "<!-- reasons: embedq_worker.errors.FailureReason -->")

    assert sorted(found) == sorted(FailureReason)


def test_codes_of_failed_texts_are_listed() -> None:
    found = codes_after("guarantees.md", "<!-- codes: embedq.protocol.contract.Code -->")

    assert sorted(found) == sorted(set(Code) - {Code.NONE})


def prose_of(page: Path) -> str:
    """Return a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page has for its headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    plain = (re.sub(r"[`*]", "", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)

    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page: Path) -> None:
    names = re.findall(r"`((?:ops|tests|docs|producer|worker)/[\w./-]*\w)", page.read_text("utf-8"))

    assert [name for name in names if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_settings_exist(page: Path) -> None:
    if page.name == "CHANGELOG.md":
        return  # names old settings on purpose
    known = ProducerSettings.variables() | WorkerSettings.variables()
    known |= {PREFIX + name for name in ("TEST_MODEL", "TEST_NPU", "VENV")}

    named = set(re.findall(rf"\b{PREFIX}[A-Z0-9_]*[A-Z0-9]\b", page.read_text("utf-8")))

    assert named - known == set()


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text("utf-8")))

    assert listed == {page.name for page in DOCS.glob("*.md")}


def rewrite() -> None:
    """Write every generated block again."""
    for (page, marker), wanted in GENERATED.items():
        head, found, rest = read(page).partition(marker + "\n")
        assert found, f"{page}: no line {marker}"
        (DOCS / page).write_text(
            head + marker + "\n" + wanted() + "\n" + BLOCK.sub("", rest, count=1), "utf-8"
        )


if __name__ == "__main__":
    rewrite()
