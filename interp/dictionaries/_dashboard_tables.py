"""The tables of a unit's page: its labels, its tokens, and its neighbours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from interp.dictionaries._dashboard_columns import Columns
from interp.dictionaries._dashboard_contexts import token_table
from interp.dictionaries._dashboard_labels import LabelScores

if TYPE_CHECKING:
    from interp.plotting.latent_page import Table

_N_LABELS, _N_TOKENS = 10, 8


def of_labels(labels: LabelScores, scores: dict[str, np.ndarray]) -> Table:
    """Which labels the unit goes with."""
    from interp.plotting.latent_page import Table

    rows = [
        (one["label"], one["auroc"], f"{one['low']:.3f}–{one['high']:.3f}" if np.isfinite(one["low"]) else "–",
         one["share"], one["recall"], one["base"])
        for one in labels.table(scores, _N_LABELS)
        if np.isfinite(one["correlation"]) and np.isfinite(one["auroc"])
    ]  # fmt: skip
    note = (
        "Ranked by correlation on every second document, scored on the others. Precision: of the tokens it fires "
        "on, those with the label; recall: of those with the label, where it fires; base: the label's share."
    )
    columns = ("label", "AUROC", "interval", "precision", "recall", "base")
    constant = "It does not vary on the documents that rank labels."
    return Table("Labels", note if rows else constant, columns, tuple(rows))


def of_tokens(ids: np.ndarray, values: np.ndarray, occurrences: np.ndarray, texts: Mapping[int, str]) -> Table:
    """The tokens that it fires on; `ids` and `values` are of those alone."""
    from interp.plotting.latent_page import Table

    found = token_table(ids, occurrences, values, _N_TOKENS)
    rows = tuple((texts[i], n, of, mean, share) for i, n, of, mean, share in found)
    note = "Tokens that carry most of its activation where it fires, and on how many of their occurrences it does."
    columns = ("token", "fires", "of", "mean", "share of activation")
    return Table("Tokens it fires on", note if rows else "None.", columns, rows, ("token",))


def of_nearest(cosines: np.ndarray, ids: np.ndarray, names: Sequence[str], kind: str, note: str) -> Table:
    """The nearest other directions."""
    from interp.plotting.latent_page import Link, Table

    pairs = [(int(i), float(c)) for i, c in zip(ids, cosines, strict=True) if i >= 0]
    rows = tuple((Link(i, names[i]), c) for i, c in pairs)
    return Table("Nearest directions", note, (kind, "cosine"), rows)


def of_coactive(
    unit: int, columns: Columns, correlation: np.ndarray, together: np.ndarray, names: Sequence[str], kind: str, n: int
) -> Table:
    """The `n` units whose activations are most correlated with its own."""
    from interp.plotting.latent_page import Link, Table

    fires = max(int(columns.fires[unit]), 1)
    others = np.where(np.arange(len(correlation)) == unit, np.nan, correlation)
    order = np.argsort(-np.nan_to_num(others, nan=-2.0), kind="stable")[:n]
    rows = tuple(
        (Link(int(i), names[int(i)]), float(others[i]), float(together[i]) / fires,
         int(columns.fires[i]) / columns.n_tokens)
        for i in order
        if np.isfinite(others[i])
    )  # fmt: skip
    note = "Correlation of activations over tokens; how often they fire where this one does, and in all."
    return Table("Most co-active", note, (kind, "correlation", "fires with it", "in all"), rows)
