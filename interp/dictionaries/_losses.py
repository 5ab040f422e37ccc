"""Next-token losses of a model with a dictionary, zeros or a mean in place of an activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import spliced
from interp.hooks import interventions, no_retained_graph
from interp.hooks.names import device_of


def losses_under(
    bridge: Any,
    dictionary: Dictionary,
    tokens: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    mean: Float[Tensor, " width"],
) -> dict[str, np.ndarray]:
    """Per text, sums over counted predictions of the cross-entropy and of KL(clean || .), in nats, under each
    condition, and the number of predictions. A prediction counts if its position and the one it predicts do."""
    device = device_of(bridge)
    tokens, where = tokens.to(device), counted.to(device)
    predicts = (where[:, :-1] & where[:, 1:]).double()
    target = dictionary.hook if dictionary.target_hook is None else dictionary.target_hook

    def filled(value: Tensor | float) -> Any:
        def fill(tensor: Tensor) -> Tensor:
            flat = tensor.flatten(2)
            new = torch.zeros_like(flat) + torch.as_tensor(value, device=flat.device).to(flat.dtype)
            return torch.where(where[..., None], new, flat).reshape(tensor.shape)

        return fill

    def log_probs(context: Any = None) -> Tensor:
        with no_retained_graph(bridge), torch.no_grad():
            if context is None:
                logits = bridge(tokens)
            else:
                with context:
                    logits = bridge(tokens)
        return logits[:, :-1].double().log_softmax(-1)

    clean = log_probs()
    found = {"predictions": predicts.sum(1)}
    for name, context in (
        ("clean", None),
        ("spliced", spliced(bridge, dictionary, error=False, keep=counted)),
        ("zero", interventions(bridge, {target: filled(0.0)})),
        ("mean", interventions(bridge, {target: filled(mean)})),
    ):
        changed = clean if context is None else log_probs(context)
        ce = -changed.gather(-1, tokens[:, 1:, None])[..., 0]
        found[f"ce_{name}"] = (ce * predicts).sum(1)
        if name != "clean":
            kl = (clean.exp() * (clean - changed)).sum(-1)
            found[f"kl_{name}"] = (kl * predicts).sum(1)
    return {name: value.cpu().numpy() for name, value in found.items()}
