"""SNMF in levels: fine neuron groups that make up coarser ones, tuned together, and the tree of what is in what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.cache import ActivationStore
from interp.dictionaries._hierarchy_tree import concept_tree, draw
from interp.dictionaries._hierarchy_tuning import Chain, chain_losses, refit_components, settle_chain, tune
from interp.dictionaries._snmf_init import Init
from interp.dictionaries._snmf_source import Source
from interp.dictionaries._snmf_steps import Data, best_codes, exact_loss, gram, kept_neurons
from interp.dictionaries.snmf import SNMF

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class Level:
    """One level of a hierarchy.

    Attributes:
        components: [component, neuron], norm one, at most `ceil(sparsity * d_mlp)` entries each.
        activations: [token, component]: those of the level below times `weights`.
        weights: [component below, component], at least zero; None at the finest level.
        relative_loss: Squared error of this level's own two factors, over the data's sum of squares.
    """

    components: Float[Tensor, "component neuron"]
    activations: Float[Tensor, "token component"]
    weights: Float[Tensor, "below component"] | None
    relative_loss: float


class HierarchicalSNMF:
    """Activations as a chain of non-negative factors that ends in sparse components: A = Y W_2 ... W_L Z_L, about.

    The finest level is an `SNMF` of the data, each further one an `SNMF` of the components below it, weighted by how
    much they carry. Then all factors are tuned together. Every level has sparse components of its own and activations
    that are non-negative mixtures of those below, so that each can be read, steered with and compared by itself.

        >>> hierarchy = HierarchicalSNMF([100, 50, 25]).fit(acts)
        >>> hierarchy.levels_[-1].components.shape      # [25, d_mlp]
        >>> hierarchy.tree().successors((3, 0))         # the level-2 groups that make up the first coarse one

    Args:
        n_components: Components per level, fine to coarse, falling.
        sparsity: Share of the neurons that a component of any level may use.
        objective: What tuning lowers: the sum of the squared errors of all levels, or that of the coarsest, at the end
            of the `"chain"`, alone, as in the paper; the finer ones then serve it and explain less.
        tune_iter: Most joint iterations; 0 leaves the levels as they were fitted one by one.
        tol: Joint tuning ends when an iteration lowers the loss by less than this share.
        penalty: As for `SNMF`: in the levels' own fits, and in tuning for the components of every level that counts.
            Activations and weights are then fitted to the final components without it.
        init, repair, restarts, seed, max_iter, device, dtype: As for `SNMF`, for every level.

    Attributes:
        levels_: A `Level` each, fine to coarse. The tree and everything else is read from these, tuned.
        level_losses_before_: Squared error of each level before tuning.
        loss_before_, loss_: Squared error of the coarsest level, at the end of the chain, before and after tuning.
        relative_loss_: `loss_` over the data's sum of squares.
        history_: The objective with its penalty, before tuning and after every joint iteration; it never rises. No
            penalty is in any of the other losses, so that a large one may leave `loss_` above `loss_before_`.

    Source:
        Shafran, Geiger, Geva, arXiv 2506.10920, hierarchy experiments. The released code tunes by Adam without
        projecting, after which weights are negative and components dense, and reads its trees from the factors before
        tuning; here every iteration keeps both constraints and cannot raise the objective, and the tree is that of the
        tuned factors. A third-party replication found coarse levels better labelled in middle layers and
        worse in early ones.
    """

    levels_: list[Level]
    level_losses_before_: list[float]
    loss_before_: float
    loss_: float
    relative_loss_: float
    history_: list[float]

    def __init__(
        self,
        n_components: Sequence[int],
        *,
        sparsity: float | int = 0.01,
        objective: Literal["levels", "chain"] = "levels",
        tune_iter: int = 200,
        tol: float = 1e-5,
        penalty: float | int = 0.1,
        init: Init = "kmeans",
        repair: bool = True,
        restarts: int = 1,
        seed: int = 0,
        max_iter: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = list(n_components)
        if len(sizes) < 2 or any(fine <= coarse for fine, coarse in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(
                f"n_components names at least two levels, fine to coarse, each smaller than the one before; got "
                f"{sizes}. For one level use SNMF"
            )
        if objective not in ("levels", "chain"):
            raise ValueError(f"objective must be 'levels' or 'chain', got {objective!r}")
        if tune_iter < 0:
            raise ValueError(f"tune_iter must be at least 0, got {tune_iter}")
        self.n_components = sizes
        self.sparsity = float(sparsity)
        self.objective = objective
        self.tune_iter = tune_iter
        self.tol = tol
        self.penalty = float(penalty)
        self._options: dict[str, Any] = {
            "sparsity": sparsity, "penalty": penalty, "init": init, "repair": repair, "restarts": restarts,
            "seed": seed, "max_iter": max_iter, "device": device, "dtype": dtype,
        }  # fmt: skip
        SNMF(min(sizes), **self._options)  # refuses what is wrong before any work

    def fit(
        self, A: Float[Tensor, "token neuron"] | tuple[ActivationStore, str], *, progress: bool = False
    ) -> HierarchicalSNMF:
        """Factorise `A` level by level, then tune all levels together. The data is held in memory.

        Raises:
            ValueError: As `SNMF.fit`.
        """
        source = Source.of(A, self._options["device"], self._options["dtype"])
        data, keep = Data(source.rows()), kept_neurons(self.sparsity, source.shape[1])
        finest = SNMF(self.n_components[0], **self._options).fit(data.rows, progress=progress)
        levels = range(len(self.n_components))
        counted = levels if self.objective == "levels" else levels[-1:]
        silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
        with torch.no_grad(), tqdm(total=self.tune_iter, disable=silent, desc="snmf levels") as bar:
            chain = self._stack(data, finest, keep)
            statistics = gram(chain.codes), data.against_codes(chain.codes).double()
            self.level_losses_before_ = chain_losses(data.total, chain, levels, *statistics)
            self.history_ = tune(
                data, chain, keep, counted=counted, penalty=self.penalty, max_iter=self.tune_iter, tol=self.tol,
                on_iteration=lambda loss: bar.update(),
            )  # fmt: skip
            if self.tune_iter and self.penalty:
                settle_chain(data, chain, counted)
            if self.tune_iter and self.objective == "chain":
                statistics = gram(chain.codes), data.against_codes(chain.codes).double()
                refit_components(chain, levels[:-1], keep, *statistics)
            self.levels_ = _levels(data, chain)
        self.loss_before_, self.loss_ = self.level_losses_before_[-1], self.levels_[-1].relative_loss * data.total
        self.relative_loss_ = self.levels_[-1].relative_loss
        return self

    def _stack(self, data: Data, finest: SNMF, keep: int) -> Chain:
        """Each further level as a factorisation of the data, its activations then mixed from those of the level below.

        Factorising the components below instead, as released, loses track of the data: where activations overlap,
        small errors of components add up.
        """
        codes = finest.activations_.T.to(data.rows)
        chain = Chain(codes, [], [finest.components_.to(codes)])
        code_gram, from_codes = gram(codes), data.against_codes(codes).double()
        below, below_gram = codes, code_gram
        for level, size in enumerate(self.n_components[1:], start=1):
            coarser = SNMF(size, **self._options).fit(data.rows)
            wanted = below @ coarser.activations_.to(codes)
            weight = best_codes(torch.zeros_like(wanted), below_gram, wanted)
            chain.weights.append(weight)
            chain.components.append(coarser.components_.to(codes))
            refit_components(chain, [level], keep, code_gram, from_codes)
            below = weight.T @ below
            below_gram = gram(below)
        return chain

    def tree(
        self, *, root: int | None = None, threshold: float = 0.15, max_children: int = 4, prune: bool = True
    ) -> nx.DiGraph:
        """Which finer components make up each coarser one, as edges from coarse to fine.

        Nodes are `(level, component)`, level 1 being the finest, with attributes `level`, `component` and `strength`
        (norm of the activations). An edge's `share` is the part of what its parent receives from below that comes from
        this child. A component may have several parents, so this is a tree only below a single root at two levels.

        Args:
            root: Only what lies below this component of the coarsest level.
            threshold: Children give at least this share of what the largest child gives.
            max_children: Most children of a node, largest first.
            prune: Pass over an only child: its own children take its place.

        Raises:
            RuntimeError: If nothing was fitted.
            ValueError: If there is no such root, or a threshold outside (0, 1].
        """
        levels = self._fitted()
        strengths = [torch.linalg.vector_norm(level.activations, dim=0) for level in levels]
        giving = [
            level.weights * strengths[number][:, None]
            for number, level in enumerate(levels[1:])
            if level.weights is not None
        ]
        return concept_tree(giving, strengths, root, threshold, max_children, prune)

    def plot(self, *, labels: dict[tuple[int, int], str] | None = None, **options: Any) -> go.Figure:
        """The tree, coarse components at the top. `labels` names nodes; `options` are those of `tree`."""
        return draw(self.tree(**options), labels or {})

    def __repr__(self) -> str:
        state = f"{1.0 - self.relative_loss_:.1%} explained" if hasattr(self, "levels_") else "not fitted"
        return f"HierarchicalSNMF({self.n_components}, sparsity={self.sparsity:g}; {state})"

    def _fitted(self) -> list[Level]:
        if not hasattr(self, "levels_"):
            raise RuntimeError("this hierarchy has no levels yet; call fit(A) first")
        return self.levels_


def _levels(data: Data, chain: Chain) -> list[Level]:
    """Every level with components of norm one, such that each level's activations are those below times its weights."""
    levels: list[Level] = []
    codes, norms_below = chain.codes, torch.ones(0)
    for number, components in enumerate(chain.components):
        norms = torch.linalg.vector_norm(components, dim=1)
        norms = torch.where(norms > 0, norms, 1.0)
        weight = None
        if number:
            codes = chain.weights[number - 1].T @ codes
            weight = (chain.weights[number - 1] / norms_below[:, None] * norms).cpu()
        unit, scaled = components / norms[:, None], codes * norms[:, None]
        loss = exact_loss(data.rows, unit, scaled) / data.total
        levels.append(Level(unit.cpu(), scaled.T.contiguous().cpu(), weight, loss))
        norms_below = norms
    return levels
