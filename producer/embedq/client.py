"""Provides `Client`, the public class of the SDK."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import replace
from types import TracebackType
from typing import Self

from embedq.discovery import FleetDiscovery, NpuAvailability, resolve_spec, select_queue
from embedq.errors import BatchFailed, ContractError, TextsFailed
from embedq.jobs.batches import TextBatch, VectorBuffer, batch_tokens, split
from embedq.jobs.job import Job
from embedq.jobs.publisher import Publisher
from embedq.jobs.sender import window
from embedq.jobs.state import JobContext
from embedq.jobs.stream import AnyDocument, Stream
from embedq.observability import tracing
from embedq.protocol.contract import Accuracy, Dtype, OnLong, Queue, VectorSpec
from embedq.protocol.values import Vectors
from embedq.protocol.worker import ModelInfo
from embedq.settings import ProducerSettings
from embedq.store.connection import OnWait, RedisConnection, log_retry
from embedq.store.fleet import list_live_workers
from embedq.store.ledger import Ledger
from embedq.store.queues import QueueInspector

#: Maximum time that a running job waits for an unreachable Redis, seconds.
JOB_RETRY_TIMEOUT_S = 3_600.0


class Client:
    """Embeds texts through the queue. Use it from one thread at a time.

    Example:
        >>> with Client() as client:
        ...     vectors = client.encode(["a text", "another"])  # float32 [2, D]
    """

    def __init__(
        self,
        *,
        broker_url: str | None = None,
        results_url: str | None = None,
        model: str | None = None,
        accuracy: Accuracy | str | None = None,
        strict: bool | None = None,
        dtype: Dtype | str | None = None,
        settings: ProducerSettings | None = None,
        on_wait: OnWait | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        """Create a client; the first call connects.

        Args:
            broker_url, results_url, model, accuracy, strict, dtype: override the setting of the
                same name.
            settings: all settings; None reads the environment.
            on_wait: called with a message when the client starts to wait; None logs a warning.
            on_idle: called about once per second while no result arrives; may raise.

        Raises:
            SettingsError: a setting is wrong.
        """
        overrides = {
            "broker_url": broker_url,
            "results_url": results_url,
            "model": model,
            "accuracy": accuracy,
            "strict": strict,
            "dtype": dtype,
        }
        if settings is None:
            settings = ProducerSettings.load(**overrides)
        elif any(value is not None for value in overrides.values()):
            raise TypeError("Client() accepts either settings or single values, not both.")
        self.settings = settings
        if settings.traces and not tracing.is_on():
            tracing.enable("embedq")
        self._results, self._broker = (
            RedisConnection.open(
                url, retry_timeout_s=JOB_RETRY_TIMEOUT_S, on_wait=on_wait or log_retry
            )
            for url in (settings.results_url, settings.broker_url)
        )
        self.redis = self._results.client
        self._publisher = Publisher(settings.broker_url)
        self._on_idle = on_idle or (lambda: None)
        self._discovery = FleetDiscovery(
            settings,
            results=self._results,
            broker=self._broker,
            on_idle=self._on_idle,
        )
        self._fixed_batch_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._publisher.close()
        self._broker.client.close()
        self.redis.close()

    def model_info(self) -> ModelInfo:
        """Return the model that the fleet serves; waits for Redis and a first worker.

        Raises:
            QueueUnavailable: Redis was not reachable for `startup_timeout_s`, or rejects the login.
            NoWorker: no worker served the model within `startup_timeout_s`.
        """
        return self._discovery.model_info()

    def window(self) -> int:
        """Return how many batches a job may have in flight on the current fleet."""
        return window(self._discovery.count_workers().total(), self.settings.max_in_flight)

    def workers(self) -> str:
        """Return the number of live workers by device, such as ``1 cpu, 2 npu``."""
        counts = self._discovery.count_workers()
        return ", ".join(f"{n} {device}" for device, n in sorted(counts.items()))

    def engine(self) -> dict[str, str]:
        """Return device, engine and precision of the first worker, by name, that serves the model.

        Useful for a fleet of one worker, as in a local run.
        """
        return self._discovery.engine()

    def spec(
        self,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        on_long: OnLong | str | None = None,
        accuracy: Accuracy | str | None = None,
    ) -> VectorSpec:
        """Return the vector specification of a call with these options.

        Raises:
            SettingsError: the prompt name, policy or accuracy class is unknown.
            NotQuantized: the class is int8, and no worker has a quantized model, or workers have
                different ones.
            QueueUnavailable, NoWorker: as in `model_info`.
        """
        return resolve_spec(
            self.settings,
            self.model_info(),
            prompt_name=prompt_name,
            prompt=prompt,
            on_long=on_long,
            accuracy=accuracy,
            quantized=self._discovery.quantized,
        )

    def encode(
        self,
        texts: str | Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        on_long: OnLong | str | None = None,
        accuracy: Accuracy | str | None = None,
        strict: bool | None = None,
        timeout_s: float | None = None,
    ) -> Vectors:
        """Embed texts and return their vectors in the order of the texts.

        Args:
            texts: any iterable of strings, or one string.
            prompt_name: name of one of the model's prompts, the prefix of each text.
            prompt: prefix of each text; replaces prompt_name.
            on_long: ``truncate`` or ``error``, for texts with more tokens than the model accepts.
            accuracy: ``standard``, ``exact`` or ``int8``.
            strict: accept vectors from NPUs only.
            timeout_s: maximum time without a new result, seconds; None waits without limit.

        Returns:
            [n, D]; [D] for one string; [0, D] for an empty list. float32, or float16 with
            that dtype.

        Raises:
            TextsFailed: some texts failed; the other vectors are in ``.vectors``.
            BatchFailed: a worker rejected a whole batch.
            QueueUnavailable: Redis was not reachable for too long.
            NoWorker, NotQuantized, SettingsError: as in `spec`.
            ResultTimeout: no result arrived for timeout_s.
            StrictUnavailable: no NPU was available for `startup_timeout_s`.
        """
        if isinstance(texts, bytes | bytearray):
            raise ContractError("encode() got bytes, expected text. Decode them first.")
        spec = self.spec(prompt_name=prompt_name, prompt=prompt, on_long=on_long, accuracy=accuracy)
        text_batches = self.split([texts] if isinstance(texts, str) else texts, spec)
        failures: dict[int, str] = {}
        planned = len(texts) if isinstance(texts, Sized) and not isinstance(texts, str) else None
        rows = VectorBuffer(spec, planned)
        job = self.job(text_batches, spec, strict=strict, planned=planned)
        for batch in job.batches(timeout_s=timeout_s):
            if batch.failure:
                raise BatchFailed(*batch.failure)
            rows.append(batch.vectors)
            failures.update(batch.failures())
        vectors = rows.vectors()
        if failures:
            raise TextsFailed(failures, vectors)
        return vectors[0] if isinstance(texts, str) else vectors

    def submit(
        self,
        texts: Iterable[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        on_long: OnLong | str | None = None,
        accuracy: Accuracy | str | None = None,
        strict: bool | None = None,
    ) -> Job:
        """Publish the first batches of a job and return its handle.

        Args:
            texts: any iterable of strings; read as fast as the window allows.
            prompt_name, prompt, on_long, accuracy, strict: as in `encode`.

        Raises:
            ContractError: texts is one text.
            QueueUnavailable, NoWorker, SettingsError: as in `encode`.
        """
        _require_many("submit", texts)
        spec = self.spec(prompt_name=prompt_name, prompt=prompt, on_long=on_long, accuracy=accuracy)
        planned = len(texts) if isinstance(texts, Sized) else None
        job = self.job(self.split(texts, spec), spec, strict=strict, planned=planned)
        try:
            job.start()
        except BaseException:
            job.cancel()  # the caller never gets the Job, so it cannot cancel it
            raise
        return job

    def stream(
        self,
        documents: Iterable[AnyDocument],
        *,
        ordered: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        on_long: OnLong | str | None = None,
        accuracy: Accuracy | str | None = None,
        strict: bool | None = None,
    ) -> Stream:
        """Embed any number of documents in constant memory; the stream yields `Embedding` objects.

        Args:
            documents: texts, (id, text) pairs or Documents.
            ordered: yield in the order of the documents; otherwise as they complete.
            checkpoint: file that `Stream.commit` writes and a restarted program continues from.
            prompt_name, prompt, on_long, accuracy, strict: as in `encode`.

        Raises:
            ContractError: documents is one text.
            InputError: the checkpoint belongs to another specification.
            QueueUnavailable, NoWorker, SettingsError: as in `encode`.
        """
        _require_many("stream", documents)
        spec = self.spec(prompt_name=prompt_name, prompt=prompt, on_long=on_long, accuracy=accuracy)

        def prepare(texts: Iterable[object]) -> Job:
            return self.job(self.split(texts, spec), spec, ordered=ordered, strict=strict)

        return Stream(prepare, spec, documents, ordered=ordered, checkpoint=checkpoint)

    def forget(self, job: str) -> None:
        """Delete a job of a killed program from Redis; workers discard its queued batches.

        Raises:
            QueueUnavailable: Redis cannot be reached.
        """
        self._results.call(Ledger(self.redis, job).drop)

    def split(self, texts: Iterable[object], spec: VectorSpec) -> Iterator[TextBatch]:
        """Split texts into batches, as for a job of this client."""
        return split(
            texts,
            max_texts=self.settings.batch_texts,
            max_tokens=self.batch_tokens(spec),
            max_length=spec.max_length,
        )

    def batch_tokens(self, spec: VectorSpec) -> int:
        """Return the estimated number of tokens of a full batch."""
        # Only CPUs serve exact jobs, so the batches need not suit the other devices.
        devices = () if spec.accuracy is Accuracy.EXACT else self._discovery.count_workers()
        return batch_tokens(self.settings.batch_tokens or self._fixed_batch_tokens, devices)

    def set_batch_tokens(self, tokens: int) -> None:
        """Use the batch size of an earlier run, unless EMBEDQ_BATCH_TOKENS is set."""
        self._fixed_batch_tokens = tokens

    def job(
        self,
        text_batches: Iterable[TextBatch],
        spec: VectorSpec,
        *,
        ordered: bool = True,
        label: str = "",
        spare: int = 0,
        strict: bool | None = None,
        refusable: bool = True,
        planned: int | None = None,
    ) -> Job:
        """Create a job for batches; reading its `batches()` runs it.

        Args:
            text_batches: batches of texts.
            spec: vector specification.
            ordered: yield batches in order; otherwise as they complete.
            label: shown to operators.
            spare: number of batches by which to reduce the window, for results that the caller
                has not saved yet.
            strict: accept vectors from NPUs only; None uses the settings.
            refusable: fail at the start if Redis is nearly full; otherwise wait for memory.
            planned: number of texts of all batches, shown to operators; None if unknown.

        Raises:
            SettingsError: strict together with accuracy exact or int8.
        """
        queue = select_queue(spec, strict=self.settings.strict if strict is None else strict)
        on_idle = self._on_idle
        if queue is Queue.NPU_STRICT:
            watch = NpuAvailability(
                lambda: list_live_workers(self.redis), self.settings.startup_timeout_s
            )
            on_idle = _both(watch.check, on_idle)
        context = JobContext(
            # A copy, because the job changes its deadline; it is also used for the broker.
            redis=replace(self._results, address=self.settings.addresses),
            broker=QueueInspector(self._broker.client),
            publisher=self._publisher,
            visibility_timeout_s=self.settings.visibility_timeout_s,
            on_idle=on_idle,
            queue=queue,
            spec=spec,
            ttl_s=self.settings.results_ttl_s,
            label=label,
            ordered=ordered,
        )
        return Job(
            context,
            text_batches,
            window=lambda: max(1, self.window() - spare),
            refusable=refusable,
            planned=planned,
        )


def _require_many(name: str, texts: object) -> None:
    # Iterating a single text would embed each of its characters.
    if isinstance(texts, str | bytes | bytearray):
        raise ContractError(
            f"{name}() takes many texts, but got one {type(texts).__name__} of {len(texts):,}. "
            f"Put it into a list: {name}([text])."
        )


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
