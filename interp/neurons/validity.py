"""Whether a neuron's decoded label predicts what the neuron does: every neuron clamped, its effect beside its label."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp import hooks
from interp.models import geometry, provenance, require_eval
from interp.neurons._clamp_edits import Clamps, Neuron, check_tokens, choice
from interp.neurons._clamp_runs import ClampRuns, Work, examples_at_once, rows_at_once
from interp.neurons._dosing import is_rounding, rank_in
from interp.neurons._sides import Side, side_vectors, unembedding
from interp.neurons._validity_options import (
    Labels,
    Tail,
    check_dose,
    chosen_neurons,
    doses_of,
    labelled_neurons,
    labels_of,
    positions_of,
)
from interp.neurons.activation_statistics import NeuronStatistics, neuron_statistics
from interp.neurons.validity_result import Validity
from interp.results import labelled


def validate(
    bridge: Any,
    atlas: Any,
    tokens: Int[Tensor, "example pos"],
    neurons: Iterable[Neuron] | None = None,
    *,
    sides: Sequence[Side] | None = None,
    mode: Literal["set", "add"] = "set",
    quantile: float | int = 0.999,
    tail: Tail = "larger",
    dose: float | int | None = None,
    positions: int | Int[Tensor, "example"] = -1,
    statistics: NeuronStatistics | None = None,
    seed: int = 0,
    memory_budget: int = 2**28,
    progress: bool = False,
) -> Validity:
    """Clamp every neuron at one position of every example and compare what happens to the logits there with its label.

    Exact, nothing is linearised: each clamped run continues from the cached run of its example, in the layers above the
    neuron and at the one position. A neuron costs, per example, one token through the blocks above its own, and one
    unembedding (with post-norms, in half precision: its own block too; without reusable keys and values: all positions
    up to that one). In whole forwards of the examples that is about `neurons / (2 pos)`, plus one forward for the
    unclamped run and one for the statistics; `provenance["cost"]` has the count.

    In the last layer the write side is exact but for what norms take back: the part of the effect along the stream
    itself, and with a norm after the MLP, what that makes of the other neurons (there cosines of 0.93 at these doses,
    0.97 at small ones; a soft cap bends logits too). Below, what later blocks add is the difference.

    Args:
        atlas: A `NeuronAtlas` of this model: gives the labels (the token of the largest score of each side, of either
            sign) and their specificity. The decoded direction is the full product, folded, whatever score the atlas
            ranks by. Or labels of your own, `{side: token ids [layer, neuron]}`, which have no specificity.
        neurons: Pairs `(layer, index)`; all that the atlas has by default.
        sides: Sides of the atlas to judge; all it has by default. The clamp acts through `"out"`; `"in"` and `"gate"`
            labels are right only where a neuron writes what it reads.
        mode: `"set"` to the dose, or `"add"` it to what the activation is.
        quantile: The dose is this quantile of the neuron's own activations.
        tail: `"upper"` takes that quantile, `"lower"` its mirror (1 - quantile), `"larger"` the one of larger
            magnitude: neurons of gated MLPs may be mostly negative.
        dose: The same number for all neurons instead.
        positions: Where each example is clamped and read: one for all or one each; the last by default.
        statistics: Quantiles measured on more text; by default on `tokens`.
        seed: Of the shuffle.
        memory_budget: Bytes that one forward may take, roughly.

    Raises:
        ValueError: Before any forward, if an option cannot be honoured. RuntimeError: If the model is in training mode.

    Source:
        The need for it is shown by a toy in which read-side labels are near chance and write-side labels nearly exact
        while their peaks are not above the null: specificity and validity are different claims.
    """
    require_eval(bridge)
    shape = geometry(bridge)
    tokens = check_tokens(bridge, tokens)
    labels = labels_of(bridge, atlas, sides, shape)
    chosen = chosen_neurons(neurons, labels, shape)
    labelled_of = labelled_neurons(chosen, labels)
    at = positions_of(positions, *tokens.shape)
    choice("mode", mode, ("set", "add"))
    choice("tail", tail, get_args(Tail))
    columns = {"upper": f"q{100 * float(quantile):g}", "lower": f"q{100 * (1 - float(quantile)):g}"}
    check_dose(bridge, dose, quantile, columns, statistics)
    layers = sorted({layer for layer, _ in chosen})
    if dose is None and statistics is None:
        statistics = neuron_statistics(
            bridge, tokens, layers=layers, quantiles=list(dict.fromkeys([float(quantile), 1 - float(quantile)]))
        )
    doses = doses_of(dose, tail, columns, statistics, shape)
    places = {neuron: i for i, neuron in enumerate(chosen)}
    found = _Found(len(labels), len(chosen), len(tokens))
    work = Work()
    item = next(iter(bridge.original_model.parameters())).element_size()
    groups = []
    for position in at.unique().tolist():
        computed = 1 if hooks.supports_prefix_reuse(bridge) else position + 1
        size = examples_at_once(shape, len(layers), position + 1, computed, item, memory_budget)
        rows = rows_at_once(shape, position + 1, computed, 1, item, memory_budget, tokens.device)
        groups += [(position, rows, examples) for examples in (at == position).nonzero()[:, 0].split(size)]
    with _bar(progress, len(groups) * len(layers)) as bar:
        for position, rows, examples in groups:
            runs = ClampRuns(
                bridge, tokens[examples.to(tokens.device), : position + 1], _only(position, len(examples)),
                torch.full((len(examples), 1), position), layers, shape, mode=mode, site="post", work=work,
            )  # fmt: skip
            for layer in layers:
                here = torch.tensor([i for which, i in chosen if which == layer])
                where = torch.tensor([places[layer, int(i)] for i in here])
                others = _other(here, seed + layer, labelled_of[layer])
                _measure_layer(bridge, runs, layer, here, others, where, examples, labels, doses[layer], rows, found)
                bar.update()
    settings = {
        "sides": list(labels), "mode": mode, "tail": tail if dose is None else None, "dose": dose,
        "quantile": float(quantile) if dose is None else None, "positions": at.tolist(), "seed": seed,
        "neurons": len(chosen), "cost": work.summary(tokens, shape.n_layers),
    }  # fmt: skip
    return _result(bridge, chosen, labels, doses, found, settings)


class _Found:
    """The arrays of the result, filled layer by layer."""

    def __init__(self, n_sides: int, n_neurons: int, n: int) -> None:
        shape = (n_sides, n_neurons, n)
        self.cosine, self.shuffled, self.rank, self.shuffled_rank = (torch.full(shape, torch.nan) for _ in range(4))
        self.effect = torch.full(shape[1:], torch.nan)


def _measure_layer(
    bridge: Any,
    runs: ClampRuns,
    layer: int,
    here: Int[Tensor, "neuron"],
    others: Int[Tensor, "neuron"],
    where: Int[Tensor, "neuron"],
    examples: Int[Tensor, "some"],
    labels: dict[Side, Labels],
    doses: Float[Tensor, "d_mlp"],
    rows: int,
    found: _Found,
) -> None:
    """Clamp these neurons of a layer, some at a time, and store how their effects agree with their decodings."""
    device = runs.tokens.device
    vectors = {side: side_vectors(bridge, layer, side).to(device) for side in labels}
    directions = unembedding(bridge).to(device)
    directions = directions - directions.mean(1, keepdim=True)
    old = runs.active[layer][:, -1]  # [example, d_mlp]
    for part in torch.arange(len(here)).split(max(1, rows // len(examples))):
        index, place = here[part], where[part]
        cases = [Clamps({layer: (index[i : i + 1], doses[index[i : i + 1]])}) for i in range(len(part))]
        logits, _ = runs.clamp(layer, cases)
        intact = runs.logits[:, 0].float()  # [example, d_vocab]
        effect = logits[:, :, 0].float() - intact  # [neuron, example, d_vocab]
        noise = is_rounding(effect, intact, logits.dtype)
        dose = doses[index].to(device)[:, None]
        change = dose.expand(-1, len(examples)) if runs.mode == "add" else dose - old[:, index.to(device)].T
        effect = effect * change.sign()[..., None]
        effect = effect - effect.mean(-1, keepdim=True)
        length = effect.norm(dim=-1)
        found.effect[place[:, None], examples] = length.cpu()
        for s, (side, label) in enumerate(labels.items()):
            for which, cosine, rank in (
                (index, found.cosine, found.rank),
                (others[part], found.shuffled, found.shuffled_rank),
            ):
                decoded = vectors[side][which.to(device)] @ directions  # [neuron, d_vocab]
                product = torch.einsum("ned,nd->ne", effect, decoded.to(effect.dtype))
                scale = length * decoded.norm(dim=-1)[:, None]
                token = label.token[layer, which].to(device)[:, None].expand(-1, len(examples))
                raised = rank_in(effect * label.sign[layer, which].to(device)[:, None, None], token)
                for to, values in ((cosine, product / scale), (rank, raised)):
                    to[s, place[:, None], examples] = torch.where(noise, torch.nan, values).float().cpu()


def _other(here: Int[Tensor, "neuron"], seed: int, pool: Int[Tensor, "labelled"]) -> Int[Tensor, "neuron"]:
    """Another neuron of the layer for each, drawn evenly from those that have labels (ascending, `here` among them)."""
    step = torch.randint(1, len(pool), here.shape, generator=torch.Generator().manual_seed(seed))
    return pool[(torch.searchsorted(pool, here) + step) % len(pool)]


def _only(position: int, n: int) -> Tensor:
    mask = torch.zeros(n, position + 1, dtype=torch.bool)
    mask[:, position] = True
    return mask


def _bar(progress: bool, total: int) -> Any:
    return tqdm(total=total, disable=not progress or os.environ.get("INTERP_PROGRESS") == "0", desc="validating")


def _result(
    bridge: Any,
    chosen: list[Neuron],
    labels: dict[Side, Labels],
    doses: Tensor,
    found: _Found,
    settings: dict[str, Any],
) -> Validity:
    layer, index = (torch.tensor(column) for column in zip(*chosen, strict=True))
    ids, signs, z = (
        torch.stack([getattr(label, name)[layer, index] for label in labels.values()])
        for name in ("token", "sign", "z")
    )
    ids = ids.numpy()
    tokenizer = getattr(bridge, "tokenizer", None)
    texts = {int(i): str(i) if tokenizer is None else tokenizer.decode([int(i)]) for i in np.unique(ids)}
    one = {
        "neuron": [f"L{a} N{b}" for a, b in chosen],
        "layer": ("neuron", layer.numpy()),
        "index": ("neuron", index.numpy()),
    }
    both = {
        "side": list(labels),
        **one,
        "label": (("side", "neuron"), ids),
        "sign": (("side", "neuron"), signs.numpy()),
        "label_token": (("side", "neuron"), np.vectorize(texts.get, otypes=[object])(ids).astype(str)),
    }
    dims = ("side", "neuron", "example")
    return Validity(
        values=labelled(found.cosine, dims, both, unit="cosine"),
        provenance=provenance(bridge, **settings),
        shuffled=labelled(found.shuffled, dims, both, unit="cosine"),
        rank=labelled(found.rank, dims, both, unit="tokens"),
        shuffled_rank=labelled(found.shuffled_rank, dims, both, unit="tokens"),
        effect=labelled(found.effect, dims[1:], one, unit="logits"),
        doses=labelled(doses[layer, index], ("neuron",), one, unit="activation"),
        specificity=labelled(z, dims[:2], both, unit="standard deviations"),
    )
