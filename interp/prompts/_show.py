"""How prompts show themselves: token by token, differences and named positions marked."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.prompts._prompts import Prompts

# muted and colour-blind safe; text stays readable on light and dark notebook themes
_CHANGED = "background:#fde0c5;color:#000;border-radius:3px"
_NAMED = "border-bottom:2px solid #2a788e"


class Shown(str):
    """Text that a notebook shows as it is rather than as a quoted literal."""

    def __repr__(self) -> str:
        return str(self)


def join(tokens: list[str]) -> str:
    """Tokens as running text: word-level tokens carry no spaces of their own."""
    return ("" if any(token.startswith(" ") for token in tokens) else " ").join(tokens)


def visible(token: str) -> str:
    """A token with its spaces and line breaks visible."""
    return token.replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")


def names_at(prompts: Prompts, row: int) -> dict[int, list[str]]:
    out: dict[int, list[str]] = {}
    for key, value in prompts.positions.items():
        out.setdefault(int(value[row]), []).append(key)
    return out


def table(prompts: Prompts, row: int) -> Shown:
    clean, corrupted = (
        [visible(prompts.text(token)) for token in ids[row].tolist()] for ids in (prompts.clean, prompts.corrupted)
    )
    named = names_at(prompts, row)
    differs = (prompts.clean[row] != prompts.corrupted[row]).tolist()
    width = max(5, *map(len, clean))
    other = max(9, *map(len, corrupted))
    lines = [_title(prompts, row), f"{'pos':>4}  {'clean':<{width}}  {'corrupted':<{other}}  position"]
    for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)):
        lines.append(
            f"{i:>4}  {a:<{width}}  {b if differs[i] else '':<{other}}  {', '.join(named.get(i, []))}".rstrip()
        )
    if prompts.labels:
        lines.append("labels: " + ", ".join(f"{key}={value[row]}" for key, value in prompts.labels.items()))
    return Shown("\n".join(lines))


def summary(prompts: Prompts) -> str:
    n, length = prompts.clean.shape
    seed = "" if prompts.seed is None else f", seed {prompts.seed}"
    lines = [
        f"Prompts({prompts.name}: {n} examples of {length} tokens{seed}; positions {', '.join(prompts.positions)})"
    ]
    if n:
        differs = (prompts.clean[0] != prompts.corrupted[0]).tolist()
        for which, ids in (("clean", prompts.clean), ("corrupted", prompts.corrupted)):
            tokens = [prompts.text(token) for token in ids[0].tolist()]
            marked = [_mark(token) if d else token for token, d in zip(tokens, differs, strict=True)]
            # a word-level joiner is decided on the unmarked tokens: marking hides no leading space
            glue = "" if any(token.startswith(" ") for token in tokens) else " "
            lines.append(f"  {which + ':':<10} {glue.join(marked)}".replace("\n", "⏎"))
        lines.append(
            f"  answer {prompts.text(int(prompts.answers[0]))!r}, foil {prompts.text(int(prompts.foils[0]))!r}"
        )
    return "\n".join(lines)


def html(prompts: Prompts, rows: int = 3) -> str:
    n, length = prompts.clean.shape
    parts = [
        f"<div><b>{escape(prompts.name)}</b>: {n} examples of {length} tokens; "
        f"<span style='{_CHANGED}'>changed by the corruption</span>, <span style='{_NAMED}'>named position</span></div>"
    ]
    for row in range(min(rows, n)):
        named = names_at(prompts, row)
        differs = (prompts.clean[row] != prompts.corrupted[row]).tolist()
        body = []
        for which, ids in (("clean", prompts.clean), ("corrupted", prompts.corrupted)):
            cells = [f"<th style='text-align:left'>{which}</th>"]
            for i, token in enumerate(ids[row].tolist()):
                style = ";".join([_CHANGED] * differs[i] + [_NAMED] * (i in named))
                hint = escape(f"{i} {', '.join(named.get(i, []))}".strip(), quote=True)
                cells.append(
                    f"<td style='{style};text-align:center' title='{hint}'>{escape(visible(prompts.text(token)))}</td>"
                )
            body.append(f"<tr>{''.join(cells)}</tr>")
        names = "".join(
            f"<td style='text-align:center;color:#2a788e'>{escape(', '.join(named.get(i, [])))}</td>"
            for i in range(length)
        )
        body.append(f"<tr><th style='text-align:left'>position</th>{names}</tr>")
        parts.append(
            f"<div style='overflow-x:auto'><div>{escape(_title(prompts, row))}</div>"
            f"<table style='font-family:monospace;border-collapse:collapse'>{''.join(body)}</table></div>"
        )
    return "\n".join(parts)


def _title(prompts: Prompts, row: int) -> str:
    answer, foil = (visible(prompts.text(int(ids[row]))) for ids in (prompts.answers, prompts.foils))
    return f"{prompts.name}[{row}]: answer {answer}, foil {foil}"


def _mark(token: str) -> str:
    body = token.lstrip(" ")
    return token[: len(token) - len(body)] + f"«{body}»"
