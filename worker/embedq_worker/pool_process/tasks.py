"""The Celery task `embedq.embed_batch`: embed a batch and commit its vectors to the ledger."""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.exceptions import Reject

from embedq.errors import ContractError
from embedq.observability import tracing
from embedq.protocol.contract import TASK_NAME, Accuracy, Precision, VectorSpec
from embedq.protocol.message import EmbedBatch, Header
from embedq.protocol.values import OutcomeTable, Vectors
from embedq.store.ledger import Attempt
from embedq_worker.errors import EngineError, NotQuantized
from embedq_worker.inference.embedder import RowSink
from embedq_worker.inference.serving import EngineSet, VerifiedEngine
from embedq_worker.inference.stats import EngineStats
from embedq_worker.main_process import rerouting
from embedq_worker.main_process.app import app
from embedq_worker.main_process.device_health import may_answer
from embedq_worker.main_process.rerouting import CRASHED_PROCESS_HEADER, BatchTask
from embedq_worker.pool_process.commit import ResultCommitter, requeue_after_delay
from embedq_worker.pool_process.isolation import (
    ISOLATE_AT_ATTEMPT,
    Attempts,
    DeviceFault,
    LedgerAttempts,
    embed_isolated,
)
from embedq_worker.pool_process.process import this_process

log = logging.getLogger(__name__)


@app.task(
    base=BatchTask,
    name=TASK_NAME,
    bind=True,
    ignore_result=True,
    # The batch of a pool process that died is retried at once and without limit; the ledger counts
    # the attempts, and isolation mode ends them. Celery's default is three, three minutes apart.
    max_retries=None,
    default_retry_delay=0,
)
def embed_batch(self: Any, body: object) -> dict[str, Any]:
    """Embed one batch and commit it, or requeue or reroute it."""
    began = time.monotonic()
    backend: ResultCommitter = self.backend
    address = Header.address(body)
    if address is None:
        log.error("message_refused reason=%s", "it has no valid job id and batch index")
        return {"refused": "malformed_message"}
    job, index = address

    worker = _engines_or_requeue(self, body, job, index)
    verdict, tries = backend.start_attempt(job, index)
    if verdict is not Attempt.RUN:
        log.info("batch_skipped job=%s index=%d reason=%s", job, index, verdict)
        return {"skipped": str(verdict)}
    stats, upload = EngineStats(), None
    try:
        batch = _decode(body, worker)
        verified = _engine_for(worker, batch.spec)
        attempts = None
        if tries >= ISOLATE_AT_ATTEMPT:
            crashed = getattr(self.request, CRASHED_PROCESS_HEADER, None)
            attempts = LedgerAttempts(backend, batch, crashed)
        else:
            upload = backend.upload(batch)
        vectors, outcomes = _embed(batch, worker, verified, stats, attempts, upload)
    except _Refused as refused:
        log.error("batch_failed job=%s index=%d code=%s", job, index, refused.code)
        backend.commit_failure(job, index, refused.code, refused.detail)
        return {"failed": refused.code}
    except DeviceFault as fault:
        # First, so that the main process stops consuming.
        why = this_process().record_failure(fault.error)
        backend.undo_attempt(job, index)
        if upload is not None:
            upload.discard()
        rerouting.reroute_or_requeue(self, body, *why)
    except Reject:
        raise
    except Exception as error:  # Celery would acknowledge the batch, which would be lost
        # The message of any other exception may quote a text.
        reason = str(error) if isinstance(error, EngineError) else type(error).__name__
        if upload is not None:
            upload.discard()
        log.error("engine_failed job=%s index=%d reason=%s", job, index, reason)
        raise requeue_after_delay(reason) from None

    embed_s = time.monotonic() - began
    with tracing.span("embedq.commit", index=index):
        committed = backend.commit(batch, vectors, outcomes, upload)
    task_s = time.monotonic() - began
    verified.embedder.meter.add(
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
        verified.engine.name,
        verified.engine.device,
        verified.engine.precision,
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
    """A batch is committed as failed instead of computed."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(code)
        self.code, self.detail = code, detail


def _engines_or_requeue(task: Any, body: object, job: str, index: int) -> EngineSet:
    queue = (task.request.delivery_info or {}).get("routing_key", "")
    worker = this_process().engines
    if worker is not None and may_answer(queue, worker.standard.engine.device):
        return worker
    if isinstance(body, dict) and rerouting.can_reroute(queue, body):
        rerouting.reroute_or_requeue(
            task, body, this_process().status.code, "The worker has stopped serving."
        )
    log.warning("batch_requeued job=%s index=%d reason=not serving", job, index)
    raise requeue_after_delay("not serving")


def _engine_for(worker: EngineSet, spec: VectorSpec) -> VerifiedEngine:
    if spec.quantized != (worker.model_info.quantized if spec.accuracy is Accuracy.INT8 else ""):
        raise _Refused(
            NotQuantized.code,
            f"The job asks for the quantized model {spec.quantized or '(none)'}; the worker has "
            f"{worker.model_info.quantized or 'none'}. Quantize once, copy the cache to each "
            "worker, restart the workers, and run the job again.",
        )
    stored = worker.model_info.weights_precision
    if spec.accuracy is Accuracy.EXACT and stored != Precision.F32:
        raise _Refused(
            "not_exact",
            f"The job asks for accuracy exact, but the weights of {worker.model_info.label} are "
            f"{stored}. Use accuracy standard, or serve the model's f32 file.",
        )
    try:
        return worker.engine_for(spec.accuracy)
    except NotQuantized as error:
        raise _Refused(error.code, str(error)) from error


def _embed(
    batch: EmbedBatch,
    worker: EngineSet,
    verified: VerifiedEngine,
    stats: EngineStats,
    attempts: Attempts | None,
    sink: RowSink | None,
) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch; in isolation mode if `attempts` is given.

    Raises:
        DeviceFault: the NPU failed or its vectors are wrong.
    """
    if attempts is None:
        return _infer(verified, worker, batch, stats, sink)
    log.warning(
        "isolation_started job=%s index=%d texts=%d", batch.job, batch.index, len(batch.texts)
    )

    def embed_one(alone: EmbedBatch, on_cpu: bool) -> tuple[Vectors, OutcomeTable]:
        use_cpu = on_cpu and this_process().on_npu
        engine = worker.engine_for(Accuracy.EXACT) if use_cpu else verified
        return _infer(engine, worker, alone, stats)

    return embed_isolated(batch, embed_one, attempts)


def _infer(
    verified: VerifiedEngine,
    worker: EngineSet,
    batch: EmbedBatch,
    stats: EngineStats,
    sink: RowSink | None = None,
) -> tuple[Vectors, OutcomeTable]:
    """Run the engine on a batch; on an NPU, check the vectors and the duration."""
    on_npu = this_process().on_npu and verified.engine is worker.standard.engine
    inferences, busy_s = stats.inferences, stats.busy_s
    try:
        with this_process().engine_call(), tracing.span("embedq.engine", texts=len(batch.texts)):
            vectors, outcomes = verified.embedder.embed(batch, stats, sink)
            if on_npu:
                worker.check(batch, vectors)
    except Exception as error:
        if on_npu:
            raise DeviceFault(error) from error
        raise
    if on_npu:
        this_process().record_duration(stats.busy_s - busy_s, stats.inferences - inferences)
    return vectors, outcomes


def _decode(body: object, worker: EngineSet) -> EmbedBatch:
    try:
        batch = EmbedBatch.from_message(body)
    except ContractError as error:
        raise _Refused(error.code, str(error)) from error
    if batch.spec.model != worker.model_info.identity:
        raise _Refused(
            "wrong_model",
            f"The job asks for model {batch.spec.model[:12]}; this worker serves "
            f"{worker.model_info.label} ({worker.model_info.identity[:12]}). Start a worker with "
            "the job's model, or run the job again.",
        )
    if (batch.spec.dim, batch.spec.max_length) != (
        worker.model_info.dim,
        worker.model_info.max_length,
    ):
        raise _Refused("wrong_model", "The job's dimension or length is not the model's.")
    return batch
