"""Value vectors as carriers of concepts: which rows of W_out write some tokens, and what breaks when they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import binom
from torch import Tensor

from interp.hooks import editable, names
from interp.models import geometry, provenance, require_eval
from interp.neurons._ablating import Control, Shift, Tasks, check_ablation, prompt_statistics
from interp.neurons._clamp_edits import Neuron
from interp.neurons._sides import side_vectors, unembedding
from interp.neurons.ablation import AblationMatrix, measure_sets
from interp.neurons.activation_statistics import NeuronStatistics
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

_CELLS = 2**24  # logits of value vectors that exist at once


@dataclass(frozen=True, eq=False, repr=False)
class ConceptVectors(Result):
    """How much each value vector writes each concept.

    Attributes:
        values: `[quantity, concept, layer, neuron]`. `"score"`: mean over the concept's tokens of their logit in the
            vector's projection, in standard deviations over the vocabulary; `"coverage"`: share of the tokens that are
            among the `k` largest logits. Layers that were not asked for are NaN.
    """

    def candidates(self, concept: str, n: int = 10, *, by: Literal["score", "coverage"] = "score") -> pd.DataFrame:
        """The `n` value vectors that write a concept most: `layer, neuron, score, coverage`."""
        known = [str(name) for name in self.values["concept"].values]
        if concept not in known:
            raise ValueError(f"no concept {concept!r}; there is {', '.join(map(repr, known[:20]))}")
        if by not in ("score", "coverage"):
            raise ValueError(f'by={by!r}; expected "score" or "coverage"')
        if n < 1:
            raise ValueError(f"n={n}; expected at least 1")
        frame = self.values.sel(concept=concept, drop=True).to_dataset("quantity").to_dataframe().reset_index().dropna()
        other = "coverage" if by == "score" else "score"
        frame = frame.sort_values([by, other], ascending=False, kind="stable").head(n).reset_index(drop=True)
        return frame[["layer", "neuron", "score", "coverage"]]

    def sets(self, n: int = 10, *, by: Literal["score", "coverage"] = "score") -> dict[str, list[Neuron]]:
        """The candidates of every concept as neurons `(layer, index)`, best first."""
        found = {}
        for name in self.values["concept"].values:
            frame = self.candidates(str(name), n, by=by)
            found[str(name)] = [(int(a), int(b)) for a, b in zip(frame["layer"], frame["neuron"], strict=True)]
        return found

    def spectrum(self) -> pd.DataFrame:
        """How many value vectors carry each concept: `carriers` (coverage of at least one half), how many of random
        vectors would, the p-value of as many (binomial), the layers they are in, and the best score.

        Random means that every token is equally likely to be among the `k`; value vectors of a layer are not
        independent, so the p-value is too small.
        """
        import pandas as pd

        coverage, score = self.values.sel(quantity="coverage"), self.values.sel(quantity="score")
        k, d_vocab, sizes = (self.provenance[key] for key in ("k", "d_vocab", "sizes"))
        rows = []
        for name in coverage["concept"].values:
            cells = coverage.sel(concept=name)
            carrying = cells >= 0.5
            n = int(cells.notnull().sum())
            size = sizes[str(name)]
            least = int(np.ceil(size / 2))
            rate = float(binom(size, k / d_vocab).sf(least - 1))
            count = int(carrying.sum())
            rows.append({
                "concept": str(name), "tokens": size, "carriers": count, "expected": n * rate,
                "p_value": float(binom(n, rate).sf(count - 1)), "layers": int(carrying.any("neuron").sum()),
                "best": float(score.sel(concept=name).max()),
            })  # fmt: skip
        return pd.DataFrame(rows)

    def plot(self, n: int = 50, *, concepts: Sequence[str] | None = None) -> go.Figure:
        """Scores of the best `n` value vectors of up to eight concepts against their rank: one vector, or many?"""
        import pandas as pd

        from interp import plotting

        names = [str(name) for name in (self.values["concept"].values if concepts is None else concepts)]
        if len(names) > 8:
            raise ValueError(f"{len(names)} lines cannot be told apart by colour; name up to 8 in concepts=")
        frames = [
            pd.DataFrame({"rank": range(1, len(found) + 1), "value": found["score"], "concept": name})
            for name in names
            for found in [self.candidates(name, n)]
        ]
        return plotting.lines(
            pd.concat(frames), x="rank", group="concept", log_x=True, title="Value vectors that write a concept",
            unit="logit (standard deviations)", x_title="rank of the value vector",
        )  # fmt: skip


def concept_vectors(
    bridge: Any,
    concepts: Mapping[str, Sequence[int]],
    *,
    k: int = 200,
    layers: Sequence[int] | None = None,
    fold: bool = False,
) -> ConceptVectors:
    """Score every value vector (row of W_out) for every concept, given as token ids. No forward of the prompts.

    A vector is multiplied with the unembedding; it carries a concept if the concept's tokens come out on top. This is
    about weights alone: whether the vector is ever used, and matters, is for `concept_ablation`.

    Args:
        concepts: Name to token ids.
        k: How many of the largest logits count as the vector's tokens. 200 of a vocabulary of 32,000 in the paper.
        fold: Multiply by the gains of the norms (see `side_vectors`); the paper uses the weights as they are.

    Raises:
        ValueError: If a concept has no tokens or unknown ones, or sizes do not fit.

    Source:
        Hong et al. 2024, *Intrinsic Evaluation of Unlearning Using Parametric Knowledge Traces* (arXiv:2406.11614):
        projection without norm or softmax, top 200 tokens. Candidates are chosen there by a language model's judgement;
        here by the mean standardised logit of given tokens.
    """
    require_eval(bridge)
    shape = geometry(bridge)
    ids = check_concepts(concepts, shape.d_vocab)
    if not 1 <= k < shape.d_vocab:
        raise ValueError(f"k={k}; expected 1 to {shape.d_vocab - 1}, less than the vocabulary")
    chosen = list(range(shape.n_layers)) if layers is None else [int(layer) for layer in layers]
    if not chosen or not all(0 <= layer < shape.n_layers for layer in chosen):
        raise ValueError(f"layers={chosen}; expected layers from 0 to {shape.n_layers - 1}")
    tokens = unembedding(bridge, fold=fold)
    values = np.full((2, len(ids), shape.n_layers, shape.d_mlp), np.nan, np.float32)
    for layer in chosen:
        vectors = side_vectors(bridge, layer, "out", fold=fold)
        step = max(1, _CELLS // shape.d_vocab)
        for start in range(0, shape.d_mlp, step):
            logits = vectors[start : start + step] @ tokens
            scores = (logits - logits.mean(1, keepdim=True)) / logits.std(1, keepdim=True).clamp_min(1e-30)
            least = logits.topk(k, dim=1).values[:, -1:]
            for number, members in enumerate(ids.values()):
                where = members.to(logits.device)
                values[0, number, layer, start : start + step] = scores[:, where].mean(1).cpu().numpy()
                covered = (logits[:, where] >= least).float().mean(1)
                values[1, number, layer, start : start + step] = covered.cpu().numpy()
    return ConceptVectors(
        values=labelled(
            values, ("quantity", "concept", "layer", "neuron"),
            {"quantity": ["score", "coverage"], "concept": list(ids), "layer": range(shape.n_layers)},
        ),
        provenance=provenance(
            bridge, method="concept_vectors", k=k, d_vocab=shape.d_vocab, fold=fold, layers=chosen,
            sizes={name: len(members) for name, members in ids.items()},
        ),
    )  # fmt: skip


def concept_ablation(
    bridge: Any,
    vectors: Mapping[str, Sequence[Neuron]],
    tasks: Tasks,
    *,
    noise: float | int = 1.0,
    scale: Literal["relative", "absolute"] = "relative",
    n_draws: int = 4,
    controls: Sequence[Control] = ("matched",),
    n_controls: int = 5,
    statistics: NeuronStatistics | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> AblationMatrix:
    """Add Gaussian noise to value vectors and see what the model still answers, on every task, beside control vectors.

    The noise is added through the neurons' activations (hook_post times the noise joins the output of W_out), which is
    the same as changing the weights, and leaves the weights alone. `AblationMatrix.specificity()` then compares the
    facts of a concept with the others. Costs forwards as `ablation_matrix` does.

    Args:
        vectors: Name to neurons whose value vectors are noised together, for instance `ConceptVectors.sets(1)`.
        tasks: Name to prompts; the own task of a set has its name.
        noise: Size of the noise: with `scale="relative"` its expected length over the vector's own (1.0: as long as the
            vector); with `"absolute"` its standard deviation in every dimension (0.1 in the paper), which breaks
            short vectors and spares long ones.
        n_draws: Draws of noise per set, averaged; each control set gets one.
        controls: Whose value vectors get noise of the same rule, `"matched"` or `"uniform"` neurons.

    Raises:
        ValueError: If a set, task or option does not fit, or the output of this model's W_out cannot be edited.

    Source:
        Hong et al. 2024 (arXiv:2406.11614): noise of standard deviation 0.1 on one vector, change of answers on the
        concept's questions against five other concepts'. We give lost answers, log-probabilities and logit differences
        instead of overlap with the own former answer, and controls.
    """
    require_eval(bridge)
    named, asked = check_ablation(bridge, vectors, tasks, "zero", "all", controls, n_controls, batch_size)
    if scale not in ("relative", "absolute"):
        raise ValueError(f'scale={scale!r}; expected "relative" or "absolute"')
    if not 0 < float(noise) < float("inf"):
        raise ValueError(f"noise={noise}; expected a positive number")
    if n_draws < 1:
        raise ValueError(f"n_draws={n_draws}; expected at least 1")
    if statistics is None:
        statistics = prompt_statistics(bridge, [one for prompts in asked.values() for one in prompts], "all")
    d_model = int(bridge.cfg.d_model)

    def change(number: int, neuron: Neuron) -> Float[Tensor, " d_model"]:
        generator = torch.Generator().manual_seed(hash((seed, number, *neuron)) % 2**63)
        direction = torch.randn(d_model, generator=generator)
        length = float(bridge.blocks[neuron[0]].mlp.W_out[neuron[1]].detach().float().norm())
        return direction * float(noise) * (length / d_model**0.5 if scale == "relative" else 1.0)

    return measure_sets(
        bridge, Shift(change, output_hook(bridge)), named, asked, controls, n_controls, statistics, batch_size, seed,
        method="concept_ablation", mode="noise", noise=float(noise), scale=scale, positions="all",
        repeats=n_draws,
    )  # fmt: skip


def output_hook(bridge: Any) -> Any:
    """The hook of what W_out gives, before any norm, by layer."""
    kind = "blocks.{}.mlp.out.hook_out"
    name = kind.format(0)
    if not names(bridge, name) or not editable(bridge, name):
        raise ValueError(
            f"{bridge.cfg.model_name} shows no {name!r} that can be edited, so its value vectors cannot be moved; "
            f"ablate neurons with ablation_matrix instead"
        )
    return kind.format


def check_concepts(concepts: Mapping[str, Sequence[int]], d_vocab: int) -> dict[str, Tensor]:
    """Token ids by concept, known to exist and to be named once."""
    if not concepts:
        raise ValueError("no concepts; expected a mapping from name to token ids")
    found = {}
    for name, members in concepts.items():
        ids = [int(token) for token in members]
        if not ids or len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= d_vocab:
            raise ValueError(f"concept {name!r} has token ids {ids[:8]}; expected at least one, none twice, from 0 to "
                             f"{d_vocab - 1}")  # fmt: skip
        found[str(name)] = torch.tensor(ids)
    return found
