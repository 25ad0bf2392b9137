"""Computes text embeddings in bulk through a queue, on the NPUs and CPUs you already own.

    from embedq import Client

Names are loaded on first use, so that `import embedq` is fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedq.client import Client
    from embedq.errors import EmbedqError, TextsFailed
    from embedq.protocol.contract import Accuracy, OnLong, Outcome

__version__ = "0.1.0"
__all__ = ["Accuracy", "Client", "EmbedqError", "OnLong", "Outcome", "TextsFailed"]

#: Public name -> module that defines it.
_MODULES = {
    "Accuracy": "embedq.protocol.contract",
    "Client": "embedq.client",
    "EmbedqError": "embedq.errors",
    "OnLong": "embedq.protocol.contract",
    "Outcome": "embedq.protocol.contract",
    "TextsFailed": "embedq.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'embedq' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
