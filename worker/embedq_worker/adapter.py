"""Puts a foreign ONNX encoder behind the interface of our own graph, so that engines know only one.

Such a model sees one text a row: it cannot be packed, and S is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, compose, external_data_helper, shape_inference

from embedq_worker.errors import ModelError
from embedq_worker.nodes import Graph, Writer, interface, pool
from embedq_worker.traits import load_json

#: Oldest operator set whose operators the added nodes may use.
MIN_OPSET: Final = 11
#: Output of a model that pools by itself, as sentence-transformers and optimum name it.
POOLED: Final = "sentence_embedding"

_PREFIX = "model/"


def adapt_onnx(path: Path, pooling: str, normalize: bool) -> Graph:
    """Wrap an encoder: masks and pooling are added, what it calls its inputs is hidden.

    An output with one vector per text is taken as it is; one with a vector per token is pooled and
    normalised.

    Raises:
        ModelError: the file is damaged, or has inputs or outputs that we cannot serve.
    """
    proto = _load(path, with_weights=True)
    output = _output(proto, path)
    name, rank, dim = output.name, _rank(output), _dim(output, path)
    compose.add_prefix(proto, _PREFIX, inplace=True)
    g = Writer(_opset(proto, path))
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
    return Graph(proto, {})


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


def _feed(g: Writer, proto: onnx.ModelProto, path: Path) -> None:
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
