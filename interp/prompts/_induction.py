"""Induction: a list of random tokens said twice; the answer is what followed the last token the first time."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import torch

from interp import tinyworld
from interp.prompts._build import check_n, generator, world_split
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import token_strings, uses_bos
from interp.tinyworld import Split
from interp.tinyworld.families.lists import LIST_WORDS


def induction(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    length: int = 12,
    repeated: int | None = None,
    tokens: Sequence[int] | None = None,
    split: Split | None = None,
) -> Prompts:
    """Random tokens, then the first of them again: `a b c d e f a b c` -> d. Works for any tokenizer, and without one.

    The tokens of a list are all different. The corrupted prompt has another token where the answer stood in the first
    copy, and that token is the foil. Positions: `match` (the last token's first occurrence), `source` (the answer's
    only occurrence, one later: what an induction head attends to), `end`.

    Args:
        bridge: The model; a tinyworld model gets lists of its own words, any other random tokens that hold a letter or
            a digit.
        n: Number of examples.
        seed: Seed of every choice.
        length: Tokens in the list.
        repeated: How many of them are said again, from 1 to `length - 1`; half of the list by default. The answer is as
            far back in every example, so a head that attends to a fixed distance also solves it: vary `length` to tell
            the two apart.
        tokens: Ids to draw from instead, such as the common words of a small model.
        split: tinyworld only. `"heldout"` (default): lists whose contents the models never saw.

    Raises:
        ValueError: If the vocabulary is too small or the context too short for such a list.

    Source:
        Olsson et al. 2022 (arXiv:2209.11895), repeated random tokens; the corrupted prompt is our own.
    """
    check_n("induction", n)
    if length < 2:
        raise ValueError(f"length={length}: a list needs at least 2 tokens, one to match and one to answer")
    repeated = length // 2 if repeated is None else repeated
    if not 1 <= repeated < length:
        raise ValueError(
            f"repeated={repeated} must lie between 1 and length - 1 = {length - 1}, so that the list has an answer"
        )
    tokenizer = bridge.tokenizer
    world = tokenizer is not None and tinyworld.is_tinyworld(tokenizer)
    split = world_split("induction", split, world=world)
    rng = generator("induction", seed)
    pool = _drawn_from(bridge, tokens, rng, world=world)
    if len(pool) <= length:
        source = "tokenizer has" if tokens is None else "tokens given are"
        raise ValueError(
            f"induction with length={length} needs {length + 1} different tokens, but the {source} {len(pool)}"
            f"{' that hold a letter or a digit' if tokens is None else ''}; ask for a shorter list"
        )
    first = [tokenizer.bos_token_id] if tokenizer is not None and uses_bos(bridge) else []
    rows: list[tuple[list[int], int]] = []
    while len(rows) < n:
        *words, foil = rng.sample(pool, length + 1)
        if world and tinyworld.held_out("induction", [tinyworld.VOCABULARY[token] for token in words]) != (
            split == "heldout"
        ):
            continue
        rows.append((words, foil))
    clean = torch.tensor([[*first, *words, *words[:repeated]] for words, _ in rows])
    source = len(first) + repeated
    corrupted = clean.clone()
    corrupted[:, source] = torch.tensor([foil for _, foil in rows])
    positions = {"match": source - 1, "source": source}
    prompts = Prompts(
        clean,
        corrupted,
        answers=clean[:, source].clone(),
        foils=corrupted[:, source].clone(),
        positions={name: torch.full((n,), position) for name, position in positions.items()},
        labels={"length": (length,) * n, "repeated": (repeated,) * n},
        name="induction",
        seed=seed,
    )
    return (prompts if tokenizer is None else prompts.decoded(bridge)).check(bridge)


def repeated_tokens(
    bridge: Any, n: int = 8, seed: int = 0, *, length: int = 25, repeats: int = 4, tokens: Sequence[int] | None = None
) -> torch.Tensor:
    """Token ids [n, pos]: a list of different random tokens said `repeats` times over, after BOS if the model uses one.

    What prefix matching is measured on: nothing but the repetition makes a head look anywhere in particular.

    Args:
        bridge: The model; words are drawn as in `induction`.
        tokens: Ids to draw from instead.

    Raises:
        ValueError: If the vocabulary is too small or the context too short.

    Source:
        Olsson et al. 2022 (arXiv:2209.11895): 25 random tokens repeated 4 times, a BOS token first.
    """
    check_n("repeated_tokens", n)
    if length < 2 or repeats < 1:
        raise ValueError(f"length={length}, repeats={repeats}: expected at least 2 tokens, said at least once")
    tokenizer = bridge.tokenizer
    rng = generator("repeated_tokens", seed)
    world = tokenizer is not None and tinyworld.is_tinyworld(tokenizer)
    pool = _drawn_from(bridge, tokens, rng, world=world)
    if len(pool) < length:
        raise ValueError(f"repeated_tokens with length={length} needs as many different tokens, but there are "
                         f"{len(pool)} to draw from; ask for a shorter list")  # fmt: skip
    first = [tokenizer.bos_token_id] if tokenizer is not None and uses_bos(bridge) else []
    wide, n_ctx = len(first) + length * repeats, int(bridge.cfg.n_ctx)
    if wide > n_ctx:
        raise ValueError(f"{length} tokens {repeats} times over make {wide} positions; the context is {n_ctx}. "
                         f"Ask for length={(n_ctx - len(first)) // repeats} or fewer repeats")  # fmt: skip
    return torch.tensor([[*first, *rng.sample(pool, length) * repeats] for _ in range(n)])


def _drawn_from(bridge: Any, tokens: Sequence[int] | None, rng: random.Random, *, world: bool) -> list[int]:
    """The ids that lists are made of."""
    if tokens is None:
        return [tinyworld.IDS[word] for word in LIST_WORDS] if world else _pool(bridge, rng)
    pool = sorted({int(token) for token in tokens})
    if pool and not 0 <= pool[0] <= pool[-1] < bridge.cfg.d_vocab:
        raise ValueError(f"tokens run from {pool[0]} to {pool[-1]}; this model's ids are 0 to {bridge.cfg.d_vocab - 1}")
    return pool


def _pool(bridge: Any, rng: random.Random) -> list[int]:
    """Up to 4000 tokens, drawn from the whole vocabulary; a special, byte or mark token is no word to repeat."""
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        return list(range(bridge.cfg.d_vocab))
    size = min(bridge.cfg.d_vocab, len(tokenizer))  # embeddings are often padded beyond the tokenizer
    drawn = rng.sample(range(size), min(size, 4000))  # decoding a vocabulary of 250,000 one by one takes seconds
    special = set(tokenizer.all_special_ids)
    texts = token_strings(tokenizer, drawn)
    raw = dict(zip(drawn, tokenizer.convert_ids_to_tokens(drawn), strict=True))
    return [
        token
        for token in drawn
        if token not in special
        and any(character.isalnum() for character in texts[token])
        and "\ufffd" not in texts[token]
        and not re.fullmatch(r"<.*>", raw[token] or "<>")
    ]
