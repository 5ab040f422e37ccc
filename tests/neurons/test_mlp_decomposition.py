"""MLP decomposition: against a plain regression, planted scalars and intercepts, heads that add up, the causal swap."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.cache import capture
from interp.hooks import hook_name, interventions
from interp.neurons import decompose_mlp, swap_intercepts
from interp.neurons._mlp_parts import mlp_parts
from interp.neurons._sides import unembedding
from interp.neurons.intercept_swap import CONDITIONS, QUANTITIES, InterceptSwap
from interp.neurons.mlp_decomposition import MLPDecomposition, _fit
from interp.prompts import Prompts
from interp.results import load
from tests.helpers import D_MODEL, FAMILIES, N_HEADS, fresh_bridge, tiny_bridge, tiny_tokens

COUNTRIES = [f"c{i}" for i in range(12)]


def task(seed: int, *, length: int = 6, n: int = 12, start: int = 0, mark: int | None = None) -> Prompts:
    """One example per country, answers from 20 for even seeds and from 30 for odd ones; `mark` is the second token."""
    tokens = tiny_tokens(n, length, seed)
    if mark is not None:
        tokens[:, 1] = mark
    answers = (30 if seed % 2 else 20) + (torch.arange(n) + start) % 4
    return Prompts(
        tokens, tokens.flip(1).roll(1, 1), answers, answers + 7,
        positions={"end": torch.full((n,), length - 1)}, labels={"country": COUNTRIES[start : start + n]},
    )  # fmt: skip


def design(bridge: Any, prompts: list[Prompts], layer: int) -> tuple[np.ndarray, np.ndarray]:
    """MLP outputs `[example, d_model]` and head outputs `[example, head, d_model]` of one layer, by plain products."""
    outs, heads = [], []
    for one in prompts:
        names = [hook_name("mlp_out", layer), hook_name("z", layer), hook_name("attn_out", layer)]
        found = capture(bridge, one.clean, names)
        rows, end = torch.arange(len(one)), one.positions["end"]
        z = found[names[1]][rows, end]
        writes = torch.stack([z[:, h] @ bridge.blocks[layer].attn.W_O[h] for h in range(N_HEADS)], 1)
        post = bridge.blocks[layer]._modules.get("ln1_post")
        if post is not None:  # the norm's own ratio, coordinate by coordinate
            writes = writes * (post(writes.sum(1)) / writes.sum(1))[:, None]
        outs.append(found[names[0]][rows, end])
        heads.append(writes)
    return torch.cat(outs).double().numpy(), torch.cat(heads).double().numpy()


def regress(out: np.ndarray, heads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least squares with one dummy column per coordinate: nothing is centred."""
    n, d = out.shape
    x = np.concatenate([heads.transpose(0, 2, 1).reshape(n * d, -1), np.tile(np.eye(d), (n, 1))], 1)
    found = np.linalg.lstsq(x, out.reshape(-1), rcond=None)[0]
    return found[: heads.shape[1]], found[heads.shape[1] :]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_equal_to_a_regression_with_dummies_and_held_out_by_country(family: str) -> None:
    bridge = tiny_bridge(family)
    sets = {"a": [task(0), task(2, length=8)], "b": [task(1)]}
    found = decompose_mlp(bridge, 1, sets, folds=3, seed=5)
    for name, prompts in sets.items():
        out, heads = design(bridge, prompts, 1)
        w, b = regress(out, heads)
        np.testing.assert_allclose(found.values.sel(task=name), w, rtol=2e-3, atol=2e-4)
        np.testing.assert_allclose(found.intercepts.sel(task=name), b, rtol=2e-3, atol=2e-4)
        groups = [country for one in prompts for country in one.labels["country"]]
        order = sorted(set(groups))
        random.Random(5).shuffle(order)
        fold = np.array([order.index(group) % 3 for group in groups])
        for k in range(3):
            train, test = fold != k, fold == k
            w, b = regress(out[train], heads[train])
            error = ((out - np.einsum("r,nrd->nd", w, heads) - b) ** 2).sum(-1)
            about = ((out - out[train].mean(0)) ** 2).sum(-1)
            cell = found.r2.sel(task=name).isel(fold=k)
            assert float(cell.sel(measure="train")) == pytest.approx(
                1 - error[train].sum() / about[train].sum(), abs=1e-3
            )
            assert float(cell.sel(measure="heldout")) == pytest.approx(
                1 - error[test].sum() / about[test].sum(), abs=2e-3
            )
            energy = 1 - error[test].sum() / (out[test] ** 2).sum()
            assert float(cell.sel(measure="heldout_energy")) == pytest.approx(energy, abs=2e-3)
    assert found.summary().columns.tolist() == ["task", "train", "heldout", "heldout_energy", "shuffled"]
    assert found.provenance["cost"] == {"forwards": 1} and found.entities["a"] == sorted(COUNTRIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_add_up_to_what_attention_adds(family: str) -> None:
    bridge, prompts = tiny_bridge(family), [task(0), task(1)]
    parts = mlp_parts(bridge, prompts, 2, "all_heads")
    layers = 2 if family == "neox" else 3  # in parallel blocks the heads beside the MLP do not reach it
    assert parts.names == [f"L{layer}H{head}" for layer in range(layers) for head in range(N_HEADS)]
    for layer in range(layers):
        name = hook_name("attn_out", layer)
        total = torch.cat([capture(bridge, one.clean, name, positions=-1)[name] for one in prompts]).double()
        rest = total - parts.regressors[:, layer * N_HEADS : (layer + 1) * N_HEADS].sum(1)
        bias = bridge.blocks[layer].attn.b_O if family in ("gpt2", "neox") else None
        expected = torch.zeros(D_MODEL).double() if bias is None else bias.double()
        torch.testing.assert_close(rest, expected.expand_as(rest), rtol=0, atol=2e-5 * float(total.abs().max()))


def planted(bridge: Any, layer: int, b: Tensor, stream: float, attention: float) -> Any:
    """The MLP replaced by a known combination of the stream, of attention and of a vector."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def read(tensor: Tensor) -> Tensor:
            kept[name] = tensor
            return tensor.clone()

        return read

    def write(_tensor: Tensor) -> Tensor:
        return stream * kept["stream"] + attention * kept["attention"] + b

    edits = {hook_name("resid_pre", layer): keep("stream"), hook_name("attn_out", layer): keep("attention")}
    return interventions(bridge, {**edits, hook_name("mlp_out", layer): write})


def test_planted_scalars_and_intercept_are_recovered_exactly() -> None:
    bridge = tiny_bridge("llama")
    b = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(0))
    with planted(bridge, 1, b, -0.25, 1.5):
        both = decompose_mlp(bridge, 1, {"a": task(0)}, basis="resid", folds=4)
        heads = decompose_mlp(bridge, 1, {"a": task(0)}, basis="heads", folds=4)
        none = decompose_mlp(bridge, 1, {"a": task(0)}, basis="resid", intercept=False, folds=4)
        shrunk = decompose_mlp(bridge, 1, {"a": task(0)}, basis="resid", ridge=1e6, folds=4)
    np.testing.assert_allclose(both.values.values, [[-0.25, 1.5]], atol=1e-4)
    np.testing.assert_allclose(both.intercepts.values[0], b, atol=1e-4)
    for measure in ("train", "heldout", "heldout_energy"):
        np.testing.assert_allclose(both.r2.sel(measure=measure), 1, atol=1e-5)
    assert (both.r2.sel(measure="shuffled") < 0.5).all()
    assert float(heads.r2.sel(measure="heldout").mean()) < 0.95  # the stream is not among the heads
    assert (none.intercepts == 0).all() and (none.r2.sel(measure="heldout_energy") < 0.999).all()
    np.testing.assert_allclose(shrunk.values.values, 0, atol=1e-4)
    np.testing.assert_allclose(shrunk.intercepts.values[0], b + torch.from_numpy(
        both.provenance["scale"]["a"] * 0 + mean_of(bridge, b)), atol=1e-3)  # fmt: skip


def mean_of(bridge: Any, b: Tensor) -> np.ndarray:
    """Mean of the planted MLP output less b."""
    names = [hook_name("resid_pre", 1), hook_name("attn_out", 1)]
    found = capture(bridge, task(0).clean, names, positions=-1)
    return (-0.25 * found[names[0]] + 1.5 * found[names[1]]).mean(0).double().numpy()


def test_redundant_regressors_share_without_breaking() -> None:
    x = torch.randn(9, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w, b = _fit(3 * x[:, 0] + 2, torch.cat([x, x], 1), True, 0.0)
    torch.testing.assert_close(w, torch.tensor([1.5, 1.5], dtype=torch.float64))
    torch.testing.assert_close(b, torch.full((4,), 2.0, dtype=torch.float64))


def test_direct_logits_are_those_of_the_parts() -> None:
    bridge = tiny_bridge("gpt2")
    sets = {"a": task(0), "b": task(1)}
    found = decompose_mlp(bridge, 2, sets, folds=3)
    last = capture(bridge, sets["a"].clean, hook_name("resid_post", 2), positions=-1)[hook_name("resid_post", 2)]
    scale = float(last.std(dim=-1, correction=0).mean())
    assert found.provenance["scale"]["a"] == pytest.approx(scale, rel=1e-5)
    weights = unembedding(bridge, fold=True)
    logits = torch.from_numpy(found.intercepts.sel(task="a").values) @ weights / scale
    logits = logits - logits.mean()
    assert found.answers == {"a": [20, 21, 22, 23], "b": [30, 31, 32, 33]}
    cell = found.direct.sel(task="a", part="intercept")
    assert float(cell.sel(answers_of="b")) == pytest.approx(float(logits[30:34].mean()), abs=1e-4)
    _, heads = design(bridge, [sets["a"]], 2)
    wrote = torch.from_numpy(np.einsum("r,nrd->nd", found.values.sel(task="a"), heads)).float() @ weights / scale
    wrote = wrote - wrote.mean(-1, keepdim=True)
    cell = found.direct.sel(task="a", part="regressors", answers_of="a")
    assert float(cell) == pytest.approx(float(wrote[:, 20:24].mean()), abs=1e-3)
    own = wrote[torch.arange(12), sets["a"].answers] - wrote[:, 20:24].mean(-1)
    assert float(found.own.sel(task="a", part="regressors")) == pytest.approx(float(own.mean()), abs=1e-3)
    assert float(found.own.sel(task="a", part="intercept")) == pytest.approx(0, abs=1e-4)  # each answer three times
    table = found.decode(bridge, 3)
    assert table.token[:3].tolist() == logits.topk(3).indices.tolist() and table.text[0] == f"w{table.token[0]}"
    assert table.logit[:3].tolist() == pytest.approx(logits.topk(3).values.tolist(), abs=1e-4)
    contrast = found.intercepts.sel(task="a") - found.intercepts.mean("task")
    best = int((torch.from_numpy(contrast.values) @ weights).argmax())
    assert found.decode(bridge, 1, contrast=True).token[0] == best
    assert found.plot().data[0].z.shape == (2, N_HEADS)


def swap_sets(start: int, n: int = 6) -> dict[str, Prompts]:
    return {"a": task(0, start=start, n=n, mark=5), "b": task(1, start=start, n=n, mark=6)}


def test_the_swap_is_what_it_says(tmp_path: Path) -> None:
    """Every cell against a forward with the vector added by hand."""
    bridge = tiny_bridge("gpt2")
    fits = [decompose_mlp(bridge, layer, swap_sets(0), folds=2) for layer in (0, 2)]
    test = swap_sets(6)
    found = swap_intercepts(bridge, test, fits, batch_size=4)

    def log_probs(which: str, added: dict[int, Tensor]) -> Tensor:
        def add(vector: Tensor) -> Any:
            return lambda acts: torch.cat([acts[:, :-1], acts[:, -1:] + vector], 1)

        with torch.no_grad(), interventions(bridge, {hook_name("mlp_out", i): add(v) for i, v in added.items()}):
            return bridge(test[which].clean)[:, -1].log_softmax(-1)

    b = {(fit.layer, name): torch.from_numpy(fit.intercepts.sel(task=name).values) for fit in fits for name in "ab"}
    for source, target in (("a", "b"), ("b", "a")):
        for condition, added in {
            "intact": {},
            "swapped": {i: b[i, target] - b[i, source] for i in (0, 2)},
            "removed": {i: -b[i, source] for i in (0, 2)},
        }.items():
            expected = log_probs(source, added)
            rows = torch.arange(6)
            own, other = test[source].answers, test[target].answers  # same countries, in the same order
            lists = {"a": slice(20, 24), "b": slice(30, 34)}
            cell = found.values.sel(source=source, target=target, condition=condition)
            for quantity, values in {
                "own": expected[rows, own], "other": expected[rows, other],
                "own_first": (expected.argmax(-1) == own).float(),
                "other_first": (expected.argmax(-1) == other).float(),
                "own_set": expected[:, lists[source]].logsumexp(-1),
                "other_set": expected[:, lists[target]].logsumexp(-1),
            }.items():  # fmt: skip
                np.testing.assert_allclose(cell.sel(quantity=quantity), values, atol=2e-4, err_msg=quantity)
    assert np.isnan(found.values.sel(source="a", target="a")).all()
    table = found.table("other").set_index(["source", "target", "condition"])
    cell = found.values.sel(source="a", target="b", quantity="other")
    change = float((cell.sel(condition="swapped") - cell.sel(condition="intact")).mean())
    row = table.loc[("a", "b", "swapped")]
    assert row.change == pytest.approx(change, abs=1e-5) and row.n == 6 and row.low <= row.change <= row.high
    again = load(found.save(tmp_path / "swap.nc"))
    assert isinstance(again, InterceptSwap) and again.values.shape == (2, 2, len(CONDITIONS), len(QUANTITIES), 6)
    assert found.provenance["cost"] == {"forwards": 4} and found.plot().data


def test_the_random_control_is_as_long_and_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = tiny_bridge("gpt2")
    fit = decompose_mlp(bridge, 1, swap_sets(0), folds=2)
    seen: list[dict[int, Tensor]] = []

    def record(_bridge: Any, prompts: Any, added: Any, _batch: int) -> Tensor:
        seen.append(dict(added))
        return torch.zeros(len(prompts[0]), 60)

    monkeypatch.setattr("interp.neurons.intercept_swap._answers", record)
    swap_intercepts(bridge, swap_sets(6), fit)
    delta, noise = seen[2][1], seen[3][1]
    assert float(noise.norm()) == pytest.approx(float(delta.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(noise, delta, dim=0))) < 0.7
    seen.clear()
    swap_intercepts(bridge, swap_sets(6), fit, seed=1)
    assert not torch.equal(seen[3][1], noise)


def test_a_planted_function_is_exchanged_by_the_swap() -> None:
    """An MLP that writes one vector per task: swapping it must name the other task's answers, a random one must not."""
    bridge = tiny_bridge("llama")
    weights = unembedding(bridge, fold=True)
    vectors = {5: 150 * weights[:, 20:24].mean(1), 6: 150 * weights[:, 30:34].mean(1)}
    tokens: list[Tensor] = []

    def write(out: Tensor) -> Tensor:
        marks = tokens[-1][:, 1]
        return torch.stack([vectors[int(mark)] for mark in marks])[:, None].expand_as(out).clone()

    def note(ids: Tensor) -> Tensor:
        tokens.append(ids)
        return ids.clone()

    with interventions(bridge, {"embed.hook_in": note, hook_name("mlp_out", 2): write}):
        fit = decompose_mlp(bridge, 2, swap_sets(0), folds=2)
        found = swap_intercepts(bridge, swap_sets(6), fit)
    torch.testing.assert_close(torch.from_numpy(fit.intercepts.sel(task="a").values), vectors[5], rtol=1e-3, atol=1e-3)
    table = found.table("other_set").set_index(["source", "target", "condition"]).change
    for pair in (("a", "b"), ("b", "a")):
        assert table[(*pair, "swapped")] > 2 and abs(table[(*pair, "random")]) < 0.5 * table[(*pair, "swapped")]
        own = found.table("own_set").set_index(["source", "target", "condition"]).change
        assert own[(*pair, "swapped")] < -1 and own[(*pair, "removed")] < -0.5


def test_examples_without_an_answer_in_the_other_task_are_left_out() -> None:
    bridge = tiny_bridge("gpt2")
    fit = decompose_mlp(bridge, 1, swap_sets(0), folds=2)
    found = swap_intercepts(bridge, {"a": task(0, start=6, n=6), "b": task(1, start=9, n=3)}, fit)
    there = ~np.isnan(found.values.sel(source="a", target="b", condition="swapped", quantity="own").values)
    assert there.tolist() == [False, False, False, True, True, True]
    assert found.table("own").set_index(["source", "condition"]).loc[("a", "swapped"), "n"] == 3


def test_refusals_come_before_any_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, neox = tiny_bridge("gpt2"), tiny_bridge("neox")
    fit = decompose_mlp(bridge, 1, swap_sets(0), folds=2)
    plain = decompose_mlp(bridge, 1, swap_sets(0), folds=2, intercept=False)
    for place in ("mlp_decomposition.mlp_parts", "intercept_swap._answers"):
        monkeypatch.setattr(f"interp.neurons.{place}", lambda *_a, **_k: pytest.fail("a forward was run"))
    unlabelled = Prompts(task(0).clean, task(0).corrupted, task(0).answers, task(0).foils)
    for match, run in {
        "layer=3 is not a layer": lambda: decompose_mlp(bridge, 3, {"a": task(0)}),
        "do not feed its MLP .*use basis='all_heads'": lambda: decompose_mlp(neox, 1, {"a": task(0)}),
        "does not feed its MLP": lambda: decompose_mlp(neox, 1, {"a": task(0)}, basis="resid"),
        "no head writes before the MLP of layer 0": lambda: decompose_mlp(neox, 0, {"a": task(0)}, basis="all_heads"),
        "ridge=-1": lambda: decompose_mlp(bridge, 1, {"a": task(0)}, ridge=-1),
        "folds=1": lambda: decompose_mlp(bridge, 1, {"a": task(0)}, folds=1),
        "is about 12 entities, which cannot make 13 folds": lambda: decompose_mlp(bridge, 1, {"a": task(0)}, folds=13),
        r"are labelled \[\], not with 'country or subject'": lambda: decompose_mlp(bridge, 1, {"a": unlabelled}),
        r"not with 'topic'": lambda: decompose_mlp(bridge, 1, {"a": task(0)}, by="topic"),
        "tasks must be a mapping": lambda: decompose_mlp(bridge, 1, {}),
        "task 'a' has no examples": lambda: decompose_mlp(bridge, 1, {"a": []}),
        "a swap needs two tasks": lambda: swap_intercepts(bridge, {"a": task(0, start=6, n=6)}, fit),
        r"task 'a': 6 entities were fitted on \(c0": lambda: swap_intercepts(bridge, swap_sets(0), fit),
        r"of layers \[1, 1\]; give each layer once": lambda: swap_intercepts(bridge, swap_sets(6), [fit, fit]),
        r"tasks \['c'\] are not in the decomposition": lambda: swap_intercepts(
            bridge, {**swap_sets(6), "c": task(2, start=6, n=6)}, fit
        ),
        "made with intercept=False": lambda: swap_intercepts(bridge, swap_sets(6), plain),
        "have no entity in common": lambda: swap_intercepts(
            bridge, {"a": task(0, start=6, n=3), "b": task(1, start=9, n=3)}, fit
        ),
        "batch_size=0": lambda: swap_intercepts(bridge, swap_sets(6), fit, batch_size=0),
        "contrast=True needs the intercepts of two": lambda: MLPDecomposition.decode(
            single(fit), bridge, contrast=True
        ),
    }.items():
        with pytest.raises(ValueError, match=match):
            run()
    with pytest.raises(KeyError, match="no quantity 'x'"):
        InterceptSwap(fit.values, {}).table("x")
    training = fresh_bridge("gpt2")
    training.train()
    for run in (
        lambda: decompose_mlp(training, 1, {"a": task(0)}),
        lambda: swap_intercepts(training, swap_sets(6), fit),
    ):
        with pytest.raises(RuntimeError, match="training mode"):
            run()


def single(fit: MLPDecomposition) -> MLPDecomposition:
    return dataclasses.replace(fit, intercepts=fit.intercepts.isel(task=[0]))


def test_seen_entities_are_allowed_when_asked_for() -> None:
    bridge = tiny_bridge("gpt2")
    fit = decompose_mlp(bridge, 1, swap_sets(0), folds=2)
    assert swap_intercepts(bridge, swap_sets(0), fit, allow_seen=True).provenance["allow_seen"]
