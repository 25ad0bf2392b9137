"""The SDK's front door: texts in, float32 vectors out, in the caller's order."""

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

#: Seconds that a job waits for a Redis that went away in its middle.
JOB_RETRY_TIMEOUT_S = 3_600.0


class Client:
    """Embeds texts through the queue. Not for use from several threads at once.

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
        """Prepare a client; the first call connects.

        Args:
            broker_url, results_url, model, accuracy, strict, dtype: override the settings of the
                same name.
            settings: default: read from the environment.
            on_wait: told what is waited for; default: a warning in the log.
            on_idle: called about every second while nothing arrives; may raise.

        Raises:
            SettingsError: a setting is wrong.
        """
        given = {
            "broker_url": broker_url,
            "results_url": results_url,
            "model": model,
            "accuracy": accuracy,
            "strict": strict,
            "dtype": dtype,
        }
        if settings is None:
            settings = ProducerSettings.load(**given)
        elif any(value is not None for value in given.values()):
            raise TypeError("Give either settings or single values, not both.")
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
        self._lookout = FleetDiscovery(
            settings,
            results=self._results,
            broker=self._broker,
            on_idle=self._on_idle,
        )
        self._kept_tokens = 0

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
        """Return the card of the model that the fleet serves, waiting for Redis and a first worker.

        Raises:
            QueueUnavailable: Redis could not be reached for `startup_timeout_s`, or refuses us.
            NoWorker: no worker announced the model within `startup_timeout_s`.
        """
        return self._lookout.model_info()

    def window(self) -> int:
        """Return how many batches a job may have in flight on the fleet as it is."""
        return window(self._lookout.count_workers().total(), self.settings.max_in_flight)

    def workers(self) -> str:
        """Return how many living workers compute on which device, such as ``2 npu, 1 cpu``."""
        living = self._lookout.count_workers()
        return ", ".join(f"{n} {device}" for device, n in sorted(living.items()))

    def engine(self) -> dict[str, str]:
        """Return device, engine and precision of the worker that serves the model.

        Only a fleet of one, as of a local run, has one answer; the first worker by name gives it.
        """
        return self._lookout.engine()

    def spec(
        self,
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        on_long: OnLong | str | None = None,
        accuracy: Accuracy | str | None = None,
    ) -> VectorSpec:
        """Say what will shape the vectors of a call with these options.

        Raises:
            SettingsError: an unknown prompt name, policy or accuracy class.
            NotQuantized: class int8, and no worker has a quantized model, or they have several.
            QueueUnavailable, NoWorker: as card.
        """
        return resolve_spec(
            self.settings,
            self.model_info(),
            prompt_name=prompt_name,
            prompt=prompt,
            on_long=on_long,
            accuracy=accuracy,
            quantized=self._lookout.quantized,
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
        """Embed texts and return their vectors in order.

        Args:
            texts: a list or any iterable of strings, or one string.
            prompt_name: name of a prompt of the model, put before each text.
            prompt: a prompt itself; wins over prompt_name.
            on_long: ``truncate`` or ``error`` for texts of more tokens than the model takes.
            accuracy: ``standard``, ``exact`` or ``int8``.
            strict: take vectors from an NPU or not at all.
            timeout_s: longest silence of the fleet, in seconds; None waits.

        Returns:
            float32 (float16 with that dtype) [n, D]; [D] for one string; [0, D] for an empty list.

        Raises:
            TextsFailed: some texts have no vector; the others are in ``.vectors``.
            BatchFailed: the worker refused a batch as a whole.
            QueueUnavailable, NoWorker, ResultTimeout: there is no answer to be had.
            StrictUnavailable: no NPU came for `startup_timeout_s`.
        """
        if isinstance(texts, bytes | bytearray):
            raise ContractError("encode() takes text, not bytes. Decode them first.")
        spec = self.spec(prompt_name=prompt_name, prompt=prompt, on_long=on_long, accuracy=accuracy)
        slices = self.split([texts] if isinstance(texts, str) else texts, spec)
        failures: dict[int, str] = {}
        planned = len(texts) if isinstance(texts, Sized) and not isinstance(texts, str) else None
        rows = VectorBuffer(spec, planned)
        job = self.job(slices, spec, strict=strict, planned=planned)
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
            texts: a list or any iterable; pulled only as fast as the window allows.
            prompt_name, prompt, on_long, accuracy, strict: as in encode.

        Raises:
            ContractError: texts is one text.
            QueueUnavailable, NoWorker, SettingsError: as encode.
        """
        _require_many("submit", texts)
        spec = self.spec(prompt_name=prompt_name, prompt=prompt, on_long=on_long, accuracy=accuracy)
        planned = len(texts) if isinstance(texts, Sized) else None
        job = self.job(self.split(texts, spec), spec, strict=strict, planned=planned)
        try:
            job.start()
        except BaseException:
            job.cancel()  # who gets no handle cannot
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
        """Embed any number of documents in constant memory, one `Embedded` after the other.

        Args:
            documents: texts, (id, text) pairs or Documents.
            ordered: in the order of the documents, or as they complete.
            checkpoint: file for `Stream.commit`, from which a restarted program goes on.
            prompt_name, prompt, on_long, accuracy, strict: as in encode.

        Raises:
            ContractError: documents is one text.
            InputError: the checkpoint does not fit.
            QueueUnavailable, NoWorker, SettingsError: as encode.
        """
        _require_many("stream", documents)
        spec = self.spec(prompt_name=prompt_name, prompt=prompt, on_long=on_long, accuracy=accuracy)
        return Stream(self, spec, documents, ordered=ordered, checkpoint=checkpoint, strict=strict)

    def forget(self, job: str) -> None:
        """Drop what a killed program left of a job; workers drop its batches that are still queued.

        Raises:
            QueueUnavailable: Redis cannot be reached.
        """
        self._results.call(Ledger(self.redis, job).drop)

    def split(self, texts: Iterable[object], spec: VectorSpec) -> Iterator[TextBatch]:
        """Cut texts into the batches that this client would publish."""
        return split(
            texts,
            max_texts=self.settings.batch_texts,
            max_tokens=self.batch_tokens(spec),
            max_length=spec.max_length,
        )

    def batch_tokens(self, spec: VectorSpec) -> int:
        """Return the estimated tokens of a full batch."""
        # Only the CPU serves exact jobs, however fast the other devices are.
        devices = () if spec.accuracy is Accuracy.EXACT else self._lookout.count_workers()
        return batch_tokens(self.settings.batch_tokens or self._kept_tokens, devices)

    def keep_batch_tokens(self, tokens: int) -> None:
        """Split as an earlier run did, whatever the fleet is now, unless the settings say how."""
        self._kept_tokens = tokens

    def job(
        self,
        slices: Iterable[TextBatch],
        spec: VectorSpec,
        *,
        ordered: bool = True,
        label: str = "",
        spare: int = 0,
        strict: bool | None = None,
        refusable: bool = True,
        planned: int | None = None,
    ) -> Job:
        """Prepare a job over batches; read its `batches()` to run it.

        Args:
            slices: the batches.
            spec: what shapes the vectors.
            ordered: hand them out in order.
            label: shown to operators.
            spare: batches of the window that the caller keeps for what it has not saved yet.
            strict: take vectors from an NPU or not at all; None as the settings say.
            refusable: a Redis that is nearly full refuses the job at its start; otherwise it waits
                for room, as a running job does.
            planned: texts in all of them, shown to operators; None if that is not known.

        Raises:
            SettingsError: strict and exact or int8, which no device can be at once.
        """
        queue = select_queue(spec, strict=self.settings.strict if strict is None else strict)
        on_idle = self._on_idle
        if queue is Queue.NPU_STRICT:
            watch = NpuAvailability(
                lambda: list_live_workers(self.redis), self.settings.startup_timeout_s
            )
            on_idle = _both(watch.check, on_idle)
        context = JobContext(
            # A copy, because its deadline is the job's; it also retries operations of the broker.
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
            slices,
            window=lambda: max(1, self.window() - spare),
            refusable=refusable,
            planned=planned,
        )


def _require_many(name: str, texts: object) -> None:
    """Refuse a single text: each of its characters would be taken for one."""
    if isinstance(texts, str | bytes | bytearray):
        raise ContractError(
            f"{name}() takes many texts, not one {type(texts).__name__} of {len(texts):,}. "
            f"Put it into a list: {name}([text])."
        )


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call
