"""Texts by which an engine is judged, and what others published about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from embedq_worker import canary

#: Components that others published for all-MiniLM-L6-v2: text -> place -> value.
#: Sources: langchain4j AllMiniLmL6V2EmbeddingModelIT.java (from sentence-transformers) and
#: transformers.js pipelines/feature-extraction.js.
PUBLISHED: Final[Mapping[str, Mapping[int, float]]] = {
    "I love sentence transformers.": {
        0: -0.0803190097,
        1: -0.0171345081,
        382: 0.0478825271,
        383: -0.0561899580,
    },
    "This is a simple test.": {0: 0.0952821523, 1: -0.0247301683},
}

_SENTENCE = canary.TEXT

#: Texts of every length from none to more than any model takes.
GOLDEN: Final[Sequence[str]] = (
    *PUBLISHED,
    "",
    "hi",
    "Ein Satz auf Deutsch; une phrase en français; 日本語の文。",
    "def embed(texts: list[str]) -> np.ndarray: ...",
    _SENTENCE,
    _SENTENCE * 3,
    _SENTENCE * 40,
)
