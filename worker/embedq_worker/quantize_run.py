"""`embedq-worker quantize` from file to report: sample, quantise, prove, judge, keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from embedq.contract import Accuracy
from embedq.errors import SettingsError
from embedq_worker.calibration import Sample, sample_texts
from embedq_worker.models import Model
from embedq_worker.opening import Opener
from embedq_worker.placed_serving import find_model
from embedq_worker.quantised import NAME_LENGTH, Quality, QuantisedStore
from embedq_worker.quantizing import compare, embed_lines, quantize_graph
from embedq_worker.settings import WorkerSettings

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
        model, name: of what was quantised, and of the copy.
        quality: the report.
        folder: where it is kept.
        problem: why it is not; empty if it is.
        warnings: what the user should know.
    """

    model: str
    name: str
    quality: Quality
    folder: Path
    problem: str
    warnings: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether nodes will serve it."""
        return not self.problem

    def as_dict(self) -> dict[str, Any]:
        """Return the result for JSON."""
        shown = {**self._asdict(), "quality": self.quality.as_dict(), "folder": str(self.folder)}
        return {**shown, "kept": self.kept}

    def lines(self) -> Iterator[str]:
        """Yield the result for people."""
        yield f"{self.model}, quantised copy {self.name}"
        yield self.quality.summary()
        yield "The texts that changed most:"
        for line, cosine, overlap in self.quality.changed:
            yield f"  line {line:,}: cosine {cosine:.4f}, {overlap:.0%} of its neighbours stayed"
        yield from self.warnings
        if self.problem:
            yield f"Not kept: {self.problem}"
        else:
            yield f"Kept in {self.folder}. Start the node again to serve jobs of class int8."


def run(settings: WorkerSettings, wanted: Wanted, tell: Tell) -> Result:
    """Quantise the model of a node.

    Raises:
        InputError: the file cannot be read, or has too few texts.
        SettingsError: the cache cannot be written, or there is no model.
        ModelError, EngineError: an engine cannot be opened or proven.
    """
    model = find_model(settings)
    if model is None:
        raise SettingsError("The stub has no model to quantise. Unset EMBEDQ_DEVICE.")
    store = QuantisedStore(settings.cache_dir, model)
    if store.trouble:
        raise SettingsError(f"A quantised model cannot be kept: {store.trouble}.")
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
    return _quantise(settings, wanted, model, store, sample, tell)


def _quantise(
    settings: WorkerSettings,
    wanted: Wanted,
    model: Model,
    store: QuantisedStore,
    sample: Sample,
    tell: Tell,
) -> Result:
    opener = Opener(settings, model)
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
    quality = replace(made.quality, **figures)
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
