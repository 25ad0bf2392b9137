"""Finds the model, the workers and the queue for a call of the SDK.

Model and workers come from the heartbeats in Redis. Model, settings and call options determine the
vector specification, which determines the queue.
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
from embedq.protocol.contract import Accuracy, Device, Dtype, OnLong, Precision, Queue, VectorSpec
from embedq.protocol.worker import ModelInfo, WorkerStatus
from embedq.settings import ProducerSettings
from embedq.store.connection import REDIS_HINT, RedisConnection
from embedq.store.fleet import find_model, list_live_workers

#: States in which a worker serves or will serve soon.
_AVAILABLE_STATES = ("healthy", "starting", "probing")


def can_serve_strict(worker: WorkerStatus) -> bool:
    """Return whether a worker computes on an NPU, or will do so soon."""
    if worker.assigned_device != Device.NPU:
        # A worker that has just started does not know its device yet.
        return not worker.assigned_device and worker.state == "starting"
    return worker.will_retry or (worker.state in _AVAILABLE_STATES and worker.device != Device.CPU)


class NpuAvailability:
    """Fails a strict job if no NPU has been available for `wait_s`."""

    def __init__(self, fetch: Callable[[], Sequence[WorkerStatus]], wait_s: float) -> None:
        """Create a check for one job.

        Args:
            fetch: returns the live workers.
            wait_s: maximum time without an available NPU, seconds.
        """
        self._fetch = fetch
        self._wait_s = wait_s
        self._available_at: float | None = None

    def check(self) -> None:
        """Read the live workers once.

        Raises:
            StrictUnavailable: no NPU was available for `wait_s`; the message lists the workers.
        """
        now = time.monotonic()
        try:
            workers = self._fetch()
        except RedisError:  # the job itself waits for Redis and reports it
            self._available_at = None
            return
        if self._available_at is None or any(map(can_serve_strict, workers)):
            self._available_at = now
        elif now - self._available_at >= self._wait_s:
            raise StrictUnavailable(
                f"No worker with an NPU was available for {self._wait_s:.0f} s "
                f"(EMBEDQ_STARTUP_TIMEOUT_S). "
                f"{_describe(workers)} Start one with --device npu, or run the job without strict."
            )


def _describe(workers: Sequence[WorkerStatus]) -> str:
    unavailable = [worker for worker in workers if worker.assigned_device == Device.NPU]
    if unavailable:
        return " ".join(
            f"Worker {worker.worker} is {worker.state}: {worker.reason}" for worker in unavailable
        )
    return f"{len(workers)} alive, none with an NPU." if workers else "No worker is alive."


class QuantizedModelFinder:
    """Finds the quantized model that the fleet serves, within a time limit."""

    def __init__(self, model_info: ModelInfo, wait_s: float) -> None:
        """Create a finder; the time limit starts now.

        Args:
            model_info: model that must have been quantized.
            wait_s: maximum wait for a worker that is still starting, seconds.
        """
        self._model_info = model_info
        self._wait_s = wait_s
        self._deadline = time.monotonic() + wait_s

    def find(self, workers: Sequence[WorkerStatus]) -> str:
        """Return the name of the quantized model; empty while a worker may still provide one.

        Raises:
            NotQuantized: no live worker has a quantized model and none will have one within the
                time limit, or workers have different ones.
        """
        model_infos = [worker.model_info for worker in workers if worker.model_info]
        names = {
            info.quantized
            for info in model_infos
            if info.identity == self._model_info.identity and info.quantized
        }
        if len(names) > 1:
            raise NotQuantized(
                f"The workers have different quantized models of {self._model_info.label}: "
                f"{', '.join(sorted(names))}. Their vectors are not comparable. Quantize once, "
                "copy the cache to every worker, and restart the workers."
            )
        if names:
            return names.pop()
        starting = not workers or any(worker.state == "starting" for worker in workers)
        if starting and time.monotonic() < self._deadline:
            return ""
        raise NotQuantized(
            f"No worker has a quantized model of {self._model_info.label} ({len(workers)} alive). "
            "On a machine with a CPU worker, run embedq-worker quantize FILE and restart the "
            "worker; or use accuracy standard."
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
    """Return the vector specification of a call.

    Args:
        settings: values of the options that are None.
        model_info: model that the fleet serves.
        prompt_name, prompt, on_long, accuracy: as in Client.encode.
        quantized: returns the name of the quantized model; called for class int8 only.

    Raises:
        SettingsError: the prompt name, policy or accuracy class is unknown, dtype is float16 and
            the model's vectors do not have unit length, or the class is exact and the model's
            weights are not f32.
    """
    accuracy_class = _parse_option(Accuracy, "accuracy", accuracy, settings.accuracy)
    if settings.dtype is Dtype.FLOAT16 and not model_info.normalized:
        raise SettingsError(
            f"dtype=float16: vectors of {model_info.label} do not have unit length, so they may "
            "exceed the range of float16. Use float32."
        )
    if accuracy_class is Accuracy.EXACT and model_info.weights_precision != Precision.F32:
        raise SettingsError(
            f"accuracy=exact: {model_info.label} has {model_info.weights_precision} weights, so it "
            "has no fp32 vectors. Use accuracy standard, or serve the model's f32 file."
        )
    return VectorSpec(
        model=model_info.identity,
        dim=model_info.dim,
        max_length=model_info.max_length,
        prompt=_prompt(model_info, prompt_name, prompt),
        on_long=_parse_option(OnLong, "on_long", on_long, settings.on_long),
        accuracy=accuracy_class,
        dtype=settings.dtype,
        quantized=quantized(model_info) if accuracy_class is Accuracy.INT8 else "",
    )


def select_queue(spec: VectorSpec, *, strict: bool) -> Queue:
    """Return the queue of a job.

    Raises:
        SettingsError: strict together with accuracy exact or int8.
    """
    # Only CPUs compute in fp32 or int8, and only workers with a quantized model consume CPU_INT8.
    if spec.accuracy is Accuracy.STANDARD:
        return Queue.NPU_STRICT if strict else Queue.NPU
    if strict:
        raise SettingsError(
            f"strict and accuracy={spec.accuracy} exclude each other: only a CPU computes with "
            "this accuracy, and a strict job accepts vectors from NPUs only. Drop one of the two."
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
            f"prompt_name: {model_info.label} has no prompt {name}; its prompts are: {known}."
            f"{did_you_mean(name, list(model_info.prompts))}"
        )
    return model_info.prompts[name]


def _parse_option(kind: type[E], name: str, value: str | None, default: E) -> E:
    if value is None:
        return default
    try:
        return kind(value)
    except ValueError:
        choices = [str(choice) for choice in kind]
        raise SettingsError(
            f"{name}: expected {' or '.join(choices)}, got {value}.{did_you_mean(value, choices)}"
        ) from None


#: Poll interval while waiting for a worker, seconds.
POLL_EVERY_S = 0.1

#: Minimum time between two counts of the live workers, seconds.
COUNT_EVERY_S = 3.0


class FleetDiscovery:
    """Finds the model and counts the workers of the fleet; waits for a first worker."""

    def __init__(
        self,
        settings: ProducerSettings,
        *,
        results: RedisConnection,
        broker: RedisConnection,
        on_idle: Callable[[], None],
    ) -> None:
        """Create a discovery; nothing is read yet.

        Args:
            settings: settings of the client.
            results: connection to the Redis with the heartbeats.
            broker: connection to the Redis with the queues.
            on_idle: as in Client.
        """
        self._settings = settings
        self._results = results
        self._broker = broker
        self._on_idle = on_idle
        self._model_info: ModelInfo | None = None
        self._devices: Counter[str] = Counter()
        self._counted = -COUNT_EVERY_S

    def model_info(self) -> ModelInfo:
        """Return the model that the fleet serves; waits for Redis and a first worker.

        Raises:
            QueueUnavailable: Redis was not reachable for `startup_timeout_s`, or rejects the login.
            NoWorker: no worker served the model within `startup_timeout_s`.
        """
        if self._model_info is None:
            deadline = time.monotonic() + self._settings.startup_timeout_s
            self._model_info = self._find_model_info(deadline)
        return self._model_info

    def quantized(self, model_info: ModelInfo) -> str:
        """Return the name of the fleet's quantized model; waits while a worker is starting.

        Raises:
            NotQuantized: no worker has a quantized model, or workers have different ones.
            QueueUnavailable: Redis cannot be reached.
        """
        finder = QuantizedModelFinder(model_info, self._settings.startup_timeout_s)
        results = replace(self._results, retry_timeout_s=0)
        while True:
            name = finder.find(results.call(lambda: list_live_workers(results.client)))
            if name:
                return name
            self._on_idle()
            time.sleep(POLL_EVERY_S)

    def count_workers(self) -> Counter[str]:
        """Return the number of live workers by device; reads Redis every COUNT_EVERY_S at most."""
        if time.monotonic() - self._counted > COUNT_EVERY_S:
            self._counted = time.monotonic()
            with suppress(RedisError):  # keep the last count
                workers = list_live_workers(self._results.client)
                self._devices = Counter(worker.device for worker in workers if worker.device)
        return self._devices

    def engine(self) -> dict[str, str]:
        """Return device, engine and precision of the first worker (by name) with the model."""
        identity = self.model_info().identity
        for worker in list_live_workers(self._results.client):
            if worker.model_info and worker.model_info.identity == identity:
                return {key: getattr(worker, key) for key in ("device", "engine", "precision")}
        return {}

    def _find_model_info(self, deadline: float) -> ModelInfo:
        settings = self._settings
        advice = (
            f" {REDIS_HINT}. The wait ends after {settings.startup_timeout_s:.0f} s "
            "(EMBEDQ_STARTUP_TIMEOUT_S) or with Ctrl-C."
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

        def fetch_workers() -> list[WorkerStatus]:
            self._on_idle()
            return list_live_workers(results.client)

        # Both Redis are needed: wait for the broker before the search for a worker.
        broker.call(ping)
        reported = False
        while True:
            workers = results.call(fetch_workers)
            model_info = find_model(workers, settings.model)
            if model_info is not None:
                return model_info
            if time.monotonic() >= deadline:
                served = sorted({w.model_info.label for w in workers if w.model_info})
                raise NoWorker(
                    f"No worker announced the model {settings.model} within "
                    f"{settings.startup_timeout_s:.0f} s; {len(workers)} alive, serving "
                    f"{', '.join(served) or 'nothing'}. Start one: embedq-worker start"
                )
            if not reported and deadline - time.monotonic() < settings.startup_timeout_s - 3:
                results.on_wait(f"No worker serves {settings.model} yet; waiting for one.")
                reported = True
            time.sleep(POLL_EVERY_S)
