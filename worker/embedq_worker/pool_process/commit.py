"""Upload the vectors of a batch while it is computed, and commit them to the ledger.

ResultCommitter is Celery's result backend, but `store_result` writes nothing: a batch is done when
its commit is in the ledger, which accepts the first commit only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any, Final, TypeVar

import numpy as np
from celery.backends.base import BaseBackend
from celery.exceptions import Reject
from redis.exceptions import RedisError

from embedq.errors import QueueUnavailable
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import OutcomeTable, Vectors, encode, encode_failure, split_rows
from embedq.store.connection import RedisConnection
from embedq.store.ledger import Attempt, Ledger, StagedValues, StagedValuesExpired
from embedq_worker.inference.embedder import BatchResultBuilder
from embedq_worker.inference.packing import Indices
from embedq_worker.main_process.status import COUNTERS
from embedq_worker.settings import WorkerSettings

log = logging.getLogger(__name__)

#: Number of values from which a batch is uploaded in parts; a smaller one is sent by its commit.
MIN_VALUES: Final = 3

#: Delay before requeueing a batch that this process cannot serve, seconds. Without it a broken
#: engine receives the same batch dozens of times per second.
REQUEUE_DELAY_S = 1.0

#: Time to retry an operation on the results Redis before the batch is requeued, seconds.
COMMIT_TIMEOUT_S = 600.0

T = TypeVar("T")


class ResultUploader:
    """Encodes and stages each value of a batch as soon as its rows are final.

    Failures here are harmless: the commit sends every value that is not staged.
    """

    def __init__(self, batch: EmbedBatch, staging: StagedValues, thread: Executor) -> None:
        """Prepare the upload of a batch.

        Args:
            batch: the batch.
            staging: staged values of this attempt.
            thread: a single thread, which waits for Redis while the engine computes.
        """
        self._fingerprint, self._dtype = batch.spec.fingerprint(), batch.spec.dtype
        self._pieces = list(split_rows(len(batch.texts), batch.spec.dim, self._dtype)) or [(0, 0)]
        self._starts = np.array([start for start, _ in self._pieces], np.intp)
        self._missing = np.array([stop - start for start, stop in self._pieces], np.intp)
        self._staging, self._thread = staging, thread
        self._is_active = len(self._pieces) >= MIN_VALUES
        self._sent: list[Future[None]] = []

    def on_rows_final(self, builder: BatchResultBuilder, rows: Indices) -> None:
        """Stage the values that are complete now that these rows are final."""
        if not self._is_active:
            return
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        before = self._missing > 0
        self._missing -= np.bincount(parts, minlength=len(self._missing))
        for part in np.nonzero(before & (self._missing == 0))[0].tolist():
            self._sent.append(self._thread.submit(self._send, builder, part))

    def values(self, vectors: Vectors, outcomes: OutcomeTable) -> list[bytes | str]:
        """Return for each value of the batch its staged key, or the encoded value.

        Args:
            vectors: float32 [n, D].
            outcomes: n outcomes.
        """
        self._join()
        staged = self._staging.keys
        return [
            staged.get(part) or self._encode(vectors, outcomes.rows(start, stop), start, stop)
            for part, (start, stop) in enumerate(self._pieces)
        ]

    def forget_staged(self) -> None:
        """Send every value with the commit, as the staged ones have expired."""
        self._staging.keys.clear()

    def discard(self) -> None:
        """Delete the staged values; if Redis refuses, they expire."""
        self._is_active = False
        self._join()
        try:
            self._staging.discard()
        except RedisError as error:
            log.info("staged_values_left reason=%s", type(error).__name__)

    def _send(self, builder: BatchResultBuilder, part: int) -> None:
        start, stop = self._pieces[part]
        if not self._is_active:
            return
        value = self._encode(builder.vectors, builder.outcomes(start, stop), start, stop)
        try:
            self._is_active = self._staging.write(part, value)
        except RedisError as error:
            # Redis is full or away. The commit retries; this thread must not, as the engine's
            # timeout runs.
            self._is_active = False
            log.info("staging_stopped reason=%s", type(error).__name__)

    def _encode(self, vectors: Vectors, outcomes: OutcomeTable, start: int, stop: int) -> bytes:
        return encode(vectors[start:stop], outcomes, self._fingerprint, self._dtype)

    def _join(self) -> None:
        for sent in self._sent:
            sent.result()
        self._sent.clear()


def requeue_after_delay(reason: str) -> Reject:
    """Sleep REQUEUE_DELAY_S, and return the exception that requeues the running batch.

    Celery acknowledges a batch that fails with any other exception, and the batch would be lost.
    """
    time.sleep(REQUEUE_DELAY_S)
    return Reject(reason, requeue=True)


class ResultCommitter(BaseBackend):
    """Celery's result backend, which commits to the ledger."""

    def __init__(self, app: Any, url: str | None = None, **options: Any) -> None:
        super().__init__(app, url=url, **options)
        self.settings: WorkerSettings = app.conf.embedq.settings
        self._thread: ThreadPoolExecutor | None = None

    @cached_property
    def redis(self) -> RedisConnection:
        """The results Redis; opened in the process that uses it, after the fork."""
        return RedisConnection.open(self.settings.results_url, retry_timeout_s=COMMIT_TIMEOUT_S)

    def start_attempt(self, job: str, index: int) -> tuple[Attempt, int]:
        """Count an attempt and return whether to compute the batch; see Ledger.start_attempt."""
        verdict, tries = self.call(lambda: Ledger(self.redis.client, job).start_attempt(index))
        COUNTERS["redelivered"] += tries > 1
        return verdict, tries

    def undo_attempt(self, job: str, index: int) -> None:
        """Undo the count of an attempt that a device failure ended; not retried."""
        try:
            Ledger(self.redis.client, job).undo_attempt(index)
        except RedisError as error:
            log.info(
                "attempt_undo_failed job=%s index=%d reason=%s", job, index, type(error).__name__
            )

    def upload(self, batch: EmbedBatch) -> ResultUploader:
        """Prepare to upload the vectors of a batch while it is computed."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "embedq-upload")
        return ResultUploader(
            batch, StagedValues(self.redis.client, batch.job, batch.index), self._thread
        )

    def commit(
        self,
        batch: EmbedBatch,
        vectors: Vectors,
        outcomes: OutcomeTable,
        upload: ResultUploader | None = None,
    ) -> bool | None:
        """Commit the vectors of a batch; see Ledger.commit.

        Args:
            batch: the batch.
            vectors: float32 [n, D].
            outcomes: n outcomes.
            upload: has staged some of the values; None sends them all with the commit.

        Raises:
            Reject: Redis was away for COMMIT_TIMEOUT_S; the batch is requeued.
        """
        upload = upload or self.upload(batch)
        ledger = Ledger(self.redis.client, batch.job)

        def commit() -> bool | None:
            values = upload.values(vectors, outcomes)
            return self.call(lambda: ledger.commit(batch.index, values, n_texts=len(vectors)))

        try:
            committed = commit()
        except StagedValuesExpired:
            upload.forget_staged()
            committed = commit()
        COUNTERS["duplicates"] += committed is False
        return committed

    def commit_failure(self, job: str, index: int, code: str, detail: str) -> bool | None:
        """Commit a batch as failed, so that its producer gets an outcome for each text."""
        COUNTERS["refused"] += 1
        value = encode_failure(code, detail)
        return self.call(lambda: Ledger(self.redis.client, job).commit(index, [value]))

    def store_result(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the task has committed the batch."""

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:
        """Return the state of a task as Celery expects it, from the ledger."""
        job, _, rest = task_id.partition(":")
        index = rest.partition(":")[0]
        done = index.isdigit() and self.call(
            lambda: Ledger(self.redis.client, job).is_committed(int(index))
        )
        status = "SUCCESS" if done else "PENDING"
        return {"status": status, "result": None, "traceback": None, "children": []}

    def call(self, action: Callable[[], T]) -> T:
        """Run an operation on the results Redis with retries.

        Raises:
            Reject: Redis is unavailable; the batch is requeued.
        """
        try:
            return self.redis.call(action)
        except QueueUnavailable as error:
            log.error("batch_requeued reason=%s", error)
            raise requeue_after_delay(str(error)) from error
