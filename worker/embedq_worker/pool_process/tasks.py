"""The one task: a batch comes in, its vectors are committed to the ledger."""

from __future__ import annotations

import logging
import time
from typing import Any

from embedq.errors import ContractError
from embedq.observability import tracing
from embedq.protocol.contract import TASK_NAME, Accuracy, VectorSpec
from embedq.protocol.message import EmbedBatch, Header
from embedq.protocol.values import OutcomeTable, Vectors
from embedq.store.ledger import Verdict
from embedq_worker.errors import EngineError, NotQuantised
from embedq_worker.inference.embedder import Sink
from embedq_worker.inference.serving import Proven, Serving
from embedq_worker.inference.stats import EngineStats
from embedq_worker.main_process import rerouting
from embedq_worker.main_process.app import app
from embedq_worker.main_process.device_health import may_answer
from embedq_worker.main_process.rerouting import DIED_HEADER, BatchTask
from embedq_worker.pool_process.commit import LedgerBackend, handed_back
from embedq_worker.pool_process.isolation import (
    CAREFUL_AT,
    DeviceFault,
    LedgerNotes,
    Notes,
    embed_carefully,
)
from embedq_worker.pool_process.process import child

log = logging.getLogger("embedq.worker")


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

    node = _may_serve(self, body, job, index)
    verdict, tries = backend.begin(job, index)
    if verdict is not Verdict.GO:
        log.info("batch_skipped job=%s index=%d reason=%s", job, index, verdict)
        return {"skipped": str(verdict)}
    stats, upload = EngineStats(), None
    try:
        batch = _accept(body, node)
        proven = _proven_for(node, batch.spec)
        notes = None
        if tries >= CAREFUL_AT:
            died = getattr(self.request, DIED_HEADER, None)
            notes = LedgerNotes(backend, batch, died)
        else:
            upload = backend.upload(batch)
        vectors, outcomes = _embed(batch, node, proven, stats, notes, upload)
    except _Refused as refused:
        log.error("batch_failed job=%s index=%d code=%s", job, index, refused.code)
        backend.commit_failure(job, index, refused.code, refused.detail)
        return {"failed": refused.code}
    except DeviceFault as fault:
        why = child().doubts(fault.error)  # first of all, so that the parent takes nothing more
        backend.forgive(job, index)
        if upload is not None:
            upload.discard()
        rerouting.hand_over(self, body, *why)
    except Exception as error:  # Celery would acknowledge it, and the batch would be gone
        # An error that is not ours may quote a text.
        reason = str(error) if isinstance(error, EngineError) else type(error).__name__
        if upload is not None:
            upload.discard()
        log.error("engine_failed job=%s index=%d reason=%s", job, index, reason)
        raise handed_back(reason) from None

    embed_s = time.monotonic() - began
    with tracing.span("embedq.commit", index=index):
        committed = backend.commit(batch, vectors, outcomes, upload)
    task_s = time.monotonic() - began
    proven.embedder.meter.add(
        texts=len(batch.texts),
        tokens=stats.tokens,
        computed_tokens=stats.computed_tokens,
        inferences=stats.inferences,
    )
    log.info(
        "batch_done job=%s index=%d engine=%s device=%s precision=%s texts=%d tokens=%d "
        "inferences=%d pack_fill_ratio=%.3f device_busy_ratio=%.3f embed_ms=%.0f commit_ms=%.1f "
        "committed=%s",
        job,
        index,
        proven.engine.name,
        proven.engine.device,
        proven.engine.precision,
        len(batch.texts),
        int(outcomes.n_tokens.sum()),
        stats.inferences,
        stats.pack_fill_ratio,
        min(1.0, stats.busy_s / task_s),
        1e3 * embed_s,
        1e3 * (task_s - embed_s),
        {True: "yes", False: "duplicate", None: "job_gone"}[committed],
    )
    return {"rows": len(vectors)}


class _Refused(Exception):
    """A batch that is answered as failed instead of computed."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


def _may_serve(task: Any, body: object, job: str, index: int) -> Serving:
    """Return what to embed with, or give the batch away: it did nothing wrong."""
    queue = (task.request.delivery_info or {}).get("routing_key", "")
    node = child().serving
    if node is not None and may_answer(queue, node.standard.engine.device):
        return node
    if isinstance(body, dict) and rerouting.may_reroute(queue, body):
        rerouting.hand_over(task, body, child().state.code, "The node has stopped serving.")
    log.warning("batch_handed_back job=%s index=%d reason=not serving", job, index)
    raise handed_back("not serving")


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


def _embed(
    batch: EmbedBatch,
    node: Serving,
    proven: Proven,
    stats: EngineStats,
    notes: Notes | None,
    sink: Sink | None,
) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch, text by text if it has notes: it has stopped processes before.

    Raises:
        DeviceFault: the NPU failed, or gave what it should not have.
    """
    if notes is None:
        return _ask(proven, node, batch, stats, sink)
    log.warning("careful job=%s index=%d texts=%d", batch.job, batch.index, len(batch.texts))

    def embed_one(alone: EmbedBatch, on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        elsewhere = on_cpu and child().on_npu
        return _ask(node.proven_for(Accuracy.EXACT) if elsewhere else proven, node, alone, stats)

    return embed_carefully(batch, embed_one, notes)


def _ask(
    proven: Proven, node: Serving, batch: EmbedBatch, stats: EngineStats, sink: Sink | None = None
) -> tuple[Vectors, OutcomeTable]:
    """Ask an engine for a batch; one on an NPU is watched closely, and what it gives is checked."""
    on_npu = child().on_npu and proven.engine is node.standard.engine
    inferences, busy_s = stats.inferences, stats.busy_s
    try:
        with child().calling_engine(), tracing.span("embedq.engine", texts=len(batch.texts)):
            vectors, outcomes = proven.embedder.embed(batch, stats, sink)
            if on_npu:
                node.check(batch, vectors)
    except Exception as error:
        if on_npu:
            raise DeviceFault(error) from error
        raise
    if on_npu:
        child().took(stats.busy_s - busy_s, stats.inferences - inferences)
    return vectors, outcomes


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
