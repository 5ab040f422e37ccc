"""Top contexts: exact with ties against a sorted list, streaming equal to all at once, planted triggers, base rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name, names, reads
from interp.neurons import TopContexts, contexts_of, top_contexts
from interp.neurons._kept import kept_tokens
from interp.neurons.contexts import _check_options, _check_scores
from interp.results import load
from tests.helpers import D_MLP, D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

BATCH, POS, UNITS = 7, 6, 5


def brute(
    scores: Tensor, tokens: Tensor, n: int, window: tuple[int, int], side: str, once: str, keep: Tensor
) -> list[list[tuple[float, int, int, tuple[int, ...], tuple[float, ...]]]]:
    """Per unit the best contexts, by sorting a list of all of them."""
    out = []
    batch, n_pos = tokens.shape
    for unit in range(scores.shape[1]):
        entries = []
        for row in range(batch):
            for pos in range(n_pos):
                if not keep[row, pos]:
                    continue
                value = float(scores[row * n_pos + pos, unit])
                key = {"max": value, "min": -value, "abs": abs(value)}[side]
                around = range(pos - window[0], pos + window[1] + 1)
                ids = tuple(int(tokens[row, p]) if 0 <= p < n_pos else -1 for p in around)
                shown = tuple(float(scores[row * n_pos + p, unit]) if 0 <= p < n_pos else np.nan for p in around)
                entries.append((-key, row, pos, value, ids, shown))
        entries.sort(key=lambda entry: entry[:3])
        best: list[Any] = []
        seen: set[Any] = set()
        for _, row, pos, value, ids, shown in entries:
            mark = {"token": (row, pos), "row": row, "context": ids[: window[0] + 1]}[once]
            if mark not in seen and len(best) < n:
                best.append((value, row, pos, ids, shown))
            seen.add(mark)
        out.append(best)
    return out


def assert_equal(found: TopContexts, expected: list[Any], n: int) -> None:
    for unit, best in enumerate(expected):
        for rank in range(n):
            cell = found.values[unit, rank]
            if rank >= len(best):
                assert np.isnan(cell) and int(cell.row) == int(cell.pos) == -1 and str(cell.token.values) == ""
                assert (found.tokens[unit, rank] == -1).all() and np.isnan(found.scores[unit, rank]).all()
                continue
            value, row, pos, ids, shown = best[rank]
            assert (float(cell), int(cell.row), int(cell.pos)) == (value, row, pos), (unit, rank)
            assert tuple(found.tokens[unit, rank].values.tolist()) == ids
            np.testing.assert_array_equal(found.scores[unit, rank].values, shown)


def numbers(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with many ties, tokens with repeated contexts, and a mask."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-3, 4, (BATCH * POS, UNITS), generator=generator).float()
    scores[:, 4] = 0.0  # a unit that is nowhere on: ties alone decide
    tokens = torch.randint(0, 3, (BATCH, POS), generator=generator)
    return scores, tokens, torch.rand(BATCH, POS, generator=generator) > 0.3


@pytest.mark.parametrize("side", ["max", "min", "abs"])
@pytest.mark.parametrize("once", ["token", "row", "context"])
def test_exact_with_ties_against_a_sorted_list(side: Any, once: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, n, window, all_kept in ((0, 4, (2, 1), True), (1, 9, (1, 0), False), (2, 60, (0, 2), False)):
        scores, tokens, keep = numbers(seed)
        keep = torch.ones_like(keep) if all_kept else keep
        expected = brute(scores, tokens, n, window, side, once, keep)
        options: dict[str, Any] = {"n": n, "window": window, "side": side, "once": once, "keep": keep}
        assert_equal(contexts_of(scores, tokens, **options), expected, n)
        with monkeypatch.context() as patch:  # two units at a time
            patch.setattr("interp.neurons._context_search._CHUNK", 2 * tokens.numel())
            assert_equal(contexts_of(scores, tokens, **options), expected, n)


def test_scores_of_kept_tokens_alone_and_directions() -> None:
    scores, tokens, keep = numbers(3)
    whole = contexts_of(scores, tokens, keep=keep, n=5, window=(2, 1))
    part = contexts_of(scores[keep.flatten()], tokens, keep=keep, n=5, window=(2, 1))
    np.testing.assert_array_equal(part.values.values, whole.values.values)
    np.testing.assert_array_equal(part.values.coords["row"], whole.values.coords["row"])
    np.testing.assert_array_equal(part.tokens.values, whole.tokens.values)
    shown = part.scores.values
    known = ~np.isnan(shown)
    np.testing.assert_array_equal(shown[known], whole.scores.values[known])  # the rest was not given
    assert known[..., 2].all() and 0 < known.sum() < (~np.isnan(whole.scores.values)).sum()
    directions = torch.tensor([[0.0, 0, 1, 0, 0], [1.0, -1, 0, 0, 0]])
    turned = contexts_of(scores, tokens, directions=directions, n=5, names=["third", "difference"])
    np.testing.assert_array_equal(turned.values.values[0], contexts_of(scores, tokens, n=5).values.values[2])
    assert_equal(turned, brute(scores @ directions.T, tokens, 5, (8, 3), "max", "token", torch.ones_like(keep)), 5)
    assert turned.place("difference") == 1 and turned.unit_name(1) == "difference"


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_is_ranking_all_at_once(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(6, 7, seed=3)
    tokens[3:5] = tokens[:2]  # the rows again, but for the last token: ties across batches
    tokens[3:5, -1] = (tokens[:2, -1] + 7) % 50 + 3
    with torch.no_grad(), reads(bridge, [hook_name("neuron", layer) for layer in range(3)]) as acts:
        bridge(tokens)
    found = {hook_name("neuron", layer): acts[hook_name("neuron", layer)] for layer in range(3)}
    for once in ("token", "row", "context"):
        streamed = top_contexts(bridge, tokens, n=6, window=(2, 1), once=once, batch_size=2)
        scores = torch.cat([act.flatten(0, 1) for act in found.values()], 1)
        whole = contexts_of(scores, tokens, keep=tokens != 0, n=6, window=(2, 1), once=once)
        np.testing.assert_allclose(streamed.values.values, whole.values.values, rtol=1e-4, atol=1e-5)
        same = (streamed.values.coords["row"] == whole.values.coords["row"]).values
        if once == "context":  # rows 3 and 4 repeat rows 0 and 1; what follows a context does not make it another
            again = np.isin(streamed.values.coords["row"], [3, 4])
            assert (streamed.values.coords["pos"].values[again] == 6).all()
        assert same.mean() > 0.95  # the last bit may differ between batch sizes, and decide between the equal rows
        assert streamed.values.coords["layer"].values.tolist() == [i // D_MLP for i in range(3 * D_MLP)]
        assert streamed.values.coords["index"].values.tolist() == [*range(D_MLP)] * 3
    assert not any(point.fwd_hooks for point in bridge.hook_points() if point.name in names(bridge))


def test_a_context_is_counted_once_across_batches_even_when_there_is_room() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(6, 7, seed=3)
    tokens[3:5] = tokens[:2]
    found = top_contexts(bridge, tokens, [(0, 1)], n=60, window=(6, 1), once="context", batch_size=2)
    rows, there = found.values.coords["row"].values[0], np.isfinite(found.values.values[0])
    assert there.sum() == 4 * 6 and set(rows[there]) == {0, 1, 2, 5} and (rows[~there] == -1).all()
    assert (found.tokens.values[0][~there] == -1).all() and np.isnan(found.scores.values[0][~there]).all()


def test_units_layers_sites_and_directions() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6, seed=1)
    every = top_contexts(bridge, tokens, n=3)
    some = top_contexts(bridge, tokens, [(2, 5), (0, 7), (2, 1)], n=3)
    for place, (layer, index) in enumerate([(2, 5), (0, 7), (2, 1)]):  # in the order asked for
        assert some.place((layer, index)) == place and some.unit_name(place) == f"L{layer}N{index}"
        np.testing.assert_array_equal(some.values[place].values, every.values[layer * D_MLP + index].values)
        np.testing.assert_array_equal(some.tokens[place].values, every.tokens[layer * D_MLP + index].values)
    layer = top_contexts(bridge, tokens, layers=[1], n=3)
    np.testing.assert_array_equal(layer.values.values, every.values[D_MLP : 2 * D_MLP].values)
    directions = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(0))
    name = hook_name("resid_post", 1)
    acts = capture(bridge, tokens, name)[name]
    turned = top_contexts(bridge, tokens, site="resid_post", layers=[1], directions=directions, n=3, skip_bos=False)
    brute_force = contexts_of(acts.flatten(0, 1) @ directions.T, tokens, n=3)
    np.testing.assert_allclose(turned.values.values, brute_force.values.values, rtol=1e-5)
    np.testing.assert_array_equal(turned.values.coords["pos"], brute_force.values.coords["pos"])
    plain = top_contexts(bridge, tokens, [(1, 4)], site="resid_post", n=3, skip_bos=False)
    np.testing.assert_allclose(plain.values.values[0], acts[..., 4].flatten().topk(3).values, rtol=1e-6)


def test_bos_is_left_out_unless_asked_for() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(4, 6, seed=1)
    without = top_contexts(bridge, tokens, layers=[0], n=40)
    assert (without.values.coords["pos"].values != 0).all() and np.isnan(without.values.values).sum() == D_MLP * 20
    assert (top_contexts(bridge, tokens, layers=[0], n=40, skip_bos=False).values.coords["pos"].values == 0).any()
    keep = torch.zeros(4, 6, dtype=torch.bool)
    keep[:, :3] = True
    assert set(np.unique(top_contexts(bridge, tokens, layers=[0], n=8, keep=keep).values.coords["pos"])) == {1, 2}


def test_planted_trigger_is_found_and_its_share_stands_above_the_base() -> None:
    tokens = tiny_tokens(30, 12, seed=5)
    scores = torch.rand(360, 2, generator=torch.Generator().manual_seed(0))
    flat = tokens.flatten()
    scores[flat == 17, 0] += 2  # unit 0 reads token 17
    before = torch.cat([flat[1:] == 23, torch.tensor([False])]) & (torch.arange(360) % 12 != 11)
    scores[before, 1] += 2  # unit 1 is on before token 23
    n = int(min((flat == 17).sum(), before.sum()))
    assert n >= 3
    found = contexts_of(scores, tokens, n=n, window=(1, 1))
    table = found.share({0: [17, 40], 1: [23]}).set_index("unit")
    assert table.loc["0", "current"] == 1.0 and table.loc["1", "next"] == 1.0
    assert table.loc["0", "next"] < 0.5 and table.loc["1", "current"] < 0.5
    base = float(((flat == 17) | (flat == 40)).float().mean())
    assert table.loc["0", "current_base"] == pytest.approx(base) and table.loc["0", "n"] == n
    after = tokens[:, 1:].flatten()
    assert table.loc["1", "next_base"] == pytest.approx(float((after == 23).float().mean()))
    # without a token after, nothing can be said of the next one; ids that never occur have base 0
    blind = contexts_of(scores, tokens, n=n, window=(1, 0)).share({0: [17, 9999]}).iloc[0]
    assert np.isnan(blind["next"]) and blind["current"] == 1.0 and blind["next_base"] > 0


def test_counts_follow_what_was_searched() -> None:
    tokens = torch.tensor([[0, 1, 1, 2], [0, 2, 2, 1]])
    keep = torch.tensor([[False, True, True, True], [False, True, False, True]])
    found = contexts_of(torch.rand(8, 1), tokens, keep=keep, n=2)
    assert found.counts.sel(which="current").values.tolist() == [0, 3, 2]
    assert found.counts.sel(which="next").values.tolist() == [0, 1, 2]


def test_contexts_show_themselves_and_survive_saving(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 6, seed=2)
    found = top_contexts(bridge, tokens, [(1, 3)], n=4, window=(2, 1))
    texts, scores, own = found.context((1, 3), 1)
    row, pos = (int(found.values[0, 1].coords[name]) for name in ("row", "pos"))
    start, stop = max(pos - 2, 0), min(pos + 2, 6)
    assert texts == bridge.tokenizer.convert_ids_to_tokens(tokens[row, start:stop].tolist())
    assert own == pos - start and scores[own] == float(found.values[0, 1])
    assert str(found.values[0, 1].token.values) == texts[own]
    shown = found.show((1, 3), 2)
    assert shown.lines[1] == tuple(texts) and shown.marks[1] == own and shown.glue == " "
    assert f"[[{texts[own]}]]" in str(shown) and "L1N3" in shown.title
    assert found.plot((1, 3)).data[0].z.shape == (4, 4)
    again = load(found.save(tmp_path / "top.nc"))
    assert isinstance(again, TopContexts) and again.context((1, 3), 1) == (texts, scores, own)
    assert again.provenance["cost"] == {"forwards": 1} and found.to_dataframe().shape[0] == 4
    assert contexts_of(torch.rand(18, 1), tokens, n=1).context(0)[0][0].startswith("#")


def test_refusals_come_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(2, 5)
    monkeypatch.setattr("interp.neurons.contexts.capture", lambda *_a, **_k: pytest.fail("a forward was run"))

    def refused(match: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            top_contexts(bridge, tokens, *args, **options)

    refused(r"units \[\(3, 0\), \(0, 48\)\] do not exist: layers are 0 to 2, neuron 0 to 47", [(3, 0), (0, 48), (1, 1)])
    refused("a unit is given twice", [(1, 1), (1, 1)])
    refused("units is empty", [])
    refused("units says which layers", [(1, 1)], layers=[1])
    refused("site='z' has no vector per token", site="z")
    refused(r"layers=\[7\] are not layers", layers=[7])
    refused("directions belong to one layer", directions=torch.zeros(1, 48))
    refused("directions have width 3; neuron has 48", directions=torch.zeros(1, 3), layers=[0])
    refused("n=0", n=0)
    refused("window=", window=(-1, 2))
    for options in (("top", "token"), ("max", "never")):  # the type checker of the tests would catch these first
        with pytest.raises(ValueError, match="'top'; expected one of max, min|'never'; expected one of token"):
            _check_options(1, (0, 0), *options)
    refused("batch_size=0", batch_size=0)
    refused("leave out all of them", keep=tokens == 0)
    with pytest.raises(ValueError, match=r"keep is \(2, 4\) and tokens \(2, 5\)"):
        kept_tokens(bridge, tokens, torch.ones(2, 4, dtype=torch.bool), True, 1)
    scores = torch.zeros(10, 2)
    with pytest.raises(ValueError, match="unit 1 at row 3 is nan"):
        contexts_of(torch.where(torch.arange(20).reshape(10, 2) == 7, torch.nan, scores), tokens)
    with pytest.raises(ValueError, match=r"scores has 9 rows; expected one per token of \(2, 5\), 10"):
        contexts_of(scores[:9], tokens)
    with pytest.raises(ValueError, match="directions have width 3 and the activations 2"):
        _check_scores(scores, tokens, tokens >= 0, torch.zeros(1, 3))  # as above
    with pytest.raises(ValueError, match="3 names for 2 units"):
        contexts_of(scores, tokens, names=["a", "b", "c"])
    with pytest.raises(ValueError, match="keep is False everywhere"):
        contexts_of(scores, tokens, keep=tokens < 0)
    found = contexts_of(scores, tokens, n=20)
    with pytest.raises(KeyError, match=r"no unit 5 among the 2"):
        found.place(5)
    with pytest.raises(KeyError, match="are not neurons"):
        found.place((0, 1))
    with pytest.raises(KeyError, match="no context of rank 15"):
        found.context(0, 15)
