"""How many unrelated things does an attention head do? The labels of the latents that its slice of the decoder serves,
counted by group, beside the same latents dealt out at random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.dictionaries._head_reading import head_layer, head_shape
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.firing_labels import FiringLabels, groups_of
from interp.dictionaries.head_attribution import head_weights
from interp.dictionaries.rows import TokenRows
from interp.models import provenance
from interp.results import Result, labelled
from interp.stats import adjust_p_values

if TYPE_CHECKING:
    import pandas as pd

Choice = Literal["weight", "largest"]
Null = Literal["shuffled", "rotated"]
QUANTITIES = ("labelled", "groups", "effective")
_ENCODED = 4096  # rows at a time


@dataclass(frozen=True, eq=False, repr=False)
class HeadPolysemanticity(Result):
    """Groups of labels that each head's latents serve.

    `values` has the dimensions (quantity, head): `"labelled"`, how many of the head's latents fire on a label;
    `"groups"`, of how many different groups those labels are; `"effective"`, exp of the entropy of the groups, which a
    single stray latent moves less. NaN effective where nothing is labelled.

    Attributes:
        low, high: (quantity, head), bounds over resampled documents, labels as chosen.
        null: (null, quantity, draw, head). `"shuffled"`: the labels of all heads' labelled latents dealt anew, so that
            every head keeps its number of them. `"rotated"`: the decoder seen through random subspaces of the size of
            heads instead of the heads (all coordinates of z turned by one random rotation).
        latents: (head, rank), the head's latents, strongest first; -1 where there are fewer.
        shares: (head, rank), the head's share of each.
        labels: For each latent of `latents`: `latent`, `label`, `group` (None where none was found), `precision`,
            `base_rate`, `fires`.
    """

    low: xr.DataArray
    high: xr.DataArray
    null: xr.DataArray
    latents: xr.DataArray
    shares: xr.DataArray
    labels: list[dict[str, Any]]

    def served(self, head: int) -> pd.DataFrame:
        """The latents of one head, strongest first: columns `rank, share, latent, label, group, precision, base_rate,
        fires`."""
        import pandas as pd

        known = {row["latent"]: row for row in self.labels}
        ids, shares = self.latents.sel(head=head).values, self.shares.sel(head=head).values
        pairs = zip(ids.tolist(), shares.tolist(), strict=True)
        rows = [{"rank": i, "share": share, **known[latent]} for i, (latent, share) in enumerate(pairs) if latent >= 0]
        return pd.DataFrame(rows)

    def p_values(self, quantity: str = "groups", null: Null = "shuffled") -> xr.DataArray:
        """(alternative, head): how often a draw of the null has as few, or as many, as the head; not corrected.

        `(hits + 1) / (draws + 1)`; NaN for heads without a labelled latent. Draws without a labelled latent do not
        count.
        """
        mine = self.values.sel(quantity=quantity).values
        drawn = self.null.sel(null=null, quantity=quantity).values  # [draw, head]
        n = (~np.isnan(drawn)).sum(0)
        out = np.stack([((drawn <= mine + 1e-6).sum(0) + 1) / (n + 1), ((drawn >= mine - 1e-6).sum(0) + 1) / (n + 1)])
        out[:, self.values.sel(quantity="labelled").values == 0] = np.nan
        coords = {"alternative": ["fewer", "more"], "head": self.values["head"].values}
        return labelled(out, ("alternative", "head"), coords)

    def overall(self, quantity: str = "groups") -> pd.DataFrame:
        """The mean over heads beside that of each null: columns `null, value, expected, low, high` (95 % of draws),
        `p_fewer, p_more`. Heads without a labelled latent have no effective number and are left out of its mean."""
        import pandas as pd

        mine, rows = float(self.values.sel(quantity=quantity).mean()), []
        for name in map(str, self.null["null"].values):
            drawn = self.null.sel(null=name, quantity=quantity).mean("head").dropna("draw").values
            low, high = np.quantile(drawn, [0.025, 0.975])
            row = {"null": name, "value": mine, "expected": float(drawn.mean()), "low": low, "high": high}
            row["p_fewer"] = ((drawn <= mine + 1e-6).sum() + 1) / (len(drawn) + 1)
            rows.append(row | {"p_more": ((drawn >= mine - 1e-6).sum() + 1) / (len(drawn) + 1)})
        return pd.DataFrame(rows)

    def polysemantic(self, least: int = 2) -> float:
        """Share of the heads with at least `least` labelled latents that serve two groups or more."""
        counts = self.values.sel(quantity="labelled").values >= least
        if not counts.any():
            raise ValueError(f"no head has {least} labelled latents; they have at most "
                             f"{int(self.values.sel(quantity='labelled').max())}")  # fmt: skip
        return float((self.values.sel(quantity="groups").values[counts] >= 2).mean())

    def summary(self, null: Null = "shuffled") -> pd.DataFrame:
        """One row per head: `labelled`, `groups` with its interval over documents, `effective`, what the null expects
        of either (`null_groups`, `null_effective`), p-values of fewer and more groups, Holm-corrected over heads and
        both alternatives, and the groups with their numbers of latents."""
        import pandas as pd

        p = self.p_values("groups", null)
        corrected = adjust_p_values(p.values)
        expected = self.null.sel(null=null).mean("draw")
        rows = []
        for i, head in enumerate(map(int, self.values["head"].values)):
            here = self.values.sel(head=head)
            row: dict[str, Any] = {"head": head, "labelled": int(here.sel(quantity="labelled"))}
            row |= {"groups": int(here.sel(quantity="groups"))}
            row |= {"low": float(self.low.sel(quantity="groups", head=head))}
            row |= {"high": float(self.high.sel(quantity="groups", head=head))}
            row |= {"effective": float(here.sel(quantity="effective"))}
            row |= {f"null_{name}": float(expected.sel(quantity=name, head=head)) for name in ("groups", "effective")}
            row |= {"p_fewer": corrected[0, i], "p_more": corrected[1, i]}
            served = self.served(head)["group"].dropna().value_counts() if row["labelled"] else {}
            row["which"] = ", ".join(f"{group} {count}" for group, count in dict(served).items())
            rows.append(row)
        return pd.DataFrame(rows)

    def plot(self, quantity: str = "groups") -> Any:
        """Figure: the number of groups by head with intervals over documents, beside 95 % of the draws of each null."""
        import pandas as pd

        from interp.plotting import bars

        rows = []
        for head in map(int, self.values["head"].values):
            cell = {"quantity": quantity, "head": head}
            value = float(self.values.sel(cell))
            rows.append((f"H{head}", "heads", value, *sorted(float(b.sel(cell)) for b in (self.low, self.high))))
            for name in map(str, self.null["null"].values):
                drawn = self.null.sel(null=name, **cell).dropna("draw").values
                if len(drawn):
                    rows.append((f"H{head}", name, drawn.mean(), *np.quantile(drawn, [0.025, 0.975])))
        frame = pd.DataFrame(rows, columns=["head", "kind", "value", "low", "high"]).dropna()
        frame["low"], frame["high"] = frame[["low", "value"]].min(axis=1), frame[["high", "value"]].max(axis=1)
        unit = {"groups": "unrelated groups", "effective": "effective number of groups"}.get(quantity, quantity)
        return bars(
            frame, x="head", group="kind", interval=("low", "high"), title="Groups of labels that a head serves",
            unit=unit, x_title="head (nulls: mean and 95 % of draws)",
        )  # fmt: skip


@torch.no_grad()
def head_polysemanticity(
    bridge: Any,
    dictionary: Dictionary,
    rows: TokenRows,
    labels: Mapping[str, Tensor],
    *,
    n: int = 10,
    choose: Choice = "weight",
    groups: Mapping[str, str] | None = None,
    precision: float | int = 0.5,
    lift: float | int = 2.0,
    min_fires: int = 10,
    n_draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> HeadPolysemanticity:
    """How many unrelated groups of labels each head's latents serve, and how many they would by chance. No forward.

    A head's latents are the `n` that fire at all with the largest share of their decoder's norms in it (`"weight"`), or
    those of which it has the largest share of all heads, at most `n` (`"largest"`, in which no latent is of two heads).
    Each has the label that it fires on, if any (`label_latents`: chosen on half of the documents, scored on the rest).
    Labels of one group count once.

    A head with ten latents serves several groups by mere chance, so the count is set beside two nulls. Shuffled labels
    keep each head's number of labelled latents and ask whether heads sort latents by what they are about at all (fewer
    groups than the null), or spread them. Rotated coordinates keep every latent, its label and the angles between
    decoder rows, and ask whether *heads* do better than other subspaces of their size; how many labelled latents a
    subspace gets is free there, so read `"labelled"` beside `"groups"`. (Random latents would not do for a null: few of
    them have a label.)

    Args:
        dictionary: It reads and rebuilds `hook_z` flattened over heads.
        rows: Activations there, see `token_rows`.
        labels: Truth about the rows, see `label_masks`.
        groups: `{label: group}`; by default `label_groups(labels)`. Labels that it lacks are groups of their own.
        precision, lift, min_fires: When a latent has its label, see `label_latents`.
        n_draws: Of either null, and of the documents.
        level: Of the interval over documents.

    Raises:
        ValueError: If rows, labels or dictionary do not fit, or no latent of any head has a label.

    Source:
        Kissane et al. 2024 (arXiv:2406.17759), polysemantic heads: of GPT-2 small's 144 heads a person called 14
        candidates for a single task after reading ten latents each, so "at least 90 %" polysemantic. There was no null
        and no second reader; here labels are true, and one reading is a count.
    """
    if rows.hook != dictionary.hook:
        raise ValueError(f"the dictionary reads {dictionary.hook!r} and the rows are of {rows.hook!r}; make them with "
                         f"token_rows(bridge, tokens, {dictionary.hook!r})")  # fmt: skip
    if choose not in get_args(Choice) or n < 1 or n_draws < 1:
        raise ValueError(f'choose={choose!r}, n={n}, n_draws={n_draws}; expected "weight" or "largest", and 1 or more')
    weights = np.nan_to_num(head_weights(bridge, dictionary).values.values)
    acts = torch.cat([dictionary.encode(part).cpu() for part in rows.values.split(_ENCODED)])
    scored = FiringLabels(acts, labels, rows.row, precision=precision, lift=lift, min_fires=min_fires)
    alive = (acts != 0).any(0).numpy()
    names = groups_of(scored.names, groups, labels)
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    of_label = np.array([numbers[name] for name in names])
    kind = of_label[scored.label.clamp(min=0).numpy()]  # [latent], the group of its chosen label
    found = scored.found()
    chosen = _latents_of(weights, alive, n, choose)
    if not found[np.unique(chosen[chosen >= 0])].any():
        raise ValueError(f"none of the {len(np.unique(chosen[chosen >= 0]))} latents of these heads has a label with "
                         f"precision={precision}, lift={lift}, min_fires={min_fires}; see label_latents")  # fmt: skip
    values = _counts(chosen, kind, found)
    drawn = np.stack([_counts(chosen, kind, kept) for kept in scored.draws(n_draws, seed)])
    tail = [(1 - level) / 2, (1 + level) / 2]
    bounds = np.stack([_quantiles(drawn[:, i], tail) for i in range(len(QUANTITIES))], 1)
    rng = np.random.default_rng(seed)
    rotated = _rotated(bridge, dictionary, alive, n, choose, n_draws, rng)
    null = np.stack([
        np.stack([_counts(chosen, _shuffled(chosen, kind, found, rng), found) for _ in range(n_draws)]),
        np.stack([_counts(other, kind, found) for other in rotated]),
    ]).transpose(0, 2, 1, 3)  # fmt: skip
    heads, table = list(range(weights.shape[1])), scored.columns()
    entries = [
        {
            "latent": int(i), "label": scored.names[int(scored.label[i])] if found[i] else None,
            "group": names[int(scored.label[i])] if found[i] else None, "precision": float(table["precision"][i]),
            "base_rate": float(table["base_rate"][i]), "fires": int(table["fires"][i]),
        }
        for i in np.unique(chosen[chosen >= 0])
    ]  # fmt: skip
    record = provenance(
        bridge, method="head_polysemanticity", hook=dictionary.hook, n=n, choose=choose, seed=seed, n_draws=n_draws,
        precision=precision, lift=lift, min_fires=min_fires, level=level,
        groups=dict(zip(scored.names, names, strict=True)), n_tokens=len(rows), alive=int(alive.sum()),
        with_label=int(found.sum()), dictionary=dictionary.settings(),
    )  # fmt: skip
    axes = {"quantity": list(QUANTITIES), "head": heads}
    ranks = {"head": heads, "rank": range(chosen.shape[1])}
    shares = np.where(chosen >= 0, np.take_along_axis(weights.T, np.maximum(chosen, 0), 1), np.nan)
    return HeadPolysemanticity(
        labelled(values, tuple(axes), axes, unit="count"),
        record,
        labelled(bounds[0], tuple(axes), axes, unit="count"),
        labelled(bounds[1], tuple(axes), axes, unit="count"),
        labelled(null, ("null", "quantity", "draw", "head"), {"null": list(get_args(Null)), **axes}, unit="count"),
        xr.DataArray(chosen, dims=("head", "rank"), coords=ranks),
        labelled(shares, ("head", "rank"), ranks, unit="share"),
        entries,
    )


def _latents_of(weights: np.ndarray, alive: np.ndarray, n: int, choose: str) -> np.ndarray:
    """[head, rank], latents by share of the head, -1 behind the last."""
    allowed = np.repeat(alive[:, None], weights.shape[1], 1)
    if choose == "largest":
        allowed &= weights.argmax(1)[:, None] == np.arange(weights.shape[1])
    order = np.argsort(-np.where(allowed, weights, -1.0), axis=0, kind="stable")[:n].T
    return np.where(np.take_along_axis(allowed.T, order, 1), order, -1)


def _counts(chosen: np.ndarray, kind: np.ndarray, found: np.ndarray) -> np.ndarray:
    """[quantity, head]: labelled latents, groups, exp of the entropy of the groups."""
    has = (chosen >= 0) & found[np.maximum(chosen, 0)]
    table = np.zeros((len(chosen), int(kind.max()) + 1))
    np.add.at(table, (np.nonzero(has)[0], kind[chosen[has]]), 1)
    total = table.sum(1)
    share = table / np.maximum(total, 1)[:, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1))).sum(1)
    return np.stack([total, (table > 0).sum(1), np.where(total > 0, np.exp(entropy), np.nan)])


def _shuffled(chosen: np.ndarray, kind: np.ndarray, found: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The groups of all heads' labelled latents, dealt to the same latents anew."""
    pool = np.unique(chosen[chosen >= 0])
    pool = pool[found[pool]]
    new = kind.copy()
    new[pool] = kind[rng.permutation(pool)]
    return new


def _rotated(
    bridge: Any, dictionary: Dictionary, alive: np.ndarray, n: int, choose: str, n_draws: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """What `_latents_of` gives where random subspaces, as wide as heads, stand in their place."""
    shape = head_shape(bridge, head_layer(bridge, dictionary))
    rows, found = dictionary.directions().detach().cpu().double().numpy(), []
    for _ in range(n_draws):
        q, r = np.linalg.qr(rng.standard_normal((rows.shape[1],) * 2))
        turned = rows @ (q * np.sign(np.diagonal(r)))  # uniform over rotations (Mezzadri 2007)
        norms = np.linalg.norm(turned.reshape(len(rows), *shape), axis=2)
        found.append(_latents_of(norms / np.maximum(norms.sum(1, keepdims=True), 1e-30), alive, n, choose))
    return found


def _quantiles(drawn: np.ndarray, tail: list[float]) -> np.ndarray:
    """[bound, head]; NaN for heads that no draw measured."""
    out = np.full((2, drawn.shape[1]), np.nan)
    measured = ~np.isnan(drawn).all(0)
    out[:, measured] = np.nanquantile(drawn[:, measured], tail, axis=0)
    return out
