"""Steering: the arithmetic against plain hooks, positions, gates, writing, and the map of neurons through W_out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp.cache import capture
from interp.dictionaries import (
    Knob,
    Probe,
    SteeringVector,
    generate_steered,
    random_directions,
    steer,
    through_w_out,
)
from interp.dictionaries._steering_edits import Mode
from interp.hooks import generate, hook_name, names, reads
from interp.types import Site
from tests.helpers import D_MLP, D_MODEL, FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "v", "neuron")


def logits_of(bridge, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return bridge(tokens)


def vector_at(bridge, hook: str, seed: int = 0) -> SteeringVector:
    shape = capture(bridge, tiny_tokens(1, 4), hook)[hook].shape[2:]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return SteeringVector(values, hook)


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_is_the_sum_and_only_at_its_positions(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 7)
    before = logits_of(bridge, tokens)
    for site in SITES:
        hook = hook_name(site, 1)
        if hook not in names(bridge, hook):
            continue
        vector = vector_at(bridge, hook)
        old = capture(bridge, tokens, hook)[hook]
        with reads(bridge, hook) as bare, steer(bridge, vector, 0.0):
            logits_of(bridge, tokens)
        torch.testing.assert_close(bare[hook], old)
        with steer(bridge, vector, -1.5, positions=[2, 5]), reads(bridge, hook) as found:
            after = logits_of(bridge, tokens)
        if site != "resid_mid":  # read on the MLP's branch, where the stream's edit arrives through attn_out
            expected = old.clone()
            expected[:, [2, 5]] += -1.5 * vector.values
            torch.testing.assert_close(found[hook], expected)
        assert not torch.allclose(after[:, 2], before[:, 2], atol=1e-4), site
        torch.testing.assert_close(after[:, :2], before[:, :2], msg=site)  # causal: nothing before position 2
    torch.testing.assert_close(logits_of(bridge, tokens), before, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["add", "clamp", "ablate"])
def test_one_strength_per_row_is_as_many_runs(mode: Mode) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(1, 6)
    vector = vector_at(bridge, hook_name("z", 1))
    levels = torch.tensor([-2.0, 0.0, 0.3, 4.0])
    with steer(bridge, vector, levels, mode=mode):
        together = logits_of(bridge, tokens.expand(4, -1))
    for level, row in zip(levels.tolist(), together, strict=True):
        with steer(bridge, vector, level, mode=mode):
            torch.testing.assert_close(logits_of(bridge, tokens)[0], row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["resid_post", "neuron", "z"])
def test_clamping_and_ablating_act_on_the_projection_alone(site: Site) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    hook = hook_name(site, 1)
    vector = vector_at(bridge, hook)
    unit = vector.unit().values.flatten()
    old = capture(bridge, tokens, hook)[hook].flatten(2)
    cases: list[tuple[Mode, float, float]] = [("clamp", 3.0, 3.0), ("ablate", 1.0, 0.0), ("clamp", 0.0, 0.0)]
    for mode, strength, wanted in cases:
        with steer(bridge, vector, strength, mode=mode), reads(bridge, hook) as found:
            logits_of(bridge, tokens)
        new = found[hook].flatten(2)
        torch.testing.assert_close(new @ unit, torch.full(new.shape[:2], wanted), atol=1e-5, rtol=0)
        torch.testing.assert_close(new - (new @ unit)[..., None] * unit, old - (old @ unit)[..., None] * unit)
    with steer(bridge, vector, 0.25, mode="ablate"), reads(bridge, hook) as found:
        logits_of(bridge, tokens)
    torch.testing.assert_close(found[hook].flatten(2) @ unit, 0.75 * (old @ unit))
    with steer(bridge, vector, 9.0, keep_norm=True, positions="last"), reads(bridge, hook) as found:
        logits_of(bridge, tokens)
    new = found[hook].flatten(2)
    torch.testing.assert_close(new.norm(dim=-1), old.norm(dim=-1))
    torch.testing.assert_close(new[:, :-1], old[:, :-1], rtol=0, atol=0)
    turned = old[:, -1] + 9.0 * vector.values.flatten()
    torch.testing.assert_close(torch.cosine_similarity(new[:, -1], turned), torch.ones(len(tokens)))


def test_positions_of_whole_texts() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(2, 6)
    hook = hook_name("resid_post", 0)
    vector, old = vector_at(bridge, hook), capture(bridge, tokens, hook)[hook]
    rows = torch.tensor([[True, False, False, True, False, False], [False] * 5 + [True]])
    cases: list[tuple[dict, list[tuple[int, int]]]] = [
        ({"positions": "all"}, [(r, p) for r in range(2) for p in range(6)]),
        ({"positions": "last"}, [(0, 5), (1, 5)]),
        ({"positions": "prompt", "prompt_length": 4}, [(r, p) for r in range(2) for p in range(4)]),
        ({"positions": "generated", "prompt_length": 4}, [(r, p) for r in range(2) for p in (4, 5)]),
        ({"positions": [-1, 0]}, [(r, p) for r in range(2) for p in (0, 5)]),
        ({"positions": rows}, [(0, 0), (0, 3), (1, 5)]),
        ({"positions": rows[0]}, [(r, p) for r in range(2) for p in (0, 3)]),
    ]
    for options, cells in cases:
        with steer(bridge, vector, 2.0, **options), reads(bridge, hook) as found:
            logits_of(bridge, tokens)
        expected = old.clone()
        for row, position in cells:
            expected[row, position] += 2.0 * vector.values
        torch.testing.assert_close(found[hook], expected, msg=str(options))
    short = steer(bridge, vector, positions="prompt", prompt_length=5)
    with pytest.raises(ValueError, match="4 positions with prompt_length=5"), short:
        logits_of(bridge, tokens[:, :4])
    torch.testing.assert_close(capture(bridge, tokens, hook)[hook], old, rtol=0, atol=0)  # also after an exception


@pytest.mark.parametrize("family", (*FAMILIES, "gemma3", "phi"))
def test_neurons_steered_directly_and_through_w_out_give_equal_logits(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 6)
    vector = vector_at(bridge, hook_name("neuron", 1))
    mapped = through_w_out(bridge, vector)
    post_norm = family in ("gemma2", "gemma3")
    assert mapped.hook == ("blocks.1.mlp.hook_out" if post_norm else "blocks.1.hook_mlp_out")
    base = logits_of(bridge, tokens)
    for strength in (0.2, -1.0, 5.0):
        with steer(bridge, vector, strength):
            direct = logits_of(bridge, tokens)
        with steer(bridge, mapped, strength):
            through = logits_of(bridge, tokens)
        assert float((direct - through).abs().max()) < 1e-5 * max(1.0, float(direct.abs().max()))
        assert float((direct - base).abs().max()) > 1e-2
    if post_norm:  # after the norm no vector does the same: this is why it is put before
        behind = SteeringVector(mapped.values, hook_name("mlp_out", 1))
        with steer(bridge, behind, 5.0):
            assert float((logits_of(bridge, tokens) - direct).abs().max()) > 0.05


def test_a_gate_decides_per_token_or_per_row() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(3, 8)
    hook = hook_name("resid_post", 0)
    vector, old = vector_at(bridge, hook), capture(bridge, tokens, hook)[hook]
    weight = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(5))
    probe = Probe(weight, 0.1, hook, 1.0, 1.0, 0.1)
    says_yes = (old @ weight + 0.1) > 0
    assert 0 < int(says_yes.sum()) < says_yes.numel()
    with steer(bridge, vector, 2.0, gate=probe), reads(bridge, hook) as found:
        logits_of(bridge, tokens)
    torch.testing.assert_close(found[hook], old + 2.0 * says_yes[..., None] * vector.values)
    with steer(bridge, vector, 2.0, gate=torch.tensor([0.0, 1.0, 0.5])), reads(bridge, hook) as found:
        logits_of(bridge, tokens)
    torch.testing.assert_close(found[hook], old + torch.tensor([0.0, 2.0, 1.0])[:, None, None] * vector.values)
    with pytest.raises(ValueError, match="one weight per token"), steer(bridge, vector, gate=lambda tensor: tensor):
        logits_of(bridge, tokens)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_written_text_is_that_of_whole_forwards(family: str) -> None:
    bridge, tokens, n_new = tiny_bridge(family), tiny_tokens(2, 5), 4
    vector = vector_at(bridge, hook_name("resid_post", 1))
    levels = [0.0, 1.0, -3.0]
    seen = []
    for positions in ("all", "prompt", "generated", "last"):
        written = generate_steered(bridge, tokens, n_new, vector, levels, positions=positions)
        assert written.shape == (3, 2, 5 + n_new)
        seen.append(written[1:])
        for level, rows in zip(levels, written, strict=True):
            for end in range(5, 5 + n_new):
                part = rows[:, :end]
                where = torch.ones(end, dtype=torch.bool)
                if positions == "prompt":
                    where[5:] = False
                elif positions != "all":
                    where[: 5 if positions == "generated" else 4] = False
                with steer(bridge, vector, level, positions=where):
                    assert torch.equal(logits_of(bridge, part)[:, -1].argmax(-1), rows[:, end])
    assert not torch.equal(seen[0], seen[2])  # else the positions were not told apart
    unsteered = generate(bridge, tokens, n_new)
    assert torch.equal(generate_steered(bridge, tokens, n_new, vector, 0.0)[0], unsteered)
    gated = generate_steered(bridge, tokens, n_new, vector, [-3.0], gate=torch.tensor([0.0, 1.0]))[0]
    assert torch.equal(gated[0], unsteered[0])
    assert torch.equal(gated[1], generate_steered(bridge, tokens, n_new, vector, -3.0)[0, 1])


def test_writing_costs_one_forward_per_token_for_all_strengths() -> None:
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(2, 5)
    vector = vector_at(bridge, hook_name("resid_post", 1))
    generate_steered(bridge, tokens, 2, vector)  # what is probed once
    calls: list[tuple[int, ...]] = []
    handle = bridge.register_forward_pre_hook(lambda _module, args: calls.append(tuple(args[0].shape)))
    generate_steered(bridge, tokens, 5, vector, [0.5, 1.0, 2.0])
    handle.remove()
    assert calls == [(6, 5), (6, 1), (6, 1), (6, 1), (6, 1)]


def test_a_knob_is_set_to_what_it_was_calibrated_on() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6)
    hook = hook_name("resid_post", 1)
    vector = vector_at(bridge, hook)
    unit = vector.unit().values
    rows = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(1))
    rows -= (rows @ unit)[:, None] * unit
    low, high = rows - 2 * unit, rows + 6 * unit + 0.01 * rows[:, :1] * unit
    knob = Knob.calibrate(vector, {"context": low, "memory": high})
    assert knob.settings["context"] == pytest.approx(-2, abs=1e-4) and knob.separation == 1.0
    old = capture(bridge, tokens, hook)[hook]
    with knob.turn(bridge, "memory"), reads(bridge, hook) as found:
        logits_of(bridge, tokens)
    expected = torch.full((4,), float((high @ unit).mean()))
    torch.testing.assert_close(found[hook][:, -1] @ unit, expected)
    torch.testing.assert_close(found[hook][:, :-1], old[:, :-1], rtol=0, atol=0)
    with knob.turn(bridge, -7.5, positions="all"), reads(bridge, hook) as found:
        logits_of(bridge, tokens)
    torch.testing.assert_close(found[hook] @ unit, torch.full((4, 6), -7.5))
    with (
        pytest.raises(ValueError, match="no setting 'prior'; the knob has 'context', 'memory'"),
        knob.turn(bridge, "prior"),
    ):
        raise AssertionError("the context was entered")
    with pytest.raises(ValueError, match="between two conditions"):
        Knob.calibrate(vector, {"a": low})


def test_half_precision_keeps_its_type() -> None:
    bridge, tokens = fresh_bridge("llama", dtype=torch.bfloat16), tiny_tokens()
    hook = hook_name("resid_post", 1)
    vector = random_directions(1, like=vector_at(bridge, hook))[0]
    with steer(bridge, vector, 0.5, mode="clamp"), reads(bridge, hook) as found:
        assert logits_of(bridge, tokens).dtype == torch.bfloat16
    assert found[hook].dtype == torch.bfloat16


def test_what_cannot_be_steered_is_said_before_any_forward(unchecked: None) -> None:
    bridge = tiny_bridge("gpt2")
    vector = vector_at(bridge, hook_name("resid_post", 1))

    def entering(**options) -> None:
        given = {"vector": vector, **options}
        with steer(bridge, given.pop("vector"), **given):
            raise AssertionError("the context was entered")

    with pytest.raises(ValueError, match=r"has shape \(32,\), but 'blocks.1.mlp.hook_post' holds \(48,\)"):
        entering(vector=SteeringVector(torch.ones(D_MODEL), hook_name("neuron", 1)))
    with pytest.raises(ValueError, match="query, key"):
        entering(vector=SteeringVector(torch.ones(4), hook_name("pattern", 1)))
    with pytest.raises(KeyError, match="numbered 0 to 2"):
        entering(vector=SteeringVector(torch.ones(D_MODEL), hook_name("resid_post", 3)))
    with pytest.raises(ValueError, match="mode='set'; expected 'add', 'clamp'"):
        entering(mode="set")
    with pytest.raises(ValueError, match="need the number of prompt tokens"):
        entering(positions="generated")
    with pytest.raises(ValueError, match="prompt_length=3"):
        entering(positions="all", prompt_length=3)
    with pytest.raises(ValueError, match="positions is empty"):
        entering(positions=[])
    with pytest.raises(ValueError, match="strengths is empty"):
        generate_steered(bridge, tiny_tokens(), 2, vector, [])
    with pytest.raises(ValueError, match=r"2 strengths for 3 rows"), steer(bridge, vector, torch.ones(2)):
        logits_of(bridge, tiny_tokens(3))
    with pytest.raises(ValueError, match=r"positions \[9\] do not exist"), steer(bridge, vector, positions=[9]):
        logits_of(bridge, tiny_tokens(3, 9))
    with pytest.raises(ValueError, match="only vectors at mlp.hook_post"):
        through_w_out(bridge, vector)
    with pytest.raises(ValueError, match=r"layer 1 has 48 neurons"):
        through_w_out(bridge, SteeringVector(torch.ones(D_MLP - 1), hook_name("neuron", 1)))
    with pytest.raises(ValueError, match="zero everywhere"):
        SteeringVector(torch.zeros(3), "hook")
    with pytest.raises(ValueError, match="finite"):
        SteeringVector(torch.tensor([1.0, float("nan")]), "hook")
