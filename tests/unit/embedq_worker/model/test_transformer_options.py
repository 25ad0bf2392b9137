"""Tests of the maximum length of a text, against what sentence-transformers 6.2 reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.models import TINY, write_json, write_tiny

from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model.config import ModelChoices
from embedq_worker.model.resolve import Model, load_model
from embedq_worker.model.transformer_options import SENTENCE_FILES

POSITIONS = TINY["max_position_embeddings"]


def model_with(folder: Path, files: dict[str, Any], **choices: Any) -> Model:
    """Describe a tiny model that has these files instead of its sentence_bert_config.json."""
    write_tiny(folder)
    (folder / "sentence_bert_config.json").unlink()
    for name, value in files.items():
        write_json(folder / name, value)
    return load_model(folder, "m", DigestCache(folder / "cache"), ModelChoices(**choices))


def sentence(**options: Any) -> dict[str, Any]:
    return {"sentence_bert_config.json": options}


def tokenizer(**options: Any) -> dict[str, Any]:
    return {"tokenizer_config.json": options}


# SentenceTransformer(folder).max_seq_length of version 6.2.0 on the same folders, with
# transformers 5.24; it has no limit where more than the positions of the encoder are asked for.
@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, POSITIONS),
        (sentence(max_seq_length=24), 24),
        ({**sentence(max_seq_length=None), **tokenizer(model_max_length=40)}, 40),
        ({**sentence(), "sentence_roberta_config.json": {"max_seq_length": 20}}, 20),
        (tokenizer(model_max_length=10**30), POSITIONS),
        (tokenizer(model_max_length=1e30), POSITIONS),
        (tokenizer(model_max_length=40), 40),
        (tokenizer(max_len=33), 33),
        (tokenizer(max_len=33, model_max_length=30), 30),
        (sentence(max_seq_length=24, tokenizer_args={"model_max_length": 16}), 16),
        (sentence(max_seq_length=24, processor_kwargs={"model_max_length": 15}), 15),
        (
            sentence(
                processor_kwargs={"model_max_length": 15}, tokenizer_args={"model_max_length": 16}
            ),
            16,
        ),
        (
            sentence(
                max_seq_length=14, processor_kwargs={"model_max_length": 15}, tokenizer_args={}
            ),
            14,
        ),
        (
            {
                **sentence(max_seq_length=24, processor_kwargs={"model_max_length": None}),
                **tokenizer(model_max_length=40),
            },
            POSITIONS,
        ),
        ({**sentence(max_seq_length=10**30), **tokenizer(model_max_length=40)}, POSITIONS),
        (sentence(max_seq_length=4000), POSITIONS),
    ],
)
def test_length_is_that_of_sentence_transformers(
    tmp_path: Path, files: dict[str, Any], expected: int
) -> None:
    assert model_with(tmp_path, files).max_length == expected


@pytest.mark.parametrize("first", range(len(SENTENCE_FILES)))
def test_first_of_the_seven_files_decides(tmp_path: Path, first: int) -> None:
    files = {name: {"max_seq_length": 10 + i} for i, name in enumerate(SENTENCE_FILES)}

    present = dict(list(files.items())[first:])

    assert model_with(tmp_path, present).max_length == 10 + first


@pytest.mark.parametrize("length", [512.0, 0, -1, "24", True, float("nan")])
def test_length_that_is_no_positive_integer_is_refused(tmp_path: Path, length: Any) -> None:
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: model_max_length is"):
        model_with(tmp_path, tokenizer(model_max_length=length))


def test_chosen_length_shortens_texts_and_is_part_of_the_identity(tmp_path: Path) -> None:
    files = sentence(max_seq_length=24)

    whole, short = model_with(tmp_path, files), model_with(tmp_path, files, max_length=20)

    assert (short.max_length, short.longest) == (20, 24)
    assert short.identity != whole.identity
    assert model_with(tmp_path, sentence(max_seq_length=20)).identity == short.identity


def test_chosen_length_above_that_of_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"EMBEDQ_MAX_LENGTH is 25, but .* of 24 tokens"):
        model_with(tmp_path, sentence(max_seq_length=24), max_length=25)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"transformer_task": "fill-mask"}, "transformer_task is fill-mask"),
        ({"module_output_name": "logits"}, "module_output_name is logits"),
        ({"modality_config": {"image": {}}}, "modality_config is"),
        ({"query_expansion": True}, "query_expansion is True"),
        ({"model_args": {"rotary_scaling_factor": 2}}, "model_args is"),
        ({"config_kwargs": {"is_decoder": False}}, "config_kwargs is"),
        ({"tokenizer_args": {"do_lower_case": True}}, "tokenizer_args is"),
        ({"processor_kwargs": ["model_max_length"]}, "processor_kwargs is"),
    ],
)
def test_option_that_changes_vectors_is_refused_by_name(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelError, match=rf"sentence_bert_config\.json: {named}"):
        model_with(tmp_path, sentence(**options))
