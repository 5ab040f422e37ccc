"""What the last layer does to a model's confidence in the right answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name, interventions, no_retained_graph, run_from
from interp.hooks.edits import Edit
from interp.hooks.names import device_of
from interp.models import geometry, provenance, require_eval
from interp.prompts import Prompts
from interp.results import Result, labelled
from interp.stats import bootstrap_interval, paired_test
from interp.types import Site


@dataclass(frozen=True, eq=False, repr=False)
class LastLayer(Result):
    """Predictions at `end` with the last layer's attention and MLP turned down: `(quantity, attn, mlp, example)`.

    `attn` and `mlp` are the factors on what each adds to the stream: (1, 1) is the model itself, (0, 0) the stream that
    enters the last block, read out as it is.

    Quantities: `answer`, log-probability of the right answer (nats); `right`, whether it is the most likely token;
    `top`, log-probability of the most likely token; `entropy` (nats); and, with counts, `prior`, the divergence of the
    prediction from the frequencies of tokens, KL(prediction || frequencies) in nats: it falls when the last layer moves
    towards them.
    """

    def steps(self) -> pd.DataFrame:
        """What attention and then the MLP of the last layer change, with 95 % intervals over examples.

        Columns `part, quantity, change, low, high, p_value` (sign flip test). A negative change of `answer` is
        suppression. The parts: `attention` at MLP 0, `mlp` at attention 1, `both`.
        """
        corners = {
            "attention": ((0.0, 0.0), (1.0, 0.0)), "mlp": ((1.0, 0.0), (1.0, 1.0)), "both": ((0.0, 0.0), (1.0, 1.0))
        }  # fmt: skip
        missing = {f for pair in corners.values() for f, _ in pair} - set(self.values.coords["attn"].values.tolist())
        missing |= {f for pair in corners.values() for _, f in pair} - set(self.values.coords["mlp"].values.tolist())
        if missing:
            raise ValueError(f"steps needs the factors 0 and 1 of both parts; {sorted(missing)} were not measured")
        rows = []
        for part, (before, after) in corners.items():
            for quantity in self.values.coords["quantity"].values:
                at = self.values.sel(quantity=quantity)
                change = (at.sel(attn=after[0], mlp=after[1]) - at.sel(attn=before[0], mlp=before[1])).values
                interval = bootstrap_interval(change)
                rows.append({"part": part, "quantity": str(quantity), "change": float(interval.estimate),
                             "low": float(interval.low), "high": float(interval.high),
                             "p_value": float(paired_test(change))})  # fmt: skip
        return pd.DataFrame(rows)

    def best(self, quantity: str = "answer") -> pd.Series:
        """The factors with the largest mean of a quantity. Chosen on these very examples: test it on others."""
        means = self.values.sel(quantity=quantity).mean("example").to_dataframe("value").reset_index()
        return means.loc[means["value"].idxmax(), ["attn", "mlp", "value"]]

    def plot(self, quantity: str = "answer") -> Any:
        """Mean of a quantity by the two factors."""
        from interp.plotting import heatmap

        unit = "share of examples" if quantity == "right" else "nats"
        return heatmap(
            self.values.sel(quantity=quantity, drop=True).mean("example"),
            title=f"{quantity} with the last layer turned down", unit=unit, signed=False,
        )  # fmt: skip


def last_layer_suppression(
    bridge: Any,
    prompts: Prompts | Sequence[Prompts],
    *,
    factors: Sequence[float | int] = (0, 0.5, 1),
    counts: Float[Tensor, "d_vocab"] | None = None,
    batch_size: int = 64,
) -> LastLayer:
    """How sure of the right answer the model is before the last layer, between its parts and after it.

    What attention and the MLP of the last block add to the stream is multiplied by every pair of factors, at all
    positions; the MLP reads the changed stream (in parallel blocks it reads the block's input in any case). Costs one
    forward, and one of the last block for every pair of factors.

    Args:
        factors: Tried for both parts; 0 and 1 are needed for `LastLayer.steps`.
        counts: How often each token occurs in a text; adds the quantity `prior`. One is added to every count.

    Raises:
        ValueError: If prompts, factors or counts do not fit. RuntimeError: In training mode.

    Source:
        Lv et al. 2024 (arXiv:2403.19521): the last layer moves predictions towards frequent tokens, and turning its
        parts down makes factual recall more confident. Theirs is read from unembedded parts; here the forward itself is
        run with the parts turned down, final norm and soft cap included.
    """
    require_eval(bridge)
    sets = [prompts] if isinstance(prompts, Prompts) else list(prompts)
    if not sets or not all(len(one) for one in sets):
        raise ValueError("there are no prompts")
    for one in sets:
        one.check(bridge)
    chosen = sorted({float(factor) for factor in factors})
    if not chosen or not np.isfinite(chosen).all():
        raise ValueError(f"factors={list(factors)}; expected at least one finite number")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    prior = None
    if counts is not None:
        d_vocab = geometry(bridge).d_vocab
        if len(counts) != d_vocab or bool((counts < 0).any()) or not bool(counts.isfinite().all()):
            raise ValueError(f"counts has {len(counts)} entries; expected {d_vocab} counts, none below 0")
        prior = ((counts.float() + 1) / (counts.float() + 1).sum()).log().cpu()
    last = int(bridge.cfg.n_layers) - 1
    entering = hook_name("resid_pre", last)
    parts: list[Tensor] = []
    for one in sets:
        for start in range(0, len(one), batch_size):
            tokens, end = one.clean[start : start + batch_size], one.positions["end"][start : start + batch_size]
            answers, rows = one.answers[start : start + batch_size], torch.arange(len(tokens))
            resid = capture(bridge, tokens, entering)[entering].to(device_of(bridge))
            cells = []
            for attn in chosen:
                for mlp in chosen:
                    edits = _scaled(last, attn, mlp)
                    with torch.no_grad(), no_retained_graph(bridge), interventions(bridge, edits):
                        logits = run_from(bridge, resid, last)
                    cells.append(_quantities(logits.cpu()[rows, end].float().log_softmax(-1), answers, prior))
            parts.append(torch.stack(cells).reshape(len(chosen), len(chosen), -1, len(tokens)))
    values = torch.cat(parts, -1).permute(2, 0, 1, 3)
    names = ["answer", "right", "top", "entropy", *(["prior"] if prior is not None else [])]
    coords = {"quantity": names, "attn": chosen, "mlp": chosen}
    record = provenance(
        bridge, method="last_layer_suppression", layer=last, n_examples=values.shape[-1],
        cost={"forwards": 1, "forwards_of_last_block": len(chosen) ** 2},
    )  # fmt: skip
    return LastLayer(labelled(values, (*coords, "example"), coords), record)


def _scaled(layer: int, attn: float, mlp: float) -> dict[str, Edit]:
    edits: dict[str, Edit] = {}
    parts: tuple[tuple[Site, float], ...] = (("attn_out", attn), ("mlp_out", mlp))
    for site, factor in parts:
        if factor != 1:
            edits[hook_name(site, layer)] = lambda tensor, _factor=factor: tensor * _factor
    return edits


def _quantities(log_probs: Tensor, answers: Tensor, prior: Tensor | None) -> Tensor:
    probs = log_probs.exp()
    found = [
        log_probs[torch.arange(len(answers)), answers],
        (log_probs.argmax(-1) == answers).float(),
        log_probs.amax(-1),
        -(probs * log_probs).sum(-1),
    ]
    if prior is not None:
        found.append((probs * (log_probs - prior)).sum(-1))
    return torch.stack(found)
