"""The two repairs of AtP*: saturated attention (QK fix), and paths that cancel (GradDrop).

The QK fix needs no run per node: row `dest` of a pattern depends on no query but its own, and replacing the key at
`src` changes one score in each row. So one forward with all queries (or all keys) replaced holds every patched score,
if the pattern is then put back, so that nothing downstream moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp import hooks
from interp.types import Site


@dataclass
class Drops:
    """Within `attached`, a backward pass does not enter what layer `layer` adds to the stream; None drops nothing.

    May be changed between backward passes of one forward.
    """

    bridge: Any
    layer: int | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks at what attention and MLP add, behind those that are there already."""
        with ExitStack() as stack:
            for layer in range(len(self.bridge.blocks)):
                for site in ("attn_out", "mlp_out"):
                    hooks.attach(stack, self.bridge, hooks.hook_name(site, layer), self._gate(layer), "fwd")
            yield

    def _gate(self, layer: int) -> Callable[..., Tensor]:
        def drop(gradient: Tensor) -> Tensor:
            return torch.zeros_like(gradient) if self.layer == layer else gradient

        def gate(tensor: Tensor, *, hook: Any) -> Tensor:
            view = tensor.view_as(tensor)
            view.register_hook(drop)
            return view

        return gate


def scores_name(layer: int) -> str:
    """The hook of the attention scores: scaled, capped and masked, before the softmax."""
    return f"blocks.{layer}.attn.hook_attn_scores"


def check_softmax(scores: Tensor, pattern: Tensor, layer: int) -> None:
    """Raise unless the pattern is the softmax of the scores (attention with sinks, for one, is not)."""
    error = float((scores.float().softmax(-1) - pattern.float()).abs().max())
    if error > (1e-4 if pattern.dtype in (torch.float32, torch.float64) else 2e-2):
        raise ValueError(
            f"qk_fix needs a pattern that is the softmax of the attention scores; in layer {layer} the two differ by "
            f"{error:.2g}. Leave qk_fix=False, or use interp.patching.activation_patch"
        )


@torch.no_grad()
def patched_scores(
    bridge: Any, tokens: Tensor, site: Site, new: Mapping[int, Tensor], patterns: Mapping[int, Tensor]
) -> dict[int, Float[Tensor, "row head dest src"]]:
    """Attention scores with all queries (`site="q"`) or keys (`"k"`) of each layer replaced: one forward for all."""
    names = {layer: scores_name(layer) for layer in new}
    with ExitStack() as stack:
        for layer, tensor in new.items():
            edits: tuple[tuple[Site, Tensor], ...] = ((site, tensor), ("pattern", patterns[layer]))
            for name, put in edits:
                hooks.attach(
                    stack,
                    bridge,
                    hooks.hook_name(name, layer),
                    lambda old, *, hook, _put=put: _put.to(old.dtype),
                    "fwd",
                )
        found = stack.enter_context(hooks.reads(bridge, list(names.values())))
        hooks.run_until(bridge, tokens, max(new) + 1)
    return {layer: found[name] for layer, name in names.items()}


def query_effects(scores: Tensor, patched: Tensor, gradient: Tensor) -> Float[Tensor, "row pos head"]:
    """First order in the pattern, exact in the query: its row's change of pattern times the gradient."""
    scores, patched, gradient = _exact(scores), _exact(patched), _exact(gradient)
    return ((patched.softmax(-1) - scores.softmax(-1)) * gradient).sum(-1).transpose(1, 2)


def key_effects(scores: Tensor, patched: Tensor, gradient: Tensor, n_kv_heads: int) -> Float[Tensor, "row pos kv_head"]:
    """First order in the pattern, exact in the key: for each key, its changes in all rows and heads that read it.

    With p the pattern of a row and l = logit(p[s]), changing score s by d takes p[s] to p'[s] = sigmoid(l + d) and
    leaves the other sources' shares of the rest as they are, r[j] = p[j] / (1 - p[s]). So the row's change of pattern
    times the gradient g is (p'[s] - p[s]) * (g[s] - sum over j != s of r[j] g[j]). Where p[s] is near 1, which is where
    the fix is needed, 1 - p[s] has lost its digits; there l and r come from the other sources' scores.
    """
    scores, patched, gradient = _exact(scores), _exact(patched), _exact(gradient)
    pattern = scores.softmax(-1)
    top = scores.argmax(-1, keepdim=True)
    others = scores.scatter(-1, top, float("-inf"))
    alone = others.amax(-1, keepdim=True) < -1e30  # no other source is visible: nothing can change
    share = torch.where(alone, 0.0, others.masked_fill(alone, 0.0).softmax(-1))
    total = (pattern * gradient).sum(-1, keepdim=True)
    rest = 1 - pattern.scatter(-1, top, 0.0)  # 1 - p[s], at least one half except at the top
    contrast = (gradient - total) / rest
    contrast = contrast.scatter(-1, top, gradient.gather(-1, top) - (share * gradient).sum(-1, keepdim=True))
    odds = scores - scores.logsumexp(-1, keepdim=True) - rest.log()
    odds = odds.scatter(-1, top, scores.gather(-1, top) - others.logsumexp(-1, keepdim=True))
    shift = patched - scores
    # sigmoid(a + d) - sigmoid(a), without cancellation and without overflow
    rise = torch.where(
        shift > 0,
        -(odds + shift).sigmoid() * (-odds).sigmoid() * torch.expm1(-shift.clamp(min=0)),
        odds.sigmoid() * (-(odds + shift)).sigmoid() * torch.expm1(shift.clamp(max=0)),
    )
    effects = torch.where((pattern > 0) & ~alone, rise * contrast, 0.0).sum(-2)  # [row, head, src]
    return effects.unflatten(1, (n_kv_heads, -1)).sum(2).transpose(1, 2)


def _exact(tensor: Tensor) -> Tensor:
    """In float64 where the device has it: a saturated pattern differs from 1 by less than float32 can hold."""
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64)
