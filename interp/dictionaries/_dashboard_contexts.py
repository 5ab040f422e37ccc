"""Contexts of one unit: the strongest, some of every band of activation, and facets of the strongest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from interp.dictionaries.rows import TokenRows
from interp.neurons._clusters import clusters

Facets = Literal["label", "token", "cluster"]
_TRIES = 40  # draws for each context that is wanted of a band, until as many different ones are found
_MOST = 6  # facets that are shown; what is left is one more


class Places:
    """Where rows stand, and what stands around them."""

    def __init__(self, rows: TokenRows, window: tuple[int, int]) -> None:
        self.row, self.position = rows.row.numpy(), rows.position.numpy()
        self.ids, self.tokens, self.window = rows.ids.numpy(), rows.tokens.numpy(), window
        self._number = np.full(self.tokens.shape, -1)  # of the row at a place
        self._number[self.row, self.position] = np.arange(len(rows))

    def number(self, row: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Rows at these places."""
        return self._number[row, position]

    def around(self, row: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Token ids of the window of a row, the rows that they are (-1 for none), and the place of its own. The window
        ends with a token that has a row: padding is not shown."""
        document, position = int(self.row[row]), int(self.position[row])
        first, last = max(0, position - self.window[0]), position + self.window[1]
        last = position + int((self._number[document, position : last + 1] >= 0).nonzero()[0].max())
        span = slice(first, last + 1)
        return self.tokens[document, span], self._number[document, span], position - first

    def before(self, row: int) -> bytes:
        """What a context is told apart by: its tokens up to its own."""
        ids, _, own = self.around(row)
        return ids[: own + 1].tobytes()

    def distinct(self, candidates: np.ndarray, n: int) -> list[int]:
        """The first `n` rows with different contexts."""
        found: dict[bytes, int] = {}
        for row in candidates.tolist():
            found.setdefault(self.before(row), row)
            if len(found) == n:
                break
        return list(found.values())


def bands(
    places: Places, tokens: np.ndarray, values: np.ndarray, *, n_bands: int, n: int, seed: int
) -> list[tuple[float, float, int, list[int]]]:
    """Equal bands of (0, largest activation], highest first: their ends, how many tokens they hold, and the rows of
    some drawn at random, largest first."""
    top = float(values.max(initial=0))
    found = []
    rng = np.random.default_rng(seed)
    for band in reversed(range(n_bands)):
        low, high = top * band / n_bands, top * (band + 1) / n_bands
        # the ends are compared as the activations are: in float32
        inside = np.flatnonzero((values > np.float32(low)) & (values <= np.float32(high)))
        drawn = rng.permutation(inside)[: n * _TRIES]
        chosen = set(places.distinct(tokens[drawn], n))
        order = np.array([i for i in drawn.tolist() if int(tokens[i]) in chosen], dtype=int)
        order = order[np.argsort(-values[order], kind="stable")]
        found.append((low, high, len(inside), tokens[order].tolist()))
    return found


def token_table(
    ids: np.ndarray, occurrences: np.ndarray, values: np.ndarray, k: int
) -> list[tuple[int, int, int, float, float]]:
    """Token ids by their share of the activation: `(id, on how many it fires, occurrences, mean, share)`."""
    different, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.bincount(place, values, len(different))
    order = np.argsort(-sums, kind="stable")[:k]
    whole = float(sums.sum()) or 1.0
    return [
        (int(token), int(count), int(occurrences[token]), float(total / count), float(total / whole))
        for token, count, total in zip(different[order], counts[order], sums[order], strict=True)
    ]


def label_facets(truth: np.ndarray, names: Sequence[str], rows: Sequence[int]) -> list[tuple[str, float, list[int]]]:
    """The rows divided by label: `(label, its share of all tokens, rows)`, every row once.

    Labels overlap, so they take turns: each takes, of the rows that are left, those that it has; first the label that
    adds most to how far the rows are from all tokens (count times the log of its share over that among all tokens). A
    label that is no commoner among the rows that are left than anywhere gets none. The last facet, without a label, is
    what is left.
    """
    base = truth.mean(0)
    left, found = np.array(rows, dtype=int), []
    while len(left) and len(found) < _MOST:
        count = truth[left].sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            gain = np.where(count > 0, count * np.log(count / len(left) / base), 0)
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        mine = truth[left, best]
        found.append((names[best], float(base[best]), left[mine].tolist()))
        left = left[~mine]
    return [*found, ("", 1.0, left.tolist())] if len(left) else found


def token_facets(
    ids: np.ndarray, strings: Mapping[int, str], rows: Sequence[int]
) -> list[tuple[str, float, list[int]]]:
    """The rows divided by their own token, commonest first: `(token, its share of all tokens, rows)`."""
    counts = Counter(ids[list(rows)].tolist())
    shares = np.bincount(ids) / len(ids)
    chosen = [token for token, _ in counts.most_common(_MOST)]
    found = [(strings[token], float(shares[token]), [r for r in rows if ids[r] == token]) for token in chosen]
    rest = [r for r in rows if ids[r] not in chosen]
    return [*found, ("", 1.0, rest)] if rest else found


def cluster_facets(
    values: Tensor, rows: Sequence[int], *, seed: int
) -> tuple[list[tuple[str, float, list[int]]], float]:
    """The rows divided by their activations (Ward, see `interp.neurons.facets`), and the p-value of one cloud."""
    vectors = values[list(rows)].detach().cpu().double()
    vectors = (vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-30)).numpy()
    if len(rows) < 10:
        return [("", 1.0, list(rows))], float("nan")
    found = clusters(vectors, max_k=_MOST, null="elliptical", n_null=39, alpha=0.05, seed=seed, sphere=True)
    parts = [[r for r, own in zip(rows, found.labels, strict=True) if own == label] for label in range(found.k)]
    return [(f"facet {label}", float("nan"), part) for label, part in enumerate(parts)], float(found.p_value)
