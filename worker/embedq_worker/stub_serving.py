"""Serves with the stub, which computes nothing, as if it were a device with a model."""

from __future__ import annotations

from pathlib import Path

from embedq.contract import Device
from embedq.testing import stub_vectors
from embedq_worker import selftest
from embedq_worker.choices import DeviceChoice
from embedq_worker.embedder import Embedder
from embedq_worker.engines.script import FaultScript
from embedq_worker.engines.stub import STUB_MAX_LENGTH, StubEngine, StubTokenizer, stub_card
from embedq_worker.errors import EngineError, Reason
from embedq_worker.golden import GOLDEN
from embedq_worker.layouts import DEFAULT_TOKEN_BUDGET
from embedq_worker.serving import Proven, Serving
from embedq_worker.settings import WorkerSettings
from embedq_worker.shadow import Shadow
from embedq_worker.tokens import AnyTokenizer


def serve_stub(settings: WorkerSettings) -> Serving:
    """Serve with the stub; on the CPU, where a degraded one goes, it has no faults.

    Raises:
        EngineError: it fails its self-test.
    """
    _, content = _stub_tokenizer(settings.stub_tokenizer)
    if settings.device is DeviceChoice.CPU:
        sound = _open_stub(settings, Device.CPU)
        return Serving(stub_card(content), sound, lambda: sound, lambda: sound)
    script = FaultScript(settings.stub_faults) if settings.stub_faults else None
    proven = _open_stub(settings, Device.STUB, script)
    quick = settings.model_copy(update={"stub_delay_s": 0.0, "stub_texts_per_s": 0.0})
    shadow = Shadow(settings.shadow_every, lambda: _open_stub(quick, Device.CPU))
    return Serving(stub_card(content), proven, lambda: proven, lambda: proven, shadow)


def _open_stub(
    settings: WorkerSettings, device: Device, script: FaultScript | None = None
) -> Proven:
    engine = StubEngine(
        delay_s=settings.stub_delay_s,
        texts_per_s=settings.stub_texts_per_s,
        script=script,
        device=device,
    )
    budget = settings.token_budget or DEFAULT_TOKEN_BUDGET
    tokenizer, content = _stub_tokenizer(settings.stub_tokenizer)
    embedder = Embedder(tokenizer, engine, token_budget=budget)
    # Real tokens give the stub other hashes than those of the words that it is known by.
    report = selftest.run(embedder, None, None if content else stub_vectors(GOLDEN))
    if not report.passed:
        raise EngineError(f"The self-test failed: {report.reason}", Reason.SELFTEST_FAILED)
    return Proven(engine, embedder, report, "only")


def _stub_tokenizer(path: Path | None) -> tuple[AnyTokenizer, bytes]:
    if path is None:
        return StubTokenizer(), b""
    from embedq_worker.tokenization import Tokenizer  # a library that the stub alone does not need

    tokenizer = Tokenizer(path, STUB_MAX_LENGTH)
    return tokenizer, path.read_bytes()
