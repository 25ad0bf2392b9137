"""`embedq embed --dry-run`: extrapolates the cost of a job from an embedded sample."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from embedq.bulk.request import EmbedRequest, RunProgress, format_duration
from embedq.client import Client
from embedq.jobs.batches import Document, guess_tokens
from embedq.protocol.contract import Code, refusal
from embedq.protocol.values import ITEM_BYTES, TRUNCATED

#: Maximum number of documents that are embedded for an estimate.
SAMPLE: Final = 256

#: Bytes that the outcome of one row has in Redis, beside its vector.
OUTCOME_BYTES: Final = 10

#: Size of a message, in zstd and base64, relative to the UTF-8 of its texts.
WIRE_SHARE: Final = 0.6


@dataclass(slots=True)
class Sample:
    """A random sample of the inputs, and totals over all documents.

    Attributes:
        documents: the sample, at most SAMPLE documents.
        texts: number of all documents.
        text_bytes: bytes of UTF-8 of all texts.
        guessed_tokens: tokens of all texts, guessed from their sizes.
    """

    documents: list[Document] = field(default_factory=list)
    texts: int = 0
    text_bytes: int = 0
    guessed_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Estimated cost of a job.

    Attributes:
        texts: documents in the inputs.
        text_bytes: bytes of UTF-8 of all texts.
        tokens: estimated tokens of all texts that can be embedded.
        truncated_share: share of truncated texts in the sample.
        failed_share: share of failed texts in the sample.
        docs_per_second: speed of the sample; a long job is faster, because its batches are fuller.
        seconds: estimated duration of the job on the current fleet.
        output_bytes: size of the vectors in the output.
        redis_bytes: estimated peak memory in Redis: messages and vectors of one full window.
        sampled: documents that were embedded for the estimate.
    """

    texts: int
    text_bytes: int
    tokens: int
    truncated_share: float
    failed_share: float
    docs_per_second: float
    seconds: float
    output_bytes: int
    redis_bytes: int
    sampled: int

    def as_dict(self) -> dict[str, Any]:
        """Return the estimate as a JSON object."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the estimate as lines of text."""
        return [
            f"texts             {self.texts:,} ({self.text_bytes / 1e6:,.1f} MB)",
            f"tokens            about {self.tokens:,}",
            f"truncated         about {self.truncated_share:.1%}",
            f"failed            about {self.failed_share:.1%}",
            f"speed             about {self.docs_per_second:,.0f} docs/s",
            f"time              about {format_duration(self.seconds)}",
            f"vectors on disk   {self.output_bytes / 1e6:,.1f} MB",
            f"memory of Redis   at most about {self.redis_bytes / 1e6:,.1f} MB",
            f"from a sample of  {self.sampled:,} texts",
        ]


def estimate(client: Client, request: EmbedRequest) -> Estimate:
    """Read all inputs, embed a random sample, and extrapolate.

    Raises:
        InputError: an input cannot be read.
        QueueUnavailable, NoWorker, ResultError: see Client.encode.
    """
    spec = request.spec(client)
    sample = sample_of(request, spec.max_length)
    chosen = [document.text for document in sample.documents]
    texts = sample.texts
    batches = list(client.split(chosen, spec))
    list(client.job(batches[:1], spec).batches())  # warm-up: the first inferences are slower
    began = time.perf_counter()
    results = list(client.job(batches, spec).batches())
    seconds = time.perf_counter() - began
    tokens = sum(int(result.outcomes.n_tokens.sum()) for result in results)
    n = max(1, len(chosen))
    # Scaled by guessed tokens, not by documents: a few long texts would bias the mean.
    scale = sample.guessed_tokens / max(1.0, sum(_guess(text, spec.max_length) for text in chosen))
    mean_bytes = sample.text_bytes / max(1, texts)
    per_batch = min(client.settings.batch_texts, client.batch_tokens(spec) / max(1.0, tokens / n))
    window_rows = min(texts, client.window() * per_batch)
    vector_bytes = ITEM_BYTES[spec.dtype] * spec.dim
    row_bytes = vector_bytes + OUTCOME_BYTES + WIRE_SHARE * mean_bytes
    return Estimate(
        texts=texts,
        text_bytes=sample.text_bytes,
        tokens=int(tokens * scale),
        truncated_share=sum(result.outcomes.count_flag(TRUNCATED) for result in results) / n,
        failed_share=sum(result.outcomes.count_failed() for result in results) / n,
        docs_per_second=round(len(chosen) / seconds, 1) if chosen else 0.0,
        seconds=round(seconds * scale, 1) if chosen else 0.0,
        output_bytes=vector_bytes * texts,
        redis_bytes=int(window_rows * row_bytes),
        sampled=len(chosen),
    )


def sample_of(request: EmbedRequest, max_length: int) -> Sample:
    """Draw a uniform sample from the documents of a request, and sum up their sizes.

    Source: Vitter, "Random Sampling with a Reservoir", algorithm R.
    """
    choose = random.Random(0)
    sample = Sample()
    for document in request.documents(RunProgress()):
        sample.texts += 1
        sample.text_bytes += _size(document.text)
        sample.guessed_tokens += _guess(document.text, max_length)
        if sample.texts <= SAMPLE:
            sample.documents.append(document)
        elif (at := choose.randrange(sample.texts)) < SAMPLE:
            sample.documents[at] = document
    return sample


def _size(text: object) -> int:
    return len(text.encode(errors="replace")) if isinstance(text, str) else 0


def _guess(text: object, max_length: int) -> float:
    return guess_tokens(_size(text), max_length) if refusal(text) is Code.NONE else 0.0
