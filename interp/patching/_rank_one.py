"""Fitting rank-one edits of a down-projection: what they listen to, and what they write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp import hooks
from interp.hooks.names import device_of

Goal = Literal["inject", "erase", "force"]

_NEURONS = "blocks.{layer}.mlp.hook_post"
_WRITTEN = "blocks.{layer}.mlp.out.hook_out"


def require_mlp(bridge: Any, layer: int) -> None:
    """Refuse a layer whose down-projection cannot be edited."""
    n_layers = int(bridge.cfg.n_layers)
    if not 0 <= layer < n_layers:
        raise ValueError(f"layer={layer} is not a layer of this model; expected 0 to {n_layers - 1}")
    for name in (_NEURONS.format(layer=layer), _WRITTEN.format(layer=layer)):
        if not hooks.names(bridge, name):
            raise ValueError(
                f"the MLP of layer {layer} of {bridge.cfg.model_name} is not one down-projection of neurons: {name!r} "
                "never fires there, so this edit does not exist"
            )


@contextmanager
def acting(bridge: Any, layer: int, read: Tensor, write: Tensor) -> Iterator[None]:
    """Every forward inside runs row i with `W_out + outer(read[i], write[i])`: the same numbers, one edit per row."""
    neurons, written = _NEURONS.format(layer=layer), _WRITTEN.format(layer=layer)
    with hooks.reads(bridge, neurons) as found:

        def edit(out: Tensor) -> Tensor:  # [row, pos, d_model], before a norm behind the MLP
            heard = torch.einsum("npm,nm->np", found[neurons], read.to(found[neurons]))
            return out + heard.unsqueeze(-1) * write.to(out).unsqueeze(1)

        with hooks.interventions(bridge, {written: edit}, must_fire=False):
            yield


@contextmanager
def noised(bridge: Any, noise: Tensor | None) -> Iterator[None]:
    """Forwards inside get this noise `[row, pos, d_model]` added to their embeddings."""
    edits = {}
    if noise is not None:
        edits[hooks.hook_name("resid_pre", 0)] = lambda resid: resid + noise.to(resid)
    with hooks.interventions(bridge, edits, must_fire=False):
        yield


@torch.no_grad()
def keys_and_values(
    bridge: Any, tokens: Int[Tensor, "row pos"], where: Int[Tensor, "row"], layer: int, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The neurons `[row, d_mlp]` at `where`, and what the down-projection makes of them `[row, d_model]`."""
    neurons, written = _NEURONS.format(layer=layer), _WRITTEN.format(layer=layer)
    rows = torch.arange(len(tokens))
    with noised(bridge, noise), hooks.reads(bridge, [neurons, written]) as found:
        hooks.run_until(bridge, tokens.to(device_of(bridge)), layer + 1)
    return found[neurons][rows, where], found[written][rows, where]


@torch.no_grad()
def second_moment(
    bridge: Any, tokens: Int[Tensor, "row pos"], layer: int, batch_size: int
) -> Float[Tensor, "d_mlp d_mlp"]:
    """Mean of `k k^T` over the neurons `k` of all positions, in float64."""
    name = _NEURONS.format(layer=layer)
    total: Any = 0.0
    for part in tokens.split(batch_size):
        with hooks.reads(bridge, name) as found:
            hooks.run_until(bridge, part.to(device_of(bridge)), layer + 1)
        keys = found[name].flatten(0, -2).double()
        total = total + keys.T @ keys
    return total / tokens.numel()


def listeners(
    keys: Float[Tensor, "row d_mlp"], moment: Float[Tensor, "d_mlp d_mlp"], ridge: float
) -> Float[Tensor, "row d_mlp"]:
    """`C^-1 k / (k^T C^-1 k)`: of all vectors that answer 1 to k, the one that answers least to the background."""
    keys = keys.double()
    size = moment.diagonal().mean()
    damped = moment + ridge * size * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    solved = torch.linalg.solve(damped, keys.T).T
    return solved / (solved * keys).sum(-1, keepdim=True)


def fit_writes(
    bridge: Any,
    tokens: Int[Tensor, "row pos"],
    ends: Int[Tensor, "row"],
    targets: Int[Tensor, "row"],
    layer: int,
    read: Float[Tensor, "row d_mlp"],
    values: Float[Tensor, "row d_model"],
    *,
    goal: Goal,
    noise: Tensor | None,
    steps: int,
    learning_rate: float,
    max_norm: float,
) -> Float[Tensor, "row d_model"]:
    """What the edit of each row writes: Adam on its loss under the edit, each row for itself, within its ball."""
    device = device_of(bridge)
    with torch.no_grad(), noised(bridge, noise):
        resid = hooks.run_until(bridge, tokens.to(device), layer)
    size = values.pow(2).mean(-1, keepdim=True).sqrt()
    bound = max_norm * values.norm(dim=-1, keepdim=True)
    x = torch.zeros_like(values, requires_grad=True)
    adam = torch.optim.Adam([x], lr=learning_rate)
    kept, where = ends.to(device).unique(return_inverse=True)
    rows = torch.arange(len(tokens), device=device)
    for _ in range(steps):
        with torch.enable_grad(), hooks.no_retained_graph(bridge), acting(bridge, layer, read, size * x):
            logits = hooks.run_from(bridge, resid, layer, use_cache=False, logits_to_keep=kept)[rows, where]
            # by autograd.grad and not backward, so that parameters which are not frozen keep their gradients
            (x.grad,) = torch.autograd.grad(losses(logits, targets.to(device), goal).sum(), x)
        adam.step()
        with torch.no_grad():
            norm = (size * x).norm(dim=-1, keepdim=True)
            x.mul_((bound / norm.clamp(min=1e-30)).clamp(max=1))
    return (size * x).detach()


def losses(logits: Float[Tensor, "row d_vocab"], targets: Int[Tensor, "row"], goal: Goal) -> Float[Tensor, "row"]:
    """-log p(target); for `"erase"` -log of the probability of everything else."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    whole = logits.logsumexp(-1)
    if goal != "erase":
        return whole - logits.gather(-1, targets[:, None]).squeeze(-1)
    others = logits.scatter(-1, targets[:, None], -torch.inf)
    return whole - others.logsumexp(-1)


def no_metric(logits: Tensor) -> Tensor:
    """For checks that expect a metric: edits have none."""
    return logits[:, -1, 0]
