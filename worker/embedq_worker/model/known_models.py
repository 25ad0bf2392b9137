"""Lists models that people run in bulk, for `embedq-worker models`. Serving never reads this list.

Sources: the model card and the files of each model on the hub, as of 2026-11.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class KnownModel(NamedTuple):
    """A model on the hub.

    Attributes:
        name: hub id.
        family: model_type of its encoder.
        pooling: pooling mode.
        max_length: maximum length of a text, tokens.
        prompts: ``files`` if its files carry prompts, a value of EMBEDQ_PROMPTS if its model card
            asks for prompts that they do not carry, or empty.
        licence: licence field of its model card.
    """

    name: str
    family: str
    pooling: str
    max_length: int
    prompts: str
    licence: str


KNOWN_MODELS: Final = tuple(
    KnownModel(*row)
    for row in (
        ("sentence-transformers/all-MiniLM-L6-v2", "bert", "mean", 256, "", "apache-2.0"),
        ("sentence-transformers/all-MiniLM-L12-v2", "bert", "mean", 128, "", "apache-2.0"),
        ("sentence-transformers/all-mpnet-base-v2", "mpnet", "mean", 384, "", "apache-2.0"),
        (
            "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
            *("bert", "mean", 128, "", "apache-2.0"),
        ),
        (
            "sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
            *("xlm-roberta", "mean", 128, "", "apache-2.0"),
        ),
        ("BAAI/bge-small-en-v1.5", "bert", "cls", 512, "bge-en", "mit"),
        ("BAAI/bge-base-en-v1.5", "bert", "cls", 512, "bge-en", "mit"),
        ("BAAI/bge-large-en-v1.5", "bert", "cls", 512, "bge-en", "mit"),
        ("BAAI/bge-m3", "xlm-roberta", "cls", 8192, "", "mit"),
        ("intfloat/e5-small-v2", "bert", "mean", 512, "e5", "mit"),
        ("intfloat/e5-base-v2", "bert", "mean", 512, "e5", "mit"),
        ("intfloat/e5-large-v2", "bert", "mean", 512, "e5", "mit"),
        ("intfloat/multilingual-e5-small", "bert", "mean", 512, "e5", "mit"),
        ("intfloat/multilingual-e5-base", "xlm-roberta", "mean", 512, "e5", "mit"),
        ("intfloat/multilingual-e5-large", "xlm-roberta", "mean", 512, "e5", "mit"),
        ("thenlper/gte-base", "bert", "mean", 512, "", "mit"),
        ("mixedbread-ai/mxbai-embed-large-v1", "bert", "cls", 512, "files", "apache-2.0"),
        (
            "Snowflake/snowflake-arctic-embed-l-v2.0",
            *("xlm-roberta", "cls", 8192, "files", "apache-2.0"),
        ),
        ("Alibaba-NLP/gte-modernbert-base", "modernbert", "cls", 8192, "", "apache-2.0"),
        ("nomic-ai/modernbert-embed-base", "modernbert", "mean", 8192, "nomic", "apache-2.0"),
        ("nomic-ai/nomic-embed-text-v1.5", "nomic_bert", "mean", 8192, "nomic", "apache-2.0"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3", "lasttoken", 32768, "files", "apache-2.0"),
        ("google/embeddinggemma-300m", "gemma3_text", "mean", 2048, "files", "gemma"),
    )
)
