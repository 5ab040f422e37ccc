"""Reads, edits and gradients agree with independent routes through the model; errors come before wrong numbers."""

from __future__ import annotations

import copy

import pytest
import torch

from interp import hooks
from tests.helpers import D_MODEL, D_VOCAB, FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

SEQUENTIAL = ("gpt2", "llama", "gemma2", "qwen2", "qwen3", "mistral", "opt", "gpt_neo", "gemma3")
START = {"blocks.0.hook_resid_pre": lambda tensor: tensor.detach().requires_grad_()}
ROUNDED = ("llama", "gemma2", "qwen2", "qwen3", "mistral", "gemma3", "gpt_neo", "opt")
"""Families that norm or attend in float32 even in a float64 model: finite differences need a larger step there."""
READOUT = torch.randn(D_VOCAB, generator=torch.Generator().manual_seed(5))
DIRECTION = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(6))


def hook_counts(bridge) -> int:
    return sum(
        len(point._forward_hooks) + len(point._backward_hooks) + len(point.fwd_hooks) for point in bridge.hook_points()
    )


def score(bridge, tokens: torch.Tensor) -> torch.Tensor:
    return (bridge(tokens)[:, -1] @ READOUT.to(bridge.W_U.dtype)).sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_reads_are_what_run_with_cache_stores(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        with hooks.reads(bridge, "blocks.*") as found:
            bridge(tokens)
    assert len(found) > 50
    assert all(torch.equal(found[name], cache[name]) for name in found)


def test_reads_name_what_no_forward_reached() -> None:
    bridge = tiny_bridge("gpt2")
    with hooks.reads(bridge, ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]) as found, torch.no_grad():
        hooks.run_until(bridge, tiny_tokens(), 1)
    with pytest.raises(
        KeyError, match=r"no forward .* reached 'blocks.2.attn.hook_z'; there is 'blocks.0.attn.hook_z'"
    ):
        found["blocks.2.attn.hook_z"]


def test_reads_keep_the_graph_unless_told_otherwise() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    name = "blocks.1.hook_resid_post"
    with hooks.interventions(bridge, START), hooks.reads(bridge, name) as found:
        bridge(tokens)
        assert found[name].requires_grad
        with torch.no_grad():
            bridge(tokens)
        assert not found[name].requires_grad


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "neuron"]
)
def test_an_intervention_is_run_with_hooks(family: str, site) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    name = hooks.hook_name(site, 1)
    with torch.no_grad():
        expected = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda tensor, hook: tensor * 0.5)])
        with hooks.interventions(bridge, {name: lambda tensor: tensor * 0.5}, must_change=True):
            assert torch.equal(bridge(tokens), expected)
        assert not torch.allclose(bridge(tokens), expected)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_resid_mid_is_the_stream_for_writes(family: str) -> None:
    """The block's output must be the new stream plus the MLP of the new stream, whatever the attention was."""
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    mid, post, mlp = (hooks.hook_name(site, 1) for site in ("resid_mid", "resid_post", "mlp_out"))
    target = torch.randn(*tokens.shape, D_MODEL, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with hooks.interventions(bridge, {mid: lambda tensor: target}), hooks.reads(bridge, [mid, post, mlp]) as found:
            bridge(tokens)
        torch.testing.assert_close(found[mid], target, atol=1e-6, rtol=0)
        torch.testing.assert_close(found[post], target + found[mlp], atol=1e-5, rtol=0)
        assert torch.equal(_with(bridge, tokens, {mid: lambda tensor: tensor.clone()}), bridge(tokens))  # bit-unchanged
        # the route TransformerLens offers misses the skip path, so the two must differ
        naive = bridge.run_with_hooks(tokens, fwd_hooks=[(mid, lambda tensor, hook: target)])
        assert (naive - _with(bridge, tokens, {mid: lambda tensor: target})).abs().max() > 0.1


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_resid_mid_zero_is_exactly_zero(family: str) -> None:
    """What rounding leaves of a zeroed stream would be blown up by the norm that follows."""
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    mid, post, mlp = (hooks.hook_name(site, 1) for site in ("resid_mid", "resid_post", "mlp_out"))
    with (
        torch.no_grad(),
        hooks.interventions(bridge, {mid: torch.zeros_like}),
        hooks.reads(bridge, [mid, post, mlp]) as found,
    ):
        bridge(tokens)
    assert float(found[mid].abs().max()) == 0
    assert torch.equal(found[post], found[mlp])


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_resid_mid_gradient_is_that_of_the_stream(family: str) -> None:
    smooth = {"activation_function": "gelu"} if family == "opt" else {}  # ReLU has kinks within a step
    bridge, tokens = fresh_bridge(family, dtype=torch.float64, **smooth), tiny_tokens()
    mid = hooks.hook_name("resid_mid", 1)
    direction = DIRECTION.double()

    def moved(step: float) -> torch.Tensor:
        with torch.no_grad(), hooks.interventions(bridge, {mid: lambda tensor: tensor + step * direction}):
            return score(bridge, tokens)

    step = 5e-3 if family in ROUNDED else 1e-5
    expected = float(moved(step) - moved(-step)) / (2 * step)
    with hooks.no_retained_graph(bridge), hooks.gradients(bridge, mid) as found, hooks.interventions(bridge, START):
        score(bridge, tokens).backward()
    assert float((found[mid] @ direction).sum()) == pytest.approx(expected, rel=1e-3)

    leaf = torch.zeros(D_MODEL, dtype=torch.float64, requires_grad=True)  # the edit's own route into the graph
    with hooks.no_retained_graph(bridge), hooks.interventions(bridge, {mid: lambda tensor: tensor + leaf}):
        score(bridge, tokens).backward()
    assert leaf.grad is not None
    assert float(leaf.grad @ direction) == pytest.approx(expected, rel=1e-3)


def test_resid_mid_meets_edits_of_the_same_block() -> None:
    """The stream is what the edited input and the edited attention make it, in whatever order contexts are entered."""
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    pre, attn, mid = (hooks.hook_name(site, 1) for site in ("resid_pre", "attn_out", "resid_mid"))
    with torch.no_grad():
        expected = _with(bridge, tokens, {pre: lambda t: t * 0.5, attn: lambda t: t * 2})
        seen: list[torch.Tensor] = []
        edits = {mid: lambda t: (seen.append(t), t.clone())[1], pre: lambda t: t * 0.5, attn: lambda t: t * 2}
        with hooks.reads(bridge, mid) as found:
            torch.testing.assert_close(_with(bridge, tokens, edits), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(seen[0], found[mid])
        with hooks.interventions(bridge, {mid: lambda t: t.clone()}):  # an inner edit of the block's input comes later
            torch.testing.assert_close(
                _with(bridge, tokens, {pre: lambda t: t * 0.5}), _with(bridge, tokens, {pre: lambda t: t * 0.5})
            )
            inner = _with(bridge, tokens, {pre: lambda t: t * 0.5})
        assert torch.equal(inner, _with(bridge, tokens, {pre: lambda t: t * 0.5}))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_resid_mid_works_in_partial_runs(family: str, layer: int) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 8)
    pre, mid = hooks.hook_name("resid_pre", layer), hooks.hook_name("resid_mid", layer)
    patch = torch.randn(2, D_MODEL, generator=torch.Generator().manual_seed(2))

    def put(where: int):
        def edit(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.clone()
            tensor[:, where] = patch
            return tensor

        return edit

    with torch.no_grad():
        with hooks.reads(bridge, pre) as found:
            bridge(tokens)
        with hooks.interventions(bridge, {mid: put(5)}):
            whole = bridge(tokens)
            assert torch.equal(hooks.run_from(bridge, found[pre], layer), whole)
        cache = hooks.prefix_cache(bridge, tokens).crop(5)
        with hooks.interventions(bridge, {mid: put(0)}):
            part = hooks.run_suffix(bridge, found[pre][:, 5:], cache, start_layer=layer)
    torch.testing.assert_close(part, whole[:, 5:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["neox", "phi", "gptj"])
def test_resid_mid_is_refused_on_parallel_blocks(family: str) -> None:
    bridge = tiny_bridge(family)
    for use in (
        lambda n: hooks.interventions(bridge, {n: torch.zeros_like}),
        lambda n: hooks.reads(bridge, n),
        lambda n: hooks.gradients(bridge, n),
    ):
        with pytest.raises(KeyError, match="use hook_resid_pre or hook_resid_post"), use("blocks.1.hook_resid_mid"):
            pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "site", ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "neuron", "resid_post"]
)
def test_gradients_match_finite_differences(family: str, site) -> None:
    bridge, tokens = tiny_bridge(family, dtype=torch.float64), tiny_tokens(1, 6)
    name = hooks.hook_name(site, 1)
    with torch.no_grad(), hooks.reads(bridge, name) as found:
        bridge(tokens)
    direction = torch.randn(found[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def moved(step: float) -> torch.Tensor:
        with torch.no_grad(), hooks.interventions(bridge, {name: lambda tensor: tensor + step * direction}):
            return score(bridge, tokens)

    with hooks.no_retained_graph(bridge), hooks.gradients(bridge, name) as gradient, hooks.interventions(bridge, START):
        score(bridge, tokens).backward()
    step = 5e-3 if family in ROUNDED else 1e-5
    expected = float(moved(step) - moved(-step)) / (2 * step)
    assert float((gradient[name] * direction).sum()) == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_gradients_say_when_no_backward_pass_came() -> None:
    bridge = tiny_bridge("gpt2")
    with hooks.gradients(bridge, "blocks.0.attn.hook_z") as found, torch.no_grad():
        bridge(tiny_tokens())
    with pytest.raises(
        KeyError, match="no backward pass of a forward inside the context reached 'blocks.0.attn.hook_z'"
    ):
        found["blocks.0.attn.hook_z"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.mul_(2), "in place; return a new tensor"),
        (lambda t: None, "returned NoneType"),
        (lambda t: t[:, :1], r"returned \(2, 1, 32\)"),
        (lambda t: t.double(), "float64"),
    ],
)
def test_bad_edits_are_refused(edit, message: str) -> None:
    bridge = tiny_bridge("gpt2")
    before = hook_counts(bridge)
    with (
        pytest.raises(ValueError, match=message),
        torch.no_grad(),
        hooks.interventions(bridge, {"blocks.1.hook_attn_out": edit}),
    ):
        bridge(tiny_tokens())
    assert hook_counts(bridge) == before


def test_an_edit_through_a_view_is_still_in_place() -> None:
    def sneaky(tensor: torch.Tensor) -> torch.Tensor:
        tensor[:, 0] = 0.0
        return tensor

    with pytest.raises(ValueError, match="in place"), torch.no_grad():
        _with(tiny_bridge("llama"), tiny_tokens(), {"blocks.1.attn.hook_z": sneaky})


def test_an_intervention_that_never_fires_is_an_error() -> None:
    bridge = tiny_bridge("llama")
    resid = torch.zeros(1, 4, D_MODEL)
    edits = {"blocks.0.attn.hook_z": torch.zeros_like, "blocks.2.attn.hook_z": torch.zeros_like}
    silent = r"no forward pass reached 'blocks.0.attn.hook_z': the intervention had no effect"
    with pytest.raises(RuntimeError, match=silent), torch.no_grad(), hooks.interventions(bridge, edits):
        hooks.run_from(bridge, resid, 1)
    with torch.no_grad(), hooks.interventions(bridge, {"blocks.0.attn.hook_z": torch.zeros_like}, must_fire=False):
        hooks.run_from(bridge, resid, 1)


def test_an_intervention_that_changes_nothing_is_an_error_if_asked() -> None:
    bridge = tiny_bridge("llama")
    edits = {"blocks.0.attn.hook_z": lambda t: t.clone(), "blocks.1.attn.hook_z": torch.zeros_like}
    with (
        pytest.raises(RuntimeError, match=r"at 'blocks.0.attn.hook_z' returned their input unchanged"),
        torch.no_grad(),
        hooks.interventions(bridge, edits, must_change=True),
    ):
        bridge(tiny_tokens())


@pytest.mark.parametrize("family", ["gpt_neo", "gptj", "opt"])
def test_patterns_of_delegated_attention_are_refused_before_the_forward(family: str) -> None:
    bridge = tiny_bridge(family)
    name = hooks.hook_name("pattern", 1)
    assert not hooks.editable(bridge, name)
    ran = []
    with pytest.raises(ValueError, match="has no effect"), hooks.interventions(bridge, {name: torch.zeros_like}):
        ran.append(1)
    assert ran == []
    assert hooks.editable(bridge, hooks.hook_name("z", 1))


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma2", "qwen2", "qwen3", "mistral", "phi"])
def test_every_listed_hook_of_a_block_is_editable(family: str) -> None:
    bridge = tiny_bridge(family)
    assert [name for name in hooks.names(bridge, "blocks.1.*") if not hooks.editable(bridge, name)] == []


def test_hooks_that_the_split_inputs_bypass_are_not_editable() -> None:
    bridge = fresh_bridge("llama")
    assert hooks.editable(bridge, "blocks.0.ln1.hook_out")
    bridge.set_use_split_qkv_input(True)
    assert not hooks.editable(bridge, "blocks.0.ln1.hook_out")
    assert hooks.editable(bridge, "blocks.0.hook_q_input")


def test_an_alias_is_edited_once_in_compatibility_mode() -> None:
    """`bridge.hooks` would call the function once per name, doubling twice."""
    bridge, tokens = fresh_bridge("gpt2"), tiny_tokens()
    bridge.enable_compatibility_mode(disable_warnings=True)
    calls = []
    for name in ("blocks.1.hook_attn_out", "blocks.1.attn.hook_out"):
        with (
            torch.no_grad(),
            hooks.reads(bridge, [name, hooks.hook_name("resid_mid", 1), hooks.hook_name("resid_pre", 1)]) as found,
        ):
            _with(bridge, tokens, {name: lambda t: (calls.append(1), t * 2)[1]})
    assert len(calls) == 2
    doubled = found[hooks.hook_name("resid_mid", 1)] - found[hooks.hook_name("resid_pre", 1)]
    torch.testing.assert_close(doubled, 2 * found["blocks.1.attn.hook_out"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", ["reads", "gradients", "interventions"])
def test_hooks_are_gone_after_the_context_and_after_an_exception(context: str) -> None:
    bridge = tiny_bridge("llama")
    before = hook_counts(bridge)
    raw = [len(block.original_component._forward_pre_hooks) for block in bridge.blocks]
    names = ["blocks.1.hook_resid_mid", "blocks.1.attn.hook_z"]
    make = {
        "reads": lambda: hooks.reads(bridge, names),
        "gradients": lambda: hooks.gradients(bridge, names),
        "interventions": lambda: hooks.interventions(bridge, dict.fromkeys(names, torch.zeros_like)),
    }[context]
    with pytest.raises(ZeroDivisionError), make():
        assert hook_counts(bridge) > before
        _ = 1 / 0
    with torch.no_grad(), make():
        bridge(tiny_tokens())
    assert hook_counts(bridge) == before
    assert raw == [len(block.original_component._forward_pre_hooks) for block in bridge.blocks]


def test_contexts_live_with_the_bridges_own_hooks() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    name = "blocks.1.hook_attn_out"
    with torch.no_grad():
        expected = _with(bridge, tokens, {name: torch.zeros_like})
        with hooks.interventions(bridge, {name: torch.zeros_like}):
            logits, _ = bridge.run_with_cache(tokens, names_filter=["blocks.0.attn.hook_z"])
            assert torch.equal(logits, expected)
            bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", lambda tensor, hook: tensor * 2)])
            assert torch.equal(bridge(tokens), expected)
        with hooks.interventions(bridge, {name: torch.zeros_like}, must_fire=False):
            bridge.reset_hooks()
    assert hook_counts(bridge) == 0


@pytest.mark.parametrize("family", ["gpt2", "neox"])
def test_no_retained_graph_lets_go_of_patterns(family: str) -> None:
    bridge, tokens = fresh_bridge(family), tiny_tokens()
    with hooks.interventions(bridge, START):
        score(bridge, tokens).backward()
    assert any(block.attn._pattern is not None and block.attn._pattern.requires_grad for block in bridge.blocks)
    with hooks.no_retained_graph(bridge), hooks.interventions(bridge, START):
        score(bridge, tokens).backward()
    assert all(block.attn._pattern is None for block in bridge.blocks)
    assert torch.equal(copy.deepcopy(bridge)(tokens), bridge(tokens))


def test_gradient_at_the_hook_where_the_graph_starts() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    name = "blocks.0.hook_resid_pre"
    leaves: list[torch.Tensor] = []

    def start(tensor: torch.Tensor) -> torch.Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    with hooks.interventions(bridge, {name: start}), hooks.gradients(bridge, name) as found:
        score(bridge, tokens).backward()
    assert leaves[0].grad is not None
    torch.testing.assert_close(found[name], leaves[0].grad)


def _with(bridge, tokens: torch.Tensor, edits) -> torch.Tensor:
    with hooks.interventions(bridge, edits):
        return bridge(tokens)
