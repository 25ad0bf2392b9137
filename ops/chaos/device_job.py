"""Run the job of a device-fault run: an endless stream of texts, each vector checked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

import numpy as np

from embedq import Client
from embedq.errors import EmbedqError
from embedq.jobs.batches import Embedding
from embedq.protocol.contract import Status
from embedq.settings import ProducerSettings
from embedq.testing import stub_vectors

#: Texts per batch.
BATCH_TEXTS: Final = 16
#: Seconds without a vector after which the job counts as stuck.
SILENCE_S: Final = 90.0


class Job:
    """A job that runs in a thread until `finish` is called.

    Attributes:
        done: texts returned, in order.
        rerouted: of these, rerouted by an NPU worker.
        wrong, failed: of these, with a wrong vector, and without one.
        twice, lost: texts returned again, and never returned.
        error: why the job ended early.
    """

    def __init__(self, urls: dict[str, str]) -> None:
        self._settings = ProducerSettings.load(
            broker_url=urls["EMBEDQ_BROKER_URL"],
            results_url=urls["EMBEDQ_RESULTS_URL"],
            model="stub",
            batch_texts=BATCH_TEXTS,
            visibility_timeout_s=5,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="job")
        self._sent = 0
        self.done = self.rerouted = 0
        self.wrong = self.failed = self.twice = self.lost = 0
        self.error = ""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def finish(self) -> None:
        """Send no more texts, and wait for those in flight."""
        self._stop.set()
        self._thread.join(2 * SILENCE_S)
        if self._thread.is_alive():
            self.error = self.error or "the job did not end"
        self.lost = self._sent - self.done

    def _texts(self) -> Iterator[str]:
        while not self._stop.is_set():
            yield f"text {self._sent}"
            self._sent += 1

    def _run(self) -> None:
        try:
            with Client(settings=self._settings) as client:
                for one in client.submit(self._texts()).results(timeout_s=SILENCE_S):
                    self._check(one)
        except EmbedqError as error:
            self.error = str(error)

    def _check(self, one: Embedding) -> None:
        if one.id != self.done:
            self.twice += 1
            return
        self.done += 1
        self.rerouted += one.outcome.rerouted
        if one.outcome.status is not Status.OK:
            self.failed += 1
        elif not np.array_equal(one.vector, stub_vectors([f"text {one.id}"])[0]):
            self.wrong += 1
