"""Factorising what does not fit in memory: rows in batches, statistics of fixed size between them."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries._snmf_fit import Fit, Settings, best_of
from interp.dictionaries._snmf_init import Init
from interp.dictionaries._snmf_source import Source
from interp.dictionaries._snmf_steps import Data, best_codes, gram, own_energy, sweep_codes, sweep_components

_SWEEPS = 3
_SAMPLE_BATCHES, _SAMPLE_PER_COMPONENT = 2, 40
SAMPLE_ITERATIONS, _SAMPLE_PATIENCE = 300, 20


def fit_minibatch(
    source: Source, n_components: int, init: Init, settings: Settings, batch_size: int, seeds: range, progress: bool
) -> tuple[Fit, list[float]]:
    """Start from a sample that is factorised in memory, then pass over all rows `max_iter` times.

    In a pass every batch's activations are improved with the components fixed, and the inner products that the
    components depend on (component x component and component x neuron) are summed; then the components are updated.
    That is exact block descent, so from the first pass on loss and penalty never rise. The first pass also updates the
    components after every batch, from the sums so far.
    """
    n_tokens, d_neurons = source.shape
    generator = torch.Generator().manual_seed(seeds[0])
    n_sample = min(n_tokens, max(_SAMPLE_BATCHES * batch_size, _SAMPLE_PER_COMPONENT * n_components))
    drawn = torch.randperm(n_tokens, generator=generator)[:n_sample].sort().values
    sample = Data(source.rows(drawn))
    source.check(sample.total)
    in_memory = replace(settings, max_iter=SAMPLE_ITERATIONS, patience=_SAMPLE_PATIENCE)
    start, losses = best_of(sample, n_components, init, in_memory, official=False, seeds=seeds)
    components = start.components
    codes = torch.zeros(n_components, n_tokens, dtype=source.dtype, device=source.device)
    best = Fit(components, codes, float("inf"), repairs=start.repairs)
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    since, reference = 0, float("inf")
    del sample
    with tqdm(total=settings.max_iter, disable=silent, desc="snmf passes") as bar:
        for number in range(settings.max_iter):
            first = number == 0
            code_gram = torch.zeros(n_components, n_components, dtype=torch.float64, device=source.device)
            from_codes = torch.zeros(n_components, d_neurons, dtype=torch.float64, device=source.device)
            for part, rows in source.batches(batch_size):
                inner, cross = gram(components), components @ rows.T
                new = codes[:, part]
                for _ in range(_SWEEPS):
                    new = sweep_codes(new, inner, cross, settings.penalty)
                codes[:, part] = new
                code_gram += gram(new)
                from_codes += new @ rows
                if first:
                    source.total += float(rows.double().square().sum())
                    components = _updated(components, code_gram, from_codes, settings)
            if not first:
                components = _updated(components, code_gram, from_codes, settings)
            # The loss of these components with the codes of this pass, from the same sums.
            wide = components.double()
            loss = source.total - 2.0 * float((wide * from_codes).sum()) + float((gram(wide) * code_gram).sum())
            own = own_energy(gram(components), code_gram)
            best.offer(components, codes, loss, penalty=settings.penalty * own)
            since = 0 if best.loss < reference * (1.0 - settings.tol) else since + 1
            reference = best.loss if since == 0 else reference
            bar.update()
            bar.set_postfix({"error": f"{loss / source.total:.4f}"}, refresh=False)
            if since >= settings.patience:
                break
    return _finished(best, source, batch_size), losses


def _updated(
    components: Float[Tensor, "component neuron"],
    code_gram: Float[Tensor, "component component"],
    from_codes: Float[Tensor, "component neuron"],
    settings: Settings,
) -> Float[Tensor, "component neuron"]:
    cross = from_codes.to(components.dtype)
    for _ in range(_SWEEPS):
        components = sweep_components(components, code_gram, cross, settings.keep, settings.penalty)
    return components


def _finished(best: Fit, source: Source, batch_size: int) -> Fit:
    """The best codes for the final components, and the loss of exactly this pair."""
    inner = gram(best.components)
    wide = best.components.double()
    loss = 0.0
    for part, rows in source.batches(batch_size):
        codes = best_codes(best.codes[:, part], inner, best.components @ rows.T)
        best.codes[:, part] = codes
        loss += float((rows.double() - codes.double().T @ wide).square().sum())
    best.loss = loss
    return best
