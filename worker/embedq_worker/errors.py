"""What a worker raises on purpose; a second branch of the tree in embedq.errors.

EmbedqError
├─ ModelError             the model cannot be used                 (fix EMBEDQ_MODEL or its files)
└─ EngineError            an engine cannot be trusted              (feeds health, never the caller)
    ├─ CompileFailed      the model could not be prepared for the device
    ├─ InferFailed        an inference raised, or gave a wrong or non-finite vector
    └─ DeviceLost         the device is gone, hung or unknown: replace the process
"""

from __future__ import annotations

from embedq.errors import EmbedqError


class ModelError(EmbedqError):
    """The model is missing, damaged or of a kind we cannot build."""

    code = "bad_model"


class EngineError(EmbedqError):
    """An engine cannot be trusted."""

    code = "engine_failed"


class CompileFailed(EngineError):
    """The model could not be prepared for the device."""

    code = "compile_failed"


class InferFailed(EngineError):
    """An inference raised, or gave a wrong or non-finite vector."""

    code = "infer_failed"


class DeviceLost(EngineError):
    """The device is gone, hung or in an unknown state; only a new process can use it."""

    code = "device_lost"
