"""Everything embedq raises on purpose, as one tree whose branches say who must act.

    EmbedqError
    ├─ SettingsError          a setting is wrong                       (fix the environment)
    ├─ InputError             a file cannot be read or written         (fix the file or the path)
    ├─ ContractError          the caller sent something we refuse      (fix the call)
    │   ├─ BatchTooLarge
    │   ├─ UnknownSchema
    │   └─ MalformedMessage
    ├─ QueueUnavailable       Redis cannot be reached                  (retry later)
    │   └─ QueueFull          Redis has no room; .retry_after_s
    ├─ NoWorker                 nobody serves the model                  (start a worker)
    │   ├─ StrictUnavailable  no worker with an NPU does                 (start one, or not strict)
    │   └─ NotQuantized       no worker has a quantized model for int8   (embedq-worker quantize)
    ├─ LocalStartFailed       the private Redis or worker did not start  (read the reason)
    ├─ ResultError
    │   ├─ ResultTimeout      not yet
    │   ├─ ResultExpired      too late
    │   ├─ CorruptValue       the stored bytes fail their checksum
    │   ├─ BatchFailed        the worker gave up; .code, .detail
    │   └─ TextsFailed        some texts failed; .failures, .vectors
    └─ (worker) ModelError, EngineError: see embedq_worker.errors

Each class carries ``code``, the same word in the wire result, the log event and the metric label.
A message says what happened, the value, the limit and the next step.

The nearest right word for a wrong one.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class EmbedqError(Exception):
    """The root of every error that embedq raises on purpose."""

    code = "error"


class SettingsError(EmbedqError):
    """A setting has a wrong name or value."""

    code = "bad_setting"


class InputError(EmbedqError):
    """A file cannot be read, parsed or written."""

    code = "bad_input"


class ContractError(EmbedqError):
    """The caller or the sender of a message broke the wire contract."""

    code = "contract"


class BatchTooLarge(ContractError):
    """A batch holds more texts or bytes than the contract allows."""

    code = "batch_too_large"


class UnknownSchema(ContractError):
    """A message speaks a newer schema than this side."""

    code = "unknown_schema"


class MalformedMessage(ContractError):
    """A message is not what the contract describes."""

    code = "malformed_message"


class QueueUnavailable(EmbedqError):
    """Redis cannot be reached, or refuses us."""

    code = "queue_unavailable"


class QueueFull(QueueUnavailable):
    """Redis has no room for another job.

    Attributes:
        retry_after_s: seconds after which it is worth asking again.
    """

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorker(EmbedqError):
    """No living worker serves the model that was asked for."""

    code = "no_worker"


class StrictUnavailable(NoWorker):
    """A strict job waited for a worker with an NPU, and none came."""

    code = "strict_unavailable"


class NotQuantized(NoWorker):
    """A job of class int8 finds no worker with a quantized model, or several models."""

    code = "not_quantized"


class LocalStartFailed(EmbedqError):
    """The private Redis or the private worker of a local run did not start."""

    code = "local_start_failed"


class ResultError(EmbedqError):
    """A result is not to be had."""

    code = "result"


class ResultTimeout(ResultError):
    """The result is not there yet."""

    code = "result_timeout"


class ResultExpired(ResultError):
    """The result was there and its time to live has passed."""

    code = "result_expired"


class CorruptValue(ResultError):
    """Stored bytes do not match their header or checksum."""

    code = "corrupt_value"


class BatchFailed(ResultError):
    """The worker refused a whole batch.

    Attributes:
        code: the reason as one word, for example ``unknown_schema``.
        detail: the reason as a sentence.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"The worker refused a batch ({code}): {detail}")
        self.code = code
        self.detail = detail


class TextsFailed(ResultError):
    """Some texts of a call have no vector.

    Attributes:
        failures: position of each failed text -> its code.
        vectors: float32 [n, D], every vector that succeeded; failed rows are NaN.
    """

    code = "texts_failed"

    def __init__(self, failures: Mapping[int, str], vectors: npt.NDArray[np.float32]) -> None:
        shown = ", ".join(f"{index}: {code}" for index, code in list(failures.items())[:5])
        more = f" and {len(failures) - 5:,} more" if len(failures) > 5 else ""
        super().__init__(
            f"{len(failures):,} of {len(vectors):,} texts failed ({shown}{more}). "
            "The other vectors are in .vectors; fix or leave out the failed texts."
        )
        self.failures = dict(failures)
        self.vectors = vectors


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` for the most similar known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what can go wrong while writing into a sentence with the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{path}: the disk is full. What was written is kept; free some space and run the "
                "same command again to go on."
            ) from error
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
