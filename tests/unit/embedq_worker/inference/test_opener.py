"""An engine is opened on the device that the worker was given, and on no other."""

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
ON_NPU = Placement(Device.NPU, Device.NPU, "It is there.", NPU)


@dataclass
class Opened:
    """What open_serving would return, as far as it is looked at here."""

    device: Device
    details: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    name: str = "openvino"

    @property
    def standard(self) -> Opened:
        """What serves class ``standard``, which is the same object."""
        return self

    @property
    def engine(self) -> Opened:
        """The engine, which is the same object."""
        return self

    def close(self) -> None:
        """Remember it."""
        self.closed = True


def opening(monkeypatch: pytest.MonkeyPatch, opened: Opened) -> None:
    """Let the engine open so."""
    monkeypatch.setattr(opener, "open_serving", lambda *_: opened)
    monkeypatch.setattr(opener, "find_model", lambda _: None)


def test_engine_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that was given an NPU never serves from its CPU in silence."""
    opened = Opened(Device.CPU)
    opening(monkeypatch, opened)

    with pytest.raises(EngineError, match="runs on cpu, not on npu"):
        opener.open_placed(WorkerSettings.load(), ON_NPU)
    assert opened.closed


@pytest.mark.parametrize(
    "address", ["{domain: 0 bus: 0 device: 0xc function: 0}", "", "an address of tomorrow"]
)
def test_runtime_that_opened_another_npu_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device that computes must be the one whose lock this process holds."""
    opened = Opened(Device.NPU, {"device_pci_info": address})
    opening(monkeypatch, opened)

    with pytest.raises(WrongDevice, match="this worker holds accel0 NPU 4000"):
        opener.open_placed(WorkerSettings.load(), ON_NPU)
    assert opened.closed


def test_claimed_npu_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO names the device in its own form."""
    opened = Opened(Device.NPU, {"device_pci_info": "{domain: 0 bus: 0 device: 0xb function: 0}"})
    opening(monkeypatch, opened)

    served: object = opener.open_placed(WorkerSettings.load(), ON_NPU)

    assert served is opened
    assert not opened.closed
