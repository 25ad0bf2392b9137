"""The graph computes BERT, the same for padded and packed rows, in every runtime that reads it."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto
from tests.support.models import (
    TINY,
    real_model,
    reference_vector,
    tiny_model,
    write_foreign,
    write_json,
    write_safetensors,
    write_tiny,
)

from embedq.protocol.contract import Precision
from embedq_worker.engines.base import RaggedTokens, TokenBatch
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import CompileFailed, ModelError
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_padded
from embedq_worker.model.bert import build_graph, load_tensors
from embedq_worker.model.onnx_graph import adapt_onnx, describe_onnx
from embedq_worker.model.resolve import Kind, Model, load_model

#: Largest difference of a component that two ways of computing the same may show in f32.
TOLERANCE = 2e-5

Texts = Sequence[Sequence[int]]
Infer = Callable[[Model, TokenBatch], npt.NDArray[np.float32]]


def some_texts(vocab: int, lengths: Sequence[int] = (2, 9, 24, 3, 17)) -> Texts:
    """Draw token sequences of these lengths."""
    rng = np.random.default_rng(7)
    return [[int(i) for i in rng.integers(4, vocab, n)] for n in lengths]


def ragged(texts: Texts) -> RaggedTokens:
    """Put token sequences one after the other."""
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int64)
    ids = np.array([i for text in texts for i in text], np.int32)
    return RaggedTokens(ids, offsets, np.zeros(len(texts), np.uint32))


def packed(texts: Texts, width: int, segments: int) -> TokenBatch:
    """Put all texts into one row of this width, with unused segments and padding at the end."""
    ids, places, numbers = (np.zeros((1, width), np.int64) for _ in range(3))
    at = 0
    for number, text in enumerate(texts, start=1):
        stop = at + len(text)
        ids[0, at:stop] = text
        places[0, at:stop] = np.arange(len(text))
        numbers[0, at:stop] = number
        at = stop
    members = np.full((1, segments), -1, np.int64)
    members[0, : len(texts)] = np.arange(len(texts))
    return TokenBatch(ids, places, numbers, np.arange(1, segments + 1), members)


def infer(model: Model, batch: TokenBatch) -> npt.NDArray[np.float32]:
    """Run the graph of a model in onnxruntime, [B, S, D]."""
    engine = OnnxRuntimeEngine(model, threads=1)
    try:
        return engine.infer(batch)
    finally:
        engine.close()


def padded(texts: Texts) -> TokenBatch:
    """Give each text a row of its own."""
    return build_padded(ragged(texts), range(len(texts)), pad_id=0)


def openvino_vectors(model: Model, batch: TokenBatch) -> npt.NDArray[np.float32]:
    """Run the graph of a model on OpenVINO's CPU in f32, [B, S, D]."""
    pytest.importorskip("openvino")
    from embedq_worker.engines.openvino_cpu import OpenVinoCpuEngine

    engine = OpenVinoCpuEngine(model, Precision.F32, threads=1)
    try:
        return engine.infer(batch)
    finally:
        engine.close()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hidden_act", ["gelu", "relu"])
@pytest.mark.parametrize("run", [infer, openvino_vectors])
def test_graph_is_bert(
    tmp_path: Path, pooling: str, normalize: bool, hidden_act: str, run: Infer
) -> None:
    """Vectors are those of a forward pass written from the definition, one text at a time."""
    model = tiny_model(tmp_path, pooling=pooling, normalize=normalize, hidden_act=hidden_act)
    texts = some_texts(TINY["vocab_size"])

    vectors = run(model, padded(texts))[:, 0]

    tensors, config = load_tensors(model.weights), {**TINY, "hidden_act": hidden_act}
    for vector, text in zip(vectors, texts, strict=True):
        expected = reference_vector(tensors, config, text, pooling, normalize)
        assert np.abs(vector - expected).max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_row_gives_the_vectors_of_padded_rows(tmp_path: Path, pooling: str) -> None:
    """Five texts in one row do not see each other: same vectors, and unused segments are zero."""
    model = tiny_model(tmp_path, pooling=pooling)
    texts = some_texts(TINY["vocab_size"])

    apart = infer(model, padded(texts))[:, 0]
    together = infer(model, packed(texts, width=64, segments=8))[0]

    assert np.abs(together[: len(texts)] - apart).max() < TOLERANCE
    assert not together[len(texts) :].any()


def test_row_of_padding_is_finite(tmp_path: Path) -> None:
    """A row without any text gives zeros, not NaN."""
    model = tiny_model(tmp_path)

    vectors = infer(model, packed([], width=16, segments=4))

    assert not vectors.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 5e-3), ("BF16", 5e-2)])
def test_half_precision_weights_are_read(tmp_path: Path, dtype: str, tolerance: float) -> None:
    """Weights stored in 16 bits give nearly the vectors of those stored in 32."""
    texts = some_texts(TINY["vocab_size"])
    full = infer(tiny_model(tmp_path / "full"), padded(texts))

    half = infer(tiny_model(tmp_path / "half", dtype=dtype), padded(texts))

    assert np.abs(full - half).max() < tolerance


def test_prefix_of_a_larger_model_is_known(tmp_path: Path) -> None:
    """Tensors saved from a model with a head, named `bert.…`, are found."""
    model = tiny_model(tmp_path)
    texts = some_texts(TINY["vocab_size"])
    plain = infer(model, padded(texts))

    tensors = {f"bert.{name}": tensor for name, tensor in load_tensors(model.weights).items()}
    write_safetensors(tmp_path / "prefixed.safetensors", tensors)
    (tmp_path / "prefixed.safetensors").replace(model.weights)

    assert infer(model, padded(texts)).tobytes() == plain.tobytes()


def test_tensors_may_begin_at_any_byte(tmp_path: Path) -> None:
    """A file that another writer than the format's own library has not aligned gives the same."""
    model = tiny_model(tmp_path)
    texts = some_texts(TINY["vocab_size"])
    aligned = infer(model, padded(texts))

    raw = model.weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    parts = [(size + 1).to_bytes(8, "little"), raw[8 : 8 + size], b" ", raw[8 + size :]]
    model.weights.write_bytes(b"".join(parts))

    assert infer(model, padded(texts)).tobytes() == aligned.tobytes()


def test_message_is_valid_onnx(tmp_path: Path) -> None:
    """The checker of ONNX accepts the message; with what is left outside it has all weights."""
    graph = build_graph(tiny_model(tmp_path))

    proto = onnx.load_from_string(graph.with_weights_as_inputs())
    onnx.checker.check_model(proto, full_check=True)

    inputs = ["input_ids", "position_ids", "segment_ids", "segments"]
    assert [value.name for value in proto.graph.input] == [*inputs, *graph.weights]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_openvino_reads_the_same_graph(tmp_path: Path, pooling: str) -> None:
    """OpenVINO on the CPU in f32 agrees with onnxruntime, padded and packed."""
    model = tiny_model(tmp_path, pooling=pooling)
    texts = some_texts(TINY["vocab_size"])

    for batch in (padded(texts), packed(texts, width=64, segments=8)):
        assert np.abs(openvino_vectors(model, batch) - infer(model, batch)).max() < TOLERANCE


@pytest.mark.model
def test_openvino_agrees_on_the_real_weights() -> None:
    """With the real model, packed in OpenVINO equals padded in onnxruntime."""
    model = real_model()
    texts = some_texts(20_000, (5, 60, 31))

    theirs = openvino_vectors(model, packed(texts, width=128, segments=4))

    assert np.abs(theirs[0, :3] - infer(model, padded(texts))[:, 0]).max() < TOLERANCE


def test_missing_tensor_names_the_file(tmp_path: Path) -> None:
    """Weights without a tensor that config.json calls for are a ModelError."""
    model = tiny_model(tmp_path)
    tensors = write_tiny(tmp_path)
    del tensors["encoder.layer.1.output.dense.bias"]
    write_safetensors(tmp_path / "short.safetensors", tensors)
    (tmp_path / "short.safetensors").replace(model.weights)

    with pytest.raises(ModelError, match=r"model\.safetensors.*output\.dense\.bias is missing"):
        build_graph(model)


def test_wrong_shape_names_the_tensor(tmp_path: Path) -> None:
    """Weights of another size than config.json says are a ModelError."""
    model = tiny_model(tmp_path)
    write_tiny(tmp_path / "wide", intermediate_size=96)
    (tmp_path / "wide" / "model.safetensors").replace(model.weights)

    with pytest.raises(ModelError, match=r"intermediate\.dense\.weight has shape \[96, 32\]"):
        build_graph(model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-100],
        lambda raw: raw[:40],
        lambda raw: b"",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: raw[:8] + b"[]" + raw[10:],
        lambda raw: raw.replace(b'"shape"', b'"shade"', 1),
        lambda raw: raw.replace(b"[64, 32]", b"[1e9999]", 1),
        lambda raw: struct.pack("<Q", 5000) + b"[" * 5000 + raw,
    ],
)
def test_damaged_weights_name_the_file(tmp_path: Path, damage: Any) -> None:
    """A truncated or scribbled safetensors file is a ModelError, never a crash."""
    model = tiny_model(tmp_path)
    model.weights.write_bytes(damage(model.weights.read_bytes()))

    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable"):
        build_graph(model)


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize("int_type", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("run", [infer, openvino_vectors])
def test_foreign_model_is_masked_and_pooled(
    tmp_path: Path, opset: int, int_type: int, run: Infer
) -> None:
    """Vectors per token are averaged without padding and normalized, in any operator set."""
    table = write_foreign(tmp_path, opset=opset, int_type=int_type)
    model = load_model(tmp_path, "foreign", DigestCache(tmp_path))
    texts = some_texts(64, (2, 9, 5))

    vectors = run(model, padded(texts))[:, 0]

    assert (model.kind, model.dim, model.packable) == (Kind.ONNX, 8, False)
    for vector, text in zip(vectors, texts, strict=True):
        mean = table[list(text)].mean(0)
        assert np.abs(vector - mean / np.linalg.norm(mean)).max() < TOLERANCE


def test_pooled_output_is_taken_as_it_is(tmp_path: Path) -> None:
    """An output `sentence_embedding` [B, D] is neither pooled nor normalized again."""
    table = write_foreign(tmp_path, output="sentence_embedding")
    model = load_model(tmp_path, "foreign", DigestCache(tmp_path))
    texts = some_texts(64, (2, 9, 5))

    vectors = infer(model, padded(texts))

    assert vectors.shape == (3, 1, 8)
    for vector, text in zip(vectors[:, 0], texts, strict=True):
        assert np.abs(vector - 3 * table[text[0]]).max() < TOLERANCE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"inputs": ("input_ids", "pixels")}, "wants an input pixels"),
        ({"axes": (1, 128)}, "fixed axes"),
    ],
)
def test_foreign_model_we_cannot_serve_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    """Unknown inputs and fixed shapes are ModelErrors that name the file."""
    write_foreign(tmp_path, **options)

    with pytest.raises(ModelError, match=rf"model\.onnx.*{reason}"):
        adapt_onnx(tmp_path / "onnx" / "model.onnx", "mean", True)


@pytest.mark.parametrize("damaged", [b"", b"not a packed model"])
def test_damaged_copy_is_refused_and_not_replaced(tmp_path: Path, damaged: bytes) -> None:
    """Class int8 is never served with the plain graph because the quantized one is empty."""
    pytest.importorskip("openvino")
    from embedq_worker.engines.openvino_cpu import OpenVinoCpuEngine

    with pytest.raises(CompileFailed, match="no packed model"):
        OpenVinoCpuEngine(tiny_model(tmp_path), Precision.INT8, threads=1, quantized=damaged)


def test_first_layer_is_looked_up_where_the_table_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two layers one has its product of 96 columns; with a table over the bound both have."""
    model = tiny_model(tmp_path)

    def products() -> int:
        weights = build_graph(model, precompute_first_layer=True).weights.values()
        return sum(weight.shape == (32, 96) for weight in weights)

    assert products() == 1
    bytes_of_table = 4 * TINY["vocab_size"] * 96
    monkeypatch.setattr("embedq_worker.model.bert.MAX_TABLE_BYTES", bytes_of_table - 1)
    assert products() == 2


def test_gelu_is_the_exact_one(tmp_path: Path) -> None:
    """The activation uses erf; the tanh form would differ by more than the tolerance."""
    x = 2.0
    exact = x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    nodes = build_graph(tiny_model(tmp_path)).proto.graph.node
    gelus = [node for node in nodes if node.op_type == "Gelu"]

    assert abs(exact - tanh) > TOLERANCE
    assert len(gelus) == TINY["num_hidden_layers"]
    assert not any(node.attribute for node in gelus)


def test_open_size_of_a_foreign_model_comes_from_its_config(tmp_path: Path) -> None:
    """hidden_size in config.json fills in where the output does not say its size."""
    write_foreign(tmp_path, axes=("batch", "sequence"))
    path = tmp_path / "onnx" / "model.onnx"
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = "hidden"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="does not say how many components"):
        describe_onnx(path)

    write_json(tmp_path / "config.json", {"hidden_size": 8})

    assert describe_onnx(path) == (8, [])
