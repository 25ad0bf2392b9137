"""What stands behind the word npu: the real device, or a stand-in that takes the same code path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class Target:
    """An OpenVINO device and what must be done before it answers.

    Attributes:
        device: the device string. Never AUTO, MULTI or HETERO, which answer from the CPU when a
            device is lost, without a word.
        library: plugin to register under that name first; empty for those OpenVINO knows.
        plugins: file with further plugins; empty for none.
        forced: properties that make a stand-in, sent unfiltered.
        standin: name of the stand-in; empty for a real NPU.
    """

    device: str = "NPU"
    library: str = ""
    plugins: str = ""
    forced: Mapping[str, str] = field(default_factory=dict)
    standin: str = ""

    def to_message(self) -> dict[str, Any]:
        """Describe the target for another process, in types of JSON."""
        return asdict(self)


#: The CPU of OpenVINO, as itself.
CPU: Final = Target("CPU")
#: The real NPU, and the stand-ins that need nothing but OpenVINO.
TARGETS: Final[Mapping[str, Target]] = {
    "none": Target(),
    "alias": Target("NPUCPU", library="openvino_intel_cpu_plugin", standin="alias"),
    "npuw": Target(
        forced={
            "NPU_USE_NPUW": "YES",
            "NPUW_DEVICES": "CPU",
            "NPUW_ONLINE_PIPELINE": "NONE",
        },
        standin="npuw",
    ),
}
