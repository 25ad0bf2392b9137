"""`embedq embed` as a person runs it: a process, its files, its exit code and summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cli import Command

from embedq.testing import STUB_DIM, stub_vectors

#: What `--json` promises.
SUMMARY = {
    *("total", "ok", "failed", "truncated", "rerouted", "seconds"),
    *("startup_seconds", "docs_per_second", "devices", "resumed", "skipped_lines", "outputs"),
}
#: What each line of the sidecar promises.
ITEM = {
    *("row", "id", "status", "truncated", "rerouted", "n_tokens", "n_tokens_dropped"),
    *("device", "precision", "code", "text_hash"),
}


def test_jsonl_becomes_npy_with_its_sidecar(command: Command) -> None:
    """Rows, ids and outcomes are in the order of the file."""
    texts = [f"text {i} {'word ' * (i % 30)}" for i in range(1_500)]
    source = command.write("in.jsonl", *({"id": f"d{i}", "text": t} for i, t in enumerate(texts)))

    done = command("embed", source, "-o", "out.npy")

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1,500 texts in ")
    assert np.array_equal(np.load(command.folder / "out.npy"), stub_vectors(texts))
    items = command.items()
    assert [item["row"] for item in items] == list(range(1_500))
    assert [item["id"] for item in items] == [f"d{i}" for i in range(1_500)]
    assert set(items[0]) == ITEM
    assert {item["device"] for item in items} == {"stub"}


def test_sdk_and_command_give_the_same_bytes(command: Command, client: Any) -> None:
    """A file embedded by the command has the vectors that encode() gives."""
    texts = ["one", "", "emoji 🦀", "שלום", "a" * 50_000]
    source = command.write("in.jsonl", *({"text": text} for text in texts))

    command("embed", source, "-o", "out.npy")

    assert np.load(command.folder / "out.npy").tobytes() == client.encode(texts).tobytes()


def test_summary_has_exactly_the_documented_keys(command: Command) -> None:
    """--json prints one object on stdout, and nothing else anywhere."""
    source = command.write("in.txt", "one", "", "word " * 300)

    done = command("embed", source, "-o", "out.npy", "--json")

    summary = json.loads(done.stdout)
    assert done.stderr == ""
    assert set(summary) == SUMMARY
    assert (summary["total"], summary["ok"], summary["truncated"]) == (3, 3, 1)
    assert summary["devices"] == {"stub": 3}
    assert 0 < summary["startup_seconds"] <= summary["seconds"]
    assert summary["docs_per_second"] > 0
    assert summary["outputs"] == ["out.npy", "out.items.jsonl"]


def test_texts_that_fail_are_nan_and_named(command: Command) -> None:
    """Failed rows are NaN with their code, the others are right, and the exit code says so."""
    bad = {1: "nul_character", 2: "not_unicode", 3: "not_a_string", 4: "text_too_large"}
    texts = ["a", "x\0", "\ud800", 7, "x" * (2**20 + 1), "b"]
    source = command.write("in.jsonl", *({"text": text} for text in texts))

    done = command("embed", source, "-o", "out.npy", "--json")

    rows = np.load(command.folder / "out.npy")
    assert done.returncode == 1
    assert json.loads(done.stdout)["failed"] == len(bad)
    assert np.isnan(rows[list(bad)]).all()
    assert np.array_equal(rows[[0, 5]], stub_vectors(["a", "b"]))
    failed = {item["row"]: item["code"] for item in command.items() if item["status"] == "failed"}
    assert failed == bad


def test_long_text_as_error_fails_alone(command: Command) -> None:
    """--on-long error fails a text that the model cannot take whole."""
    source = command.write("in.txt", "short", "word " * 300)

    done = command("embed", source, "-o", "out.npy", "--on-long", "error")

    assert done.returncode == 1
    assert [item["code"] for item in command.items()] == ["", "too_many_tokens"]


def test_input_without_texts_gives_no_rows(command: Command) -> None:
    """An empty file is no error: [0, D] and an empty sidecar."""
    source = command.write("in.jsonl")

    done = command("embed", source, "-o", "out.npy")

    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(command.folder / "out.npy").shape == (0, STUB_DIM)
    assert command.items() == []


def test_bad_lines_can_be_skipped(command: Command) -> None:
    """--on-bad-line skip leaves them out, counts them, and keeps the numbers of the others."""
    source = command.write("in.jsonl", {"text": "a"}, "{broken", {"no": 1}, {"text": "b"})

    done = command("embed", source, "-o", "out.npy", "--on-bad-line", "skip", "--json")

    summary = json.loads(done.stdout)
    assert (done.returncode, summary["total"], summary["skipped_lines"]) == (0, 2, 2)
    assert [item["id"] for item in command.items()] == [1, 4]


def test_local_needs_no_service(command: Command) -> None:
    """--local brings its own Redis and worker, whatever the settings of the fleet say."""
    source = command.write("in.txt", "one", "two")
    settings = {"EMBEDQ_BROKER_URL": "redis://127.0.0.1:1/0", "EMBEDQ_DEVICE": "stub"}

    done = command("embed", source, "-o", "out.npy", "--local", "--json", **settings)

    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(command.folder / "out.npy"), stub_vectors(["one", "two"]))


def test_local_leaves_no_file_behind(command: Command, short_dir: Path) -> None:
    """Not even an empty folder for each run stays in TMPDIR."""
    source = command.write("in.txt", "one", "two")
    settings = {"EMBEDQ_DEVICE": "stub", "TMPDIR": os.fspath(short_dir)}

    done = command("embed", source, "-o", "out.npy", "--local", **settings)

    assert done.returncode == 0, done.stderr
    assert list(short_dir.iterdir()) == []


def test_local_with_an_unknown_model_lists_the_choices(command: Command) -> None:
    """A model that is nowhere ends the private worker; the command shows why, with exit code 5."""
    source = command.write("in.txt", "one")
    settings = {"EMBEDQ_OFFLINE": "true", "EMBEDQ_CACHE_DIR": os.fspath(command.folder / "cache")}

    done = command("embed", source, "-o", "out.npy", "--local", "--model", "no/such", **settings)

    assert done.returncode == 5, done.stderr
    assert "no/such" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.model
def test_local_with_the_real_model(command: Command, model_settings: dict[str, str]) -> None:
    """The published numbers of all-MiniLM-L6-v2 come out of the whole road."""
    source = command.write("in.txt", "This is a simple test.")

    done = command(
        "embed", source, "-o", "out.npy", "--local", "--accuracy", "exact", **model_settings
    )

    assert done.returncode == 0, done.stderr
    [vector] = np.load(command.folder / "out.npy")
    # Source: transformers.js, pipelines/feature-extraction.js
    assert vector[:2] == pytest.approx([0.0952821523, -0.0247301683], abs=1e-5)
