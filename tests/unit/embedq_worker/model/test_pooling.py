"""Tests of each pooling against its formula, for padded rows and for rows of several texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest

from embedq_worker.engines.base import RaggedTokens, TokenBatch
from embedq_worker.inference.packing import (
    build_padded,
    build_shared,
    exclude_prompt,
    skip_pad_tokens,
)
from embedq_worker.model.config import ModelConfig
from embedq_worker.model.graph import OPSET
from embedq_worker.model.modules import POOLING_MODES
from embedq_worker.model.onnx_graph import OnnxBuilder
from embedq_worker.model.pooling import append_pooling

Array = npt.NDArray[np.float32]
Pack = Callable[[RaggedTokens], TokenBatch]

DIM, VOCABULARY, LONGEST = 6, 50, 33
PROMPT_TOKENS = 3

#: Vector of each token. All negative, so that a maximum with a zero from outside shows.
TOKEN_VECTORS = -np.abs(np.random.default_rng(3).normal(size=(VOCABULARY, DIM))).astype(np.float32)
TEXTS = [
    [int(token) for token in np.random.default_rng(4).integers(2, VOCABULARY, length)]
    for length in (4, LONGEST, 5, 8, 17)
]


def pad(tokens: RaggedTokens) -> TokenBatch:
    return build_padded(tokens, range(len(TEXTS)), pad_id=0)


def pack(tokens: RaggedTokens) -> TokenBatch:
    """Put the texts into two rows of different numbers of texts, with padding behind them."""
    return build_shared(tokens, [[1], [3, 0, 4, 2]], pad_id=0, width=40)


def expected_vector(mode: str, text: Sequence[int], prompt: int = 0) -> Array:
    """Pool one text.

    Source: sentence_transformers, sentence_transformer/modules/pooling.py, _forward_padded. The
    weights of the weighted mean count the tokens of the prompt, which are not pooled themselves.
    """
    vectors = TOKEN_VECTORS[list(text)].astype(np.float64)[prompt:]
    places = np.arange(1, len(text) + 1)[prompt:, None]
    pooled = {
        "cls": vectors[0],
        "lasttoken": vectors[-1],
        "max": vectors.max(0),
        "mean": vectors.sum(0) / len(vectors),
        "mean_sqrt_len_tokens": vectors.sum(0) / np.sqrt(len(vectors)),
        "weightedmean": (vectors * places).sum(0) / places.sum(),
    }[mode]
    return np.asarray(pooled, np.float32)


def ragged(texts: Sequence[Sequence[int]]) -> RaggedTokens:
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    return RaggedTokens(
        np.concatenate(texts).astype(np.int32), offsets, np.zeros(len(texts), np.uint32)
    )


def run_pooling(pooling: str, batch: TokenBatch, *, include_prompt: bool = True) -> Array:
    """Pool the vectors of a token batch in a graph without an encoder, [B, S, D']."""
    config = ModelConfig(pooling, include_prompt, (), LONGEST, LONGEST, {}, "")
    builder = OnnxBuilder(OPSET, max_length=LONGEST, include_prompt=include_prompt, inline=True)
    hidden = builder.op("Gather", builder.constant(TOKEN_VECTORS), "input_ids")
    append_pooling(builder, hidden, config)
    graph = builder.graph(DIM * len(config.pooling_modes)).proto
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    used = {one.name for one in session.get_inputs()}
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "segment_ids": batch.segment_ids,
        "segments": batch.segments,
    }
    (vectors,) = session.run(None, {name: inputs[name] for name in used})
    return np.asarray(vectors)


def per_text(batch: TokenBatch, vectors: Array) -> Array:
    """Return the vector of each text in the order of the texts."""
    found = np.empty((len(TEXTS), vectors.shape[-1]), np.float32)
    for row, segment in np.argwhere(batch.members >= 0):
        found[batch.members[row, segment]] = vectors[row, segment]
    return found


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("place", [pad, pack])
def test_pooling_is_the_formula_of_sentence_transformers(mode: str, place: Pack) -> None:
    batch = place(ragged(TEXTS))

    vectors = run_pooling(mode, batch)

    expected = np.stack([expected_vector(mode, text) for text in TEXTS])
    np.testing.assert_allclose(per_text(batch, vectors), expected, rtol=1e-6, atol=1e-6)
    assert not vectors[batch.members < 0].any(), "a segment without text has a vector"


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("place", [pad, pack])
def test_excluded_prompt_is_not_pooled(mode: str, place: Pack) -> None:
    without_prompt = 2
    batch = exclude_prompt(place(ragged(TEXTS)), PROMPT_TOKENS, except_for=without_prompt)

    vectors = run_pooling(mode, batch, include_prompt=False)

    expected = [
        expected_vector(mode, text, 0 if number == without_prompt else PROMPT_TOKENS)
        for number, text in enumerate(TEXTS)
    ]
    np.testing.assert_allclose(per_text(batch, vectors), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("prompt", [0, PROMPT_TOKENS])
def test_padding_token_within_a_text_is_pooled_as_any_other(mode: str, prompt: int) -> None:
    """RoBERTa's positions skip it, but its attention mask is 1."""
    pad_id = 1
    texts = [[pad_id, *text[1:3], pad_id, *text[4:]] for text in TEXTS]
    batch = pack(ragged(texts))
    if prompt:
        batch = exclude_prompt(batch, prompt, except_for=len(texts))

    vectors = run_pooling(mode, skip_pad_tokens(batch, pad_id), include_prompt=not prompt)

    expected = [expected_vector(mode, text, prompt) for text in texts]
    np.testing.assert_allclose(per_text(batch, vectors), expected, rtol=1e-6, atol=1e-6)


def test_several_modes_are_concatenated_in_their_order() -> None:
    batch = pack(ragged(TEXTS))

    vectors = run_pooling("lasttoken+mean", batch)

    expected = [
        np.concatenate([expected_vector(mode, text) for mode in ("lasttoken", "mean")])
        for text in TEXTS
    ]
    np.testing.assert_allclose(per_text(batch, vectors), expected, rtol=1e-6, atol=1e-6)
