"""Tests of each family of encoders against transformers, with small random weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.models import write_json, write_modules, write_tokenizer

from embedq_worker.engines.base import RaggedTokens, RowSpec
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_rows, skip_pad_tokens
from embedq_worker.model.families import FAMILIES
from embedq_worker.model.resolve import Model, load_model

#: Largest difference of a component of unit vectors in f32.
TOLERANCE = 2e-5

#: Token sequences of several lengths, longer than every window; token 1 pads in some families.
LENGTHS = (1, 2, 5, 9, 17, 40, 90)
VOCABULARY = 64

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
DECODER = {**SMALL, "num_key_value_heads": 2, "head_dim": 16}

#: Name of a variant -> configuration class of transformers, its arguments.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", {**SMALL, "hidden_act": "gelu_new"}),
    "roberta": ("RobertaConfig", {**SMALL, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta": ("XLMRobertaConfig", {**SMALL, "type_vocab_size": 1}),
    "camembert": ("CamembertConfig", {**SMALL, "type_vocab_size": 1, "hidden_act": "relu"}),
    "distilbert": (
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 128,
        },
    ),
    "mpnet": ("MPNetConfig", SMALL),
    "modernbert": ("ModernBertConfig", {**SMALL, "local_attention": 16, "pad_token_id": 0}),
    "modernbert with biases": (
        "ModernBertConfig",
        {
            **SMALL,
            "local_attention": 10,
            "pad_token_id": 0,
            "norm_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
            "global_rope_theta": 5_000.0,
            "local_rope_theta": 100.0,
            "global_attn_every_n_layers": 2,
        },
    ),
    "nomic_bert": ("NomicBertConfig", SMALL),
    "qwen3": ("Qwen3Config", {**DECODER, "attention_bias": True, "pad_token_id": 0}),
    "gemma3_text": (
        "Gemma3TextConfig",
        {
            **DECODER,
            "sliding_window": 16,
            "use_bidirectional_attention": True,
            "query_pre_attn_scalar": 20,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
    ),
}


def sequences() -> list[list[int]]:
    """Return random token sequences; one contains token 1."""
    rng = np.random.default_rng(5)
    found = [[int(i) for i in rng.integers(4, VOCABULARY, n)] for n in LENGTHS]
    found[4][3] = 1
    return found


def write_random(folder: Path, variant: str) -> Any:
    """Save a random model of a family, and return the model of transformers."""
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers")
    kind, arguments = VARIANTS[variant]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**arguments)
    config._attn_implementation = "eager"
    model = transformers.AutoModel.from_config(config).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases that are not 1 and 0, and weights whose attention is not uniform.
            spread = 0.3 if parameter.ndim == 1 else 0.4
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    write_modules(folder)
    write_tokenizer(folder / "tokenizer.json")
    return model


def expected_vectors(model: Any, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Return the mean of the token vectors of each text alone, scaled to unit length."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        means = [
            model(input_ids=torch.tensor([list(text)])).last_hidden_state[0].mean(0).numpy()
            for text in texts
        ]
    return np.stack([mean / np.linalg.norm(mean) for mean in means])


def ragged(texts: Sequence[Sequence[int]]) -> RaggedTokens:
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    ids = np.concatenate([np.array(text, np.int32) for text in texts])
    return RaggedTokens(ids, offsets, np.zeros(len(texts), np.uint32))


def packed_vectors(model: Model, texts: Sequence[Sequence[int]]) -> npt.NDArray[np.float32]:
    """Compute all texts in two rows, several texts each."""
    engine = OnnxRuntimeEngine(model, threads=1)
    row_spec = RowSpec.packed(model.max_length)
    order = np.argsort([-len(text) for text in texts])
    rows = [order[:1], order[1:]]
    vectors = np.zeros((len(texts), model.dim), np.float32)
    for batch in build_rows(ragged(texts), rows, 0, row_spec):
        pad_id = model.architecture.get("position_pad_id")
        found = engine.infer(batch if pad_id is None else skip_pad_tokens(batch, pad_id))
        for row, segment in np.argwhere(batch.members >= 0):
            vectors[batch.members[row, segment]] = found[row, segment]
    engine.close()
    return vectors


def test_every_family_has_a_variant() -> None:
    assert {variant.partition(" ")[0] for variant in VARIANTS} == set(FAMILIES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_vectors_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    reference = write_random(tmp_path, variant)
    model = load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))
    texts = sequences()

    vectors = packed_vectors(model, texts)

    expected = expected_vectors(reference, texts)
    cosines = expected @ expected.T
    assert cosines[~np.eye(len(texts), dtype=bool)].mean() < 0.97, "the texts are too alike"
    assert np.abs(vectors - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("roberta", {"is_decoder": True}, "is_decoder is True"),
        ("xlm-roberta", {"pad_token_id": 127}, "pad_token_id is 127"),
        ("distilbert", {"activation": "mish"}, "activation is mish"),
        ("mpnet", {"hidden_act": "quick_gelu"}, "hidden_act is quick_gelu"),
        ("modernbert", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ("modernbert", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling"),
        ("nomic_bert", {"n_embd": 32, "prenorm": True}, "prenorm is True"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window"),
        ("qwen3", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_parameters"),
        ("qwen3", {"num_key_value_heads": 3}, "num_key_value_heads is 3"),
        ("gemma3_text", {}, "use_bidirectional_attention is False"),
        (
            "gemma3_text",
            {"use_bidirectional_attention": True, "attn_logit_softcapping": 50.0},
            "attn_logit_softcapping",
        ),
    ],
)
def test_value_that_the_graph_does_not_support_is_refused(
    tmp_path: Path, kind: str, config: dict[str, Any], reason: str
) -> None:
    names = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 48}
    write_json(tmp_path / "config.json", {**SMALL, **names, "model_type": kind, **config})
    write_modules(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "model.safetensors").write_bytes(b"")

    with pytest.raises(ModelError, match=rf"config\.json: {reason}"):
        load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))


def test_names_of_the_hub_are_read_as_those_of_transformers(tmp_path: Path) -> None:
    reference = write_random(tmp_path, "nomic_bert")
    saved = load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))
    config = json.loads((tmp_path / "config.json").read_text())
    hub = {
        "model_type": "nomic_bert",
        "n_embd": config["hidden_size"],
        "n_layer": config["num_hidden_layers"],
        "n_head": config["num_attention_heads"],
        "n_inner": config["intermediate_size"],
        "n_positions": 128,
        "vocab_size": VOCABULARY,
        "activation_function": "swiglu",
        "qkv_proj_bias": False,
        "mlp_fc1_bias": False,
        "mlp_fc2_bias": False,
        "rotary_emb_base": 1_000,
        "rotary_emb_fraction": 1.0,
        "layer_norm_epsilon": 1e-12,
    }
    write_json(tmp_path / "config.json", hub)
    model = load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))
    texts = sequences()

    assert model.architecture == saved.architecture
    difference = packed_vectors(model, texts) - expected_vectors(reference, texts)
    assert np.abs(difference).max() < TOLERANCE
