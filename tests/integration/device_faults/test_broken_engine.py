"""A CPU worker whose engine fails delays the retry."""

from __future__ import annotations

import itertools
import os
from datetime import datetime
from pathlib import Path

import numpy as np
from tests.support.redis import RedisProcess
from tests.support.workers import stub_worker

from embedq import Client
from embedq.testing import stub_vectors


def test_batch_of_a_failing_engine_is_requeued_after_a_delay(
    redis: RedisProcess, short_dir: Path
) -> None:
    # The delay lets a healthy worker consume the batch first.
    script = short_dir / "faults"
    with stub_worker(redis, short_dir, "broken", EMBEDQ_STUB_FAULTS=os.fspath(script)) as worker:
        script.write_text("infer=raise first=2\n")
        with Client(settings=redis.settings()) as client:
            vectors = client.encode(["a text"])

        failed = [line[:23] for line in worker.lines("engine_failed")]
        times = [datetime.strptime(at, "%Y-%m-%d %H:%M:%S,%f") for at in failed]
        pauses = [(b - a).total_seconds() for a, b in itertools.pairwise(times)]
    assert np.array_equal(vectors, stub_vectors(["a text"]))
    assert len(pauses) == 1
    assert pauses[0] >= 0.9
