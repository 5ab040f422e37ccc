"""How a dictionary reads the outputs of heads: its place, its encoder head by head, and the constants beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import check_place
from interp.hooks import hook_name, layer_of
from interp.hooks.names import hook_point


@dataclass(frozen=True)
class HeadReading:
    """Pre-activations of chosen latents as an affine function of the flattened heads z.

    pre[f] = scale(z) * sum over heads of z_h . directions[f, h] + bias[f]

    `scale` is 1 unless inputs are normalised token by token (`"layer_norm"`, `"constant_norm"`); all other constants,
    the centring of `"layer_norm"` and the norms of `decoder="rescaled"` among them, are in the directions and the bias.

    Attributes:
        layer: The block whose heads are read.
        latents: Which latents.
        directions: In the units of z.
        bias: What the pre-activation is where all heads are zero: b_enc - b_dec @ W_enc.
    """

    dictionary: Dictionary
    layer: int
    latents: list[int]
    directions: Float[Tensor, "latent head d_head"]
    bias: Float[Tensor, " latent"]

    @torch.no_grad()
    def scale(self, z: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token"]:
        """What each token's products are multiplied by, held at what it is."""
        if self.dictionary.normalisation not in ("layer_norm", "constant_norm"):
            return z.new_ones(z.shape[:-1])
        given = self.dictionary._normalised(z)
        centred = z - z.mean(-1, keepdim=True) if self.dictionary.normalisation == "layer_norm" else z
        return (given.norm(dim=-1) / centred.norm(dim=-1)).nan_to_num(nan=0.0, posinf=0.0)

    @torch.no_grad()
    def preactivations(self, z: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        """The dictionary's own, of the chosen latents."""
        return self.dictionary.preactivations(z)[..., self.latents]


def head_layer(bridge: Any, dictionary: Dictionary) -> int:
    """The block whose heads a dictionary reads, once hook and width fit.

    Raises:
        KeyError, ValueError: If it names no hook of this model, reads another one, or has another width.
    """
    hook, _ = check_place(bridge, dictionary)
    layer = layer_of(bridge, hook)
    heads = None if layer is None or not 0 <= layer < len(bridge.blocks) else hook_name("z", layer)
    if heads is None or hook_point(bridge, hook) is not hook_point(bridge, heads):
        raise ValueError(
            f"the dictionary reads {hook!r}; attribution to heads is for dictionaries of hook_z flattened over heads, "
            f"such as {hook_name('z', layer if heads and layer else 0)!r}, before W_O mixes them"
        )
    n_heads, d_head = head_shape(bridge, layer or 0)
    if dictionary.d_in != n_heads * d_head:
        raise ValueError(
            f"the dictionary is {dictionary.d_in} wide and {hook!r} of this model {n_heads} heads x {d_head} = "
            f"{n_heads * d_head}: it was made for another model"
        )
    return layer or 0


def head_shape(bridge: Any, layer: int) -> tuple[int, int]:
    """Number of heads of a layer and the width of each, from its own W_O."""
    weight = bridge.blocks[layer].attn.W_O
    return int(weight.shape[0]), int(weight.shape[1])


@torch.no_grad()
def head_reading(bridge: Any, dictionary: Dictionary, latents: Sequence[int], *, dtype: torch.dtype) -> HeadReading:
    """The reading of these latents, checked against the dictionary's own pre-activations.

    Raises:
        KeyError, ValueError: See `head_layer`; also for latents that do not exist, and dictionaries whose
            pre-activations are not affine in what they read.
    """
    layer = head_layer(bridge, dictionary)
    chosen = chosen_latents(dictionary, latents)
    W_enc = dictionary.W_enc[:, chosen].T.to(dtype)
    if dictionary.decoder == "rescaled":
        W_enc = W_enc * dictionary.W_dec[chosen].to(dtype).norm(dim=1, keepdim=True)
    if dictionary.normalisation == "layer_norm":
        W_enc = W_enc - W_enc.mean(1, keepdim=True)
    elif dictionary.normalisation in ("mean_norm", "mean_square"):
        W_enc = W_enc * dictionary._scale(dictionary.input_scale, W_enc)
    bias = dictionary._preactivations(dictionary.W_enc.new_zeros(dictionary.d_in))[chosen].to(dtype)
    found = HeadReading(dictionary, layer, chosen, W_enc.unflatten(1, head_shape(bridge, layer)), bias)
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(4, dictionary.d_in, generator=draws).to(dictionary.W_enc)
    expected = found.preactivations(z).to(dtype)
    given = found.scale(z)[:, None].to(dtype) * (z.to(dtype) @ W_enc.T) + bias
    room = (1e-4 if dictionary.W_enc.dtype in (torch.float32, torch.float64) else 0.05) * (1 + expected.abs().max())
    if not float((given - expected).abs().max()) <= room:
        raise ValueError(
            f"pre-activations of this {dictionary.architecture} dictionary are not (x - b_dec) @ W_enc + b_enc (they "
            f"differ by {float((given - expected).abs().max()):.2g} at random inputs): they are no sum over heads"
        )
    return found


def chosen_latents(dictionary: Dictionary, latents: Sequence[int]) -> list[int]:
    """Latents as plain numbers.

    Raises:
        ValueError: If there are none, or one does not exist or is named twice.
    """
    chosen = [int(latent) for latent in latents]
    wrong = [latent for latent in chosen if not 0 <= latent < dictionary.n_latents]
    if not chosen or wrong or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"latents={chosen[:10]} must name latents from 0 to {dictionary.n_latents - 1}, at least one and none twice"
        )
    return chosen
