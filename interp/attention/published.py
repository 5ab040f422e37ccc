"""Head scores that others published: reading their files, writing the same format, and comparing score with gate."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.attention._scoring import Mode, check_mode
from interp.attention.retrieval_result import RetrievalScores
from interp.results import Result, labelled
from interp.stats import correlation

if TYPE_CHECKING:
    import pandas as pd

_KEY = re.compile(r"^(\d+)-(\d+)$")


def read_head_scores(path: str | os.PathLike[str], *, mode: Mode = "official") -> RetrievalScores:
    """Retrieval scores from a file of Wu et al.: JSON, `{"layer-head": [score of every accepted sample]}`.

    The files do not say which prompt a score belongs to, nor what was rejected, so `recall` is NaN. A sample whose
    scores are 0 for every head is one whose needle the released locator did not find (or that no head pasted): see
    `all_zero_samples`.

    Args:
        mode: How the scores were counted; the released code's way.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty (the released script writes such a file when its gate rejects every sample), is not
            of this format, lacks a head, or heads differ in the number of samples.
    """
    check_mode(mode, 1)
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no head scores at {path}")
    text = path.read_text(encoding="utf-8")
    why_empty = "the released script leaves such a file when no sample passes its gate (ROUGE-1 recall above 50)"
    if not text.strip():
        raise ValueError(f"{path} is empty: {why_empty}")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected {{'layer-head': [score, ...]}} on one line") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; expected {{'layer-head': [score, ...]}}")
    if not data or not any(data.values()):
        raise ValueError(f"{path} has no scores: {why_empty}")
    table: dict[tuple[int, int], list[float]] = {}
    for key, scores in data.items():
        match = _KEY.match(key)
        numbers = isinstance(scores, list) and all(
            isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores
        )
        if match is None or not numbers:
            shown = str(scores)[:40]
            raise ValueError(f"{path}: {key!r}: {shown} is not a head's scores; expected 'layer-head': [score, ...]")
        table[int(match[1]), int(match[2])] = [float(score) for score in scores]
    layers, heads = 1 + max(layer for layer, _ in table), 1 + max(head for _, head in table)
    if missing := [(a, b) for a in range(layers) for b in range(heads) if (a, b) not in table]:
        raise ValueError(
            f"{path} has {len(table)} heads, but {layers} layers of {heads} heads would be {layers * heads}; "
            f"missing: {', '.join(f'{a}-{b}' for a, b in missing[:5])}"
        )
    sizes = {len(scores) for scores in table.values()}
    if len(sizes) > 1:
        odd = min(table, key=lambda head: len(table[head]))
        raise ValueError(
            f"{path}: heads have {min(sizes)} to {max(sizes)} samples ({odd[0]}-{odd[1]} has {len(table[odd])}); "
            f"expected one score per head and sample. Was the file written by an interrupted run?"
        )
    values = np.array([[table[a, b] for b in range(heads)] for a in range(layers)])
    if not np.isfinite(values).all() or values.min() < 0:
        raise ValueError(f"{path} holds scores from {values.min()} to {values.max()}; expected finite ones, 0 or more")
    n = values.shape[-1]
    coords = {"layer": range(layers), "head": range(heads), "example": range(n)}
    return RetrievalScores(
        values=labelled(values, ("layer", "head", "example"), coords, unit="retrieval score (published)"),
        provenance={"method": "read_head_scores", "file": path.name, "model": path.stem, "mode": mode, "samples": n},
        recall=labelled(np.full(n, np.nan), ("sample",), {"sample": range(n)}, unit="answer recall"),
        mode=mode,
    )


def write_head_scores(scores: RetrievalScores, path: str | os.PathLike[str]) -> Path:
    """Write scores in the format of Wu et al., for their scripts and others that read it. Returns the path."""
    path = Path(path)
    values = scores.values.transpose("layer", "head", "example")
    # through repr of float32, so that 0.1 is not written as 0.10000000149
    table = {
        f"{layer}-{head}": [float(str(value)) for value in values.sel(layer=layer, head=head).values]
        for layer in values["layer"].values
        for head in values["head"].values
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table) + "\n", encoding="utf-8")
    return path


def all_zero_samples(scores: RetrievalScores) -> list[int]:
    """Examples on which no head pasted anything, although they were accepted: in published files, lost needles."""
    silent = (scores.values == 0).all(["layer", "head"])
    return [int(i) for i in scores.values["example"].values[silent.values]]


@dataclass(frozen=True, eq=False, repr=False)
class HeadGates(Result):
    """Share of full attention that DuoAttention learned for every key-value head; `values` has (layer, kv_head)."""

    def share_above(self, gate: float | int = 0.5) -> float:
        """Share of key-value heads whose gate is above this."""
        return float((self.values > gate).mean())

    def plot(self) -> Any:
        """Map of gates over layer and key-value head."""
        from interp.plotting import layer_head

        return layer_head(
            self.values, title="Full-attention gate by layer and head", unit="gate", signed=False, limit=1
        )


def read_gates(path: str | os.PathLike[str]) -> HeadGates:
    """Gates of DuoAttention's `full_attention_heads.tsv`: one row per layer, one column per key-value head.

    Gates are as learned, a little below 0 or above 1 at times.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is empty, ragged, or holds something else than numbers.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no gates at {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty; expected a row of gates for each layer, separated by tabs")
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append([float(cell) for cell in line.split("\t")])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; expected numbers separated by tabs") from None
    if len({len(row) for row in rows}) > 1:
        raise ValueError(
            f"{path}: layers have {sorted({len(row) for row in rows})} heads; expected the same number in every row"
        )
    values = np.array(rows)
    if not np.isfinite(values).all():
        raise ValueError(f"{path} holds gates that are not finite numbers")
    coords = {"layer": range(values.shape[0]), "kv_head": range(values.shape[1])}
    return HeadGates(
        values=labelled(values, ("layer", "kv_head"), coords, unit="gate"),
        provenance={"method": "read_gates", "file": path.name, "model": path.stem},
    )


def compare_scores(
    scores: RetrievalScores,
    other: RetrievalScores | HeadGates,
    *,
    top: Sequence[int] = (10, 30, 50, 100),
    gate: float | int = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    """Do two models, or two methods, find the same heads?

    One row per statistic: Pearson and Spearman correlation of the mean scores over heads, with bootstrap bounds; then
    for each k, the share of the k best heads that are among the other's k best, or, next to gates, whose gate is above
    `gate` (`base`: that share over all heads). With grouped gates a head has the gate of its key-value head, and
    correlations are over groups, a group scoring as much as the best of its heads.

    Raises:
        ValueError: If the two do not have the same layers and heads.
    """
    import pandas as pd

    mean = scores.mean().transpose("layer", "head").values
    theirs, grouped = _on_heads(other, mean.shape)
    a, b = mean, theirs
    if grouped > 1:
        a = mean.reshape(len(mean), -1, grouped).max(-1)
        b = theirs[:, ::grouped]
    rows: list[dict[str, Any]] = []
    for kind in ("pearson", "spearman"):
        found = correlation(a, b, kind=kind, seed=seed)
        rows.append({"statistic": kind, "value": found.estimate, "low": found.low, "high": found.high})
    order = np.argsort(-mean, axis=None, kind="stable")
    far = np.argsort(-theirs, axis=None, kind="stable")
    for k in (k for k in top if k <= mean.size):
        if isinstance(other, HeadGates):
            share, base = float((theirs.ravel()[order[:k]] > gate).mean()), float((theirs > gate).mean())
            rows.append({"statistic": f"top {k} with gate above {gate:g}", "value": share, "base": base})
        else:
            share = len(set(order[:k]) & set(far[:k])) / k
            rows.append({"statistic": f"top {k} shared", "value": share, "base": k / mean.size})
    return pd.DataFrame(rows)


def _on_heads(other: RetrievalScores | HeadGates, shape: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """The other's values on every head, and how many heads share one of them."""
    if isinstance(other, RetrievalScores):
        values: xr.DataArray = other.mean().transpose("layer", "head")
    else:
        values = other.values.transpose("layer", "kv_head")
    if values.shape[0] != shape[0] or shape[1] % values.shape[1]:
        raise ValueError(
            f"{shape[0]} layers of {shape[1]} heads cannot be compared with {values.shape[0]} layers of "
            f"{values.shape[1]}; both must be of models of one shape"
        )
    if isinstance(other, RetrievalScores) and values.shape != shape:
        raise ValueError(f"scores of {shape} and {values.shape} heads; both must be of models of one shape")
    group = shape[1] // values.shape[1]
    return np.repeat(values.values, group, axis=1), group
