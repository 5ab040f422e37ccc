"""Backward rules: the forward never moves, every rule does what its formula says, and nothing is covered silently."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformer_lens import TransformerBridge
from transformers import MixtralConfig, MixtralForCausalLM

import interp
from interp import hooks
from interp.patching import PRESETS, Rules, UnsupportedModule, backward_rules, rule_coverage
from interp.patching._parts import COEFFICIENTS
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens
from tests.patching import reference_rules

DELEGATED = ("gpt_neo", "gptj", "opt")
ACTIVE: tuple[Any, ...] = tuple(preset for preset in PRESETS if preset != "gradient")


def supported(family: str, preset: Any) -> bool:
    return not (family in DELEGATED and PRESETS[preset].attention == "temperature")


def input_gradient(bridge: Any, tokens: torch.Tensor, rules: Any) -> torch.Tensor:
    """Gradient of a logit difference at the stream that enters block 0."""
    leaf: list[torch.Tensor] = []

    def start(stream: torch.Tensor, *, hook: Any) -> torch.Tensor:
        leaf.append(stream.detach().requires_grad_())
        return leaf[0]

    with backward_rules(bridge, rules):
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_pre", start)])
    return torch.autograd.grad((logits[:, -1, 3] - logits[:, -1, 7]).sum(), leaf[0])[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_the_forward_is_unchanged_to_the_bit(family: Any, dtype: torch.dtype) -> None:
    bridge, tokens = tiny_bridge(family, dtype=dtype), tiny_tokens()
    with torch.no_grad():
        plain = bridge(tokens)
    for preset in ACTIVE:
        if supported(family, preset):
            with torch.no_grad(), backward_rules(bridge, preset):
                assert torch.equal(bridge(tokens), plain), preset
            with backward_rules(bridge, preset):
                assert torch.equal(bridge(tokens), plain), preset  # also where a graph is built


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_forward_of_a_processed_model_is_unchanged_and_its_rules_apply(family: str) -> None:
    bridge = interp.load_model(tiny_model(family), tokenizer=tiny_tokenizer(), processed=True, check=False)
    tokens = tiny_tokens()
    with torch.no_grad():
        plain = bridge(tokens)
    for preset in ACTIVE:
        with backward_rules(bridge, preset):
            assert torch.equal(bridge(tokens), plain)
    assert interp.patching.conservation(bridge, tokens, difference).gap().__abs__().max() < 1e-5
    assert not torch.allclose(input_gradient(bridge, tokens, "relp"), input_gradient(bridge, tokens, "gradient"))


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 3] - logits[:, -1, 7]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("rules", [*PRESETS, *(
    Rules(**{name: value})  # each rule alone
    for name, value in [("norm", "LN"), ("activation", "Identity"), ("gate", "Half"), ("gate", "detach"),
                        ("attention", "AH"), ("attention", "temperature"), ("qkv", (0.3, 0.6, 0.8))]
)], ids=str)  # fmt: skip
def test_gradients_agree_with_an_independent_implementation(family: str, rules: Any) -> None:
    model = tiny_model(family, dtype=torch.float64)
    bridge = interp.load_model(model, tokenizer=tiny_tokenizer(), check=False)  # a copy
    tokens = tiny_tokens()
    found = input_gradient(bridge, tokens, rules)
    with torch.no_grad(), hooks.reads(bridge, "blocks.0.hook_resid_pre") as read:
        logits = bridge(tokens)
    stream = read["blocks.0.hook_resid_pre"].detach().requires_grad_()
    model.requires_grad_(False)
    theirs = reference_rules.logits_of(model, stream, PRESETS[rules] if isinstance(rules, str) else rules)
    torch.testing.assert_close(theirs, logits, atol=1e-6, rtol=1e-5)  # transformers computes norms in float32
    expected = torch.autograd.grad(difference(theirs).sum(), stream)[0]
    assert float((found - expected).abs().max()) < 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_rule_is_a_silent_no_op(family: str) -> None:
    bridge, tokens = tiny_bridge(family, dtype=torch.float64), tiny_tokens()
    plain = input_gradient(bridge, tokens, "gradient")
    variants: list[Rules] = [
        Rules(norm="LN"), Rules(activation="Identity"), Rules(attention="AH"), Rules(attention="temperature"),
        Rules(qkv=(0.5, 1, 1)), Rules(qkv=(1, 0.5, 1)), Rules(qkv=(1, 1, 0.5)),
    ]  # fmt: skip
    if family == "llama":
        variants += [Rules(gate="Half"), Rules(gate="detach")]
    gradients = [plain, *(input_gradient(bridge, tokens, rules) for rules in variants)]
    for i, one in enumerate(gradients):
        for other in gradients[:i]:
            assert float((one - other).abs().max()) > 1e-3 * float(plain.abs().max())
    if family == "gpt2":  # there is no product to which these could apply
        assert torch.equal(input_gradient(bridge, tokens, Rules(gate="Half")), plain)


def test_coefficients_are_exact_at_and_near_zero() -> None:
    x = torch.tensor([0.0, 1e-12, -1e-7, 1e-5], dtype=torch.float64)
    for name in ("gelu", "gelu_tanh", "silu", "quick_gelu"):
        assert float((COEFFICIENTS[name](x) - 0.5).abs().max()) < 1e-5, (
            name
        )  # a stabiliser of 1e-6 would give 0, 0, .05
    assert COEFFICIENTS["relu"](x).tolist() == [0, 1, 0, 1]
    grid = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    functional = torch.nn.functional
    for name, function in {
        "gelu": functional.gelu,
        "gelu_tanh": reference_rules.gelu_tanh,
        "silu": functional.silu,
        "relu": functional.relu,
    }.items():
        torch.testing.assert_close(COEFFICIENTS[name](grid) * grid, function(grid), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_classed(family: str) -> None:
    bridge = tiny_bridge(family)
    table = rule_coverage(bridge, "relp_ah")
    modules = " ".join(table.module)
    for layer in range(bridge.cfg.n_layers):
        for part in ("ln1", "ln2", "attn.q", "attn.hook_pattern", "mlp.in", "mlp.out", "mlp.hook_pre"):
            assert f"blocks.{layer}.{part}" in modules
    assert set(table.status) == {"applied", "not applicable"}
    applied = table[table.status == "applied"].groupby("rule").size().to_dict()
    n_layers, gated = bridge.cfg.n_layers, family in ("llama", "gemma2")
    assert applied["LN"] == n_layers * (4 if family == "gemma2" else 2) + 1
    assert applied["AH"] == n_layers
    assert applied["Identity"] == n_layers + (family == "gemma2")  # and the soft cap of the logits
    assert applied.get("Half", 0) == (n_layers if gated else 0)
    assert set(rule_coverage(bridge, "gradient").status) == {"not applicable"}


def test_query_and_key_norms_get_the_rule_where_something_flows_back_to_them() -> None:
    bridge, tokens = tiny_bridge("qwen3", dtype=torch.float64), tiny_tokens()
    table = rule_coverage(bridge, "relp").set_index("module")
    assert table.loc["blocks.0.attn.q_norm", "status"] == "applied"
    frozen = rule_coverage(bridge, "relp_ah").set_index("module")
    assert frozen.loc["blocks.0.attn.q_norm", "status"] == "not applicable"
    assert "nothing flows back" in str(frozen.loc["blocks.0.attn.q_norm", "detail"])
    # and the gradient through them obeys it: with the norm held, scaling a query scales its scores
    gradient: dict[str, dict[str, torch.Tensor]] = {}
    for preset in ("gradient", "relp"):
        with (
            hooks.gradients(bridge, ["blocks.2.attn.hook_q"]) as found,
            hooks.reads(bridge, "blocks.2.attn.hook_q") as q,
        ):
            with backward_rules(bridge, preset):
                start = bridge.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda t, hook: t.requires_grad_())])
            difference(start).sum().backward()
        gradient[preset] = {"product": (found["blocks.2.attn.hook_q"] * q["blocks.2.attn.hook_q"]).sum(-1).detach()}
    # a normalised vector does not change when it is scaled, so its gradient has no part along it; under the rule it has
    assert float(gradient["gradient"]["product"].abs().max()) < 1e-6
    assert float(gradient["relp"]["product"].abs().max()) > 1e-3


def boot(model: Any) -> Any:
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu")
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


class OddRMSNorm(torch.nn.Module):
    """Divides by the mean absolute value."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = like.weight, like.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / x.abs().mean(-1, keepdim=True)


class Squashed(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.tanh(super().forward(input))


def odd_norm() -> Any:
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm = OddRMSNorm(model.model.layers[1].post_attention_layernorm)
    return boot(model)


def odd_linear() -> Any:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.__class__ = Squashed
    return boot(model)


def experts() -> Any:
    config = MixtralConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, num_local_experts=2, max_position_embeddings=64,
    )  # fmt: skip
    return boot(MixtralForCausalLM(config).eval())


def split() -> Any:
    bridge = fresh_bridge("gpt2")
    bridge.set_use_split_qkv_input(True)
    return bridge


@pytest.mark.parametrize(
    ("make", "preset", "message"),
    [
        (odd_norm, "relp", r"blocks\.1\.ln2 .*OddRMSNorm is not the LayerNorm or RMSNorm"),
        (lambda: fresh_bridge("gpt2", activation_function="mish"), "relp", r"blocks\.0\.mlp .*'mish'"),
        (odd_linear, "relp", r"whole model.*not linear"),
        (experts, "relp", r"blocks\.0\.mlp .*(MoE|cannot be read|MixtureOfExperts)"),
        (lambda: fresh_bridge("gptj"), "gim", r"blocks\.0\.attn\.hook_pattern \(temperature\).*cannot be edited"),
        (split, "relp", r"set_use_split_qkv_input\(False\)"),
    ],
)
def test_an_unsupported_module_is_named(make: Any, preset: Any, message: str) -> None:
    bridge = make()
    with pytest.raises(UnsupportedModule, match=message), backward_rules(bridge, preset):
        pass
    assert "unsupported" in set(rule_coverage(bridge, preset).status)
    with backward_rules(bridge, "gradient"):  # needs no rule, so it is never refused
        bridge(tiny_tokens())


def hook_count(bridge: Any) -> int:
    own = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in bridge.hook_points())
    return own + len(bridge.original_model._forward_hooks)


def test_hooks_are_removed_also_after_an_exception() -> None:
    bridge = fresh_bridge("gemma2")
    before = hook_count(bridge)
    with backward_rules(bridge, "gim"):
        assert hook_count(bridge) > before
    assert hook_count(bridge) == before
    with pytest.raises(ZeroDivisionError), backward_rules(bridge, "relp"):
        raise ZeroDivisionError
    assert hook_count(bridge) == before
    with backward_rules(bridge, "relp"):  # not held to be active still
        pass
    assert not any(parameter.requires_grad for parameter in bridge.parameters())


def test_rules_do_not_nest() -> None:
    bridge = tiny_bridge("gpt2")
    with backward_rules(bridge, "relp"):
        inner: Any
        for inner in ("relp", "gim", "gradient"):
            with pytest.raises(RuntimeError, match="active on this bridge already"), backward_rules(bridge, inner):
                pass


def test_a_model_whose_weights_change_is_probed_again() -> None:
    bridge = fresh_bridge("llama")
    with backward_rules(bridge, "relp"):
        pass
    bridge.blocks[0].mlp.original_component.act_fn = torch.nn.Tanh()
    with torch.no_grad():
        next(iter(bridge.original_model.parameters())).add_(0)
    with pytest.raises(UnsupportedModule, match="activations are not silu"), backward_rules(bridge, "relp"):
        pass


def test_wrong_rules_are_refused(unchecked: None) -> None:
    bridge = tiny_bridge("gpt2")
    misspelt: Any = "relp_ha"
    with (
        pytest.raises(ValueError, match="'relp_ha' is unknown; did you mean 'relp_ah'"),
        backward_rules(bridge, misspelt),
    ):
        pass
    with pytest.raises(ValueError, match="norm='detach' is unknown"):
        Rules(norm="detach")
    with pytest.raises(ValueError, match="three factors"):
        Rules(qkv=(1, 1, -1))
    with pytest.raises(ValueError, match="nothing flows back"):
        Rules(attention="AH", qkv=(0.25, 0.25, 0.5))


def test_presets_are_those_of_the_papers() -> None:
    assert PRESETS["gradient"] == Rules()
    assert PRESETS["relp_ah"] == dataclasses.replace(PRESETS["relp"], attention="AH")
    assert PRESETS["relp"] == Rules(norm="LN", activation="Identity", gate="Half")
    assert PRESETS["attnlrp"].qkv == PRESETS["gim"].qkv == (0.25, 0.25, 0.5)
