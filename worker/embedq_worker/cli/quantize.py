"""Work of `embedq-worker quantize`: sample texts, quantize, self-test, compare with fp32, store.

The only file that imports ``nncf``, inside a function because the import takes seconds.
"""

from __future__ import annotations

import importlib.util
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from embedq.bulk.readers import Fields, expand, read
from embedq.errors import InputError, SettingsError
from embedq.protocol.contract import Accuracy, VectorSpec, refusal
from embedq.protocol.message import EmbedBatch
from embedq.protocol.values import Vectors
from embedq_worker.engines.base import INPUTS, TokenBatch
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
from embedq_worker.model.graph import build_graph
from embedq_worker.model.resolve import Model, find_model
from embedq_worker.settings import WorkerSettings

#: Receives lines of progress.
Progress = Callable[[str], None]

#: Default numbers of texts for calibration and for the report; more change neither.
CALIBRATION_TEXTS: Final = 300
HELD_OUT_TEXTS: Final = 1_000
#: Minimum number of usable texts.
MIN_TEXTS: Final = 40
#: Maximum number of documents that are read.
MAX_DOCUMENTS: Final = 1_000_000
#: Number of nearest neighbors that are compared.
NEIGHBORS: Final = 10
#: Number of most changed texts in the report.
NAMED: Final = 10
#: Held-out texts below which the report warns.
FEW_HELD_OUT: Final = 200
#: CPU flags of int8 products that are faster than f32.
FAST_INT8: Final = ("avx512_vnni", "avx_vnni", "amx_int8", "i8mm", "asimddp")
#: Characters per token after which a sampled text is cut; the model truncates it anyway.
_CHARACTERS_PER_TOKEN: Final = 64
#: Fixed, so that the same file gives the same sample.
_SEED: Final = 20261122
#: Documents read, and texts embedded, between two lines of progress.
_DOCUMENTS_PER_LINE, _CHUNK = 50_000, 128
#: Padded tokens per calibration batch; small, so that padding weighs as in service.
_BUDGET: Final = 512


def require_nncf() -> None:
    """Check that NNCF and OpenVINO are installed.

    Raises:
        SettingsError: one is missing; the message says how to install it.
    """
    if importlib.util.find_spec("nncf") is None or importlib.util.find_spec("openvino") is None:
        raise SettingsError(
            "Quantizing needs NNCF and OpenVINO, which are not installed. Run: "
            "pip install 'embedq[quantize]'. Serving the quantized model needs only OpenVINO."
        )


class Line(NamedTuple):
    """One text and its line in the file."""

    number: int
    text: str


class Sample(NamedTuple):
    """Texts sampled from files.

    Attributes:
        calibration, held_out: disjoint, without duplicates.
        read: number of documents read.
        complete: whether all documents were read.
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
    progress: Progress = lambda _: None,
) -> Sample:
    """Sample texts from files by reservoir sampling, in bounded memory.

    Args:
        inputs: names and globs of txt, jsonl or csv files, or .gz of one.
        max_length: maximum tokens per text of the model.
        text_field: field that holds the text.
        format: txt, jsonl or csv; None = by file extension.
        calibration, held_out: maximum numbers of texts. Of a small file, a quarter of the texts is
            for calibration.
        progress: receives lines of progress.

    Raises:
        InputError: a file cannot be read, or has too few texts.
    """
    wanted = calibration + held_out
    rng = random.Random(_SEED)
    chosen: list[Line] = []
    seen: set[int] = set()
    at, complete = 0, True
    # No file has a field of this name, so each document gets its line number as id.
    fields = Fields(id="\0", text=text_field)
    documents = read(expand(inputs), fields=fields, format=format, skip_bad_lines=True)
    for at, document in enumerate(documents, 1):
        if at > MAX_DOCUMENTS:
            at, complete = MAX_DOCUMENTS, False
            break
        if at % _DOCUMENTS_PER_LINE == 0:
            progress(f"{at:,} documents read")
        text = document.text
        if refusal(text) or not isinstance(text, str) or not text.strip():
            continue
        mark = hash(text)  # less memory than the text; a collision loses one text
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
            "Use a larger file of texts like those that you will embed."
        )
    rng.shuffle(chosen)
    cut = min(calibration, max(MIN_TEXTS // 4, len(chosen) // 4))
    return Sample(chosen[:cut], chosen[cut : cut + held_out], at, complete)


def quantize_graph(
    model: Model, lines: Sequence[Line], progress: Progress = lambda _: None
) -> QuantizedModel:
    """Quantize a model with NNCF's post-training method.

    Args:
        model: model to quantize.
        lines: texts for calibration.
        progress: receives lines of progress.

    Returns:
        The model with a report that holds no comparison yet.

    Raises:
        ModelError: the files of the model are damaged.
        EngineError: NNCF rejects the graph.
    """
    from embedq_worker.engines.openvino_runtime import CPU, Runtime, pack_ir

    graph = Runtime(CPU).read(build_graph(model))
    import nncf  # after openvino_runtime, which disables the telemetry of OpenVINO and NNCF

    nncf.set_log_level(logging.ERROR)
    method = f"NNCF {version('nncf')}"
    # The golden texts add very short ones: calibrated with prose alone, these lose accuracy.
    texts = [*(line.text for line in lines), *GOLDEN]
    feeds = [{name: getattr(batch, name) for name in INPUTS} for batch in _batches(model, texts)]
    progress(f"quantizing with {method}: {len(feeds):,} inferences for calibration")
    try:
        with redirect_stdout(sys.stderr):  # NNCF prints its progress to stdout
            made = nncf.quantize(
                graph,
                nncf.Dataset(feeds),
                subset_size=len(feeds),
                # With smooth quantization, which preserves more neighbors than without.
                model_type=nncf.ModelType.TRANSFORMER,
            )
    except Exception as error:  # NNCF's errors have no common base class
        reason = f"NNCF cannot quantize {model.label}: {type(error).__name__}: {error}"
        raise EngineError(reason, FailureReason.COMPILE_REFUSED) from error
    name = calibration_digest(texts, method)
    return QuantizedModel(
        name, pack_ir(made), QuantizationReport(len(lines), 0, 0.0, 0.0, 0.0, (), method)
    )


def compare(vectors: Vectors, reference: Vectors, lines: Sequence[int]) -> dict[str, Any]:
    """Compare vectors with a reference and return fields of a QuantizationReport.

    Args:
        vectors, reference: unit length, float32 [n, D].
        lines: line number of each text, [n].
    """
    cosines = (vectors * reference).sum(axis=1)
    overlaps = _overlaps(vectors, reference)
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
    embedder: Embedder, model: Model, lines: Sequence[Line], progress: Progress
) -> Vectors:
    """Embed texts and return unit-length vectors, float32 [n, D].

    Raises:
        EngineError: the engine failed.
    """
    spec = VectorSpec(model.identity, model.dim, model.max_length)
    parts: list[Vectors] = []
    for at in range(0, len(lines), _CHUNK):
        texts = [line.text for line in lines[at : at + _CHUNK]]
        parts.append(embedder.embed(EmbedBatch("quantize", 0, texts, spec))[0])
        progress(f"{at + len(texts):,} of {len(lines):,} held-out texts embedded")
    vectors = np.concatenate(parts)
    unit: Vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit


def _overlaps(vectors: Vectors, reference: Vectors) -> npt.NDArray[np.float64]:
    # Share of common nearest neighbors per text, [n].
    count = min(NEIGHBORS, len(vectors) - 1)
    both = zip(_neighbors(vectors, count), _neighbors(reference, count), strict=True)
    return np.array([len(set(one) & set(other)) / count for one, other in both])


def _neighbors(vectors: Vectors, count: int) -> list[list[int]]:
    near = vectors @ vectors.T  # [n, n]
    np.fill_diagonal(near, -2)
    order: list[list[int]] = np.argsort(-near, axis=1, kind="stable")[:, :count].tolist()
    return order


def _batches(model: Model, texts: Sequence[str]) -> Iterator[TokenBatch]:
    tokenizer = Tokenizer(model.tokenizer_path, model.max_length, model.tokenizer)
    tokens = tokenizer.tokenize(texts)
    for group in plan_padded(tokens.lengths, _BUDGET, 1):
        yield build_padded(tokens, group, tokenizer.pad_id)


class QuantizeOptions(NamedTuple):
    """Options of the command.

    Attributes:
        inputs, text_field, format: files and how to read them, as in sample_texts.
        texts: maximum number of calibration texts.
        min_overlap: smallest top-10 overlap with which the quantized model is stored.
    """

    inputs: tuple[str, ...]
    text_field: str = "text"
    format: str | None = None
    texts: int = CALIBRATION_TEXTS
    min_overlap: float = 0.9


class Result(NamedTuple):
    """Result of the command.

    Attributes:
        model: label of the model.
        name: name of the quantized model.
        report: comparison with fp32.
        folder: where quantized models are stored.
        problem: why the quantized model is not stored; empty if it is.
        warnings: sentences for the user.
    """

    model: str
    name: str
    report: QuantizationReport
    folder: Path
    problem: str
    warnings: tuple[str, ...]

    @property
    def stored(self) -> bool:
        """Whether the quantized model is stored."""
        return not self.problem

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return {
            **self._asdict(),
            "report": asdict(self.report),
            "folder": str(self.folder),
            "stored": self.stored,
        }

    def lines(self) -> Iterator[str]:
        """Yield the result as lines of text."""
        yield f"{self.model}, quantized model {self.name}"
        yield self.report.summary()
        yield "The texts that changed most:"
        for line, cosine, overlap in self.report.changed:
            yield f"  line {line:,}: cosine {cosine:.4f}, {overlap:.0%} of its neighbors unchanged"
        yield from self.warnings
        if self.problem:
            yield f"Not stored: {self.problem}"
        else:
            yield f"Stored in {self.folder}. Restart the worker to serve accuracy class int8."


def run(settings: WorkerSettings, options: QuantizeOptions, progress: Progress) -> Result:
    """Quantize the model of a worker, compare it with fp32 and store it.

    Raises:
        InputError: a file cannot be read, or has too few texts.
        SettingsError: the cache folder cannot be written, or there is no model.
        ModelError, EngineError: an engine cannot be opened or fails its self-test.
    """
    model = find_model(settings)
    if model is None:
        raise SettingsError("The stub has no model to quantize. Unset EMBEDQ_DEVICE.")
    store = QuantizedModelStore(settings.cache_dir, model)
    if store.error:
        raise SettingsError(f"A quantized model cannot be stored. {store.error}")
    sample = sample_texts(
        options.inputs,
        model.max_length,
        text_field=options.text_field,
        format=options.format,
        calibration=options.texts,
        progress=progress,
    )
    progress(
        f"{sample.read:,} documents read, {len(sample.calibration):,} texts for calibration, "
        f"{len(sample.held_out):,} held out"
    )
    opener = EngineOpener(settings, model)
    quantized = quantize_graph(model, sample.calibration, progress)
    progress("comparing with fp32")
    with closing(opener.open_int8(quantized)) as opened:
        vectors = embed_lines(opened.embedder, model, sample.held_out, progress)
    with closing(opener.open_cpu(Accuracy.EXACT)) as opened:
        reference = embed_lines(opened.embedder, model, sample.held_out, progress)
    figures = compare(vectors, reference, [line.number for line in sample.held_out])
    report = replace(quantized.report, **figures)
    problem = ""
    if report.overlap < options.min_overlap:
        problem = (
            f"the top-10 overlap is {report.overlap:.3f}, and --min-overlap is "
            f"{options.min_overlap}. Use texts more like those that you will embed, raise --texts, "
            "or lower --min-overlap."
        )
    elif not store.store(quantized.name, quantized.graph, report):
        problem = "the cache folder cannot be written; the log says why."
    name = quantized.name[:NAME_LENGTH]
    warnings = tuple(_warnings(sample))
    return Result(model.label, name, report, store.folder, problem, warnings)


def _warnings(sample: Sample) -> Iterator[str]:
    if not sample.complete:
        yield f"Only the first {sample.read:,} documents were read."
    if len(sample.held_out) < FEW_HELD_OUT:
        yield (
            f"The report has only {len(sample.held_out)} held-out texts; use a larger file for a "
            "better one."
        )
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return
    if not any(flag in flags for flag in FAST_INT8):
        yield "This CPU has neither VNNI nor AMX: int8 is hardly faster than f32."
