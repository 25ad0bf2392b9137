"""The life of a node's child: find the model, open the engine, prove it, serve.

Runs in Celery's `worker_process_init`, whose exceptions Celery swallows and then serves without a
model. So nothing here raises: the child writes what became of it into the node's state file, and
the parent consumes nothing until that says healthy.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from celery import signals

from embedq.contract import ModelCard
from embedq.errors import EmbedqError
from embedq_worker import models, selftest
from embedq_worker.embedder import Embedder
from embedq_worker.engines import open_engine
from embedq_worker.engines.base import Engine
from embedq_worker.engines.stub import StubEngine, StubTokenizer, stub_card
from embedq_worker.errors import EngineError
from embedq_worker.settings import DeviceChoice, WorkerSettings
from embedq_worker.state import NodeState, State, StateFile
from embedq_worker.tokenization import Tokenizer
from embedq_worker.tokens import AnyTokenizer

log = logging.getLogger("embedq.worker")

#: Padded tokens of one inference, where the settings name none; why: see engines/onnxruntime.py.
DEFAULT_TOKEN_BUDGET = 512


@dataclass(frozen=True, slots=True)
class Serving:
    """What a proven process embeds with."""

    card: ModelCard
    engine: Engine
    embedder: Embedder
    report: selftest.Report

    def close(self) -> None:
        """Give the device back."""
        self.embedder.close()
        self.engine.close()


_serving: Serving | None = None


def serving() -> Serving | None:
    """Return what this child embeds with, or None if it may not serve."""
    return _serving


def find_model(settings: WorkerSettings) -> models.Model | None:
    """Find and check the model that the settings name; the stub needs none.

    Raises:
        ModelError: it is missing, damaged or of a kind we cannot build.
    """
    if settings.device is DeviceChoice.STUB:
        return None
    return models.resolve(
        settings.model,
        settings.model_revision,
        cache_dir=settings.cache_dir,
        wheel_dir=settings.wheel_dir,
        offline=settings.offline,
    )


def open_serving(settings: WorkerSettings, model: models.Model | None) -> Serving:
    """Open the engine and prove it.

    Raises:
        ModelError: the files of the model are damaged.
        EngineError: the engine does not open, or fails its self-test.
    """
    engine: Engine
    tokenizer: AnyTokenizer
    if model is None:
        engine = StubEngine(delay_s=settings.stub_delay_s, texts_per_s=settings.stub_texts_per_s)
        card, tokenizer = stub_card(), StubTokenizer()
    else:
        engine = open_engine("onnxruntime", model, settings.cores())
        card, tokenizer = model.card(), Tokenizer(model.tokenizer_path, model.max_length)
    budget = settings.token_budget or DEFAULT_TOKEN_BUDGET
    embedder = Embedder(tokenizer, engine, token_budget=budget)
    report = selftest.run(embedder, model)
    if not report.passed:
        raise EngineError(f"The self-test failed: {report.reason}")
    return Serving(card, engine, embedder, report)


@signals.worker_process_init.connect
def on_process_init(sender: Any = None, **_: Any) -> None:
    """Make this child ready to serve, or record why it is not."""
    global _serving
    from embedq_worker.app import app  # the app imports the tasks, which import this file

    settings: WorkerSettings = app.conf.embedq
    state_file = StateFile(settings.runtime_dir, settings.name)
    state = NodeState(State.STARTING, time.time(), os.getpid(), device=str(settings.device))
    try:
        _die_with_parent()
        # Ctrl-C in a terminal reaches the whole group; the parent decides when a child ends.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        state_file.write(state)
        began = time.monotonic()
        _serving = open_serving(settings, find_model(settings))
    except BaseException as error:  # whatever it is, the parent must hear of it
        reason = str(error) if isinstance(error, EmbedqError) else f"{type(error).__name__}"
        log.exception("init_failed node=%s reason=%s", settings.name, reason)
        state_file.write(state.now(State.FAILED, reason))
        return
    engine = _serving.engine
    state = replace(
        state,
        device=str(engine.device),
        engine=engine.name,
        precision=str(engine.precision),
        card=_serving.card,
    )
    state_file.write(state.now(State.HEALTHY))
    log.info(
        "serving node=%s model=%s identity=%s engine=%s device=%s precision=%s seconds=%.2f",
        settings.name,
        _serving.card.label,
        _serving.card.identity[:12],
        engine.name,
        engine.device,
        engine.precision,
        time.monotonic() - began,
    )


@signals.worker_process_shutdown.connect
def on_process_shutdown(**_: Any) -> None:
    """Give the device back when the child ends in good order."""
    if _serving is not None:
        _serving.close()


def _die_with_parent() -> None:
    """Ask Linux to kill this child when its parent dies, so that no model outlives its node."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
