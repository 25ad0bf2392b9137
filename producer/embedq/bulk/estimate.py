"""`embedq embed --dry-run`: what a job would take, from a sample that is really embedded."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from embedq.bulk.request import EmbedRequest, RunProgress, format_duration
from embedq.client import Client
from embedq.jobs.batches import Document, TextBatch, guess_tokens
from embedq.protocol.contract import Code, refusal
from embedq.protocol.values import ITEM_BYTES, TRUNCATED

#: Documents embedded for the estimate.
SAMPLE: Final = 256


#: Bytes of outcome that a row has in Redis beside its vector.
OUTCOME_BYTES: Final = 10


#: A message is compressed by zstd and then written in base64; measured on docstrings.
WIRE_SHARE: Final = 0.6


@dataclass(slots=True)
class Sample:
    """Some documents of an input, and what is known of all of them.

    Attributes:
        documents: at most SAMPLE.
        texts: how many there are.
        text_bytes: of all of them, in UTF-8.
        guessed: their tokens as batching guesses them.
    """

    documents: list[Document] = field(default_factory=list)
    texts: int = 0
    text_bytes: int = 0
    guessed: float = 0.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a job would take.

    Attributes:
        texts: documents in the inputs.
        text_bytes: of all of them, in UTF-8.
        tokens: estimated, of what would be embedded.
        truncated_share: of the sample.
        failed_share: of the sample.
        docs_per_second: of the sample; a long job is faster, because its batches are fuller.
        seconds: estimated for the whole job on the fleet as it is.
        output_bytes: of the vectors.
        redis_bytes: estimated highest use, messages and vectors of one full window.
        sampled: documents that were embedded for this.
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
        """Return the estimate for JSON."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the estimate for a person."""
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
        QueueUnavailable, NoWorker, ResultError: as Client.encode.
    """
    spec = request.spec(client)
    sample = sample_of(request, spec.max_length)
    chosen = [document.text for document in sample.documents]
    texts, text_bytes = sample.texts, sample.text_bytes
    settings = client.settings
    pieces = list(client.split(chosen, spec))
    for warm_up in (True, False):  # the first inferences of a worker allocate
        began = time.perf_counter()
        batches = list(client.job(_first(pieces, warm_up), spec).batches())
    seconds = time.perf_counter() - began
    tokens = sum(int(batch.outcomes.n_tokens.sum()) for batch in batches)
    n = max(1, len(chosen))
    # By guessed tokens, not by documents: a few long ones would make the sample a poor mean.
    share = sample.guessed / max(1.0, sum(_guess(text, spec.max_length) for text in chosen))
    mean_bytes = text_bytes / max(1, texts)
    per_batch = min(settings.batch_texts, client.batch_tokens(spec) / max(1.0, tokens / n))
    window_rows = min(texts, client.window() * per_batch)
    row_bytes = ITEM_BYTES[spec.dtype] * spec.dim + OUTCOME_BYTES + WIRE_SHARE * mean_bytes
    return Estimate(
        texts=texts,
        text_bytes=text_bytes,
        tokens=int(tokens * share),
        truncated_share=sum(b.outcomes.count_flag(TRUNCATED) for b in batches) / n,
        failed_share=sum(b.outcomes.count_failed() for b in batches) / n,
        docs_per_second=round(len(chosen) / seconds, 1) if chosen else 0.0,
        seconds=round(seconds * share, 1) if chosen else 0.0,
        output_bytes=ITEM_BYTES[spec.dtype] * spec.dim * texts,
        redis_bytes=int(window_rows * row_bytes),
        sampled=len(chosen),
    )


def sample_of(request: EmbedRequest, max_length: int) -> Sample:
    """Choose documents evenly from a stream of unknown length, and measure the stream.

    Source: Vitter, "Random Sampling with a Reservoir", algorithm R.
    """
    choose = random.Random(0)
    sample = Sample()
    for document in request.documents(RunProgress()):
        sample.texts += 1
        sample.text_bytes += _size(document.text)
        sample.guessed += _guess(document.text, max_length)
        if sample.texts <= SAMPLE:
            sample.documents.append(document)
        elif (at := choose.randrange(sample.texts)) < SAMPLE:
            sample.documents[at] = document
    return sample


def _size(text: object) -> int:
    return len(text.encode(errors="replace")) if isinstance(text, str) else 0


def _guess(text: object, max_length: int) -> float:
    return guess_tokens(_size(text), max_length) if refusal(text) is Code.NONE else 0.0


def _first(pieces: list[TextBatch], only: bool) -> list[TextBatch]:
    return pieces[:1] if only else pieces
