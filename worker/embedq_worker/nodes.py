"""ONNX graphs with their weights beside them, and the small language they are written in."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Length below which a vector is not scaled up: keeps empty segments at zero, and is not itself
#: zero in fp16.
MIN_NORM: Final = 1e-4

#: Inputs of every graph with shape [B, T].
INPUTS: Final = ("input_ids", "position_ids", "segment_ids")
#: Bytes from which a constant stays outside the message.
MIN_OUTSIDE: Final = 1024


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Graph:
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
        """Serialise with each weight as an input of its name, for whoever puts it in its place."""
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


class Writer:
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

    def graph(self, dim: int) -> Graph:
        """Wrap what was collected in the interface that all engines know."""
        inputs, outputs = interface(dim)
        graph = helper.make_graph(self.nodes, "embedq", inputs, outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        return Graph(helper.make_model_gen_version(graph, opset_imports=imports), self.weights)


def pool(g: Writer, hidden: str, pooling: str, normalize: bool) -> None:
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


def _finish(g: Writer, vectors: str, normalize: bool) -> None:
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
