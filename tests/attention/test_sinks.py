"""Importance and sink rates: the official computation, closed forms, planted sinks, and heads that are none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.attention.controls import constant_logit_importance, self_importance, uniform_importance
from interp.attention.sinks import SinkScores, sink_importance, sink_scores
from interp.hooks import hook_name, interventions, names
from interp.results import load
from tests.attention.planted_sinks import N_POS, control, plant, planted_bridge, planted_tokens, sink_key
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens


def random_patterns(*shape: int, seed: int = 0) -> Tensor:
    logits = 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return logits.masked_fill(torch.ones(shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)


def official_sink_rate(patterns: Tensor, k: int, epsilon: float) -> float:
    """The released computation, sequence by sequence and head by head; k counts from 1."""
    n, n_layers, n_heads, n_pos, _ = patterns.shape
    columns = patterns[..., k - 1].double().tolist()
    total = 0.0
    for sequence in columns:
        rate = 0.0
        for layer in sequence:
            flags = 0.0
            for head in layer:
                alpha = sum(head[t - 1] for t in range(k, n_pos + 1)) / (n_pos - k + 1)
                flags += 1.0 if alpha > epsilon else 0.0
            rate += flags / n_heads
        total += rate / n_layers
    return total / n


def scores_of(patterns: Tensor) -> SinkScores:
    """A result as `sink_scores` would give, for patterns [example, layer, head, dest, src] made by hand."""
    bridge = tiny_bridge("gpt2", n_layer=patterns.shape[1], n_head=patterns.shape[2])
    edits = {}
    for layer in range(patterns.shape[1]):
        edits[hook_name("pattern", layer)] = lambda _old, _layer=layer: patterns[:, _layer]
    with interventions(bridge, edits):
        return sink_scores(bridge, tiny_tokens(len(patterns), patterns.shape[-1]))


def test_rates_equal_the_official_computation_on_50_random_patterns():
    worst = 0.0
    for seed in range(50):
        patterns = random_patterns(3, 4, 5, 64, 64, seed=seed)
        importance = sink_importance(patterns)  # [example, layer, head, key]
        epsilon = (0.05, 0.1, 0.3)[seed % 3]
        ours = (importance > epsilon).double().mean((0, 1, 2))
        for k in range(1, 65):
            worst = max(worst, abs(float(ours[k - 1]) - official_sink_rate(patterns, k, epsilon)))
    assert worst <= 1e-6


def test_rates_of_a_result_equal_the_official_computation():
    patterns = random_patterns(3, 4, 4, 24, 24, seed=7)
    scores = scores_of(patterns)
    for epsilon in (0.05, 0.3):
        rates = scores.rates(epsilon)
        for k in range(1, 25):
            assert float(rates.sel(key=k - 1)) == pytest.approx(official_sink_rate(patterns, k, epsilon), abs=1e-6)
    assert float(scores.rate(23, 0.3).estimate) == pytest.approx(official_sink_rate(patterns, 24, 0.3), abs=1e-6)
    by_head = scores.head_rates(23, 0.3)
    assert float(by_head.mean()) == pytest.approx(float(scores.rates(0.3).sel(key=23)), abs=1e-6)


def test_flags_are_per_sequence_and_strict():
    pattern = torch.zeros(2, 1, 1, 4, 4)
    pattern[0, 0, 0] = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]])
    pattern[1, 0, 0] = torch.eye(4)  # alpha of key 0 is exactly 1/4
    scores = scores_of(pattern)
    assert scores.flags(0.25).sel(key=0).values.ravel().tolist() == [1.0, 0.0]
    # averaging first would have made 0.625 and one flag
    assert float(scores.rates(0.5).sel(key=0)) == 0.5


def test_without_the_diagonal_only_later_queries_count():
    patterns = random_patterns(2, 3, 4, 12, 12)
    scores = scores_of(patterns)
    off = patterns * (1 - torch.eye(12))
    expected = off.sum(-2)[..., :-1] / torch.arange(11, 0, -1)
    found = scores.importance(diagonal=False)
    assert np.allclose(found.isel(key=slice(0, -1)).values, expected.permute(1, 2, 3, 0).numpy(), atol=1e-6)
    assert found.isel(key=-1).isnull().all()
    assert torch.allclose(sink_importance(patterns, diagonal=False)[..., :-1], expected, atol=1e-6)
    assert scores.queries(diagonal=False).values.tolist() == list(range(11, -1, -1))
    assert scores.flags(min_queries=5).sel(key=8).isnull().all()  # seen by four
    assert scores.flags(min_queries=5).sel(key=7).notnull().all()


def test_closed_forms():
    causal = torch.ones(64, 64).tril()
    uniform = causal / causal.sum(-1, keepdim=True)
    assert np.allclose(sink_importance(uniform.double()), uniform_importance(64), atol=1e-12)
    assert uniform_importance(64)[0] == pytest.approx(0.0741, abs=5e-5)
    assert np.allclose(sink_importance(torch.eye(64).double()), self_importance(64), atol=1e-12)
    for logit in (0.0, 1.5, 4.0):
        logits = torch.zeros(64, 64, dtype=torch.double)
        logits[:, 0] = logit
        pattern = logits.masked_fill(causal == 0, -torch.inf).softmax(-1)
        assert float(sink_importance(pattern)[0]) == pytest.approx(constant_logit_importance(logit, 64), abs=1e-12)


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_columns_and_mass_off_the_sequence_account_for_every_row(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 20)
    scores = sink_scores(bridge, tokens)
    columns = (scores.values * scores.queries()).sum("key")
    assert np.allclose(columns + 20 * scores.off_sequence, 20, atol=1e-4)
    assert np.allclose(scores.off_sequence, 0, atol=1e-5)
    assert float(scores.values.sel(key=0).min()) >= 1 / 20 - 1e-6
    batched = sink_scores(bridge, tokens, batch_size=1)
    assert np.allclose(batched.values, scores.values, atol=1e-5)


def test_rows_that_sum_to_less_are_reported_and_not_renormalised():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(2, 12)
    plain = sink_scores(bridge, tokens)
    with interventions(bridge, {hook_name("pattern", layer): lambda p: 0.8 * p for layer in range(3)}):
        thin = sink_scores(bridge, tokens)
    assert np.allclose(thin.off_sequence, 0.2, atol=1e-6)
    assert np.allclose(thin.values.sel(layer=0), 0.8 * plain.values.sel(layer=0), atol=1e-6)


def test_200_planted_sinks_are_found_and_nothing_else_is():
    bridge, found, true_positives = planted_bridge(), 0, 0
    n_plants = 0
    for seed in range(20):
        plants, tokens = plant(bridge, seed, 10), planted_tokens(3, seed)
        truth = np.zeros((4, 8, N_POS, 3), dtype=bool)
        scores = sink_scores(bridge, tokens)
        for one in plants:
            keys = sink_key(one, tokens)
            truth[one.layer, one.head, keys, range(3)] = True
            for example, key in enumerate(keys.tolist()):  # e^c / (e^c + t), the t other keys that query t sees
                weights = np.exp(one.logit) / (np.exp(one.logit) + np.arange(key, N_POS))
                alpha = float(scores.values.sel(layer=one.layer, head=one.head, key=key, example=example))
                assert alpha == pytest.approx(weights.mean(), abs=1e-5)
        flags = scores.flags(diagonal=False, min_queries=16).values == 1
        found += int(flags.sum())
        true_positives += int((flags & truth).sum())
        n_plants += int(truth.sum())
        listed = scores.sinks()
        fixed = {(p.layer, p.head, 0 if p.kind == "bos" else p.position) for p in plants if p.kind != "delimiter"}
        rows = set(zip(listed["layer"], listed["head"], listed["key"], strict=True))
        assert fixed <= rows
        assert {row[:2] for row in rows} <= {(p.layer, p.head) for p in plants}
    assert n_plants == 200 * 3
    assert true_positives / n_plants == 1.0  # recall
    assert true_positives / found == 1.0  # precision


@pytest.mark.parametrize(("kind", "false"), [("uniform", []), ("self", [61, 62, 63]), ("previous", [61, 62])])
def test_the_unguarded_rate_flags_the_last_keys_of_local_heads(kind: str, false: list[int]):
    query, key = control(kind)
    positions = torch.eye(N_POS)
    scores = (positions @ query[:, 3 : 3 + N_POS].T) @ (positions @ key[:, 3 : 3 + N_POS].T).T / 8
    pattern = scores.masked_fill(torch.ones(N_POS, N_POS).triu(1).bool(), -torch.inf).softmax(-1)
    result = scores_of(pattern.expand(1, 3, 4, -1, -1))
    flagged = result.flags().sel(layer=0, head=0, example=0)
    assert np.flatnonzero(flagged.values == 1).tolist() == false
    assert len(result.sinks()) == 0


def test_a_window_of_four_is_flagged_at_the_end_only_without_the_guard():
    query, key = control("local")
    positions = torch.eye(N_POS)
    scores = (positions @ query[:, 3 : 3 + N_POS].T) @ (positions @ key[:, 3 : 3 + N_POS].T).T / 8
    pattern = scores.masked_fill(torch.ones(N_POS, N_POS).triu(1).bool(), -torch.inf).softmax(-1)
    result = scores_of(pattern.expand(1, 3, 4, -1, -1))
    assert float(result.values.sel(key=63).max()) == pytest.approx(0.25, abs=1e-3)
    assert (result.flags(0.2).sel(key=63) == 1).all()
    assert len(result.sinks(0.2)) == 0


@pytest.mark.parametrize("family", ["llama", "neox", "qwen2", "phi"])
def test_one_token_repeated_leaves_rotary_models_nothing_to_single_out(family: str):
    bridge = tiny_bridge(family)
    tokens = torch.full((3, 64), 7) + torch.arange(3)[:, None]
    found = {}

    def keep(stream: Tensor) -> Tensor:
        found["stream"] = stream
        return stream

    with interventions(bridge, {hook_name("resid_post", 2): keep}):
        scores = sink_scores(bridge, tokens)
        with torch.no_grad():
            bridge(tokens)
    spread = (found["stream"] - found["stream"][:, :1]).abs().max()
    assert float(spread) <= 1e-5 * max(1.0, float(found["stream"].abs().max()))
    assert float(scores.rates().sel(key=0)) == 0
    assert len(scores.sinks()) == 0


def test_without_positions_one_token_repeated_has_the_closed_form():
    bridge = fresh_bridge("gpt2")
    with torch.no_grad():
        bridge.original_model.transformer.wpe.weight.zero_()
    scores = sink_scores(bridge, torch.full((1, 64), 7))
    expected = torch.tensor(uniform_importance(64)).float()
    assert np.abs(scores.values.transpose(..., "key").values - expected.numpy()).max() <= 1e-6
    assert float(scores.rates().max()) == pytest.approx(0)


def test_layers_keys_and_saving(tmp_path):
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(3, 18)
    whole = sink_scores(bridge, tokens)
    part = sink_scores(bridge, tokens, layers=[1], keys=[0, 5])
    assert part.values.sel(layer=0).isnull().all()
    assert np.allclose(part.values.sel(layer=1), whole.values.sel(layer=1, key=[0, 5]), atol=1e-6)
    assert float(part.rate(0).estimate) == pytest.approx(float(whole.flags().sel(layer=1, key=0).mean()), abs=1e-6)
    assert (part.queries().values == [18, 13]).all()
    loaded = load(whole.save(tmp_path / "sinks.nc"))
    assert isinstance(loaded, SinkScores)
    assert loaded.values.identical(whole.values)
    assert loaded.off_sequence.identical(whole.off_sequence)
    assert whole.provenance["first_is_bos"] == 1.0
    figure = whole.plot()
    assert "position 0" in figure.layout.title.text
    assert [point.fwd_hooks for point in bridge.hook_points() if point.fwd_hooks] == []
    assert names(bridge, "blocks.0.hook_resid_pre")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, t: sink_scores(b, t, keys=[18]), r"keys \[18\] are not positions.*0 to 17"),
        (lambda b, t: sink_scores(b, t, keys=[1, 1]), "each once"),
        (lambda b, t: sink_scores(b, t, layers=[9]), r"layers=\[9\].*0 to 2"),
        (lambda b, t: sink_scores(b, t).flags(0), "epsilon=0 must lie between 0 and 1"),
        (lambda b, t: sink_scores(b, t).flags(min_queries=0), "min_queries=0"),
        (lambda b, t: sink_scores(b, t, keys=[0]).rate(3), "key=3 was not measured"),
        (lambda b, t: sink_scores(b, t).sinks(share=0), "share=0"),
        (lambda b, t: sink_importance(torch.rand(2, 1, 18)), "1 queries and 18 keys"),
    ],
)
def test_errors_say_what_to_do(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(tiny_bridge("llama"), tiny_tokens(1, 18))
