"""Affine maps from the stream of one layer to that of another, for vectors that are put in where they do not belong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.models import geometry, provenance, require_eval
from interp.patching._cells import choice, indices
from interp.patching._sites import STREAM, read_site
from interp.results import Result, labelled
from interp.types import Site


@dataclass(frozen=True, eq=False, repr=False)
class LayerMaps(Result):
    """For every pair of layers the affine map that best predicts the one's vector from the other's, same position.

    Pass it as `layer_map` to `cross_layer_patch`. `values` is the share of the target's variance that the map predicts
    on rows it was not fitted on (R squared, 1 is exact, 0 no better than the mean), `(source_layer, target_layer)`.

    Attributes:
        weights: `(source_layer, target_layer, d_in, d_out)`.
        offsets: `(source_layer, target_layer, d_out)`.
    """

    weights: xr.DataArray
    offsets: xr.DataArray

    @property
    def name(self) -> str:
        """For the record of `cross_layer_patch`."""
        return f"affine maps, ridge {self.provenance['ridge']}"

    def __call__(
        self, vectors: Float[Tensor, "*rows d_model"], source: int, target: int
    ) -> Float[Tensor, "*rows d_model"]:
        """Vectors of the source layer as they would be at the target layer.

        Raises:
            ValueError: If there is no map for these layers.
        """
        for dim, layer in (("source_layer", source), ("target_layer", target)):
            known = self.values[dim].values.tolist()
            if layer not in known:
                raise ValueError(f"no map for {dim} {layer}; there are maps for {known}: fit it with fit_layer_maps")
        at = {"source_layer": source, "target_layer": target}
        weights, offsets = (torch.tensor(part.sel(at).values).to(vectors) for part in (self.weights, self.offsets))
        return vectors @ weights + offsets

    def plot(self) -> Any:
        """Heat map of the held-out R squared."""
        from interp.plotting import heatmap

        title = f"Variance of {self.provenance['site']} predicted from another layer"
        return heatmap(self.values, title=title, unit="R squared, held out", signed=False)


@torch.no_grad()
def fit_layer_maps(
    bridge: Any,
    tokens: Int[Tensor, "row pos"],
    *,
    site: Site = "resid_post",
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    skip_first: int = 1,
    ridge: float | int = 1e-3,
    held_out: float = 0.2,
    batch_size: int = 32,
    seed: int = 0,
) -> LayerMaps:
    """Affine maps between the vectors of two layers at the same position, fitted by ridge regression on text.

    Costs one forward of the tokens. All vectors of the text are kept in double precision while it fits, and d_model x
    d_model numbers for each pair of layers after, so name the layers of large models. Fit on other text than is
    patched.

    Args:
        tokens: Text without padding. There should be several times d_model positions; few give maps that only know
            what they were fitted on, which the held-out R squared shows.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out` or `mlp_out`.
        skip_first: Positions left out at the start of every row. The first token's vector is often of another size
            altogether and would rule the fit.
        ridge: Penalty, as a share of the mean variance of the source's coordinates.
        held_out: Share of rows not fitted on.
        seed: For the choice of these.

    Raises:
        ValueError: If an option does not fit, or rows or positions are too few to fit and to hold out.
        RuntimeError: If the model is in training mode.

    Source:
        Din et al. 2023 (arXiv:2303.09435), who map to later layers to decode early; here in both directions, with an
        offset and a small ridge.
    """
    choice("site", site, STREAM)
    require_eval(bridge)
    n_layers = geometry(bridge).n_layers
    sources = indices("source_layers", source_layers, n_layers)
    targets = indices("target_layers", target_layers, n_layers)
    n, n_pos = tokens.shape
    if not 0 <= skip_first < n_pos:
        raise ValueError(f"skip_first={skip_first} leaves no position of rows of {n_pos}")
    if not 0 < held_out < 1 or ridge < 0:
        raise ValueError(f"held_out={held_out} must lie between 0 and 1, and ridge={ridge} must not be negative")
    n_test = max(1, round(held_out * n))
    if n - n_test < 1:
        raise ValueError(f"{n} rows are too few to hold {n_test} out; pass more")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    device = next(iter(bridge.original_model.parameters())).device

    def vectors(rows: Tensor) -> dict[int, Tensor]:
        found: dict[int, list[Tensor]] = {}
        for some in rows.split(batch_size):
            read = read_site(bridge, tokens[some].to(device), site, sorted({*sources, *targets}))
            for layer, tensor in read.items():
                found.setdefault(layer, []).append(tensor[:, skip_first:, 0].flatten(0, 1).double().cpu())
        return {layer: torch.cat(parts) for layer, parts in found.items()}

    fit, test = vectors(order[n_test:].sort().values), vectors(order[:n_test].sort().values)
    width = fit[sources[0]].shape[1]
    shape = (len(sources), len(targets))
    weights, offsets, r2 = torch.zeros(*shape, width, width), torch.zeros(*shape, width), torch.zeros(shape)
    for a, s in enumerate(sources):
        mean = fit[s].mean(0)
        x = fit[s] - mean
        gram = x.T @ x
        gram += ridge * float(gram.diagonal().mean()) * torch.eye(width, dtype=gram.dtype)
        for b, t in enumerate(targets):
            centre = fit[t].mean(0)
            solved = torch.linalg.lstsq(gram, x.T @ (fit[t] - centre)).solution
            weights[a, b], offsets[a, b] = solved, centre - mean @ solved
            wrong = (test[s] @ solved + offsets[a, b].double() - test[t]).square().sum()
            r2[a, b] = 1 - wrong / (test[t] - centre).square().sum()
    coords = {"source_layer": sources, "target_layer": targets}
    dims = ["source_layer", "target_layer"]
    record = provenance(
        bridge,
        method="fit_layer_maps",
        site=site,
        rows=int(n - n_test),
        rows_held_out=n_test,
        positions=int(n_pos - skip_first),
        skip_first=skip_first,
        ridge=float(ridge),
        seed=seed,
    )
    return LayerMaps(
        labelled(r2, dims, coords, unit="R squared"),
        record,
        labelled(weights, [*dims, "d_in", "d_out"], coords),
        labelled(offsets, [*dims, "d_out"], coords),
    )
