"""Attention heads: what each attends to, writes and composes with. The names are loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# One line per public name and its module; add yours here, in __all__ and below TYPE_CHECKING.
_HOMES = {
    "SinkScores": "interp.attention.sinks",
    "sink_importance": "interp.attention.sinks",
    "sink_scores": "interp.attention.sinks",
    "SinkControls": "interp.attention.controls",
    "constant_logit_importance": "interp.attention.controls",
    "control_tokens": "interp.attention.controls",
    "logit_for_importance": "interp.attention.controls",
    "self_importance": "interp.attention.controls",
    "sink_controls": "interp.attention.controls",
    "uniform_importance": "interp.attention.controls",
    "NormProfile": "interp.attention.norms",
    "norm_profile": "interp.attention.norms",
    "QKDecomposition": "interp.attention.drain",
    "SinkDrain": "interp.attention.drain",
    "qk_decomposition": "interp.attention.drain",
    "sink_drain": "interp.attention.drain",
    "MassiveActivations": "interp.attention.massive",
    "OutlierMetrics": "interp.attention.massive",
    "ResidualSinks": "interp.attention.massive",
    "kurtosis": "interp.attention.massive",
    "massive_activations": "interp.attention.massive",
    "outlier_metrics": "interp.attention.massive",
    "residual_sinks": "interp.attention.massive",
    "EntropyScores": "interp.attention.entropy",
    "attention_entropy": "interp.attention.entropy",
    "column_entropy": "interp.attention.entropy",
    "row_entropy": "interp.attention.entropy",
    "Calibration": "interp.attention.calibration",
    "RELEASED": "interp.attention.calibration",
    "SANE": "interp.attention.calibration",
    "calibrate_pattern": "interp.attention.calibration",
    "calibrated": "interp.attention.calibration",
    "calibration_sinks": "interp.attention.calibration",
    "activation_means": "interp.attention.sink_interventions",
    "cut_heads": "interp.attention.sink_interventions",
    "redirect_attention": "interp.attention.sink_interventions",
    "set_activations": "interp.attention.sink_interventions",
    "swap_position_embeddings": "interp.attention.sink_interventions",
    "SinkDynamics": "interp.attention.dynamics",
    "sink_dynamics": "interp.attention.dynamics",
    "reduce_patterns": "interp.attention._patterns",
    "HeadScores": "interp.attention.head_scores",
    "attention_between": "interp.attention.classic",
    "detection_pattern": "interp.attention.classic",
    "pattern_scores": "interp.attention.classic",
    "attended_token_copying": "interp.attention.copying",
    "copy_scores": "interp.attention.copying",
    "name_mover_scores": "interp.attention.copying",
    "ov_copying": "interp.attention.copying",
    "successor_scores": "interp.attention.copying",
    "PrefixInduction": "interp.attention.long_prefix",
    "PrefixSequences": "interp.attention._prefix_sequences",
    "prefix_induction": "interp.attention.long_prefix",
    "prefix_sequences": "interp.attention._prefix_sequences",
    "CompositionScores": "interp.attention.composition",
    "composition_scores": "interp.attention.composition",
    "prefix_matching_from_weights": "interp.attention.composition",
    "Channel": "interp.attention.svd_channels",
    "Channels": "interp.attention.svd_channels",
    "channel": "interp.attention.svd_channels",
    "channel_activations": "interp.attention.svd_channels",
    "channel_intervention": "interp.attention.svd_channels",
    "channels": "interp.attention.svd_channels",
    "HeadReport": "interp.attention.report",
    "ROLES": "interp.attention.report",
    "head_report": "interp.attention.report",
    "LostNeedle": "interp.attention.needles",
    "Needle": "interp.attention.needles",
    "Needles": "interp.attention.needles",
    "find_span": "interp.attention.needles",
    "official_span": "interp.attention.needles",
    "generate_haystack": "interp.attention.haystacks",
    "insert_needles": "interp.attention.haystacks",
    "needle_grid": "interp.attention.haystacks",
    "RetrievalScores": "interp.attention.retrieval_result",
    "retrieval_scores": "interp.attention.retrieval",
    "score_rows": "interp.attention._scoring",
    "masked_heads": "interp.attention.masking",
    "head_means": "interp.attention.masking",
    "matched_random_heads": "interp.attention.masking",
    "MaskingCurve": "interp.attention._masking_curve",
    "masking_curve": "interp.attention._masking_curve",
    "HeadGates": "interp.attention.published",
    "all_zero_samples": "interp.attention.published",
    "compare_scores": "interp.attention.published",
    "read_gates": "interp.attention.published",
    "read_head_scores": "interp.attention.published",
    "write_head_scores": "interp.attention.published",
    "RazorScores": "interp.attention.razor",
    "compensated_attention": "interp.attention.razor",
    "compression": "interp.attention.razor",
    "head_budget": "interp.attention.razor",
    "razor_scores": "interp.attention.razor",
    "CacheEffects": "interp.attention.cache_policy",
    "CachePolicy": "interp.attention.cache_policy",
    "cache_effects": "interp.attention.cache_policy",
    "AttentionRows": "interp.attention._stream_result",
    "AttentionStream": "interp.attention._stream_result",
    "LayerStatistics": "interp.attention.streaming",
    "attention_rows": "interp.attention.streaming",
    "stream_statistics": "interp.attention.streaming",
    "streaming_rows": "interp.attention.streaming",
    "streaming_statistics": "interp.attention.streaming",
    "BackcopyTask": "interp.attention.backcopy",
    "backcopy_task": "interp.attention.backcopy",
    "Dormancy": "interp.attention.dormancy",
    "dormant_heads": "interp.attention.dormancy",
    "dormant_in": "interp.attention.dormancy",
    "GrowthCurve": "interp.attention.massive_dynamics",
    "MassiveDynamics": "interp.attention.massive_dynamics",
    "fit_growth": "interp.attention.massive_dynamics",
    "massive_growth": "interp.attention.massive_dynamics",
}

__all__ = [
    "SinkScores",
    "sink_importance",
    "sink_scores",
    "SinkControls",
    "constant_logit_importance",
    "control_tokens",
    "logit_for_importance",
    "self_importance",
    "sink_controls",
    "uniform_importance",
    "NormProfile",
    "norm_profile",
    "QKDecomposition",
    "SinkDrain",
    "qk_decomposition",
    "sink_drain",
    "MassiveActivations",
    "OutlierMetrics",
    "ResidualSinks",
    "kurtosis",
    "massive_activations",
    "outlier_metrics",
    "residual_sinks",
    "EntropyScores",
    "attention_entropy",
    "column_entropy",
    "row_entropy",
    "Calibration",
    "RELEASED",
    "SANE",
    "calibrate_pattern",
    "calibrated",
    "calibration_sinks",
    "activation_means",
    "cut_heads",
    "redirect_attention",
    "set_activations",
    "swap_position_embeddings",
    "SinkDynamics",
    "sink_dynamics",
    "reduce_patterns",
    "HeadScores",
    "attention_between",
    "detection_pattern",
    "pattern_scores",
    "attended_token_copying",
    "copy_scores",
    "name_mover_scores",
    "ov_copying",
    "successor_scores",
    "PrefixInduction",
    "PrefixSequences",
    "prefix_induction",
    "prefix_sequences",
    "CompositionScores",
    "composition_scores",
    "prefix_matching_from_weights",
    "Channel",
    "Channels",
    "channel",
    "channel_activations",
    "channel_intervention",
    "channels",
    "HeadReport",
    "ROLES",
    "head_report",
    "LostNeedle",
    "Needle",
    "Needles",
    "find_span",
    "official_span",
    "generate_haystack",
    "insert_needles",
    "needle_grid",
    "RetrievalScores",
    "retrieval_scores",
    "score_rows",
    "masked_heads",
    "head_means",
    "matched_random_heads",
    "MaskingCurve",
    "masking_curve",
    "HeadGates",
    "all_zero_samples",
    "compare_scores",
    "read_gates",
    "read_head_scores",
    "write_head_scores",
    "RazorScores",
    "compensated_attention",
    "compression",
    "head_budget",
    "razor_scores",
    "CacheEffects",
    "CachePolicy",
    "cache_effects",
    "AttentionRows",
    "AttentionStream",
    "LayerStatistics",
    "attention_rows",
    "stream_statistics",
    "streaming_rows",
    "streaming_statistics",
    "BackcopyTask",
    "backcopy_task",
    "Dormancy",
    "dormant_heads",
    "dormant_in",
    "GrowthCurve",
    "MassiveDynamics",
    "fit_growth",
    "massive_growth",
]

if TYPE_CHECKING:
    from interp.attention._masking_curve import MaskingCurve, masking_curve
    from interp.attention._patterns import reduce_patterns
    from interp.attention._prefix_sequences import PrefixSequences, prefix_sequences
    from interp.attention._scoring import score_rows
    from interp.attention._stream_result import AttentionRows, AttentionStream
    from interp.attention.backcopy import BackcopyTask, backcopy_task
    from interp.attention.cache_policy import CacheEffects, CachePolicy, cache_effects
    from interp.attention.calibration import (
        RELEASED,
        SANE,
        Calibration,
        calibrate_pattern,
        calibrated,
        calibration_sinks,
    )
    from interp.attention.classic import attention_between, detection_pattern, pattern_scores
    from interp.attention.composition import CompositionScores, composition_scores, prefix_matching_from_weights
    from interp.attention.controls import (
        SinkControls,
        constant_logit_importance,
        control_tokens,
        logit_for_importance,
        self_importance,
        sink_controls,
        uniform_importance,
    )
    from interp.attention.copying import (
        attended_token_copying,
        copy_scores,
        name_mover_scores,
        ov_copying,
        successor_scores,
    )
    from interp.attention.dormancy import Dormancy, dormant_heads, dormant_in
    from interp.attention.drain import QKDecomposition, SinkDrain, qk_decomposition, sink_drain
    from interp.attention.dynamics import SinkDynamics, sink_dynamics
    from interp.attention.entropy import EntropyScores, attention_entropy, column_entropy, row_entropy
    from interp.attention.haystacks import generate_haystack, insert_needles, needle_grid
    from interp.attention.head_scores import HeadScores
    from interp.attention.long_prefix import PrefixInduction, prefix_induction
    from interp.attention.masking import head_means, masked_heads, matched_random_heads
    from interp.attention.massive import (
        MassiveActivations,
        OutlierMetrics,
        ResidualSinks,
        kurtosis,
        massive_activations,
        outlier_metrics,
        residual_sinks,
    )
    from interp.attention.massive_dynamics import GrowthCurve, MassiveDynamics, fit_growth, massive_growth
    from interp.attention.needles import LostNeedle, Needle, Needles, find_span, official_span
    from interp.attention.norms import NormProfile, norm_profile
    from interp.attention.published import (
        HeadGates,
        all_zero_samples,
        compare_scores,
        read_gates,
        read_head_scores,
        write_head_scores,
    )
    from interp.attention.razor import RazorScores, compensated_attention, compression, head_budget, razor_scores
    from interp.attention.report import ROLES, HeadReport, head_report
    from interp.attention.retrieval import retrieval_scores
    from interp.attention.retrieval_result import RetrievalScores
    from interp.attention.sink_interventions import (
        activation_means,
        cut_heads,
        redirect_attention,
        set_activations,
        swap_position_embeddings,
    )
    from interp.attention.sinks import SinkScores, sink_importance, sink_scores
    from interp.attention.streaming import (
        LayerStatistics,
        attention_rows,
        stream_statistics,
        streaming_rows,
        streaming_statistics,
    )
    from interp.attention.svd_channels import (
        Channel,
        Channels,
        channel,
        channel_activations,
        channel_intervention,
        channels,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.attention' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
