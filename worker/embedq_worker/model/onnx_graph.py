"""Builds ONNX graphs, and adapts foreign ONNX encoders to the interface that all engines use.

Inputs, int64: ``input_ids``, ``position_ids``, ``segment_ids`` [B, T] (0 is padding, 1.. number the
texts of a row) and ``segments`` [S] (1..S). Output: ``vectors`` float32 [B, S, D].
A foreign encoder supports one text per row: S is 1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, compose, external_data_helper, helper, numpy_helper, shape_inference

from embedq_worker.errors import ModelError
from embedq_worker.model.config import load_json

#: Minimum divisor of a vector: empty segments stay zero. It is not zero in fp16.
MIN_NORM: Final = 1e-4

#: Minimum size of a constant that is stored outside the protobuf message, bytes.
MIN_EXTERNAL_BYTES: Final = 1024

#: Oldest operator set that has the operators of `pool`.
MIN_OPSET: Final = 11

#: Output of a model that pools by itself, as sentence-transformers and optimum name it.
POOLED: Final = "sentence_embedding"

_PREFIX = "model/"


@dataclass(frozen=True, slots=True, weakref_slot=True)
class OnnxModel:
    """An ONNX graph with the interface of this module.

    Attributes:
        proto: the message; its large constants are declared without data.
        weights: those constants by name. Outside the message they are not copied when it is
            serialized and parsed, which makes a start faster and its memory peak lower.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, npt.NDArray[np.float32]]

    def with_weights_as_inputs(self) -> bytes:
        """Serialize with each weight as an input of its name, which the caller replaces."""
        copied = onnx.ModelProto()
        copied.CopyFrom(self.proto)
        graph = copied.graph
        inside = [tensor for tensor in graph.initializer if tensor.name not in self.weights]
        del graph.initializer[:]
        graph.initializer.extend(inside)
        graph.input.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape)
            for name, weight in self.weights.items()
        )
        return bytes(copied.SerializeToString())


class OnnxBuilder:
    """Collects nodes and weights; its methods return the name of the value that they add."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: dict[str, npt.NDArray[np.float32]] = {}
        self._number = itertools.count()

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{kind}_{next(self._number)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        name = f"c{next(self._number)}"
        # Runtimes read the array in place. "W" copies a mapped one: it may be unaligned, and a
        # change of its file must not change vectors.
        array = np.require(value, dtype, ["C", "ALIGNED", "W"])
        if array.nbytes < MIN_EXTERNAL_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        self.weights[name] = array
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights")
        self.initializers.append(tensor)
        return name

    def reshape(self, value: str, *shape: int, out: str = "") -> str:
        return self.op("Reshape", value, self.constant(shape, np.int64), out=out)

    def reduce(self, kind: str, value: str, moved: int) -> str:
        """Reduce the last axis; `moved` is the operator set in which axes became an input."""
        if self.opset >= moved:
            return self.op(kind, value, self.constant([-1], np.int64), keepdims=1)
        return self.op(kind, value, axes=[-1], keepdims=1)

    def graph(self, dim: int) -> OnnxModel:
        """Return the collected nodes as a graph whose vectors have `dim` components."""
        inputs, outputs = _interface(dim)
        graph = helper.make_graph(self.nodes, "embedq", inputs, outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        return OnnxModel(helper.make_model_gen_version(graph, opset_imports=imports), self.weights)


def pool(g: OnnxBuilder, hidden: str, pooling: str, normalize: bool) -> None:
    """Pool token vectors into one vector per segment, [B, T, D] -> ``vectors`` [B, S, D].

    A matrix [B, S, T] with the weight of each token in each segment is multiplied by them.
    """
    numbers = g.reshape("segments", 1, -1, 1)
    member = g.op("Equal", numbers, g.reshape("segment_ids", 0, 1, -1))  # [B, S, T]
    if pooling == "cls":
        first = g.op("Equal", g.reshape("position_ids", 0, 1, -1), g.constant(0, np.int64))
        member = g.op("And", member, first)
    weight = g.op("Cast", member, to=TensorProto.FLOAT)
    if pooling == "mean":
        # Divided before the product: fp16 represents a sum of 512 token vectors badly.
        count = g.op("Max", g.reduce("ReduceSum", weight, 13), g.constant(1.0))
        weight = g.op("Div", weight, count)
    vectors = g.op("MatMul", weight, hidden)
    if normalize:
        length = g.op("Max", g.reduce("ReduceL2", vectors, 18), g.constant(MIN_NORM))
        g.op("Div", vectors, length, out="vectors")
    else:
        g.op("Identity", vectors, out="vectors")


def _interface(dim: int) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    declare = helper.make_tensor_value_info
    names = ("input_ids", "position_ids", "segment_ids")
    inputs = [declare(name, TensorProto.INT64, ["B", "T"]) for name in names]
    inputs.append(declare("segments", TensorProto.INT64, ["S"]))
    return inputs, [declare("vectors", TensorProto.FLOAT, ["B", "S", dim])]


def adapt_onnx(path: Path, pooling: str, normalize: bool) -> OnnxModel:
    """Give a foreign encoder the interface of this module.

    An output with one vector per text is returned unchanged; one with a vector per token is pooled
    and normalized.

    Raises:
        ModelError: the file is damaged, or has unsupported inputs or outputs.
    """
    proto = _load(path, with_weights=True)
    output = _output(proto, path)
    name, rank, dim = output.name, _rank(output), _dim(output, path)
    compose.add_prefix(proto, _PREFIX, inplace=True)
    g = OnnxBuilder(_opset(proto, path))
    _add_inputs(g, proto, path)
    g.nodes.extend(proto.graph.node)
    floats = g.op("Cast", _PREFIX + name, to=TensorProto.FLOAT)
    if rank == 2:
        g.reshape(floats, 0, 1, -1, out="vectors")  # [B, D] -> [B, 1, D]
    else:
        pool(g, floats, pooling, normalize)  # [B, T, D] -> [B, 1, D]
    graph = proto.graph
    for field in (graph.node, graph.input, graph.output):
        del field[:]
    inputs, outputs = _interface(dim)
    graph.node.extend(g.nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    graph.initializer.extend(g.initializers)
    return OnnxModel(proto, {})


def describe_onnx(path: Path) -> tuple[int, list[Path]]:
    """Read the properties of a foreign encoder without loading its external weights.

    Returns:
        The number of components of its vectors, and the files with its external weights.

    Raises:
        ModelError: the file is damaged, does not contain that number, or names a file outside its
            folder.
    """
    proto = _load(path, with_weights=False)  # once: it may be 2 GB
    dim = _dim(_output(proto, path), path)
    # As onnx does when it loads external weights.
    tensors = external_data_helper._get_all_tensors(proto)
    outside = filter(external_data_helper.uses_external_data, tensors)
    places = {external_data_helper.ExternalDataInfo(tensor).location for tensor in outside}
    for place in map(Path, places):
        if place.is_absolute() or ".." in place.parts:
            raise ModelError(f"{path} stores weights in {place}, outside its folder.")
    return dim, [path.parent / place for place in sorted(places)]


def _load(path: Path, *, with_weights: bool) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, load_external_data=with_weights)
        # Older exporters omit the shapes of outputs.
        return proto if all(map(_rank, proto.graph.output)) else shape_inference.infer_shapes(proto)
    except Exception as error:  # protobuf, onnx and the file system have their own classes
        raise ModelError(f"{path} is not a readable ONNX model ({error}).") from error


def _add_inputs(g: OnnxBuilder, proto: onnx.ModelProto, path: Path) -> None:
    weights = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in weights:  # before IR 4, weights were listed as inputs too
            continue
        name = value.name.removeprefix(_PREFIX)
        if any(dim.dim_value for dim in value.type.tensor_type.shape.dim):
            raise ModelError(f"{path}: input {name} has fixed axes; export it with dynamic ones.")
        if name == "attention_mask":
            source = g.op("Greater", "segment_ids", g.constant(0, "int64"))
        elif name == "token_type_ids":
            source = g.op("Mul", "segment_ids", g.constant(0, "int64"))
        elif name in ("input_ids", "position_ids"):
            source = name
        else:
            raise ModelError(
                f"{path}: the model needs an input {name}; embedq has input_ids, "
                "attention_mask, token_type_ids and position_ids."
            )
        g.op("Cast", source, out=value.name, to=value.type.tensor_type.elem_type)


def _output(proto: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    # The pooled output if there is one, otherwise vectors per token, otherwise any per text.
    outputs: list[onnx.ValueInfoProto] = [
        value for value in proto.graph.output if _rank(value) in (2, 3)
    ]
    if not outputs:
        names = ", ".join(value.name for value in proto.graph.output)
        raise ModelError(f"{path}: none of the outputs ({names}) is [B, T, D] or [B, D].")
    return max(outputs, key=lambda v: (v.name == POOLED and _rank(v) == 2, _rank(v) == 3))


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _dim(output: onnx.ValueInfoProto, path: Path) -> int:
    size = int(output.type.tensor_type.shape.dim[-1].dim_value)
    folder = path.parent.parent if path.parent.name == "onnx" else path.parent
    size = size or (load_json(folder / "config.json", dict) or {}).get("hidden_size", 0)
    if type(size) is not int or size < 1:
        raise ModelError(
            f"{path} and its config.json do not contain the number of components of a vector."
        )
    return size


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    version = next((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version < MIN_OPSET:
        raise ModelError(f"{path} has operator set {version}; export it with {MIN_OPSET} or newer.")
    return version
