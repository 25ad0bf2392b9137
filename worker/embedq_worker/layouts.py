"""How the engines of a model use the cores of this node, by its settings and what tuning kept."""

from __future__ import annotations

import importlib.metadata
from typing import Final

from embedq.contract import Accuracy
from embedq_worker.models import Model
from embedq_worker.selection import Candidate, Memory, machine_key
from embedq_worker.settings import WorkerSettings
from embedq_worker.tuning import Layout

#: Padded tokens of one inference, where the settings name none; why: see engines/onnxruntime.py.
DEFAULT_TOKEN_BUDGET: Final = 512


class Layouts:
    """The layouts of one model's engines."""

    def __init__(self, settings: WorkerSettings, model: Model) -> None:
        self._settings = settings
        self._model = model

    def of(self, one: Candidate, accuracy: Accuracy) -> Layout:
        """Return how an engine is to use the cores: as the settings say, as tuned, or as usual."""
        settings = self._settings
        kept = Memory(settings.cache_dir).recall_entry(self.key(one, accuracy))
        usual = Layout(settings.cores(), settings.cores(), DEFAULT_TOKEN_BUDGET)
        tuned = Layout.from_entry(kept, settings.cores()) or usual
        return tuned.overridden(settings.threads, settings.streams, settings.token_budget)

    def key(self, one: Candidate, accuracy: Accuracy) -> str:
        """Name everything that could change what is the best layout."""
        return machine_key(
            what="layout",
            model=self._model.identity,
            accuracy=str(accuracy),
            engine=f"{one.engine} {one.precision}",
            versions=engine_versions(),
            cores=str(self._settings.cores()),
        )


def engine_versions() -> str:
    """Name the runtimes that are installed; another one may want another choice."""
    return str([_version(name) for name in ("onnxruntime", "openvino")])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
