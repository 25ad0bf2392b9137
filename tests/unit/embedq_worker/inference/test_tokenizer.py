"""Tests of tokenizing texts, truncating them and counting dropped tokens."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.models import (
    TINY_MAX_LENGTH,
    WORDS,
    real_model,
    tiny_model,
    write_foreign,
    write_tokenizer,
)
from tokenizers import Tokenizer as HfTokenizer

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.errors import EngineError, ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference import tokenizer
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.inference.verifier import EngineVerifier
from embedq_worker.model.resolve import load_model
from embedq_worker.settings import WorkerSettings

SETTINGS = WorkerSettings.model_validate({})


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small tokenizer.json with truncation and padding."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    write_tokenizer(path)
    return path


def ids_of(tokens: RaggedTokens, row: int) -> list[int]:
    return [int(i) for i in tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]]


@settings(max_examples=50)
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join), max_size=8))
def test_truncation_equals_that_of_the_tokenizers_library(path: Path, texts: list[str]) -> None:
    reference = HfTokenizer.from_file(str(path))
    reference.no_padding()
    reference.enable_truncation(TINY_MAX_LENGTH)

    tokens = Tokenizer(path, TINY_MAX_LENGTH).tokenize(texts)

    assert len(tokens) == len(texts)
    for row, text in enumerate(texts):
        assert ids_of(tokens, row) == reference.encode(text).ids


def test_dropped_tokens_are_counted(path: Path) -> None:
    texts = [" ".join(WORDS[:1] * n) for n in (0, 1, 8, 9, 100)]

    tokens = Tokenizer(path, 10).tokenize(texts)

    assert list(tokens.lengths) == [2, 3, 10, 10, 10]
    assert list(tokens.n_dropped) == [0, 0, 0, 1, 92]


def test_padding_and_truncation_of_the_file_are_ignored(path: Path) -> None:
    tokens = Tokenizer(path, 48).tokenize(["the queue", " ".join(WORDS[:1] * 30)])

    assert list(tokens.lengths) == [4, 32]


def test_arrays_have_the_declared_types(path: Path) -> None:
    for texts in ([], ["the queue"]):
        tokens = Tokenizer(path, 10).tokenize(texts)

        assert tokens.ids.dtype == np.int32
        assert tokens.offsets.dtype == np.int64
        assert tokens.n_dropped.dtype == np.uint32
        assert len(tokens.offsets) == len(texts) + 1


def test_tokens_do_not_depend_on_the_group_size(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [" ".join(WORDS[:n]) for n in range(len(WORDS))] * 3
    whole = Tokenizer(path, 10).tokenize(texts)

    monkeypatch.setattr(tokenizer, "GROUP_CHARS", 30)
    grouped = Tokenizer(path, 10).tokenize(texts)

    assert np.array_equal(whole.ids, grouped.ids)
    assert np.array_equal(whole.offsets, grouped.offsets)


def test_tokenizer_error_shows_no_text(path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        Tokenizer(path, 10).tokenize(["fine", "\ud800secret"])

    assert "2 texts" in str(caught.value)
    assert "secret" not in repr(caught.value)
    assert caught.value.__cause__ is None


def test_damaged_tokenizer_file_is_refused_by_name(tmp_path: Path) -> None:
    damaged = tmp_path / "tokenizer.json"
    damaged.write_text("{}")

    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        Tokenizer(damaged, 10)


def test_max_length_of_special_tokens_only_is_refused(path: Path) -> None:
    with pytest.raises(ModelError, match="no room"):
        Tokenizer(path, 2)


def test_pad_id_is_read_from_the_file(path: Path) -> None:
    assert Tokenizer(path, 10).pad_id == 0


@pytest.mark.model
def test_real_tokenizer_maps_50000_letters_to_one_unknown_token() -> None:
    """The text and its tokens are those of the tests of transformers.js and tokenizers."""
    tokenizer = Tokenizer(real_model().tokenizer_path, 256)

    assert list(tokenizer.tokenize(["a" * 50_000]).ids) == [101, 100, 102]


@pytest.mark.model
@pytest.mark.parametrize(
    ("text", "n_tokens"),
    [("hi", 3), ("hi, how are you doing?", 9), ("This is a simple test.", 8)],
)
def test_real_tokenizer_returns_published_counts(text: str, n_tokens: int) -> None:
    """The counts are those of langchain4j, plus two special tokens, and of transformers.js."""
    tokenizer = Tokenizer(real_model().tokenizer_path, 256)

    assert list(tokenizer.tokenize([text]).lengths) == [n_tokens]


@pytest.mark.model
def test_real_tokenizer_truncates_at_256_tokens() -> None:
    # tokenizer.json says 128 and tokenizer_config.json 512; sentence_bert_config.json decides.
    model = real_model()

    tokens = Tokenizer(model.tokenizer_path, model.max_length).tokenize(["word " * 1000])

    assert list(tokens.lengths) == [256]
    assert list(tokens.n_dropped) == [1000 - 254]


@pytest.mark.parametrize("foreign", [False, True])
def test_token_without_an_embedding_is_refused(tmp_path: Path, foreign: bool) -> None:
    model = tiny_model(tmp_path, vocab_size=44, **({"hidden_size": 8} if foreign else {}))
    if foreign:
        write_foreign(tmp_path)
        model.weights.unlink()
        model = load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache"))
    tokenizer = HfTokenizer.from_file(str(model.tokenizer_path))
    EngineVerifier(SETTINGS, model)
    tokenizer.add_special_tokens(["[DOC]"])
    tokenizer.save(str(model.tokenizer_path))

    with pytest.raises(ModelError, match="has token id 44, but the weights have 44"):
        EngineVerifier(SETTINGS, model)
