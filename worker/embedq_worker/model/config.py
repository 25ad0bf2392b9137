"""Reads the JSON files of a model folder and refuses a model that embedq cannot serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from embedq_worker.errors import ModelError

#: Token limit of a model whose files name none; BERT was trained with it.
DEFAULT_MAX_LENGTH: Final = 512

#: Numbers in config.json that shape a BERT encoder.
_SIZES: Final = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)

_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")
_USE_ONNX = "Use a folder with model.onnx (or onnx/model.onnx) and tokenizer.json instead."


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """How texts become vectors, besides the weights.

    Attributes:
        pooling: ``mean`` or ``cls``.
        normalize: vectors are scaled to unit length.
        max_length: maximum number of tokens of a text, special tokens included.
        prompts: name of a prompt -> prefix of each text.
        default_prompt: name of the prompt if the caller chooses none; empty for no prompt.
    """

    pooling: str
    normalize: bool
    max_length: int
    prompts: Mapping[str, str]
    default_prompt: str


def read_model_config(folder: Path) -> ModelConfig:
    """Read the files of sentence-transformers.

    A folder without them is a bare encoder: mean pooling, unit length, and as many tokens as its
    config.json and tokenizer_config.json allow, at most DEFAULT_MAX_LENGTH.

    Raises:
        ModelError: a file is damaged, or requires an unsupported module, pooling or lower case.
    """
    _check_case(folder)
    modules = load_json(folder / "modules.json", list)
    pooling, normalize = "mean", True
    if modules is not None:
        kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
        for kind in kinds:
            if kind not in _KNOWN_MODULES:
                raise ModelError(
                    f"{folder}/modules.json has a {kind} module, which embedq does not support. "
                    "Export the whole model as model.onnx with the output sentence_embedding, into "
                    "a folder without modules.json."
                )
        normalize = "Normalize" in kinds
        if "Pooling" in kinds:
            pooling = _pooling(folder / str(modules[kinds.index("Pooling")]["path"]))
    usage = load_json(folder / "config_sentence_transformers.json", dict) or {}
    prompts = {str(k): str(v) for k, v in (usage.get("prompts") or {}).items() if v}
    default = usage.get("default_prompt_name") or ""
    if default not in prompts:
        default = ""
    return ModelConfig(pooling, normalize, _max_length(folder), prompts, default)


def read_architecture(folder: Path) -> dict[str, Any]:
    """Read the values of config.json that shape a BERT encoder.

    Raises:
        ModelError: it is not a BERT encoder, or a value is missing or unsupported.
    """
    path = folder / "config.json"
    config = load_json(path, dict) or {}
    kind = config.get("model_type")
    if kind != "bert":
        raise ModelError(
            f"{path}: model_type is {kind or 'missing'}; embedq builds bert. {_USE_ONNX}"
        )
    _require(path, config, "position_embedding_type", "absolute")
    _require(path, config, "is_decoder", False)
    architecture: dict[str, Any] = {"model_type": kind}
    for name in _SIZES:
        value = config.get(name)
        if type(value) is not int or value < 1:
            raise ModelError(f"{path}: {name} is {value!r}, not a positive number.")
        architecture[name] = value
    if architecture["hidden_size"] % architecture["num_attention_heads"]:
        raise ModelError(f"{path}: hidden_size is not a multiple of num_attention_heads.")
    # "gelu" is the exact form, with erf.
    architecture["hidden_act"] = _require(path, config, "hidden_act", "gelu", "relu")
    architecture["layer_norm_eps"] = float(config.get("layer_norm_eps", 1e-12))
    return architecture


def load_json(path: Path, kind: type[Any]) -> Any:
    """Load a JSON file that contains a dict or a list; None if the file is missing.

    Raises:
        ModelError: the file is not JSON, or contains another type.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}). Fetch the file again.") from error
    if not isinstance(value, kind):
        raise ModelError(
            f"{path} contains a {type(value).__name__}, expected a {kind.__name__}. "
            "Fetch the file again."
        )
    return value


def _require(path: Path, config: Mapping[str, Any], name: str, *known: object) -> object:
    value = config.get(name, known[0])
    if value not in known:
        expected = " or ".join(map(str, known))
        raise ModelError(f"{path}: {name} is {value}; embedq builds {expected}. {_USE_ONNX}")
    return value


def _check_case(folder: Path) -> None:
    sentence = load_json(folder / "sentence_bert_config.json", dict) or {}
    if not sentence.get("do_lower_case"):
        return
    normalizer = (load_json(folder / "tokenizer.json", dict) or {}).get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    if not any(step.get("lowercase") or step.get("type") == "Lowercase" for step in steps):
        raise ModelError(
            f"{folder}/sentence_bert_config.json: do_lower_case is true, but tokenizer.json has no "
            "Lowercase normalizer, and embedq does not change texts. Add one to tokenizer.json and "
            "set do_lower_case to false."
        )


def _pooling(folder: Path) -> str:
    path = folder / "config.json"
    config = load_json(path, dict)
    if config is None:
        raise ModelError(f"{path} is missing, but modules.json names it. Fetch the model again.")
    # sentence-transformers 5 writes one name, older versions one boolean per mode.
    if isinstance(config.get("pooling_mode"), str):
        modes = [config["pooling_mode"]]
    else:
        modes = [
            name.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
            for name, enabled in config.items()
            if name.startswith("pooling_mode_") and enabled
        ]
    if modes not in (["mean"], ["cls"]):
        raise ModelError(
            f"{path}: pooling is {' and '.join(modes) or None}; embedq supports mean or cls."
        )
    if config.get("include_prompt", True) is False:
        raise ModelError(f"{path}: include_prompt is false; embedq pools prompt and text together.")
    return str(modes[0])


def _max_length(folder: Path) -> int:
    # Files may disagree: all-MiniLM-L6-v2 has 128 in tokenizer.json, 512 in two others and 256 in
    # sentence_bert_config.json, which is right.
    architecture = load_json(folder / "config.json", dict) or {}
    sentence = load_json(folder / "sentence_bert_config.json", dict) or {}
    tokenizer = load_json(folder / "tokenizer_config.json", dict) or {}
    positions = architecture.get("max_position_embeddings") or DEFAULT_MAX_LENGTH
    wanted = sentence.get("max_seq_length")
    if not wanted:
        # model_max_length is 10**30 if unknown.
        wanted = min(tokenizer.get("model_max_length") or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    return int(min(wanted, positions))
