"""Reads safetensors: a length, a JSON header, then the raw tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from embedq_worker.errors import ModelError

#: Most bytes of a header; the format's own limit.
MAX_HEADER_BYTES: Final = 100_000_000

#: dtype in the header -> how its bytes are read. Others (a few saved counters) are left out.
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def load_tensors(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Map the floating-point tensors of a file by name, as float32; F32 is not copied.

    Raises:
        ModelError: the file is missing, truncated or not safetensors.

    Source: the format section of the safetensors README.
    """
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
        OverflowError,  # 1e999 is JSON
        RecursionError,  # and so are a hundred thousand brackets
    ) as error:
        raise ModelError(
            f"{path} is not a readable safetensors file ({error}). Fetch the file again."
        ) from error


def _tensor(data: npt.NDArray[np.uint8], name: str, entry: Any) -> npt.NDArray[np.float32]:
    dtype = np.dtype(_DTYPES[entry["dtype"]])
    start, stop = entry["data_offsets"]
    shape = [int(n) for n in entry["shape"]]
    if not 0 <= start <= stop <= len(data):
        raise ValueError(f"tensor {name} lies outside the file, which may be truncated")
    if min(shape, default=0) < 0 or stop - start != dtype.itemsize * math.prod(shape):
        raise ValueError(f"tensor {name} has {stop - start:,} bytes for shape {shape}")
    # frombuffer, not view: tensors need not be aligned to their item size.
    flat = np.frombuffer(data[start:stop], dtype)
    if entry["dtype"] == "BF16":
        # bfloat16 is the upper half of a float32.
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(flat, np.float32).reshape(shape)
