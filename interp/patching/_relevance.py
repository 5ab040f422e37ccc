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

    points: list[tuple[str, int]]
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
    names = {point: hooks.hook_name(point[0], point[1]) for point in points}  # type: ignore[arg-type]
    values: dict[str, Tensor] = {}
    nodes: dict[str, Tensor] = {}  # what the model goes on with, which autograd can differentiate with respect to
    with hooks.no_retained_graph(bridge), ExitStack() as stack:
        # what a rule reads or scales is tapped before the rule, so that its coefficient is that of the node itself;
        # what a rule returns is tapped after
        for name in linear:
            _tap(stack, bridge, name, values, nodes)
        install(stack)
        for name in [*names.values(), *norms]:
            _tap(stack, bridge, name, values, nodes)
        with torch.enable_grad():
            scores = metric(bridge(tokens, use_cache=False))
            grads = torch.autograd.grad(scores.sum(), list(nodes.values()), allow_unused=True)
    zero = torch.zeros(len(tokens), dtype=torch.double, device=scores.device)
    coefficient = {name: None if g is None else g.double() for name, g in zip(nodes, grads, strict=True)}
    offset = {}
    for name, bias in {**linear, **norms}.items():
        g = coefficient[name]
        offset[name] = zero if g is None else (g.flatten(2) * bias.double().flatten()).flatten(1).sum(1)
    stream, above, size = [], [], []
    for point, name in names.items():
        product = values[name].double() * (0.0 if coefficient[name] is None else coefficient[name])
        stream.append(product.flatten(1).sum(1))
        size.append(product.flatten(1).abs().sum(1))
        here = _order(bridge, *point)
        above.append(sum((term for at, term in offset.items() if _order_of(bridge, at) >= here), zero))
    stacked = [torch.stack(rows).cpu() for rows in (stream, above, size)]
    return Relevance(points, *stacked, scores.detach().double().cpu())


def _points(bridge: Any) -> list[tuple[str, int]]:
    n_layers = int(bridge.cfg.n_layers)
    mid = bool(hooks.names(bridge, hooks.hook_name("resid_mid", 0)))
    sites = ["resid_pre", "resid_mid"] if mid else ["resid_pre"]
    return [(site, layer) for layer in range(n_layers) for site in sites] + [("resid_post", n_layers - 1)]


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


def _order(bridge: Any, site: str, layer: int) -> int:
    """How far up a point of the stream is; a bias is above it if its own order is at least as high."""
    return 2 * layer + {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[site]


def _order_of(bridge: Any, name: str) -> int:
    layer = hooks.layer_of(bridge, name)
    assert layer is not None
    after_attention = ".mlp." in name or ".ln2" in name
    return 2 * layer + int(after_attention)


def _tap(stack: ExitStack, bridge: Any, name: str, values: dict[str, Tensor], nodes: dict[str, Tensor]) -> None:
    entered: list[Tensor] = []
    first = name == hooks.hook_name("resid_pre", 0)

    def keep(tensor: Tensor, *, hook: Any) -> Tensor:
        # the graph starts at the stream that enters the first block, so that no parameter needs a gradient
        node = tensor.detach().requires_grad_() if first else tensor.view_as(tensor)
        values[name] = tensor.detach() if not entered else (entered.pop() + tensor).detach()
        nodes[name] = node
        return node

    def enter(tensor: Tensor, *, hook: Any) -> None:
        entered[:] = [tensor]

    if name.endswith("hook_resid_mid"):  # what is added to attn_out is added to the stream: their gradients are one
        layer = hooks.layer_of(bridge, name)
        assert layer is not None
        hooks.attach(stack, bridge, hooks.hook_name("resid_pre", layer), enter, "fwd")
        name_of_write = hooks.hook_name("attn_out", layer)
        hooks.attach(stack, bridge, name_of_write, keep, "fwd")
    else:
        hooks.attach(stack, bridge, name, keep, "fwd")
