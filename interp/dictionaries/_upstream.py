"""Dictionaries below the one that is attributed: where each writes into the stream, and the terms it splits that into.

A term is a latent that is on at a source, what the decoder adds without latents, and the error: together the
activation that is rebuilt, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._head_reading import head_layer
from interp.dictionaries._stream_components import Part, Pull, Writer
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import check_place, check_width
from interp.hooks import hook_name, layer_of
from interp.hooks.names import hook_point, names
from interp.types import Site

Role = Literal["z", "attn_out", "mlp_out", "stream"]


@dataclass(frozen=True)
class Upstream:
    """A dictionary and its place.

    Attributes:
        hook, target: What it reads and rebuilds.
        role: What the second is to the stream; `"stream"` is the stream itself.
        layer: The block that writes it; of a `"stream"`, the block whose attention reads it.
        reads: The block it reads in.
        onward: Whether its latents' pre-activations are sums over heads themselves.
    """

    dictionary: Dictionary
    hook: str
    target: str
    role: Role
    layer: int
    reads: int
    onward: bool

    @property
    def label(self) -> str:
        return self.hook if self.hook == self.target else f"{self.hook} to {self.target}"


def place(bridge: Any, dictionary: Dictionary) -> Upstream:
    """Where a dictionary writes.

    Raises:
        KeyError, ValueError: If it cannot be placed, or rebuilds nothing that is added to the stream.
    """
    hook, target = check_place(bridge, dictionary)
    layer = layer_of(bridge, target)
    if layer is not None and 0 <= layer < len(bridge.blocks):
        sites: dict[Site, tuple[Role, int]] = {
            "z": ("z", layer), "attn_out": ("attn_out", layer), "mlp_out": ("mlp_out", layer),
            "resid_pre": ("stream", layer), "resid_post": ("stream", layer + 1),
        }  # fmt: skip
        for site, (role, where) in sites.items():
            there = hook_name(site, layer)
            if there in names(bridge, there) and hook_point(bridge, target) is hook_point(bridge, there):
                reads = layer_of(bridge, hook)
                reads = layer if reads is None or not 0 <= reads < len(bridge.blocks) else reads
                heads = hook_name("z", reads)
                onward = heads in names(bridge, heads) and hook_point(bridge, hook) is hook_point(bridge, heads)
                if onward:
                    head_layer(bridge, dictionary)
                return Upstream(dictionary, hook, target, role, where, reads, onward)
    raise ValueError(
        f"a dictionary of upstream rebuilds {target!r}, which is no term of the stream; expected hook_z, hook_attn_out "
        "or hook_mlp_out of an earlier layer (transcoders: as what they rebuild), or the hook_resid_pre that is read"
    )


def placed(bridge: Any, dictionaries: Sequence[Dictionary], layer: int, depth: int) -> list[Upstream]:
    """All of them in their places, each of some use for a latent that reads the heads of `layer`.

    Raises:
        KeyError, ValueError: See `place`; also if two rebuild the same term, or one is above all that is read.
    """
    found = [place(bridge, dictionary) for dictionary in dictionaries]
    readers = {layer} | ({one.reads for one in found if one.onward and one.reads < layer} if depth > 1 else set())
    terms: dict[tuple[str, int], str] = {}
    for one in found:
        used = one.layer in readers if one.role == "stream" else one.layer < layer
        if not used:
            raise ValueError(
                f"the dictionary of {one.label!r} has no part in what attention of layer {layer} reads: expected terms "
                f"of earlier layers, or {hook_name('resid_pre', layer)!r}"
                + (" (or the stream that a hook_z dictionary of upstream reads, with depth=2)" if depth == 1 else "")
            )
        term = ("attention" if one.role in ("z", "attn_out") else one.role, one.layer)
        if term in terms:
            raise ValueError(f"{terms[term]!r} and {one.label!r} split the same term of the stream; give one of them")
        terms[term] = one.label
    return found


@dataclass(frozen=True)
class Coded:
    """The terms of one dictionary on some examples.

    Attributes:
        example, src, latent: Of every latent that is on, [entry].
        amount: What multiplies its direction: the latent, in each token's own units, times the post-norm's scale.
        directions: What one unit of a latent adds where the dictionary rebuilds.
        pull: Directions in the stream as directions there.
        rest: What it decodes to without latents, and its error.
    """

    upstream: Upstream
    example: Int[Tensor, " entry"]
    src: Int[Tensor, " entry"]
    latent: Int[Tensor, " entry"]
    amount: Float[Tensor, " entry"]
    directions: Float[Tensor, "latent width"]
    pull: Pull
    rest: list[Part]


@torch.no_grad()
def coded(upstream: Upstream, found: Mapping[str, Tensor], writer: Writer | None) -> Coded:
    """What a dictionary makes of activations by hook; `writer` takes heads to the stream.

    Raises:
        ValueError: If widths do not fit, or the decoder is not affine in the latents.
    """
    dictionary, target = upstream.dictionary, upstream.target
    x, own = found[upstream.hook].flatten(2), found[target].flatten(2).double()
    check_width(x, dictionary.d_in, upstream.hook)
    check_width(own, dictionary.d_out, target)
    latents = dictionary.encode(x)
    zero = torch.zeros_like(latents)
    without = dictionary.decode(zero, x).double()
    amount = latents.double()
    if dictionary.normalisation in ("layer_norm", "constant_norm"):
        amount = amount * dictionary._spread(x).double()
    directions = dictionary.directions().double()
    decoded, rebuilt = amount @ directions + without, dictionary.decode(latents, x).double()
    room = 1e-3 if dictionary.W_dec.dtype in (torch.float32, torch.float64) else 0.05
    if not float((decoded - rebuilt).abs().max()) <= room * (1e-6 + float(rebuilt.abs().max())):
        raise ValueError(f"the decoder of the dictionary of {upstream.label!r} is not affine in its latents")
    pull: Pull = (lambda rho: rho) if writer is None else writer.pull
    factor = None if writer is None else writer.factor
    parts = {"bias": (f"b_dec of {target}", without), "error": (f"error of {target}", own - decoded)}
    if dictionary.skip:
        constant = dictionary.decode(zero, torch.zeros_like(x)).double()
        parts["bias"] = (f"b_dec of {target}", constant)
        parts["skip"] = (f"skip of {target}", without - constant)
    rest = [Part(label, kind, target, values, pull, factor) for kind, (label, values) in parts.items()]
    example, src, latent = latents.nonzero(as_tuple=True)
    amount = amount[example, src, latent]
    if factor is not None:
        amount = amount * factor[example, src]
    return Coded(upstream, example, src, latent, amount, directions, pull, rest)
