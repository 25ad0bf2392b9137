"""Tests of foreign ONNX encoders: what their files say, what is served and what is refused."""

from __future__ import annotations

import contextlib
import random
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.foreign import (
    DENSE,
    TABLE,
    Array,
    cast_rows,
    encoder,
    folder_with,
    half,
    typed,
)
from tests.support.models import write_json, write_modules
from tests.unit.embedq_worker.model.test_graph import (
    TOLERANCE,
    RunGraph,
    onnxruntime_vectors,
    openvino_vectors,
    padded_batch,
    random_texts,
)

from embedq.protocol.contract import Precision
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.errors import EngineError, ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model.config import ModelChoices, ModelConfig
from embedq_worker.model.foreign_onnx import adapt_onnx, describe_onnx
from embedq_worker.model.graph import build_graph
from embedq_worker.model.modules import Module
from embedq_worker.model.resolve import Model, load_model

TEXTS = random_texts(64, (2, 9, 5))

MEAN = ModelConfig(
    pooling="mean",
    include_prompt=True,
    modules=(Module("Normalize"),),
    max_length=24,
    longest=24,
    prompts={},
    default_prompt="",
)


def load(folder: Path) -> Model:
    return load_model(folder, "foreign", DigestCache(folder / "cache"))


def store_outside(folder: Path, name: str = "model.onnx_data") -> Path:
    """Move the large constants of model.onnx into a file, and return its path."""
    path = folder / "model.onnx"
    proto = onnx.load(path)
    onnx.save(proto, path, save_as_external_data=True, location=name, size_threshold=64)
    return folder / name


def edit_external(folder: Path, key: str, value: str) -> None:
    """Change where model.onnx says that the table is."""
    path = folder / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    table = next(tensor for tensor in proto.graph.initializer if tensor.name == "table")
    for entry in table.external_data:
        entry.value = value if entry.key == key else entry.value
    path.write_bytes(proto.SerializeToString())


def means(table: Array = TABLE) -> Array:
    """Return the average of the token vectors of each text."""
    return np.stack([table.astype(np.float32)[list(text)].mean(0) for text in TEXTS])


def unit(vectors: Array) -> Array:
    lengths: Array = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / lengths


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("run", [onnxruntime_vectors, openvino_vectors])
def test_pooled_vectors_are_normalized_only_where_the_files_ask_for_it(
    tmp_path: Path, normalize: bool, run: RunGraph
) -> None:
    folder = folder_with(tmp_path, encoder([("sentence_embedding", ("b", 32))]))
    write_modules(folder, normalize=normalize)
    model = load(folder)

    vectors = run(model, padded_batch(TEXTS))[:, 0]

    expected = unit(means()) if normalize else 3 * means()
    assert model.normalize == normalize
    assert np.abs(vectors - expected).max() < TOLERANCE


def test_pooled_vectors_of_a_folder_that_asks_for_nothing_are_announced_as_not_normalized(
    tmp_path: Path,
) -> None:
    folder = folder_with(tmp_path, encoder([("sentence_embedding", ("b", 32))]))
    (folder / "modules.json").unlink()

    assert not load(folder).model_info().normalized


BOTH = (("sentence_embedding", ("b", 48)), ("last_hidden_state", ("b", "t", 32)))


def test_projected_output_has_its_own_number_of_components(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, encoder(BOTH), hidden_size=32)
    (folder / "modules.json").unlink()
    model = load(folder)

    vectors = onnxruntime_vectors(model, padded_batch(TEXTS))[:, 0]

    assert (model.dim, model.output, model.pooling) == (48, "sentence_embedding", "onnx")
    assert np.abs(vectors - 3 * means() @ DENSE).max() < 10 * TOLERANCE


def test_token_vectors_are_preferred_where_the_files_or_the_user_say_how_to_pool(
    tmp_path: Path,
) -> None:
    # sentence-transformers reads last_hidden_state only.
    folder = folder_with(tmp_path, encoder(BOTH), hidden_size=32)
    declared = load(folder)
    (folder / "modules.json").unlink()
    chosen = load_model(folder, "m", DigestCache(folder), ModelChoices(pooling="mean"))

    for model in (declared, chosen):
        vectors = onnxruntime_vectors(model, padded_batch(TEXTS))[:, 0]

        assert (model.dim, model.output, model.pooling) == (32, "last_hidden_state", "mean")
        assert np.abs(vectors - unit(means())).max() < TOLERANCE


def test_pooling_that_a_pooled_output_cannot_have_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, encoder([("sentence_embedding", ("b", 32))]))
    pooling = {"pooling_mode": "mean", "include_prompt": False}
    write_json(folder / "1_Pooling" / "config.json", pooling)

    with pytest.raises(ModelError, match="excludes prompts from pooling"):
        load(folder)
    with pytest.raises(ModelError, match=r"EMBEDQ_POOLING is cls.*pooled vectors only"):
        load_model(folder, "m", DigestCache(folder), ModelChoices(pooling="cls"))


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        ({"model_type": "bert", "max_position_embeddings": 40}, 40),
        ({"model_type": "xlm-roberta", "max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ({"model_type": "roberta", "max_position_embeddings": 40}, 38),
        ({"model_type": "mpnet", "max_position_embeddings": 40, "pad_token_id": 1}, 38),
        ({"model_type": "t5"}, 512),
    ],
)
def test_length_is_that_of_the_positions_behind_the_padding(
    tmp_path: Path, config: dict[str, Any], longest: int
) -> None:
    folder = folder_with(tmp_path, encoder(), **config)

    assert load(folder).max_length == longest


@pytest.mark.parametrize(
    ("outputs", "taken", "pooled"),
    [
        ([("token_embeddings", ("b", "t", 32))], "token_embeddings", False),
        (
            [("pooler_output", ("b", 32)), ("last_hidden_state", ("b", "t", 32))],
            "last_hidden_state",
            False,
        ),
        ([("1234", ("b", "t", 32)), ("1235", ("b", 32))], "1234", False),
        ([("1235", ("b", 32))], "1235", True),
        (
            [("logits", ("b", 2)), ("last_hidden_state", ("b", "t", "hidden"))],
            "last_hidden_state",
            False,
        ),
    ],
)
def test_output_with_vectors_is_taken(
    tmp_path: Path, outputs: list[Any], taken: str, pooled: bool
) -> None:
    folder = folder_with(tmp_path, encoder(outputs), hidden_size=32)

    found = describe_onnx(folder / "model.onnx", folder)

    assert (found.output, found.pooled, found.size) == (taken, pooled, 32)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ([("logits", ("b", 2))], r"logits \[b, 2\].*last_hidden_state"),
        ([("logits", ("b", "t", 64))], r"logits \[b, t, 64\].*last_hidden_state"),
        ([("logits", ("b", 32))], r"logits \[b, 32\]"),
        ([("pooler_output", ("b", 32))], "pooler_output"),
        ([("scores", ("b", "t", 64))], r"scores \[b, t, 64\]"),
        ([("scores", ("b", "t", "v"))], r"scores \[b, t, v\]"),
        ([("h0", ("b", "t", 32)), ("h1", ("b", "t", 32))], "h0 .*, h1 "),
        ([("last_hidden_state", ("b", "t", 64))], "64 components.*hidden_size 32"),
    ],
)
def test_output_of_a_head_or_of_another_size_is_refused_by_name(
    tmp_path: Path, outputs: list[Any], reason: str
) -> None:
    folder = folder_with(tmp_path, encoder(outputs), hidden_size=32)

    with pytest.raises(ModelError, match=rf"model\.onnx.*{reason}"):
        describe_onnx(folder / "model.onnx", folder)


def test_unknown_output_without_a_hidden_size_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, encoder([("1234", ("b", "t", 32))]))

    with pytest.raises(ModelError, match=r"no output .* 1234 \[b, t, 32\]"):
        describe_onnx(folder / "model.onnx", folder)


@pytest.mark.parametrize("int_type", [TensorProto.INT64, TensorProto.INT32])
def test_bare_encoder_has_the_means_of_its_token_vectors(tmp_path: Path, int_type: int) -> None:
    inputs = [(name, int_type, ("b", "t")) for name in ("input_ids", "attention_mask")]
    model = load(folder_with(tmp_path, encoder(inputs=inputs)))

    vectors = onnxruntime_vectors(model, padded_batch(TEXTS))[:, 0]

    assert np.abs(vectors - unit(means())).max() < TOLERANCE


IDS = ("input_ids", TensorProto.INT64, ("b", "t"))
MASK = ("attention_mask", TensorProto.INT64, ("b", "t"))


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (
            [IDS, MASK, ("past_key_values.0.key", TensorProto.FLOAT, ("b", 2, "p", 4))],
            r"input past_key_values\.0\.key.*without past",
        ),
        ([IDS, MASK, ("task_id", TensorProto.INT64, ())], "input task_id"),
        ([IDS, MASK, ("position_ids", TensorProto.INT64, ("b", "t"))], "position_ids, and a mpnet"),
        ([IDS, ("attention_mask", TensorProto.INT64, (1, 128))], "fixed axes"),
        ([IDS, ("attention_mask", TensorProto.INT64, ("b", "h", "t", "t"))], "4 axes"),
        ([("input_ids", TensorProto.STRING, ("b", "t")), MASK], "type STRING"),
        ([("input_ids", TensorProto.INT64, ("b", "t"))], "no input attention_mask"),
        ([MASK], "no input input_ids"),
    ],
)
def test_input_that_embedq_does_not_have_is_refused_by_name(
    tmp_path: Path, inputs: list[Any], reason: str
) -> None:
    folder = folder_with(tmp_path, encoder(inputs=inputs), model_type="mpnet")

    with pytest.raises(ModelError, match=rf"model\.onnx.*{reason}"):
        describe_onnx(folder / "model.onnx", folder)


def test_past_with_a_default_is_not_an_input(tmp_path: Path) -> None:
    past = ("past_key_values.0.key", TensorProto.FLOAT, (1, 2))
    default = helper.make_tensor(past[0], TensorProto.FLOAT, (1, 2), [0, 0])
    folder = folder_with(tmp_path, encoder(inputs=[IDS, MASK, past], constants=[default]))

    vectors = onnxruntime_vectors(load(folder), padded_batch(TEXTS))[:, 0]

    assert np.abs(vectors - unit(means())).max() < TOLERANCE


def quantized_table() -> dict[str, Any]:
    """Return the options of an encoder whose table DequantizeLinear scales."""
    scale = float(np.abs(TABLE).max() / 127)
    nodes = [
        helper.make_node("DequantizeLinear", ["stored", "scale"], ["whole"]),
        helper.make_node("Gather", ["whole", "input_ids"], ["rows"]),
    ]
    stored = typed(np.round(TABLE / scale).astype(np.int8), TensorProto.INT8)
    constants = [stored, helper.make_tensor("scale", TensorProto.FLOAT, (), [scale])]
    return {"nodes": nodes, "constants": constants}


def cast_through_half() -> dict[str, Any]:
    """Return the options of an encoder with f32 weights that computes in f16."""
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["full"]),
        helper.make_node("Cast", ["full"], ["low"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["low"], ["rows"], to=TensorProto.FLOAT),
    ]
    return {"nodes": nodes}


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, Precision.F32),
        (half(TensorProto.FLOAT16), Precision.F16),
        (half(TensorProto.BFLOAT16), Precision.BF16),
        (cast_through_half(), Precision.F16),
        (quantized_table(), Precision.INT8),
        (
            {
                "nodes": cast_rows(TensorProto.INT8),
                "constants": [typed(np.round(TABLE * 9).astype(np.int8), TensorProto.INT8)],
            },
            Precision.INT8,
        ),
        # A short constant of 16 bits says nothing about the weights.
        ({"constants": [helper.make_tensor("one", TensorProto.FLOAT16, (1,), [1])]}, Precision.F32),
    ],
)
def test_engine_reports_how_the_weights_are_stored(
    tmp_path: Path, options: dict[str, Any], precision: Precision
) -> None:
    model = load(folder_with(tmp_path, encoder(**options)))

    engine = OnnxRuntimeEngine(model, threads=1)
    engine.close()

    assert model.weights_precision == engine.precision == precision
    assert model.model_info().weights_precision == precision


def test_model_quantized_by_onnxruntime_is_int8(tmp_path: Path) -> None:
    # Its MatMul becomes DynamicQuantizeLinear and MatMulInteger.
    quantization = pytest.importorskip("onnxruntime.quantization")
    whole = folder_with(tmp_path / "f32", encoder([("sentence_embedding", ("b", 48))]))
    folder = folder_with(tmp_path / "int8", b"")

    quantization.quantize_dynamic(whole / "model.onnx", folder / "model.onnx")

    assert describe_onnx(whole / "model.onnx", whole).precision is Precision.F32
    assert describe_onnx(folder / "model.onnx", folder).precision is Precision.INT8


def test_node_of_onnxruntime_that_is_quantized_is_int8(tmp_path: Path) -> None:
    proto = encoder()
    proto.graph.node.append(
        helper.make_node("MatMulNBits", ["a", "b"], ["c"], "n", domain="com.microsoft")
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    folder = folder_with(tmp_path, proto)

    assert describe_onnx(folder / "model.onnx", folder).precision is Precision.INT8


@pytest.mark.parametrize(
    ("data_type", "tolerance"),
    [
        (TensorProto.FLOAT, TOLERANCE),
        (TensorProto.DOUBLE, TOLERANCE),
        (TensorProto.FLOAT16, 1e-3),
        (TensorProto.BFLOAT16, 1e-2),
        (TensorProto.INT8, 2e-2),
        (TensorProto.UINT8, 2e-2),
        (TensorProto.INT64, 2e-2),
    ],
)
@pytest.mark.parametrize("run", [onnxruntime_vectors, openvino_vectors])
def test_external_weights_of_every_type_are_mapped(
    tmp_path: Path, data_type: int, tolerance: float, run: RunGraph
) -> None:
    # Integers hold 30 times the weights, without the sign where they have none.
    is_int = data_type in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT64)
    table = np.abs(TABLE) if data_type == TensorProto.UINT8 else TABLE
    stored = typed(np.round(30 * table) if is_int else table, data_type)
    proto = encoder(nodes=cast_rows(data_type), constants=[stored])
    folder = folder_with(tmp_path, proto)
    store_outside(folder)
    model = load(folder)

    vectors = run(model, padded_batch(TEXTS))[:, 0]

    assert np.abs(vectors - unit(means(table))).max() < tolerance
    assert "model/stored" in build_graph(model).weights
    assert build_graph(model).proto.ByteSize() < 4_000


@pytest.mark.parametrize("run", [onnxruntime_vectors, openvino_vectors])
def test_weights_of_a_head_are_not_loaded(tmp_path: Path, run: RunGraph) -> None:
    outputs = [("last_hidden_state", ("b", "t", 32)), ("logits", ("b", 48))]
    folder = folder_with(tmp_path, encoder(outputs))
    store_outside(folder)
    model = load(folder)

    vectors = run(model, padded_batch(TEXTS))[:, 0]

    assert set(build_graph(model).weights) == {"model/table"}
    assert np.abs(vectors - unit(means())).max() < TOLERANCE


def test_inner_graphs_see_the_weights_outside(tmp_path: Path) -> None:
    def branch(name: str, node: onnx.NodeProto) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, ("b", "t", 32))
        return helper.make_graph([node], name, [], [value])

    nodes = [
        helper.make_node(
            "If",
            ["yes"],
            ["rows"],
            then_branch=branch("a", helper.make_node("Gather", ["table", "input_ids"], ["a"])),
            else_branch=branch("b", helper.make_node("Gather", ["other", "input_ids"], ["b"])),
        )
    ]
    constants = [
        helper.make_tensor("yes", TensorProto.BOOL, (), [True]),
        numpy_helper.from_array(-TABLE, "other"),
    ]
    folder = folder_with(tmp_path, encoder(nodes=nodes, constants=constants))
    store_outside(folder)
    model = load(folder)

    vectors = onnxruntime_vectors(model, padded_batch(TEXTS))[:, 0]

    assert np.abs(vectors - unit(means())).max() < TOLERANCE


def test_external_weights_are_not_copied(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, encoder([("sentence_embedding", ("b", 48))]))
    store_outside(folder)

    weights = adapt_onnx(folder / "model.onnx", folder, MEAN, 48).weights

    assert set(weights) == {"model/table", "model/dense"}
    assert not any(weight.flags.owndata for weight in weights.values())
    assert weights["model/table"].tobytes() == TABLE.tobytes()


def test_unaligned_external_weights_give_the_same_vectors(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, encoder())
    data = store_outside(folder)
    path = folder / "model.onnx"
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "offset":
                entry.value = str(int(entry.value) + 3)
    path.write_bytes(proto.SerializeToString())
    data.write_bytes(b"odd" + data.read_bytes())

    vectors = onnxruntime_vectors(load(folder), padded_batch(TEXTS))[:, 0]

    assert np.abs(vectors - unit(means())).max() < TOLERANCE


def test_external_weights_behind_a_link_are_read(tmp_path: Path) -> None:
    # The hub's cache links every file of a snapshot to its content.
    folder = folder_with(tmp_path / "snapshot", encoder())
    data = store_outside(folder)
    data.rename(tmp_path / "blob")
    data.symlink_to(tmp_path / "blob")

    vectors = onnxruntime_vectors(load(folder), padded_batch(TEXTS))[:, 0]

    assert np.abs(vectors - unit(means())).max() < TOLERANCE


@pytest.mark.parametrize("run", [onnxruntime_vectors, openvino_vectors])
def test_external_weights_in_two_folders_are_read(tmp_path: Path, run: RunGraph) -> None:
    folder = folder_with(tmp_path, encoder([("sentence_embedding", ("b", 48))]))
    data = store_outside(folder)
    (folder / "parts").mkdir()
    (folder / "parts" / "table.bin").write_bytes(TABLE.tobytes())
    edit_external(folder, "offset", "0")
    edit_external(folder, "location", "parts/table.bin")
    model = load(folder)

    vectors = run(model, padded_batch(TEXTS))[:, 0]

    assert describe_onnx(folder / "model.onnx", folder).files == (
        data,
        folder / "parts" / "table.bin",
    )
    assert np.abs(vectors - unit(means() @ DENSE)).max() < TOLERANCE


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("location", "../weights.bin", "outside its folder"),
        ("location", "/dev/zero", "outside its folder"),
        ("location", "", "outside its folder"),
        ("location", "absent.bin", r"absent\.bin is missing"),
        ("offset", "999999999", "constant table has 8,192 bytes"),
        ("offset", "-8", "constant table has 8,192 bytes"),
        ("offset", "none", "constant table has 8,192 bytes"),
        ("length", "8191", r"constant table has 8,192 bytes.*\+8191"),
        ("length", "99999999999999999999", "constant table has 8,192 bytes"),
    ],
)
def test_external_weights_that_are_not_in_their_file_are_refused(
    tmp_path: Path, key: str, value: str, reason: str
) -> None:
    folder = folder_with(tmp_path, encoder())
    store_outside(folder)
    edit_external(folder, key, value)

    with pytest.raises(ModelError, match=reason):
        load(folder)
    with pytest.raises(ModelError, match=reason):
        adapt_onnx(folder / "model.onnx", folder, MEAN, 48)


def cut(data: Path) -> None:
    """Cut the file in half."""
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])


def link_to_a_device(data: Path) -> None:
    """Replace the file by a link to a device."""
    data.unlink()
    data.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "damage", [cut, link_to_a_device, Path.unlink, lambda p: p.write_bytes(b"")]
)
def test_damaged_file_of_external_weights_is_refused(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = folder_with(tmp_path, encoder())
    damage(store_outside(folder))

    with pytest.raises(ModelError, match=r"model\.onnx_data.*again\.$"):
        load(folder)


def zip_file(folder: Path) -> bytes:
    """Return a zip archive."""
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("data.pkl", b"x" * 1000)
    return (folder / "a.zip").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda folder: b"",
        lambda folder: b"<!DOCTYPE html><html><body>Not Found</body></html>",
        lambda folder: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        lambda folder: bytes(4096),
        zip_file,
        lambda folder: encoder().SerializeToString()[:-100],
        lambda folder: encoder().SerializeToString()[:5_000],
        lambda folder: encoder().SerializeToString()[:3],
        lambda folder: helper.make_tensor("a", 1, (2,), [1, 2]).SerializeToString(),
    ],
)
def test_file_of_another_kind_is_refused(tmp_path: Path, content: Callable[[Path], bytes]) -> None:
    folder = folder_with(tmp_path, content(tmp_path))

    with pytest.raises(ModelError, match=r"model\.onnx is not .*\.$") as caught:
        load(folder)

    assert "\n" not in str(caught.value)


def test_constant_of_another_size_than_its_shape_is_refused(tmp_path: Path) -> None:
    table = numpy_helper.from_array(TABLE, "table")
    table.dims[0] = 10**15

    with pytest.raises(ModelError, match=r"constant table has 8,192 bytes for shape"):
        load(folder_with(tmp_path, encoder(table=table)))


@pytest.mark.parametrize("data_type", [0, 99])
def test_constant_of_an_unknown_type_is_refused(tmp_path: Path, data_type: int) -> None:
    table = numpy_helper.from_array(TABLE, "table")
    table.data_type = data_type

    with pytest.raises(ModelError, match="constant table has an unknown type"):
        load(folder_with(tmp_path, encoder(table=table)))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"opset": 9}, "has operator set 9; embedq reads 11 to"),
        ({"opset": 999}, "has operator set 999; embedq reads 11 to"),
        ({"ir_version": 999}, "has version 999 of the ONNX format"),
    ],
)
def test_version_that_is_too_old_or_too_new_is_refused(
    tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelError, match=reason):
        load(folder_with(tmp_path, encoder(**options)))


def test_message_of_two_gib_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, b"")
    with (folder / "model.onnx").open("r+b") as file:
        file.truncate(2**31)

    with pytest.raises(ModelError, match=r"2,147,483,648 bytes.*external data"):
        load(folder)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_never_raise_another_error(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    raw = bytearray(encoder().SerializeToString())
    for _ in range(4):
        # The message begins and ends with its structure; the weights lie between.
        at = rng.choice([rng.randrange(600), rng.randrange(len(raw) - 600, len(raw))])
        raw[at] = rng.randrange(256)
    folder = folder_with(tmp_path, bytes(raw))

    with contextlib.suppress(ModelError, EngineError):  # either is an answer
        OnnxRuntimeEngine(load(folder), threads=1).close()


def test_engine_precision_is_the_less_precise_of_arithmetic_and_weights(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    from embedq_worker.engines.openvino_cpu import OpenVinoCpuEngine

    model = load(folder_with(tmp_path, encoder(**half(TensorProto.FLOAT16))))

    engine = OpenVinoCpuEngine(model, Precision.F32, threads=1)
    engine.close()

    assert engine.precision is Precision.F16
    assert replace(model, weights_precision=Precision.F32).model_info().weights_precision == "f32"
