"""Relevance is conserved where the theory says so, to 1e-9, and dropping any one rule breaks it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from transformer_lens import TransformerBridge

import interp
from interp.patching import PRESETS, Conservation, conservation
from interp.results import load
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens

GATED = ("llama", "gemma2", "qwen2", "qwen3", "mistral", "gemma3")


def difference(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1, 3] - logits[:, -1, 7]


def in_double(module: Any) -> None:
    """Let an RMSNorm compute in float64: transformers' own round to float32, an error of 1e-7 that is theirs."""
    kind = type(module)
    offset = kind.__name__.startswith("Gemma")

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * (1 + self.weight if offset else self.weight)

    module.__class__ = type(f"Double{kind.__name__}", (kind,), {"forward": forward})


def double_bridge(family: str, *, biases: bool = True, **overrides: Any) -> Any:
    model = tiny_model(family, dtype=torch.float64, **overrides)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            in_double(module)
    if not biases:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    bridge = TransformerBridge.boot_transformers(
        "tiny", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu", dtype=torch.float64
    )
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


def gap(found: Conservation) -> float:
    return float(abs(found.gap()).max())


def exact_gap(bridge: Any, rules: Any, *, with_bias: bool = True) -> float:
    """As `Conservation.gap`, in float64: results keep float32."""
    from interp.patching._relevance import relevance
    from interp.patching.rules import backward_rules

    found = relevance(
        bridge, tiny_tokens(3, 9), difference, lambda stack: stack.enter_context(backward_rules(bridge, rules))
    )
    total = found.stream + found.bias if with_bias else found.stream
    return float((total - found.metric).abs().max() / found.metric.abs().max())


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_stream_alone_conserves_in_models_without_biases(family: str) -> None:
    bridge = double_bridge(family, biases=False)
    assert exact_gap(bridge, "relp_ah", with_bias=False) < 1e-9
    assert exact_gap(bridge, "cp_lrp", with_bias=False) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "neox", "qwen2", "phi", "gpt_neo", "gptj", "opt"])
def test_stream_and_biases_conserve_in_models_with_biases(family: str) -> None:
    bridge = double_bridge(family)
    assert exact_gap(bridge, "relp_ah") < 1e-9
    assert exact_gap(bridge, "relp_ah", with_bias=False) > 1e-3  # so the term is needed


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "silu", "relu"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_activation_function_conserves(family: str, activation: str) -> None:
    name = "activation_function" if family == "gpt2" else "hidden_act"
    assert exact_gap(double_bridge(family, **{name: activation}), "relp_ah") < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_any_one_rule_breaks_conservation(family: str) -> None:
    bridge = double_bridge(family, biases=False)
    dropped = ["norm", "activation", "attention", *(["gate"] if family in GATED else [])]
    for name in dropped:
        rules = dataclasses.replace(PRESETS["relp_ah"], **{name: "gradient"})
        assert exact_gap(bridge, rules) > 1e-3, name
    for preset in ("gradient", "relp", "attnlrp", "gim"):  # these do not claim it
        assert exact_gap(bridge, preset) > 1e-3


def test_leaving_one_module_out_breaks_conservation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each norm, MLP, attention and the soft cap of a post-norm model is needed: none is skipped by its name."""
    from interp.patching import _rule_hooks
    from interp.patching.coverage import covered_parts

    bridge = double_bridge("gemma2", biases=False)
    parts = covered_parts(bridge, PRESETS["relp_ah"])
    variants = [
        dataclasses.replace(parts, **{kind: [part for part in getattr(parts, kind) if part is not left_out]})
        for kind in ("norms", "mlps", "attentions")
        for left_out in getattr(parts, kind)
    ]
    variants.append(dataclasses.replace(parts, soft_cap=None))
    assert len(variants) == 13 + 3 + 3 + 1
    attach = _rule_hooks.attach_rules
    for variant in variants:
        monkeypatch.setattr(
            "interp.patching.rules.attach_rules",
            lambda stack, bridge, rules, parts, _v=variant: attach(stack, bridge, rules, _v),
        )
        assert exact_gap(bridge, "relp_ah") > 1e-3


def test_half_precision_conserves_within_its_rounding() -> None:
    for family in FAMILIES:
        found = conservation(tiny_bridge(family, dtype=torch.bfloat16), tiny_tokens(), difference)
        assert gap(found) < 0.05  # bfloat16 keeps 8 bits, and some thirty roundings lie between embedding and logits


def test_the_result(tmp_path: Any) -> None:
    bridge = fresh_bridge("gpt2")
    tokens = tiny_tokens(4, 9)
    found = conservation(bridge, tokens, difference, "relp_ah")
    assert found.values.dims == ("point", "example")
    assert list(found.values.point.values) == [
        "resid_pre 0", "resid_mid 0", "resid_pre 1", "resid_mid 1", "resid_pre 2", "resid_mid 2", "resid_post 2",
    ]  # fmt: skip
    assert float(abs(found.share() - 1).max()) < 1e-5
    assert found.metric.values == pytest.approx(difference(bridge(tokens)).numpy(), rel=1e-5)
    assert found.provenance["rules"]["attention"] == "AH"
    assert found.provenance["cost"] == {"forwards": 1, "backwards": 1}
    again = load(found.save(tmp_path / "conservation.nc"))
    assert isinstance(again, Conservation)
    assert again.values.equals(found.values)
    assert found.plot().layout.title.text == "Relevance of stream and biases (relp_ah)"
    assert list(conservation(tiny_bridge("neox"), tokens, difference).values.site.values) == [
        *["resid_pre"] * 3,
        "resid_post",
    ]
    with pytest.raises(RuntimeError, match="training mode"):
        conservation(bridge.train(), tokens, difference)


def test_relevance_is_per_example() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 9)
    whole = conservation(bridge, tokens, difference)
    one = conservation(bridge, tokens[2:3], difference)
    assert whole.values.values[:, 2] == pytest.approx(one.values.values[:, 0], rel=1e-4, abs=1e-5)


def test_a_metric_of_the_metrics_module() -> None:
    bridge = tiny_bridge("gpt2")
    tokens = tiny_tokens(3, 9)
    prompts = interp.prompts.Prompts(
        tokens, tokens.flip(0).clone().index_fill(1, torch.tensor([0]), 0), tokens[:, 3], tokens[:, 4]
    )
    found = conservation(bridge, prompts.clean, interp.metrics.logit_difference(prompts))
    assert gap(found) < 1e-5
    assert found.metric.attrs["unit"] == "logits"
