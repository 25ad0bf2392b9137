"""Build the graph of a model; every engine reads this graph.

A change of the graph needs a higher engines.model_cache.GRAPH_VERSION. No runtime enters here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from embedq_worker.model.families import FAMILIES
from embedq_worker.model.foreign_onnx import adapt_onnx
from embedq_worker.model.onnx_graph import OnnxBuilder, OnnxModel
from embedq_worker.model.pooling import append_pooling
from embedq_worker.model.weights import Weights

if TYPE_CHECKING:
    from embedq_worker.model.resolve import Model

#: ONNX operator set; the first with Gelu.
OPSET: Final = 20

#: Graphs that an engine still uses, by the model's identity.
_cache: WeakValueDictionary[str, OnnxModel] = WeakValueDictionary()


def build_graph(model: Model) -> OnnxModel:
    """Build or adapt the graph of a model; the engines of a process share it.

    Raises:
        ModelError: the weights are damaged, or do not fit the configuration.
    """
    graph = _cache.get(model.identity)
    if graph is None:
        graph = _build_encoder(model) if model.packable else _adapt(model)
        _cache[model.identity] = graph
    return graph


def _adapt(model: Model) -> OnnxModel:
    return adapt_onnx(model.weights, model.encoder, model, model.dim)


def _build_encoder(model: Model) -> OnnxModel:
    family = FAMILIES[model.architecture["model_type"]]
    weights = Weights(model.weights, model.architecture, ("", *family.prefixes))
    g = OnnxBuilder(OPSET, max_length=model.max_length, include_prompt=model.include_prompt)
    append_pooling(g, family.build(g, weights), model)
    return g.graph(model.dim)
