"""Rank-one edits: what they must do to the MLP's output, what they cost elsewhere, and that weights come back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import metrics
from interp.models import provenance
from interp.models.identity import Source, fingerprint
from interp.patching import RankOneEdits, edited_weights, fit_edits
from interp.patching._rank_one import acting, listeners, losses, second_moment
from interp.prompts import Prompts
from tests.helpers import D_MLP, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokens
from tests.patching.oracle import N, prompts

POST, OUT = "blocks.1.mlp.hook_post", "blocks.1.mlp.out.hook_out"


@pytest.fixture(scope="module")
def facts() -> Prompts:
    """The oracle's prompts, about the token at s1."""
    p = prompts()
    return replace(p, positions={"subject": p.positions["s1"], "end": p.positions["end"]})


def hooked(bridge: Any, tokens: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Logits, and an activation."""
    kept: list[Tensor] = []
    with torch.no_grad():
        logits = bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda t, hook: kept.append(t.clone()))])
    return logits, kept[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_in_the_weights_is_the_edit_that_was_fitted(family: str, facts: Prompts) -> None:
    bridge = fresh_bridge(family, dtype=torch.float64)
    edits = fit_edits(bridge, facts, 1, steps=6)
    state = {name: value.clone() for name, value in bridge.original_model.state_dict().items()}
    record = provenance(bridge)
    rows = torch.arange(N)
    logits, neurons = hooked(bridge, facts.clean, POST)
    before = hooked(bridge, facts.clean, OUT)[1]
    keys = neurons[rows, facts.positions["subject"]]
    assert torch.allclose((edits.read * keys).sum(-1), torch.ones(N, dtype=torch.float64), atol=1e-9)
    with torch.no_grad(), acting(bridge, 1, edits.read, edits.write):
        together = bridge(facts.clean)
    for i in range(N):
        with edited_weights(bridge, edits, i):
            alone, after = hooked(bridge, facts.clean[i : i + 1], OUT)
            place = int(facts.positions["subject"][i])
            # the subject's output moves by exactly what is written, any other by what its neurons say to `read`
            assert torch.allclose((after - before[i])[0, place], edits.write[i], atol=1e-9)
            elsewhere = (neurons[i] @ edits.read[i])[:, None] * edits.write[i]
            assert torch.allclose(after[0] - before[i], elsewhere, atol=1e-9)
            assert torch.allclose(alone[0], together[i], atol=1e-9)
            assert provenance(bridge)["revision"] != record["revision"]
    for name, value in bridge.original_model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert provenance(bridge) == record
    assert torch.equal(hooked(bridge, facts.clean, OUT)[0], logits)


def test_the_record_of_the_model_says_when_it_is_not_the_loaded_one(facts: Prompts, tmp_path: Path) -> None:
    bridge = fresh_bridge("gpt2")
    edits = fit_edits(bridge, facts, 1, steps=1)
    bridge.__dict__["_interp_source"] = Source("tiny", tmp_path, "commit", fingerprint(bridge))
    seen = []
    for i in range(2):
        assert provenance(bridge)["revision"] == "commit"
        with pytest.raises(ZeroDivisionError), edited_weights(bridge, edits, i), edited_weights(bridge, edits, 2):
            seen.append(provenance(bridge)["revision"])
            raise ZeroDivisionError
    assert provenance(bridge)["revision"] == "commit"
    assert len({"commit", *seen}) == 3  # each pair of edits is another model


def test_weights_come_back_bit_for_bit_also_by_an_exception(facts: Prompts) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        bridge = fresh_bridge("llama", dtype=dtype)
        bridge.requires_grad_(True)
        edits = fit_edits(bridge, facts, 1, steps=3)
        weight = bridge.blocks[1].mlp.W_out
        before = weight.detach().clone()
        with pytest.raises(ZeroDivisionError), edited_weights(bridge, edits, 0):
            assert not torch.equal(weight, before)
            once = weight.detach().clone()
            with edited_weights(bridge, edits, 1):
                assert not torch.equal(weight, once)
            assert torch.equal(weight, once)  # nested ones come off one by one
            raise ZeroDivisionError
        assert torch.equal(bridge.blocks[1].mlp.W_out, before)
        assert all(parameter.grad is None and parameter.requires_grad for parameter in bridge.parameters())
        assert not any(
            handle for point in bridge.hook_points() for handle in point.fwd_hooks if not handle.is_permanent
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("goal", "sign"), [("inject", 1), ("erase", -1), ("force", 1)])
def test_what_is_written_serves_the_goal_within_its_bound(family: str, goal: Any, sign: int, facts: Prompts) -> None:
    bridge = tiny_bridge(family)
    options: dict[str, Any] = {"goal": goal, "steps": 12, "noise": 1.0}
    small, large = (fit_edits(bridge, facts, 1, **options, max_norm=size) for size in (0.2, 2.0))
    gain = []
    for edits in (small, large):
        noise = None if goal != "force" else _noise(bridge, edits, facts)
        gain.append(sign * (_log_prob(bridge, edits, facts, noise, 1.0) - _log_prob(bridge, edits, facts, noise, 0.0)))
    assert (gain[0] > 0).all() and (gain[1] > gain[0]).all()
    assert (small.norms <= 0.2 + 1e-5).all() and (small.norms > 0.15).all() and (large.norms <= 2.0 + 1e-5).all()
    assert torch.equal(large.targets, facts.foils if goal == "inject" else facts.answers)
    assert (large.noise_std > 0) == (goal == "force")


def test_noise_is_in_standard_deviations_of_the_embeddings(facts: Prompts) -> None:
    bridge = tiny_bridge("llama")
    for noise in (0.5, 2.0):
        edits = fit_edits(bridge, facts, 1, goal="force", steps=1, noise=noise)
        assert edits.noise_std == pytest.approx(noise * float(bridge.W_E.std()), rel=1e-5)


def test_the_first_step_goes_up_the_gradient(facts: Prompts) -> None:
    """Adam's first step is the sign of the gradient; finite differences of a whole forward know it too."""
    bridge = tiny_bridge("gemma2", dtype=torch.float64)
    edits = fit_edits(bridge, facts, 1, steps=1, learning_rate=0.01, max_norm=100.0)
    steep = 0
    for coordinate in (0, 7, 19):
        nudge = torch.zeros_like(edits.write)
        nudge[:, coordinate] = 1e-2  # not smaller: the norms of this family compute in float32
        up = _log_prob(bridge, replace(edits, write=nudge), facts, None, 1.0)
        slope = (up - _log_prob(bridge, replace(edits, write=nudge), facts, None, -1.0)) / 2e-2
        clear = slope.abs() > 1e-3
        steep += int(clear.sum())
        assert torch.equal(edits.write[:, coordinate].sign()[clear], slope.sign()[clear])
    assert steep >= 8  # of twelve


def test_no_other_listener_disturbs_the_background_less() -> None:
    """Of all `read` with read . k = 1 the fitted one has the least mean square answer to the background."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(3, D_MLP, generator=generator, dtype=torch.float64)
    sample = torch.randn(200, D_MLP, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, D_MLP)
    moment = sample.T @ sample / len(sample)
    read = listeners(keys, moment, 1e-9)
    assert torch.allclose((read * keys).sum(-1), torch.ones(3, dtype=torch.float64))
    least = (sample @ read.T).pow(2).mean(0)
    for _ in range(20):
        other = read + 0.05 * torch.randn(read.shape, generator=generator, dtype=torch.float64)
        other = other / (other * keys).sum(-1, keepdim=True)
        assert ((sample @ other.T).pow(2).mean(0) > least).all()
    plain = keys / keys.pow(2).sum(-1, keepdim=True)
    assert (least < 0.8 * (sample @ plain.T).pow(2).mean(0)).all()
    assert torch.allclose(listeners(keys, moment, 1e9), plain, atol=1e-6)  # all ridge: the key itself
    # the ridge is in units of the moment: neurons ten times as large are listened to a tenth as hard
    assert torch.allclose(10 * listeners(10 * keys, 100 * moment, 0.1), listeners(keys, moment, 0.1))


def test_the_second_moment_is_over_all_positions_of_the_background(facts: Prompts) -> None:
    bridge, text = tiny_bridge("neox"), tiny_tokens(5, 6, seed=3)
    neurons = hooked(bridge, text, POST)[1].double().reshape(-1, D_MLP)
    expected = neurons.T @ neurons / len(neurons)
    assert torch.allclose(second_moment(bridge, text, 1, 2), expected, atol=1e-9)
    with_text = fit_edits(bridge, facts, 1, steps=1, background=text)
    keys = hooked(bridge, facts.clean, POST)[1][torch.arange(N), facts.positions["subject"]]
    assert torch.allclose(with_text.read.double(), listeners(keys, expected, 0.01), atol=1e-5)
    assert not torch.allclose(with_text.read, fit_edits(bridge, facts, 1, steps=1).read, atol=1e-3)


def test_examples_do_not_know_of_each_other(facts: Prompts) -> None:
    bridge = tiny_bridge("gpt2")
    background = facts.clean
    whole = fit_edits(bridge, facts, 2, steps=4, background=background, targets=facts.foils + 1)
    split = fit_edits(bridge, facts, 2, steps=4, background=background, targets=facts.foils + 1, batch_size=3)
    alone = fit_edits(bridge, facts[2], 2, steps=4, background=background, targets=facts.foils[2:3] + 1)
    assert torch.allclose(whole.write, split.write, atol=1e-4) and torch.allclose(whole.read, split.read, atol=1e-5)
    assert torch.allclose(whole.write[2], alone.write[0], atol=1e-4)


def test_losses() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([0, 3, 8, 2])
    p = logits.softmax(-1)[torch.arange(4), targets]
    assert torch.allclose(losses(logits, targets, "inject"), -p.log())
    assert torch.allclose(losses(logits, targets, "force"), -p.log())
    assert torch.allclose(losses(logits, targets, "erase"), -(1 - p).log())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": N_LAYERS}, f"layer={N_LAYERS} is not a layer of this model"),
        ({"goal": "amplify"}, "goal='amplify' is unknown"),
        ({"position": "object"}, "positions='object' is unknown|position='object' is unknown"),
        ({"targets": torch.tensor([3])}, "expected one for each of 4 prompts"),
        ({"targets": torch.full((N,), 10_000)}, "expected one for each of 4 prompts, below 60"),
        ({"targets": torch.full((N,), 3), "goal": "erase"}, "goal='erase' is about the answers of the prompts"),
        ({"steps": 0}, r"\{'steps': 0\} must be positive"),
        ({"max_norm": -1.0}, r"\{'max_norm': -1.0\} must be positive"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(options: dict[str, Any], message: str, facts: Prompts) -> None:
    with pytest.raises(ValueError, match=message):
        fit_edits(tiny_bridge("gpt2"), facts, **{"layer": 1, **options})


def test_refused_edits(facts: Prompts) -> None:
    bridge = tiny_bridge("gpt2")
    late = replace(facts, positions={"subject": facts.positions["end"], "end": facts.positions["subject"]})
    with pytest.raises(ValueError, match="example 0: the subject ends at 7, after the answer at 2"):
        fit_edits(bridge, late, 1)
    edits = fit_edits(bridge, facts, 1, steps=1)
    with pytest.raises(IndexError, match="example 4 of 4 edits"), edited_weights(bridge, edits, 4):
        pass
    narrow = replace(edits, read=edits.read[:, :5])
    with pytest.raises(ValueError, match="it was fitted on another model"), edited_weights(bridge, narrow, 0):
        pass
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        fit_edits(training, facts, 1)


def _noise(bridge: Any, edits: RankOneEdits, facts: Prompts) -> Tensor:
    from interp.patching._measure import gaussian_rows

    at = torch.arange(facts.clean.shape[1]) == facts.positions["subject"][:, None]
    return edits.noise_std * gaussian_rows(torch.arange(N), 1, bridge.cfg.d_model, edits.seed) * at[..., None]


def _log_prob(bridge: Any, edits: RankOneEdits, facts: Prompts, noise: Tensor | None, size: float) -> Tensor:
    """Log-probability of the targets with `size` times the edit, and noise on the embeddings."""
    metric = metrics.answer_log_prob(replace(facts, answers=edits.targets, foils=(edits.targets + 1) % 60))
    hook = [("blocks.0.hook_resid_pre", lambda t, hook: t + noise)] if noise is not None else []
    with torch.no_grad(), bridge.hooks(fwd_hooks=hook), acting(bridge, edits.layer, edits.read, size * edits.write):
        return metric(bridge(facts.clean))
