"""Partial forwards equal whole ones: from and up to every layer, and from any position on a cached prefix."""

from __future__ import annotations

import pytest
import torch

from interp import hooks
from tests.helpers import D_MODEL, FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

ALL = FAMILIES + MORE_FAMILIES


def streams(bridge, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the residual stream entering each block and leaving the last."""
    last = len(bridge.blocks) - 1
    names = [hooks.hook_name("resid_pre", layer) for layer in range(last + 1)] + [hooks.hook_name("resid_post", last)]
    with torch.no_grad(), hooks.reads(bridge, names) as found:
        logits = bridge(tokens)
    return logits, [found[name] for name in names]


@pytest.mark.parametrize("family", ALL)
def test_run_from_and_run_until_are_exact(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    logits, resid = streams(bridge, tokens)
    with torch.no_grad():
        for layer in range(len(bridge.blocks)):
            assert torch.equal(hooks.run_from(bridge, resid[layer], layer), logits)
            assert torch.equal(hooks.run_until(bridge, tokens, layer), resid[layer])
        assert torch.equal(hooks.run_until(bridge, tokens, len(bridge.blocks)), resid[-1])


@pytest.mark.parametrize("family", ALL)
def test_blocks_below_do_not_run_and_blocks_above_do_not_run(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    _, resid = streams(bridge, tokens)
    ran: list[int] = []
    handles = [
        block.original_component.register_forward_pre_hook(lambda *args, _layer=layer: ran.append(_layer))
        for layer, block in enumerate(bridge.blocks)
    ]
    try:
        with torch.no_grad():
            hooks.run_from(bridge, resid[2], 2)
            assert ran == list(range(2, len(bridge.blocks)))
            ran.clear()
            hooks.run_until(bridge, tokens, 1)
            assert ran == [0]
    finally:
        for handle in handles:
            handle.remove()


def test_nothing_is_computed_after_the_last_block_when_it_is_the_end() -> None:
    bridge = tiny_bridge("llama")
    with torch.no_grad(), hooks.reads(bridge, ["blocks.2.hook_resid_post", "ln_final.hook_out"]) as found:
        hooks.run_until(bridge, tiny_tokens(), 3)
    assert list(found) == ["blocks.2.hook_resid_post"]


@pytest.mark.parametrize("family", ALL)
def test_suffix_on_a_cached_prefix_equals_the_whole_forward(family: str) -> None:
    """Every starting layer, positions before, in and after a sliding window of 16, rows in any order."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 24)
    logits, resid = streams(bridge, tokens)
    rows = torch.tensor([2, 0, 0, 1])
    cache = hooks.prefix_cache(bridge, tokens)
    with torch.no_grad():
        for position in (1, 2, 15, 16, 17, 23):
            part = hooks.run_suffix(bridge, tokens[rows][:, position:], cache.crop(position), rows=rows)
            torch.testing.assert_close(part, logits[rows][:, position:], atol=1e-5, rtol=0)
            for layer in range(len(bridge.blocks)):
                entering = resid[layer][rows][:, position:]
                part = hooks.run_suffix(bridge, entering, cache.crop(position), rows=rows, start_layer=layer)
                torch.testing.assert_close(part, logits[rows][:, position:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_suffix_equals_the_patched_whole(family: str) -> None:
    """The patching engine's use: each row with its own patch at (layer, position), all on one prefix."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 20)
    _, resid = streams(bridge, tokens)
    layer, position, rows = 1, 17, torch.tensor([0, 1, 1, 0, 1])
    patches = torch.randn(len(rows), D_MODEL, generator=torch.Generator().manual_seed(4))

    def patch(where: int):
        def edit(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            tensor[:, where] = patches
            return tensor

        return edit

    cache = hooks.prefix_cache(bridge, tokens)
    with torch.no_grad():
        for site in ("resid_pre", "attn_out", "mlp_out"):
            name = hooks.hook_name(site, layer)
            with hooks.interventions(bridge, {name: patch(position)}):
                whole = bridge(tokens[rows])
            with hooks.interventions(bridge, {name: patch(0)}):
                part = hooks.run_suffix(
                    bridge, resid[layer][rows][:, position:], cache.crop(position), rows=rows, start_layer=layer
                )
            torch.testing.assert_close(part, whole[:, position:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_cache_is_not_used_up(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 20)
    cache = hooks.prefix_cache(bridge, tokens)
    kept = [(layer.keys.clone(), layer.values.clone(), layer.get_seq_length()) for layer in cache.layers]
    with torch.no_grad():
        first = hooks.run_suffix(bridge, tokens[:, 18:], cache.crop(18))
        again = hooks.run_suffix(bridge, tokens[:, 18:], cache.crop(18))
    assert torch.equal(first, again)
    assert (cache.batch, cache.n_tokens) == (2, 20)
    for layer, (keys, values, length) in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values) and layer.get_seq_length() == length


def test_one_cached_example_serves_any_number_of_rows() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(1, 9)
    cache = hooks.prefix_cache(bridge, tokens).crop(6)
    suffix = torch.randint(3, 60, (5, 3), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = bridge(torch.cat([tokens[:, :6].expand(5, -1), suffix], 1))[:, 6:]
        torch.testing.assert_close(hooks.run_suffix(bridge, suffix, cache), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ALL)
def test_only_the_wanted_positions_are_unembedded(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    logits, resid = streams(bridge, tokens)
    index = torch.tensor([3, 8])
    with torch.no_grad():
        part = hooks.run_from(bridge, resid[1], 1, logits_to_keep=index)
    torch.testing.assert_close(part, logits[:, index], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ALL)
def test_prefix_reuse_is_probed(family: str) -> None:
    assert hooks.supports_prefix_reuse(tiny_bridge(family))


def test_a_model_whose_prefix_cannot_be_reused_is_found_out() -> None:
    bridge = fresh_bridge("llama")
    attention = bridge.blocks[1].attn
    object.__setattr__(attention, "_update_kv_cache", lambda k, v, **kwargs: (k, v))  # a family that ignores the cache
    assert not hooks.supports_prefix_reuse(bridge)
    with pytest.raises(NotImplementedError, match="prefix reuse needs keys and values of every layer"):
        hooks.prefix_cache(bridge, tiny_tokens())


def test_a_rotation_at_the_wrong_position_is_found_out() -> None:
    """Mutation: a cache that claims to be shorter than it is puts the suffix at the wrong positions."""
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(1, 8)
    cache = hooks.prefix_cache(bridge, tokens).crop(6)
    wrong = hooks.PrefixCache(cache.layers, cache.template, 1, 6)
    with torch.no_grad():
        right = hooks.run_suffix(bridge, tokens[:, 6:], wrong)
        moved = bridge(tokens[:, 6:], past_key_values=cache.past_key_values(), position_ids=torch.tensor([[0, 1]]))
    assert (right - moved).abs().max() > 1e-2


def test_skipping_nests_and_is_undone() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    logits, resid = streams(bridge, tokens)
    with torch.no_grad():
        with hooks.skip_below(bridge, 2):
            with pytest.raises(ZeroDivisionError), hooks.skip_below(bridge, 1):
                _ = 1 / 0
            assert torch.equal(bridge(resid[2], start_at_layer=2), logits)
        assert torch.equal(bridge(tokens), logits)
    assert all("forward" not in block.__dict__ for block in bridge.blocks)


def test_layers_and_arguments_out_of_range_are_refused() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(2, 9)
    resid = torch.zeros(2, 9, D_MODEL)
    cache = hooks.prefix_cache(bridge, tokens)
    with pytest.raises(ValueError, match="layer=3 is not a block of this model; expected 0 to 2"):
        hooks.run_from(bridge, resid, 3)
    with pytest.raises(ValueError, match="layer=-1 is not a block"):
        hooks.run_from(bridge, resid, -1)
    with pytest.raises(ValueError, match="layer=4 is not a layer of this model; expected 0 to 3"):
        hooks.run_until(bridge, tokens, 4)
    with pytest.raises(ValueError, match="n_tokens=10; this cache holds 9"):
        cache.crop(10)
    with pytest.raises(ValueError, match="start_layer=1 needs the residual stream"):
        hooks.run_suffix(bridge, tokens[:, 5:], cache.crop(5), start_layer=1)
    with pytest.raises(ValueError, match="suffix has 3 rows and the cache 2; pass rows="):
        hooks.run_suffix(bridge, tiny_tokens(3, 4), cache.crop(5))
