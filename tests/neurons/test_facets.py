"""Facets: silhouettes by loops, planted groups found and none invented, tails, two triggers, random positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import interp.neurons.context_facets as module
from interp.neurons import Facets, facets, top_contexts
from interp.neurons._clusters import Null, clusters, silhouette
from interp.neurons._clusters import _draw as draw
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
        for null in ("elliptical", "gaussian"):
            found = clusters(points, null=null, **FAST)
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


def unit(points: np.ndarray) -> np.ndarray:
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_a_heavy_tail_alone_is_a_facet_to_the_gaussian_null_but_seldom_to_the_elliptical_one() -> None:
    """One cloud, t with 4 degrees of freedom round a mean, on the sphere."""
    rng = np.random.default_rng(4)
    options = {**FAST, "max_k": 4, "n_null": 19}
    split: dict[Null, int] = {"gaussian": 0, "elliptical": 0}
    for _ in range(20):
        tail = rng.normal(size=(60, 32)) / np.sqrt(rng.chisquare(4, size=(60, 1)) / 4)
        points = unit(tail + 2 * np.sqrt(32) * np.eye(32)[0])
        for null in split:
            split[null] += clusters(points, null=null, sphere=True, **options).k > 1
    assert split["gaussian"] >= 15 and split["elliptical"] <= 5, split


@pytest.mark.parametrize("tight", [0.1, 1.0])
def test_two_groups_stand_out_from_both_nulls_on_the_sphere(tight: float) -> None:
    """Also when almost all variance is between them: the null stays one cloud."""
    rng = np.random.default_rng(5)
    centres = np.zeros((2, 16))
    centres[:, 0], centres[:, 1] = 8, (-6, 6)
    truth = np.repeat([0, 1], [35, 25])
    points = unit(centres[truth] + tight * rng.normal(size=(60, 16)))
    for null in ("elliptical", "gaussian"):
        found = clusters(points, null=null, sphere=True, **FAST)
        assert found.k == 2 and found.p_value == pytest.approx(1 / 40)
        np.testing.assert_array_equal(found.labels, truth)
        # a Gaussian along one axis, cut in two; draws at the distances of the data would lie at its ends and give 0.78
        assert found.table[0, 1] < 0.65


def test_null_draws_lie_on_the_sphere_and_spread_like_the_data() -> None:
    rng = np.random.default_rng(6)
    points = unit(rng.normal(size=(80, 6)) * np.array([1, 0.5, 0.5, 0.2, 0.2, 0.2]) + 3 * np.eye(6)[5])
    for null in ("elliptical", "gaussian", "shuffled"):
        drawn = np.concatenate([draw(points, null, rng, True) for _ in range(200)])
        np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 1, rtol=1e-12)
        np.testing.assert_allclose(drawn.mean(0), points.mean(0), atol=0.01)
        spread, wanted = drawn.std(0), points.std(0)
        # shrinking far vectors makes the elliptical cloud rounder, by up to 16 % of an axis here
        np.testing.assert_allclose(spread[:5], wanted[:5], rtol=0.2 if null == "elliptical" else 0.05)
    flat = np.concatenate([draw(points, "gaussian", rng, False) for _ in range(200)])
    np.testing.assert_allclose(np.cov(flat.T), np.cov(points.T), atol=0.1 * np.cov(points.T).max())


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
    assert found.n_facets == 2 and 1 / 41 < found.p_value <= 0.05
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
    # any positions of this stream divide: the facets are not the neuron's
    assert found.control_facets >= 2 and found.control_p_value <= 0.05
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
    named = {trace.name: list(trace.y) for trace in found.plot().data if trace.name and len(trace.y) == 5}
    for name, quantity in (("contexts", "observed"), ("control", "control"), ("one cloud", "null_mean")):
        np.testing.assert_allclose(named[name], found.silhouettes.sel(quantity=quantity))
    again = load(found.save(tmp_path / "facets.nc"))
    assert isinstance(again, Facets) and again.table().equals(found.table()) and again.neuron == [0, 3]
    assert again.control.equals(found.control)
    least = facets(bridge, tokens, (0, 3), n=30, side="min", n_null=19, window=(2, 1))
    assert least.values.values.max() < found.values.values.min()
    with pytest.raises(ValueError, match="facet=9 does not exist"):
        found.show(9)


@pytest.mark.parametrize("n_facets", [1, 2])
def test_decoded_tokens_are_those_that_a_facet_points_to(n_facets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean direction of one facet; of several, the mean of each less that of all."""
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(30, 8, seed=3)
    place = torch.Generator().manual_seed(1)
    shift, noise = torch.randn(2, bridge.cfg.d_model, generator=place), torch.randn(60, 8, 32, generator=place)
    planted: dict[str, torch.Tensor] = {}

    def stream(_bridge: Any, rows: torch.Tensor, hook: str, *, positions: torch.Tensor, **_: Any) -> dict[str, Any]:
        assert hook == "blocks.1.hook_resid_post"
        own = rows[torch.arange(len(rows)), positions]
        which = (own > 30).long() if n_facets == 2 else torch.zeros_like(own)
        planted["vectors"] = 5 * (shift[which] + 0.3 * noise.flatten(0, 1)[: len(rows)])
        return {hook: planted["vectors"]}

    monkeypatch.setattr(module, "capture", stream)
    found = facets(bridge, tokens, (1, 3), n=30, n_null=39, window=(2, 1), site="resid_post")
    assert found.n_facets == n_facets and len(found.decoded) == n_facets
    weights = unembedding(bridge, fold=True).double().numpy()
    vectors = unit(planted["vectors"][:30].double().numpy())  # those of the neuron come first, then random ones
    own = found.tokens.sel(offset=0).values > 30
    facet = found.values.coords["facet"].values
    for number in range(n_facets):
        mine = own == own[(facet == number).argmax()] if n_facets == 2 else np.ones(30, bool)
        mean = vectors[mine].sum(0) / mine.sum() - (vectors.sum(0) / 30 if n_facets == 2 else 0)
        scores = [float(mean @ weights[:, i]) for i in range(weights.shape[1])]
        best = sorted(range(len(scores)), key=lambda i: -scores[i])[:10]
        assert found.decoded[number] == [f"w{i}" if i > 2 else bridge.tokenizer.decode([i]) for i in best]


@pytest.mark.parametrize("special", [True, False])
def test_random_positions_of_the_layer_are_the_control(special: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups in the neuron's contexts alone, or in the random positions alone, are told apart."""
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(60, 12, seed=3)
    tokens[:, 0] = bridge.tokenizer.bos_token_id
    seen: list[torch.Tensor] = []
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def stream(_bridge: Any, rows: torch.Tensor, hook: str, *, positions: torch.Tensor, **_: Any) -> dict[str, Any]:
        calls.append((rows, positions))
        vectors = torch.randn(len(rows), 32, generator=torch.Generator().manual_seed(7)) + 4 * torch.eye(32)[0]
        mine = torch.arange(len(rows)) < len(rows) // 2
        vectors[:, 1] += torch.where(mine == special, 12.0 * (torch.arange(len(rows)) % 2) - 6, 0.0)
        seen.append(vectors)
        return {hook: vectors}

    monkeypatch.setattr(module, "capture", stream)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, -1] = False
    options: dict[str, Any] = {"n": 50, "n_null": 39, "window": (2, 1), "keep": keep}
    found = facets(bridge, tokens, (1, 7), **options)
    assert (found.n_facets, found.control_facets) == ((2, 1) if special else (1, 2))
    least = pytest.approx(1 / 40)
    assert (found.p_value == least) is special and (found.control_p_value == least) is not special
    table = found.control
    assert table.positions.tolist() == ["contexts", "random"]
    assert table.n_facets.tolist() == [found.n_facets, found.control_facets]
    assert table.p_value.tolist() == [found.p_value, found.control_p_value]
    for row, part in enumerate((seen[0][:50], seen[0][50:])):
        expected = clusters(unit(part.double().numpy()), null="elliptical", sphere=True, max_k=6, n_null=39, alpha=0.05,
                            seed=0)  # fmt: skip
        best = int(expected.table[:, 3].argmax())
        assert table["k"][row] == expected.ks[best]
        np.testing.assert_allclose([table["silhouette"][row], table["z"][row]], expected.table[best, [0, 3]], rtol=1e-5)
    # as many random places as contexts, of the kept text, each context once, drawn with the seed
    rows, pos = (part[50:] for part in calls[0])
    assert len(rows) == 50 and (pos > 0).all() and (pos < 11).all()
    around = [tuple(row[max(0, at - 2) : at + 1].tolist()) for row, at in zip(rows, pos.tolist(), strict=True)]
    assert len(set(around)) == 50
    facets(bridge, tokens, (2, 5), **options)
    facets(bridge, tokens, (1, 7), **options, seed=1)
    again, other = (call[1][50:] for call in calls[1:])
    assert torch.equal(again, pos) and not torch.equal(other, pos)


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
