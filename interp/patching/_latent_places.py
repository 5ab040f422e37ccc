"""Putting a dictionary in its place: every check before a run, the directions of its latents, and its cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from interp import hooks
from interp.hooks.names import device_of, hook_point, probe_tokens
from interp.patching._cells import Cells, _spots, choice, indices
from interp.patching._latent_sites import LatentSite, parameter_of, pullback
from interp.types import SITES, Site


def latent_site(bridge: Any, dictionary: Any, latents: Sequence[int] | None) -> LatentSite:
    """The dictionary in its place, checked; runs one forward over three tokens and no other.

    Raises:
        ValueError: If the hooks do not exist here, cannot be edited, do not have the dictionary's widths, or the
            dictionary cannot encode, or its decoder is not affine in the latents; or a latent does not exist.
    """
    hook, target, layer = _place(bridge, dictionary)
    with torch.no_grad(), hooks.reads(bridge, list(dict.fromkeys((hook, target)))) as found:
        bridge(probe_tokens(bridge))
    for name in (hook, target):
        if found[name].ndim < 3 or found[name].shape[:2] != (1, 3):
            raise ValueError(
                f"{name!r} holds {tuple(found[name].shape)} for one row of 3 tokens; the latents of a dictionary need "
                "one vector per position, [batch, pos, ...]"
            )
    x, own = found[hook].flatten(2), found[target].flatten(2)
    n = int(dictionary.n_latents)
    for which, tensor in (("d_in", x), ("d_out", own)):
        wide = getattr(dictionary, which, None)
        if wide is not None and wide != tensor.shape[-1]:
            raise ValueError(
                f"{hook if which == 'd_in' else target!r} of this model is {tensor.shape[-1]} wide, the dictionary's "
                f"{which} {wide}: it was made for another model or hook"
            )
    with torch.no_grad():
        encoded = dictionary.encode(x)
        rebuilt = dictionary.decode(encoded, x)
    if tuple(encoded.shape) != (1, 3, n) or rebuilt.shape != own.shape:
        raise ValueError(
            f"the dictionary encodes {tuple(x.shape)} to {tuple(encoded.shape)} and decodes to {tuple(rebuilt.shape)}; "
            f"expected {(1, 3, n)} and {tuple(own.shape)}"
        )
    directions, probe = _directions(dictionary, x, own.shape[-1])
    chosen = torch.tensor(indices("latents", latents, n))
    return LatentSite(
        dictionary, hook, target, layer, _site_of(bridge, target), chosen,
        directions[chosen.to(directions.device)], probe,
    )  # fmt: skip


def latent_cells(prompts: Any, place: LatentSite, *, axes: Sequence[str] | None, positions: Any, **other: Any) -> Cells:
    """The cells of a dictionary: `("latent", "pos")` by default; chosen latents not swept are patched together."""
    if given := [name for name, value in other.items() if value is not None]:
        raise ValueError(
            f"{given[0]}= is for named sites; a dictionary lies in layer {place.layer}: choose with latents= and "
            "positions="
        )
    swept = ("latent", "pos") if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for axis in swept:
        choice("axes", axis, ("latent", "pos"))
    if not swept or len(set(swept)) != len(swept):
        raise ValueError(f"axes={swept} must name 'latent', 'pos' or both, and none twice")
    spots, labels, tokens = _spots(prompts, positions)
    if "pos" not in swept:
        spots = spots.any(0, keepdim=True)
    return Cells(swept, (place.layer,), spots, labels, tokens, place.chosen if "latent" in swept else None)


def placed(
    bridge: Any, prompts: Any, dictionaries: Sequence[Any], latents: Any, *, axes: Any, positions: Any, layers: Any
) -> tuple[tuple[LatentSite, Cells], ...]:
    """Every dictionary in its place with its cells; `latents` and `axes` may be mappings from dictionaries."""
    if latents is not None and not isinstance(latents, Mapping) and len(dictionaries) != 1:
        raise ValueError(
            f"latents= is one list, but there are {len(dictionaries)} dictionaries among the sites; pass one, or "
            "{dictionary: latents, ...}"
        )
    if isinstance(latents, Mapping) and not all(any(key is one for one in dictionaries) for key in latents):
        raise ValueError("latents= names a dictionary that is not among the sites; add it there")
    if not isinstance(axes, Mapping) and dictionaries and "layer" in (axes or ()):
        raise ValueError(
            f"axes={axes} are not those of a dictionary, 'latent' and 'pos'; pass a mapping from sites to axes"
        )

    def own(options: Any, dictionary: Any) -> Any:
        if not isinstance(options, Mapping):
            return options
        return next((option for key, option in options.items() if key is dictionary), None)

    places = []
    for dictionary in dictionaries:
        place = latent_site(bridge, dictionary, own(latents, dictionary))
        where = latent_cells(prompts, place, axes=own(axes, dictionary), positions=positions, layers=layers)
        places.append((place, where))
    return tuple(places)


def _place(bridge: Any, dictionary: Any) -> tuple[str, str, int]:
    """The hooks that are read and rebuilt, and the block of the second."""
    if not all(hasattr(dictionary, name) for name in ("hook", "n_latents", "encode", "decode")):
        raise ValueError(
            f"a site is a name or a dictionary with hook, target_hook, n_latents, encode and decode, such as those of "
            f"interp.dictionaries; got {type(dictionary).__name__}"
        )
    if not dictionary.hook:
        raise ValueError(
            'this dictionary does not say which hook it reads; set dictionary.hook, for example "blocks.2.hook_mlp_out"'
        )
    names = (dictionary.hook, getattr(dictionary, "target_hook", None) or dictionary.hook)
    n_layers = len(bridge.blocks)
    for name in names:
        try:
            hooks.resolve(bridge, name)
        except KeyError as error:
            raise ValueError(f"the dictionary's hook is not one of this model: {error.args[0]}") from error
        layer = hooks.layer_of(bridge, name)
        if layer is None or not 0 <= layer < n_layers:
            raise ValueError(f"{name!r} lies outside the blocks; latents of dictionaries inside a block can be patched")
        if name.endswith(("hook_pattern", "hook_attn_scores", "hook_scale")):
            raise ValueError(f"{name!r} does not hold one vector per position, which a dictionary needs")
    hook, target = names
    if not hooks.editable(bridge, target):
        raise ValueError(
            f"edits of {target!r} have no effect on {bridge.cfg.model_name}: its latents cannot be patched"
        )
    ordered = hooks.resolve_many(bridge, list(dict.fromkeys(names)))
    if len(ordered) == 2 and ordered[0] != hook:
        raise ValueError(f"the dictionary reads {hook!r}, which comes after {target!r}, the hook that it rebuilds")
    own, there = parameter_of(dictionary), device_of(bridge)
    if own is not None and own.device.type != there.type:
        raise ValueError(
            f"the dictionary is on {own.device} and the model on {there}; move it: dictionary.to({str(there)!r})"
        )
    layer = hooks.layer_of(bridge, target)
    assert layer is not None
    # one spelling, so that no hook is read under two names
    sites: list[Site | None] = [_site_of(bridge, name) for name in names]
    spelt = [
        name if site is None else hooks.hook_name(site, hooks.layer_of(bridge, name) or 0)
        for name, site in zip(names, sites, strict=True)
    ]
    return spelt[0], spelt[1], layer


def _directions(dictionary: Any, x: Tensor, width: int) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """What one unit of each latent adds, and the probe of how that differs from token to token, if it does."""
    draws = torch.Generator().manual_seed(0)
    against = torch.randn(width, generator=draws).to(x)
    rows = against.expand(*x.shape[:2], -1)
    given = pullback(dictionary, x, rows)
    elsewhere = torch.rand(given.shape, generator=draws).to(given)
    if not torch.allclose(given, pullback(dictionary, x, rows, elsewhere), rtol=1e-4, atol=1e-6):
        raise ValueError(
            "the decoder of this dictionary is not affine in its latents, so that a latent has no direction; splice it "
            "in and edit its latents instead (interp.dictionaries.spliced)"
        )
    first = x[0, :1]
    eye = torch.eye(width, dtype=x.dtype, device=x.device)
    directions = pullback(dictionary, first.expand(width, -1), eye).T.contiguous()
    reference = given[0, 0]
    scale = (given @ reference / reference.square().sum().clamp(min=1e-30)).unsqueeze(-1)
    if torch.allclose(given, reference.expand_as(given), rtol=0, atol=1e-6 * float(reference.abs().max())):
        return directions, None
    if not torch.allclose(given, scale * reference, rtol=1e-3, atol=1e-4 * float(reference.abs().max())):
        raise ValueError(
            "what a latent of this dictionary adds turns from token to token and does not only change its length; "
            "splice it in and edit its latents instead (interp.dictionaries.spliced)"
        )
    return directions, (against, reference)


def _site_of(bridge: Any, name: str) -> Site | None:
    """The site that this hook is, under whatever name."""
    layer = hooks.layer_of(bridge, name)
    for site in SITES:
        own = hooks.hook_name(site, -1 if layer is None else layer)
        if hooks.names(bridge, own) and hook_point(bridge, own) is hook_point(bridge, name):
            return site
    return None
