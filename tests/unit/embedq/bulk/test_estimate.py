"""Tests of the sample and the printed estimate of a dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedq.bulk.estimate import SAMPLE, Estimate, sample_of
from embedq.bulk.request import EmbedRequest
from embedq.jobs.batches import guess_tokens

ESTIMATE = Estimate(
    texts=1_234_567,
    text_bytes=390_000_000,
    tokens=75_000_000,
    truncated_share=0.034,
    failed_share=0.0,
    docs_per_second=120.0,
    seconds=10_288.0,
    output_bytes=1_896_294_912,
    redis_bytes=30_000_000,
    sampled=256,
)


def request(folder: Path, n: int) -> EmbedRequest:
    """Return a request for n numbered lines of 1 to 54 bytes."""
    source = folder / "in.txt"
    source.write_text("".join(f"{i}{'x' * (i % 50)}\n" for i in range(n)))
    return EmbedRequest((str(source),), folder / "out.npy")


def test_small_input_is_sampled_completely(tmp_path: Path) -> None:
    sample = sample_of(request(tmp_path, SAMPLE), 256)

    assert [document.id for document in sample.documents] == list(range(1, SAMPLE + 1))
    assert sample.texts == SAMPLE


def test_large_input_is_sampled_evenly_and_reproducibly(tmp_path: Path) -> None:
    large_request = request(tmp_path, 10_000)

    sample = sample_of(large_request, 256)

    chosen = [int(document.id) for document in sample.documents]
    assert len(set(chosen)) == SAMPLE
    quarters = [
        sum(start < at <= start + 2_500 for at in chosen) for start in range(0, 10_000, 2_500)
    ]
    assert min(quarters) > SAMPLE / 4 / 2
    assert sample_of(large_request, 256) == sample


def test_counts_cover_the_whole_input(tmp_path: Path) -> None:
    lines = [f"{i}{'x' * (i % 50)}" for i in range(1_000)]

    sample = sample_of(request(tmp_path, 1_000), 8)

    assert sample.texts == 1_000
    assert sample.text_bytes == sum(map(len, lines))
    assert sample.guessed_tokens == pytest.approx(sum(guess_tokens(len(line), 8) for line in lines))


def test_estimate_is_printed_with_units_and_separators() -> None:
    text = "\n".join(ESTIMATE.lines())

    for part in ("1,234,567 (390.0 MB)", "about 75,000,000", "3.4%", "120 docs/s", "2 h 51 min"):
        assert part in text
