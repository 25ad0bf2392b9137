"""Find the model, and prove that it is the right one before anything is computed with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

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


class Kind(StrEnum):
    """What the weights are."""

    BERT = "bert"
    ONNX = "onnx"


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the disk, checked and described.

    Attributes:
        folder: where its files are.
        label: the name it was asked for, with ``@revision`` for a hub id.
        identity: sha256 in hex of weights, tokenizer and the configuration that matters.
        kind: ``bert``, which graph.py builds, or ``onnx``, which is used as it is.
        weights: model.safetensors or model.onnx.
        config: the numbers that shape a BERT encoder; empty for ``onnx``.
        dim: components of a vector.
        pooling: ``mean`` or ``cls``.
        normalize: vectors have unit length.
        max_length: tokens it takes, special tokens included.
        prompts: name -> text put before each input.
        default_prompt: the name used when the caller names none; empty for none.
        pinned: weights and tokenizer are those of the default model, whose vectors are published.
    """

    folder: Path
    label: str
    identity: str
    kind: Kind
    weights: Path
    config: Mapping[str, Any]
    dim: int
    pooling: str
    normalize: bool
    max_length: int
    prompts: Mapping[str, str]
    default_prompt: str
    pinned: bool

    @property
    def tokenizer_path(self) -> Path:
        """Name the tokenizer's file."""
        return self.folder / "tokenizer.json"

    @property
    def packable(self) -> bool:
        """Say whether a row may hold several texts."""
        return self.kind is Kind.BERT

    @property
    def vocab_size(self) -> int | None:
        """How many tokens have weights, where config.json says it; ``onnx`` need not have one."""
        config = self.config or load_json(self.folder / "config.json", dict) or {}
        size = config.get("vocab_size")
        return size if type(size) is int else None

    def model_info(self) -> ModelInfo:
        """Describe the model for those who have no model file."""
        return ModelInfo(
            label=self.label,
            identity=self.identity,
            dim=self.dim,
            max_length=self.max_length,
            pooling=self.pooling,
            normalized=self.normalize,
            prompts=dict(self.prompts),
            default_prompt=self.default_prompt,
        )


def resolve(
    name: str,
    revision: str | None,
    *,
    cache_dir: Path,
    offline: bool = False,
) -> Model:
    """Find a model by folder or hub id, check its files and describe it.

    Args:
        name: a folder, or a hub id.
        revision: commit, branch or tag for a hub id; None for the pinned one or ``main``.
        cache_dir: where digests are remembered.
        offline: never touch the network.

    Raises:
        ModelError: it cannot be found, fetched, trusted or built; the message says what to do.
    """
    digests = DigestCache(cache_dir)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return load_model(folder.resolve(), name, digests)
    if not sources.is_hub_id(name):
        raise ModelError(f"There is no folder {name}, and it is no hub id (owner/name) either.")
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
        ModelError: a file is missing or damaged, or the model is of a kind we cannot build.
    """
    weights = sources.find_weights(folder)
    if weights is None:
        read_architecture(folder)  # says so if the type is the reason
        raise ModelError(
            f"{folder} has neither model.safetensors nor model.onnx. "
            "A folder holds one of them beside config.json and tokenizer.json."
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has no tokenizer.json, the only tokenizer format embedq reads.")
    kind = Kind.BERT if weights.suffix == ".safetensors" else Kind.ONNX
    try:
        traits = read_model_config(folder)
        config = read_architecture(folder) if kind is Kind.BERT else {}
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"A JSON file in {folder} holds what it should not ({type(error).__name__}: {error}). "
            "Fetch the model again."
        ) from error
    dim, beside = (config["hidden_size"], []) if config else _describe_onnx(weights)
    files = [weights, *beside, folder / "tokenizer.json"]
    sums = [digests.of(path) for path in files]
    return Model(
        folder=folder,
        label=label,
        identity=_identity(sums, kind, config, traits),
        kind=kind,
        weights=weights,
        config=config,
        dim=dim,
        pooling=traits.pooling,
        normalize=traits.normalize,
        max_length=traits.max_length,
        prompts=traits.prompts,
        default_prompt=traits.default_prompt,
        pinned=sums == list(PINNED.values()),
    )


def _identity(sums: list[str], kind: Kind, config: Mapping[str, Any], traits: ModelConfig) -> str:
    """Name everything that shapes a vector, and nothing else: no label, no path."""
    usage = {name: getattr(traits, name) for name in ModelConfig.__slots__}
    described = json.dumps(
        {"files": sums, "kind": kind, "config": config, "usage": usage},
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(described.encode()).hexdigest()


def _describe_onnx(weights: Path) -> tuple[int, list[Path]]:
    # Imported here: onnx costs a start 0.1 s, and a BERT's size is in its config.json.
    from embedq_worker.model.onnx_graph import describe_onnx

    return describe_onnx(weights)


def _check_pinned(folder: Path, digests: DigestCache) -> None:
    for name, expected in PINNED.items():
        found = digests.of(folder / name)
        if found != expected:
            raise ModelError(
                f"{folder / name} is not the file we tested: its sha256 is {found}, expected "
                f"{expected}. Delete it and fetch it again; to use it as it is, name its folder."
            )


def find_model(settings: WorkerSettings) -> Model | None:
    """Find and check the model that the settings name; the stub needs none.

    Raises:
        ModelError: it is missing, damaged or of a kind we cannot build.
    """
    if settings.device is DeviceChoice.STUB:
        return None
    return resolve(
        settings.model,
        settings.model_revision,
        cache_dir=settings.cache_dir,
        offline=settings.offline,
    )
