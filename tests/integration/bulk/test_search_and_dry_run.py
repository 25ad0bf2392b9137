"""`embedq search` and `embedq embed --dry-run`."""

from __future__ import annotations

import ast
import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from tests.support.cli import command, wait_until_redis_is_empty
from tests.support.files import documents, embed, items, unfinished, vectors, write_jsonl
from tests.support.redis import RedisProcess
from tests.support.workers import WorkerProcess

from embedq import Client
from embedq.bulk.checkpoint import Manifest, manifest_path
from embedq.bulk.estimate import SAMPLE, estimate
from embedq.bulk.request import EmbedRequest
from embedq.bulk.search import load_manifest, nearest_rows
from embedq.errors import InputError
from embedq.testing import stub_vectors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl", documents(200))


def test_search_agrees_with_brute_force(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    output, query = tmp_path / "out.npy", "a question"
    embed(small, source, output)
    scores = vectors(output) @ stub_vectors([query])[0]
    best = np.argsort(-scores, kind="stable")[:10]

    code, stdout, stderr = command(shared_redis, "search", output, query, "--json")

    assert code == 0, stderr
    hits = json.loads(stdout)
    assert [hit["row"] for hit in hits] == best.tolist()
    assert [hit["id"] for hit in hits] == [f"d{row}" for row in best]
    assert [hit["score"] for hit in hits] == pytest.approx(scores[best].tolist(), abs=1e-6)


def test_search_prints_scores_and_ids(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    embed(small, source, output)

    code, stdout, _ = command(shared_redis, "search", output, documents(8)[7]["text"], "-k", "2")

    assert code == 0
    first, second = stdout.splitlines()
    assert first == "1.0000  d7"
    assert len(second.split()) == 2


def test_search_skips_failed_rows(small: Client, tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "\0"}, {"text": "b"}])
    output = tmp_path / "out.npy"
    embed(small, source, output)

    hits = nearest_rows(output, stub_vectors(["a"])[0], 10)

    assert [hit.row for hit in hits] == [0, 2]


def test_chunk_size_does_not_change_the_hits(
    small: Client, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.npy"
    embed(small, source, output)
    query = stub_vectors(["a question"])[0]
    expected = nearest_rows(output, query, 20)

    monkeypatch.setattr("embedq.bulk.search.CHUNK_ROWS", 7)

    found = nearest_rows(output, query, 20)
    assert [hit.id for hit in found] == [hit.id for hit in expected]


def test_search_in_an_empty_output_finds_nothing(small: Client, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.npy"
    source.write_text("")
    embed(small, source, output)

    assert nearest_rows(output, stub_vectors(["a"])[0], 5) == []


def test_search_refuses_vectors_of_another_model(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.npy"
    embed(small, source, output)
    manifest = Manifest.load(manifest_path(output))
    assert manifest is not None
    manifest.settings |= {"model": "f" * 64, "model_label": "other/model"}
    manifest.save(manifest_path(output))

    code, stdout, stderr = command(shared_redis, "search", output, "a question")

    assert (code, stdout) == (3, "")
    assert "was made with other/model (ffffffffffff); the worker serves stub" in stderr


def test_search_refuses_everything_but_a_complete_npy(
    small: Client, source: Path, tmp_path: Path
) -> None:
    part, lines, stray = tmp_path / "part.npy", tmp_path / "out.jsonl", tmp_path / "stray.npy"
    unfinished(small, source, part)
    embed(small, source, lines)
    np.save(stray, np.zeros((3, 384), np.float32))

    with pytest.raises(InputError, match="is not finished"):
        load_manifest(part)
    with pytest.raises(InputError, match=r"search reads \.npy"):
        load_manifest(lines)
    with pytest.raises(InputError, match="not an output of `embedq embed`"):
        load_manifest(stray)
    with pytest.raises(InputError, match="not an output of `embedq embed`"):
        load_manifest(tmp_path / "none.npy")


@pytest.mark.parametrize("n_bytes", [0, 300, 5_000])
@pytest.mark.parametrize("name", ["out.npy", "out.items.jsonl"])
def test_search_refuses_a_truncated_output(
    name: str, n_bytes: int, small: Client, source: Path, tmp_path: Path
) -> None:
    output, path = tmp_path / "out.npy", tmp_path / name
    embed(small, source, output)
    n_rows = len(np.load(output))
    path.write_bytes(path.read_bytes()[:n_bytes])

    with pytest.raises(InputError, match=rf"{name}: lacks the format.*--restart"):
        nearest_rows(output, small.encode("a query"), n_rows)


@pytest.mark.parametrize("top", ["0", "-1", "x"])
def test_search_refuses_an_invalid_number_of_hits(top: str, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from embedq.cli.main import cli

    result = CliRunner().invoke(cli, ["search", str(tmp_path / "a.npy"), "q", "-k", top])

    assert result.exit_code == 2
    assert "'-k'" in result.output


def test_dry_run_of_a_small_input_is_exact_and_writes_nothing(
    small: Client, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    source = write_jsonl(source, [*documents(200), {"text": "word " * 300}, {"text": "\0"}])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    found = estimate(small, EmbedRequest((str(source),), tmp_path / "out.npy"))

    texts = [document["text"] for document in documents(200)]
    assert (found.texts, found.sampled) == (202, 202)
    assert found.text_bytes == sum(map(len, texts)) + 5 * 300 + 1
    assert found.tokens == sum(len(text.split()) + 2 for text in texts) + 256
    assert found.truncated_share == pytest.approx(1 / 202)
    assert found.failed_share == pytest.approx(1 / 202)
    assert found.output_bytes == 202 * 384 * 4
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    wait_until_redis_is_empty(shared_redis)


def prose() -> list[str]:
    """Return the docstrings of packages of the standard library, a thousand or more."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ("asyncio", "concurrent", "email", "http", "json", "logging", "multiprocessing")
    paths = sorted(path for name in names for path in (folder / name).rglob("*.py"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = (node for path in paths for node in ast.walk(ast.parse(path.read_bytes())))
    return [doc for node in nodes if isinstance(node, kinds) and (doc := ast.get_docstring(node))]


def test_dry_run_estimates_tokens_of_prose_within_ten_percent(
    small: Client, tmp_path: Path
) -> None:
    texts = prose()
    source = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    tokens = sum(min(len(text.split()) + 2, 256) for text in texts)

    found = estimate(small, EmbedRequest((str(source),), tmp_path / "out.npy"))

    assert (found.texts, found.sampled) == (len(texts), SAMPLE)
    assert found.tokens == pytest.approx(tokens, rel=0.1)
    assert found.docs_per_second > 0
    assert found.redis_bytes > 0


def test_dry_run_command_prints_the_estimate(
    worker: WorkerProcess, shared_redis: RedisProcess, source: Path, tmp_path: Path
) -> None:
    """An empty input is estimated as well; an existing output is not changed."""
    output, empty = tmp_path / "out.npy", tmp_path / "empty.txt"
    empty.write_text("")
    output.write_bytes(b"precious")

    code, stdout, stderr = command(
        shared_redis, "embed", source, "-o", output, "--dry-run", "--json"
    )
    _, nothing, _ = command(shared_redis, "embed", empty, "-o", output, "--dry-run")

    assert code == 0, stderr
    assert json.loads(stdout)["texts"] == 200
    assert nothing.startswith("texts             0 (0.0 MB)\n")
    assert output.read_bytes() == b"precious"
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "empty.txt", "out.npy"}


def test_search_finds_rows_after_an_update(small: Client, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    embed(small, source, output)
    write_jsonl(source, [{"id": "new", "text": "new"}, *documents(200)[50:]])
    embed(small, source, output, update=True)

    [hit] = nearest_rows(output, stub_vectors([documents(200)[60]["text"]])[0], 1)

    assert (hit.row, hit.id) == (11, "d60")
    assert items(output)[11]["id"] == "d60"
