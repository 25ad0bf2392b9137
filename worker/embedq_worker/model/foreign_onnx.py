"""Adapts foreign ONNX encoders to the interface that onnx_graph describes.

A foreign encoder supports one text per row: S is 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, compose, external_data_helper, shape_inference

from embedq_worker.errors import ModelError
from embedq_worker.model.config import load_json
from embedq_worker.model.onnx_graph import OnnxBuilder, OnnxModel, interface, pool

#: Oldest operator set that has the operators of `pool`.
MIN_OPSET: Final = 11

#: Output of a model that pools by itself, as sentence-transformers and optimum name it.
POOLED: Final = "sentence_embedding"

_PREFIX = "model/"


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
    inputs, outputs = interface(dim)
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
