"""How far must weights move at random before neurons lose their labels?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch

from interp.models import geometry, provenance, require_eval
from interp.neurons._label_lists import Score, check_options, displaced, label_lists, prepared, sides_of
from interp.neurons._sides import Side, side_vectors, unembedding
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

Moved = Literal["both", "neurons", "head"]


@dataclass(frozen=True, eq=False, repr=False)
class LabelRobustness(Result):
    """`values` (side, size, layer, neuron): share of random displacements of that size under which the neuron keeps its
    top token. Size is the norm of the displacement over that of the row. NaN, and left out of means, for neurons that
    are (almost) zero and so have no token to keep."""

    def table(self) -> pd.DataFrame:
        """One row per side and size: `kept`, mean over neurons, and `layer_low`, `layer_high`, the layers' extremes."""
        import pandas as pd

        layers = self.values.mean("neuron")
        parts = {"kept": layers.mean("layer"), "layer_low": layers.min("layer"), "layer_high": layers.max("layer")}
        frames = [part.rename(name).to_series() for name, part in parts.items()]
        return pd.concat(frames, axis=1).reset_index()

    def size_for(self, kept: float) -> dict[str, float]:
        """The size at which this share of labels is kept, by side: linear in the logarithm of the size between the
        sizes measured, NaN beyond them."""
        if not 0 < kept < 1:
            raise ValueError(f"kept must lie between 0 and 1, got {kept}")
        shares = self.values.mean(["layer", "neuron"]).values.astype(float)  # [side, size]
        sizes = np.log(self.values["size"].values)
        found = {}
        for side, row in zip(self.values["side"].values, shares, strict=True):
            falling = np.minimum.accumulate(row)  # sampling may let a share rise by a hair
            inside = falling[-1] <= kept <= falling[0]
            found[str(side)] = float(np.exp(np.interp(-kept, -falling, sizes))) if inside else float("nan")
        return found

    def plot(self) -> Any:
        """Figure: share of labels kept by size of the displacement, a line per side, with the span of the layers."""
        from interp.plotting import lines

        return lines(
            self.table(),
            x="size",
            y="kept",
            group="side",
            interval=("layer_low", "layer_high"),
            title="Labels kept under random displacements",
            unit="share of neurons",
            x_title="displacement over the norm of the row",
            log_x=True,
        )


@torch.no_grad()
def label_robustness(
    bridge: Any,
    sizes: Sequence[float | int] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *,
    move: Moved = "both",
    weights: Side | Sequence[Side] | None = None,
    score: Score = "centred_cosine",
    fold: bool = True,
    noise_seeds: int = 3,
    seed: int = 0,
    memory_budget: int = 2**28,
) -> LabelRobustness:
    """The share of neurons that keep their top token when every row of the weights is moved in a random direction.

    A share of labels kept by tuning (`compare`) can be read on this curve: it is what moving by so much and meaning
    nothing would leave. No forward. Cost in products of neurons and vocabulary per side: 1 + sizes x `noise_seeds`.

    Args:
        sizes: Norm of the displacement over that of each row, ascending.
        move: The neurons' vectors, the token directions of the unembedding, or both.
        weights, score, fold, memory_budget: As in `compare`.
        noise_seeds: Displacements per size.

    Raises:
        ValueError: If sizes are not positive and ascending, or an option cannot be honoured.
    """
    require_eval(bridge)
    sides, shape = sides_of(bridge, weights), geometry(bridge)
    check_options(score, 1, shape.d_vocab)
    sizes = [float(size) for size in sizes]
    if not sizes or sizes[0] <= 0 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(
            f"sizes are {sizes}; expected positive numbers, ascending: 0.05 moves a row by 5 % of its norm"
        )
    if noise_seeds < 1:
        raise ValueError(f"noise_seeds must be at least 1, got {noise_seeds}")
    if move not in get_args(Moved):
        raise ValueError(f"move must be one of {', '.join(map(repr, get_args(Moved)))}, got {move!r}")
    head = unembedding(bridge, fold=fold)
    own = prepared(head, score)
    kept = torch.zeros(len(sides), len(sizes), shape.n_layers, shape.d_mlp)
    cells: list[tuple[int, Side, int]] = [(i, s, layer) for i, s in enumerate(sides) for layer in range(shape.n_layers)]
    before = {}
    for i, side, layer in cells:
        rows = side_vectors(bridge, layer, side, fold=fold)
        before[i, layer] = label_lists(rows, own, 1, score, memory_budget)[1]
    for n, size in enumerate(sizes):
        for draw in range(noise_seeds):
            first = seed + draw * (1 + len(cells))  # every draw has its own seeds, the same at every size
            noisy = own
            if move != "neurons":
                noisy = prepared(displaced(head.T, (1 + size) * head.T, first).T.contiguous(), score)
            for place, (i, side, layer) in enumerate(cells):
                rows = side_vectors(bridge, layer, side, fold=fold)
                if move != "head":
                    rows = displaced(rows, (1 + size) * rows, first + 1 + place)
                same = label_lists(rows, noisy, 1, score, memory_budget)[1] == before[i, layer]
                kept[i, n, layer] += same[:, 0].float() / noise_seeds
    for (i, layer), ids in before.items():
        kept[i, :, layer, ids[:, 0] < 0] = torch.nan
    coords = {"side": sides, "size": sizes, "layer": np.arange(shape.n_layers), "neuron": np.arange(shape.d_mlp)}
    record = provenance(
        bridge, method="label_robustness", move=move, score=score, fold=fold, noise_seeds=noise_seeds, seed=seed
    )
    return LabelRobustness(
        labelled(kept, ("side", "size", "layer", "neuron"), coords, unit="share of displacements"), record
    )
