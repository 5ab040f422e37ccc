"""The vocabulary that every module shares: axis names, metrics, sites and directions.

Nothing here touches a model. Axis names used everywhere (jaxtyping annotations, xarray dimensions, dataframe columns,
plot labels): `batch pos layer head kv_head d_model d_head d_mlp d_vocab latent dest src example`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

from jaxtyping import Float
from torch import Tensor

Metric: TypeAlias = Callable[[Float[Tensor, "batch pos d_vocab"]], Float[Tensor, "batch"]]
"""Logits to one number per example. Means come later, so that error bars are always available."""

Direction: TypeAlias = Literal["denoise", "noise"]
"""`"denoise"`: run the corrupted prompt and patch clean values in (sufficiency).
`"noise"`: run the clean prompt and patch corrupted values in (necessity)."""

Value: TypeAlias = Literal["swap", "zero", "mean", "resample", "gaussian"]
"""What a patched activation is replaced by."""

Site: TypeAlias = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "neuron"
]
"""A kind of activation inside a block; together with a layer it names one hook point (`interp.hooks.hook_name`)."""

SITES: tuple[Site, ...] = get_args(Site)
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
VALUES: tuple[Value, ...] = get_args(Value)
