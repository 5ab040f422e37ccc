"""The Bigram-Backcopy task: characters follow a bigram table, but after a trigger the character before it comes back.

Attention is of use on triggers only, so that a head trained on it is dormant elsewhere. Everything here is tensors: the
table of any text, its triggers, sequences, the distribution they come from, and exact risks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

First = Literal["generator", "unigram"]


class Risks(NamedTuple):
    """Expected cross-entropies in nats per prediction: after tokens that are no triggers, and after triggers."""

    bigram: float
    backcopy: float


@dataclass(frozen=True, eq=False, repr=False)
class BackcopyTask:
    """A table of transitions and its triggers.

    Ids: the characters in sorted order, then BOS, then a delimiter that is never drawn.

    Attributes:
        characters: The characters; their place is their id.
        transitions: Probability of the next character, float64 `[character, next]`.
        unigram: Frequency of the characters, float64 `[character]`.
        triggers: Ids of the triggers, most frequent first.
    """

    characters: tuple[str, ...]
    transitions: Float[Tensor, "character next"]
    unigram: Float[Tensor, "character"]
    triggers: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.characters)
        if self.transitions.shape != (n, n) or self.unigram.shape != (n,):
            raise ValueError(
                f"{n} characters with transitions {tuple(self.transitions.shape)} and unigram "
                f"{tuple(self.unigram.shape)}; expected {(n, n)} and {(n,)}"
            )
        rows = torch.cat([self.transitions, self.unigram[None]])
        if bool((rows < 0).any()) or not torch.allclose(rows.sum(1), torch.ones_like(rows[:, 0])):
            raise ValueError("every row of the transitions, and the unigram, must be probabilities that sum to 1")
        wrong = [trigger for trigger in self.triggers if not 0 <= trigger < n]
        if wrong or not self.triggers or len(set(self.triggers)) < len(self.triggers):
            raise ValueError(f"triggers={self.triggers}; expected distinct ids of 0 to {n - 1}, at least one")
        if float(self.unigram[list(self.triggers)].sum()) > 1 - 1e-9:
            raise ValueError("every character is a trigger: the first one of a sequence must not be")

    def __repr__(self) -> str:
        shown = ", ".join(repr(self.characters[trigger]) for trigger in self.triggers)
        return f"BackcopyTask({len(self.characters)} characters; triggers {shown})"

    @property
    def bos(self) -> int:
        return len(self.characters)

    @property
    def n_vocab(self) -> int:
        """The characters, BOS, and the delimiter."""
        return len(self.characters) + 2

    @property
    def first(self) -> Float[Tensor, "character"]:
        """What follows BOS: the unigram without the triggers."""
        kept = self.unigram.clone()
        kept[list(self.triggers)] = 0
        return kept / kept.sum()

    def is_trigger(self, tokens: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
        return torch.isin(tokens, torch.tensor(self.triggers, device=tokens.device))

    def sample(self, n: int, length: int, *, seed: int) -> Int[Tensor, "n length"]:
        """Sequences that begin with BOS. Two triggers never stand side by side.

        Args:
            length: Tokens per sequence, BOS included: one more than a model is given.
        """
        if n < 1 or length < 2:
            raise ValueError(
                f"n={n}, length={length}; expected at least one sequence of at least BOS and one character"
            )
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.full((n, length), self.bos)
        tokens[:, 1] = torch.multinomial(self.first, n, replacement=True, generator=generator)
        cumulative = self.transitions.cumsum(1)
        cumulative[:, -1] = 1.0
        draws = torch.rand(n, length, dtype=torch.float64, generator=generator)
        trigger = torch.zeros(self.n_vocab, dtype=torch.bool)
        trigger[list(self.triggers)] = True
        for place in range(2, length):
            last = tokens[:, place - 1]
            drawn = torch.searchsorted(cumulative[last], draws[:, place, None].contiguous(), right=True)[:, 0]
            tokens[:, place] = torch.where(trigger[last], tokens[:, place - 2], drawn)
        return tokens

    def oracle(self, tokens: Int[Tensor, "n pos"], *, first: First = "generator") -> Float[Tensor, "n pos vocab"]:
        """Distribution of the next token at every position, float64.

        Args:
            first: After BOS, what the generator draws from; or `"unigram"`, as in the released code, whose oracle is
                not quite its generator there.
        """
        self._check(tokens)
        table = torch.zeros(self.n_vocab, self.n_vocab, dtype=torch.float64)
        table[: self.bos, : self.bos] = self.transitions
        table[self.bos, : self.bos] = self._after_bos(first)
        out = table[tokens]
        rows, places = torch.nonzero(self.is_trigger(tokens), as_tuple=True)
        out[rows, places] = 0
        out[rows, places, tokens[rows, places - 1]] = 1
        return out

    def losses(
        self, logits: Float[Tensor, "n pos vocab"], tokens: Int[Tensor, "n pos"], *, first: First = "generator"
    ) -> Float[Tensor, "n pos"]:
        """Expected cross-entropy at every position, over the oracle's next token rather than the one that was drawn."""
        if logits.shape != (*tokens.shape, self.n_vocab):
            raise ValueError(f"logits {tuple(logits.shape)}; expected {(*tokens.shape, self.n_vocab)}")
        self._check(tokens)
        log_probs = logits.detach().double().cpu().log_softmax(-1)
        return -(self.oracle(tokens, first=first) * log_probs).sum(-1)

    def risks(
        self,
        logits: Float[Tensor, "n pos vocab"],
        tokens: Int[Tensor, "n pos"],
        *,
        first: First = "generator",
        skip_first: bool = False,
    ) -> Risks:
        """Mean `losses` after tokens that are no triggers, and after triggers.

        Args:
            skip_first: Leave out what follows BOS.
        """
        losses, trigger = self.losses(logits, tokens, first=first), self.is_trigger(tokens)
        start = int(skip_first)
        losses, trigger = losses[:, start:], trigger[:, start:]
        return Risks(float(losses[~trigger].mean()), float(losses[trigger].mean()))

    def oracle_risks(self, n_pos: int, *, first: First = "generator", skip_first: bool = False) -> Risks:
        """Risks of the generator itself, exactly: the least that any model can have. Backcopy is 0.

        The law of (last two tokens) is carried along the positions; nothing is sampled. `first` and `skip_first` as in
        `risks`; with `first="unigram"` the risk after BOS is that of the unigram under the generator's draws averaged
        by the unigram, as the released code has it.
        """
        entropy = _entropy(self.transitions)
        total, count = 0.0, 0.0
        for place, current in enumerate(self._currents(n_pos)):
            if place == 0:
                mass, risk = 1.0, float(_entropy(self._after_bos(first)[None]))
            else:
                quiet = current.clone()
                quiet[list(self.triggers)] = 0
                mass, risk = float(quiet.sum()), float(quiet @ entropy)
            if place >= int(skip_first):
                total, count = total + risk, count + mass
        return Risks(total / count, 0.0)

    def trigger_share(self, n_pos: int) -> float:
        """Expected share of the positions `0 .. n_pos - 1` (BOS is position 0) that hold a trigger."""
        chosen = list(self.triggers)
        return sum(float(current[chosen].sum()) for current in self._currents(n_pos)) / n_pos

    def _currents(self, n_pos: int) -> list[Tensor]:
        """Law of the character at every position; that of position 0, which is BOS, is all zero."""
        if n_pos < 2:
            raise ValueError(f"n_pos={n_pos}; expected BOS and at least one character")
        n, chosen = len(self.characters), list(self.triggers)
        currents = [torch.zeros(n, dtype=torch.float64), self.first]
        # pair[previous, current]; row n stands for BOS, which is never copied as the first character is no trigger
        pair = torch.zeros(n + 1, n, dtype=torch.float64)
        pair[n] = self.first
        for _ in range(2, n_pos):
            quiet = pair.sum(0)
            quiet[chosen] = 0
            following = torch.zeros_like(pair)
            following[:n] = quiet[:, None] * self.transitions
            following[chosen] = pair[:n, chosen].T
            pair = following
            currents.append(pair.sum(0))
        return currents[:n_pos]

    def _after_bos(self, first: First) -> Tensor:
        if first not in ("generator", "unigram"):
            raise ValueError(f"first={first!r}; expected 'generator' or 'unigram'")
        return self.first if first == "generator" else self.unigram

    def _check(self, tokens: Tensor) -> None:
        if tokens.shape[1] == 0 or not bool((tokens[:, 0] == self.bos).all()):
            raise ValueError(f"every sequence must begin with BOS (id {self.bos})")
        if int(tokens.min()) < 0 or int(tokens[:, 1:].max() if tokens.shape[1] > 1 else 0) >= self.bos:
            raise ValueError(f"the tokens after BOS must be characters, ids 0 to {self.bos - 1}")


def backcopy_task(text: str, *, n_triggers: int = 3, triggers: Sequence[str] | None = None) -> BackcopyTask:
    """The task of a text: its empirical bigrams, and its most frequent characters as triggers.

    A character that is only the last one of the text has nothing after it: the unigram stands in.

    Args:
        n_triggers: How many of the most frequent characters are triggers (of equally frequent ones the first in order).
        triggers: These characters instead.

    Raises:
        ValueError: If the text has fewer than two characters or no more kinds than triggers, or a trigger is not in it.

    Source:
        Guo et al. 2024 (arXiv:2410.13835), section 2 and released code. There: tiny-Shakespeare, 65 characters, ids in
        sorted order, triggers space, "e" and "t" (ids 1, 43, 58); oracle bigram risk 2.220 nats over 256 positions.
    """
    if len(text) < 2:
        raise ValueError(f"a text of {len(text)} characters has no bigrams")
    counts = Counter(text)
    characters = tuple(sorted(counts))
    ids = {character: place for place, character in enumerate(characters)}
    if triggers is None:
        if not 1 <= n_triggers < len(characters):
            raise ValueError(
                f"n_triggers={n_triggers} of {len(characters)} characters; expected 1 to one fewer than all"
            )
        chosen = sorted(characters, key=lambda character: -counts[character])[:n_triggers]
    else:
        chosen = list(triggers)
        if missing := [trigger for trigger in chosen if trigger not in ids]:
            raise ValueError(f"triggers {missing} are not characters of the text; it has {''.join(characters)!r}")
    n = len(characters)
    codes = torch.tensor([ids[character] for character in text])
    unigram = torch.bincount(codes, minlength=n).double() / len(codes)
    pairs = torch.bincount(codes[:-1] * n + codes[1:], minlength=n * n).reshape(n, n).double()
    seen = pairs.sum(1, keepdim=True)
    transitions = torch.where(seen > 0, pairs / seen.clamp_min(1), unigram)
    return BackcopyTask(characters, transitions, unigram, tuple(ids[character] for character in chosen))


def _entropy(rows: Tensor) -> Tensor:
    return -torch.special.xlogy(rows, rows).sum(-1)
