"""Isolation mode: one text at a time, for a batch that stopped the processes that tried it.

Before each text its offset is noted in the ledger, so that a process that dies leaves behind which
text it was at. A text is charged in full for a failure of its own: the engine raised on it and not
on a harmless text, or the process ended itself, as by SIGSEGV or the watchdog. A process that was
ended from outside may have been killed over anything, so it counts for little. A text that has
failed twice is tried once more, alone, on the CPU; after that it is set aside, and the rest of the
batch is embedded as if it were not there: together, because sums of other groups differ in the last
bit, and a batch that was merely unlucky must give the bytes of any other run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from embedq.protocol.contract import Code, Outcome, Status
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import OutcomeTable, Vectors
from embedq.store import dead_letters
from embedq.store.dead_letters import AttemptLog
from embedq_worker.errors import EngineError
from embedq_worker.main_process.rerouting import process_name
from embedq_worker.main_process.status import COUNTERS

if TYPE_CHECKING:
    from embedq_worker.pool_process.commit import ResultCommitter

log = logging.getLogger(__name__)


#: The delivery of a batch at which it runs in isolation mode.
ISOLATE_AT_ATTEMPT = 3


#: Points for a failure of a text's own, for a process ended from outside (kill -9, a dead worker,
#: the kernel out of memory), and those at which a text is set aside: three of the former, or twelve
#: of the latter in a row. Nothing but the text is likely to end a process twelve times at one text.
OWN_POINTS, OUTSIDE_POINTS, MAX_POINTS = 4, 1, 12


#: What a sound engine embeds without fail.
CONTROL_TEXT = "A harmless text."


class DeviceFault(Exception):
    """A device failed, which is never a text's doing.

    Attributes:
        error: what it raised.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(type(error).__name__)
        self.error = error


#: Embeds a batch; the flag asks for the engine on the CPU.
Embed = Callable[[EmbedBatch, bool], tuple[Vectors, OutcomeTable]]


class Notes(Protocol):
    """What is noted of each text, out of reach of a dying process."""

    def charges(self) -> dict[int, int]:
        """Charge the text that the last process did not survive, and return offset -> points."""

    def start(self, offset: int) -> None:
        """Note that a text is tried."""

    def end(self, offset: int, *, cleared: bool) -> None:
        """Note that the process survived a text; a cleared one has its vector."""

    def charge(self, offset: int, points: int) -> None:
        """Charge a text with a failure."""

    def dead_letter(self, offset: int, reason: str) -> None:
        """Keep a text for a person to look at."""


class LedgerNotes:
    """The notes of isolation mode, in the ledger; see Notes."""

    def __init__(self, backend: ResultCommitter, batch: EmbedBatch, died: str | None) -> None:
        self._backend = backend
        self._batch = batch
        self._died = died
        self._process = process_name(backend.settings.name, os.getpid())
        self._suspects = AttemptLog(backend.redis.client, batch.job)

    def charges(self) -> dict[int, int]:
        """Charge the texts that processes did not survive, and return offset -> points."""
        index, suspects, waiting = self._batch.index, self._suspects, self._backend.call
        found = waiting(lambda: suspects.fetch(index))
        for process, offset in {**found.missed, **found.started}.items():
            if process == self._died:
                self._add(found.charges, offset, OWN_POINTS)
                waiting(lambda o=offset, p=process: suspects.end(index, o, p, cleared=False))  # type: ignore[misc] # the defaults bind the loop variables
            elif process in found.started:
                self._add(found.charges, offset, OUTSIDE_POINTS)
                waiting(lambda o=offset, p=process: suspects.mark_unfinished(index, o, p))  # type: ignore[misc] # as above
        return found.charges

    def start(self, offset: int) -> None:
        """Note that a text is tried."""
        index, process = self._batch.index, self._process
        self._backend.call(lambda: self._suspects.start(index, offset, process))

    def end(self, offset: int, *, cleared: bool) -> None:
        """Note that the process survived a text; a cleared one has its vector."""
        end, index, process = self._suspects.end, self._batch.index, self._process
        self._backend.call(lambda: end(index, offset, process, cleared=cleared))

    def _add(self, charges: dict[int, int], offset: int, points: int) -> None:
        self.charge(offset, points)
        charges[offset] = charges.get(offset, 0) + points

    def charge(self, offset: int, points: int) -> None:
        """Charge a text with a failure."""
        index = self._batch.index
        self._backend.call(lambda: self._suspects.add_failure(index, offset, points))

    def dead_letter(self, offset: int, reason: str) -> None:
        """Keep a text among the dead letters."""
        batch = self._batch
        COUNTERS["set_aside"] += 1
        log.error("text_dead_lettered job=%s index=%d offset=%d", batch.job, batch.index, offset)
        letter = dead_letters.new(
            batch.job,
            batch.index,
            offset,
            code=Code.SET_ASIDE,
            reason=reason,
            worker=self._backend.settings.name,
            prompt=batch.spec.prompt,
            text=batch.texts[offset],
        )
        self._backend.call(lambda: dead_letters.add(self._backend.redis.client, letter))


def embed_isolated(batch: EmbedBatch, embed: Embed, notes: Notes) -> tuple[Vectors, OutcomeTable]:
    """Embed a batch text by text.

    Returns:
        float32 [n, D], NaN for a text that was set aside or refused, and n outcomes.

    Raises:
        EngineError: the engine fails a harmless text, so no text is to blame.
        DeviceFault: an NPU failed; it does not tell whether a text was to blame.
    """
    charges = notes.charges()
    vectors = np.full((len(batch.texts), batch.spec.dim), np.nan, np.float32)
    outcomes: list[Outcome] = []
    refused = dict(batch.refused)
    for offset, text in enumerate(batch.texts):
        if offset in batch.refused:
            outcomes.append(Outcome(status=Status.FAILED, code=batch.refused[offset]))
            continue
        alone = replace(batch, texts=[text], refused={})
        found = _embed_one(alone, offset, charges.get(offset, 0), embed, notes)
        if found is None:
            refused[offset] = Code.SET_ASIDE
            outcomes.append(Outcome(status=Status.FAILED, code=Code.SET_ASIDE))
        else:
            vectors[offset] = found[0][0]
            outcomes.append(found[1][0])
    rest = replace(batch, refused=refused)
    return _embed_together(rest, charges, embed, notes) or (
        vectors,
        OutcomeTable.from_outcomes(outcomes),
    )


def _embed_together(
    batch: EmbedBatch, charges: Mapping[int, int], embed: Embed, notes: Notes
) -> tuple[Vectors, OutcomeTable] | None:
    """Embed the texts that are good alone as any batch is, or return None if that is a risk.

    It is noted like a text, behind the last one, so that a process which does not survive it is
    the last to try.

    Raises:
        DeviceFault: an NPU failed.
    """
    together = len(batch.texts)
    good = [offset for offset in range(together) if offset not in batch.refused]
    if not good or any(charges.get(offset, 0) >= OWN_POINTS for offset in [*good, together]):
        return None
    notes.start(together)
    try:
        return embed(batch, False)
    except DeviceFault:  # what it gave for each text alone is not to be trusted either
        raise
    except Exception:  # each text alone has its vector: no reason to fail the batch
        return None
    finally:
        notes.end(together, cleared=False)


def _embed_one(
    alone: EmbedBatch, offset: int, points: int, embed: Embed, notes: Notes
) -> tuple[Vectors, OutcomeTable] | None:
    """Embed one text, or return None when it has used up its chances."""
    reason = "every process that tried it died or hung"
    harmless = replace(alone, texts=[CONTROL_TEXT])
    while points < MAX_POINTS:
        on_cpu = points >= MAX_POINTS - OWN_POINTS
        if points:
            embed(harmless, on_cpu)  # a broken engine ends here, where nobody is charged
        notes.start(offset)
        try:
            found = embed(alone, on_cpu)
        except DeviceFault:
            notes.end(offset, cleared=False)
            raise
        except Exception as error:
            # An error that is not ours may quote the text.
            reason = str(error) if isinstance(error, EngineError) else type(error).__name__
            notes.end(offset, cleared=False)
            embed(harmless, on_cpu)
            points += OWN_POINTS
            notes.charge(offset, OWN_POINTS)
        else:
            notes.end(offset, cleared=bool(points))
            return found
    notes.dead_letter(offset, reason)
    return None
