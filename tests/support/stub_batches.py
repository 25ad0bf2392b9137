"""Batches that the stub engine serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedq.protocol.contract import VectorSpec
from embedq.protocol.message import EmbedBatch
from embedq.testing import STUB_DIM
from embedq_worker.engines.stub import STUB_IDENTITY, STUB_MAX_LENGTH

#: Specification that the stub serves.
STUB_SPEC = VectorSpec(STUB_IDENTITY, STUB_DIM, STUB_MAX_LENGTH)


def stub_batch(
    texts: Sequence[str],
    *,
    job: str = "job",
    index: int = 0,
    refused: Mapping[int, str] | None = None,
    rerouted: bool = False,
    **spec: Any,
) -> EmbedBatch:
    """Return a batch for the stub; further arguments replace fields of its specification."""
    return EmbedBatch(job, index, texts, STUB_SPEC._replace(**spec), refused or {}, rerouted)
