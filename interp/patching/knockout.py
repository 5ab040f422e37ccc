"""Attention knockout: which tokens may read which, taken away layer by layer, and what the answer loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp import hooks
from interp.models import provenance
from interp.patching._backward import metric_name
from interp.patching._batches import Batch, Split, progress_bar
from interp.patching._cells import indices, window_of
from interp.patching._measure import checked
from interp.patching._resume import Reader, Resume
from interp.patching._token_groups import Group, masks_of, token_groups
from interp.patching.knockout_result import Knockout
from interp.results import labelled
from interp.types import Metric

_SCORES = "blocks.{layer}.attn.hook_attn_scores"


@torch.no_grad()
def attention_knockout(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    *,
    edges: Sequence[tuple[str, str]] | None = None,
    groups: Mapping[str, Group] | None = None,
    window: int = 1,
    layers: Sequence[int] | None = None,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> Knockout:
    """Change of the metric when tokens of one group may not attend to those of another, in a window of layers.

    The clean prompts are run with the attention scores of all (reader, source) pairs of an edge set to the lowest
    number in every head, so that the softmax shares their weight out among the other sources; everything after is
    recomputed. A negative change means that the answer needs what flows along the edge in those layers; 0 that it does
    not, or can do without: what one layer no longer fetches another may. Widen the window to see that.

    Forcing a head to attend elsewhere also feeds it other values than it is used to, which can hurt by itself: compare
    the edges with each other.

    Costs, for every edge and window, one forward of the prompts from the window's first layer and from the first
    position that is blocked.

    Args:
        prompts: Only their clean tokens and positions are used.
        metric: Logits to one number per example; the paper uses `interp.metrics.answer_prob(prompts)`.
        edges: `(source, reader)` pairs of group names, such as `("subject", "last")`: the reader no longer sees the
            source. Default: every group to `last`, itself included.
        groups: Names to tokens: names of `prompts.positions`, indices, lists of either, or a bool mask
            `[example, pos]`. Default `token_groups(prompts)`: `first`, `subject`, `relation` and `last`.
        window: Layers blocked together, centred on the layer named as for `causal_trace`; `2 * n_layers` blocks all.
        layers: The layers named; all by default.
        memory_budget, batch_size, progress: As for `activation_patch`.

    Raises:
        ValueError: If groups or edges do not fit, no example has such a pair (a reader sees no later token), a reader
            would be left with nothing to attend to, or the attention of this model cannot be edited.
        RuntimeError: If the model is in training mode.

    Source:
        Geva, Bastings, Filippova & Globerson 2023 (arXiv:2304.14767), section 5: windows of several layers around the
        one named, change of the answer's probability in percent of what it was. They average percentages over
        examples; `Knockout.interval(of="relative")` is a ratio of means, which examples of small probability do not
        dominate.

    Example:
        >>> p = interp.prompts.facts(bridge, n=32)
        >>> lost = interp.patching.attention_knockout(bridge, p, interp.metrics.answer_prob(p), window=2)
        >>> lost.plot(of="relative")
    """
    shape = checked(bridge, prompts, metric, "resid_pre")
    if shape.delegated_attention or not hooks.names(bridge, _SCORES.format(layer=0)):
        raise ValueError(
            f"the attention of {bridge.cfg.model_name} is computed where its scores cannot be edited; patch heads with "
            "activation_patch(site='z') instead"
        )
    if window < 1:
        raise ValueError(f"window={window} must be at least 1 layer")
    masks = masks_of(prompts, token_groups(prompts) if groups is None else groups)
    chosen = [(name, "last") for name in masks] if edges is None else list(edges)
    blocked = _blocked(prompts, masks, chosen)
    named = indices("layers", layers, shape.n_layers)
    windows = [window_of(layer, window, shape.n_layers) for layer in named]

    n, n_pos = prompts.clean.shape
    reader = Reader(metric, torch.arange(n), n)
    split = Split.of(bridge, shape, reader, n_pos, memory_budget, batch_size)
    values, intact = torch.zeros(len(chosen), len(named), n), torch.zeros(n)
    chunks = split.chunks(n, 0)
    ran = 0
    with progress_bar(progress, len(chunks) * len(windows), "attention knockout") as bar:
        for rows in chunks:
            resid, cache = _run(bridge, prompts.clean[rows].to(split.device), split, min(one[0] for one in windows))
            resume = Resume(bridge, reader, rows, resid[shape.n_layers - 1], cache)
            intact[rows] = resume.baseline
            for w, layers_blocked in enumerate(windows):
                enter = layers_blocked[0]
                starts = _first_blocked(blocked[:, rows], reader, rows, last_block=enter == shape.n_layers - 1)
                for batch in split.batches(starts, rows, enter, suffixes=cache is not None):
                    edit = _block(blocked[batch.spot, rows[batch.row]].to(split.device), batch)
                    edits = {_SCORES.format(layer=layer): edit for layer in layers_blocked}
                    entering = resid[enter][batch.row.to(split.device), batch.start : batch.stop]
                    with hooks.interventions(bridge, edits):
                        scores = resume(entering, enter, batch)
                    values[batch.spot, w, rows[batch.row]] = scores - resume.baseline[batch.row]
                    ran += (shape.n_layers - enter) * len(batch) * (batch.stop - batch.start)
                bar.update()
    unit = str(getattr(metric, "unit", "metric"))
    labels = [f"{source} -> {dest}" for source, dest in chosen]
    examples = list(range(n))
    record = provenance(
        bridge,
        method="attention_knockout",
        direction="noise",
        window=window,
        layers=named,
        edges=[list(edge) for edge in chosen],
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": n_pos},
        metric={"name": metric_name(metric), "unit": unit},
        cost={
            "forwards_one_per_cell": len(chosen) * len(named) + 1,
            "forward_equivalents": round(ran / (n * n_pos * shape.n_layers) + 1, 3),
        },
    )
    return Knockout(
        labelled(
            values, ("edge", "layer", "example"), {"edge": labels, "layer": named, "example": examples}, unit=unit
        ),
        record,
        intact=labelled(intact, ("example",), {"example": examples}, unit=unit),
        pairs=labelled(blocked.sum((-2, -1)), ("edge", "example"), {"edge": labels, "example": examples}, unit="pairs"),
        window=window,
        metric=metric_name(metric),
    )


def _blocked(
    prompts: Any, masks: Mapping[str, Tensor], edges: Sequence[tuple[str, str]]
) -> Bool[Tensor, "edge example dest src"]:
    """What each edge takes away, of what a causal model sees; checked."""
    if not edges or len(set(edges)) != len(edges):
        raise ValueError(f"edges={list(edges)} must name at least one (source, reader) pair, and none twice")
    n_pos = prompts.clean.shape[1]
    causal = torch.ones(n_pos, n_pos, dtype=torch.bool).tril()
    found = []
    for source, dest in edges:
        if unknown := [name for name in (source, dest) if name not in masks]:
            raise ValueError(f"edge {(source, dest)} names {unknown}; the groups are {', '.join(map(repr, masks))}")
        pairs = masks[dest][:, :, None] & masks[source][:, None, :] & causal
        if not bool(pairs.any()):
            raise ValueError(
                f"edge {(source, dest)}: no token of {dest!r} comes after one of {source!r} in any example, so it "
                "reads none and there is nothing to block; edges are (source, reader)"
            )
        if bool((blind := pairs.sum(-1) == torch.arange(1, n_pos + 1)).any()):
            row, position = blind.nonzero()[0].tolist()
            raise ValueError(
                f"edge {(source, dest)} leaves position {position} of example {row} with nothing to attend to; leave "
                f"a source, such as the first token or the reader itself, out of {source!r}"
            )
        found.append(pairs)
    return torch.stack(found)


def _run(bridge: Any, tokens: Tensor, split: Split, first: int) -> tuple[dict[int, Tensor], Any]:
    """The streams entering each layer from `first` on, and keys and values where suffixes can be run on from them."""
    names = {layer: hooks.hook_name("resid_pre", layer) for layer in range(first, split.geometry.n_layers)}
    cache = None
    with hooks.reads(bridge, list(names.values())) as found:
        if split.suffixes and hooks.supports_prefix_reuse(bridge):
            cache = hooks.prefix_cache(bridge, tokens)
        else:
            bridge(tokens, use_cache=False, logits_to_keep=1)
    return {layer: found[name] for layer, name in names.items()}, cache


def _first_blocked(
    blocked: Bool[Tensor, "edge row dest src"], reader: Reader, rows: Tensor, *, last_block: bool
) -> Int[Tensor, "edge unit row"]:
    """The first reader of each edge that the metric can see the effect of; the number of positions where none is."""
    changed = blocked.any(-1)
    n_pos = changed.shape[-1]
    if reader.read is not None:
        read, position = reader.read_of(rows)[:, None], torch.arange(n_pos)
        changed = changed & (position == read if last_block else position <= read)
    return torch.where(changed.any(-1), changed.int().argmax(-1), n_pos).unsqueeze(1)


def _block(blocked: Bool[Tensor, "row dest src"], batch: Batch) -> hooks.Edit:
    """The edit of the scores of a batch; the sources of a suffix end where it does, and begin late in a window."""

    def edit(scores: Tensor) -> Tensor:  # [row, head, dest, src]
        lowest = torch.finfo(scores.dtype).min
        mask = blocked[:, None, batch.start : batch.stop, batch.stop - scores.shape[-1] : batch.stop]
        new = torch.where(mask, lowest, scores)
        blind = ~(new > lowest / 2).any(-1) & mask.any(-1)
        if bool(blind.any()):
            position = batch.start + int(blind.nonzero()[0, -1])
            raise ValueError(
                f"position {position} has nothing left to attend to in a layer whose attention is windowed; leave a "
                "source that it still sees, such as the reader itself, out of the edge"
            )
        return new

    return edit
