"""Tests of RoBERTa against the definition of BERT; test_families compares with transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.models import TINY, reference_vector, write_tiny

from embedq_worker.engines.base import RaggedTokens
from embedq_worker.engines.onnxruntime import OnnxRuntimeEngine
from embedq_worker.files import DigestCache
from embedq_worker.inference.packing import build_padded
from embedq_worker.model.families import roberta
from embedq_worker.model.json_file import JsonFile
from embedq_worker.model.resolve import load_model


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("pad_id", [0, 1, 5])
def test_first_token_has_the_position_behind_that_of_the_padding(
    tmp_path: Path, kind: str, pad_id: int
) -> None:
    tensors = write_tiny(tmp_path, model_type=kind, pad_token_id=pad_id)
    model = load_model(tmp_path, "m", DigestCache(tmp_path / "cache"))
    ids = np.arange(10, 30)
    name = "embeddings.position_embeddings.weight"
    shifted = {**tensors, name: tensors[name][pad_id + 1 :]}

    engine = OnnxRuntimeEngine(model, threads=1)
    tokens = RaggedTokens(ids.astype(np.int32), np.array([0, len(ids)]), np.zeros(1, np.uint32))
    vectors = engine.infer(build_padded(tokens, [0], pad_id))
    engine.close()

    assert np.abs(vectors[0, 0] - reference_vector(shifted, TINY, ids)).max() < 2e-5


def test_positions_up_to_that_of_the_padding_are_for_no_text() -> None:
    # 512 is the maximum length of xlm-roberta-base, whose config.json has these values.
    values = {**TINY, "max_position_embeddings": 514, "pad_token_id": 1}

    assert roberta.read(JsonFile(Path("config.json"), values))["max_positions"] == 512
