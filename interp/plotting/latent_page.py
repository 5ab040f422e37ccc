"""One latent, feature or neuron as a self-contained HTML page: no network, no script, safe for any token."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.plotting.export import write_text
from interp.plotting.series import bars
from interp.plotting.style import ATTENTION, DIVERGING, visible_token
from interp.plotting.text import ColouredText, coloured_text

_PAGE = Path(__file__).with_name("latent_page.html")
_LEVELS = 20  # colours of tokens: finer steps cannot be told apart


@dataclass(frozen=True)
class Link:
    """A table's cell that leads to another unit, through the index."""

    number: int
    text: str


@dataclass(frozen=True, eq=False)
class Table:
    """A titled table. Cells are text, numbers (three digits) or links; columns in `tokens` are shown as tokens."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    tokens: tuple[str, ...] = ()

    def to_dataframe(self) -> pd.DataFrame:
        cells = [[cell.text if isinstance(cell, Link) else cell for cell in row] for row in self.rows]
        return pd.DataFrame(cells, columns=pd.Index(self.columns))


@dataclass(frozen=True, eq=False)
class Context:
    """Tokens with an activation each (NaN: none was read), and the place of the token that the context is about."""

    tokens: tuple[str, ...]
    values: np.ndarray
    mark: int
    where: str


@dataclass(frozen=True, eq=False)
class ContextGroup:
    """Contexts under one heading: the strongest, those of one band of activation, or those of one facet."""

    section: str
    title: str
    note: str
    contexts: tuple[Context, ...]


@dataclass(frozen=True, eq=False, repr=False)
class LatentPage:
    """What is known of one unit of a dictionary; shows itself in a notebook.

    Attributes:
        number, name: The unit.
        subtitle: What it is a unit of.
        facts: Headline numbers, (what, value).
        warning: Said at the top, such as that the unit never fires.
        edges, counts: Histogram of its activations where they are not zero.
        off: Share of tokens at exactly zero.
        groups: Contexts.
        effects: Tokens promoted and suppressed: `(token, logits, spreads)` each, largest first; None if not known.
        effects_note: How to read them.
        tables: Label scores, neighbours, tokens.
        provenance: The model and the settings, (what, value).
        signed: Whether it has negative activations.
        glue: What stands between tokens.
    """

    number: int
    name: str
    subtitle: str
    facts: tuple[tuple[str, str], ...]
    warning: str
    edges: np.ndarray
    counts: np.ndarray
    off: float
    groups: tuple[ContextGroup, ...]
    effects: dict[Literal["promoted", "suppressed"], list[tuple[str, float, float]]] | None
    effects_note: str
    tables: tuple[Table, ...]
    provenance: tuple[tuple[str, str], ...]
    signed: bool
    glue: str

    def __repr__(self) -> str:
        n = sum(len(group.contexts) for group in self.groups)
        return f"LatentPage({self.name!r}: {n} contexts, {len(self.tables)} tables; {self.subtitle})"

    @property
    def limit(self) -> float:
        """The activation of the strongest colour: the largest magnitude."""
        return float(np.abs(self.edges).max(initial=0)) or 1.0

    def table(self, title: str) -> pd.DataFrame:
        """One of the tables, by the beginning of its title."""
        found = [table for table in self.tables if table.title.lower().startswith(title.lower())]
        if not found:
            titles = ", ".join(repr(table.title) for table in self.tables)
            raise KeyError(f"no table {title!r} of {self.name}; there are {titles}")
        return found[0].to_dataframe()

    def contexts(self, section: str = "Strongest", k: int = 10) -> ColouredText:
        """The first `k` contexts of a section (by the beginning of its title) as coloured text; `.figure()` draws it.

        Raises:
            KeyError: If there is none, for instance of a unit that never fires.
        """
        names = dict.fromkeys(group.section for group in self.groups)
        chosen = [
            context
            for group in self.groups
            if group.section.lower().startswith(section.lower())
            for context in group.contexts
        ]
        if not chosen[:k]:
            raise KeyError(f"no contexts {section!r} of {self.name}; there are {', '.join(map(repr, names)) or 'none'}")
        return coloured_text(
            [context.tokens for context in chosen[:k]], [context.values for context in chosen[:k]],
            marks=[context.mark for context in chosen[:k]], labels=[_number(c.values[c.mark]) for c in chosen[:k]],
            title=f"{self.name}: {section.lower()} contexts", unit="activation", signed=self.signed, limit=self.limit,
            glue=self.glue,
        )  # fmt: skip

    def histogram(self) -> go.Figure:
        """Figure: tokens by activation, where it is not zero."""
        middles = (self.edges[:-1] + self.edges[1:]) / 2
        frame = pd.DataFrame({"activation": [f"{m:.3g}" for m in middles], "value": self.counts})
        title = f"{self.name}: zero on {self.off:.1%} of the tokens"
        return bars(frame, x="activation", title=title, unit="tokens", x_title="activation")

    def html(self, *, index: str | None = None) -> str:
        """The page. With `index`, the path of the index from here, other units become links."""
        back = "" if index is None else f'<p class="note"><a href="{_safe(index)}">← index of all</a></p>'
        subtitle = f"<small>{_safe(self.subtitle)}</small>"
        facts = "".join(f"<div><dt>{_safe(what)}</dt><dd>{_safe(value)}</dd></div>" for what, value in self.facts)
        warning = f'<p class="warn">{_safe(self.warning)}</p>' if self.warning else ""
        left = self._histogram() + self._effects() + "".join(self._table(table, index) for table in self.tables)
        record = " · ".join(f"{_safe(what)}: {_safe(value)}" for what, value in self.provenance)
        body = (
            f'{back}<h1>{_safe(self.name)}{subtitle}</h1>\n<dl class="facts">{facts}</dl>{warning}\n'
            f"<main><div>{left}</div>\n<div>{self._contexts()}</div></main>\n<footer>{record}</footer>"
        )
        page = _PAGE.read_text(encoding="utf-8").replace("{{palette}}", _palette(self.signed))
        # the body last: what looks like a placeholder in a token stays as it is
        return page.replace("{{title}}", _safe(f"{self.name} · {self.subtitle}")).replace("{{body}}", body)

    def _repr_html_(self) -> str:
        """The page inside a frame of its own, whose styles touch nothing else."""
        return (
            f'<iframe title="{_safe(self.name)}" sandbox="" loading="lazy" '
            f'style="width:100%;height:900px;border:1px solid #ddd" srcdoc="{_safe(self.html())}"></iframe>'
        )

    def save_html(self, path: str | os.PathLike[str], *, index: str | None = None) -> Path:
        """Write the page; the file is there whole or not at all."""
        return write_text(path, self.html(index=index))

    def _histogram(self) -> str:
        if not self.counts.sum():
            return ""
        width, height, left, top, bottom = 400, 150, 40, 8, 34
        low, high = float(self.edges[0]), float(self.edges[-1])
        # counts span decades: one token is seen beside ten thousand
        ceiling = max(float(np.log10(self.counts.max())), 0.3) + 0.35
        room, span = height - top - bottom, width - left - 8
        parts, colours = [], _shades(self.signed)
        step = span / len(self.counts)
        for i, count in enumerate(self.counts.tolist()):
            if count:
                tall = (np.log10(count) + 0.35) / ceiling * room
                level = _level(float(self.edges[i] + self.edges[i + 1]) / 2, self.limit, self.signed)
                fill = colours[level] if level is not None else "#f0f0f0"
                parts.append(
                    f'<rect x="{left + i * step:.1f}" y="{top + room - tall:.1f}" width="{max(step - 1, 1):.1f}" '
                    f'height="{tall:.1f}" fill="{fill}" stroke="#8aa" stroke-width=".4"><title>{count:,} tokens from '
                    f"{self.edges[i]:.3g} to {self.edges[i + 1]:.3g}</title></rect>"
                )
        for power in range(int(ceiling) + 1):
            y = top + room - (power + 0.35) / ceiling * room
            if y >= top:
                parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd" '
                             f'stroke-width=".6"/><text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">'
                             f"{10**power:,}</text>")  # fmt: skip
        base = top + room
        parts.append(f'<line x1="{left}" x2="{width - 8}" y1="{base}" y2="{base}" stroke="#555"/>')
        for share, anchor in ((0, "middle"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1, "end")):
            parts.append(f'<text x="{left + share * span:.0f}" y="{base + 14}" text-anchor="{anchor}">'
                         f"{low + share * (high - low):.3g}</text>")  # fmt: skip
        parts.append(f'<text x="{left + span / 2:.0f}" y="{height - 4}" text-anchor="middle">activation</text>')
        return (
            f"<h2>Activations</h2><p class=note>Tokens by activation, counts on a logarithmic scale; exactly zero on "
            f'{self.off:.2%} of the tokens, which are left out.</p><svg viewBox="0 0 {width} {height}" width="100%" '
            f'role="img" aria-label="Histogram of activations">{"".join(parts)}</svg>'
        )

    def _effects(self) -> str:
        note = f"<p class=note>{_safe(self.effects_note)}</p>"
        if self.effects is None:
            return f"<h2>Direct effect on logits</h2>{note}"
        largest = max((abs(value) for some in self.effects.values() for _, value, _ in some), default=0.0) or 1.0
        halves = []
        sides = (self.effects["promoted"], "Promotes", "up"), (self.effects["suppressed"], "Suppresses", "down")
        for side, title, kind in sides:
            rows = "".join(
                f'<tr><td class="bar {kind}"><i style="width:{100 * abs(value) / largest:.0f}%"></i>'
                f'<span class="t">{_safe(visible_token(token))}</span></td><td class="r" title="{spreads:+.2f} '
                f'spreads">{value:+.3g}</td></tr>'
                for token, value, spreads in side
            )
            halves.append(f"<div><h3>{title}</h3><table>{rows}</table></div>")
        return f'<h2>Direct effect on logits</h2>{note}<div class="two">{"".join(halves)}</div>'

    def _table(self, table: Table, index: str | None) -> str:
        if not table.rows:
            return f"<h2>{_safe(table.title)}</h2><p class=note>{_safe(table.note)}</p>"
        aligned = [isinstance(cell, (int, float)) for cell in table.rows[0]]
        head = "".join(
            f'<th class="r">{_safe(name)}</th>' if right else f"<th>{_safe(name)}</th>"
            for name, right in zip(table.columns, aligned, strict=True)
        )
        rows = []
        for row in table.rows:
            cells = []
            for name, cell in zip(table.columns, row, strict=True):
                if isinstance(cell, Link):
                    text = _safe(cell.text)
                    link = f'<a href="{_safe(str(index))}#q=unit%3D{cell.number}">{text}</a>'
                    cells.append(f"<td>{text if index is None else link}</td>")
                elif isinstance(cell, (int, float)):
                    cells.append(f'<td class="r">{_number(cell)}</td>')
                else:
                    kind = ' class="t"' if name in table.tokens else ""
                    cells.append(f"<td{kind}>{_safe(visible_token(cell) if kind else cell)}</td>")
            rows.append(f"<tr>{''.join(cells)}</tr>")
        return (
            f"<h2>{_safe(table.title)}</h2><p class=note>{_safe(table.note)}</p>"
            f"<table><tr>{head}</tr>{''.join(rows)}</table>"
        )

    def _contexts(self) -> str:
        parts, section = [], None
        for group in self.groups:
            if group.section != section:
                section = group.section
                parts.append(f"<h2>{_safe(section)}</h2>")
            parts.append(f"<h3>{_safe(group.title)} <small>{_safe(group.note)}</small></h3>")
            parts += [self._line(context) for context in group.contexts]
        return "".join(parts)

    def _line(self, context: Context) -> str:
        spans = []
        for place, (token, value) in enumerate(zip(context.tokens, context.values.tolist(), strict=True)):
            text = _safe(visible_token(token).replace("␣", " "))
            level = None if np.isnan(value) else _level(value, self.limit, self.signed)
            kind = "" if level is None else f" class=c{level}"
            shown = "" if np.isnan(value) or not value else f' title="{value:.3g}"'
            tag = "b" if place == context.mark else "i"
            spans.append(f"<{tag}{kind}{shown}>{text}</{tag}>" if kind or tag == "b" else text)
        own = _number(context.values[context.mark])
        return (
            f'<p class="line"><small title="{_safe(context.where)}">{own}</small><span>'
            f"{_safe(self.glue).join(spans)}</span></p>"
        )


def _safe(text: str) -> str:
    return html.escape(text)


def _number(value: float | int | np.generic) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "–" if np.isnan(value) else f"{float(value):.3g}"


def _level(value: float, limit: float, signed: bool) -> int | None:
    """The colour of a value, 0 to 20; None for (nearly) zero, which stays white."""
    share = min(max(value / limit, -1.0 if signed else 0.0), 1.0)
    if signed:
        level = round((share + 1) / 2 * _LEVELS)
        return None if level == _LEVELS // 2 else level
    return None if share <= 0 else max(1, round(share * _LEVELS))  # a latent that fires is seen to fire


def _shades(signed: bool) -> list[str]:
    scale = DIVERGING if signed else ATTENTION
    stops = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in scale])
    places = np.linspace(0, len(scale) - 1, _LEVELS + 1)
    mixed = np.stack([np.interp(places, range(len(scale)), stops[:, channel]) for channel in range(3)], 1)
    return ["#" + "".join(f"{round(part):02x}" for part in colour) for colour in mixed.tolist()]


def _palette(signed: bool) -> str:
    rules = []
    for level, colour in enumerate(_shades(signed)):
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        ink = "#222" if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"
        rules.append(f".c{level}{{background:{colour};color:{ink}}}")
    return "".join(rules)
