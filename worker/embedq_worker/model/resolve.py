"""Finds the model of a worker, verifies its files and describes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from embedq.protocol.contract import Precision
from embedq.protocol.worker import ModelInfo
from embedq.settings import DEFAULT_MODEL
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model import sources
from embedq_worker.model.config import ModelConfig, load_json, read_architecture, read_model_config
from embedq_worker.settings import DeviceChoice, WorkerSettings

#: Commit of the default model that embedq is tested with.
DEFAULT_REVISION: Final = "8b3219a92973c328a8e22fadcfa821b5dc75636a"

#: sha256 of its files at that commit; model.safetensors has 90,868,376 bytes.
PINNED: Final[Mapping[str, str]] = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


@dataclass(frozen=True, slots=True)
class Model(ModelConfig):
    """A verified model on the disk.

    Attributes:
        folder: where its files are.
        label: the requested name, with ``@revision`` for a hub id; for display only.
        identity: sha256 in hex of weights, tokenizer and the configuration that shapes vectors.
        weights: model.safetensors or model.onnx.
        architecture: values that shape a BERT encoder; empty for a foreign ONNX model.
        dim: number of components of a vector.
        weights_precision: ``f32``, or ``f16``, ``bf16`` or ``int8`` (8 bits or fewer) of a foreign
            ONNX model that stores its weights, or computes, less precisely.
        output: name of the output of a foreign ONNX model that is served; otherwise empty.
        pinned: weights and tokenizer are those of the default model, whose vectors are published.
    """

    folder: Path
    label: str
    identity: str
    weights: Path
    architecture: Mapping[str, Any]
    dim: int
    weights_precision: Precision
    output: str
    pinned: bool

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of the tokenizer."""
        return self.folder / "tokenizer.json"

    @property
    def packable(self) -> bool:
        """Return whether a row may hold several texts; a foreign ONNX model does not support it."""
        return bool(self.architecture)

    @property
    def vocab_size(self) -> int | None:
        """Return the number of token embeddings; None if config.json does not contain it."""
        config = self.architecture or load_json(self.folder / "config.json", dict) or {}
        size = config.get("vocab_size")
        return size if type(size) is int else None

    def model_info(self) -> ModelInfo:
        """Return the description that workers publish for the SDK."""
        return ModelInfo(
            label=self.label,
            identity=self.identity,
            dim=self.dim,
            max_length=self.max_length,
            pooling=self.pooling,
            normalized=self.normalize,
            prompts=dict(self.prompts),
            default_prompt=self.default_prompt,
            weights_precision=str(self.weights_precision),
        )


def find_model(settings: WorkerSettings) -> Model | None:
    """Find and verify the model that the settings name; None for the stub, which needs none.

    Raises:
        ModelError: as resolve.
    """
    if settings.device is DeviceChoice.STUB:
        return None
    return resolve(
        settings.model,
        settings.model_revision,
        cache_dir=settings.cache_dir,
        offline=settings.offline,
    )


def resolve(name: str, revision: str | None, *, cache_dir: Path, offline: bool = False) -> Model:
    """Find a model by folder or hub id, verify its files and describe it.

    Args:
        name: a folder, or a hub id.
        revision: commit, branch or tag for a hub id; None for the pinned one or ``main``.
        cache_dir: folder of the digest cache.
        offline: do not use the network.

    Raises:
        ModelError: it cannot be found, downloaded or served, or a file of the default model was
            changed; the message has the next step.
    """
    digests = DigestCache(cache_dir)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return load_model(folder.resolve(), name, digests)
    if not sources.is_hub_id(name):
        raise ModelError(f"{name} is neither a folder nor a hub id (owner/name).")
    revision = revision or (DEFAULT_REVISION if name == DEFAULT_MODEL else "main")
    is_default = (name, revision) == (DEFAULT_MODEL, DEFAULT_REVISION)
    found = sources.find_or_download(name, revision, in_wheel=is_default, offline=offline)
    if is_default:
        _check_pinned(found, digests)
    commit = found.name if found.parent.name == "snapshots" else revision
    return load_model(found, f"{name}@{commit}", digests)


def load_model(folder: Path, label: str, digests: DigestCache) -> Model:
    """Describe the model in a folder.

    Raises:
        ModelError: a file is missing or damaged, or the model is of an unsupported kind.
    """
    weights = sources.find_weights(folder)
    if weights is None:
        read_architecture(folder)  # its error names the type of the model, if that is the reason
        raise ModelError(
            f"{folder} has neither model.safetensors nor model.onnx. "
            "A folder holds one of them beside config.json and tokenizer.json."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json, the only tokenizer format embedq reads.")
    is_bert = weights.suffix == ".safetensors"
    try:
        usage = asdict(read_model_config(folder))
        architecture = read_architecture(folder) if is_bert else {}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"A JSON file in {folder} has unexpected content ({type(error).__name__}: {error}). "
            "Fetch the model again."
        ) from error
    external: tuple[Path, ...] = ()
    precision, output = Precision.F32, ""
    if is_bert:
        dim = architecture["hidden_size"]
    else:
        # Imported here: onnx slows down a start, which the description of a BERT does not need.
        from embedq_worker.model.foreign_onnx import describe_onnx

        described = describe_onnx(weights, folder)
        dim, external, output = described.size, described.files, described.output
        precision = described.precision
        if described.pooled and not (folder / "modules.json").is_file():
            usage["normalize"] = False  # nothing asks for it
    sums = [digests.of(path) for path in (weights, *external, folder / "tokenizer.json")]
    return Model(
        folder=folder,
        label=label,
        identity=_identity(sums, architecture, usage),
        weights=weights,
        architecture=architecture,
        dim=dim,
        weights_precision=precision,
        output=output,
        pinned=sums == list(PINNED.values()),
        **usage,
    )


def _identity(sums: list[str], architecture: dict[str, Any], usage: dict[str, Any]) -> str:
    # What shapes a vector, and nothing else: neither label nor path.
    kind = "bert" if architecture else "onnx"
    content = {"files": sums, "kind": kind, "config": architecture, "usage": usage}
    described = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(described.encode()).hexdigest()


def _check_pinned(folder: Path, digests: DigestCache) -> None:
    for name, expected in PINNED.items():
        found = digests.of(folder / name)
        if found != expected:
            raise ModelError(
                f"{folder / name} is not the tested file: its sha256 is {found}, expected "
                f"{expected}. Delete it and fetch it again; to use it as it is, name its folder."
            )
