"""One's own strings as prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from interp.prompts._prompts import Prompts
from interp.prompts._tokens import (
    Encoded,
    Text,
    answer_token,
    encode,
    find,
    last_token_of,
    require_tokenizer,
    side_by_side,
    token_strings,
)


def from_text(
    bridge: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str],
    foils: Sequence[str],
    *,
    positions: Mapping[str, str | Sequence[str] | Sequence[int]] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    name: str = "text",
) -> Prompts:
    """Prompts from strings, tokenised with BOS exactly once if the model uses one.

    Args:
        bridge: The model; only its tokenizer and configuration are read.
        clean: The intact prompts.
        corrupted: The same prompts with the deciding words changed, of equal length in tokens.
        answers: The right next word of each clean prompt, one token each. Most tokenizers write the leading space into
            the token: `" Mary"`, not `"Mary"`.
        foils: The word it is compared with, one token each.
        positions: Name to a part of the clean prompt that occurs in it once (one string for all examples or one per
            example; its last token is the position), or to token indices counted from 0, BOS included. `"end"` is the
            last token unless given.
        labels: Name to one plain value per example.

    Raises:
        ValueError: If an answer is not a single token, clean and corrupted differ in length, prompts differ in length
            among each other, a text is empty, spells out BOS or ends in a space, or a named part is not found exactly
            once.
    """
    rows = _rows(bridge, clean, corrupted, answers, foils, positions)
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row["clean"]), []).append(i)
    if len(lengths) > 1:
        shown = "; ".join(f"{length} tokens: examples {index[:6]}" for length, index in sorted(lengths.items()))
        raise ValueError(
            f"the prompts have {len(lengths)} different lengths ({shown}), and rows are never padded; "
            "prompts.groups_from_text(...) gives one Prompts per length"
        )
    return _assemble(bridge, rows, range(len(rows)), labels, name)


def groups_from_text(
    bridge: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str],
    foils: Sequence[str],
    *,
    positions: Mapping[str, str | Sequence[str] | Sequence[int]] | None = None,
    labels: Mapping[str, Sequence[Any]] | None = None,
    name: str = "text",
) -> list[Prompts]:
    """One `Prompts` per length in tokens, shortest first; arguments and checks as in `from_text`.

    The label `"index"` says which of the given strings an example is.
    """
    rows = _rows(bridge, clean, corrupted, answers, foils, positions)
    lengths: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        lengths.setdefault(len(row["clean"]), []).append(i)
    labels = {**(labels or {}), "index": list(range(len(rows)))}
    return [_assemble(bridge, rows, index, labels, name) for _, index in sorted(lengths.items())]


def from_parts(
    bridge: Any,
    clean: Sequence[Text],
    corrupted: Sequence[Text],
    answers: Sequence[str],
    foils: Sequence[str],
    *,
    labels: Mapping[str, Sequence[Any]],
    name: str,
    seed: int,
) -> Prompts:
    """Prompts of a generator: texts whose named parts are known, so that every position follows from them."""
    rows = []
    for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)):
        row = _row(bridge, i, a.text, b.text, answers[i], foils[i])
        row["positions"] = {
            key: last_token_of(row["encoded"], span, f"example {i}, {key}") for key, span in a.spans.items()
        }
        rows.append(row)
    prompts = _assemble(bridge, rows, range(len(rows)), labels, name, seed)
    return prompts.check(bridge)


def _rows(
    bridge: Any,
    clean: Sequence[str],
    corrupted: Sequence[str],
    answers: Sequence[str],
    foils: Sequence[str],
    positions: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    columns = {"clean": clean, "corrupted": corrupted, "answers": answers, "foils": foils}
    for key, column in columns.items():
        if isinstance(column, str):
            raise ValueError(f"{key} is one string; pass a list of strings, one per example: {key}=[{column!r}]")
        if len(column) != len(clean):
            raise ValueError(f"{key} has {len(column)} strings but clean has {len(clean)}; one per example is expected")
    if not len(clean):
        raise ValueError("clean is empty; at least one prompt is needed")
    rows = []
    for i in range(len(clean)):
        row = _row(bridge, i, clean[i], corrupted[i], answers[i], foils[i])
        row["positions"] = {
            key: _named(row["encoded"], clean[i], key, part, i, len(clean)) for key, part in (positions or {}).items()
        }
        rows.append(row)
    return rows


def _row(bridge: Any, i: int, clean: str, corrupted: str, answer: str, foil: str) -> dict[str, Any]:
    a, b = encode(bridge, clean), encode(bridge, corrupted)
    if len(a.ids) != len(b.ids):
        raise ValueError(
            f"example {i}: clean has {len(a.ids)} tokens and corrupted {len(b.ids)}, so their positions do not "
            f"correspond; {side_by_side(require_tokenizer(bridge), a.ids, b.ids)}. Replace words by others of as many "
            "tokens"
        )
    try:
        answer_id, foil_id = answer_token(bridge, clean, answer), answer_token(bridge, clean, foil)
    except ValueError as error:
        raise ValueError(f"example {i}: {error}") from None
    return {"clean": a.ids, "corrupted": b.ids, "answers": answer_id, "foils": foil_id, "encoded": a}


def _named(encoded: Encoded, text: str, key: str, part: Any, i: int, n: int) -> int:
    if not isinstance(part, str):
        if len(part) != n:
            raise ValueError(f"positions[{key!r}] has {len(part)} entries but there are {n} examples")
        part = part[i]
    if not isinstance(part, str):
        return int(part)
    what = f"positions[{key!r}], example {i}"
    return last_token_of(encoded, find(text, part, what), what)


def _assemble(
    bridge: Any,
    rows: list[dict[str, Any]],
    index: Sequence[int],
    labels: Mapping[str, Any] | None,
    name: str,
    seed: int | None = None,
) -> Prompts:
    chosen = [rows[i] for i in index]
    lengths = sorted({len(row["clean"]) for row in chosen})
    if len(lengths) > 1:
        raise ValueError(f"{name}: the prompts have lengths {lengths} in tokens; rows are never padded")
    clean, corrupted, answers, foils = (
        torch.tensor([row[key] for row in chosen]) for key in ("clean", "corrupted", "answers", "foils")
    )
    ids = {token for tensor in (clean, corrupted, answers, foils) for token in tensor.flatten().tolist()}
    return Prompts(
        clean,
        corrupted,
        answers,
        foils,
        positions={key: torch.tensor([row["positions"][key] for row in chosen]) for key in chosen[0]["positions"]},
        labels={key: tuple(values[i] for i in index) for key, values in (labels or {}).items()},
        strings=token_strings(bridge.tokenizer, ids),
        name=name,
        seed=seed,
    )
