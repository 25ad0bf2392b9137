"""Prompts that a model was trained with, from its files or from a table that a user switches on.

The files of some families name no prompts, although their model cards ask for them. Such a prompt
is never used silently: EMBEDQ_PROMPTS switches a set on, which gives its prompts names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from embedq.errors import SettingsError, did_you_mean
from embedq_worker.model.json_file import JsonFile

#: Value of EMBEDQ_PROMPTS -> name of a prompt -> prefix of each text.
#: Sources: the model cards of intfloat/e5-base-v2 and intfloat/multilingual-e5-base,
#: BAAI/bge-base-en-v1.5, nomic-ai/nomic-embed-text-v1.5.
PROMPT_SETS: Final[Mapping[str, Mapping[str, str]]] = {
    "e5": {"query": "query: ", "passage": "passage: "},
    "bge-en": {"query": "Represent this sentence for searching relevant passages: "},
    "nomic": {
        "search_query": "search_query: ",
        "search_document": "search_document: ",
        "clustering": "clustering: ",
        "classification": "classification: ",
    },
}


def read_prompts(folder: Path, prompt_set: str = "") -> tuple[dict[str, str], str]:
    """Read the prompts of a model, and the name of the one that is used by default.

    Args:
        folder: the model.
        prompt_set: name of a set whose prompts are added; empty for none.

    Raises:
        ModelError: the file is damaged, or its default is none of its prompts.
        SettingsError: the set is unknown, or a prompt of the files has the same name.
    """
    config = JsonFile.load(folder / "config_sentence_transformers.json")
    config.one_of("model_type", "SentenceTransformer")
    found = config.get("prompts", {})
    texts_only = isinstance(found, dict) and all(
        text is None or isinstance(text, str) for text in found.values()
    )
    if not texts_only:
        raise config.unsupported("prompts", found, "an object of texts")
    prompts = {name: text or "" for name, text in found.items()}
    default = config.text("default_prompt_name")
    if default and default not in prompts:
        known = ", ".join(prompts) or "none"
        raise config.unsupported("default_prompt_name", default, f"a name of prompts: {known}")
    return _add_set(folder, prompts, prompt_set), default


def _add_set(folder: Path, prompts: dict[str, str], prompt_set: str) -> dict[str, str]:
    if not prompt_set:
        return prompts
    added = PROMPT_SETS.get(prompt_set)
    if added is None:
        raise SettingsError(
            f"EMBEDQ_PROMPTS is {prompt_set}; expected one of {', '.join(PROMPT_SETS)}."
            f"{did_you_mean(prompt_set, list(PROMPT_SETS))}"
        )
    # sentence-transformers 6 writes empty prompts "query" and "document" for every model.
    other = [name for name, text in added.items() if prompts.get(name) not in (None, "", text)]
    if other:
        raise SettingsError(
            f"EMBEDQ_PROMPTS is {prompt_set}, but the files in {folder} have another prompt "
            f"{', '.join(other)}. Unset EMBEDQ_PROMPTS."
        )
    return {**prompts, **added}
