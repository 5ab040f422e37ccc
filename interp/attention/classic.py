"""Classic head scores on token tensors: previous token, duplicate token, induction, copying, name mover, successor.

Two kinds: what a head attends to (from patterns, one number per example) and what it writes when it attends (its OV
circuit, from weights or on the tokens of an example).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.attention._patterns import check_tokens, reduce_patterns
from interp.attention.head_scores import HeadScores, collect
from interp.models import require_eval

PatternName = Literal["previous_token", "current_token", "first_token", "duplicate_token", "induction"]
Measure = Literal["mean", "mul", "abs"]

PATTERNS: tuple[PatternName, ...] = get_args(PatternName)


def detection_pattern(
    tokens: Int[Tensor, "batch pos"], name: PatternName | Literal["offset"], *, offset: int | None = None
) -> Bool[Tensor, "batch dest src"]:
    """Where a head of a kind would look: True at the keys that each query should attend to.

    `"previous_token"`: the token before. `"current_token"`: the token itself. `"first_token"`: position 0 (from every
    later one). `"duplicate_token"`: earlier occurrences of the same token. `"induction"`: the tokens that followed
    earlier occurrences of the same token. `"offset"`: the token `offset` back; on tokens repeated with a period, the
    induction stripe is `offset = period - 1`.

    Source:
        The first, fourth and fifth equal the detection patterns of TransformerLens' `detect_head`, per row of tokens.
    """
    n_pos = tokens.shape[1]
    place = torch.arange(n_pos, device=tokens.device)
    back = place[:, None] - place[None, :]  # [dest, src]
    if (name == "offset") != (offset is not None):
        raise ValueError(f"offset={offset} with pattern {name!r}; give offset= with 'offset' and nowhere else")
    if name == "offset":
        if offset is None or not 0 <= offset < n_pos:
            raise ValueError(f"offset={offset}; expected 0 to {n_pos - 1} for {n_pos} positions")
        same = back == offset
    elif name == "previous_token":
        same = back == 1
    elif name == "current_token":
        same = back == 0
    elif name == "first_token":
        same = (place == 0)[None, :] & (back > 0)
    elif name in ("duplicate_token", "induction"):
        equal = tokens[:, :, None] == tokens[:, None, :]
        if name == "induction":  # the key after an equal token
            equal = torch.cat([torch.zeros_like(equal[:, :, :1]), equal[:, :, :-1]], 2)
            return equal & (back >= 0)
        return equal & (back > 0)
    else:
        raise ValueError(f"no pattern {name!r}; expected one of {', '.join(PATTERNS)} or 'offset'")
    return same.expand(len(tokens), n_pos, n_pos)


def pattern_scores(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    patterns: Sequence[PatternName] | Mapping[str, Tensor] = ("previous_token", "duplicate_token", "induction"),
    *,
    measure: Measure = "mean",
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> HeadScores:
    """How much every head attends where a pattern says, for each example. One forward per batch serves all patterns.

    Args:
        tokens: Natural text for `"previous_token"`; for `"induction"` and `"duplicate_token"` repeated random tokens
            (`interp.prompts.repeated_tokens`), where nothing else makes a head look there.
        patterns: Names (see `detection_pattern`), or masks of one's own by name, [dest, src] or [batch, dest, src],
            zero above the diagonal.
        measure: `"mean"`: attention on the marked keys, averaged over the queries that have any; from 0 to 1 for masks
            of zeros and ones. An example without such a query is NaN. `"mul"`: share of all attention of the example
            that falls on marked keys. `"abs"`: 1 - mean |pattern - mask| * pos, rounded to three decimals, from -1
            to 1. The last two are those of TransformerLens and fall with the share of queries that have no marked key.
        exclude_bos: Leave attention to position 0 out (for `"mean"`: out of the marked keys).
        exclude_current_token: Leave attention of a query to itself out (likewise).

    Returns:
        `values` [score, layer, head, example], in units of attention weight.

    Raises:
        ValueError: If tokens, masks or options do not fit, or this model's patterns cannot be read.

    Source:
        Olsson et al. 2022 (arXiv:2209.11895), previous-token and prefix-matching scores (`"mean"`); TransformerLens 4.3
        `detect_head` (`"mul"`, `"abs"`), which takes strings, one prompt per forward; here rows of tokens, batched.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    if measure not in get_args(Measure):
        raise ValueError(f"measure must be one of {', '.join(get_args(Measure))}, got {measure!r}")
    tokens = tokens.cpu()
    if isinstance(patterns, Mapping):
        masks = {name: _own_mask(name, mask, tokens) for name, mask in patterns.items()}
    else:
        masks = {name: detection_pattern(tokens, name).float() for name in patterns}
    if not masks:
        raise ValueError(f"no patterns to score; expected some of {', '.join(PATTERNS)}, or masks by name")
    keep = _kept(tokens.shape[1], exclude_bos, exclude_current_token)

    def reduce(_layer: int, pattern: Tensor, *rows: Tensor) -> dict[str, Tensor]:
        kept = keep.to(pattern.device)
        return {name: _match(pattern, rows[i], kept, measure) for i, name in enumerate(masks)}

    found = reduce_patterns(
        bridge, tokens, reduce, layers=layers, batch_size=batch_size, rows=list(masks.values())
    )  # {layer: {name: [batch, head]}}
    options = {"measure": measure, "exclude_bos": exclude_bos, "exclude_current_token": exclude_current_token}
    return collect(bridge, found, "attention weight", method="pattern_scores", tokens=tokens, **options)


def attention_between(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    dest: Int[Tensor, "batch"] | Mapping[str, Int[Tensor, "batch"]],
    src: Mapping[str, Int[Tensor, "batch"]],
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> HeadScores:
    """Attention of every head from one position of each example to others: END to IO is a name mover's, END to S2 an
    S-inhibition head's.

    Args:
        dest: The query position of each example; by name of the score where it differs between scores.
        src: The key position of each example, by name of the score.

    Returns:
        `values` [score, layer, head, example], attention weights. One forward per batch.

    Raises:
        ValueError: If a position does not exist or lies after its query.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    pairs = {}
    for name, key in src.items():
        query = dest[name] if isinstance(dest, Mapping) else dest
        if query.shape != (len(tokens),) or key.shape != (len(tokens),):
            raise ValueError(f"{name!r}: dest is {tuple(query.shape)} and src {tuple(key.shape)}; expected one "
                             f"position for each of {len(tokens)} examples")  # fmt: skip
        wrong = (key < 0) | (key > query) | (query >= tokens.shape[1])
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"{name!r}: example {row} asks for attention from {int(query[row])} to {int(key[row])}; "
                             f"expected 0 <= src <= dest < {tokens.shape[1]}")  # fmt: skip
        pairs[name] = torch.stack([query, key], 1)
    if not pairs:
        raise ValueError("no positions to score: src is empty")

    def reduce(_layer: int, pattern: Tensor, *rows: Tensor) -> dict[str, Tensor]:
        example = torch.arange(len(pattern), device=pattern.device)
        return {name: pattern[example, :, rows[i][:, 0], rows[i][:, 1]] for i, name in enumerate(pairs)}

    found = reduce_patterns(bridge, tokens, reduce, layers=layers, batch_size=batch_size, rows=list(pairs.values()))
    return collect(bridge, found, "attention weight", method="attention_between", tokens=tokens)


def _own_mask(name: str, mask: Tensor, tokens: Tensor) -> Float[Tensor, "batch dest src"]:
    n, n_pos = tokens.shape
    if tuple(mask.shape) not in ((n_pos, n_pos), (n, n_pos, n_pos)):
        raise ValueError(f"pattern {name!r} has shape {tuple(mask.shape)}; expected ({n_pos}, {n_pos}) or "
                         f"({n}, {n_pos}, {n_pos}), destinations by sources")  # fmt: skip
    mask = mask.detach().cpu().float().expand(n, n_pos, n_pos)
    if bool(mask.triu(1).any()):
        raise ValueError(f"pattern {name!r} marks keys after their query, where no causal head can look; clear what is "
                         f"above the diagonal (mask.tril())")  # fmt: skip
    return mask


def _kept(n_pos: int, exclude_bos: bool, exclude_current_token: bool) -> Bool[Tensor, "dest src"]:
    keep = torch.ones(n_pos, n_pos, dtype=torch.bool)
    if exclude_bos:
        keep[:, 0] = False
    if exclude_current_token:
        keep.fill_diagonal_(False)
    return keep


def _match(pattern: Tensor, mask: Tensor, keep: Tensor, measure: Measure) -> Float[Tensor, "batch head"]:
    if measure == "abs":
        distance = (pattern - mask[:, None]).abs() * keep
        score = 1 - (distance.mean((-2, -1)) * pattern.shape[-1]).double()
        return score.mul(1000).round().div(1000).float()
    if measure == "mul":
        return (pattern * (mask * keep)[:, None]).sum((-2, -1)) / (pattern * keep).sum((-2, -1))
    marked = mask * keep
    has = (marked != 0).any(-1)  # [batch, dest]
    mass = (pattern * marked[:, None]).sum(-1)  # [batch, head, dest]; zero for queries without a marked key
    return mass.sum(-1) / torch.where(has.any(-1), has.sum(-1), torch.nan)[:, None]
