"""The page of one unit, put together from its activations, its direction and the labels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.dictionaries import _dashboard_tables
from interp.dictionaries._dashboard_columns import Columns
from interp.dictionaries._dashboard_contexts import (
    Places,
    bands,
    cluster_facets,
    label_facets,
    token_facets,
)
from interp.dictionaries._dashboard_directions import Effects, Nearest
from interp.dictionaries._dashboard_labels import LabelScores
from interp.dictionaries._dashboard_options import Options
from interp.dictionaries.features import token_texts
from interp.dictionaries.rows import TokenRows
from interp.neurons.contexts import contexts_of

if TYPE_CHECKING:
    from interp.plotting.latent_page import Context, ContextGroup, LatentPage, Table

N_BINS = 40
_N_BANDS, _PER_BAND = 4, 5
_N_FACET, _PER_FACET = 60, 3
_NEGATIVE = 0.05  # of the largest magnitude: a smaller negative side is not shown


class Pages:
    """Everything that pages and the index are made from."""

    def __init__(
        self,
        bridge: Any,
        rows: TokenRows,
        columns: Columns,
        labels: LabelScores | None,
        effects: Effects | None,
        nearest: Nearest | None,
        norms: np.ndarray | None,
        names: list[str],
        kind: str,
        options: Options,
        provenance: dict[str, Any],
    ) -> None:
        self.rows, self.columns, self.labels = rows, columns, labels
        self.effects, self.nearest, self.norms = effects, nearest, norms
        self.names, self.kind, self.options, self.provenance = names, kind, options, provenance
        self.ids = rows.ids.numpy()
        self.occurrences = np.bincount(self.ids)
        self._bridge, self._places = bridge, Places(rows, options.window)
        self._texts: dict[int, str] = {}
        self._controls: dict[int, str] = {}  # of facets by cluster, by the number of contexts
        known = self.texts(np.unique(rows.tokens.numpy()))
        # nothing stands between tokens where they carry their own spaces
        self.glue = "" if any(text.startswith(" ") for text in known.values()) else " "

    def number(self, unit: int | str) -> int:
        """The number of a unit given by number or name."""
        if isinstance(unit, str):
            if unit not in self.names:
                raise KeyError(f"no {self.kind} is called {unit!r}; the first is {self.names[0]!r}")
            return self.names.index(unit)
        if not 0 <= unit < len(self.names):
            raise KeyError(f"no {self.kind} {unit}; there are {len(self.names)}, from 0")
        return int(unit)

    def texts(self, ids: np.ndarray) -> dict[int, str]:
        """Text of token ids."""
        new = [i for i in np.unique(ids).tolist() if i not in self._texts]
        found = token_texts(self._bridge, new)
        self._texts.update({i: found.get(str(i), f"#{i}") for i in new})
        return self._texts

    def fingerprint(self) -> str:
        """Of what the pages would show: activations, tokens, names and settings."""
        digest = hashlib.sha256(self.rows.tokens.numpy().tobytes())
        for array in (self.columns.largest, self.columns.smallest, self.columns.nonzero, self.columns.fires):
            digest.update(np.ascontiguousarray(array).tobytes())
        labels = None if self.labels is None else self.labels.names
        settings = [self.names, labels, {k: v for k, v in self.provenance.items() if k != "versions"}]
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def of(self, units: Sequence[int]) -> list[LatentPage]:
        """The pages of these units, in order."""
        from interp.plotting.latent_page import LatentPage

        if not units:
            return []
        columns, chosen = self.columns, list(units)
        block = columns.block(chosen)
        high = self._strongest(block, "max")
        signed = columns.smallest[chosen] < -_NEGATIVE * np.maximum(columns.largest[chosen], 1e-30)
        low = self._strongest(block, "min") if signed.any() else [[] for _ in chosen]
        effects = None if self.effects is None else self.effects.of(chosen, self.options.n_tokens)
        near = None if self.nearest is None else self.nearest.of(chosen, self.options.n_neighbours)
        correlations, together = columns.correlations(chosen), columns.together(chosen)
        pages = []
        for place, unit in enumerate(chosen):
            tokens, values = columns.entries(unit)
            shown = bool(signed[place])
            ends = (float(columns.smallest[unit]) if shown else 0.0, max(float(columns.largest[unit]), 0.0))
            edges = np.linspace(*ends, N_BINS + 1)
            counts = histogram(values, edges)
            scores = None if self.labels is None else self.labels.of(tokens, values, float(columns.level[unit]))
            tables = self._tables(
                unit, tokens, values, scores, None if near is None else (near[0][place], near[1][place])
            )
            tables.append(_dashboard_tables.of_coactive(
                unit, columns, correlations[place], together[place], self.names, self.kind, self.options.n_neighbours
            ))  # fmt: skip
            subtitle = f"{self.kind} {unit} of {len(self.names):,} at {self.rows.hook}"
            below = low[place] if shown else []
            written = (
                None
                if effects is None
                else self._effects(effects[0][place], effects[1][place], float(effects[2][place]))
            )
            spreads = None if written is None else written["promoted"][0][2]
            pages.append(LatentPage(
                number=unit, name=self.names[unit], subtitle=subtitle,
                facts=self._facts(unit, values, scores, spreads), warning=self._warning(unit),
                edges=edges, counts=counts, off=1 - len(values) / columns.n_tokens,
                groups=tuple(self._groups(unit, block[:, place], tokens, values, high[place], below)),
                effects=written, effects_note=self._effects_note(), tables=tuple(tables), provenance=self.record(),
                signed=shown, glue=self.glue,
            ))  # fmt: skip
        return pages

    def _tables(
        self,
        unit: int,
        tokens: np.ndarray,
        values: np.ndarray,
        scores: dict[str, np.ndarray] | None,
        near: tuple[np.ndarray, np.ndarray] | None,
    ) -> list[Table]:
        """Labels if there are any, tokens, and the nearest directions if there are directions."""
        found = []
        if scores is not None and self.labels is not None:
            found.append(_dashboard_tables.of_labels(self.labels, scores))
        on = values > self.columns.level[unit]
        found.append(_dashboard_tables.of_tokens(self.ids[tokens[on]], values[on], self.occurrences, self._texts))
        if near is not None and self.nearest is not None:
            found.append(_dashboard_tables.of_nearest(*near, self.names, self.kind, self.nearest.note))
        return found

    def record(self) -> tuple[tuple[str, str], ...]:
        """The provenance in words."""
        given = self.provenance
        versions = ", ".join(f"{name} {version}" for name, version in given.get("versions", {}).items())
        source = {k: v for k, v in given["source"].items() if v is not None and v != ""}
        return (
            ("model", f"{given.get('model')} ({given.get('weights_state')} weights, {given.get('dtype')}, revision "
             f"{given.get('revision')})"),
            ("hook", self.rows.hook),
            *([("directions at", given["directions_at"])] if given["directions_at"] != self.rows.hook else []),
            ("tokens", f"{len(self.rows):,} of {len(self.rows.tokens):,} documents"),
            *([(f"{self.kind}s of", ", ".join(f"{name} {value}" for name, value in source.items()))] if source else []),
            ("fires", f"above {given['threshold']:g} of the largest activation" if given["threshold"] else "above 0"),
            ("seed", str(given["seed"])),
            ("versions", versions),
        )  # fmt: skip

    def _strongest(self, block: np.ndarray, side: Any) -> list[list[int]]:
        n = max(self.options.n_contexts, _N_FACET)
        found = contexts_of(
            torch.from_numpy(block), self.rows.tokens, n=n, window=self.options.window, side=side, once="context",
            keep=self.rows.keep,
        ).values  # fmt: skip
        sign = 1.0 if side == "max" else -1.0
        wanted = sign * found.values > 0  # tokens at zero are no contexts
        row, pos = found.coords["row"].values, found.coords["pos"].values
        return [self._places.number(row[i][there], pos[i][there]).tolist() for i, there in enumerate(wanted)]

    def _warning(self, unit: int) -> str:
        if not self.columns.nonzero[unit]:
            n = self.columns.n_tokens
            return f"Dead: this {self.kind} is zero on all {n:,} tokens. It may still fire on other text."
        if self.columns.largest[unit] <= 0:
            return f"This {self.kind} is never positive on these tokens; it fires, if at all, by going down."
        if -self.columns.smallest[unit] > self.columns.largest[unit]:
            return (
                f"The negative side of this {self.kind} is the larger one. Density, labels, facets and the tokens it "
                f"fires on are of the positive side."
            )
        return ""

    def _facts(
        self, unit: int, values: np.ndarray, scores: dict[str, np.ndarray] | None, spreads: float | None
    ) -> tuple[tuple[str, str], ...]:
        columns, fires = self.columns, int(self.columns.fires[unit])
        firing = values[values > columns.level[unit]]
        facts = [
            ("density", f"{fires / columns.n_tokens:.3%}"),
            ("fires on", f"{fires:,} of {columns.n_tokens:,}"),
            ("largest", f"{columns.largest[unit]:.3g}"),
            ("mean where it fires", f"{firing.mean():.3g}" if fires else "–"),
        ]
        if columns.smallest[unit] < 0:
            facts.append(("smallest", f"{columns.smallest[unit]:.3g}"))
        if self.norms is not None:
            facts.append(("norm of its direction", f"{self.norms[unit]:.3g}"))
        if spreads is not None:
            facts.append(("largest effect", f"{spreads:.1f} spreads"))
        if scores is not None and self.labels is not None and fires:
            best = self.labels.table(scores, 1)[0]
            facts.append(("best label", f"{best['label']}, AUROC {best['auroc']:.3f}"))
        return tuple(facts)

    def _groups(
        self, unit: int, column: np.ndarray, tokens: np.ndarray, values: np.ndarray, high: list[int], low: list[int]
    ) -> list[ContextGroup]:
        from interp.plotting.latent_page import ContextGroup

        n, groups = self.options.n_contexts, []

        def add(section: str, title: str, note: str, rows: list[int]) -> None:
            groups.append(ContextGroup(section, title, note, tuple(self._context(row, column) for row in rows)))

        if high:
            add("Strongest", f"The {len(high[:n])} strongest contexts", "of equal ones the first only", high[:n])
        if low:
            fewer = low[: max(n // 2, 1)]
            add("Most negative", f"The {len(fewer)} most negative contexts", "", fewer)
        positive = values > 0
        found = bands(
            self._places, tokens[positive], values[positive],
            n_bands=_N_BANDS, n=_PER_BAND, seed=self.options.seed + unit,
        )  # fmt: skip
        for bottom, top, count, rows in found:
            share = f"{count:,} tokens, {count / max(int(positive.sum()), 1):.1%} of those above 0"
            if count:
                add("Bands of activation", f"{bottom:.3g} to {top:.3g}", f"{share}; drawn at random", rows)
        firing = [row for row in high[:_N_FACET] if column[row] > self.columns.level[unit]]
        section = f"Facets of the {len(firing)} strongest, by {self.options.facets}"
        for title, note, rows in self._facets(firing):
            add(section, title, note, rows[:_PER_FACET])
        return groups

    def _facets(self, rows: list[int]) -> list[tuple[str, str, list[int]]]:
        if not rows:
            return []
        kind, note = self.options.facets, ""
        if kind == "label" and self.labels is not None:
            found = label_facets(self.labels.truth, self.labels.names, rows)
        elif kind == "token":
            found = token_facets(self.ids, self._texts, rows)
        else:
            found, p = cluster_facets(self.rows.values, rows, seed=self.options.seed)
            note = f"; p of one cloud {p:.3g}{self._control(len(rows))}" if np.isfinite(p) else "; too few to divide"
        out = []
        for title, base, mine in found:
            share = f"{len(mine)} of {len(rows)}, {len(mine) / len(rows):.0%}{note}"
            known = f"; {base:.1%} of all tokens" if title and np.isfinite(base) else ""
            out.append((title if title else "others" if len(found) > 1 else "not divided", share + known, mine))
        return out

    def _control(self, n: int) -> str:
        """Whether as many tokens drawn at random divide as well: then a division says nothing about the unit."""
        if n not in self._controls:
            drawn = np.random.default_rng(self.options.seed).choice(self.columns.n_tokens, n, replace=False)
            parts, p = cluster_facets(self.rows.values, drawn.tolist(), seed=self.options.seed)
            self._controls[n] = f" (of as many tokens at random: {len(parts)} found, p {p:.3g})"
        return self._controls[n]

    def _context(self, row: int, column: np.ndarray) -> Context:
        from interp.plotting.latent_page import Context

        ids, rows, own = self._places.around(row)
        values = np.where(rows >= 0, column[rows.clip(min=0)], np.nan).astype(np.float32)
        where = f"document {self._places.row[row]}, position {self._places.position[row]}"
        return Context(tuple(self._texts[i] for i in ids.tolist()), values, own, where)

    def _effects(self, values: np.ndarray, ids: np.ndarray, spread: float) -> dict[Any, list[tuple[str, float, float]]]:
        texts, unit = self.texts(ids), spread or 1.0
        return {
            side: [(texts[int(i)], float(v), float(v) / unit) for v, i in zip(values[at], ids[at], strict=True)]
            for at, side in enumerate(("promoted", "suppressed"))
        }

    def _effects_note(self) -> str:
        if self.effects is None:
            return "Not known: no directions were given, or they are not written to the residual stream."
        median, high = self.effects.random
        return (
            f"Logits per unit of the direction at norm 1, before the final norm's division, less the mean over the "
            f"vocabulary; later layers are not in it. The largest effect of a random direction is {median:.1f} spreads "
            f"over the vocabulary (95 %: below {high:.1f}); spreads on hovering."
        )


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many values in each bin; those outside (a negative side too small to show) in the first."""
    if edges[-1] <= edges[0]:
        return np.zeros(len(edges) - 1, dtype=int)
    return np.histogram(values.astype(np.float64).clip(edges[0], edges[-1]), bins=edges)[0]
