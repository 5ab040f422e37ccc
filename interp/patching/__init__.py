"""Patching: replace activations of one run by those of another, and measure or estimate what changes."""

from __future__ import annotations

from interp.patching._token_groups import token_groups
from interp.patching.activation import activation_patch
from interp.patching.agreement import Agreement, agreement
from interp.patching.attribution import attribution_patch
from interp.patching.causal_tracing import causal_trace
from interp.patching.circuit_comparison import CircuitStability, UnstableCircuit, circuit_auroc, circuit_stability
from interp.patching.circuit_evaluation import faithfulness
from interp.patching.circuit_files import StoredCircuit, load_circuit, save_circuit
from interp.patching.circuit_minimality import Minimality, minimality
from interp.patching.circuits import Circuit, select_circuit
from interp.patching.conservation import Conservation, conservation
from interp.patching.coverage import UnsupportedModule, rule_coverage
from interp.patching.cross_effects import CrossLayerEffects
from interp.patching.cross_layer import cross_layer_patch
from interp.patching.edge_scores import EdgeScores
from interp.patching.edges import edge_attribution
from interp.patching.edit_effects import EditEffects, edit_sweep
from interp.patching.editing import RankOneEdits, edited_weights, fit_edits
from interp.patching.effects import Effects
from interp.patching.faithfulness_curves import FaithfulnessCurve
from interp.patching.feature_attribution import feature_effects
from interp.patching.feature_circuits import FeatureCircuit, select_features
from interp.patching.feature_evaluation import FeatureCurve, feature_faithfulness
from interp.patching.feature_links import FeatureEdges, feature_edges
from interp.patching.feature_scores import FeatureEffects
from interp.patching.graph import Graph, graph_of
from interp.patching.knockout import attention_knockout
from interp.patching.knockout_result import Knockout
from interp.patching.latents import LatentEffects
from interp.patching.layer_maps import LayerMaps, fit_layer_maps
from interp.patching.localisation import LocalisationScore, score_localisation
from interp.patching.miss_bound import MissBound, miss_bound
from interp.patching.path_patching import EdgeEffects, path_patch
from interp.patching.rules import PRESETS, Rules, backward_rules
from interp.patching.tables import agreement_table
from interp.patching.verification import PoorApproximation, Verification, verify

__all__ = [
    "Agreement", "Circuit", "CircuitStability", "Conservation", "CrossLayerEffects", "EdgeEffects", "EdgeScores",
    "EditEffects", "Effects", "FaithfulnessCurve", "FeatureCircuit", "FeatureCurve", "FeatureEdges",
    "FeatureEffects", "Graph", "Knockout", "LatentEffects", "LayerMaps", "LocalisationScore", "Minimality",
    "MissBound", "PRESETS", "PoorApproximation", "RankOneEdits", "Rules", "StoredCircuit", "UnstableCircuit",
    "UnsupportedModule", "Verification", "activation_patch", "agreement", "agreement_table", "attention_knockout",
    "attribution_patch", "backward_rules", "causal_trace", "circuit_auroc", "circuit_stability", "conservation",
    "cross_layer_patch", "edge_attribution", "edit_sweep", "edited_weights", "faithfulness", "feature_edges",
    "feature_effects", "feature_faithfulness", "fit_edits", "fit_layer_maps", "graph_of", "load_circuit",
    "minimality", "miss_bound", "path_patch", "rule_coverage", "save_circuit", "score_localisation",
    "select_circuit", "select_features", "token_groups", "verify",
]  # fmt: skip
