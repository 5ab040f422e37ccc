"""How long a prefix does an induction head match? Its attention to what followed, by the length of the match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.attention._prefix_sequences import CONDITIONS, PrefixSequences, prefix_sequences
from interp.attention.classic import attention_between
from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.results import Result, labelled
from interp.stats import bootstrap_interval, max_statistic

if TYPE_CHECKING:
    import pandas as pd

SCORES = ("induction", "corrupted", "unmatched", "competing", "rival")
DIFFERENCES = {"drop": ("induction", "corrupted"), "preference": ("competing", "rival")}


@dataclass(frozen=True, eq=False, repr=False)
class PrefixInduction(Result):
    """Attention of every head from the last word of a match to the word that followed it before, by the match's length.

    `values` has the dimensions (score, length, layer, head, example), in units of attention weight; NaN where there is
    nothing to measure and in layers that were left out. `"induction"`: to the answer. `"corrupted"`: the same place
    when of the match only its last word is left. `"unmatched"`: the same place when that is not there either, which is
    what the place alone gets. `"competing"` and `"rival"`: to the answer, and to the word after another occurrence of
    the last word, in sequences that hold both.

    Attributes:
        logits: (condition, length, example): logit of the answer minus that of the foil at the end, the model's own use
            of the match.
        chance: (length), attention of a head that looks everywhere alike.
    """

    logits: xr.DataArray
    chance: xr.DataArray

    def score(self, name: str) -> xr.DataArray:
        """One score, (length, layer, head, example); also `"drop"` (induction - corrupted) and `"preference"`
        (competing - rival: above 0, the head tells the longer match from the shorter)."""
        known = [*map(str, self.values["score"].values), *DIFFERENCES]
        if name not in known:
            raise KeyError(f"no score {name!r}; there is {', '.join(map(repr, known))}")
        if name in DIFFERENCES:
            above, below = DIFFERENCES[name]
            return self.values.sel(score=above, drop=True) - self.values.sel(score=below, drop=True)
        return self.values.sel(score=name, drop=True)

    def interval(self, name: str = "induction", level: float = 0.95, *, seed: int = 0) -> xr.Dataset:
        """Mean of a score over examples with its bootstrap interval, (length, layer, head)."""
        values = self.score(name).transpose(..., "example")
        found = bootstrap_interval(values.values, confidence=level, seed=seed)
        like = values.isel(example=0, drop=True)
        return xr.Dataset({bound: like.copy(data=array.astype(np.float32)) for bound, array in found._asdict().items()})

    def table(self, *, short: int | None = None, long: int | None = None, level: float = 0.95) -> pd.DataFrame:
        """One row per head, largest gain first: `induction` at the shortest match (`short`) and the longest (`long`),
        their paired difference `gain` with its interval and p-value (sign flips, corrected for the number of heads;
        two-sided), and, at the longest, `corrupted`, `unmatched` and `preference` with its interval.

        Args:
            short, long: Other lengths to compare.
        """
        import pandas as pd

        lengths = [int(length) for length in self.values["length"].values]
        a, b = (lengths[0] if short is None else short), (lengths[-1] if long is None else long)
        if a not in lengths or b not in lengths or a == b:
            raise ValueError(f"short={a}, long={b}; expected two different ones of {', '.join(map(str, lengths))}")
        measured = self.score("induction")
        gain = (measured.sel(length=b, drop=True) - measured.sel(length=a, drop=True)).transpose(..., "example")
        bounds = bootstrap_interval(gain.values, confidence=level)
        p = max_statistic(gain.values).p_value
        preference = self.interval("preference", level).sel(length=b)
        mean = self.values.mean("example")
        rows = []
        for i, layer in enumerate(map(int, gain["layer"].values)):
            for j, head in enumerate(map(int, gain["head"].values)):
                here = mean.isel(layer=i, head=j)
                row: dict[str, Any] = {"name": f"L{layer}H{head}", "layer": layer, "head": head}
                row |= {"short": float(here.sel(score="induction", length=a))}
                row |= {"long": float(here.sel(score="induction", length=b))}
                row |= {"gain": bounds.estimate[i, j], "low": bounds.low[i, j], "high": bounds.high[i, j]}
                row |= {"p": p[i, j]}
                row |= {name: float(here.sel(score=name, length=b)) for name in ("corrupted", "unmatched")}
                row |= {
                    name: float(preference[bound].isel(layer=i, head=j))
                    for name, bound in (("preference", "estimate"), ("pref_low", "low"), ("pref_high", "high"))
                }
                rows.append(row)
        frame = pd.DataFrame(rows).dropna(subset=["gain"])
        return frame.sort_values("gain", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self, name: str = "induction", *, heads: Sequence[str] | None = None, k: int = 5) -> Any:
        """Figure: a score by length of the match with intervals over examples, a line for each head.

        Args:
            heads: Names such as `"L1H4"`; by default the `k` with the largest score at any length.
        """
        from interp.plotting import lines

        found = self.interval(name)
        frame = found.to_dataframe().reset_index().dropna(subset=["estimate"])
        frame["name"] = [f"L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
        if heads is None:
            best = frame.sort_values("estimate", ascending=False).drop_duplicates("name")
            heads = [str(name) for name in best["name"].iloc[:k]]
        if missing := sorted(set(heads) - set(frame["name"])):
            raise KeyError(f"no heads {missing} with a score {name!r}; names are such as {frame['name'].iloc[0]!r}")
        shown = frame.loc[frame["name"].isin(list(heads)).to_numpy()].rename(
            columns={"name": "head name", "head": "number"}
        )
        order = {head: i for i, head in enumerate(heads)}
        shown = shown.assign(order=shown["head name"].map(order)).sort_values(["order", "length"], kind="stable")
        titles = {"induction": "Attention to what followed the match", "preference": "Longer match minus shorter match"}
        chance = float(self.chance.mean()) if name not in DIFFERENCES else 0.0
        return lines(
            shown.rename(columns={"head name": "head"}), x="length", y="estimate", group="head",
            interval=("low", "high"), title=titles.get(name, f"Attention: {name}"), unit="attention weight",
            x_title="matching words before the answer's place", reference=chance,
        )  # fmt: skip


def prefix_induction(
    bridge: Any,
    sequences: PrefixSequences | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> PrefixInduction:
    """The induction score of every head as a function of how many words match.

    A head that looks for what followed the last word alone scores at every length and, of two earlier occurrences,
    cannot tell the one that matches longer; a long-prefix head scores when more words match, prefers the longer match
    to its rival and loses the place when the words before the last one are corrupted.

    Costs two forwards of the examples per length and condition (four conditions in form `"random"`, three in `"list"`):
    48 in all by default, one of each two only up to the last layer asked for.

    Args:
        sequences: What `prefix_sequences` made; by default what it makes for this model.
        layers: Layers to score, all by default.
        batch_size: Examples per forward; 64 by default.

    Raises:
        ValueError: If the model's patterns cannot be read, or the sequences do not fit it.
        RuntimeError: If the model is in training mode.

    Source:
        Kissane et al. 2024 (arXiv:2406.17759), long-prefix induction: GPT-2 small's head 5.1 goes from below .3 to
        above .7 as the prefix grows and from .55 to .05 when it is corrupted; 5.5 has about .7 for short ones and keeps
        .43. Their corruption is on text, ours on random words; the rival, the unmatched place, and the pairing of
        lengths within an example are ours.
    """
    require_eval(bridge)
    made = prefix_sequences(bridge) if sequences is None else sequences
    n, lengths, size = len(made), made.lengths, batch_size or 64
    n_layers, n_heads = int(bridge.cfg.n_layers), int(bridge.cfg.n_heads)
    values = np.full((len(SCORES), len(lengths), n_layers, n_heads, n), np.nan)
    logits = np.full((len(CONDITIONS), len(lengths), n), np.nan)
    for c, condition in enumerate(CONDITIONS):
        name = "induction" if condition == "intact" else condition
        for j, length in enumerate(lengths):
            tokens = made.tokens.get(condition, {}).get(length)
            if tokens is None:
                continue
            places = {"answer": made.source[length]}
            if condition == "competing" and made.rival is not None:
                places["rival"] = made.rival
            query = torch.full((n,), tokens.shape[1] - 1)
            found = attention_between(bridge, tokens, query, places, layers=layers, batch_size=size).values
            values[SCORES.index(name), j] = found.sel(score="answer").values
            if "rival" in places:
                values[SCORES.index("rival"), j] = found.sel(score="rival").values
            logits[c, j] = _difference(bridge, tokens, made.answers(length), made.foils[length], size)
    coords = {"score": SCORES, "length": lengths, "layer": range(n_layers), "head": range(n_heads), "example": range(n)}
    keys = [made.tokens["intact"][length].shape[1] for length in lengths]
    record = provenance(
        bridge, method="prefix_induction", form=made.form, lengths=list(lengths), corrupt=made.corrupt, seed=made.seed,
        n_examples=n, n_positions=max(keys),
        cost={"forwards": 2 * sum(len(by) for by in made.tokens.values()), "examples": n},
    )  # fmt: skip
    axes = {"condition": CONDITIONS, "length": lengths, "example": range(n)}
    return PrefixInduction(
        labelled(values, tuple(coords), {name: list(at) for name, at in coords.items()}, unit="attention weight"),
        record,
        labelled(logits, tuple(axes), {name: list(at) for name, at in axes.items()}, unit="logits, answer - foil"),
        labelled(1 / np.array(keys), ("length",), {"length": list(lengths)}, unit="attention weight"),
    )


@torch.no_grad()
def _difference(bridge: Any, tokens: Tensor, answers: Tensor, foils: Tensor, size: int) -> np.ndarray:
    """Logit of the answer minus that of the foil at the last position."""
    device, parts = device_of(bridge), []
    for start in range(0, len(tokens), size):
        last = bridge(tokens[start : start + size].to(device))[:, -1].float().cpu()
        ids = torch.stack([answers, foils], 1)[start : start + size]
        picked = last.gather(1, ids)
        parts.append(picked[:, 0] - picked[:, 1])
    return torch.cat(parts).numpy()
