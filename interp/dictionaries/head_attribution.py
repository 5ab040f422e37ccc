"""Which heads, and which source positions, a latent of a dictionary of attention outputs comes from.

A dictionary that reads `hook_z` flattened over heads has, for every latent, a slice of its decoder and of its encoder
per head. The first says where the latent writes (weights alone), the second what each head adds to its pre-activation
on given tokens; and since z_h[dst] = sum over src of pattern_h[dst, src] v_h[src], each (head, source) has an exact
share with the patterns held as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.cache._reading import check_tokens
from interp.dictionaries._head_reading import HeadReading, head_layer, head_reading, head_shape
from interp.dictionaries._head_runs import check_pattern_values, destinations, read_hooks, token_texts
from interp.dictionaries.dictionary import Dictionary
from interp.hooks import hook_name
from interp.models import provenance, require_eval
from interp.results import Result, labelled
from interp.types import Site

if TYPE_CHECKING:
    import plotly.graph_objects as go

By = Literal["head", "source", "head_source"]
_DIMS: dict[str, tuple[str, ...]] = {"head": ("head",), "source": ("src",), "head_source": ("head", "src")}


@dataclass(frozen=True, eq=False, repr=False)
class HeadWeights(Result):
    """`values (latent, head)`: the norm of a latent's decoder row within each head, as a share of their sum.

    Rows sum to 1; NaN for latents whose decoder row is zero.
    """

    def share(self, heads: Sequence[int]) -> xr.DataArray:
        """What these heads have of each latent together, (latent)."""
        return self.values.sel(head=list(heads)).sum("head")

    def latents(self, head: int, k: int = 10) -> pd.DataFrame:
        """The `k` latents with the largest share of this head: columns `rank, latent, share`."""
        shares = self.values.sel(head=head).fillna(0.0)
        order = np.argsort(-shares.values, kind="stable")[:k]
        rows = [(rank, int(shares["latent"].values[i]), float(shares.values[i])) for rank, i in enumerate(order)]
        return pd.DataFrame(rows, columns=["rank", "latent", "share"])

    def plot(self, latents: Sequence[int] | None = None) -> go.Figure:
        """Shares by latent and head, of the given latents (of the first 40 by default)."""
        from interp.plotting import heatmap

        shown = self.values.isel(latent=slice(40)) if latents is None else self.values.sel(latent=list(latents))
        return heatmap(
            shown.assign_coords(latent=[str(latent) for latent in shown["latent"].values]),
            title="Weight-based attribution of latents to heads", unit="share of the decoder's norms", signed=False,
            origin="top",
        )  # fmt: skip


@torch.no_grad()
def head_weights(bridge: Any, dictionary: Dictionary) -> HeadWeights:
    """The share of every head in every latent, by the norm of its slice of the decoder. No forward over data.

    Raises:
        KeyError, ValueError: For dictionaries that do not rebuild `hook_z` flattened over this model's heads.

    Source:
        Kissane et al. 2024 (arXiv:2406.17759): |W_dec[f, slice of h]| / sum over heads of the same.
    """
    layer = head_layer(bridge, dictionary)
    if dictionary.is_transcoder:
        raise ValueError(
            f"this dictionary rebuilds {dictionary.target_hook!r}, whose decoder has no slice per head; "
            "direct_feature_attribution reads its encoder, which has"
        )
    norms = dictionary.directions().double().unflatten(1, head_shape(bridge, layer)).norm(dim=-1)
    record = provenance(bridge, method="head_weights", hook=dictionary.hook, layer=layer)
    coords = {"latent": np.arange(len(norms)), "head": np.arange(norms.shape[1])}
    shares = labelled(norms / norms.sum(1, keepdim=True), ("latent", "head"), coords, unit="share")
    return HeadWeights(shares, {**record, "dictionary": dictionary.settings()})


@dataclass(frozen=True, eq=False, repr=False)
class FeatureAttribution(Result):
    """What heads and source positions add to latents' pre-activations.

    `values` has the dimensions (latent, example, pos) and then (head), (src) or (head, src): shares in units of the
    pre-activation, positive where they raise it. Over heads and sources they sum to `preactivation - bias`. Coordinates
    `token` (example, pos) and `src_token` (example, src) are the tokens' texts. With positions per example, `pos`
    counts them and the coordinate `position` (example, pos) says which they are. Sources after `pos` are 0.

    Attributes:
        preactivation: (latent, example, pos), as the dictionary computes it from the model's own `hook_z`.
        bias: (latent), the part of it that no head has: b_enc - b_dec @ W_enc, in the same units.
        activation: (latent, example, pos), the latents themselves, 0 where they are off.
    """

    preactivation: xr.DataArray
    bias: xr.DataArray
    activation: xr.DataArray

    def gap(self) -> xr.DataArray:
        """Sum of the shares plus bias less pre-activation, (latent, example, pos): rounding, if all is right."""
        inner = [dim for dim in self.values.dims if dim in ("head", "src")]
        total = self.values.astype("float64").sum(inner) + self.bias.astype("float64")
        return (total - self.preactivation).transpose(*self.preactivation.dims).astype("float32")

    def completeness(self) -> float:
        """The largest gap, as a share of the largest pre-activation in size (or of the largest share, if larger)."""
        size = max(float(abs(self.preactivation).max()), float(abs(self.values).max()), 1e-30)
        return float(abs(self.gap()).max()) / size

    def top(
        self, k: int = 5, *, by: Literal["abs", "max", "min"] = "abs", reduce: str | Sequence[str] | None = None
    ) -> pd.DataFrame:
        """The `k` largest shares, best first, in long form with their tokens; see `Result.top`."""
        return super().top(k, by=by, reduce=reduce)

    def plot(self, latent: int | None = None, *, example: int | None = None, pos: int | None = None) -> go.Figure:
        """Shares of one latent (the first by default).

        By head: bars, the mean over examples and positions or of those given. By source: bars over the tokens at one
        `pos`, or destinations against sources where there are several. By both: heads against sources at one `pos`,
        by default where the latent's pre-activation is largest in the example (the first by default).
        """
        from interp.dictionaries._head_figures import attribution_figure

        return attribution_figure(self, latent, example, pos)


@torch.no_grad()
def direct_feature_attribution(
    bridge: Any,
    dictionary: Dictionary,
    tokens: Int[Tensor, "example pos"],
    latents: Sequence[int],
    *,
    by: By = "head",
    positions: int | Sequence[int] | Int[Tensor, "..."] | None = None,
    batch_size: int | None = None,
    memory_budget: int = 2**30,
) -> FeatureAttribution:
    """What each head, source position or pair of them adds to latents' pre-activations, with attention held as it is.

    Head h adds z_h . W_enc[slice of h, f], source s of it pattern_h[dst, s] v_h[s] . W_enc[slice of h, f]; grouped
    value heads are those of each of their query heads. Shares are exact: pre-activations are affine in z once the
    scale of a token is held, where the dictionary normalises token by token. They say what was added, not what would
    happen without it, since patterns would change as well. Costs one forward, up to the dictionary's layer.

    Args:
        dictionary: It reads `hook_z` flattened over heads, on the device of the model.
        latents: Which latents, by number.
        by: `"head"` needs no values or patterns, so that it holds for every kind of attention; `"source"` sums over
            heads; `"head_source"` has one share per pair.
        positions: The destinations: all by default; an int or a list for the same ones in every example; a tensor
            [example] or [example, k] for each example's own. Negative ones count from the end.
        batch_size: Examples per forward; by default as many as `memory_budget` allows.
        memory_budget: Bytes for the result and, again, for what is computed at once.

    Raises:
        KeyError, ValueError: If the dictionary is not of this model's heads, latents or positions do not exist, or the
            result is larger than `memory_budget`; in the first batch, with `"source"` and `"head_source"`, if heads are
            not pattern times values on this model (gated or linear attention, values normalised behind `hook_v`).
        RuntimeError: In training mode.

    Source:
        Kissane et al. 2024 (arXiv:2406.17759), direct feature attribution. There it is of the latent's activation by a
        ReLU; here of the pre-activation, which all architectures have (for gated ones, that of the gate).

    Example:
        >>> found = direct_feature_attribution(bridge, sae, tokens, [5], by="head_source")       # doctest: +SKIP
        >>> found.top(3), found.completeness()                                                  # doctest: +SKIP
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    if by not in _DIMS:
        raise ValueError(f'by={by!r}; expected "head", "source" or "head_source"')
    parameter = next(iter(bridge.original_model.parameters()))
    dtype = torch.promote_types(torch.promote_types(parameter.dtype, dictionary.W_enc.dtype), torch.float32)
    reading = head_reading(bridge, dictionary, latents, dtype=dtype)
    where, shared = destinations(positions, tokens)
    n, n_pos, (n_heads, _) = len(tokens), tokens.shape[1], head_shape(bridge, reading.layer)
    inner = {"head": (n_heads,), "source": (n_pos,), "head_source": (n_heads, n_pos)}[by]
    n_latents, k = len(reading.latents), where.shape[1]
    per_example = 4 * n_latents * k * int(np.prod(inner))
    if per_example * n > memory_budget:
        raise ValueError(
            f"{n_latents} latents x {n} examples x {k} positions x {' x '.join(map(str, inner))} take "
            f"{per_example * n / 2**20:,.0f} MiB, above memory_budget={memory_budget / 2**20:,.0f} MiB; ask for fewer "
            'latents or positions, or by="head" or "source"'
        )
    values = torch.empty((n_latents, n, k, *inner), dtype=torch.float32)
    pre, on = np.empty((2, n_latents, n, k), dtype=np.float32)
    working = 2 * per_example + 4 * n_pos * n_heads * (2 * n_pos + n_latents)
    step = batch_size or max(1, min(n, memory_budget // working))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        z = _fill(values[:, rows], bridge, reading, tokens[rows], where[rows], by)
        given = dictionary.preactivations(z)
        pre[:, rows] = given[..., reading.latents].movedim(-1, 0).float().cpu().numpy()
        on[:, rows] = dictionary.activate(given)[..., reading.latents].movedim(-1, 0).float().cpu().numpy()
    coords: dict[str, Any] = {"latent": reading.latents, "example": np.arange(n)}
    coords["pos"] = where[0].numpy() if shared else np.arange(k)
    if not shared:
        coords["position"] = (("example", "pos"), where.numpy())
    texts = token_texts(bridge, tokens)
    coords["token"] = (("example", "pos"), np.take_along_axis(texts, where.numpy(), 1))
    outer = ("latent", "example", "pos")
    more: dict[str, Any] = {"head": np.arange(n_heads)} if "head" in _DIMS[by] else {}
    if "src" in _DIMS[by]:
        more |= {"src": np.arange(n_pos), "src_token": (("example", "src"), texts)}
    record = provenance(
        bridge, method="direct_feature_attribution", hook=dictionary.hook, layer=reading.layer, by=by,
        dictionary=dictionary.settings(), n_forwards=-(-n // step),
    )  # fmt: skip
    return FeatureAttribution(
        labelled(values, (*outer, *_DIMS[by]), {**coords, **more}, unit="pre-activation"),
        record,
        labelled(pre, outer, coords, unit="pre-activation"),
        labelled(reading.bias, ("latent",), {"latent": reading.latents}, unit="pre-activation"),
        labelled(on, outer, coords, unit="activation"),
    )


def _fill(out: Tensor, bridge: Any, reading: HeadReading, tokens: Tensor, where: Tensor, by: By) -> Tensor:
    """Write the shares [latent, example, pos, ...] of some examples; z there, flattened [example, pos, d_in]."""
    sites: tuple[Site, ...] = ("z",) if by == "head" else ("z", "v", "pattern")
    names = {site: hook_name(site, reading.layer) for site in sites}
    activations = read_hooks(bridge, tokens, list(names.values()))
    found = {site: activations[name] for site, name in names.items()}
    at = where.to(found["z"].device)
    row = torch.arange(len(at), device=at.device)[:, None]
    W, z = reading.directions, found["z"][row, at]
    scale = reading.scale(z.flatten(2)).to(W)
    if by == "head":
        out.copy_(torch.einsum("bkhe,fhe->fbkh", z.to(W), W) * scale[..., None])
        return z.flatten(2)
    check_pattern_values(bridge, reading.layer, found["z"], found["v"], found["pattern"])
    pattern = found["pattern"].to(W)[row, :, at] * scale[..., None, None]  # [example, pos, head, src]
    v = found["v"].to(W)
    # what each source's value would add if it were attended to with weight 1: no [.., src, latent] times pos is built
    grouped = W.unflatten(1, (v.shape[2], -1))
    unit = torch.einsum("bske,fkge->fbkgs", v, grouped).flatten(2, 3)
    if by == "source":
        out.copy_(torch.einsum("bkhs,fbhs->fbks", pattern, unit))
    elif out.device == unit.device and out.dtype == unit.dtype:
        torch.mul(unit[:, :, None], pattern, out=out)
    else:
        out.copy_(unit[:, :, None] * pattern)
    return z.flatten(2)
