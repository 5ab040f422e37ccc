"""Channels between heads: rank-1 components of what an early head writes, each with what a later head reads of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.attention._patterns import check_layers, check_tokens
from interp.attention._spherical import direction_tail
from interp.attention._weights import HeadWeights, gains, head_weights
from interp.attention.composition import Mode, check_mode, pair_coords, reader
from interp.hooks import hook_name, interventions, reads, run_until
from interp.hooks.names import device_of, without_hooks
from interp.models import geometry, provenance, require_eval
from interp.results import Result, labelled
from interp.stats import adjust_p_values

if TYPE_CHECKING:
    import pandas as pd

Reader = tuple[int, int, Literal["q", "k", "v"]]

DIMS = ("early_layer", "early_head", "component", "late_layer", "late_head")


@dataclass(frozen=True, eq=False, repr=False)
class Channels(Result):
    """What later heads read of every rank-1 component of what earlier heads write.

    `values` (early_layer, early_head, component, late_layer, late_head) is the squared composition score of the
    component as a part of the head's: they sum over components to the square of the head's composition score. NaN
    unless early comes before late.

    Attributes:
        own: The squared composition score of the component by itself, whatever its size: the share of the reader
            that lies along the direction the component writes. 1 / d_model for a random direction.
        p_value: Probability that a random direction has an `own` score as high.
        singular_values: (early_layer, early_head, component) of W_OV, largest first.
        mode: Whether the later head's query, key or value reads.
    """

    own: xr.DataArray
    p_value: xr.DataArray
    singular_values: xr.DataArray
    mode: str

    def total(self) -> xr.DataArray:
        """The composition score of every pair of heads, back from its components."""
        return np.sqrt(self.values.sum("component", skipna=False)).assign_attrs(unit="composition score")

    def table(self, alpha: float = 0.05, *, components: int | None = None) -> pd.DataFrame:
        """One row per channel, surest first: `early`, `component`, `late`, `own`, `share` of the pair's squared score,
        `p_value`, `p_holm` (corrected for every channel tested) and `found` (p_holm below alpha).

        Args:
            alpha: Chance of any false channel, if all directions were random.
            components: Test only that many components of each head, those with the largest singular values.
        """
        import pandas as pd

        kept = slice(None) if components is None else slice(0, components)
        total = self.values.sum("component", skipna=False)
        arrays = {"own": self.own, "share": self.values / total.where(total > 0), "p_value": self.p_value}
        cut = xr.Dataset({name: array.isel(component=kept) for name, array in arrays.items()})
        frame: Any = cut.to_dataframe().reset_index().dropna(subset=["p_value"])
        frame["p_holm"] = adjust_p_values(frame["p_value"].to_numpy())
        frame["found"] = frame["p_holm"] < alpha
        for end in ("early", "late"):
            layer, head = frame[f"{end}_layer"], frame[f"{end}_head"]
            frame[end] = [f"L{a}H{b}" for a, b in zip(layer, head, strict=True)]
        frame = frame.sort_values(["p_holm", "own"], ascending=[True, False], kind="stable")
        columns = ["early", "component", "late", "own", "share", "p_value", "p_holm", "found"]
        return pd.DataFrame(frame[columns].reset_index(drop=True))

    def pairs(self, alpha: float = 0.05, *, components: int | None = None) -> pd.DataFrame:
        """Predicted pairs of heads, surest first: one row per pair with its surest channel and how many were found."""
        frame = self.table(alpha, components=components)
        best = frame.groupby(["early", "late"], sort=False).agg(
            component=("component", "first"),
            own=("own", "first"),
            p_holm=("p_holm", "first"),
            channels=("found", "sum"),
        )
        return best.reset_index()

    def plot(self, late: tuple[int, int] | None = None) -> Any:
        """Figure: own scores of the components of every earlier head, as read by one later head (the one with the
        highest score by default)."""
        from interp.plotting import heatmap

        if late is None:
            best = self.own.max(["early_layer", "early_head", "component"])
            place = np.unravel_index(int(np.nanargmax(best.values)), best.shape)
            late = (int(place[0]), int(place[1]))
        layer, head = late
        if not 0 < layer < self.own.sizes["late_layer"] or not 0 <= head < self.own.sizes["late_head"]:
            raise ValueError(f"late={late} has no earlier head; expected a layer from 1 and a head of this model")
        part = np.sqrt(self.own.sel(late_layer=layer, late_head=head, early_layer=slice(0, layer - 1)))
        names = [f"L{a}H{b}" for a in part.early_layer.values for b in part.early_head.values]
        flat = xr.DataArray(part.values.reshape(len(names), -1), dims=("early head", "component"))
        title = f"What the {self.mode} side of L{layer}H{head} reads of each component"
        unit = "composition score of the component"
        return heatmap(flat, title=title, unit=unit, signed=False, y_labels=names)


def channels(
    bridge: Any,
    mode: Mode,
    *,
    early: Sequence[int] | None = None,
    late: Sequence[int] | None = None,
    norms: bool = False,
    max_bytes: int = 2**30,
) -> Channels:
    """The singular components of every head's W_OV, and how strongly each is read by every later head. No forward.

    W_OV = sum_i s_i u_i v_i^T reads along u_i and writes along v_i, and |W_OV M|^2 = sum_i s_i^2 |v_i^T M|^2 exactly:
    components partition the squared composition score. A pair that communicates in one direction stands out in one
    component where the score of whole matrices hides it. The null is a random direction; its tail is computed, not
    drawn, so that p-values can be corrected for the number of channels. Directions in the residual stream are
    not random to a trained model (all heads avoid or use some), so a small p-value is a candidate, which
    `channel_intervention` tests.

    Args:
        mode: What of the later head reads: its query, key or value.
        early: Layers of the writing heads; all by default.
        late: Layers of the reading heads; all by default.
        norms: As in `composition_scores`.
        max_bytes: Refuse a larger result.

    Source:
        Merullo, Eickhoff & Pavlick 2024, Talking Heads (arXiv:2406.09519): composition scores of singular components.
        The exact partition and the null are ours.
    """
    require_eval(bridge)
    check_mode(mode)
    first, second = check_layers(bridge, early), check_layers(bridge, late)
    weights = head_weights(bridge)
    n_layers, n_heads, d_model, d_head = weights.W_Q.shape
    shape = (n_layers, n_heads, d_head, n_layers, n_heads)
    if (needed := 12 * int(np.prod(shape))) > max_bytes:
        raise ValueError(
            f"the channels of {n_layers} x {n_heads} heads take {needed:,} bytes; max_bytes is {max_bytes:,}. Raise "
            f"it, or use composition_scores and then channels of a smaller model"
        )
    after = gains(bridge).after if norms else torch.ones(n_layers, d_model, dtype=torch.float64)
    inner, outer = reader(bridge, weights, mode, norms)
    reads_of = inner @ torch.linalg.qr(outer, mode="r").R.mT  # [layer, head, d_model, d_head]
    spectrum = torch.linalg.svdvals(reads_of).square()
    spectrum = spectrum / spectrum.sum(-1, keepdim=True)
    own, share, p_value = (np.full(shape, np.nan) for _ in range(3))
    sizes = np.full(shape[:3], np.nan)
    for layer in first:
        singular, directions = _components(weights, layer, after[layer])
        sizes[layer] = singular.numpy()
        part = (singular.square() / singular.square().sum(-1, keepdim=True)).numpy()  # [head, component]
        for reading in [other for other in second if other > layer]:
            matrix = reads_of[reading]
            read = torch.einsum("acd,bdk->acbk", directions, matrix).square().sum(-1)
            read = (read / matrix.square().sum((-2, -1))).numpy()  # [head, component, late head]
            own[layer, :, :, reading] = read
            share[layer, :, :, reading] = part[..., None] * read
            for head in range(n_heads):
                tail = direction_tail(read[..., head], spectrum[reading, head].numpy(), d_model)
                p_value[layer, :, :, reading, head] = tail
    coords = {**pair_coords(n_layers, n_heads), "component": range(d_head)}
    triple = {name: coords[name] for name in DIMS[:3]}
    record = provenance(bridge, method="channels", mode=mode, norms=norms, early=first, late=second)
    return Channels(
        labelled(share, DIMS, coords, unit="squared composition score"),
        record,
        own=labelled(own, DIMS, coords, unit="squared composition score of the component"),
        p_value=labelled(p_value, DIMS, coords),
        singular_values=labelled(sizes, DIMS[:3], triple),
        mode=mode,
    )


@dataclass(frozen=True)
class Channel:
    """One component of a head: reads along `read`, writes `size` times as much along `write` (unit vectors)."""

    layer: int
    head: int
    component: int
    size: float
    read: Float[Tensor, "d_model"]
    write: Float[Tensor, "d_model"]


def channel(bridge: Any, layer: int, head: int, component: int) -> Channel:
    """The component of a head's W_OV with this index, 0 having the largest singular value; signs are arbitrary."""
    check_layers(bridge, [layer])
    weights = head_weights(bridge)
    n_heads, d_head = weights.W_Q.shape[1], weights.W_Q.shape[3]
    if not 0 <= head < n_heads or not 0 <= component < d_head:
        raise ValueError(f"head={head}, component={component}: this model has heads 0 to {n_heads - 1} with components "
                         f"0 to {d_head - 1}")  # fmt: skip
    u, s, vh = _svd(weights.W_V[layer, head], weights.W_O[layer, head])
    return Channel(layer, head, component, float(s[component]), u[:, component], vh[component])


def channel_activations(bridge: Any, tokens: Int[Tensor, "batch pos"], chosen: Channel) -> Float[Tensor, "batch pos"]:
    """How far the head's output goes along the direction that the channel writes, at every token. One forward."""
    require_eval(bridge)
    check_tokens(bridge, tokens)
    name = hook_name("z", chosen.layer)
    with torch.no_grad(), reads(bridge, name) as found:
        run_until(bridge, tokens.to(device_of(bridge)), chosen.layer + 1)
    along, _ = _handles(bridge, chosen)
    return (found[name][:, :, chosen.head].float() @ along.to(found[name].device)).cpu()


@contextmanager
def channel_intervention(
    bridge: Any, chosen: Channel | Sequence[Channel], *, scale: float | int = 0.0, read_by: Reader | None = None
) -> Iterator[None]:
    """Scale what heads send through their channels, in every forward inside the context.

    The part of the head's output along the channel's direction is multiplied by `scale`: 0 removes it, 1 changes
    nothing, 2 doubles it. The rest of the output stays. All later parts see it, unless `read_by` names one.

    Args:
        chosen: One or several channels.
        read_by: (layer, head, "q" | "k" | "v"): only this input of this later head sees the change, as if the stream it
            reads had been different, its norm included; everything else sees the model as it was. For shared
            keys and values, `head` is the key-value head.

    Raises:
        ValueError: If the reader is not above the channels, or (with `read_by`) the outputs of attention are normalised
            before they are added, so that no part of the stream is one head's. As `hooks.interventions` besides.

    Source:
        Merullo et al. 2024 edit the component in the weights; without biases and `read_by`, scaling the output along
        v_i is the same.
    """
    require_eval(bridge)
    several = [chosen] if isinstance(chosen, Channel) else list(chosen)
    if not several:
        raise ValueError("no channel to intervene on; make one with interp.attention.channel(bridge, layer, head, i)")
    if read_by is None:
        with interventions(bridge, _removals(bridge, several, float(scale))):
            yield
        return
    layer, head, side = read_by
    _check_reader(bridge, several, read_by)
    sources = [hook_name("z", layer_of) for layer_of in sorted({one.layer for one in several})]
    entrance, target = hook_name("resid_pre", layer), hook_name(side, layer)
    with reads(bridge, [*sources, entrance]) as stream:

        def edit(tensor: Tensor) -> Tensor:
            change = torch.zeros_like(stream[entrance])
            for one in several:
                along, _ = _handles(bridge, one)
                sent = stream[hook_name("z", one.layer)][:, :, one.head].float() @ along.to(tensor.device)
                change = change + ((scale - 1) * sent[..., None] * one.write.to(tensor.device)).to(change.dtype)
            moved = _projection(bridge, read_by, stream[entrance] + change)
            new = tensor.clone()
            new[:, :, head] = tensor[:, :, head] + moved - _projection(bridge, read_by, stream[entrance])
            return new

        with interventions(bridge, {target: edit}):
            yield


def _svd(value: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of `value @ out` (d_model x d_head times d_head x d_model) through their QR factors."""
    left, inner = torch.linalg.qr(value)
    right, outer = torch.linalg.qr(out.mT)
    u, s, vh = torch.linalg.svd(inner @ outer.mT)
    return left @ u, s, vh @ right.mT


def _components(weights: HeadWeights, layer: int, after: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values [head, component] and written directions [head, component, d_model] of a layer's heads."""
    found = [_svd(value, out * after) for value, out in zip(weights.W_V[layer], weights.W_O[layer], strict=True)]
    return torch.stack([s for _, s, _ in found]), torch.stack([vh for _, _, vh in found])


def _handles(bridge: Any, one: Channel) -> tuple[Float[Tensor, "d_head"], Float[Tensor, "d_head"]]:
    """What z is projected on to get the output along the channel, and what in z writes exactly one unit of it."""
    out = bridge.blocks[one.layer].attn.W_O[one.head].detach().cpu().double()  # [d_head, d_model]
    return (out @ one.write).float(), (one.write @ torch.linalg.pinv(out)).float()


def _removals(bridge: Any, several: Sequence[Channel], scale: float) -> dict[str, Any]:
    by_layer: dict[int, list[Channel]] = {}
    for one in several:
        by_layer.setdefault(one.layer, []).append(one)

    def edit_of(layer: int) -> Any:
        handles = [(one.head, *_handles(bridge, one)) for one in by_layer[layer]]

        def edit(z: Tensor) -> Tensor:
            new = z.clone()
            for head, along, unit in handles:  # components of one head are orthogonal, so their order is nothing
                along, unit = along.to(z.device), unit.to(z.device)
                sent = z[:, :, head].float() @ along
                new[:, :, head] += ((scale - 1) * sent[..., None] * unit).to(z.dtype)
            return new

        return edit

    return {hook_name("z", layer): edit_of(layer) for layer in by_layer}


def _check_reader(bridge: Any, several: Sequence[Channel], read_by: Reader) -> None:
    layer, head, side = read_by
    check_layers(bridge, [layer])
    shape = geometry(bridge)
    if side not in ("q", "k", "v"):
        raise ValueError(f"read_by={read_by}: expected (layer, head, 'q', 'k' or 'v')")
    n_heads = shape.n_heads if side == "q" else shape.n_kv_heads
    if not 0 <= head < n_heads:
        raise ValueError(f"read_by={read_by}: this model has {n_heads} heads of {side!r}, 0 to {n_heads - 1}")
    if above := [one for one in several if one.layer >= layer]:
        raise ValueError(f"read_by={read_by} is not above the channel of L{above[0].layer}H{above[0].head}")
    if shape.post_norm:
        raise ValueError(
            f"{bridge.cfg.model_name} normalises the output of attention before it is added, so no part of the stream "
            f"is one head's; intervene without read_by"
        )


def _projection(bridge: Any, read_by: Reader, stream: Tensor) -> Float[Tensor, "batch pos d_head"]:
    """Query, key or value of one head without its bias, of a residual stream."""
    layer, head, side = read_by
    block = bridge.blocks[layer]
    norm = block._modules.get("ln1")
    with without_hooks(bridge):
        read = stream if norm is None else norm(stream)
    return read @ {"q": block.attn.W_Q, "k": block.attn.W_K, "v": block.attn.W_V}[side][head].to(read.dtype)
