"""What a neuron reads and writes, as vectors of the residual stream, and the token directions they are compared with.

A neuron i of a layer reads the stream h through `W_in[:, i]` (and `W_gate[:, i]` in a gated MLP) and writes `W_out[i]`.
Between those weights and the stream stand norms. With `fold=True` their gains, and the mean that LayerNorm takes out,
are part of the vectors, so that for a stream whose scale is held fixed

    reading       w . norm(h)  =  (in or gate vector) . h / scale(h)  +  constant
    direct logit  of writing a * W_out[i]  =  a * (out vector) . unembedding[:, t] / scale(h)

With `fold=False` they are the weights as stored. All are float32 (float64 for a float64 model), on the model's device.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.hooks import hook_name, names, reads
from interp.hooks.names import probe_tokens, without_hooks
from interp.models import geometry
from interp.types import Site

Side = Literal["in", "gate", "out"]
SIDES: tuple[Side, ...] = ("in", "gate", "out")


def side_vectors(bridge: Any, layer: int, side: Side, *, fold: bool = True) -> Float[Tensor, "d_mlp d_model"]:
    """One vector per neuron of a layer: what it reads (`"in"`, `"gate"`) or writes (`"out"`).

    `"in"` is the linear branch of a gated MLP (`up_proj`), and the only one of a plain MLP; `"gate"` is the branch that
    goes through the activation. Biases belong to no vector.

    With `fold=True`:

    - reading sides are multiplied by the gain of the norm that the MLP reads through;
    - `"out"` is multiplied by the gain of the norm after the MLP, in post-norm models. That norm also divides by a
      scale that depends on all neurons together; so there the direction of a neuron's write is exact, its size is known
      up to a positive factor per position;
    - where norms subtract the mean over `d_model` (LayerNorm) it is taken out of all three: no later part sees it.

    The first call on a bridge runs one forward over three tokens, to see that its norms stand where this says.

    Raises:
        ValueError: If there is no such layer or side, the model has no gate, or its MLP is built in another way.
    """
    check_sides(bridge, [side])
    n_layers = int(bridge.cfg.n_layers)
    if not 0 <= layer < n_layers:
        raise ValueError(f"no layer {layer} in {bridge.cfg.model_name}; its layers are 0 to {n_layers - 1}")
    _check_wiring(bridge)
    block = bridge.blocks[layer]
    weight = _exact(block.mlp.W_out if side == "out" else getattr(block.mlp, f"W_{side}"))
    vectors = weight if side == "out" else weight.T
    if fold:
        norm = block._modules.get("ln2_post") if side == "out" else _reading_norm(block)
        if norm is not None:
            if side == "out" and _centres(norm):  # what is written is centred before that norm's gain, not after
                vectors = vectors - vectors.mean(-1, keepdim=True)
            vectors = vectors * _gain(bridge, norm).to(vectors)
        if _centres(bridge.ln_final):
            vectors = vectors - vectors.mean(-1, keepdim=True)
    return vectors.contiguous()


def unembedding(bridge: Any, *, fold: bool = True) -> Float[Tensor, "d_model d_vocab"]:
    """One direction of the stream per token: its column of `W_U`; with `fold=True` times the gain of the final norm.

    A vector added to the last stream moves the logit of token t by its product with column t over the scale that the
    final norm divides by (before any soft cap). The mean over the vocabulary is not taken out.

    Raises:
        ValueError: If the model has no final norm, or the unembedding is not of the width of the stream.
    """
    return Unembedding(bridge, fold=fold).columns(0, int(bridge.W_U.shape[1]))


class Unembedding:
    """The same directions, some columns at a time: folding never copies the whole matrix."""

    def __init__(self, bridge: Any, *, fold: bool) -> None:
        _check_wiring(bridge)
        self._weight: Tensor = bridge.W_U.detach()
        self.d_model, self.d_vocab = (int(size) for size in self._weight.shape)
        self.device = self._weight.device
        self._gain = _gain(bridge, bridge.ln_final) if fold else None
        self.centres = fold and _centres(bridge.ln_final)

    def columns(self, start: int, stop: int) -> Float[Tensor, "d_model some"]:
        found = _exact(self._weight[:, start:stop])
        if self._gain is not None:
            found = found * self._gain.to(found)[:, None]
        return found - found.mean(0, keepdim=True) if self.centres else found


def check_sides(bridge: Any, sides: Any) -> None:
    """Refuse sides that this model's neurons do not have."""
    for side in sides:
        if side not in SIDES:
            raise ValueError(f"no side {side!r} of a neuron; the sides are {', '.join(map(repr, SIDES))}")
        if side == "gate" and not geometry(bridge).gated:
            raise ValueError(f"{bridge.cfg.model_name} has no gate: the MLP of {bridge.cfg.architecture} is plain. "
                             f"What its neurons read is side 'in', what they write is 'out'")  # fmt: skip


_known: weakref.WeakKeyDictionary[Any, set[bool]] = weakref.WeakKeyDictionary()


def _check_wiring(bridge: Any) -> None:
    """Refuse a model whose blocks are not norm, MLP, [norm], added to the stream. Looked at once per bridge."""
    known, compatible = _known.setdefault(bridge, set()), bool(bridge.compatibility_mode)
    if compatible in known:
        return
    if "ln_final" not in bridge._modules:
        raise _refused(bridge, "there is no norm before its unembedding")
    if int(bridge.W_U.shape[0]) != int(bridge.cfg.d_model):
        raise _refused(
            bridge, f"its unembedding is {tuple(bridge.W_U.shape)} but its stream has {bridge.cfg.d_model} dimensions"
        )
    for block in bridge.blocks:
        mlp = block._modules.get("mlp")
        if mlp is None or not all(isinstance(getattr(mlp, name, None), Tensor) for name in ("W_in", "W_out")):
            raise _refused(
                bridge, "not every block has an MLP with one W_in and one W_out (a mixture of experts has several)"
            )
        if not {"ln1", "ln2"} & block._modules.keys():
            raise _refused(bridge, "its MLPs read the stream without a norm")
    _check_blocks(bridge)
    known.add(compatible)


def _centres(norm: Any) -> bool:
    return not norm.uses_rms_norm


def _reading_norm(block: Any) -> Any:
    """Of the MLP: its own, or the one it shares with attention in some parallel blocks (GPT-J, Phi)."""
    return block._modules.get("ln2") or block._modules["ln1"]


def _check_blocks(bridge: Any) -> None:
    """See on three tokens that each MLP gets norm(stream), and adds [norm](hook_post @ W_out + b_out) to the stream."""
    hooks = [_hooks(layer) for layer in range(int(bridge.cfg.n_layers))]
    wanted = [hook for layer in hooks for hook in layer.values()]
    missing = sorted(set(wanted) - set(names(bridge)))
    if missing:
        raise _refused(bridge, f"its blocks do not show {', '.join(missing[:5])}")
    parallel = geometry(bridge).parallel
    with without_hooks(bridge):
        with reads(bridge, wanted) as found:
            bridge(probe_tokens(bridge))
        for layer, block in enumerate(bridge.blocks):
            got = {site: found[hook].reshape(-1, found[hook].shape[-1]) for site, hook in hooks[layer].items()}
            middle = got["resid_pre"] + got["attn_out"]
            stream = got["resid_pre"] if parallel else middle
            written = got["neuron"] @ block.mlp.W_out
            written = written if block.mlp.b_out is None else written + block.mlp.b_out
            after = block._modules.get("ln2_post")
            read, added = _rows(_reading_norm(block), stream), _rows(after, written)
            for problem, actual, expected in (
                ("what its MLP gets is not the stream through its norm", got["read"], read),
                ("what its MLP adds is not hook_post @ W_out", got["resid_post"] - middle, added),
            ):
                if not bool(actual.isfinite().all()):
                    raise _refused(bridge, f"layer {layer}: its activations on three tokens are NaN or infinite")
                error = float((actual - expected).abs().max() / torch.stack([actual, expected, stream]).abs().max())
                if not error <= (1e-3 if written.dtype in (torch.float32, torch.float64) else 0.05):
                    raise _refused(
                        bridge, f"layer {layer}: {problem} (relative difference {error:.2g} on three tokens)"
                    )


def _hooks(layer: int) -> dict[str, str]:
    sites: tuple[Site, ...] = ("resid_pre", "attn_out", "neuron", "resid_post")
    return {**{site: hook_name(site, layer) for site in sites}, "read": f"blocks.{layer}.mlp.hook_in"}


def _rows(norm: Any, rows: Tensor) -> Tensor:
    return rows if norm is None else norm(rows.unsqueeze(0)).reshape(rows.shape)


def _refused(bridge: Any, why: str) -> ValueError:
    return ValueError(
        f"{bridge.cfg.model_name} ({bridge.cfg.architecture}): {why}, so its neurons cannot be put beside its tokens "
        f"here. interp.hooks.names(bridge, '*mlp*') lists what can be read while it runs"
    )


def _gain(bridge: Any, norm: Any) -> Tensor:
    """What a norm multiplies each dimension by: measured, since families store it in several ways or fold it away.

    The measurement has the precision of the model's dtype, so where it agrees with a stored form, that is returned.
    """
    parameter = next(iter(bridge.original_model.parameters()))
    width = int(bridge.cfg.d_model)
    # mean zero and no zeros, so that both kinds of norm treat it alike; large, so that epsilon is nothing
    probe = 64.0 * (1.0 - 2.0 * (torch.arange(width, device=parameter.device) % 2))
    probe = (probe - probe.mean()).to(parameter.dtype)
    inner = norm.original_component  # without the hooks around it
    above, below = (_exact(inner(x.reshape(1, 1, width))).flatten() for x in (probe, -probe))
    measured = (above - below) / 2 / (_exact(probe) / _exact(probe).pow(2).mean().sqrt())  # a bias cancels
    stored = getattr(inner, "weight", None)
    if not isinstance(stored, Tensor) or stored.shape != measured.shape:
        return measured
    nearest = min((_exact(stored), 1 + _exact(stored)), key=lambda form: float((form - measured).abs().max()))
    room = {torch.float32: 1e-5, torch.float64: 1e-5}.get(parameter.dtype, 0.02)  # epsilon of the norm, or rounding
    size = torch.maximum(above.abs(), below.abs())
    return nearest if bool(((nearest - measured).abs() <= room * size).all()) else measured


def _exact(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()
