"""From tokens to what follows from them: propositions read off latents, and rules applied to what was read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.dictionaries.concept_rules import Reasoning, Rule, forward_chain
from interp.dictionaries.detection import Encoder
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.propositions import Propositions
from interp.dictionaries.rows import token_rows


def reason(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    encoder: Dictionary | Encoder,
    propositions: Propositions,
    rules: Iterable[Rule],
    *,
    positions: Int[Tensor, " batch"] | None = None,
    known: xr.DataArray | Sequence[Collection[str]] | None = None,
    skip_tokens: Sequence[int] = (),
    batch_size: int | None = 64,
) -> Reasoning:
    """What holds of each text: the propositions that its latents are above the thresholds of, and what follows.

    One forward per batch, up to the propositions' hook.

    Args:
        encoder: The dictionary that the propositions were fitted on.
        positions: One per text; by default a proposition holds if it does at any token not in `skip_tokens`.
        known: Facts from elsewhere, such as propositions of another dictionary: bool (text, concept), or one set per
            text. A concept that both are about holds if either says so.

    Raises:
        ValueError: If numbers of texts differ, or as `forward_chain`.

    Source:
        ActivationReasoning (arXiv:2510.18184).
    """
    rules = list(rules)
    rows = token_rows(
        bridge, tokens, propositions.provenance["hook"], skip_tokens=skip_tokens, batch_size=batch_size
    )  # fmt: skip
    facts = propositions.read(encoder, rows, positions=positions)
    if known is not None:
        facts = _together(facts, known, rules)
    found = forward_chain(facts, rules)
    return replace(found, provenance={**rows.provenance, **found.provenance, "method": "reason"})


def _together(
    facts: xr.DataArray, known: xr.DataArray | Sequence[Collection[str]], rules: Sequence[Rule]
) -> xr.DataArray:
    if len(known) != len(facts):
        raise ValueError(f"known facts are of {len(known)} texts and tokens of {len(facts)}; expected one each")
    other = known if isinstance(known, xr.DataArray) else forward_chain(known, []).values
    if other.dims != ("text", "concept") or other.dtype != np.bool_:
        raise ValueError(f"known facts are {other.dtype} {other.dims}; expected bool ('text', 'concept')")
    # sets name only what is true: what no text was given is false, not misspelled
    premises = [] if isinstance(known, xr.DataArray) else sorted({name for rule in rules for name in rule.body})
    names = list(dict.fromkeys([*map(str, facts["concept"].values), *map(str, other["concept"].values), *premises]))
    merged = np.zeros((len(facts), len(names)), dtype=bool)
    for part in (facts, other):
        merged[:, [names.index(str(name)) for name in part["concept"].values]] |= part.values
    return xr.DataArray(merged, dims=("text", "concept"), coords={"text": facts["text"].values, "concept": names})
