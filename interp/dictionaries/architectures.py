"""All architectures by name, and building one from plain settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from interp.dictionaries.batch_topk import BatchTopKSAE
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.feature_choice import FeatureChoiceSAE
from interp.dictionaries.gated import GatedSAE
from interp.dictionaries.gradient_sae import GradientSAE
from interp.dictionaries.jumprelu import JumpReLUSAE
from interp.dictionaries.matryoshka import MatryoshkaSAE
from interp.dictionaries.mutual_choice import MutualChoiceSAE
from interp.dictionaries.relu import ReLUSAE
from interp.dictionaries.topk import TopKSAE

ARCHITECTURES: dict[str, type[Dictionary]] = {
    cls.architecture: cls
    for cls in (
        ReLUSAE,
        GatedSAE,
        TopKSAE,
        BatchTopKSAE,
        JumpReLUSAE,
        MatryoshkaSAE,
        MutualChoiceSAE,
        FeatureChoiceSAE,
        GradientSAE,
    )
}
"""Every architecture is an autoencoder, or a transcoder if `target_hook` is given (with `skip=True` a skip one)."""


def build(settings: Mapping[str, Any], *, device: str | torch.device = "cpu") -> Dictionary:
    """A fresh dictionary from settings such as `Dictionary.settings()` gives: architecture, sizes, options.

    Raises:
        ValueError: If the architecture or an option is unknown, naming those there are.
    """
    options = dict(settings)
    name = options.pop("architecture", None)
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture={name!r} is unknown; there are {', '.join(ARCHITECTURES)}")
    dtype = options.pop("dtype", "float32")
    options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        return ARCHITECTURES[name](**options, device=device)
    except TypeError as error:
        raise ValueError(f"{name} dictionaries do not take these settings: {error}") from error
