"""Figures of what heads and sources add to a latent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from interp.dictionaries.head_attribution import FeatureAttribution


def attribution_figure(
    found: FeatureAttribution, latent: int | None, example: int | None, pos: int | None
) -> go.Figure:
    """See `FeatureAttribution.plot`."""
    from interp.plotting import bars, heatmap
    from interp.plotting.style import token_labels

    values = found.values
    for name, given in (("latent", latent), ("example", example), ("pos", pos)):
        if given is not None and given not in (known := values[name].values.tolist()):
            raise ValueError(f"{name}={given} was not measured; there are {known[:8]}{'...' if len(known) > 8 else ''}")
    latent = int(values["latent"].values[0]) if latent is None else latent
    by_latent = values.sel(latent=latent)
    title, unit = f"What is added to latent {latent}", "added to the pre-activation"
    if values.dims[3:] == ("head",):
        for dim, chosen in (("example", example), ("pos", pos)):
            by_latent = by_latent.mean(dim) if chosen is None else by_latent.sel({dim: chosen})
        frame = pd.DataFrame({"head": by_latent["head"].values, "value": by_latent.values})
        return bars(frame, x="head", title=f"{title}, by head", unit=unit, reference=0)
    example = 0 if example is None else example
    one = by_latent.sel(example=example)
    pre = found.preactivation.sel(latent=latent, example=example)
    places = one["position"].values if "position" in one.coords else one["pos"].values
    if values.dims[3:] == ("src",) and pos is None and one.sizes["pos"] > 1:
        shown = one.drop_vars(["token", "src_token", "position"], errors="ignore")
        last = int(places.max()) + 1
        return heatmap(
            shown.isel(src=slice(last)), title=f"{title}, by source", unit=unit, origin="top",
            x_labels=token_labels(one["src_token"].values.tolist()[:last]),
            y_labels=token_labels(one["token"].values.tolist(), places.tolist()),
        )  # fmt: skip
    at = int(np.argmax(pre.values)) if pos is None else one["pos"].values.tolist().index(pos)
    here, last = one.isel(pos=at), int(places[at]) + 1
    labels = token_labels(here["src_token"].values.tolist()[:last])
    title += f" at {labels[-1]} (example {example})"
    if values.dims[3:] == ("src",):
        frame = pd.DataFrame({"source": labels, "value": here.values[:last]})
        return bars(frame, x="source", title=title, unit=unit, reference=0)
    shown = here.isel(src=slice(last)).drop_vars(["token", "src_token", "position"], errors="ignore")
    return heatmap(shown.transpose("head", "src"), title=title, unit=unit, x_labels=labels, origin="top")
