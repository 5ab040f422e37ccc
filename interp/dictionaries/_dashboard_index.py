"""The index of a dashboard: one row of numbers and tokens per unit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from interp.dictionaries._dashboard_contexts import token_table
from interp.dictionaries._dashboard_pages import Pages, histogram

if TYPE_CHECKING:
    from interp.plotting.latent_index import Column, LatentIndex

_N_WORDS = 5
_N_BARS = 16
_BLOCK = 256


def index_of(pages: Pages) -> LatentIndex:
    """Every unit, read once."""
    import pandas as pd

    from interp.plotting.latent_index import LatentIndex

    columns = pages.columns
    rows = [_row(pages, unit) for unit in range(columns.n_units)]
    _add_directions(pages, rows)
    frame = pd.DataFrame(rows)
    dead, n = int((columns.nonzero == 0).sum()), columns.n_units
    facts = (
        (f"{pages.kind}s", f"{n:,}"),
        ("dead", f"{dead:,} ({dead / n:.1%})"),
        (f"{pages.kind}s firing per token", f"{columns.fires.sum() / columns.n_tokens:.1f}"),
        ("tokens", f"{columns.n_tokens:,}"),
        ("hook", pages.rows.hook),
        ("model", str(pages.provenance.get("model"))),
    )
    if pages.effects is not None:
        median, high = pages.effects.random
        facts += (("largest effect of random directions", f"{median:.1f} spreads (95 %: below {high:.1f})"),)
    title = f"{n:,} {pages.kind}s of {pages.provenance.get('model')} at {pages.rows.hook}"
    shown = tuple(column for column in _columns(pages) if column.key in frame)
    return LatentIndex(title, facts, shown, frame, ("unit", False), pages.record())


def _row(pages: Pages, unit: int) -> dict[str, Any]:
    columns = pages.columns
    tokens, values = columns.entries(unit)
    on = values > columns.level[unit]
    largest = float(columns.largest[unit])
    found = token_table(pages.ids[tokens[on]], pages.occurrences, values[on], _N_WORDS)
    row: dict[str, Any] = {
        "unit": unit,
        "name": pages.names[unit],
        "density": int(columns.fires[unit]) / columns.n_tokens,
        "largest": largest,
        "mean": float(values[on].mean()) if on.any() else np.nan,
        "histogram": histogram(values[values > 0], np.linspace(0, max(largest, 0.0), _N_BARS + 1)).tolist(),
        "fires_on": [pages.texts(np.array([i]))[i] for i, *_ in found],
    }
    if pages.labels is not None:
        best = {"label": None, "auroc": np.nan, "auroc_low": np.nan}
        if len(values) and on.any():
            first = pages.labels.table(pages.labels.of(tokens, values, float(columns.level[unit])), 1)[0]
            if np.isfinite(first["correlation"]):
                best = {"label": first["label"], "auroc": first["auroc"], "auroc_low": first["low"]}
        row |= best
    return row


def _add_directions(pages: Pages, rows: list[dict[str, Any]]) -> None:
    """Tokens promoted and suppressed and the nearest direction, many units at a time."""
    if pages.effects is not None:
        for start in range(0, len(rows), pages.effects.block):
            units = range(start, min(start + pages.effects.block, len(rows)))
            values, ids, spread = pages.effects.of(units, _N_WORDS)
            texts = pages.texts(ids)
            for place, unit in enumerate(units):
                up, down = ([texts[i] for i in side] for side in ids[place].tolist())
                spreads = float(values[place, 0, 0] / spread[place]) if spread[place] else np.nan
                rows[unit] |= {"promotes": up, "suppresses": down, "spreads": spreads}
    if pages.nearest is not None and len(rows) > 1:
        for start in range(0, len(rows), _BLOCK):
            units = range(start, min(start + _BLOCK, len(rows)))
            cosines, ids = pages.nearest.of(units, 1)
            for place, unit in enumerate(units):
                other = int(ids[place, 0])
                rows[unit] |= {"cosine": float(cosines[place, 0]), "nearest": float(other) if other >= 0 else np.nan}


def _columns(pages: Pages) -> tuple[Column, ...]:
    from interp.plotting.latent_index import Column

    named = any(name != f"{pages.kind} {i}" for i, name in enumerate(pages.names))
    return (
        Column("unit", pages.kind, "number", "Number; search for unit=17"),
        *([Column("name", "name", "text", "Name")] if named else []),
        Column("density", "density", "number", "Share of tokens on which it fires"),
        Column("largest", "largest", "number", "Largest activation"),
        Column("mean", "mean", "number", "Mean activation where it fires"),
        Column("histogram", "activations", "bars", "Positive activations from 0 to the largest, counts on a log scale"),
        Column("fires_on", "fires on", "words", "Tokens that carry most of its activation"),
        Column("promotes", "promotes", "words", "Tokens whose logits its direction raises most, directly"),
        Column("suppresses", "suppresses", "words", "Tokens whose logits its direction lowers most, directly"),
        Column("spreads", "spreads", "number", "Largest effect over the standard deviation over the vocabulary"),
        Column("label", "best label", "label", "The label that goes best with it, chosen on every second document"),
        Column("auroc", "auroc", "number", "Of that label, on the other documents"),
        Column("auroc_low", "auroc_low", "number", "Lower end of its interval"),
        Column("cosine", "cosine", "number", "With the nearest other direction"),
        Column("nearest", "nearest", "number", "The nearest other direction"),
    )
