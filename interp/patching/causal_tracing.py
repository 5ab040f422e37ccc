"""Causal tracing: destroy the subject with noise, restore one state, and see how much of the answer comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.patching._batches import Split
from interp.patching._cells import Positions, cells, choice, window_of
from interp.patching._engine import Plan, sweep
from interp.patching._measure import checked, effects_of, embedding_std, gaussian_rows, score
from interp.patching._resume import Reader
from interp.patching._sites import read_site
from interp.patching.effects import Effects
from interp.types import Metric, Site

_SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


def causal_trace(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    *,
    subject: Positions,
    site: Site = "resid_post",
    window: int | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    n_draws: int = 10,
    noise: float = 3.0,
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> Effects:
    """Indirect effect of each state: metric with the subject noised and the state restored, minus metric with the
    subject noised.

    The clean prompts are run with Gaussian noise added to the embeddings of the subject; then, layer by layer and
    position by position, the clean activation is put back. A positive effect means that the state carries what the
    noise destroyed. Noise takes the model to inputs it never sees and can find other components than an exchange of
    tokens does (Zhang & Nanda 2023, arXiv:2309.16042): compare with `activation_patch` where there is a corrupted
    prompt.

    In the result `direction` is `"denoise"`, `clean` the intact metric and `corrupted` the metric under noise, averaged
    over draws; so `clean - corrupted` is the total effect and `recovery()` the restored share of it. Cost: that of
    `activation_patch`, `n_draws` times.

    Args:
        prompts: Only their clean tokens and positions are used.
        metric: Logits to one number per example; the paper uses `interp.metrics.answer_prob(prompts)`.
        subject: Names of `prompts.positions`, or indices, of the tokens to destroy.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out` or `mlp_out`.
        window: Layers restored together, centred on the layer named (from `layer - window // 2` on, cut off at the
            ends); 1 by default for a stream and 10 for `attn_out` and `mlp_out`, whose single outputs rarely matter
            alone. The effect of a window is not the sum of its layers'.
        positions: Where to restore, as for `activation_patch`.
        layers: The layers named; all by default.
        n_draws: Draws of noise for every example.
        noise: Standard deviation of the noise in standard deviations of the token embeddings.
        seed: For the noise; every cell sees the same.
        memory_budget, batch_size, progress: As for `activation_patch`.

    Raises:
        ValueError, RuntimeError: As `activation_patch`.

    Source:
        Meng, Bau, Andonian & Belinkov 2022 (arXiv:2202.05262), section 2 and appendix B: 3 standard deviations, windows
        of 10. Their standard deviation is of the embeddings of the subjects' tokens, ours of the whole embedding matrix
        (scaled as it enters the stream), so that it does not change with the prompts.
    """
    choice("site", site, _SITES)
    shape = checked(bridge, prompts, metric, site)
    if subject is None:
        raise ValueError(
            f"subject must say which tokens are destroyed: names ({', '.join(prompts.positions)}) or indices"
        )
    if n_draws < 1 or not noise > 0:
        raise ValueError(f"n_draws={n_draws} and noise={noise} must be positive")
    if window is None:
        window = 10 if site in ("attn_out", "mlp_out") else 1
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 layer")
    options: dict[str, Any] = {"axes": None, "neurons": None}
    where = cells(prompts, site, shape, positions=positions, layers=layers, **options)
    destroyed = cells(prompts, site, shape, positions=subject, layers=[0], **options).spots.any(0)

    n, n_pos = prompts.clean.shape
    reader = Reader(metric, torch.arange(n).repeat(n_draws), n)
    split = Split.of(bridge, shape, reader, n_pos, memory_budget, batch_size)
    sigma = noise * embedding_std(bridge)

    def corruption(rows: Tensor) -> Tensor:
        return sigma * gaussian_rows(rows, n_pos, shape.d_model, seed) * destroyed[rows % n].unsqueeze(-1)

    def restored(rows: Tensor, own: dict[int, Tensor]) -> dict[int, Tensor]:
        return read_site(bridge, prompts.clean[rows % n].to(split.device), site, sorted(own))

    windows = tuple(window_of(layer, window, shape.n_layers) for layer in where.layers)
    plan = Plan(
        prompts.clean.repeat(n_draws, 1), site, windows, where.spots.repeat(1, n_draws, 1), None, restored, corruption
    )
    intact = score(bridge, prompts.clean, reader, split)
    swept = sweep(bridge, plan, reader, split, progress=progress)
    settings = {
        "method": "causal_trace",
        "direction": "denoise",
        "value": "gaussian",
        "reference": "the same example of the clean run",
        "site": site,
        "subject": [str(label) for label in ([subject] if isinstance(subject, (str, int)) else subject)],
        "window": window,
        "noise_std": sigma,
        "n_draws": n_draws,
        "seed": seed,
    }
    return effects_of(
        bridge,
        prompts,
        metric,
        where,
        swept,
        intact,
        site=site,
        direction="denoise",
        value="gaussian",
        settings=settings,
    )
