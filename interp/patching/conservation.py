"""Conservation of relevance: what a set of backward rules makes of the metric, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.hooks.names import device_of
from interp.models import provenance, require_eval
from interp.patching._backward import metric_name
from interp.patching._relevance import relevance
from interp.patching.rules import Preset, Rules, backward_rules, resolve_rules
from interp.results import Result, labelled
from interp.types import Metric

_DEPTH = {"resid_pre": 0.0, "resid_mid": 0.5, "resid_post": 1.0}


@dataclass(frozen=True, eq=False, repr=False)
class Conservation(Result):
    """Relevance in the residual stream at every point of the model, for every example.

    `values` is activation times coefficient summed over positions and width, in the metric's unit, with dimensions
    `(point, example)`; points go from the embedding (`"resid_pre 0"`) to the last block's output, and have the
    coordinates `site`, `layer` and `depth` (blocks passed).

    Attributes:
        bias: What the biases above each point add, of the same dimensions: bias times coefficient.
        metric: The metric, by example.
        preset: Name of the rules, `"custom"` for rules of one's own.
    """

    bias: xr.DataArray
    metric: xr.DataArray
    preset: str

    def gap(self) -> xr.DataArray:
        """(stream + biases - metric) over the largest |metric| of all examples: 0 where relevance is conserved."""
        return (self.values + self.bias - self.metric) / float(abs(self.metric).max())

    def share(self) -> xr.DataArray:
        """Mean relevance of the stream plus biases over the mean metric, by point: 1 where relevance is conserved."""
        return ((self.values + self.bias).mean("example") / float(self.metric.mean())).assign_attrs(
            unit="of the metric"
        )

    def plot(self) -> Any:
        """Figure of `share()` over the points of the stream."""
        from interp.plotting import lines

        return lines(
            self.share().to_dataset(name="value"),
            x="depth",
            x_title="layer entered (halves: between attention and MLP)",
            title=f"Relevance of stream and biases ({self.preset})",
            unit="share of the metric",
            reference=1.0,
        )


def conservation(
    bridge: Any, tokens: Int[Tensor, "example pos"], metric: Metric, preset: Preset | Rules = "relp_ah"
) -> Conservation:
    """Sum of activation times coefficient at every point of the residual stream, and of bias times coefficient above
    it.

    With norms, activations, products and attention patterns held constant (`"relp_ah"`, `"cp_lrp"`) the model is linear
    in its stream, so that stream and biases add up to a metric that is linear in the logits (a logit difference, a
    logit) at every point. Other presets and the gradient do not conserve; nor does a metric such as a log-probability.
    Conservation says that relevance is neither lost nor made, not that it is right.

    Costs one forward and one backward over all examples.

    Args:
        bridge: A model in evaluation mode.
        tokens: Token ids, all rows the same length.
        metric: Logits to one number per example, such as `interp.metrics.logit_difference(prompts)`.
        preset: Name of a preset, or rules.

    Raises:
        UnsupportedModule: If the rules do not cover the model. RuntimeError: In training mode.

    Source:
        Conservation of LRP: Bach et al. 2015, section 2; for transformers Ali et al. 2022 (arXiv:2202.07304). They
        leave biases out, so that their sums differ from the metric by them; ours are a term of their own.
    """
    require_eval(bridge)
    rules = resolve_rules(preset)
    ids = tokens.to(device_of(bridge))
    found = relevance(bridge, ids, metric, lambda stack: stack.enter_context(backward_rules(bridge, rules)))
    unit = str(getattr(metric, "unit", "metric"))
    name = preset if isinstance(preset, str) else "custom"
    coords = {
        "point": [f"{site} {layer}" for site, layer in found.points],
        "site": ("point", [site for site, _ in found.points]),
        "layer": ("point", [layer for _, layer in found.points]),
        "depth": ("point", [layer + _DEPTH[site] for site, layer in found.points]),
        "example": list(range(len(tokens))),
    }
    record = provenance(
        bridge,
        method="conservation",
        preset=name,
        rules=rules.to_dict(),
        metric={"name": metric_name(metric), "unit": unit},
        cost={"forwards": 1, "backwards": 1},
    )
    return Conservation(
        labelled(found.stream, ["point", "example"], coords, unit=unit),
        record,
        labelled(found.bias, ["point", "example"], coords, unit=unit),
        labelled(found.metric, ["example"], {"example": coords["example"]}, unit=unit),
        name,
    )
