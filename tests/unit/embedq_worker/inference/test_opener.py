"""Tests that an opened engine runs on the device of the worker's placement."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from embedq.protocol.contract import Device
from embedq_worker.device.discovery import Npu
from embedq_worker.device.placement import Placement
from embedq_worker.errors import EngineError, WrongDevice
from embedq_worker.inference import opener
from embedq_worker.settings import WorkerSettings

NPU = Npu(Path("/dev/accel/accel0"), "0000:00:0b.0", 0x643E, "intel_vpu")
ON_NPU = Placement(Device.NPU, Device.NPU, "Found accel0.", NPU)


@dataclass
class Opened:
    """Stands in for an opened engine set and its engine."""

    device: Device
    details: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    name: str = "openvino"

    @property
    def standard(self) -> Opened:
        return self

    @property
    def engine(self) -> Opened:
        return self

    def close(self) -> None:
        self.closed = True


def patch_opener(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    """Make the opener return this engine."""
    monkeypatch.setattr(opener, "open_serving", lambda *_: opened)
    monkeypatch.setattr(opener, "find_model", lambda *_: None)


def test_engine_on_another_device_is_closed_and_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(Device.CPU)
    patch_opener(monkeypatch, opened)

    with pytest.raises(EngineError, match="runs on cpu, not on npu"):
        opener.open_placed(WorkerSettings.load(), ON_NPU)
    assert opened.closed


@pytest.mark.parametrize(
    "address", ["{domain: 0 bus: 0 device: 0xc function: 0}", "", "unknown format"]
)
def test_engine_on_another_or_unknown_npu_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(Device.NPU, {"device_pci_info": address})
    patch_opener(monkeypatch, opened)

    with pytest.raises(WrongDevice, match="this worker holds accel0 NPU 4000"):
        opener.open_placed(WorkerSettings.load(), ON_NPU)
    assert opened.closed


def test_engine_on_the_locked_npu_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Opened(Device.NPU, {"device_pci_info": "{domain: 0 bus: 0 device: 0xb function: 0}"})
    patch_opener(monkeypatch, opened)

    served: object = opener.open_placed(WorkerSettings.load(), ON_NPU)

    assert served is opened
    assert not opened.closed
