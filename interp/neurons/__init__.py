"""MLP neurons: what each reads and writes, what it does when it is set, what it knows. Loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# One line per public name and its module; add yours here, in __all__ and below TYPE_CHECKING.
_HOMES: dict[str, str] = {
    "decode": "interp.neurons.decoding",
    "NeuronAtlas": "interp.neurons.atlas",
    "side_vectors": "interp.neurons._sides",
    "unembedding": "interp.neurons._sides",
    "knowledge_transplant": "interp.neurons.tracing",
    "knowledge_trace": "interp.neurons.tracing",
    "KnowledgeTrace": "interp.neurons.tracing",
    "concept_ablation": "interp.neurons.concepts",
    "concept_vectors": "interp.neurons.concepts",
    "ConceptVectors": "interp.neurons.concepts",
    "validate": "interp.neurons.validity",
    "Validity": "interp.neurons.validity_result",
    "label_robustness": "interp.neurons.robustness",
    "LabelRobustness": "interp.neurons.robustness",
    "label_births": "interp.neurons.births",
    "LabelBirths": "interp.neurons.births",
    "compare": "interp.neurons.comparing",
    "AtlasComparison": "interp.neurons.comparing",
    "clamped": "interp.neurons.clamping",
    "clamp": "interp.neurons.clamping",
    "generate_clamped": "interp.neurons.clamping",
    "DoseResponse": "interp.neurons.dose_response",
    "neuron_statistics": "interp.neurons.activation_statistics",
    "NeuronStatistics": "interp.neurons.activation_statistics",
    "match_neurons": "interp.neurons.matching",
    "MatchedNeurons": "interp.neurons.matching",
    "versatility": "interp.neurons.relation_effects",
    "Versatility": "interp.neurons.relation_effects",
    "cumulativity": "interp.neurons.relation_effects",
    "Cumulativity": "interp.neurons.relation_effects",
    "split_entities": "interp.neurons.relation_prompts",
    "distinct_facts": "interp.neurons.relation_prompts",
    "neuron_selectivity": "interp.neurons.selecting",
    "selectivity": "interp.neurons.selecting",
    "Selectivity": "interp.neurons.selecting",
    "ablation_matrix": "interp.neurons.ablation",
    "AblationMatrix": "interp.neurons.ablation",
    "io_signature": "interp.neurons.signatures",
    "IO_CLASSES": "interp.neurons.signatures",
    "IOSignature": "interp.neurons.signatures",
    "hubness": "interp.neurons.hubs",
    "Hubness": "interp.neurons.hubs",
    "rotation_null": "interp.neurons.nulls",
    "peak_statistics": "interp.neurons.nulls",
    "peak_quantile": "interp.neurons.nulls",
    "expected_peak": "interp.neurons.nulls",
    "covariance_null": "interp.neurons.nulls",
    "PeakStatistics": "interp.neurons.nulls",
    "Firing": "interp.neurons.firing_rates",
    "firing": "interp.neurons.firing_rates",
    "Sparsity": "interp.neurons.sparsity",
    "PPLSparsity": "interp.neurons.sparsity",
    "cett": "interp.neurons.sparsity",
    "ppl_sparsity": "interp.neurons.sparsity",
    "MLPDecomposition": "interp.neurons.mlp_decomposition",
    "decompose_mlp": "interp.neurons.mlp_decomposition",
    "InterceptSwap": "interp.neurons.intercept_swap",
    "swap_intercepts": "interp.neurons.intercept_swap",
    "LastLayer": "interp.neurons.confidence",
    "last_layer_suppression": "interp.neurons.confidence",
    "Facets": "interp.neurons.context_facets",
    "facets": "interp.neurons.context_facets",
    "TopContexts": "interp.neurons.contexts",
    "contexts_of": "interp.neurons.contexts",
    "top_contexts": "interp.neurons.contexts",
}

__all__: list[str] = [
    "facets",
    "Facets",
    "last_layer_suppression",
    "LastLayer",
    "swap_intercepts",
    "InterceptSwap",
    "decode",
    "NeuronAtlas",
    "side_vectors",
    "unembedding",
    "knowledge_transplant",
    "knowledge_trace",
    "KnowledgeTrace",
    "concept_ablation",
    "concept_vectors",
    "ConceptVectors",
    "validate",
    "Validity",
    "decompose_mlp",
    "MLPDecomposition",
    "ppl_sparsity",
    "cett",
    "PPLSparsity",
    "Sparsity",
    "firing",
    "Firing",
    "label_robustness",
    "LabelRobustness",
    "label_births",
    "LabelBirths",
    "compare",
    "AtlasComparison",
    "clamped",
    "clamp",
    "generate_clamped",
    "DoseResponse",
    "neuron_statistics",
    "NeuronStatistics",
    "match_neurons",
    "MatchedNeurons",
    "versatility",
    "Versatility",
    "cumulativity",
    "Cumulativity",
    "split_entities",
    "distinct_facts",
    "neuron_selectivity",
    "selectivity",
    "Selectivity",
    "ablation_matrix",
    "AblationMatrix",
    "io_signature",
    "IO_CLASSES",
    "IOSignature",
    "hubness",
    "Hubness",
    "rotation_null",
    "peak_statistics",
    "peak_quantile",
    "expected_peak",
    "covariance_null",
    "PeakStatistics",
    "TopContexts",
    "contexts_of",
    "top_contexts",
]

if TYPE_CHECKING:
    from interp.neurons._sides import side_vectors, unembedding
    from interp.neurons.ablation import AblationMatrix, ablation_matrix
    from interp.neurons.activation_statistics import NeuronStatistics, neuron_statistics
    from interp.neurons.atlas import NeuronAtlas
    from interp.neurons.births import LabelBirths, label_births
    from interp.neurons.clamping import clamp, clamped, generate_clamped
    from interp.neurons.comparing import AtlasComparison, compare
    from interp.neurons.concepts import ConceptVectors, concept_ablation, concept_vectors
    from interp.neurons.confidence import LastLayer, last_layer_suppression
    from interp.neurons.context_facets import Facets, facets
    from interp.neurons.contexts import TopContexts, contexts_of, top_contexts
    from interp.neurons.decoding import decode
    from interp.neurons.dose_response import DoseResponse
    from interp.neurons.firing_rates import Firing, firing
    from interp.neurons.hubs import Hubness, hubness
    from interp.neurons.intercept_swap import InterceptSwap, swap_intercepts
    from interp.neurons.matching import MatchedNeurons, match_neurons
    from interp.neurons.mlp_decomposition import MLPDecomposition, decompose_mlp
    from interp.neurons.nulls import (
        PeakStatistics,
        covariance_null,
        expected_peak,
        peak_quantile,
        peak_statistics,
        rotation_null,
    )
    from interp.neurons.relation_effects import Cumulativity, Versatility, cumulativity, versatility
    from interp.neurons.relation_prompts import distinct_facts, split_entities
    from interp.neurons.robustness import LabelRobustness, label_robustness
    from interp.neurons.selecting import Selectivity, neuron_selectivity, selectivity
    from interp.neurons.signatures import IO_CLASSES, IOSignature, io_signature
    from interp.neurons.sparsity import PPLSparsity, Sparsity, cett, ppl_sparsity
    from interp.neurons.tracing import KnowledgeTrace, knowledge_trace, knowledge_transplant
    from interp.neurons.validity import validate
    from interp.neurons.validity_result import Validity


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.neurons' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
