"""The encoders that embedq builds as graphs of its own, which serve several texts per row.

To add a family: one module like those beside this one, and one line in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from embedq_worker.model.families import bert
from embedq_worker.model.families.family import Family

#: model_type in config.json -> family.
FAMILIES: Final[Mapping[str, Family]] = {
    "bert": bert.FAMILY,
}
