"""Small foreign ONNX encoders for tests, whose vectors numpy computes from the same table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.support.models import write_json, write_modules, write_tokenizer

Array = npt.NDArray[Any]

#: Token embeddings [V, D], and the weight of a Dense layer [D, E].
TABLE = np.random.default_rng(3).normal(size=(64, 32)).astype(np.float32)
DENSE = np.random.default_rng(4).normal(size=(32, 48)).astype(np.float32)


def encoder(
    outputs: Sequence[tuple[str, Sequence[Any]]] = (("last_hidden_state", ("b", "t", 32)),),
    *,
    table: TensorProto | None = None,
    nodes: Sequence[onnx.NodeProto] = (),
    inputs: Sequence[tuple[str, int, Sequence[Any]]] = (
        ("input_ids", TensorProto.INT64, ("b", "t")),
        ("attention_mask", TensorProto.INT64, ("b", "t")),
    ),
    constants: Sequence[TensorProto] = (),
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """Build an encoder whose token vectors `rows` are those of TABLE.

    Every output is the average of `rows` over the tokens, times 3, if it has two axes (times DENSE
    if the last has 48), and `rows` if it has three.
    """
    table = table or numpy_helper.from_array(TABLE, "table")
    steps = list(nodes) or [helper.make_node("Gather", ["table", "input_ids"], ["rows"])]
    steps += [
        helper.make_node("Unsqueeze", ["attention_mask", "last"], ["column"]),
        helper.make_node("Cast", ["column"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "real"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["real", "middle"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Mul", ["mean", "three"], ["pooled"]),
        helper.make_node("MatMul", ["pooled", "dense"], ["projected"]),
    ]
    for name, axes in outputs:
        source = "rows" if len(axes) == 3 else "projected" if axes[-1] == 48 else "pooled"
        steps.append(helper.make_node("Identity", [source], [name]))
    weights: dict[str, Array] = {
        "last": np.array([-1], np.int64),
        "middle": np.array([1], np.int64),
        "three": np.array(3, np.float32),
        "dense": DENSE,
    }
    graph = helper.make_graph(
        steps,
        "encoder",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in outputs],
        [table, *constants, *(numpy_helper.from_array(v, name) for name, v in weights.items())],
    )
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


def folder_with(tmp_path: Path, proto: onnx.ModelProto | bytes, **config: Any) -> Path:
    """Write a model folder with model.onnx, modules.json, and config.json if it has content."""
    tmp_path.mkdir(exist_ok=True)
    write_tokenizer(tmp_path / "tokenizer.json")
    raw = proto if isinstance(proto, bytes) else proto.SerializeToString()
    (tmp_path / "model.onnx").write_bytes(raw)
    write_modules(tmp_path)
    if config:
        write_json(tmp_path / "config.json", config)
    return tmp_path


def typed(array: Array, data_type: int) -> TensorProto:
    """Return the table as a constant of an element type, some of which numpy lacks."""
    raw = array.astype(helper.tensor_dtype_to_np_dtype(data_type)).tobytes()
    return helper.make_tensor("stored", data_type, array.shape, raw, raw=True)


def cast_rows(data_type: int) -> list[onnx.NodeProto]:
    """Return nodes that gather from `stored`, a constant of another type, and cast to float."""
    return [
        helper.make_node("Gather", ["stored", "input_ids"], ["raw"]),
        helper.make_node("Cast", ["raw"], ["rows"], to=TensorProto.FLOAT),
    ]


def half(data_type: int) -> dict[str, Any]:
    """Return the options of an encoder whose table is of a 16-bit type."""
    return {"nodes": cast_rows(data_type), "constants": [typed(TABLE, data_type)]}
