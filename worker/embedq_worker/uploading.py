"""The vectors of a batch on their way to Redis while the rest of it is still computed."""

from __future__ import annotations

import logging
from concurrent.futures import Executor, Future
from typing import Final

import numpy as np
from redis.exceptions import RedisError

from embedq.message import EmbedBatch
from embedq.outcomes import OutcomeTable
from embedq.staging import Staging
from embedq.vectors import Vectors, encode, split_rows
from embedq_worker.answer import Answer
from embedq_worker.packing import Indices

log = logging.getLogger("embedq.worker")

#: Values below which a batch is small enough to be written by its commit.
MIN_VALUES: Final = 3


class Upload:
    """Encodes each value of a batch once its rows are final, and stages it.

    What goes wrong here is of no consequence: the commit sends whatever is not staged.
    """

    def __init__(self, batch: EmbedBatch, staging: Staging, thread: Executor) -> None:
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

    def settle(self, answer: Answer, rows: Indices) -> None:
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

    def _send(self, answer: Answer, part: int) -> None:
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
