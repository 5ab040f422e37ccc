"""Which units tell one label from the others: average precision of every unit as a detector, against a null."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name
from interp.models import provenance, require_eval
from interp.neurons._ranking import Ranking, chance, chance_p, grouped_p, tied_p
from interp.prompts import Prompts
from interp.results import Result, labelled
from interp.stats import adjust_p_values

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

Side = Literal["high", "low"]
Neuron = tuple[int, int]
Labels = Sequence[Hashable] | Tensor | Mapping[str, Any]


@dataclass(frozen=True, eq=False, repr=False)
class Selectivity(Result):
    """How well each unit tells the examples of a label from all others.

    Attributes:
        values: Average precision `[label, side, unit]`, from 0 to 1 (a perfect detector). Side `"high"`: the unit is
            large on the label; `"low"`: it is small (or more negative) there. Coordinates `layer` and `index` of a unit
            where they are known.
        p_values: Chance of an average precision at least as large under permuted labels, same dimensions.
        q_values: The same after Benjamini-Hochberg over all labels, sides and units.
        separation: Mean on the label minus mean elsewhere, over the standard deviation within both, `[label, unit]`.
            It orders units that are equally perfect detectors.
        chance: Share of the examples that carry each label: the expected average precision of noise, nearly.
    """

    p_values: xr.DataArray
    q_values: xr.DataArray
    separation: xr.DataArray
    chance: xr.DataArray

    @property
    def labels(self) -> list[str]:
        """The labels, in order."""
        return [str(label) for label in self.values["label"].values]

    def ranking(self, label: str, *, side: Side | Literal["both"] = "high") -> pd.DataFrame:
        """All units of a label, best first, with `average_precision`, `separation`, `p_value` and `q_value`.

        `side="both"` takes each unit at its better side.
        """
        if label not in self.labels:
            raise ValueError(f"no label {label!r}; the labels are {', '.join(map(repr, self.labels))}")
        if side not in (*get_args(Side), "both"):
            raise ValueError(f'side={side!r}; expected "high", "low" or "both"')
        import pandas as pd

        unit = self.values["unit"]
        columns: dict[str, Any] = {"unit": unit.values}
        columns |= {name: self.values[name].values for name in ("layer", "index") if name in self.values.coords}
        frames = []
        for one in get_args(Side) if side == "both" else (side,):
            at = {"label": label, "side": one}
            sign = 1.0 if one == "high" else -1.0
            frame = pd.DataFrame({
                **columns, "side": one, "average_precision": self.values.sel(at).values,
                "separation": sign * self.separation.sel(label=label).values,
                "p_value": self.p_values.sel(at).values, "q_value": self.q_values.sel(at).values,
            })  # fmt: skip
            frames.append(frame)
        frame = pd.concat(frames).sort_values(["average_precision", "separation"], ascending=False, kind="stable")
        return frame.drop_duplicates("unit").reset_index(drop=True)

    def sets(
        self, k: int | None = None, *, q: float | None = None, side: Side | Literal["both"] = "high",
        exclusive: bool = False,
    ) -> dict[str, list[Neuron]]:  # fmt: skip
        """The best neurons `(layer, index)` of every label, best first.

        Args:
            k: At most so many.
            q: Only those with a false-discovery rate of at most this.
            exclusive: Each neuron belongs only to the label at which its average precision is largest over chance.

        Raises:
            ValueError: If neither `k` nor `q` is given, or units have no layer (see `neuron_selectivity`).
        """
        if k is None and q is None:
            raise ValueError("give k= (how many neurons per label), q= (a false-discovery rate), or both")
        if k is not None and k < 1:
            raise ValueError(f"k={k}; expected at least 1")
        if "layer" not in self.values.coords:
            raise ValueError("these units have no layer and index; use neuron_selectivity, or pass units=")
        found = {}
        owner = (self.values.max("side") - self.chance).argmax("label").values
        for number, label in enumerate(self.labels):
            frame: Any = self.ranking(label, side=side)
            if exclusive:
                frame = frame[owner[frame["unit"].to_numpy()] == number]
            if q is not None:
                frame = frame[frame["q_value"] <= q]
            frame = frame.head(k) if k is not None else frame
            found[label] = [(int(a), int(b)) for a, b in zip(frame["layer"], frame["index"], strict=True)]
        return found

    def summary(self, q: float = 0.05) -> pd.DataFrame:
        """Per label and side: units at or below a false-discovery rate, the best average precision, chance."""
        import pandas as pd

        rows = []
        for label in self.labels:
            for side in get_args(Side):
                at = {"label": label, "side": side}
                kept = self.q_values.sel(at) <= q
                layers = self.values["layer"].values[kept.values] if "layer" in self.values.coords else []
                rows.append({
                    "label": label, "side": side, "units": int(kept.sum()), "share": float(kept.mean()),
                    "best": float(self.values.sel(at).max()), "chance": float(self.chance.sel(label=label)),
                    **({"layers": len(set(layers))} if "layer" in self.values.coords else {}),
                })  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, *, side: Side = "high") -> go.Figure:
        """Average precision against rank, one line per label: how many good detectors there are."""
        import pandas as pd

        from interp import plotting

        falling = -np.sort(-self.values.sel(side=side).values, axis=1)
        frame = pd.DataFrame(falling.T, columns=pd.Index(self.labels, name="label"))
        frame["rank"] = np.arange(1, len(frame) + 1)
        table = frame.melt(id_vars="rank", var_name="label", value_name="value")
        return plotting.lines(
            table, x="rank", group="label", log_x=True, title=f"Units by selectivity (side: {side})",
            unit="average precision", x_title="rank of the unit", reference=float(self.chance.mean()),
        )  # fmt: skip


def selectivity(
    activations: Float[Tensor, "example unit"],
    labels: Labels,
    *,
    groups: Sequence[Hashable] | Tensor | None = None,
    n_permutations: int = 10_000,
    units: Sequence[Neuron] | None = None,
    seed: int = 0,
) -> Selectivity:
    """Average precision of every unit as a detector of every label, exact with ties, with a permutation null.

    One sort serves all labels. Without ties the null is the same for all units and costs nothing; units with ties (a
    ReLU's zeros, repeated prompts) get their own, of at most 1,000 permutations each, which can take minutes. No model,
    no forward.

    Args:
        activations: Any numbers per example and unit: neurons, features, heads.
        labels: One per example (each distinct value against all others), or a mapping from name to one truth value per
            example where an example may carry several.
        groups: One per example, constant label within a group: permute labels of whole groups. Right where examples of
            a group share more than the label (a wording, a document); examples would not be exchangeable then and the
            plain p-values far too small. The smallest p-value is one over the number of ways to choose groups.
        units: `(layer, index)` of every column.

    Raises:
        ValueError: If sizes differ, a value is not finite, or a label is on no example or on all.

    Source:
        Suau et al. 2020 (arXiv:2005.07647), expertise as average precision; used for relations by Liu et al. 2025,
        *On Relation-Specific Neurons in Large Language Models* (EMNLP). Precision at a run of ties is taken at its end,
        as in scikit-learn. The paper's low end is units of small average precision; our side `"low"` is the average
        precision of the negated unit, which has the same null as `"high"`.
    """
    n, n_units = activations.shape
    positives = _positives(labels, n)
    if not bool(activations.isfinite().all()):
        raise ValueError(f"{int((~activations.isfinite()).sum())} activations are not finite; ranks need numbers")
    if units is not None and len(units) != n_units:
        raise ValueError(f"units names {len(units)} neurons but activations has {n_units} columns")
    if n_permutations < 1:
        raise ValueError(f"n_permutations={n_permutations}; expected at least 1")
    codes = None if groups is None else _groups(groups, positives, n)
    shape = (len(positives), 2, n_units)
    precision, p_values = np.empty(shape), np.empty(shape)
    given = [positive.to(activations.device) for positive in positives.values()]
    separation = np.stack([_separation(activations, positive).cpu().numpy() for positive in given])
    counts = {int(one.sum()) for one in given} if codes is None else set()
    nulls = {count: chance(n, count, draws=n_permutations, seed=seed) for count in counts}
    for side, ranking in enumerate((Ranking.of(activations), Ranking.of(-activations))):
        precision[:, side] = np.stack([ranking.precision(positive).cpu().numpy() for positive in given])
        if codes is not None:
            where = codes.to(activations.device)
            p_values[:, side] = grouped_p(ranking, given, where, draws=n_permutations, seed=seed)
            continue
        tied = ranking.tied.nonzero().flatten()
        for label, positive in enumerate(given):
            p_values[label, side] = chance_p(precision[label, side], nulls[int(positive.sum())])
            if len(tied):
                p = tied_p(ranking.units(tied), positive, draws=n_permutations, seed=seed)
                p_values[label, side, tied.cpu().numpy()] = p
    coords: dict[str, Any] = {"label": list(positives), "side": list(get_args(Side)), "unit": np.arange(n_units)}
    if units is not None:
        coords |= {"layer": ("unit", [int(a) for a, _ in units]), "index": ("unit", [int(b) for _, b in units])}
    dims = ("label", "side", "unit")
    flat = {key: value for key, value in coords.items() if key != "side"}
    return Selectivity(
        values=labelled(precision, dims, coords, unit="average precision"),
        provenance={
            "method": "selectivity", "n_examples": n, "n_permutations": n_permutations, "seed": seed,
            "groups": None if codes is None else int(codes.max()) + 1,
        },
        p_values=labelled(p_values, dims, coords),
        q_values=labelled(adjust_p_values(p_values, method="bh"), dims, coords),
        separation=labelled(separation, ("label", "unit"), flat, unit="standard deviations"),
        chance=labelled(
            np.array([float(one.float().mean()) for one in positives.values()]), ("label",), {"label": list(positives)}
        ),
    )  # fmt: skip


def neuron_selectivity(
    bridge: Any,
    prompts: Mapping[str, Prompts | Sequence[Prompts]],
    *,
    position: str = "end",
    layers: Sequence[int] | None = None,
    by_prompts: bool = False,
    n_permutations: int = 10_000,
    seed: int = 0,
) -> Selectivity:
    """Average precision of every MLP neuron for every label, at one named position of that label's prompts.

    A neuron's response is what `mlp.hook_post` holds (in a gated MLP, after the product with the gate). One forward per
    `Prompts`.

    Args:
        prompts: Label to its prompts; several `Prompts` where wordings differ in length. The clean prompts are read.
        position: Name of the position, in every one of them.
        layers: Layers to look at; all by default.
        by_prompts: Permute labels of whole `Prompts`, not of examples: the honest null where each is one wording, since
            a neuron may know the wording rather than the label. Needs several per label.

    Raises:
        ValueError: If there are fewer than two labels, a position is not named, or a layer does not exist.
    """
    require_eval(bridge)
    named = {label: (given,) if isinstance(given, Prompts) else tuple(given) for label, given in prompts.items()}
    if len(named) < 2 or not all(named.values()):
        raise ValueError(f"prompts of {len(named)} labels ({', '.join(map(repr, named)) or 'none'}); a label is told "
                         f"from the others, so at least two are needed, each with examples")  # fmt: skip
    n_layers = int(bridge.cfg.n_layers)
    chosen = list(range(n_layers)) if layers is None else [int(layer) for layer in layers]
    if not chosen or not all(0 <= layer < n_layers for layer in chosen) or len(set(chosen)) < len(chosen):
        raise ValueError(f"layers={chosen}; expected distinct layers from 0 to {n_layers - 1}")
    for label, sets in named.items():
        for one in sets:
            if position not in one.positions:
                raise ValueError(f"the prompts of {label!r} name positions {sorted(one.positions)}, not {position!r}")
            one.check(bridge)
    names = [hook_name("neuron", layer) for layer in chosen]
    rows, labels, groups = [], [], []
    for label, sets in named.items():
        for one in sets:
            found = capture(bridge, one.clean, names, positions=one.positions[position])
            rows.append(torch.cat([found[name].float().cpu() for name in names], 1))
            groups += [len(rows)] * len(one)
            labels += [label] * len(one)
    width = rows[0].shape[1] // len(chosen)
    result = selectivity(
        torch.cat(rows), labels, groups=groups if by_prompts else None, n_permutations=n_permutations, seed=seed,
        units=[(layer, index) for layer in chosen for index in range(width)],
    )  # fmt: skip
    settings = {**result.provenance, "method": "neuron_selectivity", "position": position, "layers": chosen}
    settings["n_prompts"] = {label: [len(one) for one in sets] for label, sets in named.items()}
    return Selectivity(
        result.values, provenance(bridge, **settings), result.p_values, result.q_values, result.separation,
        result.chance,
    )  # fmt: skip


def _positives(labels: Labels, n: int) -> dict[str, Tensor]:
    """Truth value per example, by label."""
    if isinstance(labels, Mapping):
        found = {str(name): torch.as_tensor(given, dtype=torch.bool).cpu() for name, given in labels.items()}
        wrong = {name: len(given) for name, given in found.items() if given.shape != (n,)}
        if wrong:
            raise ValueError(f"labels have {wrong} entries but there are {n} examples")
    else:
        values = labels.tolist() if isinstance(labels, Tensor) else list(labels)
        if len(values) != n:
            raise ValueError(f"labels has {len(values)} entries but there are {n} examples")
        kinds = dict.fromkeys(values)
        if set(kinds) == {True, False}:  # the label, not its absence
            kinds = {next(kind for kind in kinds if kind): None}
        found = {str(kind): torch.tensor([value == kind for value in values]) for kind in kinds}
    if not found:
        raise ValueError("no labels; expected one per example, or a mapping from name to truth values")
    for name, positive in found.items():
        if not 0 < int(positive.sum()) < n:
            raise ValueError(f"label {name!r} is on {int(positive.sum())} of {n} examples; expected some, not all")
    return found


def _groups(groups: Sequence[Hashable] | Tensor, positives: Mapping[str, Tensor], n: int) -> Tensor:
    values = groups.tolist() if isinstance(groups, Tensor) else list(groups)
    if len(values) != n:
        raise ValueError(f"groups has {len(values)} entries but there are {n} examples")
    number = {value: place for place, value in enumerate(dict.fromkeys(values))}
    codes = torch.tensor([number[value] for value in values])
    for name, positive in positives.items():
        share = torch.bincount(codes, positive.double()) / torch.bincount(codes)
        mixed = [value for value, place in number.items() if 0 < float(share[place]) < 1]
        if mixed:
            raise ValueError(f"group {mixed[0]!r} holds examples with and without label {name!r}; labels of whole "
                             f"groups are permuted, so each must have one")  # fmt: skip
        if not 0 < int((share > 0).sum()) < len(number):
            raise ValueError(f"label {name!r} is on {int((share > 0).sum())} of {len(number)} groups; expected some")
    return codes


def _separation(activations: Tensor, positive: Tensor) -> Tensor:
    activations = activations.double()
    inside, outside = activations[positive], activations[~positive]
    spread = (inside - inside.mean(0)).pow(2).sum(0) + (outside - outside.mean(0)).pow(2).sum(0)
    scale = (spread / max(len(activations) - 2, 1)).sqrt()
    return torch.where(scale > 0, (inside.mean(0) - outside.mean(0)) / scale.clamp_min(1e-30), 0.0)
