"""Exact activation patching: replace one activation at a time and measure the metric."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.patching._batches import Split
from interp.patching._cells import Positions, cells, choice
from interp.patching._engine import Plan, Replacement, sweep
from interp.patching._latent_sites import LatentDictionary
from interp.patching._measure import checked, derangement, effects_of, embedding_std, gaussian_rows, score
from interp.patching._resume import Reader
from interp.patching._sites import STREAM, read_site
from interp.patching.effects import Effects
from interp.patching.latents import patch_latents
from interp.types import DIRECTIONS, SITES, VALUES, Direction, Metric, Site, Value

_REFERENCE: dict[Value, str] = {
    "swap": "the same example of the other run",
    "zero": "zero",
    "mean": "mean over the examples of the other run, position by position",
    "resample": "another example of the other run, drawn without fixed points",
    "gaussian": "the run's own activation plus Gaussian noise",
}


def activation_patch(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    *,
    site: Site | LatentDictionary = "resid_pre",
    direction: Direction = "denoise",
    value: Value = "swap",
    axes: Sequence[str] | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    latents: Sequence[int] | None = None,
    n_draws: int = 1,
    noise: float = 3.0,
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> Effects:
    """Effect on the metric of replacing each activation of a site, for every cell and example: patched minus baseline.

    One run is patched, the other gives the activations. `"denoise"` patches the run on the corrupted prompts with
    activations of the clean run and finds what suffices to restore the answer; `"noise"` patches the clean run with
    corrupted activations and finds what is necessary. They differ: of two inputs that are both needed (AND) noising
    finds each and denoising neither; of two that each suffice (OR) the reverse. Only the patched activation is
    replaced; everything after it is recomputed.

    Equal to one forward per cell to rounding (1e-5). Costs about half a forward of all examples per cell for sweeps
    over layers, a quarter where positions are swept too and the metric reads one position; `result.provenance["cost"]`
    counts them. A metric of `interp.metrics` lets the engine unembed only the position it reads and run examples in any
    order; a plain callable `logits -> [batch]` works too and is called once per cell with the logits of all examples in
    order, more slowly.

    Args:
        bridge: A model in evaluation mode.
        prompts: `interp.prompts.Prompts`: clean and corrupted tokens, named positions. Padding is refused.
        metric: Logits to one number per example, such as `interp.metrics.logit_difference(prompts)`.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out`, `mlp_out` (one vector per position; `attn_out` and
            `mlp_out` are what is added to the stream, after post-norms where there are any); `z`, `q`, `k`, `v` (one
            vector per head and position, `q` and `k` before rotation; `k` and `v` have key-value heads, dimension
            `kv_head`, where these are grouped); `pattern` (a head's attention from a destination `pos` to all sources);
            `neuron` (after the activation function; in a gated MLP the product). There is no `resid_mid` in models
            whose attention and MLP run in parallel. Or a dictionary (of `interp.dictionaries`), for its latents and its
            error: the result is `LatentEffects`, which says what is patched. Latents that are off in both runs cost
            nothing.
        value: What goes in: `"swap"`, the other run's activation on the same example; `"zero"`; `"mean"` over the
            examples of the other run at the same position; `"resample"`, the other run's activation on another example;
            `"gaussian"`, the run's own activation plus noise of `noise` standard deviations of the token embeddings
            (residual-width sites only). The other run is the clean one for `"denoise"`, the corrupted one for
            `"noise"`.
        axes: What is swept: `"layer"` and any of `"pos"` and `"head"` or `"neuron"`. What is not swept is patched
            together. Default `("layer", "pos")` for sites of one vector per position, `("layer", "head")` or `("layer",
            "neuron")` else; `("latent", "pos")`, without `"layer"`, for a dictionary.
        positions: Which positions: all, or a list of names of `prompts.positions` (each example at its own place) and
            indices. Without the axis `"pos"` they are patched together.
        layers: Which layers; all by default.
        neurons: Which neurons of every layer; all by default, which is one cell for each of them.
        latents: Which latents of the dictionary; all by default.
        n_draws: Draws of donors (`"resample"`) or noise (`"gaussian"`) that the effects are averaged over.
        noise: Size of the noise in standard deviations of the token embeddings.
        seed: For donors and noise, the same for every cell.
        memory_budget: Bytes that activations may take beside the model; batches are sized to fit.
        batch_size: Most rows (cells x examples) of one forward; by default what the budget allows.
        progress: Show a progress bar.

    Raises:
        ValueError: If an option is unknown, does not fit the site or the model, or the budget is too small.
        RuntimeError: If the model is in training mode.

    Source:
        Vig et al. 2020, Meng et al. 2022 (arXiv:2202.05262), Wang et al. 2022 (arXiv:2211.00593); noising and denoising
        as in Heimersheim & Nanda 2024 (arXiv:2404.15255). Wang et al. average `"mean"` over a third set of prompts:
        pass it as the corrupted ones. Miller et al. 2024 (arXiv:2407.08734) show how much the choices matter: all are
        in the provenance.

    Example:
        >>> p = interp.prompts.ioi(bridge, n=64)
        >>> effects = interp.patching.activation_patch(bridge, p, interp.metrics.logit_difference(p), site="z")
        >>> effects.top(5)
    """
    if isinstance(site, str):
        choice("site", site, SITES)
    choice("direction", direction, DIRECTIONS)
    choice("value", value, VALUES)
    if not isinstance(site, str):
        _check_draws(value, n_draws, len(prompts))
        return patch_latents(
            bridge, prompts, metric, site, latents=latents, axes=axes, positions=positions, layers=layers,
            neurons=neurons, direction=direction, value=value, reference=_REFERENCE[value], n_draws=n_draws, seed=seed,
            memory_budget=memory_budget, batch_size=batch_size, progress=progress,
        )  # fmt: skip
    if latents is not None:
        raise ValueError(f"latents= chooses from a dictionary, site=dictionary; here site={site!r}")
    shape = checked(bridge, prompts, metric, site)
    where = cells(prompts, site, shape, axes=axes, positions=positions, layers=layers, neurons=neurons)
    n = len(prompts)
    _check_draws(value, n_draws, n)
    if value == "gaussian" and site not in STREAM:
        raise ValueError(
            f"value='gaussian' is noise in units of the embedding, for {', '.join(STREAM)}; "
            f"site={site!r} has other units"
        )

    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(n).repeat(n_draws), n)
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    sigma = noise * embedding_std(bridge) if value == "gaussian" else 0.0
    replacement = _replacement(bridge, other, site, value, where.layers, split, n_draws=n_draws, sigma=sigma, seed=seed)
    windows = tuple((layer,) for layer in where.layers)
    plan = Plan(base.repeat(n_draws, 1), site, windows, where.spots.repeat(1, n_draws, 1), where.units, replacement)
    intact = score(bridge, other, reader, split)
    swept = sweep(bridge, plan, reader, split, progress=progress)
    settings = {
        "method": "activation_patch",
        "direction": direction,
        "value": value,
        "reference": _REFERENCE[value],
        "site": site,
        "n_draws": n_draws,
        "seed": seed,
        **({"noise_std": sigma} if value == "gaussian" else {}),
    }
    return effects_of(
        bridge, prompts, metric, where, swept, intact, site=site, direction=direction, value=value, settings=settings
    )


def _check_draws(value: Value, n_draws: int, n: int) -> None:
    if n_draws < 1 or (n_draws > 1 and value not in ("resample", "gaussian")):
        raise ValueError(
            f"n_draws={n_draws} with value={value!r}: expected 1, or more with value='resample' or 'gaussian'"
        )
    if value in ("mean", "resample") and n < 2:
        raise ValueError(
            f"value={value!r} needs other examples, but there is {n}; pass more prompts or use value='swap' or 'zero'"
        )


def _replacement(
    bridge: Any,
    other: Tensor,
    site: Site,
    value: Value,
    layers: Sequence[int],
    split: Split,
    *,
    n_draws: int,
    sigma: float,
    seed: int,
) -> Replacement:
    """What goes in, as a function of the rows of a chunk and their own activations."""
    n, n_pos = other.shape
    generator = torch.Generator().manual_seed(seed)

    def read(examples: Tensor) -> dict[int, Tensor]:
        return read_site(bridge, other[examples].to(split.device), site, layers)

    if value == "swap":
        return lambda rows, own: read(rows % n)
    if value == "resample":
        donors = torch.cat([derangement(n, generator) for _ in range(n_draws)])
        return lambda rows, own: read(donors[rows])
    if value == "zero":
        return lambda rows, own: {layer: torch.zeros_like(tensor) for layer, tensor in own.items()}
    if value == "mean":
        total: dict[int, Tensor] = {}
        for rows in split.chunks(n, 0):
            for layer, tensor in read(rows).items():
                total[layer] = total.get(layer, 0) + tensor.float().sum(0)
        return lambda rows, own: {
            layer: (total[layer] / n).to(own[layer].dtype).expand_as(own[layer]) for layer in layers
        }

    def noised(rows: Tensor, own: dict[int, Tensor]) -> dict[int, Tensor]:
        noise = sigma * gaussian_rows(rows, n_pos, split.geometry.d_model, seed).unsqueeze(2)
        return {layer: tensor + noise.to(tensor) for layer, tensor in own.items()}

    return noised
