"""ONNX builder, and adapter for foreign models.

ONNX graphs with their weights beside them, and the small language they are written in.

Puts a foreign ONNX encoder behind the interface of our own graph, so that engines know only one.

Such a model sees one text a row: it cannot be packed, and S is 1.
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

#: Length below which a vector is not scaled up: keeps empty segments at zero, and is not itself
#: zero in fp16.
MIN_NORM: Final = 1e-4


#: Inputs of every graph with shape [B, T].
INPUTS: Final = ("input_ids", "position_ids", "segment_ids")


#: Bytes from which a constant stays outside the message.
MIN_OUTSIDE: Final = 1024


@dataclass(frozen=True, slots=True, weakref_slot=True)
class OnnxModel:
    """A graph in the interface that all engines know.

    Attributes:
        proto: the message; its large constants are declared and left empty.
        weights: those constants by name. They stay outside because every copy of 90 MB costs a
            start 0.1 to 0.3 s: graph and session took 0.15 to 0.19 s this way, 0.8 to 1.4 s and
            190 MB more at the peak from one message (3 runs each, measured 2026-11-22).
    """

    proto: onnx.ModelProto
    weights: Mapping[str, npt.NDArray[np.float32]]

    def with_weights_as_inputs(self) -> bytes:
        """Serialize with each weight as an input of its name, for whoever puts it in its place."""
        apart = onnx.ModelProto()
        apart.CopyFrom(self.proto)
        graph = apart.graph
        inside = [tensor for tensor in graph.initializer if tensor.name not in self.weights]
        del graph.initializer[:]
        graph.initializer.extend(inside)
        graph.input.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, weight.shape)
            for name, weight in self.weights.items()
        )
        return bytes(apart.SerializeToString())


class OnnxBuilder:
    """Collects nodes and weights; each method returns the name of the value it adds."""

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
        # Runtimes read these in place. What is still in its file is copied: it may begin there at
        # any byte, and what is looked up while serving must not change with the file.
        array = np.require(value, dtype, ["C", "ALIGNED", "W"])
        if array.nbytes < MIN_OUTSIDE:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        self.weights[name] = array
        outside = onnx.StringStringEntryProto(key="location", value="weights")
        self.initializers.append(
            onnx.TensorProto(
                name=name,
                dims=array.shape,
                data_type=TensorProto.FLOAT,
                data_location=TensorProto.EXTERNAL,
                external_data=[outside],
            )
        )
        return name

    def reshape(self, value: str, *shape: int, out: str = "") -> str:
        return self.op("Reshape", value, self.constant(shape, np.int64), out=out)

    def reduce(self, kind: str, value: str, moved: int) -> str:
        """Reduce the last axis; an operator's axes moved from attribute to input in some opset."""
        if self.opset >= moved:
            return self.op(kind, value, self.constant([-1], np.int64), keepdims=1)
        return self.op(kind, value, axes=[-1], keepdims=1)

    def graph(self, dim: int) -> OnnxModel:
        """Wrap what was collected in the interface that all engines know."""
        inputs, outputs = interface(dim)
        graph = helper.make_graph(self.nodes, "embedq", inputs, outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        return OnnxModel(helper.make_model_gen_version(graph, opset_imports=imports), self.weights)


def pool(g: OnnxBuilder, hidden: str, pooling: str, normalize: bool) -> None:
    """Turn token vectors into one vector per segment, [B, T, D] -> ``vectors`` [B, S, D].

    Both ways are a product with a matrix [B, S, T] that weighs the tokens of each segment.
    """
    numbers = g.reshape("segments", 1, -1, 1)
    member = g.op("Equal", numbers, g.reshape("segment_ids", 0, 1, -1))  # [B, S, T]
    if pooling == "cls":
        first = g.op("Equal", g.reshape("position_ids", 0, 1, -1), g.constant(0, np.int64))
        member = g.op("And", member, first)
    weight = g.op("Cast", member, to=TensorProto.FLOAT)
    if pooling == "mean":
        # Divided before the product: a sum of 512 tokens is beyond what fp16 keeps well.
        count = g.op("Max", g.reduce("ReduceSum", weight, 13), g.constant(1.0))
        weight = g.op("Div", weight, count)
    _finish(g, g.op("MatMul", weight, hidden), normalize)


def _finish(g: OnnxBuilder, vectors: str, normalize: bool) -> None:
    if not normalize:
        g.op("Identity", vectors, out="vectors")
        return
    length = g.op("Max", g.reduce("ReduceL2", vectors, 18), g.constant(MIN_NORM))
    g.op("Div", vectors, length, out="vectors")


def interface(dim: int) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    """Declare the inputs and the output that every graph has."""
    declare = helper.make_tensor_value_info
    inputs = [declare(name, TensorProto.INT64, ["B", "T"]) for name in INPUTS]
    inputs.append(declare("segments", TensorProto.INT64, ["S"]))
    return inputs, [declare("vectors", TensorProto.FLOAT, ["B", "S", dim])]


#: Oldest operator set whose operators the added nodes may use.
MIN_OPSET: Final = 11


#: Output of a model that pools by itself, as sentence-transformers and optimum name it.
POOLED: Final = "sentence_embedding"


_PREFIX = "model/"


def adapt_onnx(path: Path, pooling: str, normalize: bool) -> OnnxModel:
    """Wrap an encoder: masks and pooling are added, what it calls its inputs is hidden.

    An output with one vector per text is taken as it is; one with a vector per token is pooled and
    normalized.

    Raises:
        ModelError: the file is damaged, or has inputs or outputs that we cannot serve.
    """
    proto = _load(path, with_weights=True)
    output = _output(proto, path)
    name, rank, dim = output.name, _rank(output), _dim(output, path)
    compose.add_prefix(proto, _PREFIX, inplace=True)
    g = OnnxBuilder(_opset(proto, path))
    _feed(g, proto, path)
    g.nodes.extend(proto.graph.node)
    floats = g.op("Cast", _PREFIX + name, to=TensorProto.FLOAT)
    if rank == 2:
        g.reshape(floats, 0, 1, -1, out="vectors")  # [B, D] -> [B, 1, D]
    else:
        pool(g, floats, pooling, normalize)  # [B, T, D] -> [B, 1, D]
    graph = proto.graph
    for field in (graph.node, graph.input, graph.output):
        del field[:]
    inputs, outputs = interface(dim)
    graph.node.extend(g.nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    graph.initializer.extend(g.initializers)
    return OnnxModel(proto, {})


def describe_onnx(path: Path) -> tuple[int, list[Path]]:
    """Read what an encoder says of itself; weights beside it stay on the disk.

    Returns:
        The components of its vectors, and the files in which it keeps weights beside itself.

    Raises:
        ModelError: the file is damaged, does not say the first, or names a file elsewhere.
    """
    proto = _load(path, with_weights=False)  # once: it may be 2 GB
    dim = _dim(_output(proto, path), path)
    # What onnx itself goes through when it loads them.
    tensors = external_data_helper._get_all_tensors(proto)
    outside = filter(external_data_helper.uses_external_data, tensors)
    places = {external_data_helper.ExternalDataInfo(tensor).location for tensor in outside}
    for place in map(Path, places):
        if place.is_absolute() or ".." in place.parts:
            raise ModelError(f"{path} keeps weights in {place}, which is not beside it.")
    return dim, [path.parent / place for place in sorted(places)]


def _load(path: Path, *, with_weights: bool) -> onnx.ModelProto:
    try:
        proto = onnx.load(path, load_external_data=with_weights)
        # Older exporters leave the shapes of outputs open.
        return proto if all(map(_rank, proto.graph.output)) else shape_inference.infer_shapes(proto)
    except Exception as error:  # protobuf, onnx and the file system each raise their own
        raise ModelError(f"{path} is not a readable ONNX model ({error}).") from error


def _feed(g: OnnxBuilder, proto: onnx.ModelProto, path: Path) -> None:
    """Derive each input of the encoder from ours, in the type that it declares."""
    known = {tensor.name for tensor in proto.graph.initializer}
    for value in proto.graph.input:
        if value.name in known:  # before IR 4, weights were listed as inputs too
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
                f"{path}: the model wants an input {name}; embedq serves input_ids, "
                "attention_mask, token_type_ids and position_ids."
            )
        g.op("Cast", source, out=value.name, to=value.type.tensor_type.elem_type)


def _output(proto: onnx.ModelProto, path: Path) -> onnx.ValueInfoProto:
    """Choose the pooled output if there is one, else vectors per token, else any per text."""
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
        raise ModelError(f"{path} does not say how many components its vectors have.")
    return size


def _opset(proto: onnx.ModelProto, path: Path) -> int:
    version = next((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if version < MIN_OPSET:
        raise ModelError(f"{path} has operator set {version}; export it with {MIN_OPSET} or newer.")
    return version
