"""Find the model, the workers and the queue for a call.

A strict job takes vectors from an NPU or none: it waits while one may come, then gives up.

Which quantized model a job of class int8 asks for: the one that the fleet serves.

What a call asks for: settings, the card and its options make a specification, that a queue.

The lookout of a client: which workers live, on which devices, and what model they serve.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from redis.exceptions import RedisError

from embedq.errors import NotQuantized, NoWorker, SettingsError, StrictUnavailable, did_you_mean
from embedq.protocol.contract import Accuracy, Device, Dtype, OnLong, Queue, VectorSpec
from embedq.protocol.worker import ModelInfo, WorkerStatus
from embedq.settings import ProducerSettings
from embedq.store.connection import REDIS_HINT, RedisConnection
from embedq.store.fleet import find_model, list_live_workers

#: States of an NPU's worker that serve, or may serve soon.
_COMING = ("healthy", "starting", "probing")


def can_serve_strict(worker: WorkerStatus) -> bool:
    """Tell whether a worker computes on an NPU, or is on the way to it."""
    if worker.assigned_device != Device.NPU:
        # A worker that has just begun does not know its device yet.
        return not worker.assigned_device and worker.state == "starting"
    return worker.will_retry or (worker.state in _COMING and worker.device != Device.CPU)


class NpuAvailability:
    """Gives a job up once no NPU has been there, or on its way, for long enough."""

    def __init__(self, fetch: Callable[[], Sequence[WorkerStatus]], wait_s: float) -> None:
        """Watch the fleet for one job.

        Args:
            fetch: returns the living workers.
            wait_s: how long to go without an NPU.
        """
        self._fetch = fetch
        self._wait_s = wait_s
        self._seen: float | None = None

    def check(self) -> None:
        """Look once.

        Raises:
            StrictUnavailable: there was no NPU for too long; the message says what there was.
        """
        now = time.monotonic()
        try:
            alive = self._fetch()
        except RedisError:  # whoever waits for vectors waits for Redis too, and says so
            self._seen = None
            return
        if self._seen is None or any(map(can_serve_strict, alive)):
            self._seen = now
        elif now - self._seen >= self._wait_s:
            raise StrictUnavailable(
                f"No worker with an NPU was there for {self._wait_s:.0f} s "
                f"(EMBEDQ_STARTUP_TIMEOUT_S). "
                f"{_why(alive)} Start one with --device npu, or run the job without strict."
            )


def _why(alive: Sequence[WorkerStatus]) -> str:
    lost = [worker for worker in alive if worker.assigned_device == Device.NPU]
    if lost:
        return " ".join(
            f"Worker {worker.worker} is {worker.state}: {worker.reason}" for worker in lost
        )
    return f"{len(alive)} alive, none with an NPU." if alive else "No worker is alive."


class QuantizedModelFinder:
    """Looks for workers with a quantized model, and gives up after a while."""

    def __init__(self, model_info: ModelInfo, wait_s: float) -> None:
        """Begin to wait.

        Args:
            model_info: of the model.
            wait_s: how long to wait while a worker may still come.
        """
        self._model_info = model_info
        self._wait_s = wait_s
        self._deadline = time.monotonic() + wait_s

    def find(self, alive: Sequence[WorkerStatus]) -> str:
        """Return the name of the quantized model, or nothing as long as there is hope.

        Raises:
            NotQuantized: every living worker has settled and none has one, or they have several.
        """
        model_infos = [worker.model_info for worker in alive if worker.model_info]
        names = {
            c.quantized
            for c in model_infos
            if c.identity == self._model_info.identity and c.quantized
        }
        if len(names) > 1:
            raise NotQuantized(
                f"The workers have different quantized models of {self._model_info.label}: "
                f"{', '.join(sorted(names))}. Their vectors must not mix: quantize once, copy the "
                "cache to every worker, and start them again."
            )
        if names:
            return names.pop()
        coming = not alive or any(worker.state == "starting" for worker in alive)
        if coming and time.monotonic() < self._deadline:
            return ""
        raise NotQuantized(
            f"No worker has a quantized model of {self._model_info.label} ({len(alive)} alive). "
            f"Run on a "
            "worker with a CPU: embedq-worker quantize FILE, and start it again; or ask for "
            "accuracy standard."
        )


E = TypeVar("E", OnLong, Accuracy)


def resolve_spec(
    settings: ProducerSettings,
    model_info: ModelInfo,
    *,
    prompt_name: str | None,
    prompt: str | None,
    on_long: OnLong | str | None,
    accuracy: Accuracy | str | None,
    quantized: Callable[[ModelInfo], str],
) -> VectorSpec:
    """Say what will shape the vectors of a call with these options.

    Args:
        settings: stand in for options that are None.
        model_info: of the model.
        prompt_name, prompt, on_long, accuracy: as in Client.encode.
        quantized: finds the name of the quantized model; called for class int8 alone.

    Raises:
        SettingsError: an unknown prompt name, policy or accuracy class.
    """
    chosen = _choose(Accuracy, "accuracy", accuracy, settings.accuracy)
    if settings.dtype is Dtype.FLOAT16 and not model_info.normalized:
        raise SettingsError(
            f"dtype=float16: vectors of {model_info.label} are not of unit length, so they may be "
            "too long for it. Use float32."
        )
    return VectorSpec(
        model=model_info.identity,
        dim=model_info.dim,
        max_length=model_info.max_length,
        prompt=_prompt(model_info, prompt_name, prompt),
        on_long=_choose(OnLong, "on_long", on_long, settings.on_long),
        accuracy=chosen,
        dtype=settings.dtype,
        quantized=quantized(model_info) if chosen is Accuracy.INT8 else "",
    )


def select_queue(spec: VectorSpec, *, strict: bool) -> Queue:
    """Return the queue of a job.

    Raises:
        SettingsError: strict and exact or int8, which no device can be at once.
    """
    # Only the CPU computes in fp32 and, here, in int8: such a job never visits the NPU queue. The
    # queue of int8 is read by workers with a quantized model alone, so no batch meets another.
    if spec.accuracy is Accuracy.STANDARD:
        return Queue.NPU_STRICT if strict else Queue.NPU
    if strict:
        raise SettingsError(
            f"strict and accuracy={spec.accuracy} exclude each other: only the CPU computes so, "
            "and a strict job takes vectors from an NPU alone. Drop one of the two."
        )
    return Queue.CPU if spec.accuracy is Accuracy.EXACT else Queue.CPU_INT8


def _prompt(model_info: ModelInfo, name: str | None, prompt: str | None) -> str:
    if prompt is not None:
        return prompt
    if name is None:
        return (
            model_info.prompts.get(model_info.default_prompt, "")
            if model_info.default_prompt
            else ""
        )
    if name not in model_info.prompts:
        known = ", ".join(sorted(model_info.prompts)) or "none"
        raise SettingsError(
            f"prompt_name: {model_info.label} has no prompt {name}; it has {known}."
            f"{did_you_mean(name, list(model_info.prompts))}"
        )
    return model_info.prompts[name]


def _choose(kind: type[E], name: str, given: str | None, default: E) -> E:
    if given is None:
        return default
    try:
        return kind(given)
    except ValueError:
        choices = [str(choice) for choice in kind]
        raise SettingsError(
            f"{name}: expected {' or '.join(choices)}, got {given}.{did_you_mean(given, choices)}"
        ) from None


#: Seconds between two looks at the fleet while no worker is there.
LOOK_EVERY_S = 0.1


#: Seconds between two counts of the living workers.
WORKERS_EVERY_S = 3.0


class FleetDiscovery:
    """Looks at the fleet from the producer's side, and waits for a first worker."""

    def __init__(
        self,
        settings: ProducerSettings,
        *,
        results: RedisConnection,
        broker: RedisConnection,
        on_idle: Callable[[], None],
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            settings: of the client.
            results: the Redis that holds the heartbeats.
            broker: the Redis that holds the queues.
            on_idle: as in Client.
        """
        self._settings = settings
        self._results = results
        self._broker = broker
        self._on_idle = on_idle
        self._model_info: ModelInfo | None = None
        self._devices: Counter[str] = Counter()
        self._counted = -WORKERS_EVERY_S

    def model_info(self) -> ModelInfo:
        """Return the card of the model that the fleet serves, waiting for Redis and a first worker.

        Raises:
            QueueUnavailable: Redis could not be reached for `startup_timeout_s`, or refuses us.
            NoWorker: no worker announced the model within `startup_timeout_s`.
        """
        if self._model_info is None:
            self._model_info = self._find_card(time.monotonic() + self._settings.startup_timeout_s)
        return self._model_info

    def quantized(self, model_info: ModelInfo) -> str:
        """Return the quantized model that the fleet serves, waiting for a first worker with one.

        Raises:
            NotQuantized: no worker has a quantized model, or they have several.
            QueueUnavailable: Redis cannot be reached.
        """
        watch = QuantizedModelFinder(model_info, self._settings.startup_timeout_s)
        results = replace(self._results, retry_timeout_s=0)
        while True:
            name = watch.find(results.call(lambda: list_live_workers(results.client)))
            if name:
                return name
            self._on_idle()
            time.sleep(LOOK_EVERY_S)

    def count_workers(self) -> Counter[str]:
        """Count the living workers by device; asks Redis every few seconds at most."""
        if time.monotonic() - self._counted > WORKERS_EVERY_S:
            self._counted = time.monotonic()
            with suppress(RedisError):  # the last count serves as well
                self._devices = Counter(
                    h.device for h in list_live_workers(self._results.client) if h.device
                )
        return self._devices

    def engine(self) -> dict[str, str]:
        """Return device, engine and precision of the first worker by name that serves the model."""
        identity = self.model_info().identity
        for heartbeat in list_live_workers(self._results.client):
            if heartbeat.model_info and heartbeat.model_info.identity == identity:
                return {key: getattr(heartbeat, key) for key in ("device", "engine", "precision")}
        return {}

    def _find_card(self, deadline: float) -> ModelInfo:
        settings = self._settings
        advice = (
            f" {REDIS_HINT}. EMBEDQ_STARTUP_TIMEOUT_S ends this after "
            f"{settings.startup_timeout_s:.0f} s, Ctrl-C now."
        )
        broker, results = (
            replace(
                redis,
                retry_timeout_s=settings.startup_timeout_s,
                deadline=deadline,
                advice=advice,
            )
            for redis in (self._broker, self._results)
        )

        def ping() -> None:
            self._on_idle()
            broker.client.ping()

        def fetch_alive() -> list[WorkerStatus]:
            self._on_idle()
            return list_live_workers(results.client)

        # First the broker: what is there already decides nothing without it.
        broker.call(ping)
        told = False
        while True:
            alive = results.call(fetch_alive)
            model_info = find_model(alive, settings.model)
            if model_info is not None:
                return model_info
            if time.monotonic() >= deadline:
                serving = sorted({h.model_info.label for h in alive if h.model_info})
                raise NoWorker(
                    f"No worker announced the model {settings.model} within "
                    f"{settings.startup_timeout_s:.0f} s; {len(alive)} alive, serving "
                    f"{', '.join(serving) or 'nothing'}. Start one: embedq-worker start"
                )
            if not told and deadline - time.monotonic() < settings.startup_timeout_s - 3:
                results.on_wait(f"No worker serves {settings.model} yet; waiting for one.")
                told = True
            time.sleep(LOOK_EVERY_S)
