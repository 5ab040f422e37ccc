"""Activation times coefficient, summed over the residual stream at every point, with the part that enters at biases."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp import hooks
from interp.patching._parts import components
from interp.types import Site


@dataclass(frozen=True)
class Relevance:
    """Sums over positions and width, at each of the named points of the stream, from the embedding up.

    Attributes:
        points: `(site, layer)` of each.
        stream: Activation times coefficient.
        bias: Bias times coefficient, over all biases above the point.
        size: Sum of the absolute values of activation times coefficient: the scale that rounding is relative to.
        metric: What was propagated.
    """

    points: list[tuple[Site, int]]
    stream: Float[Tensor, "point example"]
    bias: Float[Tensor, "point example"]
    size: Float[Tensor, "point example"]
    metric: Float[Tensor, "example"]


def relevance(
    bridge: Any, tokens: Tensor, metric: Callable[[Tensor], Tensor], install: Callable[[ExitStack], Any]
) -> Relevance:
    """One forward and one backward under the rules that `install` adds to the stack."""
    points = _points(bridge)
    linear, norms = _biases(bridge)
    # what is added to attn_out is added to the stream after it, so that their gradients are one
    where = {point: hooks.hook_name("attn_out" if point[0] == "resid_mid" else point[0], point[1]) for point in points}
    mids = [hooks.hook_name(*point) for point in points if point[0] == "resid_mid"]
    with hooks.no_retained_graph(bridge), ExitStack() as stack:
        # what a rule reads or scales is tapped before the rule, so that its coefficient is that of the node itself;
        # what a rule returns is tapped after
        before = stack.enter_context(hooks.taps(bridge, list(linear)))
        install(stack)
        after = stack.enter_context(hooks.taps(bridge, [*where.values(), *norms]))
        streams = stack.enter_context(hooks.reads(bridge, mids))
        with torch.inference_mode(False), torch.enable_grad():
            scores = metric(bridge(tokens, use_cache=False))
            nodes = {**before, **after}
            grads = torch.autograd.grad(scores.sum(), list(nodes.values()), allow_unused=True)
    zero = torch.zeros(len(tokens), dtype=torch.double, device=scores.device)
    coefficient = {  # None where nothing flows back, as to queries and keys of frozen attention
        name: torch.zeros_like(nodes[name]).double() if g is None else g.double()
        for name, g in zip(nodes, grads, strict=True)
    }
    offset = {
        name: (coefficient[name].flatten(2) * bias.double()).flatten(1).sum(1)
        for name, bias in {**linear, **norms}.items()
    }
    stream, above, size = [], [], []
    for point, name in where.items():
        value = streams[hooks.hook_name(*point)] if point[0] == "resid_mid" else nodes[name]
        product = value.detach().double() * coefficient[name]
        stream.append(product.flatten(1).sum(1))
        size.append(product.flatten(1).abs().sum(1))
        here = _order(*point)
        above.append(sum((term for at, term in offset.items() if _order_of(bridge, at) >= here), zero))
    totals, biases, sizes = (torch.stack(rows).cpu() for rows in (stream, above, size))
    return Relevance(points, totals, biases, sizes, scores.detach().double().cpu())


def _points(bridge: Any) -> list[tuple[Site, int]]:
    n_layers = int(bridge.cfg.n_layers)
    mid = bool(hooks.names(bridge, hooks.hook_name("resid_mid", 0)))
    sites: tuple[Site, ...] = ("resid_pre", "resid_mid") if mid else ("resid_pre",)
    last: tuple[Site, int] = ("resid_post", n_layers - 1)
    return [*((site, layer) for layer in range(n_layers) for site in sites), last]


def _biases(bridge: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Biases by the hook at which they have been added, of linear maps and of norms."""
    linear: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for path, module in components(bridge):
        bias = getattr(module.original_component, "bias", None)
        # GPT-Neo calls its causal mask, of more dimensions, bias
        if isinstance(bias, Tensor) and bias.ndim == 1 and hooks.names(bridge, f"{path}.hook_out"):
            kind = norms if hasattr(module, "hook_normalized") else linear
            kind[f"{path}.hook_out"] = bias.detach()
    return linear, norms


def _order(site: str, layer: int) -> int:
    """How far up a point of the stream is; a bias is above it if its own order is at least as high."""
    return 2 * layer + {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[site]


def _order_of(bridge: Any, name: str) -> int:
    layer = hooks.layer_of(bridge, name)
    assert layer is not None
    after_attention = ".mlp." in name or ".ln2" in name
    return 2 * layer + int(after_attention)
