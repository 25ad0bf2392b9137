"""Read modules.json of sentence-transformers: the encoder's folder, pooling and what follows it.

Whatever is not understood whole is refused by name.
Source: sentence_transformers 6 and 5, base/modules and sentence_transformer/modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from embedq_worker.errors import ModelError
from embedq_worker.model.json_file import JsonFile, is_file, load_json

#: Pooling modes in the order in which older versions concatenate them.
POOLING_MODES: Final = (
    "cls",
    "max",
    "mean",
    "mean_sqrt_len_tokens",
    "weightedmean",
    "lasttoken",
)

#: Activation of a Dense module, a class in torch.nn -> its name in `blocks`; empty for none.
ACTIVATIONS: Final[Mapping[str, str]] = {
    "Identity": "",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}

#: Boolean of older versions -> pooling mode.
_OLD_MODES: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}

#: Kinds of modules that may follow the pooling.
_BEHIND: Final = ("Dense", "LayerNorm", "Normalize")

_EXPORT: Final = (
    "Export the whole model as model.onnx with the output sentence_embedding, into a folder "
    "without modules.json."
)


@dataclass(frozen=True, slots=True)
class Module:
    """A module behind the pooling.

    Attributes:
        kind: ``Dense``, ``LayerNorm`` or ``Normalize``.
        weights: its safetensors; None for Normalize.
        in_features, out_features: components before and after; 0 if it does not say.
        bias: a Dense module adds a bias.
        activation: activation of a Dense module, one of ACTIVATIONS.
    """

    kind: str
    weights: Path | None = None
    in_features: int = 0
    out_features: int = 0
    bias: bool = False
    activation: str = "Identity"

    def describe(self) -> dict[str, Any]:
        """Return what shapes a vector, besides the weights, as JSON types."""
        return {
            "kind": self.kind,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "activation": self.activation,
        }


@dataclass(frozen=True, slots=True)
class ModulesFile:
    """What modules.json says.

    Attributes:
        encoder: folder of the encoder's config.json, weights and tokenizer.
        pooling_modes: modes in the order of their concatenation; empty where nothing says it.
        include_prompt: whether the tokens of a prompt are pooled.
        behind: the modules behind the pooling, in order.
    """

    encoder: Path
    pooling_modes: tuple[str, ...] = ()
    include_prompt: bool = True
    behind: tuple[Module, ...] = ()


def read_modules(folder: Path) -> ModulesFile:
    """Read modules.json and the configurations of its modules.

    A folder without modules.json is an encoder that does not say how it is pooled.

    Raises:
        ModelError: a file is damaged, or a module is not supported.
    """
    path = folder / "modules.json"
    entries = load_json(path, list)
    if entries is None:
        return ModulesFile(folder)
    kinds = [_kind(path, entry) for entry in entries]
    names = [entry["name"] for entry in entries if isinstance(entry.get("name"), str)]
    if len(set(names)) != len(names):
        raise ModelError(
            f"{path} has two modules of the same name: {', '.join(names)}. Fetch the file again."
        )
    if kinds[:2] != ["Transformer", "Pooling"] or any(kind not in _BEHIND for kind in kinds[2:]):
        raise ModelError(
            f"{path} lists {', '.join(kinds) or 'no module'}; embedq supports Transformer, Pooling "
            f"and then any of {', '.join(_BEHIND)}. {_EXPORT}"
        )
    places = [_place(path, folder, entry) for entry in entries]
    modes, include_prompt = _read_pooling(places[1] / "config.json")
    behind = tuple(
        _read_behind(kind, place) for kind, place in zip(kinds[2:], places[2:], strict=True)
    )
    return ModulesFile(places[0], modes, include_prompt, behind)


def _kind(path: Path, entry: Any) -> str:
    type_ = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(type_, str):
        raise ModelError(f"{path} has an entry without a type: {entry!r}. Fetch the file again.")
    package, _, kind = type_.rpartition(".")
    if package.partition(".")[0] != "sentence_transformers":
        raise ModelError(
            f"{path} has the module {type_}, whose code is not part of sentence-transformers; "
            f"embedq runs no code of a model. {_EXPORT}"
        )
    return kind


def _place(path: Path, folder: Path, entry: dict[str, Any]) -> Path:
    place = entry.get("path", "")
    if not isinstance(place, str) or Path(place).is_absolute() or ".." in Path(place).parts:
        raise ModelError(f"{path} places a module in {place!r}, outside its folder.")
    return folder / place


def _read_pooling(path: Path) -> tuple[tuple[str, ...], bool]:
    config = _load(path)
    named = config.get("pooling_mode")
    if named is None:
        modes = tuple(mode for name, mode in _OLD_MODES.items() if config.flag(name, False))
        if "pooling_mode_mean_tokens" not in config.values:
            # Version 6 takes a missing flag for false, older ones for true.
            if modes:
                raise ModelError(
                    f"{path} has {', '.join(modes)}, but no pooling_mode_mean_tokens, which "
                    "versions of sentence-transformers read differently. Add it as true or false."
                )
            modes = ("mean",)
        unknown = [
            name
            for name, value in config.values.items()
            if name.startswith("pooling_mode_") and name not in _OLD_MODES and value
        ]
        if unknown:
            raise config.unsupported("pooling", ", ".join(unknown), *_OLD_MODES)
    else:
        modes = tuple(named) if isinstance(named, list) else (named,)
    for mode in modes:
        if mode not in POOLING_MODES:
            raise config.unsupported("pooling_mode", mode, *POOLING_MODES)
    if not modes:
        raise ModelError(f"{path} names no pooling mode. Fetch the file again.")
    return modes, config.flag("include_prompt", True)


def _read_behind(kind: str, place: Path) -> Module:
    path = place / "config.json"
    if kind == "Normalize":
        # Older versions wrote no file.
        _check_keys(JsonFile.load(path))
        return Module(kind)
    config = _load(path)
    if kind == "LayerNorm":
        size = config.integer("dimension")
        return Module(kind, _weights(place), size, size)
    _check_keys(config)
    config.one_of("use_residual", False)
    activation = config.text("activation_function", "torch.nn.modules.activation.Tanh")
    package, _, name = activation.rpartition(".")
    if not package.startswith("torch.nn.modules") or name not in ACTIVATIONS:
        raise config.unsupported("activation_function", activation, *ACTIVATIONS)
    return Module(
        kind,
        _weights(place),
        config.integer("in_features"),
        config.integer("out_features"),
        config.flag("bias", True),
        name,
    )


def _check_keys(config: JsonFile) -> None:
    for name in ("module_input_name", "module_output_name"):
        config.one_of(name, "sentence_embedding")


def _load(path: Path) -> JsonFile:
    if load_json(path, dict) is None:
        raise ModelError(f"{path} is missing, but modules.json names it. Fetch the model again.")
    return JsonFile.load(path, supported_by=_EXPORT)


def _weights(place: Path) -> Path:
    path = place / "model.safetensors"
    if not is_file(path):
        raise ModelError(
            f"{path} is missing; embedq reads no pytorch_model.bin. Load the model once with "
            "sentence-transformers and save it again with save_pretrained, which writes the file."
        )
    return path
