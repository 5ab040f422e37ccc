"""Text that scores of heads are measured on when the user gives none."""

from __future__ import annotations

import random
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from interp import tinyworld

ENGLISH = (
    "The old bridge crosses the river just below the mill, where the water is slow and green.",
    "Every morning the baker opens the shutters, puts out two chairs and waits for the first train.",
    "She had read the letter twice before she noticed that the date was wrong.",
    "When the storm was over, the children ran down to the beach to see what the sea had left behind.",
    "Nobody in the village remembers who planted the walnut tree in front of the school.",
    "He repaired clocks for a living, but the one in his own kitchen had been silent for years.",
    "The report says that prices rose in spring, fell in summer and have been steady since.",
    "A dog was sleeping in the shade of the cart, and two cats watched it from the wall.",
    "If you boil the rice for too long it sticks; if you stop too soon it stays hard.",
    "The captain asked for volunteers, and after a long pause three of the youngest stepped forward.",
    "Most of the books in the library were gifts, which is why so many of them are about fishing.",
    "They walked along the canal until the lamps came on and then took the last tram home.",
)
"""Our own sentences."""

ORDINALS = (
    "one two three four five six seven eight nine ten",
    "first second third fourth fifth sixth seventh eighth ninth tenth",
    "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "January February March April May June July August September October November December",
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z",
)


def text_tokens(bridge: Any, n: int, length: int, seed: int) -> Int[Tensor, "batch pos"]:
    """Rows of `length` tokens of text, BOS first if the model uses one: tinyworld for its models, else English."""
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so no text can be made for it; pass text=, token ids [batch, pos]"
        )
    length = min(length, int(bridge.cfg.n_ctx))
    if tinyworld.is_tinyworld(tokenizer):
        ids = tinyworld.bank(n * length, seed=seed, context=length).ids
        return torch.from_numpy(ids[:n].astype("int64"))
    first = [tokenizer.bos_token_id] if uses_bos(bridge) else []
    rng = random.Random(f"interp.attention text {seed}")
    rows = []
    for _ in range(n):
        row = list(first)
        while len(row) < length:
            row += tokenizer(" ".join(rng.sample(ENGLISH, len(ENGLISH))), add_special_tokens=False)["input_ids"]
        rows.append(row[:length])
    return torch.tensor(rows)


def ordinal_sequences(bridge: Any) -> list[list[int]]:
    """Ordinal words, in order, of which every one is a single token of this model: numbers, days, months, letters."""
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        return []
    found = []
    world = tinyworld.is_tinyworld(tokenizer)
    sequences = [" ".join(f"{i:02d}" for i in range(100))] if world else ORDINALS
    for sequence in sequences:
        ids = [
            tokenizer(word if world else f" {word}", add_special_tokens=False)["input_ids"] for word in sequence.split()
        ]
        flat = [row[0] for row in ids if len(row) == 1 and row[0] != tokenizer.unk_token_id]
        if len(flat) == len(ids) and len(set(flat)) == len(flat):
            found.append(flat)
    return found


def uses_bos(bridge: Any) -> bool:
    """Whether the tokenizer has a BOS token and the bridge prepends it."""
    tokenizer = bridge.tokenizer
    return tokenizer is not None and tokenizer.bos_token_id is not None and bridge.cfg.default_prepend_bos is not False
