"""What tuning or unlearning left in the parameters: value vectors before and after, and what they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.models import geometry, provenance, require_eval
from interp.neurons._ablating import Control, Shift, Tasks, check_ablation, statistics_for
from interp.neurons._clamp_edits import Neuron, check_neurons
from interp.neurons._sides import side_vectors, unembedding
from interp.neurons.ablation import AblationMatrix, measure_sets
from interp.neurons.activation_statistics import NeuronStatistics
from interp.neurons.concepts import check_concepts, concept_vectors, output_hook
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_CELLS = 2**23
QUANTITIES = ("cosine", "l2", "relative_l2", "jaccard")


@dataclass(frozen=True, eq=False, repr=False)
class KnowledgeTrace(Result):
    """How far every value vector moved, and what became of those that carry a concept.

    Attributes:
        values: `[quantity, layer, neuron]`: `"cosine"` of a value vector before and after, `"l2"` distance,
            `"relative_l2"` (over the length before), `"jaccard"` of the sets of its `k` largest logits.
        related: Concept's vectors `[stage, concept, vector]`: share of the concept's tokens among the `k` largest
            logits, before and after. NaN where a concept has fewer vectors.
        vectors: The same vectors as `[concept, vector, part]` with parts `layer` and `index`; -1 where there is none.
    """

    related: xr.DataArray
    vectors: xr.DataArray

    def concepts(self) -> pd.DataFrame:
        """One row per concept: means over its vectors of every quantity, of the share of its tokens before and after,
        the rate kept (after over before), and `moved_more_than`: the mean share of the other vectors of the same layers
        that moved less (by relative distance). One half is what a concept that nothing happened to would have."""
        import pandas as pd

        rows = []
        for number, name in enumerate(self.vectors["concept"].values):
            pairs = [(int(a), int(b)) for a, b in self.vectors.values[number] if a >= 0]
            cells = self.values.values[:, [a for a, _ in pairs], [b for _, b in pairs]]
            moved = self.values.sel(quantity="relative_l2").values
            less = [float((moved[a] < moved[a, b]).sum() / (moved.shape[1] - 1)) for a, b in pairs]
            before, after = (float(np.nanmean(self.related.values[stage, number])) for stage in range(2))
            rows.append({
                "concept": str(name), "vectors": len(pairs),
                **dict(zip(QUANTITIES, cells.mean(1).astype(float), strict=True)),
                "before": before, "after": after, "kept": after / before if before > 0 else np.nan,
                "moved_more_than": float(np.mean(less)),
            })  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, quantity: str = "relative_l2") -> go.Figure:
        """One quantity over the value vectors of each layer, sorted: did a few move, or all a little?"""
        import pandas as pd

        from interp import plotting

        if quantity not in QUANTITIES:
            raise ValueError(f"quantity={quantity!r}; expected one of {', '.join(map(repr, QUANTITIES))}")
        shares = np.linspace(0, 1, 101)
        cells = self.values.sel(quantity=quantity).values
        frame = pd.concat(
            pd.DataFrame({"share": 100 * shares, "value": np.quantile(row, shares), "layer": f"layer {layer}"})
            for layer, row in enumerate(cells)
        )
        return plotting.lines(
            frame, x="share", group="layer", title=f"{quantity} of value vectors, before and after", unit=quantity,
            x_title="value vectors with at most this (%)",
        )  # fmt: skip


def knowledge_trace(
    before: Any,
    after: Any,
    concepts: Mapping[str, Sequence[int]],
    vectors: Mapping[str, Sequence[Neuron]] | None = None,
    *,
    n_vectors: int = 5,
    k: int = 200,
    head: Literal["own", "before"] = "own",
) -> KnowledgeTrace:
    """Compare the value vectors of two models of one shape. No forward of any prompt.

    If behaviour changed and the vectors that write a concept did not, the knowledge was covered and not removed.

    Args:
        concepts: Name to token ids: the tokens whose presence among a vector's largest logits is followed.
        vectors: Name (of the concepts) to the neurons that carry them; by default the `n_vectors` of `before` with the
            largest score (`concept_vectors`).
        k: How many logits count; the paper's 200 is 0.6 % of its vocabulary.
        head: Multiply with each model's own unembedding, or with that of `before` for both, so that what moved is the
            vector and not the head.

    Raises:
        ValueError: If the models differ in shape or an option does not fit.

    Source:
        Hong et al. 2024 (arXiv:2406.11614): cosine, L2 distance and Jaccard of the top 200 tokens of concept vectors.
        They judge unlearning; the comparison with all other vectors of the layer is ours, since any training moves all.
    """
    require_eval(before)
    require_eval(after)
    shape, other = geometry(before), geometry(after)
    sizes = ("n_layers", "d_mlp", "d_model", "d_vocab")
    if differ := {name: (getattr(shape, name), getattr(other, name)) for name in sizes
                  if getattr(shape, name) != getattr(other, name)}:  # fmt: skip
        raise ValueError(f"the models differ in {differ} (before, after); value vectors are compared one by one")
    ids = check_concepts(concepts, shape.d_vocab)
    if not 1 <= k < shape.d_vocab:
        raise ValueError(f"k={k}; expected 1 to {shape.d_vocab - 1}, less than the vocabulary")
    if head not in ("own", "before"):
        raise ValueError(f'head={head!r}; expected "own" or "before"')
    if vectors is None:
        vectors = concept_vectors(before, concepts, k=k).sets(n_vectors)
    if set(vectors) != set(ids):
        raise ValueError(f"vectors are of {sorted(vectors)} and concepts of {sorted(ids)}; each concept needs its own")
    named = {name: check_neurons(vectors[name], shape, f"vectors of {name!r}") for name in ids}
    heads = [unembedding(before, fold=False), unembedding(after if head == "own" else before, fold=False)]
    values = np.full((len(QUANTITIES), shape.n_layers, shape.d_mlp), np.nan, np.float32)
    longest = max(len(neurons) for neurons in named.values())
    related = np.full((2, len(ids), longest), np.nan, np.float32)
    place = np.full((len(ids), longest, 2), -1)
    for number, neurons in enumerate(named.values()):
        place[number, : len(neurons)] = neurons
    for layer in range(shape.n_layers):
        old, new = (side_vectors(model, layer, "out", fold=False) for model in (before, after))
        new = new.to(old)
        values[0, layer] = torch.cosine_similarity(old, new, dim=1).cpu().numpy()
        values[1, layer] = (new - old).norm(dim=1).cpu().numpy()
        values[2, layer] = values[1, layer] / old.norm(dim=1).clamp_min(1e-30).cpu().numpy()
        step = max(1, _CELLS // shape.d_vocab)
        for start in range(0, shape.d_mlp, step):
            tops = [_top(part[start : start + step] @ matrix.to(part), k)
                    for part, matrix in zip((old, new), heads, strict=True)]  # fmt: skip
            common = (tops[0] & tops[1]).sum(1)
            values[3, layer, start : start + step] = (common / (2 * k - common)).cpu().numpy()
            for number, (name, neurons) in enumerate(named.items()):
                for column, (at, index) in enumerate(neurons):
                    if at == layer and start <= index < start + step:
                        for stage in range(2):
                            hits = tops[stage][index - start, ids[name].to(old.device)]
                            related[stage, number, column] = float(hits.float().mean())
    coords = {"concept": list(ids)}
    return KnowledgeTrace(
        values=labelled(
            values, ("quantity", "layer", "neuron"), {"quantity": list(QUANTITIES), "layer": range(shape.n_layers)}
        ),
        provenance=provenance(
            before, method="knowledge_trace", k=k, head=head,
            after={key: value for key, value in provenance(after).items() if key in ("model", "revision")},
            concepts={name: members.tolist() for name, members in ids.items()},
        ),
        related=labelled(related, ("stage", "concept", "vector"), {"stage": ["before", "after"], **coords}),
        vectors=xr.DataArray(place, dims=("concept", "vector", "part"), coords={**coords, "part": ["layer", "index"]}),
    )  # fmt: skip


def knowledge_transplant(
    before: Any,
    after: Any,
    vectors: Mapping[str, Sequence[Neuron]],
    tasks: Tasks,
    *,
    controls: Sequence[Control] = ("matched",),
    n_controls: int = 3,
    statistics: NeuronStatistics | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> AblationMatrix:
    """Give `before` the value vectors that some neurons have in `after`, and measure it on every task.

    Tells whether what was tuned lies in these vectors: a task whose answer is the tuned one rises by the full amount if
    it does, and not at all if it lies elsewhere (in attention, in what neurons read, in the embedding). Costs forwards
    as `ablation_matrix` does.

    Args:
        vectors: Name to neurons whose value vectors are replaced together.
        tasks: Name to prompts, with the answers to look for.
        controls: Other neurons whose vectors are replaced, of `before`'s statistics.

    Raises:
        ValueError: If the models differ in shape, or as `concept_ablation`.
    """
    require_eval(before)
    shape, other = geometry(before), geometry(after)
    if (shape.n_layers, shape.d_mlp, shape.d_model) != (other.n_layers, other.d_mlp, other.d_model):
        raise ValueError(f"the models differ in shape: {shape} and {other}; vectors are replaced one by one")
    named, asked = check_ablation(before, vectors, tasks, "zero", "all", controls, n_controls, batch_size)
    statistics = statistics_for(before, asked, "all", statistics)

    def change(_number: int, neuron: Neuron) -> Float[Tensor, " d_model"]:
        layer, index = neuron
        old, new = (model.blocks[layer].mlp.W_out[index].detach() for model in (before, after))
        return new.to(old) - old

    return measure_sets(
        before, Shift(change, output_hook(before)), named, asked, controls, n_controls, statistics, batch_size, seed,
        method="knowledge_transplant", mode="transplant", positions="all",
        after={key: value for key, value in provenance(after).items() if key in ("model", "revision")},
    )  # fmt: skip


def _top(logits: Tensor, k: int) -> Tensor:
    """Which tokens are among the `k` largest of each row."""
    mask = torch.zeros_like(logits, dtype=torch.bool)
    return mask.scatter_(1, logits.topk(k, dim=1).indices, True)
