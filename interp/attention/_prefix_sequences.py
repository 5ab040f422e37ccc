"""Sequences in which exactly so many words before the last one occurred together before: what prefix matching of a
given reach is measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from interp.prompts import repeated_tokens

Form = Literal["random", "list"]
Condition = Literal["intact", "corrupted", "unmatched", "competing"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)


@dataclass(frozen=True, eq=False, repr=False)
class PrefixSequences:
    """Token ids by condition and length of the match; the last position is the query. Made by `prefix_sequences`.

    Attributes:
        tokens: `[condition][length]` -> ids [example, pos]. `"intact"`: the last `length` words occurred before, next
            to each other, and the word before them differs. `"corrupted"`: of these only the last one did (none for
            length 1: there is nothing to corrupt). `"unmatched"`: the last one did not either. `"competing"`: as
            intact, and the last word occurred a second time, after another word (form `"random"` only).
        source: `[length]` -> [example], the place of the word after the match: the answer.
        rival: [example], the place of the word after the competing occurrence; None in form `"list"`.
        foils: `[length]` -> [example], ids that the answer is compared with: the word at `rival`, or another of the
            list.
        form, lengths, corrupt, seed: As they were asked for.
    """

    tokens: dict[Condition, dict[int, Int[Tensor, "example _"]]]
    source: dict[int, Int[Tensor, " example"]]
    rival: Int[Tensor, " example"] | None
    foils: dict[int, Int[Tensor, " example"]]
    form: Form
    lengths: tuple[int, ...]
    corrupt: Literal["later", "earlier"]
    seed: int

    def __len__(self) -> int:
        return len(next(iter(self.source.values())))

    def __repr__(self) -> str:
        pos = self.tokens["intact"][self.lengths[-1]].shape[1]
        return f"PrefixSequences({len(self)} of form {self.form!r}, {pos} positions, matches of {self.lengths})"

    def answers(self, length: int) -> Int[Tensor, " example"]:
        """The ids that followed the match."""
        return self.tokens["intact"][length].gather(1, self.source[length][:, None])[:, 0]


def prefix_sequences(
    bridge: Any,
    n: int = 64,
    seed: int = 0,
    *,
    lengths: Sequence[int] = (1, 2, 3, 4, 6, 8),
    form: Form = "random",
    gap: int = 8,
    list_length: int = 16,
    corrupt: Literal["later", "earlier"] = "later",
    tokens: Sequence[int] | None = None,
) -> PrefixSequences:
    """Random words in which a stretch of 1, 2, ... words before the end occurred once before, and no longer one.

    In form `"random"` with M the longest length: M words and the answer somewhere; elsewhere as many other words of
    which, in the competing sequences, the last but one is the query's word; then M words of which the last `length`
    are those of the first stretch, and the rest occur nowhere else. `gap` further words lie around the two stretches,
    divided at random, so that the answer is not at one distance. The two stretches take turns in coming first. Only
    the words named differ between the lengths and conditions of one example, and the answer keeps its place: lengths
    are compared within examples. At length 1 the two stretches of a competing sequence match equally well.

    In form `"list"` a list of `list_length` different words is said again up to its word number `length`, as the
    induction documents of tinyworld are ("a b c d a b"): what those models were trained on. There the answer moves
    along with the length, and there is no room for a rival; corrupted words are not of the list.

    Args:
        bridge: The model; words are drawn as in `interp.prompts.induction`.
        n: Number of examples.
        seed: Seed of every choice.
        lengths: Of the match, 1 or more each.
        gap: Other words around the stretches (form `"random"`).
        list_length: Words of a list, more than the longest match (form `"list"`).
        corrupt: Where the words before the last one are replaced: before the query (`"later"`, as in the paper), or
            before the answer (`"earlier"`).
        tokens: Ids to draw from instead.

    Raises:
        ValueError: If lengths do not fit, or the context or the vocabulary is too small.
    """
    chosen = tuple(sorted({int(length) for length in lengths}))
    for name, value, known in (("form", form, get_args(Form)), ("corrupt", corrupt, ("later", "earlier"))):
        if value not in known:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, known))}")
    if not chosen or chosen[0] < 1 or gap < 0:
        raise ValueError(f"lengths={list(lengths)}, gap={gap}; expected matches of 1 word or more, and gap 0 or more")
    longest, n_ctx = chosen[-1], int(bridge.cfg.n_ctx)
    if form == "list" and not longest < list_length - 1:
        raise ValueError(f"list_length={list_length} with matches of {longest}; expected at least {longest + 2} words, "
                         f"so that the list has an answer and a foil")  # fmt: skip
    n_words = 4 * longest + 2 + gap if form == "random" else list_length + longest
    if n_words >= n_ctx:
        raise ValueError(f"matches of {longest} need {n_words} different words and the context of this model is "
                         f"{n_ctx}; ask for shorter lengths, a smaller gap or list_length")  # fmt: skip
    words = repeated_tokens(bridge, n, seed, length=n_words, repeats=1, tokens=tokens)
    before, words = words[:, : words.shape[1] - n_words], words[:, words.shape[1] - n_words :]
    make = _random if form == "random" else _lists
    return make(before, words, chosen, gap if form == "random" else list_length, corrupt, seed)


def _random(
    before: Tensor,
    words: Tensor,
    lengths: tuple[int, ...],
    gap: int,
    corrupt: Literal["later", "earlier"],
    seed: int,
) -> PrefixSequences:
    n, longest = len(words), lengths[-1]
    sizes = [longest + 1, longest + 1, longest, longest - 1, 1, gap]
    match, other, fresh, replaced, none, around = words.split(sizes, 1)  # match and other end with what follows them
    lead = torch.randint(gap + 1, (n, 2), generator=torch.Generator().manual_seed(seed)).sort(1).values
    first = torch.arange(n) % 2 == 0  # the match comes before the rival
    fresh = torch.cat([fresh[:, : longest - 1], none], 1)
    rivalled = torch.cat([other[:, : longest - 1], match[:, longest - 1 : longest], other[:, longest:]], 1)

    def laid_out(stretch: Tensor, rival: Tensor, tail: Tensor) -> Tensor:
        rows = []
        for i in range(n):
            a, b = (stretch[i], rival[i]) if bool(first[i]) else (rival[i], stretch[i])
            cut, end = lead[i].tolist()
            rows.append(torch.cat([around[i, :cut], a, around[i, cut:end], b, around[i, end:], tail[i]]))
        return torch.cat([before, torch.stack(rows)], 1)

    def matching(length: int) -> Tensor:
        return torch.cat([fresh[:, : longest - length], match[:, longest - length : longest]], 1)

    def corrupted(length: int) -> Tensor:
        last, kept = match[:, longest - 1 : longest], longest - length
        if corrupt == "later":
            tail = torch.cat([fresh[:, :kept], replaced[:, kept:], last], 1)
            return laid_out(match, other, tail)
        stretch = torch.cat([match[:, :kept], replaced[:, kept:], match[:, longest - 1 :]], 1)
        return laid_out(stretch, other, matching(length))

    found: dict[Condition, dict[int, Tensor]] = {
        "intact": {length: laid_out(match, other, matching(length)) for length in lengths},
        "corrupted": {length: corrupted(length) for length in lengths if length > 1},
        "unmatched": {length: laid_out(match, other, fresh) for length in lengths},
        "competing": {length: laid_out(match, rivalled, matching(length)) for length in lengths},
    }
    at_first, at_second = before.shape[1] + lead[:, 0] + longest, before.shape[1] + lead[:, 1] + 2 * longest + 1
    source, rival = torch.where(first, at_first, at_second), torch.where(first, at_second, at_first)
    return PrefixSequences(
        found, dict.fromkeys(lengths, source), rival, dict.fromkeys(lengths, other[:, -1]), "random", lengths, corrupt,
        seed,
    )  # fmt: skip


def _lists(
    before: Tensor,
    words: Tensor,
    lengths: tuple[int, ...],
    size: int,
    corrupt: Literal["later", "earlier"],
    seed: int,
) -> PrefixSequences:
    items, outside = words[:, :size], words[:, size:]
    found: dict[Condition, dict[int, Tensor]] = {"intact": {}, "corrupted": {}, "unmatched": {}}
    source, foils = {}, {}
    for length in lengths:
        said = items[:, :length]
        found["intact"][length] = torch.cat([before, items, said], 1)
        found["unmatched"][length] = torch.cat([before, items, outside[:, :length]], 1)
        if length > 1:
            mixed = torch.cat([outside[:, : length - 1], said[:, -1:]], 1)
            rest = torch.cat([mixed, items[:, length:]], 1)
            both = (items, mixed) if corrupt == "later" else (rest, said)
            found["corrupted"][length] = torch.cat([before, *both], 1)
        source[length] = torch.full((len(words),), before.shape[1] + length)
        foils[length] = items[:, length + 1]  # the word after the answer: in every condition the list holds both
    return PrefixSequences(found, source, None, foils, "list", lengths, corrupt, seed)
