"""The encoders that embedq builds as graphs of its own, which serve several texts per row.

To add a family: one module like those beside this one, and one line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from embedq_worker.model.families import (
    bert,
    distilbert,
    gemma3,
    modernbert,
    mpnet,
    nomic_bert,
    qwen3,
    roberta,
)
from embedq_worker.model.families.family import Family

#: model_type in config.json -> family.
FAMILIES: Final[Mapping[str, Family]] = {
    "bert": bert.FAMILY,
    "camembert": roberta.FAMILY,
    "distilbert": distilbert.FAMILY,
    "gemma3_text": gemma3.FAMILY,
    "modernbert": modernbert.FAMILY,
    "mpnet": mpnet.FAMILY,
    "nomic_bert": nomic_bert.FAMILY,
    "qwen3": qwen3.FAMILY,
    "roberta": roberta.FAMILY,
    "xlm-roberta": roberta.FAMILY,
}
