"""Read the options of a Transformer module: the maximum length of a text, and what is refused.

Files may disagree on the length: all-MiniLM-L6-v2 has 128 in tokenizer.json, 512 in two others and
256 in sentence_bert_config.json, which is right.

Source: sentence_transformers 6 and 5, base/modules/transformer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from embedq_worker.model.json_file import JsonFile

#: Names under which versions of sentence-transformers wrote one file, in the order in which they
#: look for it.
SENTENCE_FILES: Final = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)

#: Token limit of a model whose files name none; BERT was trained with it.
DEFAULT_MAX_LENGTH: Final = 512

#: From here, model_max_length stands for an unknown length; transformers writes 10**30.
_UNKNOWN: Final = 10**9

#: How sentence-transformers 6 describes an encoder of texts.
_TEXT: Final = {"method": "forward", "method_output_name": "last_hidden_state"}

#: Arguments for transformers, by new and old name, and those that change no vector.
_ARGUMENTS: Final = {
    "model_kwargs": {"torch_dtype", "dtype", "attn_implementation", "use_safetensors"},
    "model_args": {"torch_dtype", "dtype", "attn_implementation", "use_safetensors"},
    "processor_kwargs": {"model_max_length", "use_fast"},
    "tokenizer_args": {"model_max_length", "use_fast"},
    "config_kwargs": set(),
    "config_args": set(),
}
_NEVER_USED: Final = {"trust_remote_code", "local_files_only"}

_EXPORT: Final = "Export the model as model.onnx and use a folder with that file instead."


def sentence_file(encoder: Path) -> JsonFile:
    """Return the first of SENTENCE_FILES that has values; without one, no values.

    Raises:
        ModelError: the file is damaged.
    """
    files = [JsonFile.load(encoder / name, supported_by=_EXPORT) for name in SENTENCE_FILES]
    return next((file for file in files if file.values), files[0])


def check_options(encoder: Path) -> None:
    """Refuse options of the Transformer module that would change vectors.

    Raises:
        ModelError: there is one, or the file is damaged.
    """
    options = sentence_file(encoder)
    options.one_of("transformer_task", "feature-extraction")
    options.one_of("module_output_name", "token_embeddings")
    text = options.get("modality_config", {"text": _TEXT})
    if not isinstance(text, dict) or text.get("text") != _TEXT:
        raise options.unsupported("modality_config", text, {"text": _TEXT})
    for name in ("processing_kwargs", "query_length", "document_length", "query_expansion"):
        if options.get(name):
            raise options.unsupported(name, options.get(name), "none")
    for name, harmless in _ARGUMENTS.items():
        given: Any = options.get(name, {})
        if not isinstance(given, dict) or set(given) - harmless - _NEVER_USED:
            raise options.unsupported(name, given, *sorted(harmless) or ["none"])


def read_max_length(encoder: Path, positions: int) -> int:
    """Return the maximum number of tokens of a text, special tokens included.

    Args:
        encoder: folder of the encoder.
        positions: number of tokens that the encoder has positions for; 0 for no limit of its own.

    Raises:
        ModelError: a file is damaged, or a length is not a positive integer.
    """
    limits = [limit for limit in (_wanted(encoder), positions) if limit]
    return min(limits, default=DEFAULT_MAX_LENGTH)


def _wanted(encoder: Path) -> int:
    # 0 if no file names a length.
    options = sentence_file(encoder)
    # The older name replaces the newer one.
    name = "tokenizer_args" if "tokenizer_args" in options.values else "processor_kwargs"
    arguments = JsonFile(options.path, options.get(name, {}))
    if "model_max_length" in arguments.values:
        return _length(arguments, "model_max_length")
    if options.get("max_seq_length") is not None:
        return _length(options, "max_seq_length")
    tokenizer = JsonFile.load(encoder / "tokenizer_config.json")
    # transformers reads the name of its first versions too.
    is_old = "model_max_length" not in tokenizer.values
    return _length(tokenizer, "max_len" if is_old else "model_max_length")


def _length(file: JsonFile, name: str) -> int:
    value = file.get(name)
    if value is None or (type(value) in (int, float) and value >= _UNKNOWN):
        return 0
    return file.integer(name)
