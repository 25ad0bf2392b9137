"""What the child of a node says of itself, and when it stops trusting its device.

The child tells through the node's state file; what follows from it, the parent decides.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from embedq.contract import Device
from embedq.errors import EmbedqError, SettingsError
from embedq_worker import watchdog
from embedq_worker.doubts import Failures, Pace
from embedq_worker.errors import EngineError, Reason
from embedq_worker.placement import Placement
from embedq_worker.serving import Serving
from embedq_worker.settings import WorkerSettings
from embedq_worker.state import NodeState, State, StateFile

log = logging.getLogger("embedq.worker")

#: Seconds after which a child that could not tell how it is tries again.
TELL_AGAIN_S = 1.0
#: Seconds that the parent has to end a child whose engine hangs, before the child ends itself.
PARENT_FIRST_S = 5.0


class Child:
    """The process of a node that owns its device."""

    def __init__(self, settings: WorkerSettings, pace_s: float = 0.0) -> None:
        """Begin as a child that starts.

        Args:
            settings: of the node.
            pace_s: what an inference took the child before this one; 0 if nobody knows.
        """
        self._settings = settings
        self._file = StateFile(settings.runtime_dir, settings.name)
        self._serving: Serving | None = None
        self._on_npu = False
        self._failures = Failures(settings.infer_failures, settings.infer_failures_window_s)
        self._pace = Pace(settings.slow_factor, settings.slow_batches, pace_s)
        before = self._file.read()
        #: Whether the child before this one died before it was ready.
        self.follows_early_death = before is not None and before.state is State.STARTING
        self.state = NodeState(State.STARTING, time.time(), os.getpid())
        self._told = False
        self._say(self.state)

    @property
    def serving(self) -> Serving | None:
        """What this child embeds with, or None if it may not serve."""
        return self._serving

    @property
    def on_npu(self) -> bool:
        """Whether what it embeds with is the NPU of the node, or plays it."""
        return self._on_npu

    def placed(self, placement: Placement) -> None:
        """Say where this child is about to open its engine."""
        self._say(replace(self.state, home=str(placement.home)))

    def serves(self, serving: Serving, placement: Placement) -> None:
        """Say that the engine is open and proven."""
        engine = serving.standard.engine
        self._serving = serving
        self._on_npu = placement.home is Device.NPU and not placement.degraded
        state = replace(
            self.state,
            device=str(engine.device),
            engine=engine.name,
            precision=str(engine.precision),
            card=serving.card,
        )
        if placement.degraded:
            self._say(state.now(State.DEGRADED, placement.reason))
        else:
            self._say(state.now(State.HEALTHY))

    def idles(self, reason: str) -> None:
        """Say that there is nothing to serve with, and that this is meant to be."""
        self._say(self.state.now(State.DEGRADED, reason))

    def failed(self, error: BaseException) -> None:
        """Say why no engine could be opened."""
        code, reason = describe(error, Reason.INIT_FAILED)
        self._say(self.state.now(State.FAILED, reason, code))

    def doubts(self, error: Exception) -> tuple[str, str]:
        """Weigh a failed batch, and stop serving if the device has lost its trust.

        Returns:
            The code and the sentence of the failure.
        """
        code, reason = describe(error, Reason.ENGINE_FAILED)
        kind = error.reason if isinstance(error, EngineError) else Reason.ENGINE_FAILED
        if self._failures.are_too_many(kind, time.monotonic()):
            self.distrusts(code, reason)
        return code, reason

    def took(self, seconds: float, inferences: int) -> None:
        """Take note of how long a batch kept the NPU; a slow one's vectors are right all the same.

        Args:
            seconds: in which the device computed for it.
            inferences: in it.
        """
        if self._on_npu and inferences and self._pace.is_slow(seconds / inferences):
            self.distrusts(
                Reason.SLOW,
                f"Its last {self._settings.slow_batches} batches took over "
                f"{self._settings.slow_factor:g} times as long as the first ones.",
            )

    def distrusts(self, code: str, reason: str) -> None:
        """Stop serving; the parent replaces this process once it has let go of its batch."""
        log.error("device_distrusted node=%s code=%s reason=%s", self._settings.name, code, reason)
        self._serving = None
        self._say(self.state.now(State.DEGRADED, reason, code))

    @contextmanager
    def calling_engine(self) -> Iterator[None]:
        """Let nobody wait for ever for the body, a call of the engine.

        On an NPU the parent ends this process in time, for the batch is not to blame. The process
        ends itself where the parent cannot, and on a CPU, where a text may well be.
        """
        self._say(replace(self.state, busy_since=time.monotonic()))
        limit_s = self._settings.engine_deadline_s + (PARENT_FIRST_S if self._on_npu else 0.0)
        try:
            with watchdog.deadline(limit_s):
                yield
        finally:
            self._say(replace(self.state, busy_since=0.0, pace_s=self._pace.known_s))

    def tell_until_heard(self) -> None:
        """Tell again until it is written: nothing else would, and the parent consumes nothing."""
        while not self._told:
            time.sleep(TELL_AGAIN_S)
            self._say(self.state)

    def close(self) -> None:
        """Give the devices back."""
        if self._serving is not None:
            self._serving.close()

    def _say(self, state: NodeState) -> None:
        self.state, self._told = state, False
        try:
            self._file.write(state)
            self._told = True
        except (OSError, SettingsError) as error:
            # A full disk must not fail a batch: Celery would acknowledge it, and it would be gone.
            log.warning(
                "state_not_written node=%s reason=%s", self._settings.name, type(error).__name__
            )


def describe(error: BaseException, otherwise: Reason) -> tuple[str, str]:
    """Return the code and a sentence of an error; one that is not ours may quote a text."""
    if isinstance(error, EngineError):
        return str(error.reason), str(error)
    if isinstance(error, EmbedqError):
        return error.code, str(error)
    return str(otherwise), type(error).__name__
