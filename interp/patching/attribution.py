"""Attribution patching: estimate every effect of activation patching from two forwards and one backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch

from interp.patching._backward import differentiable, metric_name, no_gradient
from interp.patching._batches import Split, progress_bar
from interp.patching._cells import Cells, Positions, cells, choice
from interp.patching._engine import Swept
from interp.patching._latent_places import placed
from interp.patching._latent_sites import LatentDictionary
from interp.patching._measure import checked, effects_of
from interp.patching._passes import Passes, Scores
from interp.patching._quadrature import Points, quadrature
from interp.patching._resume import Reader
from interp.patching.effects import Effects
from interp.patching.latents import latent_effects
from interp.patching.rules import Preset, Rules, resolve_rules
from interp.types import DIRECTIONS, SITES, Direction, Metric, Site

Method: TypeAlias = Literal["gradient", "integrated_gradients", "relp", "relp_ah", "cp_lrp", "attnlrp", "gim"]

_REFERENCE = {
    "swap": "the same example of the other run",
    "zero": "zero",
    "mean": "mean over the examples of the other run, position by position",
}
_FLAT = 1e-5  # sum of absolute gradients at the logits that is zero but for rounding


def attribution_patch(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    *,
    sites: Site | LatentDictionary | Sequence[Site | LatentDictionary] = ("resid_pre", "attn_out", "mlp_out"),
    method: Method | Rules = "gradient",
    direction: Direction = "denoise",
    value: Literal["swap", "zero", "mean"] = "swap",
    axes: Sequence[str] | Mapping[Any, Sequence[str]] | None = None,
    positions: Positions = None,
    layers: Sequence[int] | None = None,
    neurons: Sequence[int] | None = None,
    latents: Sequence[int] | Mapping[Any, Sequence[int]] | None = None,
    steps: int = 5,
    points: Points = "gauss_legendre",
    rules: Preset | Rules | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> dict[Any, Effects]:
    """Estimates of what `activation_patch` would measure at these sites, for every cell and example, all from one
    backward pass.

    The score of a cell is (activation put in - activation of the run that is patched) times a coefficient, summed over
    the entries, units and positions of the cell: positive where patching raises the metric, in its unit, as for
    `activation_patch`, whose results have the same dimensions and coordinates, so that
    `agreement(exact, estimate)` compares cell by cell. The coefficient is the gradient of the metric in the run that is
    patched, or what a backward rule makes of it, or a mean of gradients. It is an approximation: check it on the model
    and prompts at hand, with `agreement` or `verify`.

    Costs two forwards and one backward pass of all examples, whatever the number of sites and cells; integrated
    gradients two forwards and `steps` forward and backward passes; the repairs as given below. Parameters are frozen
    meanwhile, and the graph begins at the stream entering block 0.

    Args:
        bridge, prompts, metric: As for `activation_patch`. The metric must be differentiable: `accuracy` and
            `answer_rank` are refused, and so is `kl_divergence` to the very run whose gradient is taken.
        sites: The sites, as for `activation_patch`; one name or several. Dictionaries among them (any number, also of
            one hook) get scores of their latents and errors, `LatentEffects`: the latent's change times its direction
            times the coefficient of the activation that is rebuilt. Each dictionary is scored in the model as it is,
            so that what flows back does not pass through the encoders of others (Marks et al. call it pass-through).
        method: `"gradient"` is attribution patching. `"integrated_gradients"` averages gradients over runs whose
            embeddings lie on the straight line from the run that is patched to the other (`value="swap"` only).
            `"relp"`, `"relp_ah"`, `"cp_lrp"`, `"attnlrp"`, `"gim"` and a `Rules` object of one's own replace the
            gradient: see `backward_rules`. Where the rules freeze attention, `q` and `k` have no score and are refused.
        direction: `"denoise"` takes the coefficients from the corrupted run and puts clean activations in; `"noise"`
            the reverse.
        value: What goes in: `"swap"`, `"zero"` or `"mean"`, as for `activation_patch`.
        axes, positions, layers, neurons: As for `activation_patch`; `neurons` is for the site `neuron`, `axes` for
            every site unless it is a mapping from sites to axes. A cell that joins positions or units is the sum of its
            parts. Dictionaries have the axes `"latent"` and `"pos"`: where named sites have others, give a mapping.
        latents: Which latents, of the one dictionary, or a mapping from dictionaries; all by default.
        steps: Points of integrated gradients.
        points: Where they lie: `"gauss_legendre"`, `"midpoint"`, or the `"left"` and `"right"` sums of published code.
            Gauss-Legendre is best where the metric is smooth along the line; where it jumps none is, and 5 points can
            be 10 % off: look at `completeness`.
        rules: With integrated gradients, backward rules in place of the gradient along the line.
        qk_fix: With `method="gradient"`: scores of `q` and `k` are the exact change of the attention pattern times the
            gradient at the pattern, instead of linear through a softmax that may be saturated. One more forward for
            each of the two sites.
        grad_drop: With `method="gradient"`: scores are the sum over layers of the absolute score whose gradient does
            not flow through what that layer adds to the stream, divided by the number of layers minus 1, so that paths
            which cancel do not hide a node. Unsigned. As many more backward passes as there are layers.
        memory_budget: Bytes that activations may take beside the model; batches are sized to fit.
        batch_size: Most rows (examples x steps) of one forward; by default what the budget allows.
        progress: Show a progress bar.

    Returns:
        `Effects` by site, with dictionaries themselves as keys. `provenance` says the method, its rules, `cost` in
        forwards and backwards of all examples, and `completeness`: the scores at the stream entering block 0, summed
        (`input_sum`), beside the change of the metric from one run to the other that they estimate (`metric_change`),
        in means over examples; integrated gradients converge to it, other methods need not come near.

    Raises:
        ValueError: If an option is unknown, does not fit the site, method or model, if the metric has no gradient, or
            the budget is too small; and, after the passes, if the gradient turns out to be zero in every example.
            `UnsupportedModule` (a ValueError) if a rule does not fit the model.
        RuntimeError: If the model is in training mode.

    Source:
        Nanda 2023, "Attribution patching"; relevance patching: Rezaei Jafari et al. 2025 (arXiv:2508.21258), whose
        scores sum over examples where ours keep them. Integrated gradients over inputs: Hanna et al. 2024
        (arXiv:2403.17806), who take left or right sums. AtP*: Kramar et al. 2024 (arXiv:2403.00745), sections 3.1 and
        3.2; residual sites, which they do not score, are divided by layers minus 1 here as well. Latents and error
        nodes: Marks et al. 2024 (arXiv:2403.19647), who average gradients along lines between activations of one
        dictionary at a time, where integrated gradients here change the input of the model.

    Example:
        >>> scores = interp.patching.attribution_patch(bridge, p, m, sites=("mlp_out", "z"), method="relp")
        >>> scores["mlp_out"].top(5)
    """
    given = tuple(sites) if isinstance(sites, Sequence) and not isinstance(sites, str) else (sites,)
    names: tuple[Site, ...] = tuple(site for site in given if isinstance(site, str))
    dictionaries = [site for site in given if not isinstance(site, str)]
    chosen = _rules(method, rules, points=points, steps=steps, value=value)
    _check_options(given, names, method, chosen, direction, value, qk_fix=qk_fix, grad_drop=grad_drop)
    shape = [checked(bridge, prompts, metric, site) for site in names or ("resid_pre",)][0]
    where: dict[Site, Cells] = {
        site: _cells(prompts, site, shape, axes=axes, positions=positions, layers=layers, neurons=neurons)
        for site in names
    }
    if isinstance(axes, Mapping) and (extra := [site for site in axes if not any(site is one for one in given)]):
        raise ValueError(
            f"axes= names {', '.join(map(_shown, extra))}, but the sites are {', '.join(map(_shown, given))}"
        )
    if neurons is not None and "neuron" not in where:
        raise ValueError(f"neurons= is for the site 'neuron'; the sites are {', '.join(map(_shown, given))}")
    places = placed(
        bridge, prompts, dictionaries, latents, axes=axes, positions=positions, layers=None if names else layers
    )
    if blocked := [place.title for place, _ in places if place.site in _shut(chosen)]:
        raise ValueError(f"no relevance reaches the {blocked[0]} under these rules; use 'relp' or 'gradient'")
    _check_model(bridge, shape, qk_fix=qk_fix, grad_drop=grad_drop, n_examples=len(prompts), value=value)
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(len(prompts)), len(prompts))
    _check_metric(reader, shape, base.shape[1])
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    line = quadrature(points, steps) if method == "integrated_gradients" else None
    fix: tuple[Site, ...] = tuple(site for site in names if site in ("q", "k")) if qk_fix else ()
    passes = Passes(bridge, split, base, other, value, where, chosen, line, fix, grad_drop, places)
    passes.check()
    with differentiable(bridge), progress_bar(progress, len(prompts), "attribution") as bar:
        scores = passes.run(bar.update)
    if line is None:
        _check_slope(metric, scores, direction)
    settings = {
        "method": method if isinstance(method, str) else "custom",
        "rules": chosen.to_dict(),
        "direction": direction,
        "value": value,
        "reference": _REFERENCE[value],
        "sites": [*names, *(place.title for place, _ in places)],
        "steps": None if line is None else steps,
        "points": None if line is None else points,
        "qk_fix": list(fix),
        "grad_drop": grad_drop,
        "completeness": _completeness(scores) if value == "swap" else None,
    }
    found: dict[Any, Effects] = dict.fromkeys(given)  # type: ignore[assignment]  # in the order that was asked for
    for place, cells_ in places:
        swept = Swept(scores.values[place.dictionary], scores.base.float(), passes.cost)
        found[place.dictionary] = latent_effects(
            bridge, prompts, metric, place, cells_, swept, scores.other.float(), direction, value, settings
        )
    for site in names:
        swept = Swept(scores.values[site], scores.base.float(), passes.cost)
        found[site] = effects_of(
            bridge, prompts, metric, where[site], swept, scores.other.float(), site=site, direction=direction,
            value=value, settings={**settings, "site": site},
        )  # fmt: skip
    if grad_drop:
        for site, effects in found.items():
            values = effects.values.assign_attrs(score="sum of absolute scores over dropped layers, / (layers - 1)")
            found[site] = replace(effects, values=values)
    return found


def _rules(method: Method | Rules, rules: Preset | Rules | None, *, points: str, steps: int, value: str) -> Rules:
    """The backward rules of a method, checked."""
    choice("points", points, get_args(Points))
    if not isinstance(method, Rules):
        choice("method", method, get_args(Method))
    if method != "integrated_gradients":
        if rules is not None:
            raise ValueError(
                f"rules= replaces the gradient of method='integrated_gradients'; here method={method!r}: pass the "
                "preset or the Rules as method= instead"
            )
        return resolve_rules(method)
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    if value in ("zero", "mean"):
        raise ValueError(
            f"method='integrated_gradients' averages gradients on the line from one run to the other, but "
            f"value={value!r} does not put the other run's activations in; use value='swap', or another method"
        )
    return resolve_rules("gradient" if rules is None else rules)


def _check_options(
    given: Sequence[Any],
    sites: tuple[Site, ...],
    method: Any,
    rules: Rules,
    direction: str,
    value: str,
    *,
    qk_fix: bool,
    grad_drop: bool,
) -> None:
    """What can be refused without looking at the model."""
    for site in sites:
        choice("sites", site, SITES)
    if not given or len({site if isinstance(site, str) else id(site) for site in given}) != len(given):
        raise ValueError(f"sites={tuple(map(_shown, given))} must name at least one site, and none twice")
    choice("direction", direction, DIRECTIONS)
    choice("value", value, _REFERENCE)
    name = method if isinstance(method, str) else "these rules"
    if blocked := [site for site in sites if site in _shut(rules)]:
        raise ValueError(
            f"no relevance reaches {' and '.join(map(repr, blocked))} with {name}: the attention pattern is held "
            "constant, or the factor in qkv is 0; ask for 'v', 'z' or 'pattern', or use method='relp' or 'gradient'"
        )
    for option, on in (("qk_fix", qk_fix), ("grad_drop", grad_drop)):
        if on and method != "gradient":
            raise ValueError(f"{option}=True repairs method='gradient'; here method={name!r}")
    if qk_fix and not {"q", "k"} & set(sites):
        raise ValueError(f"qk_fix=True is about the sites 'q' and 'k', but sites={sites}; add one of them")


def _shut(rules: Rules) -> list[str]:
    """The sites that nothing flows back to."""
    return [
        site
        for site, factor in zip("qkv", rules.qkv, strict=True)
        if factor == 0 or (rules.attention == "AH" and site != "v")
    ]


def _shown(site: Any) -> str:
    return repr(site) if isinstance(site, str) else f"the dictionary of {getattr(site, 'hook', '?')!r}"


def _check_model(bridge: Any, shape: Any, *, qk_fix: bool, grad_drop: bool, n_examples: int, value: str) -> None:
    if qk_fix and shape.delegated_attention:
        raise ValueError(
            f"qk_fix=True edits attention patterns, which {bridge.cfg.model_name} computes where they cannot be "
            "edited; use qk_fix=False, or interp.patching.activation_patch"
        )
    if grad_drop and shape.n_layers < 2:
        raise ValueError("grad_drop=True drops one layer of several; this model has 1")
    if value == "mean" and n_examples < 2:
        raise ValueError(
            "value='mean' needs other examples, but there is 1; pass more prompts or use value='swap' or 'zero'"
        )


def _check_metric(reader: Reader, shape: Any, n_pos: int) -> None:
    """Raise if the metric has no gradient, for those that can be asked about one example of made-up logits."""
    if reader.whole:
        return
    one = torch.zeros(1, dtype=torch.long)
    size = (1, shape.d_vocab) if reader.read is not None else (1, n_pos, shape.d_vocab)
    with torch.inference_mode(False), torch.enable_grad():
        if not reader.differentiable(torch.zeros(size, requires_grad=True), one).requires_grad:
            raise ValueError(no_gradient(metric_name(reader.metric)))


def _check_slope(metric: Any, scores: Scores, direction: str) -> None:
    """Raise if the gradient is zero where it was taken although the two runs differ: no score would mean anything."""
    gap = (scores.other - scores.base).abs()
    flat = (scores.slope < _FLAT) & (scores.slope * (1 + scores.spread) <= 1e-3 * gap)
    if not (flat & (gap > 0)).any() or not (flat | (gap == 0)).all():
        return
    run, reverse = ("corrupted", "noise") if direction == "denoise" else ("clean", "denoise")
    raise ValueError(
        f"the gradient of {metric_name(metric)} is zero at the logits of the {run} run in every example, so all scores "
        f"would be exactly zero although the metric of the two runs differs by {float(gap.mean()):.3g} on average "
        f"(kl_divergence is flat at its own reference, a probability where it is saturated). Use "
        f"metrics.logit_difference, direction={reverse!r}, method='integrated_gradients', or activation_patch"
    )


def _completeness(scores: Scores) -> dict[str, float | None]:
    total, change = float(scores.inputs.mean()), float((scores.other - scores.base).mean())
    error = abs(total - change) / abs(change) if change else None
    return {"input_sum": total, "metric_change": change, "relative_error": error}


def _cells(prompts: Any, site: Site, shape: Any, **options: Any) -> Cells:
    """The cells of one site; a refusal says which."""
    if site != "neuron":
        options["neurons"] = None
    if isinstance(options["axes"], Mapping):
        options["axes"] = options["axes"].get(site)
    try:
        return cells(prompts, site, shape, **options)
    except ValueError as error:
        raise ValueError(f"site {site!r}: {error}") from None
