"""How well a unit tells tokens with a label from tokens without: every label at once, from the entries of the unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import sparse
from scipy.stats import norm
from torch import Tensor

from interp.dictionaries.rows import TokenRows, mask_matrix


class LabelScores:
    """AUROC of units for labels on every second document, with intervals; labels are ranked on the other documents.

    The ranking is by correlation, the halves are those of `label_features`, so that the first label is the one that it
    chooses, and its AUROC the same. Intervals are AUROC +- z standard errors, the error being that of whole documents
    (Obuchowski 1997: tokens of a document are not independent), cut at 0 and 1.
    """

    def __init__(self, rows: TokenRows, labels: Mapping[str, Tensor], level: float) -> None:
        self.names = list(labels)
        self.truth = mask_matrix(labels, len(rows)).numpy()
        _, order = np.unique(rows.row.numpy(), return_inverse=True)
        if order.max() < 3:
            raise ValueError(f"the rows are of {order.max() + 1} documents; scoring labels needs at least 4: one half "
                             f"ranks the labels, the other scores them")  # fmt: skip
        self._scored = order % 2 == 1
        self._place = np.cumsum(self._scored) - 1  # of a row among those that are scored
        self._n_choosing = int((~self._scored).sum())
        half = self.truth[~self._scored].astype(np.float64)
        self._choosing_mean = half.mean(0)
        self._choosing_sd = half.std(0)
        self._truth = self.truth[self._scored]
        documents, self._document = np.unique(order[self._scored], return_inverse=True)
        self._n_documents = len(documents)
        self._positive = self._by_document(self._document, self._truth)  # [document, label]
        self._negative = self._by_document(self._document, ~self._truth)
        self._z = float(norm.ppf((1 + level) / 2))

    def of(self, tokens: np.ndarray, values: np.ndarray, level: float) -> dict[str, np.ndarray]:
        """Per label: `correlation` on the choosing half; on the other `auroc`, `low`, `high`, `share` (of the label
        among tokens where the unit fires), `base` (among all) and `recall`. NaN where there is nothing to tell."""
        here = self._scored[tokens]
        scores = self._auroc(self._place[tokens[here]], values[here])
        firing = self._truth[self._place[tokens[here & (values > level)]]]
        positive = self._positive.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            scores["share"] = firing.sum(0) / len(firing) if len(firing) else np.full(len(self.names), np.nan)
            scores["recall"] = np.where(positive > 0, firing.sum(0) / positive, np.nan)
        scores["base"] = positive / len(self._truth)
        return {"correlation": self._correlation(tokens[~here], values[~here].astype(np.float64)), **scores}

    def table(self, found: dict[str, np.ndarray], k: int) -> list[dict[str, Any]]:
        """The `k` labels that go best with the unit, best first."""
        order = np.argsort(-np.nan_to_num(found["correlation"], nan=-2.0), kind="stable")[:k]
        return [{"label": self.names[i], **{name: float(some[i]) for name, some in found.items()}} for i in order]

    def _correlation(self, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
        n = self._n_choosing
        mean, square = values.sum() / n, np.square(values).sum() / n
        spread = np.sqrt(max(square - mean**2, 0.0))
        covariance = values @ self.truth[tokens] / n - mean * self._choosing_mean
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where((spread > 0) & (self._choosing_sd > 0), covariance / (spread * self._choosing_sd), np.nan)

    def _auroc(self, places: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Only tokens that are not zero are looked at one by one; all others are one run of ties."""
        levels, group = np.unique(np.append(values, np.float32(0)), return_inverse=True)
        zero, group = group[-1], group[:-1]
        truth, document = self._truth[places], self._document[places]
        # tokens at zero, by document
        off = [
            total - self._by_document(document, some)
            for total, some in ((self._positive, truth), (self._negative, ~truth))
        ]
        counts = []  # [group, label]
        for rest, some in zip(off, (truth, ~truth), strict=True):
            found = _sums(group, len(levels), some)
            found[zero] += rest.sum(0)
            counts.append(found)
        positive, negative = counts
        m, n = positive.sum(0), negative.sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            below = (np.cumsum(negative, 0) - negative / 2) / n  # of a positive: share of negatives below it
            above = (m - np.cumsum(positive, 0) + positive / 2) / m  # of a negative: share of positives above it
            area = (positive * below).sum(0) / m
        return {"auroc": area, **self._interval(area, m, n, (truth, document, group, zero), off, (below, above))}

    def _interval(
        self, area: np.ndarray, m: np.ndarray, n: np.ndarray, on: Any, off: list[np.ndarray], parts: Any
    ) -> dict[str, np.ndarray]:
        """Obuchowski's clustered variance: sums over a document of what its tokens say, against their mean."""
        truth, document, group, zero = on
        below, above = parts
        with np.errstate(invalid="ignore", divide="ignore"):
            up = self._by_document(document, truth * below[group]) + off[0] * below[zero] - self._positive * area
            down = self._by_document(document, ~truth * above[group]) + off[1] * above[zero] - self._negative * area
            with_it, without = (self._positive > 0).sum(0), (self._negative > 0).sum(0)
            first = with_it / ((with_it - 1) * m**2) * np.square(up).sum(0)
            second = without / ((without - 1) * n**2) * np.square(down).sum(0)
            count = self._n_documents
            both = 2 * count / ((count - 1) * m * n) * (up * down).sum(0)
            error = self._z * np.sqrt((first + second + both).clip(min=0))
        return {"low": (area - error).clip(0, 1), "high": (area + error).clip(0, 1)}

    def _by_document(self, document: np.ndarray, some: np.ndarray) -> np.ndarray:
        return _sums(document, self._n_documents, some)


def _sums(place: np.ndarray, n: int, some: np.ndarray) -> np.ndarray:
    """Rows added up by place, [n, label]."""
    ones = sparse.csr_matrix((np.ones(len(place)), place, np.arange(len(place) + 1)), shape=(len(place), n))
    return ones.T @ some.astype(np.float64)
