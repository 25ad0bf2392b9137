"""Read the tensors of a model from safetensors, in one file or in several with an index."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_worker.errors import ModelError
from embedq_worker.model.json_file import JsonFile, is_file

#: Maximum size of a safetensors header, bytes; defined by the format.
MAX_HEADER_BYTES: Final = 100_000_000

#: dtype in the header -> numpy dtype. Tensors of other dtypes, a few counters, are ignored.
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}

#: Name of a tensor's last part -> the name that TensorFlow's checkpoints gave it.
_OLD_NAMES: Final = {"weight": "gamma", "bias": "beta"}

Floats = npt.NDArray[np.float32]


class Weights:
    """The tensors of one model by name; a missing or misshapen one is a ModelError.

    Attributes:
        config: values that shape the encoder, as its family read them.
    """

    def __init__(
        self, path: Path, config: Mapping[str, Any], prefixes: Iterable[str] = ("",)
    ) -> None:
        """Map the file.

        Args:
            path: a safetensors file, or the index of several.
            config: values that shape the encoder.
            prefixes: what the names of all tensors may start with.

        Raises:
            ModelError: a file is missing, truncated or not safetensors.
        """
        self.config = config
        self._path = path
        self._tensors = load_tensors(path)
        # The prefix that most tensors have: a head beside the encoder has none.
        self._prefix = max(
            prefixes,
            key=lambda prefix: (
                sum(name.startswith(prefix) for name in self._tensors) if prefix else 0
            ),
        )

    def get(self, name: str, *shape: int) -> Floats:
        """Return a tensor after checking its shape, in which -1 is any size."""
        tensor = self._find(name)
        if tensor is None:
            raise self._mismatch(f"tensor {name} is missing")
        fits = len(shape) == tensor.ndim and all(
            want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            found = f"tensor {name} has shape {list(tensor.shape)}, not {list(shape)}"
            raise self._mismatch(found)
        return tensor

    def linear(self, name: str, out: int, into: int, *, bias: bool = True) -> Linear:
        """Return weight, transposed to [into, out], and bias [out] or None."""
        weight = self.get(f"{name}.weight", out, into).T
        return weight, self.get(f"{name}.bias", out) if bias else None

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of this name."""
        return self._find(name) is not None

    def _find(self, name: str) -> Floats | None:
        found = self._tensors.get(self._prefix + name)
        if found is None:
            stem, _, last = name.rpartition(".")
            found = self._tensors.get(f"{self._prefix}{stem}.{_OLD_NAMES.get(last, last)}")
        return found

    def _mismatch(self, found: str) -> ModelError:
        return ModelError(
            f"{self._path} does not fit its config.json: {found}. Fetch both files again."
        )


#: Weight [into, out] and bias [out] of a linear layer.
Linear = tuple[Floats, Floats | None]


def weight_files(path: Path) -> list[Path]:
    """Return the files with the tensors: the file itself, or those that an index names.

    Raises:
        ModelError: the index is damaged, names a file outside its folder, or a file is missing.
    """
    if path.suffix != ".json":
        return [path]
    places = JsonFile.load(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ModelError(f"{path} has no weight_map. Fetch the file again.")
    files = []
    for place in sorted({str(place) for place in places.values()}):
        if Path(place).name != place:
            raise ModelError(f"{path} stores weights in {place}, outside its folder.")
        file = path.parent / place
        if not is_file(file):
            raise ModelError(f"{file} is missing, but {path.name} names it. Fetch it again.")
        files.append(file)
    return files


def load_tensors(path: Path) -> dict[str, Floats]:
    """Map the floating-point tensors of a model by name, as float32; F32 is not copied.

    Args:
        path: a safetensors file, or the index of several.

    Raises:
        ModelError: a file is missing, truncated or not safetensors.
    """
    tensors: dict[str, Floats] = {}
    for file in weight_files(path):
        tensors |= _load_file(file)
    return tensors


def _load_file(path: Path) -> dict[str, Floats]:
    # Source: the section "Format" of the safetensors README.
    try:
        raw = np.memmap(path, np.uint8, mode="r")
        size = int(raw[:8].view("<u8")[0])
        if size > min(MAX_HEADER_BYTES, len(raw) - 8):
            raise ValueError(f"the header claims {size:,} bytes of a file of {len(raw):,}")
        header = json.loads(raw[8 : 8 + size].tobytes())
        header.pop("__metadata__", None)
        data = raw[8 + size :]
        return {
            name: _tensor(data, name, entry)
            for name, entry in header.items()
            if entry["dtype"] in _DTYPES
        }
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OverflowError,  # 1e999 is valid JSON
        RecursionError,  # deeply nested JSON
    ) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({error}). Fetch the file again."
        ) from error


def _tensor(data: npt.NDArray[np.uint8], name: str, entry: Any) -> Floats:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    start, stop = entry["data_offsets"]
    shape = [int(n) for n in entry["shape"]]
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"tensor {name} lies outside the file, which may be truncated")
    if min(shape, default=0) < 0 or stop - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor {name} has {stop - start:,} bytes for shape {shape}")
    # frombuffer, not view: a tensor may be unaligned.
    flat = np.frombuffer(data[start:stop], dtype)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(flat, np.float32).reshape(shape)
