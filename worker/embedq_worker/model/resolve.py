"""Finds the model of a worker, verifies its files and describes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from embedq.protocol.contract import Device, Precision
from embedq.protocol.worker import ModelInfo
from embedq.settings import DEFAULT_MODEL
from embedq_worker.errors import ModelError
from embedq_worker.files import DigestCache
from embedq_worker.model import sources
from embedq_worker.model.config import (
    NO_CHOICES,
    ModelChoices,
    ModelConfig,
    read_model_config,
)
from embedq_worker.model.families import FAMILIES
from embedq_worker.model.families.family import Architecture
from embedq_worker.model.json_file import JsonFile, is_file
from embedq_worker.model.modules import read_modules
from embedq_worker.model.tokenizer_config import TokenizerConfig, read_tokenizer_config
from embedq_worker.model.weights import weight_files
from embedq_worker.settings import DeviceChoice, WorkerSettings

#: Commit of the default model that embedq is tested with.
DEFAULT_REVISION: Final = "8b3219a92973c328a8e22fadcfa821b5dc75636a"

#: sha256 of its files at that commit; model.safetensors has 90,868,376 bytes.
PINNED: Final[Mapping[str, str]] = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}

#: Maximum length of a text on an NPU unless EMBEDQ_MAX_LENGTH is set, tokens. A compiler needs
#: minutes for rows of 8,192 tokens, whose attention alone has 67 million scores per head.
NPU_MAX_LENGTH: Final = 512


@dataclass(frozen=True, slots=True)
class Model(ModelConfig):
    """A verified model on the disk.

    Attributes:
        folder: where its files are.
        encoder: folder of the encoder's files in it: config.json, weights and tokenizer.
        label: the requested name, with ``@revision`` for a hub id; for display only.
        identity: sha256 in hex of weights, tokenizer and the configuration that shapes vectors.
        weights: a safetensors file, the index of several, or an ONNX file.
        architecture: values that shape the encoder; empty for a foreign ONNX model.
        dim: number of components of a vector.
        weights_precision: ``f32``, or ``f16``, ``bf16`` or ``int8`` (8 bits or fewer) of a foreign
            ONNX model that stores its weights, or computes, less precisely.
        output: name of the output of a foreign ONNX model that is served; otherwise empty.
        pinned: weights and tokenizer are those of the default model, whose vectors are published.
        choices: what the user decided.
        tokenizer: what its files say about the tokenizer beside tokenizer.json.
    """

    folder: Path
    encoder: Path
    label: str
    identity: str
    weights: Path
    architecture: Mapping[str, Any]
    dim: int
    weights_precision: Precision
    output: str
    pinned: bool
    choices: ModelChoices
    tokenizer: TokenizerConfig

    @property
    def tokenizer_path(self) -> Path:
        """Return the path of the tokenizer."""
        return self.encoder / "tokenizer.json"

    @property
    def packable(self) -> bool:
        """Return whether a row may hold several texts; a foreign ONNX model does not support it."""
        return bool(self.architecture)

    @property
    def vocab_size(self) -> int | None:
        """Return the number of token embeddings; None if config.json does not contain it."""
        config = self.architecture or JsonFile.load(self.encoder / "config.json").values
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


def find_model(settings: WorkerSettings, device: Device | None = None) -> Model | None:
    """Find and verify the model that the settings name; None for the stub, which needs none.

    Args:
        settings: worker's settings.
        device: device that the worker is assigned to, which may cap the length of texts.

    Raises:
        ModelError: as resolve.
    """
    if settings.device is DeviceChoice.STUB:
        return None
    on_npu = device is Device.NPU or settings.device is DeviceChoice.NPU
    choices = ModelChoices(
        pooling=settings.pooling,
        max_length=settings.max_length,
        length_cap=NPU_MAX_LENGTH if on_npu else 0,
        prompt_set=settings.prompts,
        file=settings.model_file,
    )
    return resolve(
        settings.model,
        settings.model_revision,
        cache_dir=settings.cache_dir,
        offline=settings.offline,
        choices=choices,
    )


def resolve(
    name: str,
    revision: str | None,
    *,
    cache_dir: Path,
    offline: bool = False,
    choices: ModelChoices = NO_CHOICES,
) -> Model:
    """Find a model by folder or hub id, verify its files and describe it.

    Args:
        name: a folder, or a hub id.
        revision: commit, branch or tag for a hub id; None for the pinned one or ``main``.
        cache_dir: folder of the digest cache.
        offline: do not use the network.
        choices: what the user decides.

    Raises:
        ModelError: it cannot be found, downloaded or served, or a file of the default model was
            changed; the message has the next step.
    """
    digests = DigestCache(cache_dir)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return load_model(folder.resolve(), name, digests, choices)
    if not sources.is_hub_id(name):
        raise ModelError(f"{name} is neither a folder nor a hub id (owner/name).")
    revision = revision or (DEFAULT_REVISION if name == DEFAULT_MODEL else "main")
    is_default = (name, revision) == (DEFAULT_MODEL, DEFAULT_REVISION)
    found = sources.find_or_download(
        name, revision, file=choices.file, in_wheel=is_default, offline=offline
    )
    if is_default:
        _check_pinned(found, digests)
    commit = found.name if found.parent.name == "snapshots" else revision
    return load_model(found, f"{name}@{commit}", digests, choices)


def load_model(
    folder: Path, label: str, digests: DigestCache, choices: ModelChoices = NO_CHOICES
) -> Model:
    """Describe the model in a folder.

    Raises:
        ModelError: a file is missing or damaged, or the model is of an unsupported kind.
    """
    modules = read_modules(folder)
    encoder = modules.encoder
    _refuse_adapter(encoder)
    weights = sources.find_weights(folder, encoder, choices.file)
    if not is_file(encoder / "tokenizer.json"):
        raise ModelError(
            f"{encoder} has no tokenizer.json, the only tokenizer format embedq reads."
        )
    architecture: Architecture = {}
    precision, output, pools_itself = Precision.F32, "", False
    if weights.suffix == ".onnx":
        # Imported here: onnx slows down a start, which an encoder of our own does not need.
        from embedq_worker.model.foreign_onnx import describe_onnx

        known = bool(modules.pooling_modes or choices.pooling)
        foreign = describe_onnx(weights, encoder, pooling_known=known)
        size, positions, files = foreign.size, foreign.max_positions, [weights, *foreign.files]
        precision, output, pools_itself = foreign.precision, foreign.output, foreign.pooled
    else:
        architecture = _read_architecture(encoder)
        size, positions = architecture["hidden_size"], architecture["max_positions"]
        files = weight_files(weights)
    config = read_model_config(folder, modules, positions, choices, pools_itself=pools_itself)
    tokenizer = read_tokenizer_config(encoder)
    behind = [module.weights for module in config.modules if module.weights]
    sums = [digests.of(path) for path in (*files, *behind, encoder / "tokenizer.json")]
    return Model(
        folder=folder,
        encoder=encoder,
        label=label,
        identity=_identity(sums, architecture, config, tokenizer),
        weights=weights,
        architecture=architecture,
        dim=_vector_size(size, config),
        weights_precision=precision,
        output=output,
        pinned=sums == list(PINNED.values()),
        choices=choices,
        tokenizer=tokenizer,
        **{field.name: getattr(config, field.name) for field in fields(config)},
    )


def _refuse_adapter(encoder: Path) -> None:
    path = encoder / "adapter_config.json"
    if is_file(path):
        raise ModelError(
            f"{path} changes the weights by an adapter (PEFT), which embedq does not apply. Merge "
            "it with merge_and_unload() of peft, and save the model into another folder."
        )


def _vector_size(width: int, config: ModelConfig) -> int:
    # Components of a vector behind pooling and modules.
    size = width * len(config.pooling_modes)
    for module in config.modules:
        if module.weights:
            if module.in_features != size:
                raise ModelError(
                    f"{module.weights.parent / 'config.json'} describes a {module.kind} of "
                    f"{module.in_features:,} components, but the vectors before it have {size:,}. "
                    "Fetch the model again."
                )
            size = module.out_features
    return size


def _read_architecture(encoder: Path) -> Architecture:
    use_onnx = "Use a folder with model.onnx (or onnx/model.onnx) and tokenizer.json instead."
    config = JsonFile.load(encoder / "config.json", supported_by=use_onnx)
    kind = config.text("model_type", "missing")
    family = FAMILIES.get(kind)
    if family is None:
        raise config.unsupported("model_type", kind, *FAMILIES)
    return {"model_type": kind, **family.read(config)}


def _identity(
    sums: list[str],
    architecture: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: TokenizerConfig,
) -> str:
    # What shapes a vector, and nothing else: neither label nor path.
    content = {
        "files": sums,
        "config": architecture,
        "usage": config.describe(),
        "tokenizer": tokenizer.describe(),
    }
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
