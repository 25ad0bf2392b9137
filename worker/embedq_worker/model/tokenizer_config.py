"""Read what a model's files say about its tokenizer beside tokenizer.json.

transformers builds a tokenizer from both tokenizer.json and tokenizer_config.json, and where they
disagree, tokenizer_config.json and the defaults of its class decide. The result is part of the
model's identity.

Source: transformers 5.24, tokenization_utils_tokenizers.py and models/bert/tokenization_bert.py;
sentence_transformers 6, base/modules/transformer.py, do_lower_case.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from embedq_worker.errors import ModelError
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.transformer_options import sentence_file

#: Classes that replace the normalizer of tokenizer.json by one with the values of
#: tokenizer_config.json or their own defaults.
_BERT_CLASSES: Final = (
    "BertTokenizer",
    "BertTokenizerFast",
    "DistilBertTokenizer",
    "DistilBertTokenizerFast",
    "MPNetTokenizer",
    "MPNetTokenizerFast",
    "ElectraTokenizer",
    "ElectraTokenizerFast",
)

#: Start of a tokenizer_class -> type of model that transformers builds for it.
_MODELS: Final = {
    **{name.removesuffix("Fast"): "WordPiece" for name in _BERT_CLASSES},
    "RobertaTokenizer": "BPE",
    "GPT2Tokenizer": "BPE",
    "Qwen2Tokenizer": "BPE",
    "GemmaTokenizer": "BPE",
    "XLMRobertaTokenizer": "Unigram",
    "CamembertTokenizer": "Unigram",
    "AlbertTokenizer": "Unigram",
    "T5Tokenizer": "Unigram",
}

#: model_type of config.json for which transformers chooses such a class if no file names one.
_BERT_TYPES: Final = ("bert", "distilbert", "mpnet", "electra")

#: Keys of tokens that texts are put between, or padded with.
_NAMED_TOKENS: Final = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")

#: Flags of an added token and their defaults in transformers.
ADDED_FLAGS: Final = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True}


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What changes the ids of texts beside tokenizer.json.

    Attributes:
        bert: values of a BERT normalizer that replace those of tokenizer.json; empty for none.
        lowercase_first: texts are lowercased before anything else.
        truncation_side: side of a text that is cut off: ``right`` or ``left``; empty if only
            tokenizer.json says it.
        added: id -> content and flags of the added tokens that tokenizer.json must have too.
        tokens: key -> token that must be in the vocabulary.
        adds: ``bos`` and ``eos`` -> whether texts must begin and end with that token.
        add_prefix_space: whether a space is put before a text; None if only tokenizer.json says it.
        model: type of model that tokenizer.json must have; empty for any.
        path: the file, for messages.
    """

    bert: Mapping[str, Any] = field(default_factory=dict)
    lowercase_first: bool = False
    truncation_side: str = ""
    added: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    tokens: Mapping[str, str] = field(default_factory=dict)
    adds: Mapping[str, bool] = field(default_factory=dict)
    add_prefix_space: bool | None = None
    model: str = ""
    path: Path = Path("tokenizer_config.json")

    def describe(self) -> dict[str, Any]:
        """Return what shapes a vector, as JSON types."""
        # What tokenizer.json must agree with changes nothing.
        return {
            "bert": dict(self.bert),
            "lowercase_first": self.lowercase_first,
            "truncation_side": self.truncation_side,
        }


def read_tokenizer_config(encoder: Path) -> TokenizerConfig:
    """Read tokenizer_config.json and its companions.

    Args:
        encoder: folder of the encoder.

    Raises:
        ModelError: a file is damaged, or requires something unsupported.
    """
    config = JsonFile.load(encoder / "tokenizer_config.json")
    special = JsonFile.load(encoder / "special_tokens_map.json")
    model_type = JsonFile.load(encoder / "config.json").text("model_type")
    kind = config.text("tokenizer_class")
    is_bert = kind in _BERT_CLASSES or (not kind and model_type in _BERT_TYPES)
    if model_type in ("bert", "distilbert"):
        # Their positions count padding, so vectors would depend on the other texts of a batch.
        config.one_of("padding_side", "right")
    config.one_of("split_special_tokens", False)
    tokens = {}
    for name in _NAMED_TOKENS:
        token = special.get(name, config.get(name))
        if token is not None:
            tokens[name] = _content(config, name, token)
    return TokenizerConfig(
        bert=_read_bert(config) if is_bert else {},
        lowercase_first=sentence_file(encoder).flag("do_lower_case", False),
        truncation_side=_side(config),
        added=_read_added(config),
        tokens=tokens,
        adds={
            name: config.flag(f"add_{name}_token", False)
            for name in ("bos", "eos")
            if config.get(f"add_{name}_token") is not None
        },
        add_prefix_space=(
            config.flag("add_prefix_space", False)
            if config.get("add_prefix_space") is not None
            else None
        ),
        model=_MODELS.get(kind.removesuffix("Fast"), ""),
        path=config.path,
    )


def _read_bert(config: JsonFile) -> dict[str, bool | None]:
    strip = config.get("strip_accents")
    if strip is not None:
        strip = config.flag("strip_accents", False)
    return {
        "lowercase": config.flag("do_lower_case", True),
        "strip_accents": strip,
        "handle_chinese_chars": config.flag("tokenize_chinese_chars", True),
        "clean_text": True,
    }


def _side(config: JsonFile) -> str:
    if config.get("truncation_side") is None:
        return ""
    return str(config.one_of("truncation_side", "right", "left"))


def _content(config: JsonFile, name: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ModelError(f"{config.path}: {name} is {token!r}, expected a token.")
    return content


def _read_added(config: JsonFile) -> dict[int, dict[str, Any]]:
    found = config.get("added_tokens_decoder", {})
    added = {}
    for number, token in found.items() if isinstance(found, dict) else [("", found)]:
        # An id has ten digits at most; Python refuses to convert thousands.
        is_id = str(number).isdecimal() and len(number) <= 10
        if not (is_id and isinstance(token, dict) and "content" in token):
            raise ModelError(
                f"{config.path}: added_tokens_decoder has {number!r}: {token!r}, expected an id "
                "with a token. Fetch the file again."
            )
        flags = {name: token.get(name, default) for name, default in ADDED_FLAGS.items()}
        if token.get("special"):
            flags["normalized"] = token.get("normalized", False)
        added[int(number)] = {"content": token["content"], **flags}
    return added
