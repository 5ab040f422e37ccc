"""Feature dictionaries of activations, and steering along their directions. The names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# One line per public name and its module; add yours here, in __all__ and below TYPE_CHECKING.
_HOMES: dict[str, str] = {
    "Dictionary": "interp.dictionaries.dictionary",
    "Step": "interp.dictionaries.dictionary",
    "ReLUSAE": "interp.dictionaries.relu",
    "GatedSAE": "interp.dictionaries.gated",
    "TopKSAE": "interp.dictionaries.topk",
    "BatchTopKSAE": "interp.dictionaries.batch_topk",
    "JumpReLUSAE": "interp.dictionaries.jumprelu",
    "MatryoshkaSAE": "interp.dictionaries.matryoshka",
    "prefix_widths": "interp.dictionaries.matryoshka",
    "MutualChoiceSAE": "interp.dictionaries.mutual_choice",
    "FeatureChoiceSAE": "interp.dictionaries.feature_choice",
    "GradientSAE": "interp.dictionaries.gradient_sae",
    "ARCHITECTURES": "interp.dictionaries.architectures",
    "build": "interp.dictionaries.architectures",
    "TrainingConfig": "interp.dictionaries.training_config",
    "TrainingDiverged": "interp.dictionaries.training",
    "train": "interp.dictionaries.training",
    "train_many": "interp.dictionaries.training",
    "dry_run": "interp.dictionaries.training",
    "TrainingData": "interp.dictionaries.training_file",
    "TrainingFile": "interp.dictionaries.training_file",
    "grid": "interp.dictionaries.training_file",
    "read_training_file": "interp.dictionaries.training_file",
    "Sweep": "interp.dictionaries.sweeping",
    "SweepFailed": "interp.dictionaries.sweeping",
    "sweep": "interp.dictionaries.sweeping",
    "LiveSource": "interp.dictionaries.sources",
    "StoreSource": "interp.dictionaries.sources",
    "TensorSource": "interp.dictionaries.sources",
    "PlantedSource": "interp.dictionaries.planted",
    "recovery": "interp.dictionaries.planted",
    "L0Controller": "interp.dictionaries.l0_control",
    "Spliced": "interp.dictionaries.splicing",
    "spliced": "interp.dictionaries.splicing",
    "load_dictionary": "interp.dictionaries.loading",
    "save_dictionary": "interp.dictionaries.loading",
    "Absorption": "interp.dictionaries.feature_absorption",
    "absorption": "interp.dictionaries.feature_absorption",
    "Probing": "interp.dictionaries.probing",
    "sparse_probing": "interp.dictionaries.probing",
    "DictionaryReport": "interp.dictionaries.evaluation",
    "evaluate": "interp.dictionaries.evaluation",
    "Dashboard": "interp.dictionaries.dashboards",
    "dashboard": "interp.dictionaries.dashboards",
    "SNMF": "interp.dictionaries.snmf",
    "HierarchicalSNMF": "interp.dictionaries.hierarchy",
    "SteeringLatent": "interp.dictionaries.vectors",
    "SteeringVector": "interp.dictionaries.vectors",
    "latent_vectors": "interp.dictionaries.steering_latents",
    "choose_feature": "interp.dictionaries.vectors",
    "dictionary_vectors": "interp.dictionaries.vectors",
    "diff_means": "interp.dictionaries.vectors",
    "random_directions": "interp.dictionaries.vectors",
    "through_w_out": "interp.dictionaries.vectors",
    "Probe": "interp.dictionaries.directions",
    "covariance_direction": "interp.dictionaries.directions",
    "fit_probe": "interp.dictionaries.directions",
    "last_activations": "interp.dictionaries.directions",
    "principal_direction": "interp.dictionaries.directions",
    "reading_direction": "interp.dictionaries.directions",
    "Knob": "interp.dictionaries.steering",
    "generate_steered": "interp.dictionaries.steering",
    "steer": "interp.dictionaries.steering",
    "KLStrengths": "interp.dictionaries.kl_strength",
    "strength_for_kl": "interp.dictionaries.kl_strength",
    "Concept": "interp.dictionaries.steering_scores",
    "fluency": "interp.dictionaries.steering_scores",
    "harmonic_mean": "interp.dictionaries.steering_scores",
    "label_log_odds": "interp.dictionaries.steering_scores",
    "relative_fluency": "interp.dictionaries.steering_scores",
    "SteeringComparison": "interp.dictionaries.steering_result",
    "compare_steering": "interp.dictionaries.steering_comparison",
    "TokenRows": "interp.dictionaries.rows",
    "token_rows": "interp.dictionaries.rows",
    "label_masks": "interp.dictionaries.rows",
    "Detection": "interp.dictionaries.detection",
    "assign_features": "interp.dictionaries.detection",
    "auroc": "interp.dictionaries.detection",
    "detect_concepts": "interp.dictionaries.detection",
    "ConceptScores": "interp.dictionaries.concept_scores",
    "concept_score": "interp.dictionaries.concept_scores",
    "label_concept_scores": "interp.dictionaries.concept_scores",
    "sentence_maxima": "interp.dictionaries.concept_scores",
    "Matching": "interp.dictionaries.stability",
    "Stability": "interp.dictionaries.stability",
    "match_features": "interp.dictionaries.stability",
    "seed_stability": "interp.dictionaries.stability",
    "feature_directions": "interp.dictionaries.features",
    "output_tokens": "interp.dictionaries.features",
    "OutputTokens": "interp.dictionaries.features",
    "neuron_groups": "interp.dictionaries.features",
    "GroupOverlaps": "interp.dictionaries.features",
    "group_overlaps": "interp.dictionaries.features",
    "FeatureReading": "interp.dictionaries.reading",
    "read_features": "interp.dictionaries.reading",
    "label_features": "interp.dictionaries.reading",
    "HeadPolysemanticity": "interp.dictionaries.head_groups",
    "head_polysemanticity": "interp.dictionaries.head_groups",
    "label_groups": "interp.dictionaries.firing_labels",
    "label_latents": "interp.dictionaries.firing_labels",
    "random_latents": "interp.dictionaries.firing_labels",
    "FamilyGroups": "interp.dictionaries.groups",
    "GroupEffects": "interp.dictionaries.groups",
    "family_groups": "interp.dictionaries.groups",
    "amplify_groups": "interp.dictionaries.groups",
    "gradient_pursuit": "interp.dictionaries.pursuit",
    "DarkMatter": "interp.dictionaries.error_parts",
    "dark_matter": "interp.dictionaries.error_parts",
    "error_source": "interp.dictionaries.error_parts",
    "ErrorScaling": "interp.dictionaries.error_relations",
    "error_scaling": "interp.dictionaries.error_relations",
    "EarlierLayers": "interp.dictionaries.error_relations",
    "earlier_layer_prediction": "interp.dictionaries.error_relations",
    "ErrorShares": "interp.dictionaries.error_losses",
    "error_ce_shares": "interp.dictionaries.error_losses",
    "PlantedError": "interp.dictionaries.planted_error",
    "FeatureAttribution": "interp.dictionaries.head_attribution",
    "HeadWeights": "interp.dictionaries.head_attribution",
    "direct_feature_attribution": "interp.dictionaries.head_attribution",
    "head_weights": "interp.dictionaries.head_attribution",
    "RecursiveAttribution": "interp.dictionaries.recursive_parts",
    "recursive_attribution": "interp.dictionaries.recursive_parts",
    "Rule": "interp.dictionaries.concept_rules",
    "Reasoning": "interp.dictionaries.concept_rules",
    "forward_chain": "interp.dictionaries.concept_rules",
    "Propositions": "interp.dictionaries.propositions",
    "fit_propositions": "interp.dictionaries.propositions",
    "reason": "interp.dictionaries.text_reasoning",
    "ConceptEdit": "interp.dictionaries.concept_edits",
    "VectorEdit": "interp.dictionaries.concept_edits",
    "SetLatents": "interp.dictionaries.concept_edits",
    "RandomEdit": "interp.dictionaries.concept_edits",
    "ConceptSteering": "interp.dictionaries.concept_steering",
    "steer_by_concept": "interp.dictionaries.concept_steering",
    "CuedTexts": "interp.dictionaries.spurious_cues",
    "ProbeAttribution": "interp.dictionaries.spurious_cues",
    "attribute_probe": "interp.dictionaries.spurious_cues",
    "fit_text_probe": "interp.dictionaries.spurious_cues",
    "pooled_activations": "interp.dictionaries.spurious_cues",
    "units_as_latents": "interp.dictionaries.spurious_cues",
    "without_latents": "interp.dictionaries.spurious_cues",
    "Shift": "interp.dictionaries.shifting",
    "label_judge": "interp.dictionaries.shifting",
    "shift": "interp.dictionaries.shifting",
}

__all__: list[str] = [
    "Sweep",
    "SweepFailed",
    "TrainingData",
    "TrainingFile",
    "grid",
    "read_training_file",
    "sweep",
    "load_dictionary",
    "save_dictionary",
    "Dashboard",
    "dashboard",
    "ARCHITECTURES",
    "BatchTopKSAE",
    "Dictionary",
    "DictionaryReport",
    "FeatureChoiceSAE",
    "GatedSAE",
    "GradientSAE",
    "JumpReLUSAE",
    "L0Controller",
    "LiveSource",
    "MatryoshkaSAE",
    "MutualChoiceSAE",
    "PlantedSource",
    "ReLUSAE",
    "Spliced",
    "Step",
    "StoreSource",
    "TensorSource",
    "TopKSAE",
    "TrainingConfig",
    "TrainingDiverged",
    "build",
    "dry_run",
    "evaluate",
    "prefix_widths",
    "recovery",
    "spliced",
    "train",
    "train_many",
    "SNMF",
    "HierarchicalSNMF",
    "SteeringLatent",
    "SteeringVector",
    "latent_vectors",
    "choose_feature",
    "dictionary_vectors",
    "diff_means",
    "random_directions",
    "through_w_out",
    "Probe",
    "covariance_direction",
    "fit_probe",
    "last_activations",
    "principal_direction",
    "reading_direction",
    "Knob",
    "generate_steered",
    "steer",
    "KLStrengths",
    "strength_for_kl",
    "Concept",
    "fluency",
    "harmonic_mean",
    "label_log_odds",
    "relative_fluency",
    "SteeringComparison",
    "compare_steering",
    "Absorption",
    "absorption",
    "Probing",
    "sparse_probing",
    "TokenRows",
    "token_rows",
    "label_masks",
    "Detection",
    "assign_features",
    "auroc",
    "detect_concepts",
    "ConceptScores",
    "concept_score",
    "label_concept_scores",
    "sentence_maxima",
    "Matching",
    "Stability",
    "match_features",
    "seed_stability",
    "feature_directions",
    "output_tokens",
    "OutputTokens",
    "neuron_groups",
    "GroupOverlaps",
    "group_overlaps",
    "FeatureReading",
    "read_features",
    "label_features",
    "HeadPolysemanticity",
    "head_polysemanticity",
    "label_groups",
    "label_latents",
    "random_latents",
    "FamilyGroups",
    "GroupEffects",
    "family_groups",
    "amplify_groups",
    "gradient_pursuit",
    "DarkMatter",
    "dark_matter",
    "error_source",
    "ErrorScaling",
    "error_scaling",
    "EarlierLayers",
    "earlier_layer_prediction",
    "ErrorShares",
    "error_ce_shares",
    "PlantedError",
    "FeatureAttribution",
    "HeadWeights",
    "direct_feature_attribution",
    "head_weights",
    "RecursiveAttribution",
    "recursive_attribution",
    "Rule",
    "Reasoning",
    "forward_chain",
    "Propositions",
    "fit_propositions",
    "reason",
    "ConceptEdit",
    "VectorEdit",
    "SetLatents",
    "RandomEdit",
    "ConceptSteering",
    "steer_by_concept",
    "CuedTexts",
    "ProbeAttribution",
    "attribute_probe",
    "fit_text_probe",
    "pooled_activations",
    "units_as_latents",
    "without_latents",
    "Shift",
    "label_judge",
    "shift",
]

if TYPE_CHECKING:
    from interp.dictionaries.architectures import ARCHITECTURES, build
    from interp.dictionaries.batch_topk import BatchTopKSAE
    from interp.dictionaries.concept_edits import ConceptEdit, RandomEdit, SetLatents, VectorEdit
    from interp.dictionaries.concept_rules import Reasoning, Rule, forward_chain
    from interp.dictionaries.concept_scores import ConceptScores, concept_score, label_concept_scores, sentence_maxima
    from interp.dictionaries.concept_steering import ConceptSteering, steer_by_concept
    from interp.dictionaries.dashboards import Dashboard, dashboard
    from interp.dictionaries.detection import Detection, assign_features, auroc, detect_concepts
    from interp.dictionaries.dictionary import Dictionary, Step
    from interp.dictionaries.directions import (
        Probe,
        covariance_direction,
        fit_probe,
        last_activations,
        principal_direction,
        reading_direction,
    )
    from interp.dictionaries.error_losses import ErrorShares, error_ce_shares
    from interp.dictionaries.error_parts import DarkMatter, dark_matter, error_source
    from interp.dictionaries.error_relations import (
        EarlierLayers,
        ErrorScaling,
        earlier_layer_prediction,
        error_scaling,
    )
    from interp.dictionaries.evaluation import DictionaryReport, evaluate
    from interp.dictionaries.feature_absorption import Absorption, absorption
    from interp.dictionaries.feature_choice import FeatureChoiceSAE
    from interp.dictionaries.features import (
        GroupOverlaps,
        OutputTokens,
        feature_directions,
        group_overlaps,
        neuron_groups,
        output_tokens,
    )
    from interp.dictionaries.firing_labels import label_groups, label_latents, random_latents
    from interp.dictionaries.gated import GatedSAE
    from interp.dictionaries.gradient_sae import GradientSAE
    from interp.dictionaries.groups import FamilyGroups, GroupEffects, amplify_groups, family_groups
    from interp.dictionaries.head_attribution import (
        FeatureAttribution,
        HeadWeights,
        direct_feature_attribution,
        head_weights,
    )
    from interp.dictionaries.head_groups import HeadPolysemanticity, head_polysemanticity
    from interp.dictionaries.hierarchy import HierarchicalSNMF
    from interp.dictionaries.jumprelu import JumpReLUSAE
    from interp.dictionaries.kl_strength import KLStrengths, strength_for_kl
    from interp.dictionaries.l0_control import L0Controller
    from interp.dictionaries.loading import load_dictionary, save_dictionary
    from interp.dictionaries.matryoshka import MatryoshkaSAE, prefix_widths
    from interp.dictionaries.mutual_choice import MutualChoiceSAE
    from interp.dictionaries.planted import PlantedSource, recovery
    from interp.dictionaries.planted_error import PlantedError
    from interp.dictionaries.probing import Probing, sparse_probing
    from interp.dictionaries.propositions import Propositions, fit_propositions
    from interp.dictionaries.pursuit import gradient_pursuit
    from interp.dictionaries.reading import FeatureReading, label_features, read_features
    from interp.dictionaries.recursive_parts import RecursiveAttribution, recursive_attribution
    from interp.dictionaries.relu import ReLUSAE
    from interp.dictionaries.rows import TokenRows, label_masks, token_rows
    from interp.dictionaries.shifting import Shift, label_judge, shift
    from interp.dictionaries.snmf import SNMF
    from interp.dictionaries.sources import LiveSource, StoreSource, TensorSource
    from interp.dictionaries.splicing import Spliced, spliced
    from interp.dictionaries.spurious_cues import (
        CuedTexts,
        ProbeAttribution,
        attribute_probe,
        fit_text_probe,
        pooled_activations,
        units_as_latents,
        without_latents,
    )
    from interp.dictionaries.stability import Matching, Stability, match_features, seed_stability
    from interp.dictionaries.steering import Knob, generate_steered, steer
    from interp.dictionaries.steering_comparison import compare_steering
    from interp.dictionaries.steering_latents import latent_vectors
    from interp.dictionaries.steering_result import SteeringComparison
    from interp.dictionaries.steering_scores import Concept, fluency, harmonic_mean, label_log_odds, relative_fluency
    from interp.dictionaries.sweeping import Sweep, SweepFailed, sweep
    from interp.dictionaries.text_reasoning import reason
    from interp.dictionaries.topk import TopKSAE
    from interp.dictionaries.training import TrainingDiverged, dry_run, train, train_many
    from interp.dictionaries.training_config import TrainingConfig
    from interp.dictionaries.training_file import TrainingData, TrainingFile, grid, read_training_file
    from interp.dictionaries.vectors import (
        SteeringLatent,
        SteeringVector,
        choose_feature,
        dictionary_vectors,
        diff_means,
        random_directions,
        through_w_out,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.dictionaries' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
