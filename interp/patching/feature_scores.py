"""Effects of the latents and errors of several dictionaries: the nodes of sparse feature circuits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from interp.patching._cells import choice
from interp.patching._latent_sites import fingerprint
from interp.patching.effects import Effects
from interp.patching.latents import LatentEffects

if TYPE_CHECKING:
    import pandas as pd

ERROR = -1
"""The `latent` of error nodes in coordinates and tables."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureEffects(Effects):
    """Effects of all latents and errors of several dictionaries, with dimensions `(node, pos, example)`, or `(node,
    example)` where positions are summed.

    Nodes are named after the activation that is rebuilt: `"1.mlp_out/17"` is latent 17 of the dictionary of the output
    of MLP 1, `"1.mlp_out/error"` what that dictionary leaves out. A node at one position is `"1.mlp_out/17@3"`. Nodes
    lie in the order in which the model computes them; `dictionary`, `layer` and `latent` (-1 for the error) are
    coordinates along them. Signs and units are those of `Effects`: under noising a node that carries the answer is
    negative.
    """

    @classmethod
    def joined(cls, parts: Sequence[LatentEffects], named: Mapping[str, Any], method: str) -> FeatureEffects:
        """The effects of single dictionaries (`named`), measured with one set of options, as one result."""
        names, first, arrays = list(named), parts[0], []
        for part, name in zip(parts, names, strict=True):
            error = part.error.expand_dims(latent=[ERROR]).transpose(*part.values.dims)
            array = xr.concat([part.values, error], "latent")
            numbers = array["latent"].values.tolist()
            labels = [f"{name}/{'error' if number == ERROR else number}" for number in numbers]
            along = {
                "node": labels,
                "dictionary": ("node", [name] * len(labels)),
                "layer": ("node", [part.provenance["layers"][0]] * len(labels)),
                "latent": ("node", numbers),
            }
            arrays.append(array.rename(latent="node").drop_vars("node").assign_coords(along))
        values = xr.concat(arrays, "node").assign_attrs(first.values.attrs)
        records = [
            {
                "name": name,
                "title": part.site,
                "layer": part.provenance["layers"][0],
                "given": getattr(named[name], "target_hook", None) or named[name].hook,
                **part.provenance["dictionary"],
            }
            for part, name in zip(parts, names, strict=True)
        ]
        left_out = ("dictionary", "latents", "site", "sites", "layers", "axes", "architecture", "completeness")
        about = {key: value for key, value in first.provenance.items() if key not in left_out}
        about |= {"method": method, "dictionary": records, "axes": list(values.dims[:-1])}
        # under a name of its own: estimates of all latents may be compared with exact effects of some
        about["chosen"] = {name: part.provenance["latents"] for part, name in zip(parts, names, strict=True)}
        site = f"features of {', '.join(names) if len(names) <= 4 else f'{len(names)} activations'}"
        return cls(
            values, {**about, "site": site}, first.clean, first.corrupted, first.direction, site, first.value,
            first.metric,
        )  # fmt: skip

    @property
    def dictionaries(self) -> list[str]:
        """Names of the dictionaries, in the order of computation."""
        return [record["name"] for record in self.provenance["dictionary"]]

    @property
    def per_position(self) -> bool:
        """Whether a node is a latent at one position."""
        return "pos" in self.values.dims

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes, those of one dictionary after those of another; of one latent position after position."""
        return names_of(self.values)

    def of(self, dictionary: Any) -> LatentEffects:
        """The effects of one dictionary, given by its name or by itself: what `activation_patch` and
        `attribution_patch` give for it alone."""
        name = self._name(dictionary)
        record = next(record for record in self.provenance["dictionary"] if record["name"] == name)
        mine = self.values.isel(node=np.flatnonzero(self.values["dictionary"].values == name))
        numbers = mine["latent"].values
        plain = mine.drop_vars(["dictionary", "layer", "latent"]).rename(node="latent").assign_coords(latent=numbers)
        known = ("architecture", "hook", "target_hook", "n_latents", "fingerprint")
        about = {
            **self.provenance,
            "site": record["title"],
            "dictionary": {key: record[key] for key in known},
            "latents": self.provenance["chosen"][name],
            "layers": [record["layer"]],
            "axes": ["latent", *self.values.dims[1:-1]],
        }
        error = plain.sel(latent=ERROR, drop=True)
        latents = plain.isel(latent=np.flatnonzero(numbers != ERROR))
        return LatentEffects(
            latents, about, self.clean, self.corrupted, self.direction, record["title"], self.value, self.metric, error
        )

    def total(self) -> xr.DataArray:
        """Sum over the nodes of each dictionary, (dictionary, pos, example): of scores that are linear in the change
        (`"gradient"` and the backward rules) the score of the whole activation that it rebuilds."""
        summed = self.values.groupby("dictionary").sum(keep_attrs=True)
        return summed.sel(dictionary=self.dictionaries).transpose("dictionary", *self.values.dims[1:])

    def at(self, nodes: Iterable[str]) -> Effects:
        """The effects of these nodes alone, dimensions `(node, example)`, in the order given:
        `agreement(exact.at(nodes), scores.at(nodes))`.

        Raises:
            ValueError: If a name is not one of `nodes`.
        """
        given = [str(node) for node in nodes]
        flat = self.values.values.reshape(-1, self.values.sizes["example"])
        values = xr.DataArray(
            flat[places(self.values, given)], dims=("node", "example"),
            coords={"node": given, "example": self.values["example"].values}, attrs=self.values.attrs,
        )  # fmt: skip
        about = {**self.provenance, "axes": ["node"]}
        return Effects(
            values, about, self.clean, self.corrupted, self.direction, self.site, self.value, self.metric
        )  # fmt: skip

    def top(
        self, k: int = 5, *, by: Literal["abs", "max", "min"] = "abs", reduce: str | Sequence[str] | None = "example"
    ) -> pd.DataFrame:
        """The `k` strongest nodes over all dictionaries, best first, as `Result.top`; `node` is the full name."""
        frame = super().top(k, by=by, reduce=reduce)
        if "pos" in frame.columns:
            frame["node"] = frame["node"] + "@" + frame["pos"].astype(str)
        return frame

    def plot(self, of: Literal["effect", "recovery"] = "effect", *, k: int = 30) -> Any:
        """Figure of the `k` strongest nodes, with intervals over examples."""
        from interp.plotting import bars

        choice("of", of, ("effect", "recovery"))
        chosen = self.at(self.top(k)["node"])
        frame = chosen.interval(of=of).to_dataframe().reset_index()
        size = frame["estimate"].abs() if of == "effect" else (frame["estimate"] - (self.direction == "noise")).abs()
        frame = frame.loc[size.sort_values(ascending=False, kind="stable").index]
        unit = f"{self.metric}, {self.values.attrs.get('unit', '?')}" if of == "effect" else "recovery"
        return bars(
            frame, x="node", y="estimate", interval=("low", "high") if frame["low"].notna().all() else None,
            title=f"The {len(frame)} strongest features: {self.method} {of} ({self.direction}, {self.value})",
            unit=unit, horizontal=True,
        )  # fmt: skip

    def _name(self, dictionary: Any) -> str:
        if isinstance(dictionary, str):
            choice("dictionary", dictionary, self.dictionaries)
            return dictionary
        mark, hook = fingerprint(dictionary), getattr(dictionary, "target_hook", None) or dictionary.hook
        same = [record for record in self.provenance["dictionary"] if record["fingerprint"] == mark]
        if len(same) > 1 or mark is None:  # alike in their numbers, at different places
            same = [record for record in same if record["given"] == hook]
        if not same:
            raise ValueError(f"these effects are not of this dictionary (of {hook!r}), but of {self.dictionaries}")
        return str(same[0]["name"])


def names_of(array: xr.DataArray) -> list[str]:
    """Names of the nodes of an array (node, ...) or (node, pos, ...), as it lies in memory."""
    names = array["node"].values.tolist()
    return [f"{name}@{pos}" for name in names for pos in array["pos"].values] if "pos" in array.dims else names


def places(array: xr.DataArray, nodes: Sequence[str]) -> np.ndarray:
    """Where nodes lie among `names_of`. Raises ValueError for a name that is none of them."""
    width = array.sizes.get("pos", 1)
    rows = {name: i for i, name in enumerate(array["node"].values.tolist())}
    columns = {str(pos): i for i, pos in enumerate(array["pos"].values)} if "pos" in array.dims else {"": 0}
    found = []
    for node in nodes:
        name, _, pos = node.partition("@")
        if name not in rows or pos not in columns:
            example = names_of(array[:1])[0]
            raise ValueError(f"no node {node!r}; nodes are called like {example!r}, of {sorted(columns)} positions")
        found.append(rows[name] * width + columns[pos])
    return np.array(found, dtype=int)
