"""Hierarchical SNMF: constraints after tuning, falling losses, planted levels, and the tree of the tuned factors."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

from interp.dictionaries import SNMF, HierarchicalSNMF
from interp.dictionaries import _hierarchy_tuning as tuning
from interp.dictionaries._hierarchy_tree import concept_tree
from interp.dictionaries._snmf_steps import Data, gram
from tests.dictionaries.snmf_data import planted


@pytest.fixture(scope="module")
def data() -> Tensor:
    return planted(0, d_neurons=60, n_tokens=200, n_atoms=12, entries=3, noise=0.05)[0]


@pytest.fixture(scope="module", params=["levels", "chain"])
def fitted(data: Tensor, request: pytest.FixtureRequest) -> HierarchicalSNMF:
    return HierarchicalSNMF([12, 6, 3], sparsity=0.1, objective=request.param, tune_iter=40).fit(data)


def test_weights_stay_non_negative_and_components_sparse(fitted: HierarchicalSNMF) -> None:
    assert [level.components.shape[0] for level in fitted.levels_] == [12, 6, 3]
    for level in fitted.levels_:
        assert int((level.components != 0).sum(1).max()) <= 6  # ceil(0.1 * 60)
        assert bool((level.activations >= 0).all())
        dead = (level.components == 0).all(1)
        torch.testing.assert_close(level.components.norm(dim=1), (~dead).float())
    assert fitted.levels_[0].weights is None
    for below, level in pairwise(fitted.levels_):
        assert level.weights is not None and bool((level.weights >= 0).all())
        torch.testing.assert_close(below.activations @ level.weights, level.activations, rtol=1e-4, atol=1e-4)


def test_tuning_never_raises_the_loss_and_reports_what_it_returns(fitted: HierarchicalSNMF, data: Tensor) -> None:
    assert len(fitted.history_) > 2
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(fitted.history_))
    assert fitted.history_[-1] < 0.999 * fitted.history_[0]
    assert fitted.loss_ <= fitted.loss_before_
    assert fitted.penalty == 0.1  # counted in the history and in no loss
    assert fitted.history_[0] > sum(
        fitted.level_losses_before_ if fitted.objective == "levels" else [fitted.loss_before_]
    )
    top = fitted.levels_[-1]
    error = float((data - top.activations @ top.components).double().square().sum())
    assert fitted.loss_ == pytest.approx(error, rel=1e-4)
    chain = fitted.levels_[0].activations
    for level in fitted.levels_[1:]:
        assert level.weights is not None
        chain = chain @ level.weights
    error = float((data - chain @ top.components).double().square().sum())
    assert fitted.loss_ == pytest.approx(error, rel=1e-4)
    total = float(data.double().square().sum())
    for level in fitted.levels_:
        error = float((data - level.activations @ level.components).double().square().sum())
        assert level.relative_loss == pytest.approx(error / total, rel=1e-4)


def test_the_finer_levels_are_as_good_as_the_objective_asks(data: Tensor) -> None:
    flat = SNMF(12, sparsity=0.1, max_iter=60).fit(data).relative_loss_
    losses = {
        objective: HierarchicalSNMF([12, 6, 3], sparsity=0.1, objective=objective, tune_iter=20, max_iter=60)
        .fit(data)
        .levels_[0]
        .relative_loss
        for objective in ("levels", "chain")
    }
    assert losses["levels"] < 1.2 * flat < losses["chain"]


def test_the_penalty_keeps_components_of_tuned_levels_from_cancelling(data: Tensor) -> None:
    energies, losses = [], []
    for penalty in (0, 0.1):
        options: dict[str, Any] = {"sparsity": 0.3, "penalty": penalty, "tune_iter": 40, "max_iter": 60}
        levels = HierarchicalSNMF([20, 10], **options).fit(data).levels_
        energies.append([float(level.activations.square().sum() / data.square().sum()) for level in levels])
        losses.append([level.relative_loss for level in levels])
    for level in range(2):
        assert energies[0][level] > 1.3 * energies[1][level]
        assert losses[0][level] < losses[1][level]


@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_losses_of_a_chain_are_squared_errors(penalty: float) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 7, generator=rng, dtype=torch.float64)
    sizes = [5, 3, 2]
    chain = tuning.Chain(
        torch.rand(5, 20, generator=rng, dtype=torch.float64),
        [torch.rand(a, b, generator=rng, dtype=torch.float64) for a, b in pairwise(sizes)],
        [torch.randn(size, 7, generator=rng, dtype=torch.float64) for size in sizes],
    )
    data = Data(rows)
    statistics = gram(chain.codes), data.against_codes(chain.codes)
    found = tuning.chain_losses(data.total, chain, range(3), *statistics, penalty)
    codes = chain.codes.T
    for level in range(3):
        codes = codes @ chain.weights[level - 1] if level else codes
        components = chain.components[level]
        energy = float((codes.square().sum(0) * components.square().sum(1)).sum())
        error = float((rows - codes @ components).square().sum())
        assert found[level] == pytest.approx(error + penalty * energy)
    losses = tuning.tune(data, chain, 7, counted=[0, 2], max_iter=30, tol=0.0, penalty=penalty)
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(losses)) and losses[-1] < 0.7 * losses[0]
    assert all(bool((weight >= 0).all()) for weight in chain.weights)


def test_planted_groups_of_groups_are_the_tree() -> None:
    # Two coarse groups of two pairs each; the members of a group are active together.
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand(200, 2, generator=rng) * (torch.rand(200, 2, generator=rng) < 0.5)
    own = torch.rand(200, 4, generator=rng) < 0.7
    fine = coarse.repeat_interleave(2, dim=1) * own
    atoms = torch.zeros(4, 40)
    for number, atom in enumerate(atoms):
        atom[3 * number : 3 * number + 3] = torch.tensor([1.0, -2.0, 1.5])
    hierarchy = HierarchicalSNMF([4, 2], sparsity=6 / 40, restarts=3).fit(fine @ atoms)
    fine_group, coarse_group = ((level.components.abs().argmax(1) // 6).tolist() for level in hierarchy.levels_)
    assert sorted(coarse_group) == [0, 1]
    for parent in hierarchy.levels_[1].components:
        used = parent.nonzero()[:, 0] // 6
        assert len(used) == 6 and len(set(used.tolist())) == 1  # the six neurons of one group and no other
    tree = hierarchy.tree(prune=False)
    assert all(tree.out_degree((2, parent)) >= 1 for parent in range(2))
    for (_, parent), (_, child) in tree.edges:
        assert fine_group[child] == coarse_group[parent]


def graph(prune: bool = True, root: int | None = None, **options: Any) -> nx.DiGraph:
    giving = [torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.5, 1.0], [1.0, 0.0]]), torch.tensor([[2.0], [6.0]])]
    strengths = [torch.arange(1.0, 5.0), torch.ones(2), torch.ones(1)]
    settings = {"threshold": 0.15, "max_children": 4} | options
    return concept_tree(giving, strengths, root, settings["threshold"], settings["max_children"], prune)


def test_children_are_those_above_the_threshold_with_their_share() -> None:
    tree = graph(prune=False)
    assert set(tree.successors((2, 0))) == {(1, 0), (1, 1), (1, 3)}  # 0.5 is less than 15 % of 4
    assert tree.edges[(2, 0), (1, 1)]["share"] == pytest.approx(3.0 / 8.5)
    assert tree.nodes[1, 3] == {"level": 1, "component": 3, "strength": 4.0}
    assert set(graph(prune=False, max_children=2).successors((2, 0))) == {(1, 0), (1, 1)}
    assert set(graph(prune=False, threshold=1.0).successors((3, 0))) == {(2, 1)}


def test_an_only_child_is_passed_over() -> None:
    tree = graph()
    assert (2, 1) in tree and tree.out_degree((2, 1)) == 0  # its only child has none
    assert (1, 2) not in tree
    narrow = graph(max_children=1)  # 3 -> (2, 1) -> (1, 2): both links are chains
    assert narrow.number_of_edges() == 0 and list(narrow.nodes) == [(3, 0)]


def test_the_tree_is_read_from_the_tuned_factors(fitted: HierarchicalSNMF) -> None:
    tree = fitted.tree(prune=False, threshold=1e-9, max_children=100)
    for number, (below, level) in enumerate(pairwise(fitted.levels_), start=1):
        assert level.weights is not None
        giving = level.weights * below.activations.norm(dim=0)[:, None]
        for parent in range(giving.shape[1]):
            shares = {child[1]: tree.edges[(number + 1, parent), child]["share"] for child in tree[number + 1, parent]}
            expected = giving[:, parent] / giving[:, parent].sum()
            assert shares == pytest.approx({i: float(v) for i, v in enumerate(expected) if v > 1e-9 * expected.max()})
    assert nx.is_directed_acyclic_graph(tree)
    below_one = fitted.tree(root=1)
    assert [node for node in below_one if node[0] == 3] == [(3, 1)]


def test_the_figure_has_every_node_and_edge(fitted: HierarchicalSNMF) -> None:
    tree = fitted.tree()
    figure = fitted.plot(labels={(3, 0): "<b> & co"})
    marks = [trace for trace in figure.data if trace.mode == "markers+text"]
    assert sum(len(trace.x) for trace in marks) == tree.number_of_nodes()
    assert len(figure.data) - len(marks) == tree.number_of_edges()
    assert "&lt;b&gt; &amp; co" in [text for trace in marks for text in trace.text]
    with pytest.raises(ValueError, match="not in this tree"):
        fitted.plot(labels={(9, 9): "x"})


def test_what_cannot_be_is_refused(fitted: HierarchicalSNMF, data: Tensor) -> None:
    with pytest.raises(ValueError, match=r"each smaller than the one before; got \[5, 5\]"):
        HierarchicalSNMF([5, 5])
    with pytest.raises(ValueError, match="use SNMF"):
        HierarchicalSNMF([5])
    with pytest.raises(ValueError, match="in \\(0, 1\\]; got 2"):
        HierarchicalSNMF([5, 2], sparsity=2)
    with pytest.raises(ValueError, match="penalty must be at least 0 and finite, got -1"):
        HierarchicalSNMF([5, 2], penalty=-1)
    with pytest.raises(ValueError, match="tune_iter must be at least 0"):
        HierarchicalSNMF([5, 2], tune_iter=-1)
    with pytest.raises(ValueError, match="root 3 is not one of the 3"):
        fitted.tree(root=3)
    with pytest.raises(ValueError, match="threshold must be in"):
        fitted.tree(threshold=0.0)
    with pytest.raises(RuntimeError, match=r"call fit\(A\) first"):
        HierarchicalSNMF([5, 2]).tree()
    with pytest.raises(ValueError, match="at least as many tokens"):
        HierarchicalSNMF([12, 6]).fit(data[:8])
