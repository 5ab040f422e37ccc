"""Patching across layers and prompts: any layer and position of one run into any layer and position of another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.models import Geometry, provenance
from interp.patching._backward import metric_name
from interp.patching._batches import Split
from interp.patching._cells import Positions, _spots, choice, indices
from interp.patching._cross_sweep import CrossPlan, LayerMap, cross_sweep
from interp.patching._engine import Swept
from interp.patching._measure import checked, score
from interp.patching._resume import Reader
from interp.patching._sites import STREAM
from interp.patching.cross_effects import CrossLayerEffects
from interp.prompts import Prompts
from interp.results import labelled
from interp.types import Metric, Site

Pairs = Literal["all", "back", "forward"]
Run = Literal["clean", "corrupted"]
Control = Literal["resample", "random"]


def cross_layer_patch(
    bridge: Any,
    source: Any,
    target: Any,
    metric: Metric,
    *,
    site: Site = "resid_post",
    pairs: Pairs = "all",
    source_layers: Sequence[int] | None = None,
    target_layers: Sequence[int] | None = None,
    positions: Positions = None,
    source_positions: Positions = None,
    together: bool = False,
    run: Run = "clean",
    layer_map: LayerMap | None = None,
    rescale: bool = False,
    control: Control | None = "resample",
    n_controls: int = 1,
    groups: str | Sequence[Hashable] | None = None,
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> CrossLayerEffects:
    """Effect of putting the vector at (source prompt, layer, position) in at (target prompt, layer, position), for
    every pair of layers.

    Two studies are special cases. Back-patching: `source=None, pairs="back"` puts a later layer's state of the same
    prompt at an earlier layer of the same position, so that the layers in between see it once more; if that repairs a
    wrong answer, what they do came too late. Patchscopes: another prompt as source, whose state is put in where the
    target prompt has a placeholder, so that the target prompt reads out what the state says. A positive effect means
    that the metric rose.

    A grid of L x L cells has a best cell whatever was patched. So by default every cell is measured once more with a
    control, and the result's `test`, `held_out` and `repair` say what is left.

    Costs the forwards of the target and source runs, and per measured cell a forward from the target layer and position
    on, `1 + n_controls` times; `result.provenance["cost"]` counts them. `layer_map` must be fast: it is called for each
    pair and chunk of examples.

    Args:
        bridge: A model in evaluation mode.
        source: Where vectors come from: `Prompts` (their clean tokens), token ids `[example or 1, pos]`, or None for
            the run that is patched itself. Lengths of source and target may differ.
        target: `Prompts` whose clean run is patched (see `run`), read by the metric.
        metric: Logits to one number per example, such as `interp.metrics.logit_difference(target)`.
        site: `resid_pre`, `resid_mid`, `resid_post`, `attn_out` or `mlp_out`: the same for source and target. With
            `resid_post`, layer l means the stream that leaves block l, so a target l is seen by the blocks from l + 1
            on; `resid_pre` reaches the embedding.
        pairs: `"all"`; `"back"`, source above target; or `"forward"`, source below target.
        source_layers, target_layers: All by default.
        positions: Where vectors go: names of `target.positions` and indices, one coordinate of `pos` for each; all by
            default.
        source_positions: Where they come from, one for each of `positions` or one for all; the same by default.
        together: Put the vectors of all positions in at once, as one cell.
        run: `"clean"` or `"corrupted"`: which run of the target is patched. `recovery()` is then 1 or 0 where nothing
            changes.
        layer_map: Maps every vector on its way, `(vectors [..., d_model], source layer, target layer) -> vectors`;
            for instance what `fit_layer_maps` gives. The stream's basis drifts with depth, so a vector may be unread at
            another layer for no deeper reason. Controls are mapped too.
        rescale: Give every vector the norm of the one that it replaces (after `layer_map`).
        control: What is put in for comparison: `"resample"`, the vector of another example of the source, which says as
            much about something else; `"random"`, a random direction of the same norm; or None.
        n_controls: Draws of the control for every cell and example.
        groups: What makes examples one observation: the name of a label of `target`, such as `"subject"`, or one value
            per example. `"resample"` takes vectors from other groups only, and the result's tests flip, hold out and
            resample whole groups.
        seed: For the controls.
        memory_budget, batch_size, progress: As for `activation_patch`.

    Raises:
        ValueError: If an option is unknown, prompts do not fit the model or each other, or a control cannot be drawn.
        RuntimeError: If the model is in training mode.

    Source:
        Back-patching: Biran et al. 2024 (arXiv:2406.12775), who report the share of wrong answers that some pair of
        layers repairs and generate text; we read a metric and add the controls. Patchscopes: Ghandeharioun et al. 2024
        (arXiv:2401.06102).

    Example:
        >>> p = interp.prompts.two_hop(bridge, relation="landmark_currency")
        >>> m = interp.metrics.logit_difference(p)
        >>> back = interp.patching.cross_layer_patch(bridge, None, p, m, pairs="back", positions=["subject", "end"])
        >>> back.test(alternative="greater")
    """
    choice("site", site, STREAM)
    choice("pairs", pairs, get_args(Pairs))
    choice("run", run, get_args(Run))
    if control is not None:
        choice("control", control, get_args(Control))
    if n_controls < 1:
        raise ValueError(f"n_controls={n_controls}: expected at least 1; control=None measures none")
    if layer_map is not None and not callable(layer_map):
        raise ValueError(
            f"layer_map is {type(layer_map).__name__}; expected a function (vectors, source layer, target layer) -> "
            "vectors, such as lambda x, s, t: x @ matrix"
        )
    shape = checked(bridge, target, metric, site)
    tokens, other = (target.clean, target.corrupted) if run == "clean" else (target.corrupted, target.clean)
    n = len(target)
    given = _given(bridge, source, target, tokens)
    names = _groups(groups, target)
    plan, labels, texts = _plan(
        shape, given, target, tokens, site, pairs, source_layers, target_layers, positions, source_positions, together
    )
    n_draws = 0 if control is None else n_controls
    donors = _donors(given, names, n_draws, seed) if control == "resample" else None
    plan = CrossPlan(**plan, donors=donors, n_controls=n_draws, layer_map=layer_map, rescale=rescale, seed=seed)

    reader = Reader(metric, torch.arange(n), n)
    split = Split.of(bridge, shape, reader, tokens.shape[1], memory_budget, batch_size)
    swept = cross_sweep(bridge, plan, reader, split, progress=progress)
    unpatched = score(bridge, other, reader, split)
    settings = {
        "method": "cross_layer_patch",
        "site": site,
        "pairs": pairs,
        "run": run,
        "source": "the run that is patched" if source is None else {"name": given.name, "n": len(given)},
        "source_layers": list(plan.source_layers),
        "target_layers": list(plan.target_layers),
        "positions": [str(label) for label in labels],
        "together": together,
        "layer_map": None if layer_map is None else str(getattr(layer_map, "name", "a function")),
        "rescale": rescale,
        "control": control,
        "n_controls": n_draws,
        "seed": seed,
    }
    record = provenance(
        bridge,
        **settings,
        prompts={"name": target.name, "seed": target.seed, "n": n, "tokens": int(tokens.shape[1])},
        metric={"name": metric_name(metric), "unit": str(getattr(metric, "unit", "metric"))},
        cost=swept.cost,
    )
    return _result(swept, unpatched, plan, metric, record, labels=labels, texts=texts, names=names, run=run)


def _given(bridge: Any, source: Any, target: Any, tokens: Tensor) -> Prompts:
    """The source as prompts with one row for each example, checked."""
    n = len(target)
    if source is None:
        return Prompts(
            tokens, tokens, target.answers, target.foils, target.positions, strings=target.strings, name=target.name
        )
    if isinstance(source, Tensor):
        if source.ndim != 2:
            raise ValueError(f"source has shape {tuple(source.shape)}; expected token ids [example or 1, pos]")
        rows = torch.zeros(len(source), dtype=torch.long)
        source = Prompts(source, source, rows, rows + 1, name="tokens")
    if not isinstance(source, Prompts):
        raise ValueError(
            f"source is {type(source).__name__}; expected Prompts, token ids [example or 1, pos], or None for the "
            "target's own run"
        )
    source.check(bridge)
    if len(source) not in (1, n):
        raise ValueError(f"source has {len(source)} examples and target {n}; expected as many, or one for all")
    return source[torch.zeros(n, dtype=torch.long)] if len(source) == 1 and n > 1 else source


def _groups(groups: str | Sequence[Hashable] | None, target: Any) -> list[str] | None:
    if groups is None:
        return None
    if isinstance(groups, str):
        choice("groups", groups, target.labels)
        groups = tuple(target.labels[groups])
    if len(groups) != len(target):
        raise ValueError(f"groups has {len(groups)} entries for {len(target)} examples; expected one for each")
    return [str(group) for group in groups]


def _plan(
    shape: Geometry,
    source: Prompts,
    target: Any,
    tokens: Tensor,
    site: Site,
    pairs: Pairs,
    source_layers: Sequence[int] | None,
    target_layers: Sequence[int] | None,
    positions: Positions,
    source_positions: Positions,
    together: bool,
) -> tuple[dict[str, Any], list[Any], list[str] | None]:
    """What goes where, the coordinates of `pos`, and what stands there."""
    sources = tuple(indices("source_layers", source_layers, shape.n_layers))
    targets = tuple(indices("target_layers", target_layers, shape.n_layers))
    measured = _measured(sources, targets, pairs)
    masks, labels, texts = _spots(target, positions)
    if source_positions is None and positions is None and source.clean.shape[1] != tokens.shape[1]:
        raise ValueError(
            f"source has {source.clean.shape[1]} tokens and target {tokens.shape[1]}, so positions do not correspond; "
            "name them with positions= and source_positions="
        )
    origins = _spots(source, positions if source_positions is None else source_positions)[0]
    if len(origins) not in (1, len(masks)):
        raise ValueError(
            f"source_positions names {len(origins)} positions and positions {len(masks)}; expected as many, or one"
        )
    places = masks.int().argmax(-1)  # [slot, example]
    slots = origins.int().argmax(-1).expand(len(masks), -1)
    spots = (tuple(range(len(masks))),) if together else tuple((i,) for i in range(len(masks)))
    if together and len(masks) > 1:
        labels, texts = ["+".join(map(str, labels))], None
    plan = {"tokens": tokens, "source": source.clean, "site": site, "source_layers": sources, "target_layers": targets}
    return {**plan, "measured": measured, "slots": slots, "places": places, "spots": spots}, list(labels), texts


def _measured(sources: tuple[int, ...], targets: tuple[int, ...], pairs: Pairs) -> Bool[Tensor, "source target"]:
    s, t = torch.tensor(sources)[:, None], torch.tensor(targets)
    measured = {"all": s == s, "back": s > t, "forward": s < t}[pairs].expand(len(sources), len(targets))
    if not measured.any():
        raise ValueError(f"pairs={pairs!r} leaves no pair of source layers {sources} and target layers {targets}")
    return measured.clone()


def _donors(source: Prompts, names: list[str] | None, n_draws: int, seed: int) -> Int[Tensor, "draw row"]:
    """For every row and draw another row: of other tokens, and of another group where there are groups."""
    kinds = source.clean.unique(dim=0, return_inverse=True)[1]
    group = torch.arange(len(kinds)) if names is None else torch.tensor([sorted(set(names)).index(x) for x in names])
    generator = torch.Generator().manual_seed(seed)
    donors = torch.zeros(n_draws, len(kinds), dtype=torch.long)
    for row in range(len(kinds)):
        others = ((kinds != kinds[row]) & (group != group[row])).nonzero().flatten()
        if not len(others):
            why = "other tokens" if names is None else "other tokens and another group"
            raise ValueError(
                f"control='resample' takes vectors of another example, but the source has none with {why} for example "
                f"{row}; pass more examples, or control='random' or None"
            )
        donors[:, row] = others[torch.randint(len(others), (n_draws,), generator=generator)]
    return donors


def _result(
    swept: Swept,
    unpatched: Tensor,
    plan: CrossPlan,
    metric: Any,
    record: dict[str, Any],
    *,
    labels: list[Any],
    texts: list[str] | None,
    names: list[str] | None,
    run: Run,
) -> CrossLayerEffects:
    """The labelled result."""
    n = swept.values.shape[-1]
    unit = str(getattr(metric, "unit", "metric"))
    # [target, spot, draw * source, example] -> [draw, source, target, spot, example]
    grid = swept.values.unflatten(2, (-1, len(plan.source_layers))).permute(2, 3, 0, 1, 4)
    coords: dict[str, Any] = {
        "source_layer": list(plan.source_layers),
        "target_layer": list(plan.target_layers),
        "pos": labels,
        "example": list(range(n)),
    }
    if texts is not None:
        coords["token"] = ("pos", texts)
    if names is not None:
        coords["group"] = ("example", names)
    dims = ["source_layer", "target_layer", "pos", "example"]
    values = labelled(grid[0], dims, coords, unit=unit)
    control = None
    if plan.n_controls:
        control = labelled(grid[1:], ["draw", *dims], {"draw": list(range(plan.n_controls)), **coords}, unit=unit)
    ends = (swept.baseline, unpatched) if run == "clean" else (unpatched, swept.baseline)
    clean, corrupted = (labelled(end, ["example"], {"example": list(range(n))}, unit=unit) for end in ends)
    direction = "noise" if run == "clean" else "denoise"
    return CrossLayerEffects(
        values, record, clean, corrupted, direction, plan.site, "cross_layer", metric_name(metric), control
    )
