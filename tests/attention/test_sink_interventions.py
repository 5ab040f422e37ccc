"""Interventions on sinks: exactly what is set, nothing left behind, and causal where the mechanism is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.attention.controls import control_tokens
from interp.attention.sink_interventions import (
    activation_means,
    cut_heads,
    redirect_attention,
    set_activations,
    swap_position_embeddings,
)
from interp.attention.sinks import sink_scores
from interp.cache import capture
from interp.hooks import hook_name, prefix_cache, run_suffix
from tests.attention.planted_sinks import plant, planted_bridge, planted_tokens
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens

CONTEXTS = {
    "set_activations": lambda b: set_activations(b, 1, [3, 5], 0.0),
    "redirect": lambda b: redirect_attention(b, [(0, 1), (2, 2)]),
    "cut": lambda b: cut_heads(b, [(1, 0)]),
    "cut to": lambda b: cut_heads(b, [(1, 0)], to=0),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_change_the_logits_and_leave_nothing_behind(family: str, name: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 9)
    before = bridge(tokens)
    with CONTEXTS[name](bridge):
        during = bridge(tokens)
    assert not torch.allclose(during, before, atol=1e-5)
    assert torch.equal(bridge(tokens), before)
    with pytest.raises(RuntimeError, match="stop"), CONTEXTS[name](bridge):
        bridge(tokens)
        raise RuntimeError("stop")
    assert torch.equal(bridge(tokens), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_set_there_and_only_there(family: str):
    bridge, tokens, name = tiny_bridge(family), tiny_tokens(3, 9), hook_name("resid_post", 1)
    before = capture(bridge, tokens, name)[name]
    with set_activations(bridge, 1, [3, 5], [7.0, -2.0], position=4):
        after = capture(bridge, tokens, name)[name]
    expected = before.clone()
    expected[:, 4, 3], expected[:, 4, 5] = 7.0, -2.0
    assert torch.equal(after, expected)
    with set_activations(bridge, 1, [3, 5], position="top"):
        after = capture(bridge, tokens, name)[name]
    top = before[..., [3, 5]].abs().amax(-1).argmax(1)
    for row, place in enumerate(top.tolist()):
        before[row, place, [3, 5]] = 0
    assert torch.equal(after, before)


def test_means_are_over_sequences_and_setting_them_removes_what_varies():
    bridge, tokens, name = tiny_bridge("llama"), tiny_tokens(4, 9), hook_name("resid_post", 1)
    stream = capture(bridge, tokens, name)[name]
    assert activation_means(bridge, tokens, 1, [3, 5], position=4) == pytest.approx(
        stream[:, 4, [3, 5]].mean(0).tolist()
    )
    top = activation_means(bridge, tokens, 1, [3], position="top")
    assert abs(top[0]) <= float(stream[..., 3].abs().max())
    with set_activations(bridge, 1, [3], activation_means(bridge, tokens, 1, [3], position=4), position=4):
        assert capture(bridge, tokens, name)[name][:, 4, 3].unique().numel() == 1


@pytest.mark.parametrize("family", ["gpt2", "gpt_neo", "opt"])
def test_position_embeddings_are_exchanged(family: str):
    bridge, tokens, name = tiny_bridge(family), tiny_tokens(2, 9), "hook_pos_embed"
    before, logits = capture(bridge, tokens, name)[name], bridge(tokens)
    with swap_position_embeddings(bridge, 0, 4):
        swapped = capture(bridge, tokens, name)[name]
        with swap_position_embeddings(bridge, 0, 4):
            assert torch.equal(bridge(tokens), logits)  # twice is not at all
    assert torch.equal(swapped[:, [4, 1, 2, 3, 0, *range(5, 9)]], before)
    with swap_position_embeddings(bridge, 0, 4, how="replace"):
        replaced = capture(bridge, tokens, name)[name]
    assert torch.equal(replaced[:, 0], before[:, 4])
    assert torch.equal(replaced[:, 1:], before[:, 1:])
    assert torch.equal(bridge(tokens), logits)


def test_a_planted_position_sink_moves_with_its_embedding():
    bridge = planted_bridge()
    plants, tokens = plant(bridge, 5, 12), planted_tokens(3, 5)
    for one in (p for p in plants if p.kind == "position" and p.position != 20):
        with swap_position_embeddings(bridge, one.position, 20):
            scores = sink_scores(bridge, tokens)
        importance = scores.importance(diagonal=False).sel(layer=one.layer, head=one.head).mean("example")
        assert float(importance.sel(key=20)) > 0.5
        assert float(importance.sel(key=one.position)) < 0.1


@pytest.fixture(scope="module")
def gpt():
    return interp.load_model("tinyworld-gpt", check=False)


def test_the_sink_of_a_gpt2_type_model_leaves_with_the_first_position_embedding(gpt):
    tokens = control_tokens(gpt, 40, 64, "repeated")
    before = sink_scores(gpt, tokens)
    heads = before.head_rates().stack(cell=("layer", "head"))
    heads = heads[heads > 0.3]["cell"].values
    assert len(heads) >= 3

    def mean(scores, key: int) -> float:
        return float(np.mean([scores.values.sel(layer=la, head=h, key=key).mean() for la, h in heads]))

    for to in (1, 2, 4):
        with swap_position_embeddings(gpt, 0, to):
            after = sink_scores(gpt, tokens)
        assert float(after.rates().sel(key=0)) < 0.1 * float(before.rates().sel(key=0))
        assert mean(after, 0) < 0.3 * mean(before, 0)
        assert mean(after, to) > 1.5 * mean(before, to)  # it reappears there, weaker the further it went


def test_zeroing_the_largest_activations_removes_the_sink_and_their_means_do_not(gpt):
    tokens, other = (control_tokens(gpt, 40, 64, "repeated", seed=seed) for seed in (0, 1))
    name = hook_name("resid_post", 1)
    order = capture(gpt, tokens, name, positions=0)[name].abs().mean(0).argsort(descending=True).tolist()

    def rate() -> float:
        return float(sink_scores(gpt, tokens, keys=[0]).rates().sel(key=0))

    before, large = rate(), order[:8]
    with set_activations(gpt, 1, large):
        zero = rate()
    with set_activations(gpt, 1, large, activation_means(gpt, other, 1, large)):
        mean = rate()
    with set_activations(gpt, 1, order[60:68]):
        control = rate()
    assert zero < 0.6 * before
    assert abs(mean - before) < 0.03
    assert abs(control - before) < 0.03


def test_redirected_attention_is_where_it_was_sent():
    bridge, tokens, name = tiny_bridge("llama"), tiny_tokens(2, 9), hook_name("pattern", 0)
    before = capture(bridge, tokens, name)[name]
    with redirect_attention(bridge, [(0, 1)], key=2, to=4):
        after = capture(bridge, tokens, name)[name]
    expected = before.clone()
    expected[:, 1, 4:, 4] += before[:, 1, 4:, 2]
    expected[:, 1, 4:, 2] = 0
    assert torch.allclose(after, expected)
    with redirect_attention(bridge, [(0, 1)], key=2, to="nowhere"):
        after = capture(bridge, tokens, name)[name]
    assert torch.allclose(after[:, 1].sum(-1), 1 - torch.cat([torch.zeros(2, 3), before[:, 1, 3:, 2]], 1), atol=1e-6)
    assert torch.equal(after[:, 1, 2], before[:, 1, 2])  # the position's own row
    with redirect_attention(bridge, [(0, 1)], key=2):
        after = capture(bridge, tokens, name)[name]
    rest = before[:, 1, 3:].clone()
    rest[..., 2] = 0
    assert torch.allclose(after[:, 1, 3:], rest / rest.sum(-1, keepdim=True), atol=1e-6)
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])


def test_a_row_with_nothing_else_keeps_its_mass():
    bridge, tokens, name = tiny_bridge("llama"), tiny_tokens(1, 9), hook_name("pattern", 0)
    all_on_first = torch.zeros(1, 4, 9, 9)
    all_on_first[..., 0] = 1
    with interp.hooks.interventions(bridge, {name: lambda _old: all_on_first}), redirect_attention(bridge, [(0, 1)]):
        assert torch.equal(capture(bridge, tokens, name)[name], all_on_first)


@pytest.mark.parametrize("family", FAMILIES)
def test_cut_heads_write_nothing_or_the_value_of_one_position(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 9)
    z, v = hook_name("z", 1), hook_name("v", 1)
    with cut_heads(bridge, [(1, 0), (1, 3)]):
        found = capture(bridge, tokens, [z])
    assert (found[z][:, :, [0, 3]] == 0).all()
    assert (found[z][:, :, 1] != 0).any()
    with cut_heads(bridge, [(1, 2)], to=0):
        found = capture(bridge, tokens, [z, v])
    value = found[v][:, 0, 2 // (4 // found[v].shape[2])]
    assert torch.allclose(found[z][:, :, 2], value[:, None].expand(-1, 9, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("enter", "message"),
    [
        (lambda b: swap_position_embeddings(b, 0, 1), "adds no position embeddings.*rotary.*redirect_attention"),
        (lambda b: set_activations(b, 9, [0]), "layer=9 is not a layer"),
        (lambda b: set_activations(b, 0, [32]), r"channels=\[32\].*0 to 31"),
        (lambda b: set_activations(b, 0, [1, 2], [0.0]), "1 values for 2 channels"),
        (lambda b: redirect_attention(b, [(0, 0)], to=0), "to=0 with key=0"),
        (lambda b: redirect_attention(b, []), "no heads"),
        (lambda b: cut_heads(b, [(3, 0)]), r"no head \(3, 0\)"),
        (lambda b: cut_heads(b, [(0, 0)], to=-1), "to=-1 is not a position"),
    ],
)
def test_errors_come_before_the_forward(enter, message: str):
    with pytest.raises(ValueError, match=message):
        enter(tiny_bridge("llama")).__enter__()


def test_errors_about_the_sequence():
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(1, 6)
    with (
        pytest.raises(ValueError, match="positions 0 and 40 in a sequence of 6"),
        swap_position_embeddings(bridge, 0, 40),
    ):
        bridge(tokens)
    with pytest.raises(ValueError, match="position=7 in a sequence of 6"), set_activations(bridge, 0, [1], position=7):
        bridge(tokens)
    with pytest.raises(ValueError, match="to=9 in a sequence of 6"), redirect_attention(bridge, [(0, 0)], to=9):
        bridge(tokens)
    with pytest.raises(ValueError, match="cannot be replaced"):
        redirect_attention(tiny_bridge("gptj"), [(0, 0)]).__enter__()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("position", [0, "top"])
def test_a_position_is_not_set_in_a_part_of_a_sequence(family: str, position):
    """A forward that goes on from a cache begins at a later token, which is not position 0 of the sequence."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 9)
    cache = prefix_cache(bridge, tokens[:, :5])
    with set_activations(bridge, 0, [1, 2], 3.0, position=position):
        bridge(tokens)
        with pytest.raises(ValueError, match="a forward of 4 queries over 9 keys.*without a key-value cache"):
            run_suffix(bridge, tokens[:, 5:], cache)
