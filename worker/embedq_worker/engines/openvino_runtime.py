"""Wrap OpenVINO: devices, compiled models and errors. No other module imports ``openvino``.

The main process of a worker must not import this module, because an NPU context does not survive
a fork.
"""

from __future__ import annotations

import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from embedq_worker.engines.base import INPUTS, Bytes
from embedq_worker.engines.openvino_errors import compile_failed
from embedq_worker.errors import NoDevice

if TYPE_CHECKING:
    from embedq_worker.model.onnx_graph import OnnxModel

# Importing openvino sends telemetry to Google Analytics from a forked process. Marking its
# telemetry module as missing prevents that.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # None: not importable

import openvino as ov  # noqa: E402 # after the line above


@dataclass(frozen=True, slots=True)
class DeviceTarget:
    """An OpenVINO device and the plugin that provides it.

    Attributes:
        device: device string. Never AUTO, MULTI or HETERO, which silently compute on the CPU when
            a device is lost.
        library: plugin to register under this device string; empty for a plugin of OpenVINO.
        plugins: file that lists further plugins; empty for none.
        forced: properties of an emulated NPU, sent even if the plugin does not list them.
        emulation: name of the emulated NPU; empty for a real NPU.
    """

    device: str = "NPU"
    library: str = ""
    plugins: str = ""
    forced: Mapping[str, str] = field(default_factory=dict)
    emulation: str = ""


#: The CPU.
CPU: Final = DeviceTarget("CPU")

#: The real NPU and the emulated NPUs, by value of EMBEDQ_NPU_EMULATION.
TARGETS: Final[Mapping[str, DeviceTarget]] = {
    "none": DeviceTarget(),
    "alias": DeviceTarget("NPUCPU", library="openvino_intel_cpu_plugin", emulation="alias"),
    "npuw": DeviceTarget(
        forced={"NPU_USE_NPUW": "YES", "NPUW_DEVICES": "CPU", "NPUW_ONLINE_PIPELINE": "NONE"},
        emulation="npuw",
    ),
}

# OpenVINO looks up numpy's types once, under a lock that it holds while other Python threads run.
# Two threads that do the first look-up at the same time deadlock, so it is done here, at import.
_ = ov.Tensor(np.zeros(1, np.int64), shared_memory=True).get_element_type().to_dtype()

#: Version of OpenVINO; compiled models of another version are not loaded.
VERSION: Final = str(ov.get_version())

#: Properties that identify a device, its driver and its compiler.
TRAITS: Final = (
    "FULL_DEVICE_NAME",
    "DEVICE_ARCHITECTURE",
    "DEVICE_PCI_INFO",
    "NPU_DRIVER_VERSION",
    "NPU_COMPILER_VERSION",
)

#: First bytes of a model packed by pack_ir.
_IR: Final = b"EQIR"


class Runtime:
    """One OpenVINO device in this process."""

    def __init__(self, target: DeviceTarget) -> None:
        """Load the plugin and find the device.

        Raises:
            NoDevice: OpenVINO does not list the device.
            CompileFailed: a plugin cannot be loaded.
        """
        self.target = target
        try:
            self._core = ov.Core(target.plugins) if target.plugins else ov.Core()
            if target.library:
                self._core.register_plugin(target.library, target.device)
            present = target.device in self._core.available_devices or bool(target.forced)
            #: Names of the properties that the plugin supports.
            self.supported: frozenset[str] = frozenset()
            if present:
                known = self._core.get_property(target.device, "SUPPORTED_PROPERTIES")
                self.supported = frozenset(known)
        except RuntimeError as error:
            raise compile_failed(str(error), f"Opening {target.device}") from error
        if not present:
            raise NoDevice(
                f"OpenVINO {VERSION} lists no device {target.device}, only "
                f"{', '.join(self._core.available_devices)}. Run: embedq-worker check"
            )

    def get(self, name: str) -> str:
        """Return a property of the device as text; empty if the device does not have it."""
        if name not in self.supported:
            return ""
        try:
            return _as_text(self._core.get_property(self.target.device, name))
        except (RuntimeError, TypeError):  # NPU_BATCH_MODE and others have no Python type
            return ""

    def traits(self) -> dict[str, str]:
        """Return the properties that identify the device and its driver."""
        return {name: self.get(name) for name in TRAITS}

    def compile(
        self,
        graph: OnnxModel | bytes,
        properties: Mapping[str, str],
        shapes: Mapping[str, list[int]] | None = None,
    ) -> Compiled:
        """Compile a graph for the device.

        Args:
            graph: ONNX graph, or bytes of pack_ir.
            properties: properties for the plugin; those of an emulated NPU are added.
            shapes: input shapes by name; None leaves them dynamic.

        Raises:
            CompileFailed: OpenVINO rejects the graph.
        """
        try:
            model = self.read(graph)
            if shapes:
                # OpenVINO drops inputs that the model does not use.
                names = _input_names(model)
                model.reshape({name: shape for name, shape in shapes.items() if name in names})
            config = {**properties, **self.target.forced}
            compiled = self._core.compile_model(model, self.target.device, config)
            if isinstance(graph, bytes):
                return Compiled(compiled, self, None)
            if graph.mapping:
                graph.mapping.release()  # the plugin has copied most weights
            return Compiled(compiled, self, graph)
        except RuntimeError as error:
            raise compile_failed(str(error), f"Compiling for {self.target.device}") from error

    def read(self, graph: OnnxModel | bytes) -> Any:
        """Read an ONNX graph, or bytes of pack_ir, into an ``openvino.Model``.

        Raises:
            RuntimeError: OpenVINO cannot read it.
        """
        if not isinstance(graph, bytes):
            return _with_weights(self._core.read_model(graph.with_weights_as_inputs()), graph)
        if not graph.startswith(_IR):
            raise RuntimeError("These bytes are not a model packed by pack_ir.")
        size = struct.unpack_from("<I", graph, len(_IR))[0]
        start = len(_IR) + 4
        # The weights are read in place, and the model keeps them alive.
        weights = ov.Tensor(np.frombuffer(graph[start + size :], np.uint8))
        return self._core.read_model(graph[start : start + size], weights)

    def import_blob(self, blob: Bytes, properties: Mapping[str, str]) -> Compiled:
        """Import a compiled model.

        Raises:
            CompileFailed: the plugin rejects it.
        """
        config = {**properties, **self.target.forced}
        try:
            compiled = self._core.import_model(ov.Tensor(blob), self.target.device, config)
        except RuntimeError as error:
            raise compile_failed(str(error), "Importing a compiled model") from error
        return Compiled(compiled, self, blob)


class Compiled:
    """A model compiled for a device."""

    def __init__(self, model: Any, runtime: Runtime, source: OnnxModel | Bytes | None) -> None:
        self._model = model
        self.runtime = runtime
        self.inputs = _input_names(model)
        # OpenVINO may read weights in place, so their memory must live as long as the model.
        self._source = source

    def get(self, name: str) -> str:
        """Return a property of the compiled model as text; empty if it does not have it."""
        try:
            return _as_text(self._model.get_property(name))
        except (RuntimeError, TypeError):
            return ""

    def export(self) -> bytes:
        """Return the compiled model as bytes.

        Raises:
            CompileFailed: the plugin cannot export.
        """
        try:
            return bytes(self._model.export_model().getvalue())
        except RuntimeError as error:
            raise compile_failed(str(error), "Exporting a compiled model") from error

    def create_request(self) -> Any:
        """Create an infer request, for one caller at a time.

        Raises:
            CompileFailed: the plugin has no memory for it.
        """
        try:
            return self._model.create_infer_request()
        except RuntimeError as error:
            raise compile_failed(str(error), "Creating an infer request") from error


def pack_ir(model: Any) -> bytes:
    """Serialize an ``openvino.Model``: magic bytes, length of the XML, XML, weights."""
    with tempfile.TemporaryDirectory(prefix="embedq-") as folder:
        path = Path(folder, "model.xml")
        ov.save_model(model, path, compress_to_fp16=False)
        xml = path.read_bytes()
        weights = path.with_suffix(".bin").read_bytes()
    return b"".join((_IR, struct.pack("<I", len(xml)), xml, weights))


def _with_weights(model: Any, graph: OnnxModel) -> Any:
    # Constants that share memory replace the inputs that stand for weights: a protobuf message
    # with all weights opens more slowly and needs more memory.
    half = graph.bfloat16_weights()
    for parameter in model.get_parameters():
        weight = graph.weights.get(parameter.friendly_name)
        if weight is None:
            continue
        if parameter.friendly_name in half:  # numpy has no bfloat16
            weight = ov.Tensor(weight, list(weight.shape), ov.Type.bf16)
        constant = ov.op.Constant(weight, shared_memory=True)
        ov.utils.replace_node(parameter, constant)
        model.remove_parameter(parameter)
    return model


def _input_names(model: Any) -> list[str]:
    # A port may have several names: OpenVINO removes a cast without effect and adds the name of
    # its output to the input.
    return sorted(name for port in model.inputs for name in port.names if name in INPUTS)


def _as_text(value: Any) -> str:
    if isinstance(value, ov.Type):
        return str(value.get_type_name())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple | set) else str(value)
