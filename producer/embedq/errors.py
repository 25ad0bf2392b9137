"""Defines every error that embedq raises on purpose; the branches say who must act.

    EmbedqError
    ├─ SettingsError          a setting is wrong                          (fix the environment)
    ├─ InputError             a file cannot be read or written            (fix the file or path)
    ├─ ContractError          a call or message violates the contract     (fix the call)
    │   ├─ BatchTooLarge
    │   ├─ UnknownSchema
    │   └─ MalformedMessage
    ├─ QueueUnavailable       Redis cannot be reached                     (retry later)
    │   └─ QueueFull          Redis is nearly full; .retry_after_s
    ├─ NoWorker               no worker serves the model                  (start a worker)
    │   ├─ StrictUnavailable  no worker with an NPU                       (start one, or not strict)
    │   └─ NotQuantized       no worker with a quantized model for int8   (embedq-worker quantize)
    ├─ LocalStartFailed       private Redis or worker did not start       (read the reason)
    ├─ ResultError
    │   ├─ ResultTimeout      no result yet
    │   ├─ ResultExpired      the result no longer exists
    │   ├─ CorruptValue       stored bytes fail their checksum
    │   ├─ BatchFailed        a worker rejected a batch; .code, .detail
    │   └─ TextsFailed        some texts failed; .failures, .vectors
    └─ (worker) ModelError, EngineError: see embedq_worker.errors

The ``code`` of a class is also used in wire results, log events and metric labels.
A message says what happened, the value, the limit and the next step.
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
    """Base class of every error that embedq raises on purpose."""

    code = "error"


class SettingsError(EmbedqError):
    """A setting has a wrong name or value."""

    code = "bad_setting"


class InputError(EmbedqError):
    """A file cannot be read, parsed or written."""

    code = "bad_input"


class ContractError(EmbedqError):
    """A call or a message violates the contract of `embedq.protocol`."""

    code = "contract"


class BatchTooLarge(ContractError):
    """A batch has more texts or bytes than allowed."""

    code = "batch_too_large"


class UnknownSchema(ContractError):
    """A message has a newer schema version than this process supports."""

    code = "unknown_schema"


class MalformedMessage(ContractError):
    """A message is invalid."""

    code = "malformed_message"


class QueueUnavailable(EmbedqError):
    """Redis cannot be reached, or rejects the connection."""

    code = "queue_unavailable"


class QueueFull(QueueUnavailable):
    """Redis has not enough memory for another job.

    Attributes:
        retry_after_s: recommended delay before the next try, seconds.
    """

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorker(EmbedqError):
    """No live worker serves the requested model."""

    code = "no_worker"


class StrictUnavailable(NoWorker):
    """A strict job found no worker with an NPU within its timeout."""

    code = "strict_unavailable"


class NotQuantized(NoWorker):
    """No worker has a quantized model for a job of class int8, or workers have different ones."""

    code = "not_quantized"


class LocalStartFailed(EmbedqError):
    """The private Redis or the private worker of a local run did not start."""

    code = "local_start_failed"


class ResultError(EmbedqError):
    """A result cannot be returned."""

    code = "result"


class ResultTimeout(ResultError):
    """The result is not available yet."""

    code = "result_timeout"


class ResultExpired(ResultError):
    """The result no longer exists."""

    code = "result_expired"


class CorruptValue(ResultError):
    """Stored bytes do not match their header or checksum."""

    code = "corrupt_value"


class BatchFailed(ResultError):
    """A worker rejected a whole batch.

    Attributes:
        code: reason code, for example ``unknown_schema``.
        detail: reason as a sentence.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"The worker refused a batch ({code}): {detail}")
        self.code = code
        self.detail = detail


class TextsFailed(ResultError):
    """Some texts of a call have no vector.

    Attributes:
        failures: position of a failed text -> code.
        vectors: float32 [n, D]; rows of failed texts are NaN.
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
    """Return `` Did you mean X?`` with the most similar known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]}?" if close else ""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise an OSError of the body as an InputError with the next step."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InputError(
                f"{path}: the disk is full. Free some space and run the same command again; it "
                "continues with the data written so far."
            ) from error
        raise InputError(f"{path}: cannot be written ({error.strerror}).") from error
