"""Define what embedq must know of a family of encoders to build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from embedq_worker.model.blocks import ACTIVATIONS
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxBuilder

#: Sizes that most families have under these names, in config.json as in an Architecture.
SIZES: Final = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
)

#: Types of a layer's attention in config.json.
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"

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


def read_sizes(config: JsonFile, names: Mapping[str, str] | None = None) -> Architecture:
    """Read SIZES.

    Args:
        config: config.json.
        names: name in Architecture -> name in config.json; None if they are the same.

    Raises:
        ModelError: one is missing, or ``num_attention_heads`` do not divide ``hidden_size``.
    """
    names = names or {name: name for name in SIZES}
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


def check_rotary_size(
    config: JsonFile, size: int, name: str = "the number of components of a head"
) -> None:
    """Check that the components of a head come in pairs, which rotary positions turn.

    Raises:
        ModelError: they do not.
    """
    if size % 2:
        raise config.unsupported(name, size, "even numbers")


def read_theta(config: JsonFile, name: str, default: float, layer_type: str = "") -> float:
    """Read the base of the rotary frequencies, as transformers 5 or older versions write it.

    Args:
        config: config.json.
        name: key of older versions.
        default: value if there is none.
        layer_type: FULL or SLIDING for a family that tells them apart.

    Raises:
        ModelError: the frequencies are scaled, which embedq does not support, or not positive.
    """
    if config.get("rope_scaling") is not None:
        raise config.unsupported("rope_scaling", config.get("rope_scaling"), "none")
    parameters = config.get("rope_parameters", {})
    if layer_type and isinstance(parameters, dict):
        parameters = parameters.get(layer_type) or {}
    known = {"rope_theta", "rope_type"}
    plain = isinstance(parameters, dict) and set(parameters) <= known
    if not plain or parameters.get("rope_type", "default") != "default":
        raise config.unsupported("rope_parameters", parameters, "rope_type default")
    theta = parameters.get("rope_theta", config.get(name, default))
    theta = JsonFile(config.path, {name: theta}).number(name, default)
    if theta <= 0:
        raise config.unsupported(name, theta, "positive numbers")
    return theta


def read_layer_types(config: JsonFile, count: int, default: Sequence[str]) -> list[str]:
    """Read the type of each layer's attention, FULL or SLIDING.

    Raises:
        ModelError: there is another type, or not one per layer.
    """
    types = config.get("layer_types", list(default))
    known = isinstance(types, list) and all(one in (FULL, SLIDING) for one in types)
    if not known or len(types) != count:
        raise config.unsupported("layer_types", types, f"{FULL} and {SLIDING}, one per layer")
    return list(types)
