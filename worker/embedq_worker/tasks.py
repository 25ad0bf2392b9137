"""The one task: a batch comes in, its vectors are committed to the ledger."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from celery.exceptions import Reject

from embedq.contract import TASK_NAME, Accuracy, EmbedBatch, Header, VectorSpec
from embedq.errors import ContractError
from embedq.ledger import Verdict
from embedq.outcomes import OutcomeTable
from embedq.vectors import Vectors
from embedq_worker import watchdog
from embedq_worker.answer import Stats
from embedq_worker.app import app
from embedq_worker.backend import LedgerBackend
from embedq_worker.careful import CAREFUL_AT, Notes, embed_carefully
from embedq_worker.delivery import DIED_HEADER, BatchTask
from embedq_worker.embedder import Embedder
from embedq_worker.errors import EngineError, NotQuantised
from embedq_worker.health import may_answer
from embedq_worker.lifecycle import serving
from embedq_worker.serving import Proven, Serving

log = logging.getLogger("embedq.worker")

#: Seconds that a child which may not serve holds a batch before it goes back to its queue.
HAND_BACK_PAUSE_S = 1.0


@app.task(
    base=BatchTask,
    name=TASK_NAME,
    bind=True,
    ignore_result=True,
    # A lost child's batch comes back at once, as often as it takes: the ledger counts, and careful
    # mode ends it. The defaults are three times, three minutes apart.
    max_retries=None,
    default_retry_delay=0,
)
def embed_batch(self: Any, body: object) -> dict[str, Any]:
    """Embed one batch and commit it; every way out leaves an answer or the batch in its queue."""
    began = time.monotonic()
    backend: LedgerBackend = self.backend
    address = Header.address(body)
    if address is None:
        log.error("message_refused reason=%s", "it has no usable job id and batch index")
        return {"refused": "malformed_message"}
    job, index = address

    node = _may_serve(job, index, self.request.delivery_info or {})
    verdict, tries = backend.begin(job, index)
    if verdict is not Verdict.GO:
        log.info("batch_skipped job=%s index=%d reason=%s", job, index, verdict)
        return {"skipped": str(verdict)}
    stats = Stats()
    try:
        batch = _accept(body, node)
        proven = _proven_for(node, batch.spec)
        if tries < CAREFUL_AT:
            vectors, outcomes = _embed(batch, proven.embedder, stats)
        else:
            notes = backend.notes(batch, getattr(self.request, DIED_HEADER, None))
            vectors, outcomes = _embed_carefully(batch, proven.embedder, stats, notes)
    except _Refused as refused:
        log.error("batch_failed job=%s index=%d code=%s", job, index, refused.code)
        backend.commit_failure(job, index, refused.code, refused.detail)
        return {"failed": refused.code}
    except Exception as error:  # Celery would acknowledge it, and the batch would be gone
        # An error that is not ours may quote a text.
        reason = str(error) if isinstance(error, EngineError) else type(error).__name__
        log.error("engine_failed job=%s index=%d reason=%s", job, index, reason)
        raise Reject(reason, requeue=True) from None

    infer_s = time.monotonic() - began
    committed = backend.commit(batch, vectors, outcomes)
    log.info(
        "batch_done job=%s index=%d engine=%s device=%s precision=%s texts=%d tokens=%d "
        "inferences=%d pack_fill_ratio=%.3f embed_ms=%.0f commit_ms=%.1f committed=%s",
        job,
        index,
        proven.engine.name,
        proven.engine.device,
        proven.engine.precision,
        len(batch.texts),
        int(outcomes.n_tokens.sum()),
        stats.inferences,
        stats.pack_fill_ratio,
        1e3 * infer_s,
        1e3 * (time.monotonic() - began - infer_s),
        {True: "yes", False: "duplicate", None: "job_gone"}[committed],
    )
    return {"rows": len(vectors)}


class _Refused(Exception):
    """A batch that is answered as failed instead of computed."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


def _may_serve(job: str, index: int, delivery: Mapping[str, Any]) -> Serving:
    """Return what to embed with, or put the batch back: it did nothing wrong."""
    node = serving()
    if node is None or not may_answer(delivery.get("routing_key", ""), node.engine.device):
        log.warning("batch_handed_back job=%s index=%d reason=not serving", job, index)
        time.sleep(HAND_BACK_PAUSE_S)
        raise Reject("not serving", requeue=True)
    return node


def _proven_for(node: Serving, spec: VectorSpec) -> Proven:
    """Return what serves the class of a job; raise _Refused where that is not to be had here."""
    if spec.quantised != (node.card.quantised if spec.accuracy is Accuracy.INT8 else ""):
        raise _Refused(
            NotQuantised.code,
            f"The job asks for the quantised model {spec.quantised or '(none)'}; the node has "
            f"{node.card.quantised or 'none'}. Quantise once and copy the cache to each node, "
            "start the nodes again, and run the job anew.",
        )
    try:
        return node.proven_for(spec.accuracy)
    except NotQuantised as error:
        raise _Refused(error.code, str(error)) from error


def _embed(batch: EmbedBatch, embedder: Embedder, stats: Stats) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch under the watchdog."""
    with watchdog.deadline(app.conf.embedq.engine_deadline_s):
        return embedder.embed(batch, stats)


def _embed_carefully(
    batch: EmbedBatch, embedder: Embedder, stats: Stats, notes: Notes
) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch that has stopped processes before, text by text."""
    log.warning("careful job=%s index=%d texts=%d", batch.job, batch.index, len(batch.texts))
    return embed_carefully(batch, lambda alone, _on_cpu: _embed(alone, embedder, stats), notes)


def _accept(body: object, node: Serving) -> EmbedBatch:
    """Decode a batch that this node can answer; raise _Refused with the reason otherwise."""
    try:
        batch = EmbedBatch.from_message(body)
    except ContractError as error:
        raise _Refused(error.code, str(error)) from error
    if batch.spec.model != node.card.identity:
        raise _Refused(
            "wrong_model",
            f"The job asks for model {batch.spec.model[:12]}; node serves {node.card.label} "
            f"({node.card.identity[:12]}). Start a node with the job's model, or run the job anew.",
        )
    if (batch.spec.dim, batch.spec.max_length) != (node.card.dim, node.card.max_length):
        raise _Refused("wrong_model", "The job's dimension or length is not the model's.")
    return batch
