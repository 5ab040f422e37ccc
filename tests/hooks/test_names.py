"""Only hook points that fire are shown, and a wrong name is answered with the right one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from interp import hooks
from interp.types import SITES
from tests.helpers import FAMILIES, MORE_FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokens


@pytest.mark.parametrize("family", FAMILIES + MORE_FAMILIES)
def test_listed_names_fire_and_the_others_do_not(family: str) -> None:
    bridge = tiny_bridge(family)
    fired = set()

    def note(name: str):
        def fn(tensor, hook):
            fired.add(name)

        return fn

    gated = ("hook_result", "hook_q_input", "hook_k_input", "hook_v_input", "hook_attn_in", "hook_mlp_in")
    candidates = [name for name in bridge.hook_dict if not name.endswith(gated)]
    with torch.no_grad():
        bridge.run_with_hooks(tiny_tokens(), fwd_hooks=[(name, note(name)) for name in candidates])
    assert set(hooks.names(bridge)) == fired


def test_names_known_to_be_dead_are_hidden() -> None:
    assert not hooks.names(tiny_bridge("gpt2"), "*.attn.qkv.*")
    assert not hooks.names(tiny_bridge("neox"), "*.hook_rot_*")
    assert hooks.names(tiny_bridge("llama"), "*.hook_rot_q") == [f"blocks.{i}.attn.hook_rot_q" for i in range(N_LAYERS)]
    assert not hooks.names(tiny_bridge("llama"), "*hook_hidden_states")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_has_its_documented_shape(family: str) -> None:
    bridge = tiny_bridge(family)
    sites = [site for site in SITES if not (family == "neox" and site == "resid_mid")]
    with torch.no_grad(), hooks.reads(bridge, [hooks.hook_name(site, 1) for site in sites]) as found:
        bridge(tiny_tokens(2, 9))
    kv = 2 if family in ("llama", "gemma2") else 4
    shapes = {"z": (2, 9, 4, 8), "q": (2, 9, 4, 8), "k": (2, 9, kv, 8), "v": (2, 9, kv, 8), "pattern": (2, 4, 9, 9)}
    shapes["neuron"] = (2, 9, 48)
    for site in sites:
        assert found[hooks.hook_name(site, 1)].shape == shapes.get(site, (2, 9, 32)), site


@pytest.mark.parametrize(
    ("family", "name", "message"),
    [
        ("gpt2", "blocks.0.attn.hook_patern", r"Did you mean 'blocks.0.attn.hook_pattern'"),
        ("gpt2", "blocks.0.attn.hook_patern", r'List them with interp.hooks.names\(bridge, "blocks.0.attn.\*"\)'),
        ("gpt2", "blocks.7.attn.hook_z", "numbered 0 to 2"),
        ("gpt2", "blocks.0.attn.qkv.hook_in", "exists but never fires"),
        ("gpt2", "blocks.0.attn.hook_result", r"call bridge.set_use_attn_result\(True\) first"),
        ("llama", "hook_pos_embed", "exists but never fires"),
        ("neox", "blocks.1.hook_resid_mid", "in parallel here"),
        ("llama", "nonsense", r'interp.hooks.names\(bridge, "\*"\)'),
    ],
)
def test_unknown_names_are_answered(family: str, name: str, message: str) -> None:
    with pytest.raises(KeyError, match=message) as caught:
        hooks.resolve(tiny_bridge(family), name)
    assert "\\'" not in str(caught.value)  # KeyError alone would show the repr of the message
    assert isinstance(caught.value, hooks.UnknownHook)


def test_hook_name_refuses_an_unknown_site() -> None:
    assert hooks.hook_name("z", 3) == "blocks.3.attn.hook_z"
    with pytest.raises(KeyError, match="no site 'w'"):
        hooks.hook_name.__wrapped__("w", 0) if hasattr(hooks.hook_name, "__wrapped__") else hooks.hook_name("w", 0)  # type: ignore[arg-type]


def test_resolve_many_takes_names_globs_lists_and_predicates_in_forward_order() -> None:
    bridge = tiny_bridge("llama")
    z = [f"blocks.{layer}.attn.hook_z" for layer in range(N_LAYERS)]
    assert hooks.resolve_many(bridge, z[1]) == [z[1]]
    assert hooks.resolve_many(bridge, "*.attn.hook_z") == z
    assert hooks.resolve_many(bridge, [z[2], "blocks.0.hook_resid_p*", z[0]]) == [
        "blocks.0.hook_resid_pre", z[0], "blocks.0.hook_resid_post", z[2],
    ]  # fmt: skip
    assert hooks.resolve_many(bridge, lambda name: name.endswith("attn.hook_z")) == z


def test_resolve_many_names_a_hook_point_once_by_its_first_spelling() -> None:
    bridge = tiny_bridge("gpt2")
    assert hooks.resolve_many(bridge, ["blocks.0.hook_attn_out", "blocks.0.attn.hook_out"]) == [
        "blocks.0.hook_attn_out"
    ]


def test_resolve_many_refuses_what_selects_nothing() -> None:
    bridge = tiny_bridge("gpt2")
    with pytest.raises(KeyError, match=r"matches '\*.hook_zz'"):
        hooks.resolve_many(bridge, "*.hook_zz")
    with pytest.raises(KeyError, match="predicate selects none"):
        hooks.resolve_many(bridge, lambda name: False)
    with pytest.raises(KeyError, match="Did you mean"):  # TransformerLens drops an unknown name in a list silently
        hooks.resolve_many(bridge, ["blocks.0.attn.hook_z", "blocks.0.attn.hook_zz"])


def test_layer_of() -> None:
    bridge = tiny_bridge("gpt2")
    expected = {"hook_embed": -1, "pos_embed.hook_out": -1, "blocks.2.hook_resid_post": 2, "blocks.0.attn.hook_z": 0}
    expected |= {"ln_final.hook_scale": N_LAYERS, "unembed.hook_out": N_LAYERS, "hook_unembed": N_LAYERS}
    assert {name: hooks.layer_of(bridge, name) for name in expected} == expected
    assert hooks.layer_of(bridge, "hook_tokens") is None


@pytest.mark.parametrize("family", FAMILIES)
def test_stop_layer_is_the_lowest_that_still_fires(family: str) -> None:
    bridge = tiny_bridge(family)
    chosen = [name for name in hooks.names(bridge) if not name.startswith(("blocks.0.", "blocks.1."))][::3]
    for name in [*chosen, "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"]:
        stop = hooks.stop_layer(bridge, [name])
        if stop is None:
            assert hooks.layer_of(bridge, name) in (N_LAYERS, None)
            continue
        with torch.no_grad(), hooks.reads(bridge, name) as found:
            hooks.run_until(bridge, tiny_tokens(), stop)
        assert name in found
        if stop > 0:
            with torch.no_grad(), hooks.reads(bridge, name) as below:
                hooks.run_until(bridge, tiny_tokens(), stop - 1)
            assert name not in below


def test_flags_and_compatibility_mode_change_what_is_listed() -> None:
    bridge = fresh_bridge("llama")
    gated = "blocks.0.attn.hook_result"
    assert gated not in hooks.names(bridge)
    bridge.set_use_attn_result(True)
    assert gated in hooks.names(bridge)
    assert "blocks.0.attn.o.hook_out" not in hooks.names(bridge)  # dies when results are split by head
    bridge.set_use_attn_result(False)
    assert gated not in hooks.names(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert hooks.resolve(bridge, "blocks.0.hook_attn_out") == "blocks.0.hook_attn_out"


def test_the_probe_disturbs_nothing() -> None:
    bridge = fresh_bridge("gpt2")
    seen: list[tuple[int, ...]] = []
    bridge.add_hook("blocks.0.hook_resid_pre", lambda tensor, hook: seen.append(tuple(tensor.shape)))
    state = torch.random.get_rng_state()
    bridge.train()
    hooks.names(bridge)  # in training mode dropout draws random numbers
    assert torch.equal(state, torch.random.get_rng_state())
    assert bridge.training and seen == []  # the user's hook did not see the probe
    bridge.eval()
    bridge(tiny_tokens(2, 5))
    assert seen == [(2, 5, 32)]  # and still sees what is run


def test_what_is_known_about_a_bridge_goes_with_it() -> None:
    bridge = fresh_bridge("neox")
    hooks.names(bridge)
    assert hooks.supports_prefix_reuse(bridge)
    gone = weakref.ref(bridge)
    del bridge
    gc.collect()
    assert gone() is None
