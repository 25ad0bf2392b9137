"""Tests of the graphs built from BERT weights and foreign ONNX models, in both runtimes."""

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
from embedq_worker.model.foreign_onnx import describe_onnx
from embedq_worker.model.graph import build_graph
from embedq_worker.model.resolve import Model, load_model
from embedq_worker.model.weights import load_tensors

#: Maximum difference of a component between two ways to compute the same vector in f32.
TOLERANCE = 2e-5

Texts = Sequence[Sequence[int]]
RunGraph = Callable[[Model, TokenBatch], npt.NDArray[np.float32]]


def random_texts(vocab: int, lengths: Sequence[int] = (2, 9, 24, 3, 17)) -> Texts:
    """Return random token sequences of these lengths."""
    rng = np.random.default_rng(7)
    return [[int(i) for i in rng.integers(4, vocab, n)] for n in lengths]


def ragged(texts: Texts) -> RaggedTokens:
    offsets = np.concatenate([[0], np.cumsum([len(t) for t in texts])]).astype(np.int64)
    ids = np.array([i for text in texts for i in text], np.int32)
    return RaggedTokens(ids, offsets, np.zeros(len(texts), np.uint32))


def packed_batch(texts: Texts, width: int, segments: int) -> TokenBatch:
    """Put all texts into one row of this width, followed by padding and unused segments."""
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


def onnxruntime_vectors(model: Model, batch: TokenBatch) -> npt.NDArray[np.float32]:
    """Run the graph of a model in onnxruntime, float32 [B, S, D]."""
    engine = OnnxRuntimeEngine(model, threads=1)
    try:
        return engine.infer(batch)
    finally:
        engine.close()


def padded_batch(texts: Texts) -> TokenBatch:
    """Put each text into a row of its own."""
    return build_padded(ragged(texts), range(len(texts)), pad_id=0)


def openvino_vectors(model: Model, batch: TokenBatch) -> npt.NDArray[np.float32]:
    """Run the graph of a model on OpenVINO's CPU in f32, float32 [B, S, D]."""
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
@pytest.mark.parametrize("run", [onnxruntime_vectors, openvino_vectors])
def test_vectors_equal_a_forward_pass_written_from_the_definition(
    tmp_path: Path, pooling: str, normalize: bool, hidden_act: str, run: RunGraph
) -> None:
    model = tiny_model(tmp_path, pooling=pooling, normalize=normalize, hidden_act=hidden_act)
    texts = random_texts(TINY["vocab_size"])

    vectors = run(model, padded_batch(texts))[:, 0]

    tensors, config = load_tensors(model.weights), {**TINY, "hidden_act": hidden_act}
    for vector, text in zip(vectors, texts, strict=True):
        expected = reference_vector(tensors, config, text, pooling, normalize)
        assert np.abs(vector - expected).max() < TOLERANCE


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_packed_row_has_the_vectors_of_padded_rows(tmp_path: Path, pooling: str) -> None:
    model = tiny_model(tmp_path, pooling=pooling)
    texts = random_texts(TINY["vocab_size"])

    apart = onnxruntime_vectors(model, padded_batch(texts))[:, 0]
    together = onnxruntime_vectors(model, packed_batch(texts, width=64, segments=8))[0]

    assert np.abs(together[: len(texts)] - apart).max() < TOLERANCE
    assert not together[len(texts) :].any()


def test_row_of_padding_gives_zeros(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)

    vectors = onnxruntime_vectors(model, packed_batch([], width=16, segments=4))

    assert not vectors.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [("F16", 5e-3), ("BF16", 5e-2)])
def test_16_bit_weights_give_nearly_the_same_vectors(
    tmp_path: Path, dtype: str, tolerance: float
) -> None:
    texts = random_texts(TINY["vocab_size"])
    full = onnxruntime_vectors(tiny_model(tmp_path / "full"), padded_batch(texts))

    half = onnxruntime_vectors(tiny_model(tmp_path / "half", dtype=dtype), padded_batch(texts))

    assert np.abs(full - half).max() < tolerance


def test_tensor_names_with_bert_prefix_are_found(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    texts = random_texts(TINY["vocab_size"])
    plain = onnxruntime_vectors(model, padded_batch(texts))

    tensors = {f"bert.{name}": tensor for name, tensor in load_tensors(model.weights).items()}
    write_safetensors(tmp_path / "prefixed.safetensors", tensors)
    (tmp_path / "prefixed.safetensors").replace(model.weights)

    assert onnxruntime_vectors(model, padded_batch(texts)).tobytes() == plain.tobytes()


def test_unaligned_tensors_give_the_same_vectors(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    texts = random_texts(TINY["vocab_size"])
    aligned = onnxruntime_vectors(model, padded_batch(texts))

    raw = model.weights.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    parts = [(size + 1).to_bytes(8, "little"), raw[8 : 8 + size], b" ", raw[8 + size :]]
    model.weights.write_bytes(b"".join(parts))

    assert onnxruntime_vectors(model, padded_batch(texts)).tobytes() == aligned.tobytes()


def test_graph_with_weights_as_inputs_is_valid_onnx(tmp_path: Path) -> None:
    graph = build_graph(tiny_model(tmp_path))

    proto = onnx.load_from_string(graph.with_weights_as_inputs())
    onnx.checker.check_model(proto, full_check=True)

    inputs = ["input_ids", "position_ids", "segment_ids", "segments"]
    assert [value.name for value in proto.graph.input] == [*inputs, *graph.weights]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_openvino_agrees_with_onnxruntime(tmp_path: Path, pooling: str) -> None:
    model = tiny_model(tmp_path, pooling=pooling)
    texts = random_texts(TINY["vocab_size"])

    for batch in (padded_batch(texts), packed_batch(texts, width=64, segments=8)):
        assert (
            np.abs(openvino_vectors(model, batch) - onnxruntime_vectors(model, batch)).max()
            < TOLERANCE
        )


@pytest.mark.model
def test_openvino_packed_agrees_with_onnxruntime_padded_on_the_real_model() -> None:
    model = real_model()
    texts = random_texts(20_000, (5, 60, 31))

    packed_vectors = openvino_vectors(model, packed_batch(texts, width=128, segments=4))

    assert (
        np.abs(packed_vectors[0, :3] - onnxruntime_vectors(model, padded_batch(texts))[:, 0]).max()
        < TOLERANCE
    )


def test_missing_tensor_is_refused_with_the_file_name(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    tensors = write_tiny(tmp_path)
    del tensors["encoder.layer.1.output.dense.bias"]
    write_safetensors(tmp_path / "short.safetensors", tensors)
    (tmp_path / "short.safetensors").replace(model.weights)

    with pytest.raises(ModelError, match=r"model\.safetensors.*output\.dense\.bias is missing"):
        build_graph(model)


def test_tensor_of_wrong_shape_is_refused_by_name(tmp_path: Path) -> None:
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
def test_damaged_weights_are_refused_with_the_file_name(tmp_path: Path, damage: Any) -> None:
    model = tiny_model(tmp_path)
    model.weights.write_bytes(damage(model.weights.read_bytes()))

    with pytest.raises(ModelError, match=r"model\.safetensors is not a readable"):
        build_graph(model)


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
@pytest.mark.parametrize("int_type", [TensorProto.INT64, TensorProto.INT32])
@pytest.mark.parametrize("run", [onnxruntime_vectors, openvino_vectors])
def test_foreign_model_is_pooled_without_padding_and_normalized(
    tmp_path: Path, opset: int, int_type: int, run: RunGraph
) -> None:
    table = write_foreign(tmp_path, opset=opset, int_type=int_type)
    model = load_model(tmp_path, "foreign", DigestCache(tmp_path))
    texts = random_texts(64, (2, 9, 5))

    vectors = run(model, padded_batch(texts))[:, 0]

    assert (model.dim, model.packable) == (8, False)
    for vector, text in zip(vectors, texts, strict=True):
        mean = table[list(text)].mean(0)
        assert np.abs(vector - mean / np.linalg.norm(mean)).max() < TOLERANCE


@pytest.mark.parametrize("normalized", [False, True])
def test_pooled_output_is_normalized_only_where_modules_json_asks_for_it(
    tmp_path: Path, normalized: bool
) -> None:
    table = write_foreign(tmp_path, output="sentence_embedding", modules=normalized)
    model = load_model(tmp_path, "foreign", DigestCache(tmp_path))
    texts = random_texts(64, (2, 9, 5))

    vectors = onnxruntime_vectors(model, padded_batch(texts))

    assert (vectors.shape, model.normalize) == ((3, 1, 8), normalized)
    for vector, text in zip(vectors[:, 0], texts, strict=True):
        expected = 3 * table[text[0]]
        if normalized:
            expected = expected / np.linalg.norm(expected)
        assert np.abs(vector - expected).max() < TOLERANCE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"inputs": ("input_ids", "pixels")}, "needs an input pixels"),
        ({"axes": (1, 128)}, "fixed axes"),
    ],
)
def test_foreign_model_with_unknown_inputs_or_fixed_axes_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    write_foreign(tmp_path, **options)

    with pytest.raises(ModelError, match=rf"model\.onnx.*{reason}"):
        build_graph(load_model(tmp_path, "foreign", DigestCache(tmp_path)))


@pytest.mark.parametrize("damaged", [b"", b"not a packed model"])
def test_damaged_quantized_model_is_refused(tmp_path: Path, damaged: bytes) -> None:
    pytest.importorskip("openvino")
    from embedq_worker.engines.openvino_cpu import OpenVinoCpuEngine

    with pytest.raises(CompileFailed, match="not a model packed"):
        OpenVinoCpuEngine(tiny_model(tmp_path), Precision.INT8, threads=1, quantized=damaged)


def test_gelu_is_the_erf_form(tmp_path: Path) -> None:
    x = 2.0
    exact = x * 0.5 * (1 + math.erf(x / math.sqrt(2)))
    tanh = 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    nodes = build_graph(tiny_model(tmp_path)).proto.graph.node
    gelus = [node for node in nodes if node.op_type == "Gelu"]

    assert abs(exact - tanh) > TOLERANCE
    assert len(gelus) == TINY["num_hidden_layers"]
    assert not any(node.attribute for node in gelus)


def test_unknown_dimension_of_a_foreign_model_is_read_from_config_json(tmp_path: Path) -> None:
    write_foreign(tmp_path, axes=("batch", "sequence"))
    path = tmp_path / "onnx" / "model.onnx"
    proto = onnx.load(path)
    proto.graph.output[0].type.tensor_type.shape.dim[-1].dim_param = "hidden"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match="the number of components of a vector"):
        describe_onnx(path, tmp_path)

    write_json(tmp_path / "config.json", {"hidden_size": 8})

    found = describe_onnx(path, tmp_path)
    assert (found.size, found.pooled, found.files) == (8, False, ())
