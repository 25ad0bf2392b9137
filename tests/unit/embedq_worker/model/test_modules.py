"""Tests of modules.json, of what poolings and Dense modules compute, and of what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.models import write_json, write_safetensors, write_tiny

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_padded
from embedq_worker.model.config import ModelChoices
from embedq_worker.model.graph import build_graph
from embedq_worker.model.resolve import Model, load_model

Floats = npt.NDArray[np.float32]

TEXT = (2, 9, 24, 3, 17)
TOLERANCE = 2e-5


def write_model(folder: Path, *behind: str, **pooling: Any) -> None:
    """Write a tiny model with this configuration of the pooling, and modules behind it."""
    write_tiny(folder)
    kinds = ["Transformer", "Pooling", *behind]
    entries = [
        {
            "idx": i,
            "name": str(i),
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    write_json(folder / "modules.json", entries)
    write_json(folder / "1_Pooling" / "config.json", pooling or {"pooling_mode": "mean"})


def write_dense(place: Path, out: int = 8, into: int = 32, **config: Any) -> dict[str, Floats]:
    """Write a Dense module with random weights, and return them."""
    rng = np.random.default_rng(5)
    tensors = {
        "linear.weight": rng.normal(0, 0.3, (out, into)).astype(np.float32),
        "linear.bias": rng.normal(0, 0.3, out).astype(np.float32),
    }
    values = {
        "in_features": into,
        "out_features": out,
        "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
        **config,
    }
    write_json(place / "config.json", values)
    write_safetensors(place / "model.safetensors", tensors)
    return tensors


def load(folder: Path, **choices: Any) -> Model:
    return load_model(folder, "m", DigestCache(folder / "cache"), ModelChoices(**choices))


def vector_of(model: Model, text: Sequence[int] = TEXT) -> Floats:
    """Embed one text in onnxruntime."""
    offsets = np.array([0, len(text)], np.int64)
    tokens = RaggedTokens(np.array(text, np.int32), offsets, np.zeros(1, np.uint32))
    engine = OnnxRuntimeEngine(model, threads=1)
    try:
        return np.asarray(engine.infer(build_padded(tokens, range(1), pad_id=0))[0, 0])
    finally:
        engine.close()


def pooled(folder: Path, mode: str) -> Floats:
    """Embed the text with one pooling and nothing behind it."""
    write_model(folder, pooling_mode=mode)
    return vector_of(load(folder))


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        # Version 6: pooling_mode, in the order given.
        ({"pooling_mode": ["mean", "cls"]}, ("mean", "cls")),
        ({"pooling_mode": ["lasttoken", "max"]}, ("lasttoken", "max")),
        # Older versions: flags, in the order of the code.
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, ("cls", "mean")),
        (
            {
                "pooling_mode_lasttoken": True,
                "pooling_mode_weightedmean_tokens": True,
                "pooling_mode_mean_sqrt_len_tokens": True,
                "pooling_mode_mean_tokens": True,
                "pooling_mode_max_tokens": True,
                "pooling_mode_cls_token": True,
            },
            ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"),
        ),
        # The word wins over flags.
        ({"pooling_mode": "max", "pooling_mode_mean_tokens": True}, ("max",)),
        ({"pooling_mode_cls_token": False}, ("mean",)),
        ({"word_embedding_dimension": 32}, ("mean",)),
    ],
)
def test_pooling_modes_are_those_of_sentence_transformers(
    tmp_path: Path, pooling: dict[str, Any], expected: tuple[str, ...]
) -> None:
    write_model(tmp_path, **pooling)

    model = load(tmp_path)

    assert model.pooling_modes == expected
    assert model.dim == 32 * len(expected)


def test_concatenated_vector_has_the_parts_in_their_order(tmp_path: Path) -> None:
    modes = ["max", "cls", "weightedmean"]
    parts = [pooled(tmp_path / mode, mode) for mode in modes]

    write_model(tmp_path / "all", pooling_mode=modes)
    vector = vector_of(load(tmp_path / "all"))

    assert np.abs(vector - np.concatenate(parts)).max() < TOLERANCE


def test_include_prompt_false_is_read_and_part_of_the_identity(tmp_path: Path) -> None:
    write_model(tmp_path, pooling_mode="mean", include_prompt=True)
    whole = load(tmp_path)
    write_model(tmp_path, pooling_mode="mean", include_prompt=False)
    without = load(tmp_path)

    assert (whole.include_prompt, without.include_prompt) == (True, False)
    assert whole.identity != without.identity


@pytest.mark.parametrize(
    ("pooling", "named"),
    [
        ({"pooling_mode": "median"}, "pooling_mode is median"),
        ({"pooling_mode": ["mean", "median"]}, "pooling_mode is median"),
        ({"pooling_mode": []}, "names no pooling mode"),
        ({"pooling_mode_median": True}, "pooling_mode_median"),
        ({"pooling_mode_mean_tokens": "yes"}, "pooling_mode_mean_tokens is 'yes'"),
        # Version 6 reads cls, older ones cls and mean.
        ({"pooling_mode_cls_token": True}, "no pooling_mode_mean_tokens"),
        ({"pooling_mode_mean_tokens": False}, "names no pooling mode"),
        ({"pooling_mode": "mean", "include_prompt": "no"}, "include_prompt is 'no'"),
    ],
)
def test_pooling_that_is_not_understood_is_refused(
    tmp_path: Path, pooling: dict[str, Any], named: str
) -> None:
    write_model(tmp_path, **pooling)

    with pytest.raises(ModelError, match=rf"1_Pooling/config\.json.*{named}"):
        load(tmp_path)


@pytest.mark.parametrize(
    "kinds",
    [
        ("Transformer",),
        ("Pooling", "Transformer"),
        ("Transformer", "Pooling", "Pooling"),
        ("Transformer", "Normalize", "Pooling"),
        ("Transformer", "Dense", "Pooling"),
        ("Transformer", "Pooling", "Dropout"),
        ("Transformer", "WeightedLayerPooling", "Pooling"),
        ("StaticEmbedding",),
        ("Router", "Pooling"),
        (),
    ],
)
def test_other_orders_and_kinds_of_modules_are_refused(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    write_tiny(tmp_path)
    types = [f"sentence_transformers.models.{kind}" for kind in kinds]
    write_json(tmp_path / "modules.json", [{"path": "", "type": type_} for type_ in types])

    with pytest.raises(ModelError, match=r"modules\.json lists .*embedq supports Transformer"):
        load(tmp_path)


def test_two_modules_of_one_name_are_refused(tmp_path: Path) -> None:
    """sentence-transformers keeps only the last module of a name."""
    write_tiny(tmp_path)
    kinds = ["Transformer", "Pooling", "Normalize"]
    entries = [
        {"name": "0", "path": "", "type": f"sentence_transformers.models.{k}"} for k in kinds
    ]
    write_json(tmp_path / "modules.json", entries)

    with pytest.raises(ModelError, match="two modules of the same name"):
        load(tmp_path)


def test_class_outside_sentence_transformers_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    write_json(tmp_path / "modules.json", [{"path": "", "type": "custom_transformer.Transformer"}])

    with pytest.raises(ModelError, match=r"custom_transformer\.Transformer"):
        load(tmp_path)


def test_place_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    entries = [
        {"path": "../other", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    write_json(tmp_path / "modules.json", entries)

    with pytest.raises(ModelError, match="outside its folder"):
        load(tmp_path)


def test_encoder_in_a_folder_of_its_own_is_read_there(tmp_path: Path) -> None:
    """Versions before 2 wrote the encoder into 0_Transformer."""
    write_tiny(tmp_path / "flat")
    write_tiny(tmp_path / "deep")
    inside = tmp_path / "deep" / "0_Transformer"
    inside.mkdir()
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "sentence_bert_config.json",
    ):
        (tmp_path / "deep" / name).rename(inside / name)
    kinds = ["Transformer", "Pooling", "Normalize"]
    entries = [
        {"path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    write_json(tmp_path / "deep" / "modules.json", entries)

    flat, deep = load(tmp_path / "flat"), load(tmp_path / "deep")

    assert deep.identity == flat.identity
    assert deep.max_length == flat.max_length
    assert vector_of(deep).tobytes() == vector_of(flat).tobytes()


def test_adapter_is_refused_by_name(tmp_path: Path) -> None:
    """transformers adds the adapter of such a folder to the weights (PEFT)."""
    write_model(tmp_path)
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})

    with pytest.raises(ModelError, match=r"adapter_config\.json.*PEFT"):
        load(tmp_path)


# torch.nn: the definition of each class in its documentation.
DEFINITIONS: Mapping[str, Callable[[Any], Any]] = {
    "linear.Identity": lambda x: x,
    "activation.Tanh": np.tanh,
    "activation.GELU": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "activation.ReLU": lambda x: np.maximum(x, 0),
    "activation.SiLU": lambda x: x / (1 + np.exp(-x)),
    "activation.Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_computes_its_definition(tmp_path: Path, name: str, bias: bool) -> None:
    mean = pooled(tmp_path / "pooled", "mean")
    write_model(tmp_path / "m", "Dense")
    config: dict[str, Any] = {"activation_function": f"torch.nn.modules.{name}", "bias": bias}
    tensors = write_dense(tmp_path / "m" / "2_Dense", **config)

    model = load(tmp_path / "m")

    product = tensors["linear.weight"] @ mean + (tensors["linear.bias"] if bias else 0)
    assert model.dim == 8
    assert np.abs(vector_of(model) - DEFINITIONS[name](product)).max() < TOLERANCE


def test_dense_without_an_activation_has_tanh(tmp_path: Path) -> None:
    write_model(tmp_path, "Dense")
    write_dense(tmp_path / "2_Dense")
    named = vector_of(load(tmp_path))

    write_json(tmp_path / "2_Dense" / "config.json", {"in_features": 32, "out_features": 8})

    assert vector_of(load(tmp_path)).tobytes() == named.tobytes()


def test_layer_norm_computes_its_definition(tmp_path: Path) -> None:
    mean = pooled(tmp_path / "pooled", "mean")
    write_model(tmp_path / "m", "LayerNorm")
    rng = np.random.default_rng(6)
    scale, shift = (rng.normal(size=32).astype(np.float32) for _ in range(2))
    place = tmp_path / "m" / "2_LayerNorm"
    write_json(place / "config.json", {"dimension": 32})
    write_safetensors(place / "model.safetensors", {"norm.weight": scale, "norm.bias": shift})

    vector = vector_of(load(tmp_path / "m"))

    # torch.nn.LayerNorm: biased variance, epsilon 1e-5.
    expected = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5) * scale + shift
    assert np.abs(vector - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"use_residual": True}, "use_residual is True"),
        ({"module_input_name": "token_embeddings"}, "module_input_name is token_embeddings"),
        ({"module_output_name": "other"}, "module_output_name is other"),
        ({"activation_function": "torch.nn.modules.activation.Mish"}, "activation_function is"),
        ({"activation_function": "custom.Tanh"}, r"activation_function is custom\.Tanh"),
        ({"in_features": 0}, "in_features is 0"),
        ({"in_features": 16}, "a Dense of 16 components, but the vectors before it have 32"),
    ],
)
def test_dense_that_is_not_understood_is_refused(
    tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    write_model(tmp_path, "Dense")
    write_dense(tmp_path / "2_Dense", **config)

    with pytest.raises(ModelError, match=rf"2_Dense/config\.json.*{named}"):
        load(tmp_path)


def test_dense_without_safetensors_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "Dense")
    write_dense(tmp_path / "2_Dense")
    (tmp_path / "2_Dense" / "model.safetensors").rename(tmp_path / "2_Dense/pytorch_model.bin")

    with pytest.raises(ModelError, match=r"2_Dense/model\.safetensors is missing.*save_pretrained"):
        load(tmp_path)


def test_dense_whose_weights_have_another_shape_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "Dense")
    write_dense(tmp_path / "2_Dense", out=8)
    write_json(tmp_path / "2_Dense" / "config.json", {"in_features": 32, "out_features": 16})

    with pytest.raises(ModelError, match=r"2_Dense/model\.safetensors .*shape \[8, 32\]"):
        build_graph(load(tmp_path))


def test_weights_of_a_dense_are_part_of_the_identity(tmp_path: Path) -> None:
    write_model(tmp_path, "Dense")
    tensors = write_dense(tmp_path / "2_Dense")
    before = load(tmp_path).identity

    tensors["linear.bias"] += 1
    write_safetensors(tmp_path / "2_Dense" / "model.safetensors", tensors)

    assert load(tmp_path).identity != before


@pytest.mark.parametrize("kind", ["CrossEncoder", "SparseEncoder"])
def test_other_kinds_of_models_are_refused(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path)
    write_json(tmp_path / "config_sentence_transformers.json", {"model_type": kind})

    with pytest.raises(ModelError, match=rf"model_type is {kind}"):
        load(tmp_path)


def test_default_prompt_that_is_no_prompt_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path)
    usage = {"prompts": {"query": "q: "}, "default_prompt_name": "passage"}
    write_json(tmp_path / "config_sentence_transformers.json", usage)

    with pytest.raises(ModelError, match="default_prompt_name is passage"):
        load(tmp_path)
