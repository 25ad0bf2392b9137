"""Quantises a model to int8 with NNCF, and judges the copy before anybody is served by it.

The only file that imports ``nncf``, inside a function: it costs two seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq.contract import VectorSpec
from embedq.errors import SettingsError
from embedq.message import EmbedBatch
from embedq_worker.calibration import Line
from embedq_worker.embedder import Embedder
from embedq_worker.errors import EngineError, Reason
from embedq_worker.golden import GOLDEN
from embedq_worker.graph import build_graph
from embedq_worker.models import Model
from embedq_worker.packing import TokenBatch, build_padded
from embedq_worker.planning import plan_padded
from embedq_worker.quantised import Quality, Quantised, calibration_digest
from embedq_worker.tokenization import Tokenizer

#: Neighbours that are compared.
NEIGHBOURS: Final = 10
#: Texts that the report names.
NAMED: Final = 10
#: Padded tokens of one calibration batch; small, so that padding weighs as it does when serving.
_BUDGET: Final = 512
#: Texts embedded between two reports of progress.
_CHUNK: Final = 128

Vectors = npt.NDArray[np.float32]


def require_nncf() -> None:
    """Check that what quantises is installed.

    Raises:
        SettingsError: it is not; the message says how to get it.
    """
    if importlib.util.find_spec("nncf") is None or importlib.util.find_spec("openvino") is None:
        raise SettingsError(
            "Quantising needs NNCF and OpenVINO, which are not installed. Run: "
            "pip install 'embedq[quantize]'. Serving the result needs only OpenVINO."
        )


def quantize_graph(
    model: Model, lines: Sequence[Line], tell: Callable[[str], None] = lambda _: None
) -> Quantised:
    """Quantise a model by NNCF's post-training method; its quality is still to be judged.

    Args:
        model: what to quantise.
        lines: texts for calibration.
        tell: gets progress.

    Raises:
        ModelError: the files of the model are damaged.
        EngineError: NNCF refuses the graph.
    """
    # NNCF tells Google Analytics as OpenVINO does; engines/openvino.py keeps both from it.
    import nncf

    from embedq_worker.engines.openvino import Runtime, pack_ir
    from embedq_worker.engines.target import CPU

    nncf.set_log_level(logging.ERROR)
    method = f"NNCF {version('nncf')}"
    # The golden texts are among them for the shortest: calibrated with prose alone, the empty text
    # came out at cosine 0.90 and "hi" at 0.97 (measured 2026-11-22).
    texts = [*(line.text for line in lines), *GOLDEN]
    graph = Runtime(CPU).read(build_graph(model))
    feeds = [_feed(batch) for batch in _batches(model, texts)]
    tell(f"quantising with {method}: {len(feeds):,} inferences for statistics, and then biases")
    try:
        with redirect_stdout(sys.stderr):  # it shows its progress where results belong
            made = nncf.quantize(
                graph,
                nncf.Dataset(feeds),
                subset_size=len(feeds),
                # Keeps its smoothing and signed products: cosine mean 0.998 and overlap 0.947 on
                # 400 docstrings, against 0.994 and 0.902 without smoothing, and 0.991 and 0.893
                # with an alpha of 0.5 for it (bf16 between the products, measured 2026-11-22).
                model_type=nncf.ModelType.TRANSFORMER,
            )
    except Exception as error:  # NNCF's own classes have no common parent
        reason = f"NNCF cannot quantise {model.label}: {type(error).__name__}: {error}"
        raise EngineError(reason, Reason.COMPILE_REFUSED) from error
    name = calibration_digest(texts, method)
    return Quantised(name, pack_ir(made), Quality(len(lines), 0, 0.0, 0.0, 0.0, (), method))


def compare(found: Vectors, trusted: Vectors, lines: Sequence[int]) -> dict[str, Any]:
    """Compare vectors, unit float32 [n, D] both; see Quality for what comes back."""
    cosines = (found * trusted).sum(axis=1)
    overlaps = _overlaps(found, trusted)
    worst = np.lexsort((cosines, overlaps))[:NAMED]
    return {
        "held_out_texts": len(lines),
        "cosine_mean": round(float(cosines.mean()), 6),
        "cosine_min": round(float(cosines.min()), 6),
        "overlap": round(float(overlaps.mean()), 6),
        "changed": tuple(
            (lines[i], round(float(cosines[i]), 4), round(float(overlaps[i]), 2)) for i in worst
        ),
    }


def embed_lines(
    embedder: Embedder, model: Model, lines: Sequence[Line], tell: Callable[[str], None]
) -> Vectors:
    """Embed texts as a job would, unit float32 [n, D].

    Raises:
        EngineError: the engine fails.
    """
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    parts: list[Vectors] = []
    for at in range(0, len(lines), _CHUNK):
        texts = [line.text for line in lines[at : at + _CHUNK]]
        parts.append(embedder.embed(EmbedBatch("quantize", 0, texts, spec))[0])
        tell(f"{at + len(texts):,} of {len(lines):,} held-out texts embedded")
    vectors = np.concatenate(parts)
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _overlaps(found: Vectors, trusted: Vectors) -> npt.NDArray[np.float64]:
    """Return the share of its nearest neighbours that each text keeps, [n]."""
    count = min(NEIGHBOURS, len(found) - 1)
    both = zip(_neighbours(found, count), _neighbours(trusted, count), strict=True)
    return np.array([len(set(now) & set(before)) / count for now, before in both])


def _neighbours(vectors: Vectors, count: int) -> list[list[int]]:
    near = vectors @ vectors.T  # [n, n]
    np.fill_diagonal(near, -2)
    order: list[list[int]] = np.argsort(-near, axis=1, kind="stable")[:, :count].tolist()
    return order


def _batches(model: Model, texts: Sequence[str]) -> Iterator[TokenBatch]:
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length)
    tokens = tokenizer.tokenize(texts)
    for group in plan_padded(tokens.lengths, _BUDGET, 1):
        yield build_padded(tokens, group, tokenizer.pad_id)


def _feed(batch: TokenBatch) -> dict[str, Any]:
    names = ("input_ids", "position_ids", "segment_ids", "segments")
    return {name: getattr(batch, name) for name in names}
