"""Reads an ONNX file: its message, and the weights that it keeps outside.

Weights outside the protobuf message stay outside: they are mapped from their file, not copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, shape_inference

from embedq_worker.errors import ModelError
from embedq_worker.model.onnx_graph import MIN_EXTERNAL_BYTES, MappedFiles

#: Operator sets that embedq reads: the oldest has the operators of the pooling, the newest is
#: the newest that the installed onnx knows.
MIN_OPSET, MAX_OPSET = 11, onnx.defs.onnx_opset_version()

#: Size from which a file is no protobuf message, bytes.
MAX_MESSAGE_BYTES: Final = 2**31

#: Bits of an element of the types that are packed into bytes.
_PACKED_BITS: Final = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}

#: Element types whose external weights can be mapped, and the numpy type of their bytes.
_MAPPED: Final[Mapping[int, type[np.generic]]] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.DOUBLE: np.float64,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: np.uint16,
    TensorProto.INT8: np.int8,
    TensorProto.UINT8: np.uint8,
    TensorProto.INT16: np.int16,
    TensorProto.UINT16: np.uint16,
    TensorProto.INT32: np.int32,
    TensorProto.UINT32: np.uint32,
    TensorProto.INT64: np.int64,
    TensorProto.UINT64: np.uint64,
    TensorProto.BOOL: np.bool_,
}

Bytes = npt.NDArray[np.uint8]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ModelError instead of any error of the block: a damaged message may hold anything."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # protobuf, onnx and the file system have their own classes
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path} is not a readable ONNX model ({reason}). Fetch the file again."
        ) from error


def load_message(path: Path) -> onnx.ModelProto:
    """Load the message of an ONNX file, without external weights, with the ranks of its outputs.

    Raises:
        ModelError: the file is damaged, of another kind, too large, too old or too new.
        Exception: as `reading` translates it.
    """
    size = path.stat().st_size
    if size >= MAX_MESSAGE_BYTES:
        raise ModelError(
            f"{path} has {size:,} bytes, but an ONNX message is smaller than 2 GiB. Save the "
            "model with its weights as external data."
        )
    proto = onnx.load(path, format="protobuf", load_external_data=False)
    _check_versions(proto, path)
    # Older exporters omit the shapes of outputs.
    return proto if all(map(rank, proto.graph.output)) else shape_inference.infer_shapes(proto)


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    if not proto.ir_version or not proto.graph.node:
        raise ModelError(f"{path} is not an ONNX model: it has no graph. Fetch the file again.")
    if proto.ir_version > onnx.IR_VERSION:
        raise ModelError(
            f"{path} has version {proto.ir_version} of the ONNX format; embedq reads up to "
            f"{onnx.IR_VERSION}. Export the model with an older onnx, or upgrade onnx."
        )
    if not MIN_OPSET <= opset_of(proto) <= MAX_OPSET:
        raise ModelError(
            f"{path} has operator set {opset_of(proto)}; embedq reads {MIN_OPSET} to {MAX_OPSET}. "
            "Export the model with one of these."
        )


def opset_of(proto: onnx.ModelProto) -> int:
    """Return the version of the operator set; 0 if the model has none."""
    return next((int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)


def rank(value: onnx.ValueInfoProto) -> int:
    """Return the number of axes of an input or output; 0 if unknown."""
    return len(value.type.tensor_type.shape.dim)


def nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes, those of inner graphs and functions included."""
    for graph in _graphs(proto):
        yield from graph.node


def constants(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Yield all constants: initializers, and attributes of nodes."""
    yield from proto.graph.initializer
    yield from _inner_constants(proto)


def prune(proto: onnx.ModelProto, output: str) -> None:
    """Remove the nodes and initializers that an output does not need, such as those of a head.

    onnxruntime would remove them too, but fails then to find the external ones among them.
    """
    needed, kept = {output}, list[onnx.NodeProto]()
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input, *(inner.input for inner in _inner_nodes(node)))
            needed.update(value.name for graph in _inner_graphs(node) for value in graph.output)
    graph = proto.graph
    inputs = graph_inputs(proto)
    tensors = [tensor for tensor in graph.initializer if tensor.name in needed]
    for field, values in (
        (graph.node, kept[::-1]),
        (graph.initializer, tensors),
        (graph.input, inputs),
    ):
        del field[:]
        field.extend(values)


def graph_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Return the inputs without a default. Before IR 4, initializers were listed as inputs too."""
    defaults = {tensor.name for tensor in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in defaults]


def count_elements(tensor: TensorProto) -> int:
    """Return the number of elements of a constant."""
    return math.prod(tensor.dims)


def type_name(data_type: int) -> str:
    """Return the name of an element type, as ONNX writes it."""
    try:
        return str(TensorProto.DataType.Name(data_type))
    except ValueError:
        return f"unknown ({data_type})"


def check_weights(proto: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Check that the bytes of all constants are there, and return the files with external ones.

    Raises:
        ModelError: a constant is not where it should be, or has another size than its shape.
    """
    places = set()
    for tensor in constants(proto):
        if _is_external(tensor):
            places.add(_span(tensor, path)[0])
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != _bytes(tensor, path):
            raise ModelError(
                f"{path}: constant {tensor.name} has {len(tensor.raw_data):,} bytes for shape "
                f"{list(tensor.dims)}. Fetch the file again."
            )
    return tuple(sorted(places))


def map_weights(
    proto: onnx.ModelProto, path: Path
) -> tuple[dict[str, npt.NDArray[Any]], MappedFiles | None]:
    """Map large external weights from their files; move other external constants into the message.

    Returns:
        The mapped weights by name and their files, as attributes of OnnxModel.

    Raises:
        ModelError: as check_weights.
    """
    spans = {_span(tensor, path)[0] for tensor in constants(proto) if _is_external(tensor)}
    if not spans:
        return {}, None
    files = MappedFiles(spans)
    weights: dict[str, npt.NDArray[Any]] = {}
    for tensor in filter(_is_external, proto.graph.initializer):
        place, offset, size = _span(tensor, path)
        kind = _MAPPED.get(tensor.data_type)
        if kind is None or size < MIN_EXTERNAL_BYTES:
            _move_inside(tensor, files.read(place, offset, size))
            continue
        # frombuffer, not view: a constant may be unaligned, and is copied then.
        array = np.frombuffer(files.read(place, offset, size), kind).reshape(tuple(tensor.dims))
        weights[tensor.name] = np.require(array, requirements=["C", "ALIGNED"])
        _locate(tensor, files.location(place), offset, size)
    for tensor in filter(_is_external, _inner_constants(proto)):
        _move_inside(tensor, files.read(*_span(tensor, path)))
    return weights, files


def _locate(tensor: TensorProto, location: str, offset: int, size: int) -> None:
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", offset), ("length", size)):
        tensor.external_data.add(key=key, value=str(value))


def _move_inside(tensor: TensorProto, raw: Bytes) -> None:
    tensor.raw_data = raw.tobytes()
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _inner_graphs(*waiting: Any) -> Iterator[Any]:
    # All graphs inside nodes, functions or graphs.
    for parent in waiting:
        for node in parent.node if hasattr(parent, "node") else (parent,):
            for attribute in node.attribute:
                direct = [attribute.g] if attribute.HasField("g") else []
                for graph in (*direct, *attribute.graphs):
                    yield graph
                    yield from _inner_graphs(graph)


def _inner_nodes(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for graph in _inner_graphs(node):
        yield from graph.node


def _graphs(proto: onnx.ModelProto) -> Iterator[Any]:
    # The graph, the functions, and the graphs inside.
    for graph in (proto.graph, *proto.functions):
        yield graph
        yield from _inner_graphs(graph)


def _inner_constants(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    # All constants but the initializers of the main graph.
    for graph in _graphs(proto):
        if graph is not proto.graph and isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
        for node in graph.node:
            for attribute in node.attribute:
                yield from attribute.tensors
                if attribute.HasField("t"):
                    yield attribute.t


def _bytes(tensor: TensorProto, path: Path) -> int:
    # Number of bytes of a constant.
    name = type_name(tensor.data_type)
    try:
        bits = (
            _PACKED_BITS.get(name) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        )
    except (KeyError, ValueError) as error:
        raise ModelError(f"{path}: constant {tensor.name} has an unknown type {name}.") from error
    if min(tensor.dims, default=0) < 0:
        raise ModelError(
            f"{path}: constant {tensor.name} has shape {list(tensor.dims)}. Fetch the file again."
        )
    return -(-count_elements(tensor) * bits // 8)


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def _place(tensor: TensorProto, path: Path) -> Path:
    # The file with an external constant. It may be a link, as in the hub's cache.
    place = Path(_external_data(tensor).get("location", ""))
    if place.is_absolute() or ".." in place.parts or not place.name:
        raise ModelError(f"{path} stores weights in {place}, outside its folder.")
    found = path.parent / place
    if not found.is_file():
        raise ModelError(
            f"{found} is missing or no file, but {path.name} stores weights in it. Fetch the "
            "model again."
        )
    return found


def _external_data(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _span(tensor: TensorProto, path: Path) -> tuple[Path, int, int]:
    # File, first byte and number of bytes of an external constant.
    place, size = _place(tensor, path), _bytes(tensor, path)
    entries = _external_data(tensor)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
    except ValueError:
        offset, length = -1, size
    available = place.stat().st_size
    if length != size or not 0 <= offset <= available - size:
        raise ModelError(
            f"{place}: constant {tensor.name} has {size:,} bytes; {path.name} stores it in bytes "
            f"{entries.get('offset', 0)} to +{entries.get('length', size)} of {available:,}. Fetch "
            "both files again."
        )
    return place, offset, size
