"""`embedq embed` as a process: files, exit code and summary."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.cli import Command

from embedq.testing import STUB_DIM, stub_vectors

#: Keys of the JSON summary.
SUMMARY = {
    *("total", "ok", "failed", "truncated", "rerouted", "seconds"),
    *("startup_seconds", "docs_per_second", "devices", "resumed", "skipped_lines", "outputs"),
}
#: Keys of each line of the sidecar.
ITEM = {
    *("row", "id", "status", "truncated", "rerouted", "n_tokens", "n_tokens_dropped"),
    *("device", "precision", "code", "text_hash"),
}


def test_jsonl_becomes_npy_and_sidecar_in_order(command: Command) -> None:
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
    texts = ["one", "", "emoji 🦀", "שלום", "a" * 50_000]
    source = command.write("in.jsonl", *({"text": text} for text in texts))

    command("embed", source, "-o", "out.npy")

    assert np.load(command.folder / "out.npy").tobytes() == client.encode(texts).tobytes()


def test_summary_has_exactly_the_documented_keys(command: Command) -> None:
    """`--json` prints one object on stdout and nothing on stderr."""
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


def test_failed_texts_are_nan_with_a_code(command: Command) -> None:
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


def test_on_long_error_fails_only_the_long_text(command: Command) -> None:
    source = command.write("in.txt", "short", "word " * 300)

    done = command("embed", source, "-o", "out.npy", "--on-long", "error")

    assert done.returncode == 1
    assert [item["code"] for item in command.items()] == ["", "too_many_tokens"]


def test_empty_input_makes_an_empty_output(command: Command) -> None:
    source = command.write("in.jsonl")

    done = command("embed", source, "-o", "out.npy")

    assert (done.returncode, done.stderr) == (0, "")
    assert np.load(command.folder / "out.npy").shape == (0, STUB_DIM)
    assert command.items() == []


def test_skipped_lines_are_counted_and_line_numbers_kept(command: Command) -> None:
    source = command.write("in.jsonl", {"text": "a"}, "{broken", {"no": 1}, {"text": "b"})

    done = command("embed", source, "-o", "out.npy", "--on-bad-line", "skip", "--json")

    summary = json.loads(done.stdout)
    assert (done.returncode, summary["total"], summary["skipped_lines"]) == (0, 2, 2)
    assert [item["id"] for item in command.items()] == [1, 4]


def test_local_ignores_the_settings_of_the_fleet(command: Command) -> None:
    source = command.write("in.txt", "one", "two")
    settings = {"EMBEDQ_BROKER_URL": "redis://127.0.0.1:1/0", "EMBEDQ_DEVICE": "stub"}

    done = command("embed", source, "-o", "out.npy", "--local", "--json", **settings)

    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(command.folder / "out.npy"), stub_vectors(["one", "two"]))


def test_local_leaves_no_file_behind(command: Command, short_dir: Path) -> None:
    source = command.write("in.txt", "one", "two")
    settings = {"EMBEDQ_DEVICE": "stub", "TMPDIR": os.fspath(short_dir)}

    done = command("embed", source, "-o", "out.npy", "--local", **settings)

    assert done.returncode == 0, done.stderr
    assert list(short_dir.iterdir()) == []


def test_local_with_an_unknown_model_fails_with_exit_code_5(command: Command) -> None:
    source = command.write("in.txt", "one")
    settings = {"EMBEDQ_OFFLINE": "true", "EMBEDQ_CACHE_DIR": os.fspath(command.folder / "cache")}

    done = command("embed", source, "-o", "out.npy", "--local", "--model", "no/such", **settings)

    assert done.returncode == 5, done.stderr
    assert "no/such" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.model
def test_local_gives_the_published_vector_of_the_real_model(
    command: Command, model_settings: dict[str, str]
) -> None:
    source = command.write("in.txt", "This is a simple test.")

    done = command(
        "embed", source, "-o", "out.npy", "--local", "--accuracy", "exact", **model_settings
    )

    assert done.returncode == 0, done.stderr
    [vector] = np.load(command.folder / "out.npy")
    # Source: transformers.js, pipelines/feature-extraction.js
    assert vector[:2] == pytest.approx([0.0952821523, -0.0247301683], abs=1e-5)
