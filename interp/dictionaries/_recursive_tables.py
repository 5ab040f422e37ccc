"""The rows of a recursive attribution as arrays, as a table with names, as chains and as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor

from interp.dictionaries._recursion import COLUMNS, Table
from interp.results import labelled

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.dictionaries.recursive_parts import RecursiveAttribution

ERROR = "#8a8a8a"  # what no latent accounts for
FIELDS = ("example", "parent", "dictionary", "latent", "pos")


def numbered(
    table: Table, nodes: Tensor, weights: Tensor, record: dict[str, Any]
) -> tuple[xr.DataArray, dict[str, Any], xr.DataArray, xr.DataArray]:
    """`values`, provenance, `nodes` and `node_weights` of the result."""
    index, where = torch.cat(table.index).numpy(), nodes.numpy()
    depth = np.zeros(len(where), dtype=np.int32)
    for node, parent in enumerate(where[:, 1]):  # parents come first
        depth[node] = 1 if parent < 0 else depth[parent] + 1
    columns = {name: ("row", index[:, place]) for place, name in enumerate(COLUMNS)}
    of_dictionary = np.array([part[3] for part in table.parts], dtype=np.int64)[index[:, 2]]
    sizes = index[:, [1, 3, 5]].astype(np.int64).max(0) + 2

    def key(node: np.ndarray, which: np.ndarray, latent: np.ndarray, src: np.ndarray) -> np.ndarray:
        return ((which.astype(np.int64) * sizes[0] + node) * sizes[1] + latent) * sizes[2] + src

    below = where[where[:, 1] >= 0]
    rows, taken = key(index[:, 1], of_dictionary, index[:, 3], index[:, 5]), key(*below[:, 1:].T)
    split = np.isin(rows, taken) & (of_dictionary >= 0)
    columns |= {"depth": ("row", depth[index[:, 1]]), "split": ("row", split)}
    values = labelled(torch.cat(table.values), ("row",), columns, unit="pre-activation")
    named = xr.DataArray(where.astype(np.int32), dims=("node", "field"), coords={"field": list(FIELDS)})
    return values, record, named, labelled(weights, ("node",), unit="pre-activation")


def frame(found: RecursiveAttribution) -> pd.DataFrame:
    """See `RecursiveAttribution.to_dataframe`."""
    coords = {name: found.values[name].values for name in (*COLUMNS, "depth", "split")}
    texts = np.array(found.tokens, dtype=object)
    label, kind, hook = (np.array([part[i] for part in found.parts], dtype=object) for i in range(3))
    chains = [_chain(found, node)[-2::-1] for node in range(len(found.nodes))]
    paths = np.array([" <- ".join(_name(found, node) for node in chain) for chain in chains], dtype=object)
    return pd.DataFrame(
        {
            "example": coords["example"],
            "depth": coords["depth"],
            "path": paths[coords["node"]],
            "component": label[coords["part"]],
            "kind": kind[coords["part"]],
            "hook": hook[coords["part"]],
            "latent": coords["latent"],
            "head": coords["head"],
            "src": coords["src"],
            "token": texts[coords["example"], coords["src"]],
            "contribution": found.values.values,
            "split": coords["split"].astype(bool),
            "node": coords["node"],
        }
    )


def paths(found: RecursiveAttribution, k: int, example: int | None) -> pd.DataFrame:
    """See `RecursiveAttribution.paths`."""
    rows = found.to_dataframe()
    if example is not None:
        rows = rows.loc[(rows["example"] == example).to_numpy()]
    strongest = _strongest_heads(found)
    spots = ["example", "depth", "node", "component", "latent", "src", "token"]
    leaves = rows.loc[~rows["split"].to_numpy(dtype=bool)]
    main = leaves.loc[leaves["contribution"].abs().groupby([leaves[spot] for spot in spots], sort=False).idxmax()]
    summed = leaves.groupby(spots, sort=False).agg({"contribution": "sum"}).reset_index()
    summed["head"] = main["head"].values
    order = summed["contribution"].abs().sort_values(ascending=False, kind="stable").index[:k]
    chosen = summed.loc[order].reset_index(drop=True)
    texts = []
    for row in chosen.itertuples():
        last = f" <-[H{row.head}]- " if row.head >= 0 else " <- "
        which = f"{row.component}{f' {row.latent}' if row.latent >= 0 else ''}"
        texts.append("".join([*_steps(found, int(row.node), strongest), last, f"{which} at {row.src} {row.token!r}"]))
    chosen["path"] = texts
    return chosen[["example", "contribution", "depth", "path"]]


def _steps(found: RecursiveAttribution, node: int, strongest: dict[int, int]) -> list[str]:
    """Names of a chain's nodes from the attributed latent back, with the head of each step between them."""
    texts: list[str] = []
    for step in _chain(found, node)[::-1]:
        if texts:
            texts.append(f" <-[H{strongest[step]}]- ")
        texts.append(_name(found, step))
    return texts


def _chain(found: RecursiveAttribution, node: int) -> list[int]:
    """A node, its parent, and so on to the attributed latent."""
    chain, parents = [node], found.nodes.sel(field="parent").values
    while parents[chain[-1]] >= 0:
        chain.append(int(parents[chain[-1]]))
    return chain


def _name(found: RecursiveAttribution, node: int) -> str:
    example, _, which, latent, pos = (int(value) for value in found.nodes.values[node])
    text = found.tokens[example][pos]
    where = f"at {pos} {text!r}"
    if which < 0:
        return f"latent {latent} {where}"
    return f"{next(part[0] for part in found.parts if part[3] == which)} {latent} {where}"


def _strongest_heads(found: RecursiveAttribution) -> dict[int, int]:
    """Of every node but the first ones: the head by which most of it reached its parent."""
    parts = np.array([part[3] for part in found.parts])
    of = {name: found.values[name].values for name in COLUMNS}
    split = np.flatnonzero(found.values["split"].values)
    best: dict[tuple[int, int, int, int], tuple[float, int]] = {}
    for row in split:
        key = (int(of["node"][row]), int(parts[of["part"][row]]), int(of["latent"][row]), int(of["src"][row]))
        size = abs(float(found.values.values[row]))
        if size >= best.get(key, (-1.0, 0))[0]:
            best[key] = (size, int(of["head"][row]))
    nodes = found.nodes.values
    return {
        number: best[(int(parent), int(which), int(latent), int(pos))][1]
        for number, (_, parent, which, latent, pos) in enumerate(nodes)
        if parent >= 0
    }


def figure(found: RecursiveAttribution, k: int, example: int) -> go.Figure:
    """See `RecursiveAttribution.plot`."""
    from interp.plotting import bars

    n = found.preactivation.sizes["example"]
    if not 0 <= example < n:
        raise ValueError(f"example={example} was not measured; there are {n}")
    rows = found.top(len(found.values), reduce=("head", "path"))
    rows = rows.loc[(rows["example"] == example).to_numpy()].head(k)
    latent = [f" {number}" if number >= 0 else "" for number in rows["latent"]]
    names = rows["component"] + latent + " at " + rows["src"].astype(str) + " " + rows["token"].map(repr)
    shown = pd.DataFrame({"term": names.values, "value": rows["contribution"].values, "kind": rows["kind"].values})
    first = found.nodes.values[example]
    drawn = bars(
        shown, x="term", group="kind", horizontal=True, reference=0, unit="contribution to the pre-activation",
        title=f"Largest terms of latent {first[3]} at {first[4]} {found.tokens[example][int(first[4])]!r} "
        f"(example {example})",
        x_title="term of the stream", height=120 + 26 * max(len(shown), 4), width=900,
    )  # fmt: skip
    drawn.for_each_trace(lambda trace: trace.update(marker_color=ERROR), selector={"name": "error"})
    return drawn.update_layout(barmode="overlay")  # every term is of one kind: bars of full width
