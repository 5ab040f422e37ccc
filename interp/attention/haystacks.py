"""Needles in haystacks of any text, at any length and depth, placed so that their tokens are known by construction."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from interp import prompts
from interp.attention.needles import LostNeedle, Needle, Needles, covering
from interp.prompts._tokens import Encoded, encode, pieces, token_strings

_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")

_LONGEST_WORLD = 119  # tokens of the longest tinyworld haystack, BOS and question included


def needle_grid(
    bridge: Any,
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[float | int] = (0, 0.25, 0.5, 0.75, 1),
    n: int = 4,
    seed: int = 0,
    **options: Any,
) -> Needles:
    """Key-value needles of `interp.prompts.needle` over a grid of lengths and depths, `n` prompts in each cell.

    Haystack, keys and values are generated: tinyworld for a tinyworld model, English of our own for any other
    tokenizer. The needle is the sentence that states the pair; the answer is its value, one token.

    Args:
        lengths: Tokens of the whole prompt, met exactly where whole sentences allow, else by the next lower length that
            they allow. Four from short to the context of the model by default.
        depths: Share of the haystack that stands before the needle.
        **options: For `interp.prompts.needle`: `pairs`, `template`, `split`.

    Raises:
        ValueError: If a length leaves no room for the needles and the question.
    """
    frame = _frame(bridge, seed, options)
    if lengths is None:
        longest = min(int(bridge.cfg.n_ctx), _LONGEST_WORLD if frame.world else 512)
        lengths = [round(frame.size + (longest - frame.size) * part) for part in (0.25, 0.5, 0.75, 1)]
    samples = []
    strings: dict[int, str] = {}
    for length in lengths:
        for depth in depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depth={depth}; expected a share between 0 and 1")
            made, starts = _fitting(bridge, frame, int(length), float(depth), n, seed + 7919 * len(samples), options)
            strings.update(made.strings)
            for row, start in enumerate(starts):
                end = start + frame.statement
                value = int(made.positions["value"][row])
                samples.append(
                    Needle(
                        made.clean[row],
                        (start, end),
                        (value, value + 1),
                        (int(made.answers[row]),),
                        int(length),
                        float(depth),
                        {name: made.labels[name][row] for name in ("key", "value")},
                    )
                )
    return Needles(tuple(samples), strings, "key-value needles", seed)


def insert_needles(
    bridge: Any,
    haystack: str,
    needle: str,
    question: str,
    *,
    answer: str | None = None,
    lengths: Sequence[int],
    depths: Sequence[float | int] = (0, 0.25, 0.5, 0.75, 1),
    separator: str = " ",
    labels: Mapping[str, Any] | None = None,
) -> Needles:
    """A needle put into any text, at every length and depth, with the positions of its tokens exact.

    The haystack is repeated where it is too short, cut at a word, and the needle stands behind the last full stop
    before the depth asked for. The text is tokenised once, whole, and the needle's tokens are those that cover any of
    its characters (white space around it aside): where the tokenizer merges its edge with a neighbour, the merged token
    counts, and the label `merged` says so.

    Args:
        needle: The statement, e.g. `"The code of the vault is crimson."`.
        question: What follows the haystack, joined as it is; it ends where the answer begins, without a space.
        answer: The part of the needle that answers the question, which must occur once in it; all of it by default.
        lengths: Most tokens of the whole prompt, BOS and question included. Prompts are shorter by less than a word.
        depths: Share of the haystack in front of the needle.
        separator: What is put between haystack and needle; `""` joins them, which lets tokens merge.

    Raises:
        LostNeedle: If the tokenizer drops or cannot spell a part of the needle.
        ValueError: If the haystack holds the needle already, the answer is not in the needle, or a length has no room.
    """
    said = needle.strip()
    part = said if answer is None else answer.strip()
    if not said or said.count(part) != 1 or not part:
        raise ValueError(
            f"answer {answer!r} occurs {said.count(part) if part else 0} times in {needle!r}; expected once"
        )
    if said in haystack or said in question:
        where = "haystack" if said in haystack else "question"
        raise ValueError(f"the {where} already says {said!r}; its tokens would not be the only ones to copy from")
    if not haystack.strip():
        raise ValueError("the haystack is empty; pass some text (generate_haystack makes some)")
    samples = []
    for length in lengths:
        room = int(length) - len(pieces(bridge.tokenizer, f"{separator}{said}{question}")) - 2
        if room < 1:
            raise ValueError(
                f"length={length} has no room for the needle and the question; use at least {length - room}"
            )
        text = _at_least(bridge, haystack, room)
        for depth in depths:
            if not 0 <= depth <= 1:
                raise ValueError(f"depth={depth}; expected a share between 0 and 1")
            samples.append(_inserted(bridge, text, said, part, question, int(length), float(depth), separator, labels))
    ids = {token for sample in samples for token in sample.tokens.tolist()}
    return Needles(tuple(samples), token_strings(bridge.tokenizer, ids), "inserted needle")


def generate_haystack(n_words: int, seed: int = 0) -> str:
    """English prose of at least this many words, of our own short sentences, that says nothing to remember."""
    if n_words < 1:
        raise ValueError(f"n_words={n_words}; expected at least 1")
    rng = random.Random(f"interp haystack {seed}")
    out: list[str] = []
    size = 0
    while size < n_words:
        sentence = " ".join(rng.choice(words) for words in _SENTENCE)
        out.append(f"{sentence[0].upper()}{sentence[1:]}.")
        size += len(_SENTENCE)
    return " ".join(out)


_SENTENCE = (
    ("the", "a", "some", "her", "his", "one"),
    ("old", "young", "quiet", "busy", "tired", "cheerful", "small"),
    ("man", "woman", "farmer", "teacher", "child", "sailor", "dog", "neighbour"),
    ("saw", "found", "carried", "liked", "painted", "washed", "forgot"),
    ("the", "a", "one", "another"),
    ("red", "long", "heavy", "broken", "warm", "empty"),
    ("boat", "road", "table", "letter", "window", "basket", "garden"),
    ("in the morning", "after lunch", "near the river", "with a friend", "again", "before the rain"),
)


def _inserted(
    bridge: Any,
    haystack: str,
    needle: str,
    answer: str,
    question: str,
    length: int,
    depth: float,
    separator: str,
    labels: Mapping[str, Any] | None,
) -> Needle:
    """The prompt that is longest within `length` tokens: the haystack is shortened by what is too much."""
    words = [match.end() for match in re.finditer(r"\S+", haystack)]  # where the haystack may be cut

    def made(kept: int) -> tuple[str, str, Encoded]:
        left, right = _cut(haystack[: words[kept - 1]], depth)
        before = f"{left}{separator}" if left else ""
        after = f"{separator}{right}" if right else ""
        text = f"{before}{needle}{after}{question}"
        return before, text, _encoded(bridge, text, needle)

    kept = len(words)
    found = made(kept)
    fitting: tuple[int, tuple[str, str, Encoded]] | None = None
    low, high = 1, len(words)  # how many words may fit: guess from tokens per word, then close in
    while low <= high:
        if len(found[2].ids) <= length:
            fitting = (kept, found)
            low = kept + 1
        else:
            high = kept - 1
        if low > high:
            break
        rate = len(found[2].ids) / (kept + len(needle.split()) + len(question.split()))
        kept = min(max(kept + round((length - len(found[2].ids)) / rate), low), high)
        found = made(kept)
    if fitting is None:
        raise ValueError(f"length={length} has no room for a word of the haystack beside the needle and the question")
    before, text, encoded = fitting[1]
    start = len(before)
    span = covering(encoded, text, start, start + len(needle))
    first = start + needle.index(answer)
    answer_span = covering(encoded, text, first, first + len(answer))
    first_offset, last_offset = encoded.offsets[span[0]], encoded.offsets[span[1] - 1]
    outside = f"{text[first_offset[0] : start]}{text[start + len(needle) : last_offset[1]]}"
    ids = torch.tensor(encoded.ids)
    merged = bool(outside.strip())
    return Needle(
        ids,
        span,
        answer_span,
        tuple(encoded.ids[slice(*answer_span)]),
        length,
        depth,
        {**(labels or {}), "merged": merged},
    )


def _encoded(bridge: Any, text: str, needle: str) -> Encoded:
    try:
        return encode(bridge, text)
    except ValueError as error:
        # a needle that the tokenizer cannot spell is lost; other faults of the text are what they are
        unknown = bridge.tokenizer.unk_token_id
        if unknown is not None and unknown in pieces(bridge.tokenizer, needle):
            raise LostNeedle(f"the tokenizer cannot spell the needle {needle!r}: {error}") from None
        raise


def _cut(haystack: str, depth: float) -> tuple[str, str]:
    """What stands before and behind the needle: cut behind the last sentence that ends before the depth."""
    if depth >= 1:
        return haystack, ""
    place = int(depth * len(haystack))
    ends = [match.end() for match in _SENTENCE_END.finditer(haystack) if match.end() <= place]
    cut = ends[-1] if ends else 0
    return haystack[:cut], haystack[cut:].lstrip()


def _at_least(bridge: Any, haystack: str, room: int) -> str:
    """The haystack, repeated to no fewer than `room` tokens and cut to not many more."""
    once = len(pieces(bridge.tokenizer, haystack))
    if once < room:
        return " ".join([haystack.strip()] * -(-room // max(once, 1)))
    words = list(re.finditer(r"\S+", haystack))
    return haystack[: words[min(len(words), 8 + 2 * room * len(words) // once) - 1].end()]


@dataclass(frozen=True)
class _Frame:
    """What does not change over a grid: sizes of the parts around the haystack."""

    world: bool
    size: int
    statement: int
    key: dict[int, int]


def _frame(bridge: Any, seed: int, options: Mapping[str, Any]) -> _Frame:
    from interp import tinyworld
    from interp.prompts import _needle as english
    from interp.tinyworld.families import needles as world

    bare = prompts.needle(bridge, 1, seed, **{**options, "distance": 0, "before": 0, "pairs": 1})
    speaks = tinyworld.is_tinyworld(bridge.tokenizer)
    if speaks:
        key = {i: text.split().index("{key}") for i, text in enumerate(world.STATEMENTS)}
    else:
        opening = len(pieces(bridge.tokenizer, english.OPENING))
        key = {
            i: len(pieces(bridge.tokenizer, english.OPENING + text[: text.index(" {key}")])) - opening
            for i, text in enumerate(english.STATEMENTS)
        }
    template = int(bare.labels["template"][0])
    start = int(bare.positions["key"][0]) - key[template]
    statement = int(bare.positions["value"][0]) + 2 - start  # the full stop is the last token of the statement
    return _Frame(speaks, int(bare.clean.shape[1]), statement, key)


def _fitting(
    bridge: Any, frame: _Frame, length: int, depth: float, n: int, seed: int, options: Mapping[str, Any]
) -> tuple[prompts.Prompts, list[int]]:
    """Prompts of a cell of the grid, and where their statements begin."""
    room = length - frame.size
    if room < 0:
        raise ValueError(f"length={length} is shorter than needle and question, which take {frame.size} tokens")
    error: ValueError | None = None
    # whole sentences do not add up to every number: then a little less, or a little elsewhere
    for slack in range(1 if frame.world else 16):
        before = round(depth * (room - slack))
        for shift in (0,) if frame.world else (0, 1, -1, 2, -2, 3, -3, 4, -4):
            if not 0 <= before + shift <= room - slack:
                continue
            where = {"before": before + shift, "distance": room - slack - before - shift}
            try:
                made = prompts.needle(bridge, n, seed, **{**options, **where})
            except ValueError as problem:
                error = error or problem
                continue
            keys = zip(made.positions["key"].tolist(), made.labels["template"], strict=True)
            return made, [key - frame.key[int(template)] for key, template in keys]
    raise ValueError(f"length={length}, depth={depth}: {error}") from error
