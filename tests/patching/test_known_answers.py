"""Patching on models set by hand, whose answers can be worked out on paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from interp.patching import Effects, activation_patch
from interp.prompts import Prompts


class NoNorm(LlamaRMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


@torch.no_grad()
def blank(d_model: int, d_vocab: int, n_layers: int, n_heads: int, d_mlp: int = 2) -> Any:
    """A transformer without norms, whose weights are zero and whose MLP is relu(gate) * up. One token attends to
    itself."""
    config = LlamaConfig(
        vocab_size=d_vocab,
        hidden_size=d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        head_dim=d_model,
        intermediate_size=d_mlp,
        hidden_act="relu",
        max_position_embeddings=8,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.model.norm = NoNorm(d_model)
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = NoNorm(d_model), NoNorm(d_model)
        layer.self_attn.v_proj.weight.copy_(torch.eye(d_model).repeat(n_heads, 1))  # every head reads the whole stream
    return model


def bridge_of(model: Any) -> Any:
    bridge = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    bridge.eval()
    return bridge


def one_token(clean: int, corrupted: int) -> Prompts:
    return Prompts(*(torch.tensor(t) for t in ([[clean]], [[corrupted]], [0], [1])), name="one token")


def logit(token: int) -> Any:
    return lambda logits: logits[:, -1, token]


def effect(effects: Effects) -> torch.Tensor:
    return torch.tensor(effects.values.values).squeeze(-1)


def micro_model() -> Any:
    """The linear micro-model: in each of two layers two heads multiply the stream by [1, 2] and by [3, 4]."""
    model = blank(d_model=2, d_vocab=2, n_layers=2, n_heads=2)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
        model.lm_head.weight.copy_(torch.eye(2))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.copy_(torch.tensor([[1.0, 0, 3, 0], [0, 2, 0, 4]]))
    return model


@pytest.fixture(scope="module")
def micro() -> Any:
    return bridge_of(micro_model())


def test_the_micro_model_gives_its_hand_worked_outputs(micro: Any) -> None:
    effects = [activation_patch(micro, one_token(0, 1), logit(token), site="resid_pre") for token in (0, 1)]
    assert [e.clean.item() for e in effects] == [25, 49]
    assert [e.corrupted.item() for e in effects] == [-25, -49]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_nodes_of_the_micro_model(micro: Any, direction: Any) -> None:
    """Each layer multiplies by [5, 7]; head 0 adds [1, 2] and head 1 adds [3, 4] times what enters the layer.

    The two runs differ in sign, so exchanging a node moves the output by twice what it carries there.
    """
    sign = 1.0 if direction == "denoise" else -1.0
    expected = {
        "resid_pre": ([[50.0], [50.0]], [[98.0], [98.0]]),
        "resid_mid": ([[50.0], [50.0]], [[98.0], [98.0]]),
        "resid_post": ([[50.0], [50.0]], [[98.0], [98.0]]),
        "attn_out": ([[40.0], [40.0]], [[84.0], [84.0]]),
        "mlp_out": ([[0.0], [0.0]], [[0.0], [0.0]]),
        "z": ([[10.0, 30.0], [10.0, 30.0]], [[28.0, 56.0], [28.0, 56.0]]),
        "v": ([[10.0, 30.0], [10.0, 30.0]], [[28.0, 56.0], [28.0, 56.0]]),
        "q": ([[0.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]),
    }
    for site, answers in expected.items():
        for token, answer in enumerate(answers):
            found = activation_patch(micro, one_token(0, 1), logit(token), site=site, direction=direction)  # type: ignore[arg-type]
            assert torch.allclose(effect(found), sign * torch.tensor(answer), atol=1e-10), site
    zeroed = activation_patch(micro, one_token(0, 1), logit(0), site="z", direction=direction, value="zero")
    assert torch.allclose(effect(zeroed), sign * torch.tensor([[5.0, 15.0], [5.0, 15.0]]))


@pytest.fixture(scope="module")
def gates() -> Any:
    """Heads 0 and 1 hand the inputs a and b on, head 2 an input that nothing reads; neurons make a AND b, a OR b.

    Stream: a, b and the idle input; their copies by the heads (3, 4, 5); the constant 1; the two outputs (7, 8).
    """
    model = blank(d_model=12, d_vocab=4, n_layers=2, n_heads=3, d_mlp=3)
    constant, a, b = 6, 3, 4
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[:, constant] = 1
        embed[0, :3] = 1  # token 0: all inputs on; token 1: all off
        first, second = model.model.layers
        for head in range(3):
            first.self_attn.o_proj.weight[3 + head, head * 12 + head] = 1
        mlp = second.mlp
        mlp.up_proj.weight[:, constant] = 1
        mlp.gate_proj.weight[0, [a, b]], mlp.gate_proj.weight[0, constant] = 1, -1  # neuron 0: relu(a + b - 1), a AND b
        mlp.gate_proj.weight[1, [a, b]] = 1  # neuron 1: relu(a + b); minus neuron 0 it is a OR b
        mlp.gate_proj.weight[2, 5] = 1  # neuron 2: what head 2 hands on, read by nothing
        mlp.down_proj.weight[7, 0] = 1
        mlp.down_proj.weight[8, 1], mlp.down_proj.weight[8, 0] = 1, -1
        model.lm_head.weight[0, 7] = 1
        model.lm_head.weight[1, 8] = 1
    return bridge_of(model)


@pytest.mark.parametrize(
    ("gate", "direction", "found"),
    [
        ("and", "noise", [-1.0, -1.0, 0.0]),  # breaking either input breaks an AND
        ("and", "denoise", [0.0, 0.0, 0.0]),  # restoring one input alone restores nothing
        ("or", "noise", [0.0, 0.0, 0.0]),  # the other input still suffices
        ("or", "denoise", [1.0, 1.0, 0.0]),  # either input suffices
    ],
)
def test_noising_finds_the_inputs_of_and_denoising_those_of_or(
    gates: Any, gate: str, direction: Any, found: list[float]
) -> None:
    metric = logit(["and", "or"].index(gate))
    heads = effect(activation_patch(gates, one_token(0, 1), metric, site="z", direction=direction))
    assert heads.tolist() == [found, [0.0, 0.0, 0.0]]  # the heads of layer 1 do nothing
    inputs = effect(activation_patch(gates, one_token(0, 1), metric, site="v", direction=direction))
    assert inputs.tolist() == [found, [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1.0), ("noise", -1.0)])
def test_the_neurons_of_the_gates(gates: Any, direction: Any, sign: float) -> None:
    for token, expected in ((0, [1.0, 0.0, 0.0]), (1, [-1.0, 2.0, 0.0])):
        found = activation_patch(gates, one_token(0, 1), logit(token), site="neuron", direction=direction)
        assert effect(found).tolist() == [[0.0, 0.0, 0.0], [sign * value for value in expected]]
        subset = activation_patch(
            gates, one_token(0, 1), logit(token), site="neuron", neurons=[2, 1], direction=direction
        )
        assert subset.values.neuron.values.tolist() == [2, 1]
        assert effect(subset).tolist() == [[0.0, 0.0], [0.0, sign * expected[1]]]
