"""Firing and sparsity: CETT against loops, its ends, planted dead weight, the nested search on two splits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.hooks import hook_name, interventions, reads
from interp.neurons import cett, firing, ppl_sparsity
from interp.neurons._cett import GRID, Tails, truncation
from interp.neurons.sparsity import PPLSparsity
from interp.results import load
from tests.helpers import D_MLP, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge, tiny_tokens


def activations(bridge: Any, tokens: Tensor) -> list[Tensor]:
    hooks = [hook_name("neuron", layer) for layer in range(N_LAYERS)]
    with torch.no_grad(), reads(bridge, hooks) as found:
        bridge(tokens)
    return [found[hook] for hook in hooks]


def own_text(bridge: Any, batch: int, pos: int, seed: int = 0) -> Tensor:
    """Rows that the model continued greedily: text on which every part of a random model matters."""
    tokens = tiny_tokens(batch, 3, seed)
    while tokens.shape[1] < pos:
        with torch.no_grad():
            logits = bridge(tokens)[:, -1]
        logits[:, :3] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return tokens


def losses(bridge: Any, tokens: Tensor, mask: Tensor, thresholds: list[float] | None) -> Tensor:
    """Mean loss per row over predicted tokens in the mask, by hand."""
    edits = {}
    for layer, threshold in enumerate(thresholds or []):
        norms = bridge.blocks[layer].mlp.W_out.norm(dim=1)
        edits[hook_name("neuron", layer)] = lambda a, n=norms, t=threshold: a * (a.abs() * n > t)
    with torch.no_grad(), interventions(bridge, edits):
        log_probs = bridge(tokens).log_softmax(-1)
    out = []
    for row in range(len(tokens)):
        each = [-log_probs[row, i - 1, tokens[row, i]] for i in range(1, tokens.shape[1]) if mask[row, i]]
        out.append(torch.stack(each).mean())
    return torch.stack(out)


@pytest.mark.parametrize("family", FAMILIES)
def test_cett_against_loops(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(5, 7, seed=1)
    found = cett(bridge, tokens, 0.3, batch_size=2)
    for layer, acts in enumerate(activations(bridge, tokens)):
        weight = bridge.blocks[layer].mlp.W_out
        eps = float(found.thresholds[layer])

        def errors(eps: float, acts: Tensor = acts, weight: Tensor = weight) -> tuple[float, Tensor]:
            ratios, on = [], torch.zeros(5, 7)
            for row in range(5):
                for pos in range(1, 7):  # not BOS
                    written = acts[row, pos][:, None] * weight  # one vector per neuron
                    small = written.norm(dim=1) <= eps * (1 + 1e-5)
                    on[row, pos] = 1 - small.float().mean()
                    ratios.append(float(written[small].sum(0).norm() / written.sum(0).norm()))
            return sum(ratios) / len(ratios), on[:, 1:].mean(1)

        error, kept = errors(eps)
        assert error == pytest.approx(float(found.errors[layer]), rel=1e-4) and error <= 0.3
        np.testing.assert_allclose(found.values.values[layer], kept, atol=1e-4)
        # and no larger threshold would do: the next one of the grid is over the level
        flat = (acts.abs() * weight.norm(dim=1))[:, 1:].flatten().sort().values
        higher = flat[flat > eps * (1 + 1e-5)]
        assert max(errors(float(eps))[0] for eps in higher[: 2 * len(flat) // GRID + 2]) > 0.3
    assert found.provenance["cost"] == {"forwards": 1} and found.provenance["level"] == 0.3


def test_the_ends_of_cett_are_exact() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(4, 7)
    none, everything = cett(bridge, tokens, 0), cett(bridge, tokens, 1)
    assert (none.errors == 0).all() and (none.thresholds == 0).all()
    np.testing.assert_allclose(everything.errors.values, 1.0, rtol=1e-5)
    assert (everything.values == 0).all()
    levels = [float(cett(bridge, tokens, level).values.mean()) for level in (0.0, 0.1, 0.3, 0.6, 1.0)]
    assert levels == sorted(levels, reverse=True) and levels[0] > 0.99
    table = cett(bridge, tokens, 0.3).table()
    assert (table.low <= table.kept).all() and (table.kept <= table.high).all()
    assert cett(bridge, tokens, 0.3).plot().data


def test_masks_are_cut_with_the_batches() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(5, 8, seed=1)
    keep = torch.arange(8) < torch.tensor([8, 3, 5, 2, 7])[:, None]
    small, whole = (cett(bridge, tokens, 0.3, keep=keep, batch_size=size) for size in (2, 5))
    np.testing.assert_allclose(small.thresholds, whole.thresholds, rtol=1e-4)
    np.testing.assert_allclose(small.values, whole.values, atol=1e-4)
    acts = activations(bridge, tokens)[1]
    on = acts.abs() * bridge.blocks[1].mlp.W_out.norm(dim=1) > float(whole.thresholds[1])
    expected = [float(on[row, 1 : int(keep[row].sum())].float().mean()) for row in range(5)]
    np.testing.assert_allclose(whole.values.values[1], expected, atol=1e-4)
    np.testing.assert_allclose(
        firing(bridge, tokens, threshold=0.3, keep=keep, batch_size=2).rates,
        firing(bridge, tokens, threshold=0.3, keep=keep, batch_size=5).rates, atol=1e-6,
    )  # fmt: skip


def test_the_grid_is_of_quantiles_and_falls_are_seen() -> None:
    acts = torch.arange(1.0, 2049.0).reshape(2, 1024)
    tails = Tails(acts, torch.eye(1024))
    assert len(tails.grid) == GRID + 1 and float(tails.grid[0]) == 0 and tails.grid[1] > 2 and tails.grid[-1] > 2048
    torch.testing.assert_close(tails.grid[1:], torch.arange(2.0, 2049.0, 2), rtol=2e-5, atol=0)
    # two neurons that cancel a third: leaving out all three is better than leaving out the first alone
    cancel = Tails(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[0.0, 1.0], [0.0, -0.75], [1.0, 0.0]]))
    first, second = (int((cancel.grid > value).nonzero()[0]) for value in (1.0, 1.5))
    assert cancel.error(first) == pytest.approx(1 / math.hypot(9, 0.5))
    assert cancel.error(second) == pytest.approx(0.5 / math.hypot(9, 0.5))
    assert cancel.falls() == pytest.approx(0.5 / math.hypot(9, 0.5))


def test_firing_counts_non_zeros_and_relu_zeros_are_the_floor() -> None:
    bridge = fresh_bridge("gpt2", activation_function="relu")
    tokens = tiny_tokens(4, 7, seed=2)
    found = firing(bridge, tokens, batch_size=3)
    for layer, acts in enumerate(activations(bridge, tokens)):
        on = (acts[:, 1:] != 0).float()
        np.testing.assert_allclose(found.rates.values[layer], on.mean((0, 1)), atol=1e-6)
        np.testing.assert_allclose(found.values.values[layer], on.mean((1, 2)), atol=1e-6)
    assert 0.2 < float(found.values.mean()) < 0.8
    np.testing.assert_allclose(cett(bridge, tokens, 0).values.values, found.values.values, atol=1e-6)
    some = firing(bridge, tokens, threshold=0.5, skip_bos=False)
    on = torch.stack([(acts.abs() > 0.5).float().mean((0, 1)) for acts in activations(bridge, tokens)])
    np.testing.assert_allclose(some.rates.values, on, atol=1e-6)
    keep = torch.zeros(4, 7, dtype=torch.bool)
    keep[:3, 2] = True
    part = firing(bridge, tokens, keep=keep)
    assert np.isnan(part.values.values[:, 3]).all() and part.provenance["n_tokens"] == 3
    on = torch.stack([(acts[:3, 2] != 0).float().mean(-1) for acts in activations(bridge, tokens)])
    np.testing.assert_allclose(part.values.values[:, :3], on, atol=1e-6)


def test_silent_neurons_are_counted() -> None:
    bridge = fresh_bridge("gpt2", activation_function="relu")
    with torch.no_grad():
        bridge.blocks[1].mlp.original_component.c_fc.original_component.bias[:12] = -1e4
        bridge.blocks[1].mlp.original_component.c_fc.original_component.bias[12:36] = 1e4
    found = firing(bridge, tiny_tokens(6, 9))
    row = found.silent().set_index("layer").loc[1]
    assert row["never"] >= 12 / D_MLP and row["always"] >= 24 / D_MLP
    assert found.rates.values[1, :12].max() == 0 and found.rates.values[1, 12:36].min() == 1
    assert found.plot().data


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_search_keeps_its_promise_on_its_split_and_reports_on_the_other(family: str) -> None:
    bridge, tokens = tiny_bridge(family), own_text(tiny_bridge(family), 8, 9, seed=4)
    keep = torch.arange(9) < torch.tensor([9, 8, 9, 7, 9, 8, 9, 6])[:, None]
    found = ppl_sparsity(bridge, tokens, 5, steps=6, batch_size=3, split=0.6, keep=keep)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    search, report = order[:5].sort().values, order[5:].sort().values
    assert found.values.coords["example"].values.tolist() == report.tolist()
    thresholds = found.thresholds.values.tolist()
    mask = (tokens != 0) & keep

    def ratio(rows: Tensor) -> float:
        rise = losses(bridge, tokens[rows], mask[rows], thresholds) - losses(bridge, tokens[rows], mask[rows], None)
        counts = mask[rows][:, 1:].sum(1)
        return math.exp(float((rise * counts).sum() / counts.sum()))

    tried = found.search.to_dataset("quantity").to_dataframe().set_index("level")
    key = min(tried.index, key=lambda level: abs(level - found.level)) if found.level else None
    if key is not None:
        assert ratio(search) == pytest.approx(tried.loc[key, "ratio"], abs=2e-4)
    assert ratio(search) <= 1.05 + 2e-4
    assert found.reached or family == "gemma2"  # cutting everything costs that one less
    if found.reached:  # the next level tried was too much
        assert tried.ratio[tried.index > found.level + 1e-6].iloc[0] > 1.05
        assert tried.index[tried.index > found.level + 1e-6].min() - found.level == pytest.approx(2**-6, abs=1e-6)
        assert len(tried) == 7
    assert float(found.ratio().estimate) == pytest.approx(ratio(report), abs=2e-4)
    np.testing.assert_allclose(
        found.losses.sel(run="sparse").values, losses(bridge, tokens[report], mask[report], thresholds), atol=1e-4
    )
    # shares are those of the sparse run itself, BOS left out
    notes: dict[int, Tensor] = {}
    with torch.no_grad(), interventions(bridge, truncation(bridge, dict(enumerate(thresholds)), notes)):
        bridge(tokens[report])
    shares = torch.stack([notes[layer].reshape(len(report), 9) for layer in range(N_LAYERS)])
    on = (shares * mask[report]).sum(-1) / mask[report].sum(-1)
    np.testing.assert_allclose(found.values.values, on, atol=1e-4)
    assert found.provenance["cost"]["forwards_search_split"] == len(tried) + 2


def test_dead_weight_goes_first_and_costs_nothing() -> None:
    """Neurons that write next to nothing are cut whatever their activation; the others carry the loss."""
    bridge = fresh_bridge("llama")
    with torch.no_grad():
        for block in bridge.blocks:
            block.mlp.original_component.down_proj.original_component.weight[:, : D_MLP // 2] *= 1e-6
    tokens = own_text(bridge, 12, 10, seed=6)
    found = ppl_sparsity(bridge, tokens, 0.01, steps=8)
    assert (found.values.values <= 0.5).all() and (found.values.values > 0.2).all()
    assert found.reached and abs(float(found.ratio().estimate) - 1) < 0.01
    more = ppl_sparsity(bridge, tokens, 20, steps=8)
    assert float(more.values.mean()) < float(found.values.mean())
    assert more.monotone() == bool((np.diff(more.search.sel(quantity="ratio").values) >= 0).all())
    for ratios, expected in (([1.0, 1.1, 1.1], True), ([1.0, 1.2, 1.1], False)):
        search = found.search.isel(step=[0, 1, 2]).copy(data=np.array([[0, r, 0] for r in ratios], dtype=np.float32))
        assert dataclasses.replace(found, search=search).monotone() is expected


def test_a_rise_that_cutting_everything_does_not_reach_is_said() -> None:
    bridge = fresh_bridge("gpt2")
    with torch.no_grad():
        for block in bridge.blocks:  # the neurons do not matter
            block.mlp.original_component.c_proj.original_component.weight *= 1e-4
    found = ppl_sparsity(bridge, own_text(bridge, 4, 8), 50)
    assert not found.reached and found.level == 1.0 and len(found.search) == 1 and (found.values.values < 0.1).all()


def test_masks_and_seeds_choose_what_counts(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(6, 9, seed=9)
    keep = torch.ones(6, 9, dtype=torch.bool)
    keep[:, 6:] = False  # as padding
    other = tokens.clone()
    other[:, 6:] = 1
    first, second = (ppl_sparsity(bridge, given, 5, keep=keep, steps=4) for given in (tokens, other))
    np.testing.assert_allclose(first.losses.values, second.losses.values, atol=1e-5)
    np.testing.assert_allclose(first.values.values, second.values.values, atol=1e-5)
    third = ppl_sparsity(bridge, tokens, 5, keep=keep, steps=4, seed=3)
    assert third.values.coords["example"].values.tolist() != first.values.coords["example"].values.tolist()
    again = load(first.save(tmp_path / "sparsity.nc"))
    assert isinstance(again, PPLSparsity) and again.level == first.level and again.ratio() == first.ratio()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(4, 6)
    for place in ("_cett.capture", "firing_rates.capture", "sparsity._run"):
        monkeypatch.setattr(f"interp.neurons.{place}", lambda *_a, **_k: pytest.fail("a forward was run"))
    first_alone = torch.ones(4, 6, dtype=torch.bool)
    first_alone[3, 1:] = False
    for match, run in {
        "level=1.5; expected": lambda: cett(bridge, tokens, 1.5),
        "level=-0.1": lambda: cett(bridge, tokens, -0.1),
        "p=0; expected a rise": lambda: ppl_sparsity(bridge, tokens, 0),
        "split=1": lambda: ppl_sparsity(bridge, tokens, split=1),
        "steps=0": lambda: ppl_sparsity(bridge, tokens, steps=0),
        "the search split has 0 of 4 examples": lambda: ppl_sparsity(bridge, tokens, split=0.01),
        "the report split has 2": lambda: ppl_sparsity(
            bridge,
            tokens,
            keep=torch.tensor([[True] * 6, [True] * 6, [True] * 6, [True] + [False] * 5]),
            skip_bos=False,
        ),
        "threshold=-1": lambda: firing(bridge, tokens, threshold=-1),
        "batch_size=0": lambda: firing(bridge, tokens, batch_size=0),
        "leave out all of them": lambda: firing(bridge, tokens, keep=tokens == 0),
        r"has ids from 0 to 60": lambda: firing(bridge, torch.where(tokens == tokens[0, 1], 60, tokens)),
    }.items():
        with pytest.raises(ValueError, match=match):
            run()
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        cett(training, tokens)
