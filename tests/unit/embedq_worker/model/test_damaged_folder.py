"""Tests of a model folder in which one file is damaged: it is served or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.models import TINY, write_json, write_safetensors, write_tiny, write_tokenizer

from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.graph import build_graph
from embedq_worker.model.resolve import load_model

#: Every file of the folder, and valid contents where it is JSON.
JSON_FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(
            [
                ("", "Transformer"),
                ("1_Pooling", "Pooling"),
                ("2_Dense", "Dense"),
                ("3_LayerNorm", "LayerNorm"),
                ("4_Normalize", "Normalize"),
            ]
        )
    ],
    "config.json": TINY,
    "sentence_bert_config.json": {
        "max_seq_length": 24,
        "do_lower_case": False,
        "transformer_task": "feature-extraction",
        "module_output_name": "token_embeddings",
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "last_hidden_state"}
        },
        "tokenizer_args": {"model_max_length": 24},
        "model_args": {},
        "config_args": {},
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "a "},
        "default_prompt_name": "query",
    },
    "tokenizer_config.json": {
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 24,
        "do_lower_case": True,
        "strip_accents": None,
        "tokenize_chinese_chars": True,
        "truncation_side": "right",
        "padding_side": "right",
        "cls_token": "[CLS]",
        "added_tokens_decoder": {"0": {"content": "[PAD]", "special": True}},
    },
    "special_tokens_map.json": {"sep_token": {"content": "[SEP]"}, "pad_token": "[PAD]"},
    "1_Pooling/config.json": {
        "word_embedding_dimension": 32,
        "pooling_mode": "mean",
        "include_prompt": True,
    },
    "2_Dense/config.json": {
        "in_features": 32,
        "out_features": 16,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
        "module_input_name": "sentence_embedding",
        "use_residual": False,
    },
    "3_LayerNorm/config.json": {"dimension": 16},
    "4_Normalize/config.json": {"module_input_name": "sentence_embedding"},
    "model.safetensors.index.json": {},
    "tokenizer.json": {},
}
OTHER_FILES = (
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "2_Dense/model.safetensors",
    "3_LayerNorm/model.safetensors",
)

#: Contents that no file of a model has.
DAMAGES: dict[str, bytes] = {
    "empty": b"",
    "list": b"[]",
    "object": b"{}",
    "null": b"null",
    "text": b'"text"',
    "number": b"1e999",
    "nan": b"NaN",
    "many digits": b'{"hidden_size": ' + b"9" * 5000 + b"}",
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "not UTF-8": b"\xff\xfe\x00{",
    "nested list": b"[[[{}]]]",
    "zeros": bytes(64),
}

#: Values of a type that a key does not expect, or out of its range.
WRONG: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**40,
    10**400,
    1.5,
    float("inf"),
    float("nan"),
    "",
    "x\x00y",
    "\ud800",
    "x" * 5000,
    [],
    [[]],
    [{}],
    {},
    {"a": []},
    {"9" * 5000: {"content": 1}},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a model in two shards, a Dense and a LayerNorm."""
    folder = tmp_path / "m"
    tensors = write_tiny(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {file: names[i::2] for i, file in enumerate(OTHER_FILES[:2])}
    for file, part in shards.items():
        write_safetensors(folder / file, {name: tensors[name] for name in part})
    for file, content in JSON_FILES.items():
        if content:
            write_json(folder / file, content)
    places = {name: file for file, part in shards.items() for name in part}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    write_tokenizer(folder / "tokenizer.json")
    dense = {"linear.weight": ones(16, 32), "linear.bias": ones(16)}
    norm = {"norm.weight": ones(16), "norm.bias": ones(16)}
    write_safetensors(folder / OTHER_FILES[2], dense)
    write_safetensors(folder / OTHER_FILES[3], norm)
    return folder


def ones(*shape: int) -> npt.NDArray[np.float32]:
    return np.ones(shape, np.float32)


def open_model(folder: Path) -> None:
    """Read every file of a model as a worker does."""
    model = load_model(folder, "m", DigestCache(folder.parent / "cache"))
    build_graph(model)
    Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)


def refused_by_name(folder: Path) -> bool:
    """Return whether a model is refused, in words that name its folder; False if it is served."""
    try:
        open_model(folder)
    except ModelError as error:
        message = str(error)
        assert str(folder) in message or "tokenizer.json" in message, message
        assert "Traceback" not in message
        return True
    return False


def test_undamaged_folder_is_served(folder: Path) -> None:
    assert not refused_by_name(folder)


@pytest.mark.parametrize("file", [*JSON_FILES, *OTHER_FILES])
@pytest.mark.parametrize("damage", DAMAGES)
def test_file_with_other_contents_is_served_or_refused_by_name(
    folder: Path, file: str, damage: str
) -> None:
    (folder / file).write_bytes(DAMAGES[damage])

    refused = refused_by_name(folder)

    # Only an object without keys may mean the defaults.
    assert refused or damage in ("object", "deep object", "many digits")


@pytest.mark.parametrize("file", [*JSON_FILES, *OTHER_FILES])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(path.read_bytes()[:9]),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), path.symlink_to(path)),
    ],
    ids=["missing", "cut off", "start only", "folder", "link to itself"],
)
def test_incomplete_file_is_served_or_refused_by_name(
    folder: Path, file: str, damage: Callable[[Path], object]
) -> None:
    damage(folder / file)

    refused_by_name(folder)


def paths_of(value: Any) -> list[list[Any]]:
    """Return where each value inside a JSON value is."""
    children: Any = ()
    if isinstance(value, dict):
        children = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    return [[], *([key, *path] for key, child in children for path in paths_of(child))]


@pytest.mark.parametrize("file", [name for name, content in JSON_FILES.items() if content])
def test_wrong_value_of_each_key_is_served_or_refused_by_name(folder: Path, file: str) -> None:
    path = folder / file
    good = path.read_text()
    for *parents, last in filter(None, paths_of(json.loads(good))):
        for wrong in WRONG:
            value = json.loads(good)
            place = value
            for key in parents:
                place = place[key]
            place[last] = wrong
            write_json(path, value)
            refused_by_name(folder)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_value_in_an_index_is_refused(folder: Path, wrong: Any) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    for value in ({"weight_map": wrong}, {"weight_map": {**index["weight_map"], "x": wrong}}):
        write_json(path, value)
        assert refused_by_name(folder)
