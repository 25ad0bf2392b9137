"""The collector of a job: reads its commits, fetches their vectors and deletes them from Redis."""

from __future__ import annotations

from embedq.errand import Errand
from embedq.errors import CorruptValue, ResultExpired
from embedq.finished import assemble
from embedq.job_state import Outstanding
from embedq.ledger import Commit
from embedq.pump import Pump

#: Milliseconds that one read of the stream waits before the job looks around.
READ_BLOCK_MS = 1_000
#: Commits taken in one read.
READ_COUNT = 32
#: Times a batch whose stored vectors were lost or damaged is computed again.
MAX_RECOMPUTES = 3


class Collector:
    """Brings batches back, and has them computed again whose vectors did not survive in Redis."""

    def __init__(self, errand: Errand, pump: Pump) -> None:
        self._errand = errand
        self._pump = pump

    def read(self, left_s: float | None) -> list[Commit]:
        """Return new commits, waiting about a second for them, and never longer than left_s.

        Raises:
            QueueUnavailable: Redis stayed away.
        """
        block_ms = READ_BLOCK_MS
        if left_s is not None:  # to Redis, 0 means for ever
            block_ms = max(1, min(block_ms, int(1e3 * left_s)))
        ledger = self._errand.ledger
        return self._errand.patiently(
            lambda: ledger.read_commits(count=READ_COUNT, block_ms=block_ms)
        )

    def collect(self, commits: list[Commit]) -> None:
        """Fetch, check and keep the vectors of new commits, then delete them from Redis.

        Raises:
            ResultExpired: vectors were lost in Redis again and again.
            QueueUnavailable: Redis stayed away.
        """
        for commit in commits:
            with self._errand.trace.collecting(index=commit.index):
                self._collect_one(commit)

    def _collect_one(self, commit: Commit) -> None:
        errand, state = self._errand, self._errand.state
        waiting = state.outstanding.get(commit.index)
        if waiting is not None:
            values = errand.patiently(lambda: errand.ledger.fetch_values(commit))
            try:
                finished = assemble(waiting.slice, values, errand.spec, errand.fingerprint)
            except CorruptValue as error:
                self._recompute(commit, waiting, error)
                return
            state.ready[commit.index] = finished
            del state.outstanding[commit.index]
        errand.patiently(lambda: errand.ledger.take([commit]))

    def _recompute(self, commit: Commit, waiting: Outstanding, error: CorruptValue) -> None:
        errand = self._errand
        waiting.recomputes += 1
        if waiting.recomputes > MAX_RECOMPUTES:
            raise ResultExpired(
                f"Batch {commit.index} of job {errand.id} was computed {MAX_RECOMPUTES} times and "
                f"its vectors were lost or damaged in Redis each time: {error}"
            ) from error
        errand.link.on_wait(f"Batch {commit.index} is computed again: {error}")
        errand.open()  # in case Redis forgot the whole job
        errand.patiently(lambda: errand.ledger.forget(commit))
        self._pump.publish(waiting.slice, waiting.recomputes)
