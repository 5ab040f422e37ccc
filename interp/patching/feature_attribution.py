"""Which features matter: scores of the latents and errors of several dictionaries, and their exact effects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, get_args

import torch

from interp import hooks
from interp.patching._backward import differentiable
from interp.patching._batches import Split, progress_bar
from interp.patching._cells import Cells, Positions, choice
from interp.patching._engine import Swept
from interp.patching._feature_lines import LinePasses
from interp.patching._latent_places import latent_site, placed
from interp.patching._latent_sites import LatentDictionary, LatentSite
from interp.patching._measure import checked
from interp.patching._quadrature import Points, quadrature
from interp.patching._resume import Reader
from interp.patching.activation import activation_patch
from interp.patching.attribution import _REFERENCE, _check_metric, _shut, attribution_patch
from interp.patching.feature_scores import FeatureEffects
from interp.patching.latents import LatentEffects, latent_effects
from interp.patching.rules import Preset, Rules, resolve_rules
from interp.types import DIRECTIONS, Direction, Metric

FeatureMethod: TypeAlias = Literal[
    "gradient", "relp", "relp_ah", "cp_lrp", "attnlrp", "gim", "integrated_gradients", "integrated_gradients_inputs",
    "exact",
]  # fmt: skip
Dictionaries: TypeAlias = LatentDictionary | Sequence[LatentDictionary]


def feature_effects(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    dictionaries: Dictionaries,
    *,
    method: FeatureMethod | Rules = "relp",
    direction: Direction = "noise",
    value: Literal["swap", "zero", "mean"] = "swap",
    per_position: bool = True,
    positions: Positions = None,
    latents: Sequence[int] | Mapping[Any, Sequence[int]] | None = None,
    nodes: Iterable[str] | None = None,
    steps: int = 10,
    points: Points = "left",
    rules: Preset | Rules | None = None,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> FeatureEffects:
    """Effects on the metric of every latent and every error of several dictionaries: nodes of a feature circuit.

    A node is one latent (or the error, as one node) of one dictionary at one position, or at all positions together.
    Its effect is what the metric would change by if it had its value of the other run, all else at the dictionary as it
    is. Each dictionary is scored in the model as it is: what flows back does not pass through other encoders.

    Costs two forwards and one backward for the gradient and the backward rules, however many dictionaries; for
    `"integrated_gradients"` two forwards and `steps` forwards and backwards **for each dictionary** (blocks below it
    are not run again); for `"integrated_gradients_inputs"` `steps` of each in all; for `"exact"` one forward for every
    node and position whose value differs between the runs of an example.

    Args:
        bridge, prompts, metric: As for `activation_patch`; the metric must be differentiable.
        dictionaries: One or several, at most one for each activation that is rebuilt: autoencoders of any site, skip
            and plain transcoders. Their decoders must be affine in the latents.
        method: `"relp"` and the other presets of `backward_rules`, or `Rules`; `"gradient"` is attribution patching.
            `"integrated_gradients"`: of latents and error of one dictionary at a time, between their values in the two
            runs (or zero, or means), as Marks et al. `"integrated_gradients_inputs"`: between the embeddings of the two
            runs, as `attribution_patch`. `"exact"`: patched one by one (`activation_patch`), the reference for all.
        direction: `"noise"` (the default here, as in the paper: what would the clean run lose?) or `"denoise"`.
        value: What nodes get: their value of the other run, zero, or their mean over the other run's examples.
        per_position: False adds up the positions of a node.
        positions: Only these, names or numbers.
        latents: Only these latents, of the one dictionary, or by dictionary; errors are always scored.
        nodes: In their place, names of nodes: only the latents that are named, with or without a position (and the
            first of a dictionary of which none is), at the positions asked for.
        steps, points: Of integrated gradients. `"left"` sums of 10 are the paper's; `"gauss_legendre"` needs fewer.
        rules: With integrated gradients, backward rules in place of the gradient along the line.
        memory_budget, batch_size, progress: As for `attribution_patch`. Scores are kept for every example: 4 bytes x
            nodes x positions x examples.

    Returns:
        `FeatureEffects`, nodes in the order of computation; `provenance["cost"]` in forwards and backwards of all
        examples.

    Raises:
        ValueError: If an option is unknown or does not fit, two dictionaries rebuild one activation, or as
            `attribution_patch` and `activation_patch`.
        RuntimeError: If the model is in training mode.

    Source:
        Marks et al. 2024 (arXiv:2403.19647), section 3; relevance patching in its place: Rezaei Jafari et al. 2025
        (arXiv:2508.21258). The paper's error node is the reconstruction's; here it has all that latents do not carry
        (the same, unless a dictionary has a skip connection or undoes a normalisation token by token).

    Example:
        >>> scores = interp.patching.feature_effects(bridge, p, m, (sae0, sae1), method="integrated_gradients")
        >>> scores.top(10)
    """
    if not isinstance(method, Rules):
        choice("method", method, get_args(FeatureMethod))
    choice("direction", direction, DIRECTIONS)
    choice("value", value, _REFERENCE)
    choice("points", points, get_args(Points))
    if rules is not None and not str(method).startswith("integrated_gradients"):
        raise ValueError(
            f"rules= replaces the gradient of integrated gradients; here method={method!r}: pass them there"
        )
    if method == "integrated_gradients_inputs" and value != "swap":
        raise ValueError(f"value={value!r}: embeddings lie between those of the two runs; use value='swap'")
    checked(bridge, prompts, metric, "resid_pre")
    named = ordered(bridge, dictionaries)
    if nodes is not None:
        if latents is not None:
            raise ValueError("give latents= or nodes=, not both")
        latents = _named_latents(named, nodes)
    axes = ("latent", "pos") if per_position else ("latent",)
    shared: dict[str, Any] = {
        "direction": direction, "value": value, "positions": positions, "memory_budget": memory_budget,
        "batch_size": batch_size, "progress": progress,
    }  # fmt: skip
    inner = list(named.values())
    if method == "exact":
        own = latents if isinstance(latents, Mapping) or latents is None else {inner[0]: latents}
        found = {
            sae: activation_patch(
                bridge, prompts, metric, site=sae, axes=axes,
                latents=next((some for key, some in (own or {}).items() if key is sae), None), **shared,
            )
            for sae in inner
        }  # fmt: skip
        cost: dict[str, Any] = {}
        for effects in found.values():
            for key, count in effects.provenance["cost"].items():
                cost[key] = cost.get(key, 0) + count
    elif method == "integrated_gradients":
        places = placed(bridge, prompts, inner, latents, axes=axes, positions=positions, layers=None)
        line = steps, points, resolve_rules("gradient" if rules is None else rules)
        found = _along_lines(
            bridge, prompts, metric, places, line, direction, value, memory_budget, batch_size, progress
        )
        cost = next(iter(found.values())).provenance["cost"]
    else:
        kind = "integrated_gradients" if method == "integrated_gradients_inputs" else method
        found = attribution_patch(
            bridge, prompts, metric, sites=inner, method=cast(Any, kind), axes=axes, latents=latents, steps=steps,
            points=points, rules=rules, **shared,
        )  # fmt: skip
        cost = next(iter(found.values())).provenance["cost"]
    title = method if isinstance(method, str) else "custom"
    parts = [cast(LatentEffects, found[sae]) for sae in inner]
    result = FeatureEffects.joined(parts, named, "activation_patch" if title == "exact" else title)
    result.provenance.update(cost=cost, all_positions=positions is None)
    return result


def ordered(bridge: Any, dictionaries: Dictionaries) -> dict[str, Any]:
    """The dictionaries by name, in the order in which the model computes what they rebuild.

    Raises:
        ValueError: If there is none, or two rebuild one activation.
    """
    given = list(dictionaries) if isinstance(dictionaries, Sequence) else [dictionaries]
    if not given:
        raise ValueError("no dictionaries: features need at least one")
    places = [latent_site(bridge, dictionary, None) for dictionary in given]
    targets = [place.target for place in places]
    order = hooks.resolve_many(bridge, targets)  # one spelling of each
    if len(order) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1 or target not in order)
        raise ValueError(
            f"several dictionaries rebuild {twice!r}: each activation is split into nodes once; compare "
            "dictionaries of one activation with attribution_patch(sites=...)"
        )
    places.sort(key=lambda place: order.index(place.target))
    return {node_prefix(place): place.dictionary for place in places}


def node_prefix(place: LatentSite) -> str:
    """What nodes of a dictionary are named after: layer and site of what is rebuilt, or its hook."""
    return place.target.removeprefix("blocks.") if place.site is None else f"{place.layer}.{place.site}"


def _named_latents(named: Mapping[str, Any], nodes: Iterable[str]) -> dict[Any, list[int]]:
    """The latents that nodes name, by dictionary; at least one of each."""
    found: dict[str, set[int]] = {name: set() for name in named}
    for node in nodes:
        name, _, unit = node.partition("@")[0].rpartition("/")
        choice("nodes", name, found)
        if unit != "error" and not unit.isdigit():
            raise ValueError(f"no node {node!r}; nodes are called like '{name}/17', '{name}/error' or '{name}/17@3'")
        found[name] |= set() if unit == "error" else {int(unit)}
    return {named[name]: sorted(units) or [0] for name, units in found.items()}


def _along_lines(
    bridge: Any,
    prompts: Any,
    metric: Any,
    places: tuple[tuple[LatentSite, Cells], ...],
    line: tuple[int, Points, Rules],
    direction: Direction,
    value: Literal["swap", "zero", "mean"],
    memory_budget: int,
    batch_size: int | None,
    progress: bool,
) -> dict[Any, LatentEffects]:
    """Integrated gradients of each dictionary between its own values."""
    steps, points, rules = line
    if value == "mean" and len(prompts) < 2:
        raise ValueError("value='mean' needs other examples, but there is 1; pass more prompts or use value='swap'")
    if blocked := [place.title for place, _ in places if place.site in _shut(rules)]:
        raise ValueError(f"no relevance reaches the {blocked[0]} under these rules; use 'relp' or 'gradient'")
    base, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    reader = Reader(metric, torch.arange(len(prompts)), len(prompts))
    shape = checked(bridge, prompts, metric, "resid_pre")
    _check_metric(reader, shape, base.shape[1])
    split = Split.of(bridge, shape, reader, base.shape[1], memory_budget, batch_size)
    passes = LinePasses(
        bridge, split, base, other, value, {}, rules, quadrature(points, steps), (), False, places
    )  # fmt: skip
    passes.check()
    with differentiable(bridge), progress_bar(progress, len(prompts), "integrated gradients") as bar:
        scores = passes.run(bar.update)
    settings = {
        "method": "integrated_gradients", "rules": rules.to_dict(), "direction": direction, "value": value,
        "reference": _REFERENCE[value], "steps": steps, "points": points,
    }  # fmt: skip
    found = {}
    for place, where in places:
        swept = Swept(scores.values[place.dictionary], scores.base.float(), passes.cost)
        found[place.dictionary] = latent_effects(
            bridge, prompts, metric, place, where, swept, scores.other.float(), direction, value, settings
        )
    return found
