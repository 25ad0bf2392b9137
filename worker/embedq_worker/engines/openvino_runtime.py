"""The only file that imports openvino.

What stands behind the word npu: the real device, or an emulated NPU that takes the same code path.

OpenVINO in our words. The only file that imports ``openvino``; the engines stand on it.

Whoever imports this file has imported the runtime: the parent of a worker never does, for an NPU
context does not survive a fork.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from embedq_worker.engines.infer_requests import INPUTS
from embedq_worker.engines.openvino_errors import compile_failed
from embedq_worker.errors import NoDevice

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxModel

# Importing openvino reports to Google Analytics, from a forked process and without asking. With its
# telemetry module marked as missing it does not.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None: not importable

import openvino as ov  # noqa: E402 # after the line above


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """An OpenVINO device and what must be done before it answers.

    Attributes:
        device: the device string. Never AUTO, MULTI or HETERO, which answer from the CPU when a
            device is lost, without a word.
        library: plugin to register under that name first; empty for those OpenVINO knows.
        plugins: file with further plugins; empty for none.
        forced: properties that make an emulated NPU, sent unfiltered.
        standin: name of the emulated NPU; empty for a real NPU.
    """

    device: str = "NPU"
    library: str = ""
    plugins: str = ""
    forced: Mapping[str, str] = field(default_factory=dict)
    emulation: str = ""

    def to_message(self) -> dict[str, Any]:
        """Describe the target for another process, in types of JSON."""
        return asdict(self)


#: The CPU of OpenVINO, as itself.
CPU: Final = DeviceTarget("CPU")


#: The real NPU, and the emulated NPUs that need nothing but OpenVINO.
TARGETS: Final[Mapping[str, DeviceTarget]] = {
    "none": DeviceTarget(),
    "alias": DeviceTarget("NPUCPU", library="openvino_intel_cpu_plugin", emulation="alias"),
    "npuw": DeviceTarget(
        forced={
            "NPU_USE_NPUW": "YES",
            "NPUW_DEVICES": "CPU",
            "NPUW_ONLINE_PIPELINE": "NONE",
        },
        emulation="npuw",
    ),
}


# OpenVINO looks up the types of numpy once, under a lock that it keeps while Python may run another
# thread. If that one asks for a type too, both wait for ever (2026.4; a worker hung so in its
# self-test). So they are looked up here, where nobody else asks.
_ = ov.Tensor(np.zeros(1, np.int64), shared_memory=True).get_element_type().to_dtype()


#: Version that makes a compiled model useless when it changes.
VERSION: Final = str(ov.get_version())


#: What the plugin is asked about itself, where it knows the question.
TRAITS: Final = (
    "FULL_DEVICE_NAME",
    "DEVICE_ARCHITECTURE",
    "DEVICE_PCI_INFO",
    "NPU_DRIVER_VERSION",
    "NPU_COMPILER_VERSION",
)


Bytes = npt.NDArray[np.uint8]


#: What packed IR begins with.
_IR: Final = b"EQIR"


class Runtime:
    """One device of OpenVINO in this process."""

    def __init__(self, target: DeviceTarget) -> None:
        """Find the device.

        Raises:
            NoDevice: OpenVINO does not see it.
            CompileFailed: a plugin cannot be loaded.
        """
        self.target = target
        try:
            self._core = ov.Core(target.plugins) if target.plugins else ov.Core()
            if target.library:
                self._core.register_plugin(target.library, target.device)
            present = target.device in self._core.available_devices or bool(target.forced)
            #: The properties that the plugin knows.
            self.supported: frozenset[str] = frozenset()
            if present:
                known = self._core.get_property(target.device, "SUPPORTED_PROPERTIES")
                self.supported = frozenset(known)
        except RuntimeError as error:
            raise compile_failed(str(error), f"Opening {target.device}") from error
        if not present:
            raise NoDevice(
                f"OpenVINO {VERSION} shows no {target.device} (only "
                f"{', '.join(self._core.available_devices)}). Look at: embedq-worker check"
            )

    def get(self, name: str) -> str:
        """Return a property of the device as text; empty if it has none of this name."""
        if name not in self.supported:
            return ""
        try:
            return _shown(self._core.get_property(self.target.device, name))
        except (RuntimeError, TypeError):  # NPU_BATCH_MODE and others have no Python type
            return ""

    def traits(self) -> dict[str, str]:
        """Return what the device says about itself and its driver."""
        return {name: self.get(name) for name in TRAITS}

    def compile(
        self,
        graph: OnnxModel | bytes,
        properties: Mapping[str, str],
        shapes: Mapping[str, list[int]] | None = None,
    ) -> Compiled:
        """Compile a graph for the device.

        Args:
            graph: ours, or what pack_ir made.
            properties: for the plugin; those of an emulated NPU are added.
            shapes: of the inputs by name; None leaves them dynamic.

        Raises:
            CompileFailed: OpenVINO refuses it.
        """
        try:
            model = self.read(graph)
            if shapes:
                # An input that a foreign model does not look at is not there any more.
                has = _names(model)
                model.reshape({name: shape for name, shape in shapes.items() if name in has})
            config = {**properties, **self.target.forced}
            found = self._core.compile_model(model, self.target.device, config)
            return Compiled(found, self, None if isinstance(graph, bytes) else graph)
        except RuntimeError as error:
            raise compile_failed(str(error), f"Compiling for {self.target.device}") from error

    def read(self, graph: OnnxModel | bytes) -> Any:
        """Read a graph, or what pack_ir made, into OpenVINO's own form; raises RuntimeError."""
        if not isinstance(graph, bytes):
            return _with_weights(self._core.read_model(graph.with_weights_as_inputs()), graph)
        if not graph.startswith(_IR):
            raise RuntimeError("These bytes are no packed model.")
        size = struct.unpack_from("<I", graph, len(_IR))[0]
        start = len(_IR) + 4
        # The weights are read in place, and the model keeps them alive.
        weights = ov.Tensor(np.frombuffer(graph[start + size :], np.uint8))
        return self._core.read_model(graph[start : start + size], weights)

    def import_blob(self, blob: Bytes, properties: Mapping[str, str]) -> Compiled:
        """Load a compiled model.

        Raises:
            CompileFailed: the plugin refuses it.
        """
        config = {**properties, **self.target.forced}
        try:
            found = self._core.import_model(ov.Tensor(blob), self.target.device, config)
        except RuntimeError as error:
            raise compile_failed(str(error), "Importing a compiled model") from error
        return Compiled(found, self, blob)


class Compiled:
    """A model on a device."""

    def __init__(self, model: Any, runtime: Runtime, source: OnnxModel | Bytes | None) -> None:
        self._model = model
        self.runtime = runtime
        self.inputs = _names(model)
        # Weights may be read in place, so what they are in lives as long.
        self._source = source

    def get(self, name: str) -> str:
        """Return a property of the compiled model as text; empty if it has none of this name."""
        try:
            return _shown(self._model.get_property(name))
        except (RuntimeError, TypeError):
            return ""

    def export(self) -> bytes:
        """Return the compiled model as bytes.

        Raises:
            CompileFailed: the plugin cannot.
        """
        try:
            return bytes(self._model.export_model().getvalue())
        except RuntimeError as error:
            raise compile_failed(str(error), "Exporting a compiled model") from error

    def create_request(self) -> Any:
        """Create an inference request; it belongs to one caller at a time.

        Raises:
            CompileFailed: there is no memory for it.
        """
        try:
            return self._model.create_infer_request()
        except RuntimeError as error:
            raise compile_failed(str(error), "Creating an inference request") from error


def pack_ir(model: Any) -> bytes:
    """Write a model of OpenVINO as bytes: a mark, the length of its description, both parts."""
    with tempfile.TemporaryDirectory(prefix="embedq-") as folder:
        path = Path(folder, "model.xml")
        ov.save_model(model, path, compress_to_fp16=False)
        described = path.read_bytes()
        weights = path.with_suffix(".bin").read_bytes()
    return b"".join((_IR, struct.pack("<I", len(described)), described, weights))


def _with_weights(model: Any, graph: OnnxModel) -> Any:
    """Put constants in the place of the inputs that stand for weights.

    They are read in place: opening the CPU's engine took 0.26 s this way, and 0.68 s and 150 MB
    more at the peak with the weights in one message (two Zen 4 cores, measured 2026-11-28).
    """
    for parameter in model.get_parameters():
        weight = graph.weights.get(parameter.friendly_name)
        if weight is None:
            continue
        constant = ov.op.Constant(weight, shared_memory=True)
        ov.utils.replace_node(parameter, constant)
        model.remove_parameter(parameter)
    return model


def _names(model: Any) -> list[str]:
    # A cast that changes nothing is gone, and its output has become one more name of our input.
    return sorted(name for port in model.inputs for name in port.names if name in INPUTS)


def _shown(value: Any) -> str:
    if isinstance(value, ov.Type):
        return str(value.get_type_name())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)
