"""A model is found where it may be, checked, and described by what shapes its vectors."""

from __future__ import annotations

import json
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
    tiny_model,
    write_foreign,
    write_json,
    write_tiny,
)

from embedq.protocol.worker import ModelInfo
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model import resolve as resolve_module
from embedq_worker.model.config import read_model_config
from embedq_worker.model.resolve import Kind, load_model


def resolve(name: str, tmp_path: Path, **options: Any) -> resolve_module.Model:
    """Resolve offline, with a digest cache of this test."""
    options.setdefault("offline", True)
    revision = options.pop("revision", None)
    return resolve_module.resolve(name, revision, cache_dir=tmp_path / "cache", **options)


def test_folder_is_described(tmp_path: Path) -> None:
    """A folder of sentence-transformers gives all that a worker announces."""
    write_tiny(tmp_path / "m", pooling="cls")
    usage = {"prompts": {"query": "query: ", "empty": ""}, "default_prompt_name": "query"}
    write_json(tmp_path / "m" / "config_sentence_transformers.json", usage)

    model = resolve(str(tmp_path / "m"), tmp_path)

    assert model.kind is Kind.BERT
    assert model.packable
    assert not model.pinned
    assert model.model_info() == ModelInfo(
        label=str(tmp_path / "m"),
        identity=model.identity,
        dim=32,
        max_length=TINY_MAX_LENGTH,
        pooling="cls",
        normalized=True,
        prompts={"query": "query: "},
        default_prompt="query",
    )
    assert ModelInfo.from_message(model.model_info().to_message()) == model.model_info()


def test_texts_in_lower_case_are_the_tokenizers_business(tmp_path: Path) -> None:
    """A model that wants them is served where its tokenizer makes them, and refused elsewhere."""
    write_tiny(tmp_path)
    limits = {"max_seq_length": TINY_MAX_LENGTH, "do_lower_case": True}
    write_json(tmp_path / "sentence_bert_config.json", limits)
    path = tmp_path / "tokenizer.json"
    read_model_config(tmp_path)
    steps = {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    write_json(path, {**json.loads(path.read_text()), "normalizer": steps})
    read_model_config(tmp_path)
    path.write_text(path.read_text().replace("Lowercase", "NFKC"))

    with pytest.raises(ModelError, match="do_lower_case is true"):
        read_model_config(tmp_path)


def test_length_of_the_sentence_file_wins(tmp_path: Path) -> None:
    """Where files disagree, sentence_bert_config.json is right, capped by the positions."""
    write_tiny(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 40})

    assert read_model_config(tmp_path).max_length == TINY_MAX_LENGTH
    write_json(tmp_path / "sentence_bert_config.json", {"max_seq_length": 4000})
    assert read_model_config(tmp_path).max_length == TINY["max_position_embeddings"]
    (tmp_path / "sentence_bert_config.json").unlink()
    assert read_model_config(tmp_path).max_length == 40


def test_bare_encoder_has_documented_defaults(tmp_path: Path) -> None:
    """Without the files of sentence-transformers: mean, unit length, at most 512 tokens."""
    write_tiny(tmp_path, max_position_embeddings=2048)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
        (tmp_path / name).unlink()
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 10**30})

    traits = read_model_config(tmp_path)

    assert (traits.pooling, traits.normalize, traits.max_length) == ("mean", True, 512)


def test_model_without_normalize_module_is_not_normalised(tmp_path: Path) -> None:
    """modules.json decides whether vectors have unit length."""
    assert not tiny_model(tmp_path, normalize=False).normalize


def test_pooling_in_one_word_is_read(tmp_path: Path) -> None:
    """Newer files name the pooling instead of switching it."""
    write_tiny(tmp_path)
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode": "cls"})

    assert read_model_config(tmp_path).pooling == "cls"


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "asks for max"),
        ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "asks for lasttoken"),
        (
            "1_Pooling/config.json",
            {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
            "cls and mean",
        ),
        (
            "1_Pooling/config.json",
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            "include_prompt",
        ),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "Dense module"),
        ("modules.json", {"a": 1}, "not a list"),
        ("config.json", {**TINY, "model_type": "xlm-roberta"}, r"xlm-roberta.*model\.onnx"),
        ("config.json", {**TINY, "model_type": "mpnet"}, r"mpnet.*model\.onnx"),
        ("config.json", {**TINY, "position_embedding_type": "relative_key"}, "relative_key"),
        ("config.json", {**TINY, "hidden_act": "gelu_new"}, "gelu_new"),
        ("config.json", {**TINY, "is_decoder": True}, "is_decoder"),
        ("config.json", {**TINY, "hidden_size": "many"}, "hidden_size is 'many'"),
        ("config.json", {**TINY, "num_attention_heads": 5}, "not a multiple"),
    ],
)
def test_model_we_cannot_build_is_refused_by_name(
    tmp_path: Path, file: str, content: Any, reason: str
) -> None:
    """What is outside the BERT family, or pools otherwise, is a ModelError that names it."""
    write_tiny(tmp_path / "m")
    write_json(tmp_path / "m" / file, content)

    with pytest.raises(ModelError, match=rf"(?s){re.escape(str(tmp_path))}.*{reason}"):
        resolve(str(tmp_path / "m"), tmp_path)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model.safetensors", "neither model.safetensors nor model.onnx"),
        ("tokenizer.json", "no tokenizer.json"),
        ("1_Pooling/config.json", "is missing"),
    ],
)
def test_incomplete_folder_is_refused(tmp_path: Path, file: str, reason: str) -> None:
    """A folder without a file that shapes vectors is a ModelError, never a guess."""
    write_tiny(tmp_path / "m")
    (tmp_path / "m" / file).unlink()

    with pytest.raises(ModelError, match=reason):
        resolve(str(tmp_path / "m"), tmp_path)


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    """A file that is not JSON is a ModelError with its path."""
    write_tiny(tmp_path / "m")
    (tmp_path / "m" / "modules.json").write_text("[{")

    with pytest.raises(ModelError, match=r"modules\.json is not readable JSON"):
        resolve(str(tmp_path / "m"), tmp_path)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("modules.json", ["x"]),
        ("modules.json", [{"type": "a.Pooling"}]),
        ("sentence_bert_config.json", {"max_seq_length": "24"}),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}),
        ("config.json", {**TINY, "layer_norm_eps": None}),
    ],
)
def test_json_of_another_shape_names_the_folder(tmp_path: Path, file: str, value: object) -> None:
    """It is an error of the model, with a sentence, whatever the files hold."""
    write_tiny(tmp_path / "odd")
    write_json(tmp_path / "odd" / file, value)

    with pytest.raises(ModelError, match=r"A JSON file in .*odd holds what it should not"):
        resolve(str(tmp_path / "odd"), tmp_path)


def test_name_of_nothing_is_refused(tmp_path: Path) -> None:
    """A path that is no folder, and no hub id either, says so."""
    with pytest.raises(ModelError, match="no folder"):
        resolve(str(tmp_path / "missing"), tmp_path)


def test_identity_ignores_label_and_path(tmp_path: Path) -> None:
    """The same files elsewhere, under another name, are the same model."""
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
def test_identity_follows_what_shapes_vectors(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    """Weights, tokenizer, pooling, normalization, length and prompts all change the identity."""
    before = tiny_model(tmp_path).identity

    change(tmp_path)

    assert (
        resolve_module.load_model(tmp_path, "tiny", DigestCache(tmp_path / "other")).identity
        != before
    )


def test_foreign_model_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have 2 GB, and every start describes it twice: in the worker and in its child."""
    write_foreign(tmp_path)
    loads: list[Path] = []
    load = onnx.load

    def counted(path: Path, **options: Any) -> onnx.ModelProto:
        loads.append(path)
        return load(path, **options)

    monkeypatch.setattr(onnx, "load", counted)

    load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))

    assert len(loads) == 1


@pytest.mark.parametrize("place", ["model.onnx_data", "weights.bin"])
def test_identity_follows_weights_beside_a_foreign_model(tmp_path: Path, place: str) -> None:
    """Whatever the file is called in which the model keeps them."""
    write_foreign(tmp_path)
    path = tmp_path / "onnx" / "model.onnx"
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location=place, size_threshold=100)
    before = load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache")).identity

    (path.parent / place).write_bytes(bytes((path.parent / place).stat().st_size))

    assert load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache")).identity != before


@pytest.mark.parametrize("place", ["../weights.bin", "/dev/zero"])
def test_weights_elsewhere_are_refused(tmp_path: Path, place: str) -> None:
    """A model is what lies in its folder; nothing else is opened."""
    write_foreign(tmp_path)
    path = tmp_path / "onnx" / "model.onnx"
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=100)
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    onnx.save(proto, path)

    with pytest.raises(ModelError, match=re.escape(f"keeps weights in {place}")):
        load_model(tmp_path, "foreign", DigestCache(tmp_path / "cache"))


def test_identity_ignores_what_does_not(tmp_path: Path) -> None:
    """A comment in config.json, like a version or a dropout, is no other model."""
    before = tiny_model(tmp_path).identity

    after = tiny_model(tmp_path, transformers_version="9", hidden_dropout_prob=0.5).identity

    assert after == before


@pytest.mark.model
def test_real_model_is_as_published() -> None:
    """all-MiniLM-L6-v2: 384 components, 256 tokens, mean, unit length, pinned digests."""
    model = real_model()

    assert model.pinned
    assert model.weights.stat().st_size == 90_868_376
    assert (model.dim, model.max_length, model.pooling, model.normalize) == (384, 256, "mean", True)
