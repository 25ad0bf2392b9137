"""Isolation mode: embed a batch text by text, to find the text that kills the process.

The offset of each text is written to the ledger before the text is computed, so the next process
knows where its predecessor died. A text gets full points for a failure of its own: the engine
raised on it but not on a control text, or the process crashed, by SIGSEGV or its watchdog. A
process killed from outside counts little, as anything may have killed it. After two failures the
text is tried once on the CPU, and after that it is dead-lettered.

The remaining texts are then embedded together, as in any batch: other groupings differ in the last
bit, and a batch that was isolated by accident must give the same bytes as any other run.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from embedq.protocol.contract import Code, Outcome, Status
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import OutcomeTable, Vectors
from embedq.store import dead_letters
from embedq.store.ledger import AttemptLog
from embedq_worker.errors import EngineError
from embedq_worker.main_process.rerouting import process_name
from embedq_worker.main_process.status import COUNTERS

if TYPE_CHECKING:
    from embedq_worker.pool_process.commit import ResultCommitter

log = logging.getLogger(__name__)

#: Attempt at which a batch runs in isolation mode.
ISOLATE_AT_ATTEMPT = 3

#: Points of a text for a failure of its own, for a process killed from outside (kill -9, a dead
#: worker, the kernel out of memory), and the points at which it is dead-lettered: three of the
#: former, or twelve of the latter in a row.
OWN_POINTS, OUTSIDE_POINTS, MAX_POINTS = 4, 1, 12

#: A text that every working engine embeds.
CONTROL_TEXT = "A harmless text."


class DeviceFault(Exception):
    """A device failed; no text is to blame.

    Attributes:
        error: the exception of the engine.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(type(error).__name__)
        self.error = error


#: Embeds a batch; the second argument requests the engine on the CPU.
Embed = Callable[[EmbedBatch, bool], tuple[Vectors, OutcomeTable]]


class Attempts(Protocol):
    """The attempts at each text of a batch, stored where a process that dies cannot lose them."""

    def count_deaths(self) -> dict[int, int]:
        """Add points for the texts at which processes died, and return offset -> points."""

    def start(self, offset: int) -> None:
        """Record that a text is about to be computed."""

    def end(self, offset: int, *, cleared: bool) -> None:
        """Record that the process survived a text; `cleared` if its vector was computed."""

    def add_points(self, offset: int, points: int) -> None:
        """Add points to a text."""

    def dead_letter(self, offset: int, reason: str) -> None:
        """Store a text among the dead letters, for an operator."""


class LedgerAttempts:
    """Attempts in the results Redis; see Attempts for the methods."""

    def __init__(self, backend: ResultCommitter, batch: EmbedBatch, crashed: str | None) -> None:
        self._backend = backend
        self._batch = batch
        self._crashed = crashed
        self._process = process_name(backend.settings.name, os.getpid())
        self._log = AttemptLog(backend.redis.client, batch.job)

    def count_deaths(self) -> dict[int, int]:
        index, attempts, call = self._batch.index, self._log, self._backend.call
        found = call(lambda: attempts.fetch(index))
        for process, offset in {**found.unfinished, **found.started}.items():
            if process == self._crashed:
                self._add(found.points, offset, OWN_POINTS)
                call(lambda o=offset, p=process: attempts.end(index, o, p, cleared=False))  # type: ignore[misc] # the defaults bind the loop variables
            elif process in found.started:
                self._add(found.points, offset, OUTSIDE_POINTS)
                call(lambda o=offset, p=process: attempts.mark_unfinished(index, o, p))  # type: ignore[misc] # as above
        return found.points

    def start(self, offset: int) -> None:
        index, process = self._batch.index, self._process
        self._backend.call(lambda: self._log.start(index, offset, process))

    def end(self, offset: int, *, cleared: bool) -> None:
        end, index, process = self._log.end, self._batch.index, self._process
        self._backend.call(lambda: end(index, offset, process, cleared=cleared))

    def _add(self, points_of: dict[int, int], offset: int, points: int) -> None:
        self.add_points(offset, points)
        points_of[offset] = points_of.get(offset, 0) + points

    def add_points(self, offset: int, points: int) -> None:
        index = self._batch.index
        self._backend.call(lambda: self._log.add_failure(index, offset, points))

    def dead_letter(self, offset: int, reason: str) -> None:
        batch = self._batch
        COUNTERS["set_aside"] += 1
        log.error("text_dead_lettered job=%s index=%d offset=%d", batch.job, batch.index, offset)
        letter = dead_letters.DeadLetter(
            id=f"{batch.job}:{batch.index}:{offset}",
            code=Code.SET_ASIDE,
            reason=reason,
            worker=self._backend.settings.name,
            at=time.time(),
            prompt=batch.spec.prompt,
            text=batch.texts[offset],
        )
        self._backend.call(lambda: dead_letters.add(self._backend.redis.client, letter))


def embed_isolated(
    batch: EmbedBatch, embed: Embed, attempts: Attempts
) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch text by text.

    Returns:
        float32 [n, D], NaN for a text that was dead-lettered or refused, and n outcomes.

    Raises:
        EngineError: the engine fails on the control text, so no text is to blame.
        DeviceFault: an NPU failed; whether a text is to blame is unknown.
    """
    points_of = attempts.count_deaths()
    vectors = np.full((len(batch.texts), batch.spec.dim), np.nan, np.float32)
    outcomes: list[Outcome] = []
    refused = dict(batch.refused)
    for offset, text in enumerate(batch.texts):
        if offset in batch.refused:
            outcomes.append(Outcome(status=Status.FAILED, code=batch.refused[offset]))
            continue
        alone = replace(batch, texts=[text], refused={})
        found = _embed_one(alone, offset, points_of.get(offset, 0), embed, attempts)
        if found is None:
            refused[offset] = Code.SET_ASIDE
            outcomes.append(Outcome(status=Status.FAILED, code=Code.SET_ASIDE))
        else:
            vectors[offset] = found[0][0]
            outcomes.append(found[1][0])
    rest = replace(batch, refused=refused)
    return _embed_together(rest, points_of, embed, attempts) or (
        vectors,
        OutcomeTable.from_outcomes(outcomes),
    )


def _embed_together(
    batch: EmbedBatch, points_of: Mapping[int, int], embed: Embed, attempts: Attempts
) -> tuple[Vectors, OutcomeTable] | None:
    """Embed the texts that succeeded alone as one batch, or return None if that is a risk.

    This attempt is recorded like a text behind the last one: if the process dies, it is not
    repeated.

    Raises:
        DeviceFault: an NPU failed.
    """
    together = len(batch.texts)
    good = [offset for offset in range(together) if offset not in batch.refused]
    if not good or any(points_of.get(offset, 0) >= OWN_POINTS for offset in [*good, together]):
        return None
    attempts.start(together)
    try:
        return embed(batch, False)
    except DeviceFault:  # the vectors of the single texts may be wrong as well
        raise
    except Exception:  # every text has a vector from its own run
        return None
    finally:
        attempts.end(together, cleared=False)


def _embed_one(
    alone: EmbedBatch, offset: int, points: int, embed: Embed, attempts: Attempts
) -> tuple[Vectors, OutcomeTable] | None:
    """Embed one text, or dead-letter it and return None at MAX_POINTS."""
    reason = "every process that computed it died or hung"
    control = replace(alone, texts=[CONTROL_TEXT])
    while points < MAX_POINTS:
        on_cpu = points >= MAX_POINTS - OWN_POINTS
        if points:
            embed(control, on_cpu)  # raises if the engine is broken
        attempts.start(offset)
        try:
            found = embed(alone, on_cpu)
        except DeviceFault:
            attempts.end(offset, cleared=False)
            raise
        except Exception as error:
            # The message of any other exception may quote the text.
            reason = str(error) if isinstance(error, EngineError) else type(error).__name__
            attempts.end(offset, cleared=False)
            embed(control, on_cpu)
            points += OWN_POINTS
            attempts.add_points(offset, OWN_POINTS)
        else:
            attempts.end(offset, cleared=bool(points))
            return found
    attempts.dead_letter(offset, reason)
    return None
