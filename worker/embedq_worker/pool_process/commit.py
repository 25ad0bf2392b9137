"""Upload and commit results.

The vectors of a batch on their way to Redis while the rest of it is still computed.

The result backend: commits a batch's vectors to the ledger, and reads them back by task id.

Celery's own storing is switched off: `store_result` writes nothing. A batch is done when its commit
is in the ledger, and the ledger takes the first commit only.
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


#: Values below which a batch is small enough to be written by its commit.
MIN_VALUES: Final = 3


class ResultUploader:
    """Encodes each value of a batch once its rows are final, and stages it.

    What goes wrong here is of no consequence: the commit sends whatever is not staged.
    """

    def __init__(self, batch: EmbedBatch, staging: StagedValues, thread: Executor) -> None:
        """Prepare for a batch.

        Args:
            batch: what is embedded.
            staging: of this execution.
            thread: one, which waits for Redis so that nobody else does.
        """
        self._fingerprint, self._dtype = batch.spec.fingerprint(), batch.spec.dtype
        self._pieces = list(split_rows(len(batch.texts), batch.spec.dim, self._dtype)) or [(0, 0)]
        self._starts = np.array([start for start, _ in self._pieces], np.intp)
        self._missing = np.array([stop - start for start, stop in self._pieces], np.intp)
        self._staging, self._thread = staging, thread
        self._wanted = len(self._pieces) >= MIN_VALUES
        self._sent: list[Future[None]] = []

    def on_rows_final(self, answer: BatchResultBuilder, rows: Indices) -> None:
        """Note that these rows are final, and send the values that they complete."""
        if not self._wanted:
            return
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        before = self._missing > 0
        self._missing -= np.bincount(parts, minlength=len(self._missing))
        for part in np.nonzero(before & (self._missing == 0))[0].tolist():
            self._sent.append(self._thread.submit(self._send, answer, part))

    def values(self, vectors: Vectors, outcomes: OutcomeTable) -> list[bytes | str]:
        """Return every value of the batch: its key where it is staged, else itself.

        Args:
            vectors: float32 [n, D].
            outcomes: n outcomes.
        """
        self._wait()
        staged = self._staging.keys
        return [
            staged.get(part) or self._encode(vectors, outcomes.rows(start, stop), start, stop)
            for part, (start, stop) in enumerate(self._pieces)
        ]

    def forget(self) -> None:
        """Note that what was staged has left Redis, so that the values themselves are sent."""
        self._staging.keys.clear()

    def discard(self) -> None:
        """Delete what is staged, if Redis lets us; else it fades."""
        self._wanted = False
        self._wait()
        try:
            self._staging.discard()
        except RedisError as error:
            log.info("staged_values_left reason=%s", type(error).__name__)

    def _send(self, answer: BatchResultBuilder, part: int) -> None:
        start, stop = self._pieces[part]
        if not self._wanted:
            return
        value = self._encode(answer.vectors, answer.outcomes(start, stop), start, stop)
        try:
            self._wanted = self._staging.write(part, value)
        except RedisError as error:
            # Full, or away: the commit waits for it, which is not done under a deadline.
            self._wanted = False
            log.info("staging_stopped reason=%s", type(error).__name__)

    def _encode(self, vectors: Vectors, outcomes: OutcomeTable, start: int, stop: int) -> bytes:
        return encode(vectors[start:stop], outcomes, self._fingerprint, self._dtype)

    def _wait(self) -> None:
        for sent in self._sent:
            sent.result()
        self._sent.clear()


T = TypeVar("T")


#: Seconds that a child which may not or cannot serve holds a batch before it goes back to its
#: queue: without it a broken engine asked for the same batch 46 times a second, and one whose Redis
#: refuses 150 times (measured 2026-11-28).
REQUEUE_DELAY_S = 1.0


#: Time to retry an operation on the results Redis before the batch is requeued, seconds.
COMMIT_TIMEOUT_S = 600.0


def requeue_after_delay(reason: str) -> Reject:
    """Pause, so that another worker may ask, and return what gives the batch back to its queue.

    Any other error would be acknowledged as a failure, and the batch would be gone.
    """
    time.sleep(REQUEUE_DELAY_S)
    return Reject(reason, requeue=True)


class ResultCommitter(BaseBackend):
    """Celery's view of the ledger."""

    def __init__(self, app: Any, url: str | None = None, **options: Any) -> None:
        super().__init__(app, url=url, **options)
        self.settings: WorkerSettings = app.conf.embedq.settings
        self._thread: ThreadPoolExecutor | None = None

    @cached_property
    def redis(self) -> RedisConnection:
        """The results Redis; opened in the process that uses it, after the fork."""
        return RedisConnection.open(self.settings.results_url, retry_timeout_s=COMMIT_TIMEOUT_S)

    def start_attempt(self, job: str, index: int) -> tuple[Attempt, int]:
        """Ask the ledger whether a batch still wants computing; see Ledger.start_attempt."""
        verdict, tries = self.call(lambda: Ledger(self.redis.client, job).start_attempt(index))
        COUNTERS["redelivered"] += tries > 1
        return verdict, tries

    def undo_attempt(self, job: str, index: int) -> None:
        """Take back the count of a delivery that a device ended; tried once, for it may fail."""
        try:
            Ledger(self.redis.client, job).undo_attempt(index)
        except RedisError as error:
            log.info(
                "attempt_undo_failed job=%s index=%d reason=%s", job, index, type(error).__name__
            )

    def upload(self, batch: EmbedBatch) -> ResultUploader:
        """Prepare to send the vectors of a batch while they are computed."""
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
            batch: what was embedded.
            vectors: float32 [n, D].
            outcomes: n outcomes.
            upload: what has sent some of them ahead.

        Raises:
            Reject: Redis stayed away too long; the batch goes back to its queue.
        """
        upload = upload or self.upload(batch)
        ledger = Ledger(self.redis.client, batch.job)

        def commit() -> bool | None:
            values = upload.values(vectors, outcomes)
            return self.call(lambda: ledger.commit(batch.index, values, n_texts=len(vectors)))

        try:
            committed = commit()
        except StagedValuesExpired:
            upload.forget()
            committed = commit()
        COUNTERS["duplicates"] += committed is False
        return committed

    def commit_failure(self, job: str, index: int, code: str, detail: str) -> bool | None:
        """Commit the refusal of a whole batch, so that its producer gets an answer."""
        COUNTERS["refused"] += 1
        value = encode_failure(code, detail)
        return self.call(lambda: Ledger(self.redis.client, job).commit(index, [value]))

    def store_result(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: the task has committed already."""

    def get_task_meta(self, task_id: str, cache: bool = True) -> dict[str, Any]:
        """Say what the ledger knows of a task, in Celery's words."""
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
