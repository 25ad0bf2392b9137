"""Define what embedq must know of a family of encoders to build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from embedq_worker.model.blocks import ACTIVATIONS
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

#: Values that shape an encoder, as JSON types; part of the identity of a model. Every family has
#: ``hidden_size``, ``vocab_size`` and ``max_positions``: number of tokens of a text that the
#: encoder has positions for, 0 for no limit.
Architecture = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of encoders.

    Attributes:
        read: reads config.json; raises ModelError for a value that `build` does not support.
        build: appends the encoder to a graph: from its inputs to token vectors [B, T, D].
        prefixes: what the names of all tensors may start with, beside nothing.
    """

    read: Callable[[JsonFile], Architecture]
    build: Callable[[OnnxBuilder, Weights], str]
    prefixes: tuple[str, ...] = ()


def read_sizes(config: JsonFile, names: Mapping[str, str]) -> Architecture:
    """Read positive integers: name in Architecture -> name in config.json.

    Raises:
        ModelError: one is missing, or ``num_attention_heads`` do not divide ``hidden_size``.
    """
    sizes = {ours: config.integer(theirs) for ours, theirs in names.items()}
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise config.unsupported(
            names["hidden_size"],
            sizes["hidden_size"],
            f"multiples of {names['num_attention_heads']}, which is {sizes['num_attention_heads']}",
        )
    return dict(sizes)


def read_activation(config: JsonFile, name: str, default: str) -> str:
    """Read the name of an activation function that `blocks.activate` supports.

    Raises:
        ModelError: it is another one.
    """
    return str(config.one_of(name, *ACTIVATIONS, default=default))
