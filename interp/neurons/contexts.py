"""The contexts in which a neuron, a feature or any direction is strongest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name, resolve
from interp.models import geometry, provenance
from interp.neurons._context_search import Search
from interp.neurons._kept import kept_tokens
from interp.neurons._largest import Once, Side
from interp.results import Result
from interp.types import Site

STREAM_SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "neuron")
"""Sites with one vector per token, whose coordinates or directions can be ranked."""


@dataclass(frozen=True, eq=False, repr=False)
class TopContexts(Result):
    """The strongest contexts of every unit: `values (unit, rank)` are scores, best first, NaN where there are no more.

    Coordinates of `values`: `row` and `pos`, the place in the tokens (-1 for none), `token`, its text; `layer` and
    `index` of the unit, if it is a neuron, or `name`.

    Attributes:
        tokens: Token ids around each context, `(unit, rank, offset)`; offset 0 is the context's own token. -1 outside
            the row.
        scores: The unit's score at these tokens, NaN outside the row and where no score was given.
        counts: How often each token id occurs as the current and as the next token of what was searched,
            `(which, id)`.
        strings: Text of the token ids in `tokens`, by id as text.
    """

    tokens: xr.DataArray
    scores: xr.DataArray
    counts: xr.DataArray
    strings: dict[str, str]

    def place(self, unit: int | tuple[int, int] | str) -> int:
        """The position along `unit` of a neuron `(layer, index)`, a name, or a position itself."""
        coords = self.values.coords
        if isinstance(unit, tuple):
            if "layer" not in coords:
                raise KeyError(f"{unit}: these units are not neurons; give a position or a name")
            match = (coords["layer"].values == unit[0]) & (coords["index"].values == unit[1])
        elif isinstance(unit, str):
            match = coords["name"].values == unit if "name" in coords else np.zeros(self.values.sizes["unit"], bool)
        else:
            match = np.arange(self.values.sizes["unit"]) == unit
        if not match.any():
            raise KeyError(f"no unit {unit!r} among the {len(match)} of this result")
        return int(match.argmax())

    def context(self, unit: int | tuple[int, int] | str, rank: int = 0) -> tuple[list[str], list[float], int]:
        """Texts and scores of the tokens around one context, and the place of its own token among them."""
        at = {"unit": self.place(unit), "rank": rank}
        ids = self.tokens.isel(at).values
        if not 0 <= rank < self.values.sizes["rank"] or np.isnan(self.values.isel(at)):
            raise KeyError(f"unit {unit!r} has no context of rank {rank}")
        inside = ids >= 0
        offsets = self.tokens.coords["offset"].values
        own = int((offsets[inside] == 0).argmax())
        return [self.text(i) for i in ids[inside].tolist()], self.scores.isel(at).values[inside].tolist(), own

    def text(self, token: int) -> str:
        """Text of a token id, `#id` if it is unknown."""
        return self.strings.get(str(int(token)), f"#{int(token)}")

    def share(self, sets: Mapping[Any, Sequence[int]]) -> pd.DataFrame:
        """How many of a unit's contexts have their current, or their next, token in a set of token ids.

        Two different claims about a label: that the neuron detects the token (`current`), or that it precedes and so
        may promote it (`next`). The `_base` columns are the shares over everything that was searched: what contexts
        drawn at random would give. A context whose next token lies outside the window counts for neither.

        Args:
            sets: Unit (as in `place`) to token ids, for instance the decoded top tokens.

        Returns:
            Columns `unit, n, current, current_base, next, next_base`.
        """
        after = 1 in self.tokens.coords["offset"].values
        rows = []
        for unit, ids in sets.items():
            here = self.tokens.isel(unit=self.place(unit))
            row: dict[str, Any] = {"unit": str(unit), "n": int((here.sel(offset=0) >= 0).sum())}
            for which, offset in (("current", 0), ("next", 1)):
                seen = here.sel(offset=offset).values if offset == 0 or after else np.array([], int)
                seen = seen[seen >= 0]
                base = self.counts.sel(which=which).values
                known = [i for i in set(map(int, ids)) if i < len(base)]
                row[which] = float(np.isin(seen, list(ids)).mean()) if len(seen) else np.nan
                row[f"{which}_base"] = float(base[known].sum() / base.sum()) if base.sum() else np.nan
            rows.append(row)
        return pd.DataFrame(rows)

    def show(self, unit: int | tuple[int, int] | str, k: int = 10) -> Any:
        """The best `k` contexts of a unit as coloured text; see `interp.plotting.coloured_text`."""
        from interp.plotting import coloured_text

        at = self.place(unit)
        n = min(k, int(np.isfinite(self.values.isel(unit=at)).sum()))
        if n < 1:
            raise ValueError(f"unit {unit!r} has no contexts to show, or k={k} is less than 1")
        found = [self.context(at, rank) for rank in range(n)]
        return coloured_text(
            [tokens for tokens, _, _ in found],
            [scores for _, scores, _ in found],
            marks=[own for _, _, own in found],
            labels=[f"{self.values.isel(unit=at, rank=rank).item():.3g}" for rank in range(n)],
            title=f"Top contexts of {self.unit_name(at)}",
            unit=self.values.attrs.get("unit", "score"),
            glue=_glue(self.strings),
        )

    def unit_name(self, place: int) -> str:
        """`L3N17` for a neuron, else the unit's name or `unit 5`."""
        coords = self.values.coords
        if "layer" in coords:
            return f"L{int(coords['layer'][place])}N{int(coords['index'][place])}"
        return str(coords["name"].values[place]) if "name" in coords else f"unit {place}"

    def plot(self, unit: int | tuple[int, int] | str = 0, k: int = 10) -> Any:
        """The best `k` contexts of a unit as a figure: one row per context, cells coloured by the score."""
        return self.show(unit, k).figure()


def contexts_of(
    scores: Float[Tensor, "token unit"],
    tokens: Int[Tensor, "batch pos"],
    *,
    directions: Float[Tensor, "direction unit"] | None = None,
    n: int = 20,
    window: tuple[int, int] = (8, 3),
    side: Side = "max",
    once: Once = "token",
    keep: Bool[Tensor, "batch pos"] | None = None,
    names: Sequence[str] | None = None,
    bridge: Any = None,
) -> TopContexts:
    """The `n` tokens at which each column of a score matrix is largest, with the text around them. Exact; ties go to
    the earliest token. No forward.

    Args:
        scores: One row per token of `tokens`, row by row (`activations.flatten(0, 1)`); or, with `keep`, one row per
            kept token in the same order. With `directions` these are activations, and the score of a direction is the
            dot product with it.
        directions: One row per unit to rank, of the width of `scores`.
        window: Tokens shown before and after; they are never taken from another row.
        side: `"max"` takes the largest scores, `"min"` the smallest, `"abs"` the largest magnitudes.
        once: What may occur once only per unit: a `"token"` (no limit), a `"row"` of tokens, or a `"context"`: of
            contexts whose tokens from `window[0]` before to the context's own are equal, only the strongest counts.
        keep: Where a context may be; leaves out BOS and padding.
        names: A name per unit, to find it by.
        bridge: The model, for the text of tokens and for provenance.

    Raises:
        ValueError: If shapes do not fit, a score is NaN or infinite, or nothing is kept.
    """
    _check_options(n, window, side, once)
    kept = _kept(keep, tokens)
    _check_scores(scores, tokens, kept, directions)
    if names is not None and len(names) != (scores.shape[1] if directions is None else len(directions)):
        raise ValueError(f"{len(names)} names for {scores.shape[1] if directions is None else len(directions)} units")
    search = Search(n, window, side, once)
    search.push(scores.detach().cpu(), tokens.cpu(), kept, directions)
    settings = {"method": "contexts_of", "n_tokens": int(kept.sum()), "cost": {"forwards": 0}}
    coords = {} if names is None else {"name": ("unit", [str(name) for name in names])}
    settings |= search.settings()
    record = settings if bridge is None else provenance(bridge, **settings)
    return TopContexts(**search.fields(coords, "score", bridge), provenance=record)


def top_contexts(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    units: Sequence[tuple[int, int]] | None = None,
    *,
    site: Site = "neuron",
    layers: Sequence[int] | None = None,
    directions: Float[Tensor, "direction width"] | None = None,
    n: int = 20,
    window: tuple[int, int] = (8, 3),
    side: Side = "max",
    once: Once = "token",
    keep: Bool[Tensor, "batch pos"] | None = None,
    skip_bos: bool = True,
    batch_size: int = 32,
) -> TopContexts:
    """The `n` tokens of a corpus at which each unit is strongest, with the text around them.

    Batches stream through and only the best are kept: memory is that of one batch. The same contexts, ties included,
    as ranking all activations at once, whatever the batch size. Costs one forward, less the layers above the last one.

    Args:
        units: Units `(layer, index)`, where index counts the neurons of the layer (or the coordinates of another
            site); all units of `layers` by default.
        site: `"neuron"` is what enters the MLP's output projection, after the product with the gate; the others are
            the sites of the residual stream.
        layers: Instead of `units`: every unit of these layers, all layers by default. With `directions`: exactly one.
        directions: Rank these directions of the site in one layer in place of its coordinates.
        n, window, side, once, keep: As in `contexts_of`.
        skip_bos: Leave out tokens that are the tokenizer's BOS, where activations are unlike those anywhere else.

    Raises:
        ValueError: If the site has no vector per token, units do not exist or `units`, `layers` and `directions` do
            not go together, before any forward; if an activation is NaN or infinite.
        RuntimeError: In training mode.
    """
    _check_options(n, window, side, once)
    kept = kept_tokens(bridge, tokens, keep, skip_bos, batch_size)
    wanted = _units(bridge, site, units, layers, directions)
    hooks = {layer: resolve(bridge, hook_name(site, layer)) for layer in wanted}
    search = Search(n, window, side, once)
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        found = capture(bridge, tokens[part], list(hooks.values()), device="cpu")
        acts = [found[hooks[layer]].float().flatten(0, 1) for layer in wanted]
        if directions is None:
            acts = [act if index is None else act[:, index] for act, index in zip(acts, wanted.values(), strict=True)]
        del found
        search.push(torch.cat(acts, 1), tokens[part].cpu(), kept[part], directions)
    settings = {
        "method": "top_contexts",
        "site": site,
        "layers": list(wanted),
        "n_tokens": int(kept.sum()),
        "skip_bos": skip_bos,
        "cost": {"forwards": 1},
    }
    coords: dict[str, Any] = {}
    if directions is None:
        pairs = [
            (layer, i)
            for layer, index in wanted.items()
            for i in (range(_width(bridge, site)) if index is None else index.tolist())
        ]
        if units is not None:  # given in any order; searched layer by layer
            places = {pair: place for place, pair in enumerate(pairs)}
            pairs = [(int(layer), int(i)) for layer, i in units]
            search.reorder(torch.tensor([places[pair] for pair in pairs]))
        coords = {"layer": ("unit", [p[0] for p in pairs]), "index": ("unit", [p[1] for p in pairs])}
    unit = "activation" if directions is None else "activation along the direction"
    record = provenance(bridge, **settings, **search.settings())
    return TopContexts(**search.fields(coords, unit, bridge), provenance=record)


def _check_options(n: int, window: tuple[int, int], side: str, once: str) -> None:
    if n < 1:
        raise ValueError(f"n={n}; expected at least 1 context per unit")
    if len(window) != 2 or min(window) < 0:
        raise ValueError(f"window={window}; expected two numbers of tokens, before and after, from 0")
    for name, value, options in (("side", side, get_args(Side)), ("once", once, get_args(Once))):
        if value not in options:
            raise ValueError(f"{name}={value!r}; expected one of {', '.join(options)}")


def _kept(keep: Tensor | None, tokens: Tensor) -> Tensor:
    kept = torch.ones(tokens.shape, dtype=torch.bool) if keep is None else keep.cpu()
    if kept.shape != tokens.shape:
        raise ValueError(f"keep is {tuple(kept.shape)} and tokens {tuple(tokens.shape)}; expected one flag per token")
    return kept


def _check_scores(scores: Tensor, tokens: Tensor, kept: Tensor, directions: Tensor | None) -> None:
    if not kept.any():
        raise ValueError("no token is left to search: keep is False everywhere")
    if len(scores) not in (tokens.numel(), int(kept.sum())):
        raise ValueError(
            f"scores has {len(scores)} rows; expected one per token of {tuple(tokens.shape)}, {tokens.numel()}"
            + (f", or one per kept token, {int(kept.sum())}" if not kept.all() else "")
        )
    if directions is not None and directions.shape[1] != scores.shape[1]:
        raise ValueError(f"directions have width {directions.shape[1]} and the activations {scores.shape[1]}")
    if 0 in scores.shape or (directions is not None and not len(directions)):
        raise ValueError(f"there is no unit to rank: scores is {tuple(scores.shape)}")


def _units(
    bridge: Any,
    site: Site,
    units: Sequence[tuple[int, int]] | None,
    layers: Sequence[int] | None,
    directions: Tensor | None,
) -> dict[int, Tensor | None]:
    """Layer to the units wanted there (None: all of them), layers ascending."""
    if site not in STREAM_SITES:
        raise ValueError(f"site={site!r} has no vector per token; expected one of {', '.join(STREAM_SITES)}")
    n_layers, width = int(bridge.cfg.n_layers), _width(bridge, site)
    if units is not None and (layers is not None or directions is not None):
        raise ValueError("units says which layers; give units alone, or layers and directions")
    if directions is not None:
        if layers is None or len(set(layers)) != 1:
            raise ValueError(f"directions belong to one layer; got layers={layers}")
        if directions.shape[1] != width:
            raise ValueError(f"directions have width {directions.shape[1]}; {site} has {width}")
    if units is None:
        chosen = sorted(set(range(n_layers) if layers is None else layers))
        if not chosen or chosen[0] < 0 or chosen[-1] >= n_layers:
            raise ValueError(f"layers={list(layers or [])} are not layers of this model; expected 0 to {n_layers - 1}")
        return dict.fromkeys(chosen)
    if not units:
        raise ValueError("units is empty; give some (layer, index), or None for all")
    wrong = [(layer, i) for layer, i in units if not (0 <= layer < n_layers and 0 <= i < width)]
    if wrong:
        raise ValueError(f"units {wrong[:5]} do not exist: layers are 0 to {n_layers - 1}, {site} 0 to {width - 1}")
    if len(set(units)) != len(units):
        raise ValueError("a unit is given twice")
    by_layer: dict[int, list[int]] = {}
    for layer, i in sorted(units):
        by_layer.setdefault(int(layer), []).append(int(i))
    return {layer: torch.tensor(index) for layer, index in by_layer.items()}


def _width(bridge: Any, site: Site) -> int:
    return geometry(bridge).d_mlp if site == "neuron" else int(bridge.cfg.d_model)


def _glue(strings: Mapping[str, str]) -> str:
    """What stands between tokens: nothing where they carry their own spaces."""
    return "" if any(text.startswith(" ") for text in strings.values()) else " "
