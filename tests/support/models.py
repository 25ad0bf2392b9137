"""Provide models for tests: a tiny random BERT, and the real weights if available.

`reference_vector` is a forward pass of the tiny model that shares no code with the product.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import random
import runpy
import struct
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from embedq.settings import DEFAULT_MODEL, cache_home
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.model.resolve import Model, load_model, resolve
from embedq_worker.model.sources import WHEEL_FOLDER
from embedq_worker.settings import DeviceChoice, WorkerSettings

Array = npt.NDArray[np.float32]

#: Folder into which ops/demo and ops/test download the default model.
DOWNLOADED = cache_home() / "wheel" / WHEEL_FOLDER
#: Folder of the real model, or "". Read at import, before a fixture clears the environment.
TEST_MODEL = os.environ.get("EMBEDQ_TEST_MODEL", str(DOWNLOADED) if DOWNLOADED.is_dir() else "")

#: config.json of the tiny model.
TINY: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 48,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "position_embedding_type": "absolute",
}
#: Maximum length of the tiny model, tokens.
TINY_MAX_LENGTH = 24
#: Whole words in its vocabulary; other words are split into letters.
WORDS = ["the", "queue", "worker", "keeps", "a", "promise", "of", "texts", "and", "vectors"]


@functools.cache
def real_model() -> Model:
    """Return the real all-MiniLM-L6-v2, or skip the test."""
    digests = Path(tempfile.gettempdir()) / f"embedq-test-{os.getuid()}"
    try:
        if TEST_MODEL:
            return load_model(Path(TEST_MODEL), TEST_MODEL, DigestCache(digests))
        return resolve(DEFAULT_MODEL, None, cache_dir=digests, offline=True)
    except ModelError as error:
        pytest.skip(f"Set EMBEDQ_TEST_MODEL to a folder with {DEFAULT_MODEL}: {error}")


@functools.cache
def docstrings() -> list[str]:
    """Return 2,048 docstrings of Python's standard library, from as few files as possible."""
    corpus = runpy.run_path(str(Path(__file__).parents[2] / "ops" / "bench" / "corpus.py"))
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    every = itertools.chain.from_iterable(map(corpus["_of_file"], files))
    texts = list(itertools.islice(dict.fromkeys(itertools.islice(every, 3000)), 2048))
    random.Random(corpus["SEED"]).shuffle(texts)
    return texts


def resolve_model(
    name: str, folder: Path, revision: str | None = None, *, offline: bool = True
) -> Model:
    """Resolve a model with a digest cache below `folder`."""
    return resolve(name, revision, cache_dir=folder / "cache", offline=offline)


def cpu_opener(model: Model, cache: Path, **settings: Any) -> EngineOpener:
    """Return an engine opener for a worker on the CPU."""
    values = {"device": DeviceChoice.CPU, "cache_dir": cache, "threads": 2, **settings}
    return EngineOpener(WorkerSettings(**values), model)


def tiny_model(folder: Path, **options: Any) -> Model:
    write_tiny(folder, **options)
    return load_model(folder, "tiny", DigestCache(folder / "cache"))


def write_tiny(
    folder: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    seed: int = 0,
    dtype: str = "F32",
    **config: Any,
) -> dict[str, Array]:
    """Write a tiny BERT in the layout of sentence-transformers, and return its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**TINY, **config}
    tensors = tiny_tensors(settings, seed)
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    write_json(folder / "config.json", settings)
    write_modules(folder, pooling, normalize=normalize)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": TINY_MAX_LENGTH})
    write_tokenizer(folder / "tokenizer.json")
    return tensors


def write_modules(folder: Path, pooling: str = "mean", *, normalize: bool = True) -> None:
    """Write modules.json and its pooling as sentence-transformers 2 to 4 did."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    modules = [
        {
            "idx": i,
            "path": f"{i}_{kind}" if i else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for i, kind in enumerate(kinds)
    ]
    switches = {f"pooling_mode_{name}": False for name in ("cls_token", "mean_tokens")}
    switches[{"cls": "pooling_mode_cls_token"}.get(pooling, "pooling_mode_mean_tokens")] = True
    write_json(folder / "modules.json", modules)
    write_json(folder / "1_Pooling" / "config.json", switches)


def load_encoder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Array]) -> Model:
    """Write an encoder of any family with mean pooling, and load it."""
    write_json(folder / "config.json", config)
    write_modules(folder)
    write_tokenizer(folder / "tokenizer.json")
    write_safetensors(folder / "model.safetensors", tensors)
    return load_model(folder, "m", DigestCache(folder / "cache"))


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_tokenizer(path: Path) -> None:
    """Write a WordPiece tokenizer with padding and truncation on, like the real one."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *(c for c in letters if c not in WORDS)]
    words += [f"##{c}" for c in "esdrk"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer = HfTokenizer(model)
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_truncation(10)
    tokenizer.enable_padding(length=10)
    tokenizer.save(str(path))


def write_safetensors(path: Path, tensors: Mapping[str, Array], dtype: str = "F32") -> None:
    """Write tensors in the safetensors format, with the header padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks: list[bytes] = []
    at = 0
    for name, tensor in tensors.items():
        raw = {
            "F32": lambda t: t.astype("<f4").tobytes(),
            "F16": lambda t: t.astype("<f2").tobytes(),
            "BF16": lambda t: (t.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes(),
        }[dtype](tensor)
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(raw)],
        }
        chunks.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def tiny_tensors(config: Mapping[str, Any], seed: int) -> dict[str, Array]:
    """Draw random weights under the names that transformers uses."""
    rng = np.random.default_rng(seed)
    dim, wide = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config["vocab_size"], dim),
        "embeddings.position_embeddings.weight": (config["max_position_embeddings"], dim),
        "embeddings.token_type_embeddings.weight": (config["type_vocab_size"], dim),
        **_norm("embeddings.LayerNorm", dim),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            shapes |= _dense(f"{layer}attention.self.{part}", dim, dim)
        shapes |= _dense(f"{layer}attention.output.dense", dim, dim)
        shapes |= _norm(f"{layer}attention.output.LayerNorm", dim)
        shapes |= _dense(f"{layer}intermediate.dense", wide, dim)
        shapes |= _dense(f"{layer}output.dense", dim, wide)
        shapes |= _norm(f"{layer}output.LayerNorm", dim)
    return {
        name: rng.normal(1.0 if "LayerNorm.weight" in name else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def _dense(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, dim: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}


def write_foreign(
    folder: Path,
    *,
    opset: int = 17,
    output: str = "last_hidden_state",
    inputs: Sequence[str] = ("input_ids", "attention_mask", "token_type_ids"),
    int_type: int = TensorProto.INT64,
    axes: Sequence[Any] = ("batch", "sequence"),
    modules: bool = True,
) -> npt.NDArray[np.float32]:
    """Write an ONNX model whose token vectors are rows of a table, and return the table [V, D].

    With output `sentence_embedding`, the vector is that of the first token, times 3. With
    `modules`, modules.json asks for mean pooling and unit length.
    """
    table = np.random.default_rng(3).normal(size=(64, 8)).astype(np.float32)
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    shape: list[Any] = [*axes, 8]
    if output == "sentence_embedding":
        nodes += [
            helper.make_node("Gather", ["rows", "zero"], ["first"], axis=1),
            helper.make_node("Mul", ["first", "three"], [output]),
        ]
        shape = [axes[0], 8]
    else:
        # Every input changes the result, so that a wrong mask is detected.
        total = "input_ids"
        for i, name in enumerate(inputs[1:]):
            nodes.append(helper.make_node("Add", [total, name], [f"sum{i}"]))
            total = f"sum{i}"
        nodes += [
            helper.make_node("Sub", [total, "input_ids"], ["others"]),
            helper.make_node("Cast", ["others"], ["scale"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["scale", "column"], ["scales"]),
            helper.make_node("Mul", ["rows", "scales"], [output]),
        ]
    constants: Mapping[str, Any] = {
        "table": table,
        "zero": np.array(0, np.int64),
        "three": np.array(3, np.float32),
        "column": np.array([0, -1, 1], np.int64),
    }
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info(name, int_type, list(axes)) for name in inputs],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)
    (folder / "onnx").mkdir(parents=True)
    onnx.save(model, folder / "onnx" / "model.onnx")
    write_tokenizer(folder / "tokenizer.json")
    if modules:
        write_modules(folder)
    return table


def reference_vector(
    tensors: Mapping[str, Array],
    config: Mapping[str, Any],
    ids: npt.ArrayLike,
    pooling: str = "mean",
    normalize: bool = True,
) -> npt.NDArray[np.float64]:
    """Embed one token sequence [T] by the definition of BERT, in float64.

    Source: Devlin et al. 2018 and Vaswani et al. 2017, with the tensor names of transformers.
    """
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    tokens = np.asarray(ids)

    def dense(x: Any, name: str) -> Any:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        centred = x - x.mean(-1, keepdims=True)
        spread = np.sqrt((centred**2).mean(-1, keepdims=True) + config["layer_norm_eps"])
        return centred / spread * w[f"{name}.weight"] + w[f"{name}.bias"]

    erf = np.vectorize(math.erf)
    activations = {
        "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
        "relu": lambda x: np.maximum(x, 0),
    }
    h = w["embeddings.word_embeddings.weight"][tokens]
    h = h + w["embeddings.position_embeddings.weight"][: len(tokens)]
    h = norm(h + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    heads = config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        layer = f"encoder.layer.{i}."
        q, k, v = (
            np.split(dense(h, f"{layer}attention.self.{part}"), heads, axis=-1)
            for part in ("query", "key", "value")
        )
        mixed = []
        for qh, kh, vh in zip(q, k, v, strict=True):
            scores = np.exp(qh @ kh.T / math.sqrt(qh.shape[-1]))
            mixed.append(scores / scores.sum(-1, keepdims=True) @ vh)
        attended = dense(np.concatenate(mixed, -1), f"{layer}attention.output.dense")
        h = norm(h + attended, f"{layer}attention.output.LayerNorm")
        inner = activations[config["hidden_act"]](dense(h, f"{layer}intermediate.dense"))
        h = norm(h + dense(inner, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    vector = h[0] if pooling == "cls" else h.mean(0)
    return np.asarray(vector / np.linalg.norm(vector) if normalize else vector)
