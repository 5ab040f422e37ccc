"""Channels: the partition of the score, a planted channel among random ones, and what an intervention removes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.attention import (
    channel,
    channel_activations,
    channel_intervention,
    channels,
    composition_scores,
)
from interp.attention._spherical import direction_tail
from interp.attention._weights import head_weights
from interp.hooks import hook_name, interventions, reads
from tests.attention.test_composition import change_basis
from tests.helpers import FAMILIES, MORE_FAMILIES, N_HEADS, fresh_bridge, tiny_bridge, tiny_tokens

MODES: Any = ("Q", "K", "V")


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gptj"])
@pytest.mark.parametrize("mode", MODES)
def test_squares_of_components_sum_to_the_square_of_the_whole(family: str, mode: Any) -> None:
    bridge = tiny_bridge(family)
    for norms in (False, True):
        found, whole = channels(bridge, mode, norms=norms), composition_scores(bridge, mode, norms=norms)
        total = found.values.sum("component", skipna=False)
        np.testing.assert_allclose(total, whole.values**2, atol=1e-6)
        np.testing.assert_allclose(found.total(), whole.values, atol=1e-6)


def test_components_are_those_of_the_svd_and_do_not_depend_on_the_basis() -> None:
    bridge = fresh_bridge("llama")
    weights = head_weights(bridge)
    product = weights.W_V[1, 3] @ weights.W_O[1, 3]
    singular = torch.linalg.svdvals(product)
    found = channels(bridge, "Q")
    d_head = weights.W_V.shape[-1]
    np.testing.assert_allclose(found.singular_values[1, 3], singular[:d_head], atol=1e-5)
    parts = [channel(bridge, 1, 3, i) for i in range(d_head)]
    rebuilt = sum(one.size * torch.outer(one.read, one.write) for one in parts)
    torch.testing.assert_close(rebuilt, product, atol=1e-6, rtol=0)
    own = found.own.sel(early_layer=1, early_head=3, late_layer=2, late_head=0)
    matrix = weights.W_Q[2, 0] @ weights.W_K[2, 0].T
    expected = [float((one.write @ matrix).norm() ** 2 / matrix.norm() ** 2) for one in parts]
    np.testing.assert_allclose(own, expected, atol=1e-6)
    change_basis(bridge)
    np.testing.assert_allclose(channels(bridge, "Q").values, found.values, atol=1e-5)
    np.testing.assert_allclose(channels(bridge, "Q").p_value, found.p_value, atol=1e-4)


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.15, 0.05], [0.25] * 4, [1.0]])
def test_the_null_is_that_of_random_directions(weights: list[float]) -> None:
    rng = np.random.default_rng(0)
    d_model = 24
    g = rng.normal(size=(400_000, d_model)) ** 2
    drawn = (g[:, : len(weights)] @ np.array(weights)) / g.sum(1)
    at = np.quantile(drawn, [0.05, 0.3, 0.5, 0.9, 0.99, 0.999])
    expected = [(drawn >= value).mean() for value in at]
    ours = direction_tail(at, np.array(weights), d_model)
    # the saddlepoint of a one-dimensional reader is its worst case
    np.testing.assert_allclose(ours, expected, rtol=0.12 if len(weights) > 1 else 0.25, atol=0.02)
    far = direction_tail(
        np.array([0.2 * max(weights), 0.9 * max(weights), 1.1 * max(weights), np.nan]), np.array(weights), d_model
    )
    assert far[0] > far[1] >= 0
    assert far[2] == 0
    assert np.isnan(far[3])


def random_model(seed: int) -> Any:
    """Heads that know nothing of each other."""
    bridge = fresh_bridge("gpt2", n_embd=96, n_head=12, n_layer=2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in bridge.blocks:
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                weight = getattr(block.attn, name)
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return bridge


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_channel_is_found_from_weights_and_random_heads_are_not(seed: int) -> None:
    bridge = random_model(seed)
    assert not channels(bridge, "Q").table()["found"].any()
    early, late, generator = seed % 12, (5 * seed + 3) % 12, torch.Generator().manual_seed(100 + seed)
    direction = torch.randn(96, generator=generator)
    direction /= direction.norm()
    writer, reader = bridge.blocks[0].attn, bridge.blocks[1].attn
    with torch.no_grad():  # one direction more in what the one writes and the other's query reads
        writer.W_O[early].add_(torch.outer(torch.randn(8, generator=generator), 12.0 * direction))
        reader.W_Q[late].add_(torch.outer(15.0 * direction, torch.randn(8, generator=generator)))
    table = channels(bridge, "Q").table()
    assert set(map(tuple, table.loc[table["found"], ["early", "late"]].values)) == {(f"L0H{early}", f"L1H{late}")}
    pairs = channels(bridge, "Q").pairs()
    assert (pairs["early"][0], pairs["late"][0]) == (f"L0H{early}", f"L1H{late}")
    best = channel(bridge, 0, early, int(pairs["component"].tolist()[0]))
    assert abs(float(best.write @ direction.double())) > 0.7
    # the score of whole matrices says less: the pair stands out by fewer standard deviations
    whole = composition_scores(bridge, "Q").values.sel(early_layer=0, late_layer=1).values
    own = channels(bridge, "Q").own.sel(early_layer=0, late_layer=1).max("component").values

    def outlier(values: np.ndarray) -> float:
        return float((values[early, late] - np.median(values)) / np.delete(values.ravel(), early * 12 + late).std())

    assert outlier(own) > outlier(whole) > 0


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_removing_a_channel_takes_its_direction_out_of_the_head_and_nothing_else(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 8)
    one, name = channel(bridge, 0, 2, 0), hook_name("z", 0)
    out = bridge.blocks[0].attn.W_O[2].double()
    hooks = sum(len(point.fwd_hooks) for point in bridge.hook_points())
    with reads(bridge, name) as before:
        bridge(tokens)
    with channel_intervention(bridge, one), reads(bridge, name) as after:
        logits = bridge(tokens)
    difference = (after[name] - before[name]).double()
    assert float(difference[:, :, [0, 1, 3]].abs().max()) == 0
    written = before[name][:, :, 2].double() @ out
    changed = after[name][:, :, 2].double() @ out
    expected = written - (written @ one.write)[..., None] * one.write
    torch.testing.assert_close(changed, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        channel_activations(bridge, tokens, one).double(), written @ one.write, atol=1e-5, rtol=1e-4
    )
    with channel_intervention(bridge, one, scale=1):
        torch.testing.assert_close(bridge(tokens), bridge(tokens), atol=1e-5, rtol=1e-5)
    assert sum(len(point.fwd_hooks) for point in bridge.hook_points()) == hooks
    assert not torch.allclose(logits, bridge(tokens), atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_removing_all_components_is_removing_the_head(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 8)
    every = [channel(bridge, 1, 3, i) for i in range(8)]

    def cut(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, 3] = 0
        return z

    with interventions(bridge, {hook_name("z", 1): cut}):
        expected = bridge(tokens)
    with channel_intervention(bridge, every):
        torch.testing.assert_close(bridge(tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "qwen2"])
@pytest.mark.parametrize("side", ["q", "k", "v"])
def test_a_reader_alone_sees_what_it_would_if_the_stream_had_changed(family: str, side: Any) -> None:
    """Brute force: the stream entering the layer is edited for everything, and only the reader's input is compared."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 8)
    one, layer = channel(bridge, 0, 1, 0), 2
    n_heads = N_HEADS if side == "q" else bridge.blocks[layer].attn.W_K.shape[0]
    head, target = n_heads - 1, hook_name(side, layer)
    sent = channel_activations(bridge, tokens, one)

    def without(stream: torch.Tensor) -> torch.Tensor:
        return stream - (sent[..., None] * one.write).to(stream.dtype)

    with reads(bridge, target) as before:
        bridge(tokens)
    with interventions(bridge, {hook_name("resid_pre", layer): without}), reads(bridge, target) as changed:
        bridge(tokens)
    with channel_intervention(bridge, one, read_by=(layer, head, side)), reads(bridge, target) as ours:
        bridge(tokens)
    torch.testing.assert_close(ours[target][:, :, head], changed[target][:, :, head], atol=1e-5, rtol=1e-4)
    others = [i for i in range(n_heads) if i != head]
    assert torch.equal(ours[target][:, :, others], before[target][:, :, others])
    assert not torch.allclose(ours[target][:, :, head], before[target][:, :, head], atol=1e-4)


def test_results_are_saved_and_drawn(tmp_path: Any) -> None:
    found = channels(tiny_bridge("llama"), "K", early=[0], late=[2])
    again = type(found).load(found.save(tmp_path / "k.nc"))
    assert again.own.identical(found.own)
    assert found.values.sel(early_layer=1).isnull().all()
    assert len(found.table(components=2)) == N_HEADS * 2 * N_HEADS
    assert found.plot().data
    assert found.plot(late=(2, 1)).data


def test_what_is_refused() -> None:
    bridge = tiny_bridge("gpt2")
    one = channel(bridge, 1, 0, 0)
    with pytest.raises(ValueError, match="take 41,472 bytes|take .* bytes; max_bytes is 10"):
        channels(bridge, "Q", max_bytes=10)
    with pytest.raises(ValueError, match="head=4, component=0: this model has heads 0 to 3"):
        channel(bridge, 0, 4, 0)
    for reader, message in (
        ((1, 0, "q"), r"read_by=\(1, 0, 'q'\) is not above the channel of L1H0"),
        ((2, 9, "q"), "this model has 4 heads of 'q', 0 to 3"),
    ):
        with pytest.raises(ValueError, match=message), channel_intervention(bridge, one, read_by=reader):  # pyright: ignore
            pass
    with pytest.raises(ValueError, match="no channel to intervene on"), channel_intervention(bridge, []):
        pass
    post = tiny_bridge("gemma2")
    with (
        pytest.raises(ValueError, match="normalises the output of attention before it is added"),
        channel_intervention(post, channel(post, 0, 0, 0), read_by=(1, 0, "q")),
    ):
        pass
    with pytest.raises(ValueError, match=r"late=\(0, 0\) has no earlier head"):
        channels(bridge, "Q").plot(late=(0, 0))
