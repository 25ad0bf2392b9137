"""Adapts foreign ONNX encoders to the interface that onnx_graph describes.

A foreign encoder supports one text per row: S is 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx
from onnx import TensorProto, compose

from embedq.protocol.contract import Precision
from embedq_worker.errors import ModelError
from embedq_worker.model.config import POOLED_BY_MODEL, ModelConfig
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.onnx_file import (
    check_weights,
    constants,
    count_elements,
    graph_inputs,
    load_message,
    map_weights,
    nodes,
    opset_of,
    prune,
    rank,
    reading,
    type_name,
)
from embedq_worker.model.onnx_graph import OnnxBuilder, OnnxModel, interface
from embedq_worker.model.pooling import append_modules, append_pooling

#: Output of a model that pools by itself, as sentence-transformers and optimum name it.
POOLED: Final = "sentence_embedding"

#: Outputs with a vector per token, as transformers, optimum and sentence-transformers name them.
PER_TOKEN: Final = ("last_hidden_state", "token_embeddings")

#: Outputs that are no sentence vectors even if their shape fits: those of a head, and BERT's
#: transformed first token, which sentence-transformers does not use.
_NO_VECTORS: Final = ("logits", "pooler_output")

#: What embedq reads, for error messages.
_SUPPORTED: Final = (
    "embedq reads last_hidden_state or token_embeddings [B, T, hidden_size], or "
    "sentence_embedding [B, D]. Export the encoder for feature extraction, without a head."
)

#: Minimum number of elements of a constant whose type counts as that of the weights.
MIN_WEIGHTS: Final = 1024

#: Operators of ONNX that compute with quantized values, besides QLinear*.
_QUANTIZED: Final = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
    }
)

#: Those of onnxruntime that do not begin with Q. Source: its ContribOperators.md.
_QUANTIZED_CONTRIB: Final = (
    "DequantizeBFP",
    "DequantizeWithOrder",
    "DynamicQuantize",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulFpQ4",
    "MatMulInteger",
    "MatMulNBits",
)

#: Element types of an input with numbers.
_INPUT_TYPES: Final = (
    TensorProto.INT64,
    TensorProto.INT32,
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BOOL,
)

#: Values of model_type whose positions start behind that of the padding token. Source: the models
#: of transformers that have create_position_ids_from_input_ids.
_OFFSET_POSITIONS: Final = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "xmod", "longformer"),
        *("roberta-prelayernorm", "data2vec-text", "ibert", "luke", "mluke", "mra", "esm"),
    }
)

_PREFIX: Final = "model/"


@dataclass(frozen=True, slots=True)
class ForeignOnnx:
    """What the file of a foreign encoder says about it.

    Attributes:
        output: name of the output that is served.
        pooled: the output has a vector per text; otherwise one per token.
        size: number of components of these vectors.
        max_positions: number of tokens that it has positions for; 0 if config.json does not say.
        precision: ``f32``, ``f16``, ``bf16``, or ``int8`` for 8 bits or fewer: how its weights are
            stored or, if that is less precise, what its operators compute with.
        files: files with its external weights.
    """

    output: str
    pooled: bool
    size: int
    max_positions: int
    precision: Precision
    files: tuple[Path, ...]


def describe_onnx(path: Path, folder: Path, *, pooling_known: bool = False) -> ForeignOnnx:
    """Read the properties of a foreign encoder without its external weights.

    Args:
        path: the ONNX file.
        folder: folder of the model, with config.json.
        pooling_known: something says how vectors per token are pooled, so an output with these is
            preferred to a pooled one, as sentence-transformers does it.

    Raises:
        ModelError: the file is damaged, or it is no encoder that embedq can serve.
    """
    with reading(path):
        proto = load_message(path)  # once: it may be 2 GB
        _check_inputs(proto, path, folder)
        output, pooled, size = _choose_output(proto, path, folder, pooling_known)
        return ForeignOnnx(
            output=output,
            pooled=pooled,
            size=size,
            max_positions=_max_positions(folder),
            precision=_precision(proto),
            files=check_weights(proto, path),
        )


def adapt_onnx(path: Path, folder: Path, config: ModelConfig, dim: int) -> OnnxModel:
    """Give a foreign encoder the interface of onnx_graph.

    Args:
        path: the ONNX file.
        folder: folder of the model, with config.json.
        config: how an output with a vector per token is pooled, and what follows the pooling.
        dim: components of the vectors.

    Raises:
        ModelError: as describe_onnx.
    """
    with reading(path):
        proto = load_message(path)
        _check_inputs(proto, path, folder)
        output, pooled, _ = _choose_output(proto, path, folder, config.pooling != POOLED_BY_MODEL)
        prune(proto, output)
        mapped, files = map_weights(proto, path)
        weights = {_PREFIX + name: array for name, array in mapped.items()}
        _rename(proto.graph)
        g = OnnxBuilder(
            opset_of(proto),
            max_length=config.max_length,
            include_prompt=config.include_prompt,
            inline=True,
        )
        _add_inputs(g, proto)
        g.nodes.extend(proto.graph.node)
        vectors = g.op("Cast", _PREFIX + output, to=TensorProto.FLOAT)
        if pooled:
            append_modules(g, g.reshape(vectors, 0, 1, -1), config)  # [B, D] -> [B, 1, D]
        else:
            append_pooling(g, vectors, config)  # [B, T, D] -> [B, 1, D]
        _replace_graph(proto, g, dim)
        return OnnxModel(proto, weights, files)


def _rename(graph: onnx.GraphProto) -> None:
    # onnx renames inner graphs before it knows the initializers that they refer to.
    names = {tensor.name: _PREFIX + tensor.name for tensor in graph.initializer}
    compose.add_prefix_graph(graph, _PREFIX, inplace=True, name_map=names)


def _replace_graph(proto: onnx.ModelProto, g: OnnxBuilder, size: int) -> None:
    graph = proto.graph
    for field in (graph.node, graph.input, graph.output):
        del field[:]
    inputs, outputs = interface(size)
    graph.node.extend(g.nodes)
    graph.input.extend(inputs)
    graph.output.extend(outputs)
    graph.initializer.extend(g.initializers)
    # Before version 4, weights had to be inputs.
    proto.ir_version = max(proto.ir_version, 4)


def _check_inputs(proto: onnx.ModelProto, path: Path, folder: Path) -> None:
    inputs = graph_inputs(proto)
    names = [value.name for value in inputs]
    for value in inputs:
        _check_input(value, path)
    for name in ("input_ids", "attention_mask"):
        # Without a mask, the padding of a row would change the vectors of its text.
        if name not in names:
            raise ModelError(
                f"{path}: the model has no input {name}; its inputs are {', '.join(names)}. "
                "Export it with input_ids and attention_mask."
            )
    kind = JsonFile.load(folder / "config.json").text("model_type")
    if "position_ids" in names and kind in _OFFSET_POSITIONS:
        raise ModelError(
            f"{path}: the model needs an input position_ids, and a {kind} counts them in its own "
            "way. Export it without this input."
        )


def _check_input(value: onnx.ValueInfoProto, path: Path) -> None:
    name, kind = value.name, value.type.tensor_type
    if name.startswith("past_key_values"):
        raise ModelError(
            f"{path}: the model needs an input {name}, so it was exported to generate text. "
            "Export it for feature extraction, without past keys and values."
        )
    if name not in ("input_ids", "attention_mask", "token_type_ids", "position_ids"):
        raise ModelError(
            f"{path}: the model needs an input {name}; embedq has input_ids, attention_mask, "
            "token_type_ids and position_ids. Export it without this input."
        )
    if any(dim.dim_value for dim in kind.shape.dim):
        raise ModelError(f"{path}: input {name} has fixed axes; export it with dynamic ones.")
    if kind.HasField("shape") and len(kind.shape.dim) != 2:
        raise ModelError(f"{path}: input {name} has {len(kind.shape.dim)} axes; embedq has [B, T].")
    if kind.elem_type not in _INPUT_TYPES:
        raise ModelError(
            f"{path}: input {name} has type {type_name(kind.elem_type)}; embedq has numbers."
        )


def _add_inputs(g: OnnxBuilder, proto: onnx.ModelProto) -> None:
    for value in graph_inputs(proto):
        name = value.name.removeprefix(_PREFIX)
        if name == "attention_mask":
            source = g.op("Greater", g.text_ids, g.constant(0, "int64"))
        elif name == "token_type_ids":
            source = g.op("Mul", "segment_ids", g.constant(0, "int64"))
        else:
            source = name
        g.op("Cast", source, out=value.name, to=value.type.tensor_type.elem_type)


def _choose_output(
    proto: onnx.ModelProto, path: Path, folder: Path, pooling_known: bool
) -> tuple[str, bool, int]:
    # An output of a known name if there is one, otherwise the only one with vectors per token,
    # otherwise the only one with vectors per text: name, pooled, number of components.
    hidden = _hidden_size(folder)
    outputs = {value.name: value for value in proto.graph.output}
    per_token, pooled = [(name, 3) for name in PER_TOKEN], [(POOLED, 2)]
    for name, axes in per_token + pooled if pooling_known else pooled + per_token:
        if name in outputs and rank(outputs[name]) == axes:
            return name, axes == 2, _size(outputs[name], hidden, path, folder)
    for axes in (3, 2):
        fitting = [
            name
            for name, value in outputs.items()
            if rank(value) == axes and _last_axis(value) == hidden and name not in _NO_VECTORS
        ]
        if hidden and len(fitting) == 1:
            return fitting[0], axes == 2, hidden
    shown = ", ".join(map(_describe_output, outputs.values())) or "none"
    raise ModelError(f"{path} has no output that embedq can serve: {shown}. {_SUPPORTED}")


def _size(output: onnx.ValueInfoProto, hidden: int, path: Path, folder: Path) -> int:
    # A model may project what it pools, so only vectors per token must have the hidden size.
    size = _last_axis(output)
    if size and hidden and size != hidden and output.name != POOLED:
        raise ModelError(
            f"{path}: output {output.name} has {size} components, but {folder / 'config.json'} has "
            f"hidden_size {hidden}. They belong to different models; fetch both again."
        )
    if not (size or hidden):
        raise ModelError(
            f"{path} and its config.json do not contain the number of components of a vector."
        )
    return size or hidden


def _hidden_size(folder: Path) -> int:
    # 0 if unknown. DistilBERT and T5 have their own names for it.
    config = JsonFile.load(folder / "config.json")
    sizes = (config.get(name) for name in ("hidden_size", "dim", "d_model"))
    return next((size for size in sizes if type(size) is int and size > 0), 0)


def _max_positions(folder: Path) -> int:
    config = JsonFile.load(folder / "config.json")
    positions = config.get("max_position_embeddings")
    if type(positions) is not int or positions < 1:
        return 0
    if config.text("model_type") in _OFFSET_POSITIONS:
        pad_id = config.get("pad_token_id", 1)
        positions -= pad_id + 1 if type(pad_id) is int else 2
    return max(positions, 1)


def _describe_output(value: onnx.ValueInfoProto) -> str:
    axes = (dim.dim_param or str(dim.dim_value or "?") for dim in value.type.tensor_type.shape.dim)
    return f"{value.name} [{', '.join(axes)}]"


def _last_axis(value: onnx.ValueInfoProto) -> int:
    return int(value.type.tensor_type.shape.dim[-1].dim_value)


def _precision(proto: onnx.ModelProto) -> Precision:
    types = {type_name(t.data_type) for t in constants(proto) if count_elements(t) >= MIN_WEIGHTS}
    for node in nodes(proto):
        if _is_quantized(node):
            return Precision.INT8
        if node.op_type == "Cast":
            target = next((type_name(a.i) for a in node.attribute if a.name == "to"), "")
            types |= {target} & {"FLOAT16", "BFLOAT16"}
    if any(re.fullmatch("U?INT[248]|FLOAT[468].*", name) for name in types):
        return Precision.INT8
    if "BFLOAT16" in types:
        return Precision.BF16
    return Precision.F16 if "FLOAT16" in types else Precision.F32


def _is_quantized(node: onnx.NodeProto) -> bool:
    if node.domain == "com.microsoft":
        return node.op_type.startswith(("Q", *_QUANTIZED_CONTRIB)) and node.op_type != "QuickGelu"
    return node.op_type in _QUANTIZED or node.op_type.startswith("QLinear")
