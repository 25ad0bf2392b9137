"""Builds ONNX graphs with the interface that all engines use.

Inputs, int64: ``input_ids``, ``position_ids``, ``segment_ids`` [B, T] (0 is padding, 1.. number the
texts of a row) and ``segments`` [S] (1..S). Output: ``vectors`` float32 [B, S, D].
Where a model does not pool the tokens of a prompt, their segment is negative.
A foreign encoder supports one text per row: S is 1.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

#: Name of a file, as a message must name one, of the weights that are in memory.
WEIGHTS_LOCATION: Final = "weights"

#: Minimum size of a constant that is stored outside the protobuf message, bytes.
MIN_EXTERNAL_BYTES: Final = 1024


class MappedFiles:
    """Files whose content is mapped into memory.

    Attributes:
        folder: folder of all these files, without links.
    """

    def __init__(self, files: Collection[Path]) -> None:
        """Map files that are not empty.

        Raises:
            OSError, ValueError: a file cannot be mapped.
        """
        real = {path: path.resolve() for path in files}
        self.folder = Path(os.path.commonpath([path.parent for path in real.values()]))
        self._real = real
        self._maps: dict[Path, mmap.mmap] = {}
        for path in files:
            with path.open("rb") as file:
                # Copy on write: OpenVINO takes no read-only memory, and nothing writes to it.
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def location(self, path: Path) -> str:
        """Return the place of a file relative to `folder`."""
        return self._real[path].relative_to(self.folder).as_posix()

    def read(self, path: Path, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Return bytes of a file without copying them."""
        return np.frombuffer(self._maps[path], np.uint8, size, offset)

    def release(self) -> None:
        """Free the memory of the pages that were read; they are read again when needed."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True, weakref_slot=True)
class OnnxModel:
    """An ONNX graph with the interface of this module.

    Attributes:
        proto: the message; its large constants are declared without data.
        weights: those constants by name. Outside the message they are not copied when it is
            serialized and parsed, which makes a start faster and its memory peak lower. Those of
            bfloat16 are uint16, their bits.
        mapping: the weights as their files are mapped; None if they are in memory. The message then
            names the place of each, relative to `mapping.folder`.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, npt.NDArray[Any]]
    mapping: MappedFiles | None = None

    def bfloat16_weights(self) -> frozenset[str]:
        """Return the names of the weights that are bfloat16."""
        return frozenset(
            tensor.name
            for tensor in self.proto.graph.initializer
            if tensor.name in self.weights and tensor.data_type == TensorProto.BFLOAT16
        )

    def with_weights_as_inputs(self) -> bytes:
        """Serialize with each weight as an input of its name, which the caller replaces."""
        copied = onnx.ModelProto()
        copied.CopyFrom(self.proto)
        graph = copied.graph
        tensors = list(graph.initializer)
        del graph.initializer[:]
        graph.initializer.extend(t for t in tensors if t.name not in self.weights)
        graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in tensors
            if tensor.name in self.weights
        )
        return bytes(copied.SerializeToString())


class OnnxBuilder:
    """Collects nodes and weights; its methods return the name of the value that they add.

    Attributes:
        opset: ONNX operator set.
        max_length: maximum number of tokens of a text.
        text_ids: segment of each token, also where its prompt is not pooled, [B, T].
    """

    def __init__(
        self, opset: int, *, max_length: int, include_prompt: bool = True, inline: bool = False
    ) -> None:
        """Start a graph.

        Args:
            opset: ONNX operator set.
            max_length, include_prompt: as in ModelConfig.
            inline: keep all constants in the message.
        """
        self.opset, self.max_length, self._inline = opset, max_length, inline
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: dict[str, npt.NDArray[np.float32]] = {}
        self._number = itertools.count()
        self.text_ids = "segment_ids" if include_prompt else self.op("Abs", "segment_ids")

    def op(self, kind: str, *inputs: str, out: str = "", **attributes: Any) -> str:
        name = out or f"{kind}_{next(self._number)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike = np.float32) -> str:
        name = f"c{next(self._number)}"
        # Runtimes read the array in place. "W" copies a mapped one: it may be unaligned, and a
        # change of its file must not change vectors.
        array = np.require(value, dtype, ["C", "ALIGNED", "W"])
        if self._inline or array.nbytes < MIN_EXTERNAL_BYTES:
            self.initializers.append(numpy_helper.from_array(array, name))
            return name
        self.weights[name] = array
        tensor = onnx.TensorProto(name=name, dims=array.shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=WEIGHTS_LOCATION)
        self.initializers.append(tensor)
        return name

    def cast(self, value: str, dtype: npt.DTypeLike) -> str:
        """Convert to another type."""
        return self.op("Cast", value, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def reshape(self, value: str, *shape: int, out: str = "") -> str:
        return self.op("Reshape", value, self.constant(shape, np.int64), out=out)

    def reduce(self, kind: str, value: str, moved: int) -> str:
        """Reduce the last axis; `moved` is the operator set in which axes became an input."""
        if self.opset >= moved:
            return self.op(kind, value, self.constant([-1], np.int64), keepdims=1)
        return self.op(kind, value, axes=[-1], keepdims=1)

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Split the last axis into parts of these sizes."""
        number = next(self._number)
        names = [f"Split_{number}_{part}" for part in range(len(sizes))]
        inputs = [value, self.constant(sizes, np.int64)]
        self.nodes.append(helper.make_node("Split", inputs, names, name=names[0], axis=-1))
        return names

    def shift(self, value: str, by: int, axis: int) -> str:
        """Replace each element of three axes by the one `by` places later; zeros come from outside.

        A negative number looks backwards.
        """
        pads = [0] * 6
        pads[axis if by < 0 else axis + 3] = abs(by)
        padded = self.op("Pad", value, self.constant(pads, np.int64))
        start, stop = (0, by) if by < 0 else (by, np.iinfo(np.int64).max)
        ends = (self.constant([number], np.int64) for number in (start, stop, axis))
        return self.op("Slice", padded, *ends)

    def graph(self, dim: int) -> OnnxModel:
        """Return the collected nodes as a graph whose vectors have `dim` components."""
        inputs, outputs = interface(dim)
        graph = helper.make_graph(self.nodes, "embedq", inputs, outputs, self.initializers)
        imports = [helper.make_opsetid("", self.opset)]
        return OnnxModel(helper.make_model_gen_version(graph, opset_imports=imports), self.weights)


def interface(dim: int) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    declare = helper.make_tensor_value_info
    names = ("input_ids", "position_ids", "segment_ids")
    inputs = [declare(name, TensorProto.INT64, ["B", "T"]) for name in names]
    inputs.append(declare("segments", TensorProto.INT64, ["S"]))
    return inputs, [declare("vectors", TensorProto.FLOAT, ["B", "S", dim])]
