"""A text with a known vector that rides in the last row of each batch on an NPU.

A device that computes wrong vectors raises nothing (openvino issue 37264), so each batch asks it
for one vector that we know. It rides in the row with most room: a static row costs the same however
full it is, so the canary is free wherever some row of the batch has room for its 21 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from embedq_worker.errors import InferFailed, Reason
from embedq_worker.tokens import RaggedTokens

#: The text: a whole sentence, yet short enough to find a seat in the last row of most batches.
TEXT: Final = "A queue is a promise that work will be done later, and a worker is who keeps it. "
#: Smallest cosine between its vector and the reference: the floor of class ``standard``.
MIN_COSINE: Final = 0.999


@dataclass(frozen=True, slots=True)
class Canary:
    """The text in tokens, and its vector.

    Attributes:
        tokens: of the one text.
        vector: float32 [D], from an engine that is trusted.
    """

    tokens: RaggedTokens
    vector: npt.NDArray[np.float32]

    def check(self, found: npt.NDArray[np.float32]) -> None:
        """Compare what a device gave with what is right.

        Args:
            found: float32 [D].

        Raises:
            InferFailed: the device computes wrong vectors.
        """
        if not np.isfinite(found).all():
            raise InferFailed("The canary's vector is not finite.", Reason.NOT_FINITE)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = float(np.linalg.norm(found) * np.linalg.norm(self.vector))
            cosine = float(found @ self.vector) / max(lengths, 1e-12)
        # Asked so that NaN fails, as of numbers too large to be multiplied.
        if not cosine >= MIN_COSINE:
            raise InferFailed(
                f"The canary's vector has cosine {cosine:.5f} to the reference; the floor is "
                f"{MIN_COSINE}. The device computes wrong vectors.",
                Reason.WRONG_CANARY,
            )
