"""The one task: a batch comes in, its vectors are committed to the ledger."""

from __future__ import annotations

import logging
import time
from typing import Any

from celery.exceptions import Reject

from embedq.contract import TASK_NAME, EmbedBatch, Header
from embedq.errors import ContractError
from embedq.ledger import Verdict
from embedq_worker.app import app
from embedq_worker.backend import LedgerBackend
from embedq_worker.errors import EngineError
from embedq_worker.lifecycle import Serving, serving

log = logging.getLogger("embedq.worker")

#: Deliveries of a batch that never reached a commit after which it is answered as failed.
MAX_TRIES = 5
#: Seconds that a child which may not serve holds a batch before it goes back to its queue.
HAND_BACK_PAUSE_S = 1.0


@app.task(
    name=TASK_NAME,
    bind=True,
    ignore_result=True,
    # A lost child's batch comes back at once; the default would park it for three minutes.
    max_retries=MAX_TRIES + 1,
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

    node = _may_serve(job, index)
    verdict, tries = backend.begin(job, index)
    if verdict is not Verdict.GO:
        log.info("batch_skipped job=%s index=%d reason=%s", job, index, verdict)
        return {"skipped": str(verdict)}
    try:
        batch = _accept(body, node, tries)
        vectors, outcomes = node.embedder.embed(batch)
    except _Refused as refused:
        log.error("batch_failed job=%s index=%d code=%s", job, index, refused.code)
        backend.commit_failure(job, index, refused.code, refused.detail, refused.fingerprint)
        return {"failed": refused.code}
    except EngineError as error:
        log.error("engine_failed job=%s index=%d reason=%s", job, index, error)
        raise Reject(str(error), requeue=True) from error

    infer_s = time.monotonic() - began
    committed = backend.commit(batch, vectors, outcomes)
    log.info(
        "batch_done job=%s index=%d engine=%s texts=%d tokens=%d embed_ms=%.0f commit_ms=%.1f "
        "committed=%s",
        job,
        index,
        node.engine.name,
        len(batch.texts),
        int(outcomes.n_tokens.sum()),
        1e3 * infer_s,
        1e3 * (time.monotonic() - began - infer_s),
        {True: "yes", False: "duplicate", None: "job_gone"}[committed],
    )
    return {"rows": len(vectors)}


class _Refused(Exception):
    """A batch that is answered as failed instead of computed."""

    def __init__(self, code: str, detail: str, fingerprint: bytes = bytes(8)) -> None:
        super().__init__(code)
        self.code, self.detail, self.fingerprint = code, detail, fingerprint


def _may_serve(job: str, index: int) -> Serving:
    """Return what to embed with, or put the batch back: it did nothing wrong."""
    node = serving()
    if node is None:
        log.warning("batch_handed_back job=%s index=%d reason=not serving", job, index)
        time.sleep(HAND_BACK_PAUSE_S)
        raise Reject("not serving", requeue=True)
    return node


def _accept(body: object, node: Serving, tries: int) -> EmbedBatch:
    """Decode a batch that this node can answer; raise _Refused with the reason otherwise."""
    try:
        batch = EmbedBatch.from_message(body)
    except ContractError as error:
        raise _Refused(error.code, str(error), _fingerprint(body)) from error
    fingerprint = batch.spec.fingerprint()
    if batch.spec.model != node.card.identity:
        raise _Refused(
            "wrong_model",
            f"The job asks for model {batch.spec.model[:12]}; node serves {node.card.label} "
            f"({node.card.identity[:12]}). Start a node with the job's model, or run the job anew.",
            fingerprint,
        )
    if (batch.spec.dim, batch.spec.max_length) != (node.card.dim, node.card.max_length):
        raise _Refused(
            "wrong_model", "The job's dimension or length is not the model's.", fingerprint
        )
    if tries > MAX_TRIES:
        raise _Refused(
            "gave_up",
            f"The batch was begun {tries - 1} times and no process survived or finished it.",
            fingerprint,
        )
    return batch


def _fingerprint(body: object) -> bytes:
    """Return the fingerprint that the producer will expect, as far as it can be told."""
    try:
        return Header.from_message(body).spec.fingerprint()
    except ContractError:
        return bytes(8)
