"""Which tokens of a text count: those asked for, but for BOS."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from interp.cache._reading import check_tokens
from interp.models import require_eval


def kept_tokens(bridge: Any, tokens: Any, keep: Tensor | None, skip_bos: bool, batch_size: int) -> Tensor:
    """The tokens that count, once everything is known to fit."""
    require_eval(bridge)
    check_tokens(bridge, tokens)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    kept = torch.ones(tokens.shape, dtype=torch.bool) if keep is None else keep.cpu()
    if kept.shape != tokens.shape:
        raise ValueError(f"keep is {tuple(kept.shape)} and tokens {tuple(tokens.shape)}; expected one flag per token")
    bos = getattr(bridge.tokenizer, "bos_token_id", None)
    if skip_bos and bos is not None:
        kept = kept & (tokens.cpu() != bos)
    if not kept.any():
        raise ValueError("no token is left to count: keep and skip_bos leave out all of them")
    return kept
