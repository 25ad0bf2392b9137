"""Which properties a plugin is sent, and which it does not know. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from embedq.contract import Precision


@dataclass(frozen=True, slots=True)
class Properties:
    """What was asked of a plugin.

    Attributes:
        applied: properties that it knows and is sent.
        ignored: properties that it does not know; sending them would fail the compile.
    """

    applied: Mapping[str, str]
    ignored: Mapping[str, str]

    def details(self) -> dict[str, str]:
        """Describe both for log and check."""
        parts = {"applied": self.applied, "ignored": self.ignored}
        return {
            name: " ".join(f"{key}={value}" for key, value in sorted(part.items()))
            for name, part in parts.items()
            if part
        }


def npu_properties(
    supported: Collection[str], extra: Mapping[str, str], commandlist_mode: str = ""
) -> Properties:
    """Decide what an NPU plugin is sent.

    Args:
        supported: the properties that it knows.
        extra: what the operator wants; wins over our defaults.
        commandlist_mode: one of the names of OpenVINO pull request 35626, which no released plugin
            knows; empty for none.
    """
    wanted = {
        # Requests in flight instead of the quickest single answer: 4 or 8 instead of 1.
        "PERFORMANCE_HINT": "THROUGHPUT",
        "INFERENCE_PRECISION_HINT": str(Precision.F16),
    }
    if commandlist_mode:
        wanted["NPU_COMMANDLIST_MODE"] = commandlist_mode
    wanted.update(extra)
    return Properties(
        {key: value for key, value in wanted.items() if key in supported},
        {key: value for key, value in wanted.items() if key not in supported},
    )


def precision_of(shown: str, otherwise: Precision) -> Precision:
    """Read the precision that a compiled model says it uses; a plugin may not say."""
    return Precision(shown) if shown in set(Precision) else otherwise
