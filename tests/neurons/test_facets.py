"""Facets: silhouettes by loops, planted groups found and none invented, a neuron with two triggers, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp.neurons.context_facets as module
from interp.cache import capture
from interp.hooks import hook_name
from interp.neurons import Facets, facets, top_contexts
from interp.neurons._clusters import clusters, silhouette
from interp.neurons._sides import unembedding
from interp.results import load
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens

FAST: dict[str, Any] = {"max_k": 5, "n_null": 39, "alpha": 0.05, "seed": 0}


def test_silhouette_by_loops() -> None:
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(13, 3)), np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 3])
    distances = np.linalg.norm(points[:, None] - points[None], axis=-1)
    scores = []
    for i in range(13):
        same = [distances[i, j] for j in range(13) if j != i and labels[j] == labels[i]]
        if not same:
            scores.append(0.0)
            continue
        others = [np.mean([distances[i, j] for j in range(13) if labels[j] == k]) for k in set(labels) - {labels[i]}]
        a, b = np.mean(same), min(others)
        scores.append((b - a) / max(a, b))
    assert silhouette(distances, labels) == pytest.approx(np.mean(scores))
    assert silhouette(np.zeros((4, 4)), np.array([0, 0, 1, 1])) == 0.0


def test_planted_groups_are_found_and_ordered_by_size() -> None:
    rng = np.random.default_rng(1)
    centres = 4 * np.eye(8)[:3]
    truth = np.repeat([2, 0, 1], [10, 30, 20])
    points = centres[truth] + rng.normal(size=(60, 8)) * 0.5
    found = clusters(points, null="gaussian", **FAST)
    assert found.k == 3 and found.p_value == pytest.approx(1 / 40)
    np.testing.assert_array_equal(found.labels, truth)  # 0 is the largest
    assert found.table[:, 0].argmax() == 1 and found.ks == [2, 3, 4, 5]
    z = (found.table[:, 0] - found.table[:, 1]) / found.table[:, 2]
    np.testing.assert_allclose(found.table[:, 3], z)


def test_one_group_is_not_divided_but_an_elongated_one_is_by_the_weaker_null() -> None:
    rng = np.random.default_rng(2)
    round_, long = rng.normal(size=(60, 6)), rng.normal(size=(60, 1)) * np.ones((1, 6)) * 3 + rng.normal(size=(60, 6))
    for points in (round_, long):
        found = clusters(points, null="gaussian", **FAST)
        assert found.k == 1 and (found.labels == 0).all() and found.p_value > 0.05
    assert clusters(round_, null="shuffled", **FAST).k == 1
    assert clusters(long, null="shuffled", **FAST).k > 1
    equal = clusters(np.ones((20, 3)), null="gaussian", **FAST)
    assert equal.k == 1 and equal.p_value == 1.0 and np.isnan(equal.table).all()


def test_false_facets_are_as_rare_as_alpha() -> None:
    rng = np.random.default_rng(3)
    options = {**FAST, "max_k": 4, "n_null": 19, "alpha": 0.05}
    found = [clusters(rng.normal(size=(25, 4)), null="gaussian", **options).k > 1 for _ in range(60)]
    assert sum(found) <= 8  # 3 expected; more than 8 has a chance of 0.3 %


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neuron_with_two_triggers_has_two_facets(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(60, 12, seed=3)
    real = module.capture
    centres = torch.randn(2, bridge.cfg.d_model, generator=torch.Generator().manual_seed(0))

    def planted(bridge: Any, tokens: Any, hook: str, *, positions: Any, batch_size: int) -> dict[str, Any]:
        """The stream of the model, pulled to one of two places by the token there."""
        assert hook == f"blocks.1.hook_resid_{'pre' if family == 'neox' else 'mid'}"
        found = real(bridge, tokens, hook, positions=positions, batch_size=batch_size)[hook]
        own = tokens[torch.arange(len(tokens)), positions]
        return {hook: found / found.norm(dim=1, keepdim=True) + centres[(own > 30).long()]}

    monkeypatch.setattr(module, "capture", planted)
    found = facets(bridge, tokens, (1, 7), n=60, n_null=39, window=(2, 1))
    assert found.n_facets == 2 and found.p_value == pytest.approx(1 / 40)
    own = found.tokens.sel(offset=0).values > 30
    facet = found.values.coords["facet"].values
    assert (own == own[0]).astype(int).tolist() in (facet.tolist(), (1 - facet).tolist())
    # contexts are the strongest distinct ones, in order
    top = top_contexts(bridge, tokens, [(1, 7)], n=60, once="context", window=(2, 1))
    np.testing.assert_array_equal(found.values.values, top.values.values[0])
    np.testing.assert_array_equal(found.tokens.values, top.tokens.values[0])
    table = found.table()
    assert table.n.sum() == 60 and table.n[0] >= table.n[1] and table.share.sum() == pytest.approx(1)
    for number in range(2):
        values = found.values.values[facet == number]
        assert table["mean"][number] == pytest.approx(float(values.mean()), rel=1e-5)
    monkeypatch.undo()
    plain = facets(bridge, tokens, (1, 7), n=60, n_null=39, window=(2, 1))
    assert plain.values.coords["row"].values.tolist() == found.values.coords["row"].values.tolist()


def test_facets_count_tokens_show_themselves_and_survive_saving(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(20, 8, seed=3)
    found = facets(bridge, tokens, (0, 3), n=30, n_null=19, window=(2, 1), alpha=0.05)
    table = found.table(k=1)
    first = found.tokens.sel(offset=0).values[found.values.coords["facet"].values == 0].tolist()
    most = max(set(first), key=lambda i: (first.count(i), -first.index(i)))
    assert table["current"][0] == f"'w{most}' {first.count(most) / len(first):.0%}"
    shown = found.show(0, 3)
    assert len(shown.lines) == 3 and shown.title == "L0N3, facet 0"
    assert shown.lines[0][shown.marks[0]] == str(
        found.values.coords["token"].values[found.values.coords["facet"].values.argmin()]
    )
    assert found.plot().data
    again = load(found.save(tmp_path / "facets.nc"))
    assert isinstance(again, Facets) and again.table().equals(found.table()) and again.neuron == [0, 3]
    least = facets(bridge, tokens, (0, 3), n=30, side="min", n_null=19, window=(2, 1))
    assert least.values.values.max() < found.values.values.min()
    with pytest.raises(ValueError, match="facet=9 does not exist"):
        found.show(9)


def test_decoded_tokens_are_those_that_a_facet_points_to() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(20, 8, seed=3)
    found = facets(bridge, tokens, (1, 3), n=20, n_null=19, window=(2, 1), site="resid_post", alpha=0.05)
    if found.n_facets == 1:  # then the mean itself is decoded
        name = hook_name("resid_post", 1)
        acts = capture(bridge, tokens, name)[name]
        rows, pos = (torch.from_numpy(found.values.coords[key].values).long() for key in ("row", "pos"))
        vectors = acts[rows, pos]
        mean = (vectors / vectors.norm(dim=1, keepdim=True)).mean(0)
        best = (mean @ unembedding(bridge, fold=True)).topk(10).indices.tolist()
        assert found.decoded == [[f"w{i}" if i > 2 else bridge.tokenizer.decode([i]) for i in best]]


def test_refusals_come_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(4, 6)
    with pytest.raises(ValueError, match="this text has 5 distinct contexts, too few"):
        facets(bridge, tokens[:1], (0, 0))
    monkeypatch.setattr("interp.neurons.contexts.capture", lambda *_a, **_k: pytest.fail("a forward was run"))
    for match, options in {
        "site='z'; expected resid_pre": {"site": "z"},
        "n=9; expected at least 10": {"n": 9},
        "max_k=1": {"max_k": 1},
        "n_null=18, alpha=0.05": {"n_null": 18},
        "n_null=19, alpha=0.01; expected 19 draws": {"n_null": 19, "alpha": 0.01},
        r"window=\(0, 3\)": {"window": (0, 3)},
    }.items():
        with pytest.raises(ValueError, match=match):
            facets(bridge, tokens, (0, 0), **options)
    with pytest.raises(ValueError, match=r"units \[\(9, 0\)\] do not exist"):
        facets(bridge, tokens, (9, 0))
    with pytest.raises(ValueError, match="has no resid_mid .*use site='resid_pre'"):
        facets(tiny_bridge("neox"), tokens, (0, 0), site="resid_mid")
