"""embedq-worker quantize.

Texts out of a user's file for quantizing: some to calibrate with, others to judge by.

Quantizes a model to int8 with NNCF, and judges the copy before anybody is served by it.

The only file that imports ``nncf``, inside a function: it costs two seconds.

`embedq-worker quantize` from file to report: sample, quantize, prove, judge, keep.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from embedq.bulk.readers import Fields, expand, read
from embedq.errors import InputError, SettingsError
from embedq.jobs.batches import Document
from embedq.protocol.contract import Accuracy, VectorSpec, refusal
from embedq.protocol.message import EmbedBatch
from embedq_worker.engines.base import TokenBatch
from embedq_worker.engines.model_cache import (
    NAME_LENGTH,
    QuantizationReport,
    QuantizedModel,
    QuantizedModelStore,
    calibration_digest,
)
from embedq_worker.errors import EngineError, FailureReason
from embedq_worker.inference.embedder import Embedder
from embedq_worker.inference.opener import EngineOpener
from embedq_worker.inference.packing import build_padded
from embedq_worker.inference.planning import plan_padded
from embedq_worker.inference.selftest import GOLDEN
from embedq_worker.inference.tokenizer import Tokenizer
from embedq_worker.model.bert import build_graph
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import WorkerSettings

#: Texts for calibration, and for the report; more changed neither (see quantizing.py).
CALIBRATION_TEXTS: Final = 300


HELD_OUT_TEXTS: Final = 1_000


#: Fewest usable texts of a file.
MIN_TEXTS: Final = 40


#: Documents of a file that are looked at; a larger file is cut here, and the user is told.
MAX_DOCUMENTS: Final = 1_000_000


#: Characters of a text that are kept for each token of the model: more are cut off anyway.
_CHARACTERS_PER_TOKEN: Final = 64


#: The choice is the same every time, for the same file.
_SEED: Final = 20261122


#: Documents between two reports of progress.
_TELL_EVERY: Final = 50_000


class Line(NamedTuple):
    """One text and where it is in its file."""

    number: int
    text: str


class Sample(NamedTuple):
    """What was chosen of a file.

    Attributes:
        calibration, held_out: disjoint, and no text twice.
        read: documents that were looked at.
        complete: the whole file was.
    """

    calibration: list[Line]
    held_out: list[Line]
    read: int
    complete: bool


def sample_texts(
    inputs: Sequence[str],
    max_length: int,
    *,
    text_field: str = "text",
    format: str | None = None,
    calibration: int = CALIBRATION_TEXTS,
    held_out: int = HELD_OUT_TEXTS,
    tell: Callable[[str], None] = lambda _: None,
) -> Sample:
    """Choose texts at random from files, in memory that does not grow with them.

    Args:
        inputs: names and globs of txt, jsonl or csv, or of a .gz of one.
        max_length: tokens the model takes.
        text_field: field of the text.
        format: of every input; default: by its ending.
        calibration, held_out: how many at most. Of a small file, a quarter is for calibration.
        tell: gets progress.

    Raises:
        InputError: a file cannot be read, or has too few texts.
    """
    wanted = calibration + held_out
    rng = random.Random(_SEED)
    chosen: list[Line] = []
    seen: set[int] = set()
    at, complete = 0, True
    for at, document in enumerate(_documents(inputs, text_field, format), 1):
        if at > MAX_DOCUMENTS:
            at, complete = MAX_DOCUMENTS, False
            break
        if at % _TELL_EVERY == 0:
            tell(f"{at:,} documents read")
        text = document.text
        if refusal(text) or not isinstance(text, str) or not text.strip():
            continue
        mark = hash(text)  # a collision loses one text of a million
        if mark in seen:
            continue
        seen.add(mark)
        line = Line(int(document.id), text[: _CHARACTERS_PER_TOKEN * max_length])
        if len(chosen) < wanted:
            chosen.append(line)
        elif (place := rng.randrange(len(seen))) < wanted:
            chosen[place] = line
    if len(chosen) < MIN_TEXTS:
        raise InputError(
            f"{', '.join(inputs)}: {len(chosen):,} different texts that can be embedded, of "
            f"{at:,} documents; quantizing needs at least {MIN_TEXTS}, and {wanted:,} are better. "
            "Give it a file of texts like those that you will embed."
        )
    rng.shuffle(chosen)
    cut = min(calibration, max(MIN_TEXTS // 4, len(chosen) // 4))
    return Sample(chosen[:cut], chosen[cut : cut + held_out], at, complete)


def _documents(inputs: Sequence[str], text_field: str, format: str | None) -> Iterator[Document]:
    # No file has a field of this name, so that every document is named by its line.
    fields = Fields(id="\0", text=text_field)
    return read(expand(inputs), fields=fields, format=format, skip_bad_lines=True)


#: Neighbors that are compared.
NEIGHBORS: Final = 10


#: Texts that the report names.
NAMED: Final = 10


#: Padded tokens of one calibration batch; small, so that padding weighs as it does when serving.
_BUDGET: Final = 512


#: Texts embedded between two reports of progress.
_CHUNK: Final = 128


Vectors = npt.NDArray[np.float32]


def require_nncf() -> None:
    """Check that what quantizes is installed.

    Raises:
        SettingsError: it is not; the message says how to get it.
    """
    if importlib.util.find_spec("nncf") is None or importlib.util.find_spec("openvino") is None:
        raise SettingsError(
            "Quantizing needs NNCF and OpenVINO, which are not installed. Run: "
            "pip install 'embedq[quantize]'. Serving the result needs only OpenVINO."
        )


def quantize_graph(
    model: Model, lines: Sequence[Line], tell: Callable[[str], None] = lambda _: None
) -> QuantizedModel:
    """Quantize a model by NNCF's post-training method; its quality is still to be judged.

    Args:
        model: what to quantize.
        lines: texts for calibration.
        tell: gets progress.

    Raises:
        ModelError: the files of the model are damaged.
        EngineError: NNCF refuses the graph.
    """
    # NNCF tells Google Analytics as OpenVINO does; engines/openvino.py keeps both from it.
    import nncf

    from embedq_worker.engines.openvino_runtime import CPU, Runtime, pack_ir

    nncf.set_log_level(logging.ERROR)
    method = f"NNCF {version('nncf')}"
    # The golden texts are among them for the shortest: calibrated with prose alone, the empty text
    # came out at cosine 0.90 and "hi" at 0.97 (measured 2026-11-22).
    texts = [*(line.text for line in lines), *GOLDEN]
    graph = Runtime(CPU).read(build_graph(model))
    feeds = [_feed(batch) for batch in _batches(model, texts)]
    tell(f"quantizing with {method}: {len(feeds):,} inferences for statistics, and then biases")
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
        reason = f"NNCF cannot quantize {model.label}: {type(error).__name__}: {error}"
        raise EngineError(reason, FailureReason.COMPILE_REFUSED) from error
    name = calibration_digest(texts, method)
    return QuantizedModel(
        name, pack_ir(made), QuantizationReport(len(lines), 0, 0.0, 0.0, 0.0, (), method)
    )


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
    """Return the share of its nearest neighbors that each text keeps, [n]."""
    count = min(NEIGHBORS, len(found) - 1)
    both = zip(_neighbors(found, count), _neighbors(trusted, count), strict=True)
    return np.array([len(set(now) & set(before)) / count for now, before in both])


def _neighbors(vectors: Vectors, count: int) -> list[list[int]]:
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


#: Flags of a CPU that multiplies in int8 faster than in f32.
FAST_INT8: Final = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")


Tell = Callable[[str], None]


class Wanted(NamedTuple):
    """What a person asked for.

    Attributes:
        inputs, text_field, format: the file and how it is read.
        texts: most texts for calibration.
        min_overlap: smallest top-10 overlap with which the copy is kept.
    """

    inputs: tuple[str, ...]
    text_field: str = "text"
    format: str | None = None
    texts: int = 300
    min_overlap: float = 0.9


class Result(NamedTuple):
    """What came of it.

    Attributes:
        model, name: of what was quantized, and of the copy.
        quality: the report.
        folder: where it is kept.
        problem: why it is not; empty if it is.
        warnings: what the user should know.
    """

    model: str
    name: str
    report: QuantizationReport
    folder: Path
    problem: str
    warnings: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether workers will serve it."""
        return not self.problem

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        shown = {**self._asdict(), "report": self.report.as_dict(), "folder": str(self.folder)}
        return {**shown, "kept": self.kept}

    def lines(self) -> Iterator[str]:
        """Yield the result for people."""
        yield f"{self.model}, quantized copy {self.name}"
        yield self.report.summary()
        yield "The texts that changed most:"
        for line, cosine, overlap in self.report.changed:
            yield f"  line {line:,}: cosine {cosine:.4f}, {overlap:.0%} of its neighbors stayed"
        yield from self.warnings
        if self.problem:
            yield f"Not kept: {self.problem}"
        else:
            yield f"Kept in {self.folder}. Start the worker again to serve jobs of class int8."


def run(settings: WorkerSettings, wanted: Wanted, tell: Tell) -> Result:
    """Quantize the model of a worker.

    Raises:
        InputError: the file cannot be read, or has too few texts.
        SettingsError: the cache cannot be written, or there is no model.
        ModelError, EngineError: an engine cannot be opened or proven.
    """
    model = find_model(settings)
    if model is None:
        raise SettingsError("The stub has no model to quantize. Unset EMBEDQ_DEVICE.")
    store = QuantizedModelStore(settings.cache_dir, model)
    if store.error:
        raise SettingsError(f"A quantized model cannot be kept: {store.error}.")
    sample = sample_texts(
        wanted.inputs,
        model.max_length,
        text_field=wanted.text_field,
        format=wanted.format,
        calibration=wanted.texts,
        tell=tell,
    )
    tell(
        f"{sample.read:,} documents read, {len(sample.calibration):,} texts for calibration, "
        f"{len(sample.held_out):,} held out"
    )
    return _quantize(settings, wanted, model, store, sample, tell)


def _quantize(
    settings: WorkerSettings,
    wanted: Wanted,
    model: Model,
    store: QuantizedModelStore,
    sample: Sample,
    tell: Tell,
) -> Result:
    opener = EngineOpener(settings, model)
    made = quantize_graph(model, sample.calibration, tell)
    proven = opener.open_int8(made)
    try:
        tell("comparing with fp32")
        found = embed_lines(proven.embedder, model, sample.held_out, tell)
    finally:
        proven.close()
    exact = opener.open_cpu(Accuracy.EXACT)
    try:
        trusted = embed_lines(exact.embedder, model, sample.held_out, tell)
    finally:
        exact.close()
    figures = compare(found, trusted, [line.number for line in sample.held_out])
    quality = replace(made.report, **figures)
    problem = ""
    if quality.overlap < wanted.min_overlap:
        problem = (
            f"the top-10 overlap is {quality.overlap:.3f}, and --min-overlap asks for "
            f"{wanted.min_overlap}. Give it texts more like those that you will embed, or more of "
            "them (--texts), or accept less."
        )
    elif not store.keep(made.name, made.graph, quality):
        problem = "the cache could not be written; the log says why."
    return Result(
        model.label,
        made.name[:NAME_LENGTH],
        quality,
        store.folder,
        problem,
        tuple(_warnings(sample)),
    )


def _warnings(sample: Sample) -> Iterator[str]:
    if not sample.complete:
        yield f"Only the first {sample.read:,} documents were looked at."
    if len(sample.held_out) < 200:
        yield f"{len(sample.held_out)} held-out texts say little; a larger file says more."
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if not any(flag in flags for flag in FAST_INT8):
        yield "This CPU has no int8 products (VNNI or AMX): int8 will hardly be faster than f32."
