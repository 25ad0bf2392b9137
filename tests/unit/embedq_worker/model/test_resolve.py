"""Tests of finding, checking and describing a model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from tests.support.models import (
    TINY,
    TINY_MAX_LENGTH,
    real_model,
    resolve_model,
    tiny_model,
    write_foreign,
    write_json,
    write_tiny,
)

from embedq.protocol.contract import Device
from embedq.protocol.worker import ModelInfo
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model import resolve as resolve_module
from embedq_worker.model.config import ModelChoices, ModelConfig
from embedq_worker.model.resolve import load_model
from embedq_worker.settings import WorkerSettings


def test_folder_of_sentence_transformers_is_described(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", pooling="cls")
    usage = {"prompts": {"query": "query: ", "empty": ""}, "default_prompt_name": "query"}
    write_json(tmp_path / "m" / "config_sentence_transformers.json", usage)

    model = resolve_model(str(tmp_path / "m"), tmp_path)

    assert model.packable
    assert not model.pinned
    assert model.model_info() == ModelInfo(
        label=str(tmp_path / "m"),
        identity=model.identity,
        dim=32,
        max_length=TINY_MAX_LENGTH,
        pooling="cls",
        normalized=True,
        prompts={"query": "query: ", "empty": ""},
        default_prompt="query",
    )


def config_of(folder: Path, **choices: Any) -> ModelConfig:
    return load_model(folder, "m", DigestCache(folder / "cache"), ModelChoices(**choices))


def test_sentence_bert_config_sets_max_length_up_to_the_positions(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 40})

    assert config_of(tmp_path).max_length == TINY_MAX_LENGTH
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 4000})
    assert config_of(tmp_path).max_length == TINY["max_position_embeddings"]
    (tmp_path / "sentence_bert_config.json").unlink()
    assert config_of(tmp_path).max_length == 40


def test_pooling_that_no_file_names_is_asked_for(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (tmp_path / name).unlink()
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 10**30})

    with pytest.raises(ModelError, match="EMBEDQ_POOLING=mean"):
        config_of(tmp_path)
    config = config_of(tmp_path, pooling="last")

    positions = TINY["max_position_embeddings"]
    assert (config.pooling, config.normalize, config.max_length) == ("lasttoken", True, positions)


@pytest.mark.parametrize(
    ("device", "setting", "expected"),
    [
        (Device.CPU, 0, 2048),
        (Device.NPU, 0, resolve_module.NPU_MAX_LENGTH),
        (Device.NPU, 1024, 1024),
        (Device.CPU, 100, 100),
    ],
)
def test_long_model_is_capped_on_an_npu_unless_a_length_is_set(
    tmp_path: Path, device: Device, setting: int, expected: int
) -> None:
    write_tiny(tmp_path, max_position_embeddings=2048)
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 2048})
    values: dict[str, Any] = {
        "model": str(tmp_path),
        "max_length": setting,
        "cache_dir": tmp_path / "cache",
    }

    model = resolve_module.find_model(WorkerSettings(**values), device)

    assert model is not None
    assert (model.max_length, model.longest) == (expected, 2048)


def test_model_without_normalize_module_is_not_normalized(tmp_path: Path) -> None:
    assert not tiny_model(tmp_path, normalize=False).normalize


def test_pooling_mode_as_a_word_is_read(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "cls"})

    assert config_of(tmp_path).pooling == "cls"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("1_Pooling/config.json", {"pooling_mode_median": True}, "pooling is pooling_mode_median"),
        ("1_Pooling/config.json", {"pooling_mode": "median"}, "pooling_mode is median"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "lists Dense"),
        ("modules.json", [{"type": "custom_st.Transformer"}], "runs no code of a model"),
        ("modules.json", {"a": 1}, "expected a list"),
        ("config.json", {**TINY, "model_type": "electra"}, r"electra.*model\.onnx"),
        ("config.json", {**TINY, "position_embedding_type": "relative_key"}, "relative_key"),
        ("config.json", {**TINY, "hidden_act": "quick_gelu"}, "quick_gelu"),
        ("config.json", {**TINY, "is_decoder": True}, "is_decoder"),
        ("config.json", {**TINY, "hidden_size": "many"}, "hidden_size is 'many'"),
        ("config.json", {**TINY, "num_attention_heads": 5}, "multiples of num_attention_heads"),
    ],
)
def test_unsupported_model_is_refused_with_the_reason(
    tmp_path: Path, file: str, content: Any, reason: str
) -> None:
    write_tiny(tmp_path / "m")
    write_json(tmp_path / "m" / file, content)

    with pytest.raises(ModelError, match=rf"(?s){re.escape(str(tmp_path))}.*{reason}"):
        resolve_model(str(tmp_path / "m"), tmp_path)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model.safetensors", "neither model.safetensors nor model.onnx"),
        ("tokenizer.json", "no tokenizer.json"),
        ("1_Pooling/config.json", "is missing"),
    ],
)
def test_incomplete_folder_is_refused(tmp_path: Path, file: str, reason: str) -> None:
    write_tiny(tmp_path / "m")
    (tmp_path / "m" / file).unlink()

    with pytest.raises(ModelError, match=reason):
        resolve_model(str(tmp_path / "m"), tmp_path)


def test_damaged_json_is_refused_with_the_file_name(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    (tmp_path / "m" / "modules.json").write_text("[{")

    with pytest.raises(ModelError, match=r"modules\.json is not readable JSON"):
        resolve_model(str(tmp_path / "m"), tmp_path)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("modules.json", ["x"]),
        ("modules.json", [{"type": 5}]),
        ("sentence_bert_config.json", {"max_seq_length": "24"}),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}),
        ("config.json", {**TINY, "layer_norm_eps": "1e-12"}),
    ],
)
def test_json_of_unexpected_shape_is_refused_with_the_file(
    tmp_path: Path, file: str, value: object
) -> None:
    write_tiny(tmp_path / "odd")
    write_json(tmp_path / "odd" / file, value)

    with pytest.raises(ModelError, match=rf"odd/{re.escape(file)}"):
        resolve_model(str(tmp_path / "odd"), tmp_path)


def test_name_that_is_neither_folder_nor_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        resolve_model(str(tmp_path / "missing"), tmp_path)


def test_identity_is_independent_of_label_and_path(tmp_path: Path) -> None:
    one = tiny_model(tmp_path / "one")

    assert tiny_model(tmp_path / "two").identity == one.identity
    assert re.fullmatch(r"[0-9a-f]{64}", one.identity)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: write_tiny(folder, seed=1),
        lambda folder: write_tiny(folder, pooling="cls"),
        lambda folder: write_tiny(folder, normalize=False),
        lambda folder: write_tiny(folder, layer_norm_eps=1e-6),
        lambda folder: write_json(folder / "sentence_bert_config.json", {"max_seq_length": 20}),
        lambda folder: write_json(
            folder / "config_sentence_transformers.json", {"prompts": {"q": "query: "}}
        ),
        lambda folder: (folder / "tokenizer.json").write_text(
            (folder / "tokenizer.json").read_text().replace("##k", "##j")
        ),
    ],
)
def test_identity_changes_with_everything_that_shapes_vectors(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    before = tiny_model(tmp_path).identity

    change(tmp_path)

    assert (
        resolve_module.load_model(tmp_path, "tiny", DigestCache(tmp_path / "other")).identity
        != before
    )


def test_foreign_model_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A model may have 2 GB, and main and pool process both describe it at each start.
    write_foreign(tmp_path)
    loads: list[Path] = []
    load = onnx.load

    def counting_load(path: Path, **options: Any) -> onnx.ModelProto:
        loads.append(path)
        return load(path, **options)

    monkeypatch.setattr(onnx, "load", counting_load)

    load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))

    assert len(loads) == 1


@pytest.mark.parametrize("place", ["model.onnx_data", "weights.bin"])
def test_identity_changes_with_external_weights(tmp_path: Path, place: str) -> None:
    write_foreign(tmp_path)
    path = tmp_path / "onnx" / "model.onnx"
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location=place, size_threshold=100)
    before = load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache")).identity

    (path.parent / place).write_bytes(bytes((path.parent / place).stat().st_size))

    assert load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache")).identity != before


@pytest.mark.parametrize("place", ["../weights.bin", "/dev/zero"])
def test_external_weights_outside_the_folder_are_refused(tmp_path: Path, place: str) -> None:
    write_foreign(tmp_path)
    path = tmp_path / "onnx" / "model.onnx"
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    onnx.save(proto, path)

    with pytest.raises(ModelError, match=re.escape(f"stores weights in {place}")):
        load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache"))


def test_identity_is_independent_of_version_and_dropout(tmp_path: Path) -> None:
    before = tiny_model(tmp_path).identity

    after = tiny_model(tmp_path, transformers_version="9", hidden_dropout_prob=0.5).identity

    assert after == before


@pytest.mark.model
def test_real_model_is_pinned_and_has_the_published_properties() -> None:
    model = real_model()

    assert model.pinned
    assert model.weights.stat().st_size == 90_868_376
    assert (model.dim, model.max_length, model.pooling, model.normalize) == (384, 256, "mean", True)
