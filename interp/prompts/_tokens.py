"""From strings to prompts: tokenisation with every check of BOS, single tokens, lengths and positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Span = tuple[int, int]


@dataclass(frozen=True)
class Encoded:
    """One tokenised text: ids (BOS included if the model uses one) and the characters each token covers."""

    ids: list[int]
    offsets: list[Span]


@dataclass(frozen=True)
class Text:
    """A prompt as text, with the characters of its named parts."""

    text: str
    spans: Mapping[str, Span] = field(default_factory=dict)


def uses_bos(bridge: Any) -> bool:
    """Whether prompts for this model begin with BOS: its tokenizer has one and the bridge prepends it."""
    tokenizer = bridge.tokenizer
    return tokenizer is not None and tokenizer.bos_token_id is not None and bridge.cfg.default_prepend_bos is not False


def require_tokenizer(bridge: Any) -> Any:
    if bridge.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, so no text can be made for it; make Prompts(...) from token tensors instead"
        )
    return bridge.tokenizer


def pieces(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def token_strings(tokenizer: Any, ids: Iterable[int]) -> dict[int, str]:
    """Text of token ids, leading space included."""
    out = {}
    for token in sorted(set(ids)):
        text = tokenizer.decode([token])
        raw = tokenizer.convert_ids_to_tokens(token)
        # SentencePiece tokenizers drop the leading space of a lone token
        if isinstance(raw, str) and raw.startswith("▁") and not text.startswith(" "):
            text = " " + text
        out[token] = text
    return out


def encode(bridge: Any, text: str) -> Encoded:
    """Tokenise one text, BOS exactly once if the model uses one.

    Raises:
        ValueError: If the text is empty, ends in a space, spells BOS out, or has a word unknown to the tokenizer.
    """
    tokenizer = require_tokenizer(bridge)
    if not text.strip():
        raise ValueError(f"prompt {text!r} is empty")
    if text.endswith(" "):
        raise ValueError(
            f"prompt {text!r} ends in a space; most tokenizers put that space into the next token, so drop it"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer without character offsets; load its fast version"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoding["input_ids"]), [tuple(span) for span in encoding["offset_mapping"]]
    for special in {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}:
        if special in ids:
            raise ValueError(
                f"prompt {text!r} spells out the special token {tokenizer.convert_ids_to_tokens(special)!r}; BOS is "
                "added once for models that use it and padding is never needed, so leave it out"
            )
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown in ids and unknown not in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        start, end = offsets[ids.index(unknown)]
        raise ValueError(
            f"prompt {text!r}: {text[start:end]!r} is not in the tokenizer's vocabulary (it becomes "
            f"{tokenizer.unk_token})"
        )
    if uses_bos(bridge):
        ids, offsets = [tokenizer.bos_token_id, *ids], [(0, 0), *offsets]
    return Encoded(ids, offsets)


def answer_token(bridge: Any, prompt: str, answer: str) -> int:
    """The single token that an answer string is after a prompt.

    Raises:
        ValueError: If it is not one token; the message lists the pieces.
    """
    tokenizer = require_tokenizer(bridge)
    alone = pieces(tokenizer, answer)
    if len(alone) == 1 and alone[0] != tokenizer.unk_token_id:
        return alone[0]
    # SentencePiece splits a lone " Mary" in two although it is one token after a word
    before, after = pieces(tokenizer, prompt), pieces(tokenizer, prompt + answer)
    if (
        answer.startswith(" ")
        and len(after) == len(before) + 1
        and after[:-1] == before
        and after[-1] != tokenizer.unk_token_id
    ):
        return after[-1]
    shown = [tokenizer.convert_ids_to_tokens(token) for token in alone]
    spaced = pieces(tokenizer, " " + answer)
    hint = "choose an answer that is one token"
    if not answer.startswith(" ") and len(spaced) == 1 and spaced[0] != tokenizer.unk_token_id:
        hint = f"{' ' + answer!r}, with its leading space, is one token: use that"
    raise ValueError(f"answer {answer!r} is {len(alone)} tokens {shown}, but a metric reads exactly one; {hint}")


def last_token_of(encoded: Encoded, span: Span, what: str) -> int:
    """Index of the last token that covers any of the characters of `span`."""
    start, end = span
    inside = [i for i, (a, b) in enumerate(encoded.offsets) if a < end and b > start and b > a]
    if not inside:
        raise ValueError(f"{what}: no token covers characters {start} to {end}")
    return inside[-1]


def find(text: str, part: str, what: str) -> Span:
    """Characters of the only occurrence of `part` in `text`."""
    count = text.count(part)
    if not part or count != 1:
        raise ValueError(
            f"{what}: {part!r} occurs {count} times in {text!r}; name a longer part that occurs once (its last token "
            "is taken), or give token indices"
        )
    start = text.index(part)
    return start, start + len(part)


def side_by_side(tokenizer: Any, clean: Sequence[int], corrupted: Sequence[int]) -> str:
    """The tokens of two rows of different length around their first difference."""
    first = next(
        (i for i, (a, b) in enumerate(zip(clean, corrupted, strict=False)) if a != b), min(len(clean), len(corrupted))
    )
    window = slice(max(0, first - 1), first + 5)
    show = [tokenizer.convert_ids_to_tokens(list(ids[window])) for ids in (clean, corrupted)]
    return f"from position {window.start}, clean {show[0]} and corrupted {show[1]}"
