"""Retrieval scores of models: planted heads, families against brute force, gate, stopping, results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.attention import Needle, Needles, RetrievalScores, retrieval_scores, score_rows
from interp.attention._decoding import answer_recall, decode, prefill
from interp.hooks import reads
from interp.results import load
from tests.attention.planted import ANSWER, DECOYS, HALF, RETRIEVAL, planted_model, planted_needles
from tests.helpers import FAMILIES, MORE_FAMILIES, fresh_bridge, tiny_bridge


def random_needles(n: int = 3, *, length: int = 24, vary: bool = False, answer: int = 4) -> Needles:
    """Random prompts with a span; nothing is there to be retrieved."""
    generator = torch.Generator().manual_seed(n)
    samples = []
    for i in range(n):
        tokens = torch.randint(3, 60, (length + 2 * i * vary,), generator=generator)
        tokens[0] = 0
        start = 2 + int(torch.randint(0, 8, (1,), generator=generator))
        span = (start, start + answer)
        samples.append(Needle(tokens, (start - 1, start + answer), span, tuple(tokens[start : start + answer].tolist()),
                              len(tokens), i / n))  # fmt: skip
    return Needles(tuple(samples), name="random", seed=n)


def greedy_rows(bridge: Any, sample: Needle, steps: int) -> tuple[list[Tensor], list[int]]:
    """Rows [step, head, src] of every layer and what is written, by whole forwards without any cache."""
    tokens, written = sample.tokens[None], []
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(len(bridge.blocks))]
    rows: list[list[Tensor]] = [[] for _ in names]
    for _ in range(steps):
        with torch.no_grad(), reads(bridge, names) as found:
            token = int(bridge(tokens)[0, -1].argmax())
        for kept, name in zip(rows, names, strict=True):
            row = found[name][0, :, -1]
            kept.append(torch.nn.functional.pad(row, (0, len(sample.tokens) + steps - row.shape[-1])))
        written.append(token)
        tokens = torch.cat([tokens, torch.tensor([[token]])], 1)
    return [torch.stack(kept) for kept in rows], written


@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gptj"])
@pytest.mark.parametrize("mode", ["official", "top_n", "mass", "ov"])
def test_scores_equal_brute_force_on_every_family(family: str, mode: Any) -> None:
    """Blocks of 7 positions, a cache and batches give what whole forwards give, sliding windows and groups included."""
    bridge, needles, steps = tiny_bridge(family), random_needles(vary=True), 5
    found = retrieval_scores(
        bridge, needles, mode=mode, top_n=6, gate=None, max_new_tokens=steps, stop=(), block=7, batch_size=2,
        target="needle",
    )  # fmt: skip
    for i, sample in enumerate(needles.samples):
        rows, written = greedy_rows(bridge, sample, steps)
        assert float(found.recall[i]) == pytest.approx(answer_recall(sample.answer, written))
        for layer, part in enumerate(rows):
            norms = None
            if mode == "ov":
                fed = torch.cat([sample.tokens, torch.tensor(written[:-1])])[None]
                with torch.no_grad(), reads(bridge, f"blocks.{layer}.attn.hook_v") as values:
                    bridge(fed)
                v = values[f"blocks.{layer}.attn.hook_v"][0]
                w = bridge.blocks[layer].attn.W_O
                v = v.repeat_interleave(len(w) // v.shape[1], dim=1)
                norms = torch.einsum("phd,hdm->hpm", v, w).norm(dim=-1)
                norms = torch.nn.functional.pad(norms, (0, part.shape[-1] - norms.shape[-1]))
            expected = score_rows(part, written, sample.tokens, sample.span, mode=mode, top_n=6, norms=norms)
            assert torch.allclose(torch.from_numpy(found.values.values[layer, :, i]), expected, atol=2e-5), layer


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_a_teacher_forced_pass_reads_the_same_rows(family: str) -> None:
    """Forced with what the model writes anyway, one forward over all steps gives the scores of step by step."""
    bridge, needles = tiny_bridge(family), random_needles(2)
    free = retrieval_scores(bridge, needles, mode="mass", gate=None, stop=(), max_new_tokens=4)
    samples = []
    for sample in needles.samples:
        past = prefill(bridge, sample.tokens[None, :-1])
        written, _ = decode(bridge, past, sample.tokens[-1:], 4)
        samples.append(Needle(sample.tokens, sample.span, sample.answer_span, tuple(written[0].tolist()), 24, 0.0))
    forced = retrieval_scores(bridge, Needles(tuple(samples)), mode="mass", forced=True, stop=())
    assert np.allclose(forced.values, free.values, atol=1e-5)
    assert (forced.recall == 1).all()


def test_planted_heads_score_1_a_half_and_0() -> None:
    bridge, plan = planted_model(0)
    needles = planted_needles(6)
    for mode in ("paper", "official"):
        scores = retrieval_scores(bridge, needles, mode=mode)
        for head in plan.heads(RETRIEVAL):
            assert scores.values.sel(layer=head[0], head=head[1]).values.tolist() == [1.0] * 6
        for head in plan.heads(HALF):
            assert scores.values.sel(layer=head[0], head=head[1]).values.tolist() == [0.5] * 6
        for head in plan.heads(*(role for role in DECOYS if role != "random")):
            assert not scores.values.sel(layer=head[0], head=head[1]).values.any(), plan.roles[head]
    assert (scores.recall == 1).all()
    assert scores.always_active() == [*plan.heads(RETRIEVAL), *plan.heads(HALF)]
    # the whole sentence has one token more, which is asked for and not written
    whole = retrieval_scores(bridge, needles, target="needle").mean()
    layer, head = plan.heads(RETRIEVAL)[0]
    assert float(whole.sel(layer=layer, head=head)) == pytest.approx(ANSWER / (ANSWER + 1))


def test_the_right_place_counts_only_if_its_token_is_written() -> None:
    bridge, plan = planted_model(3, copies=False)
    scores = retrieval_scores(bridge, planted_needles(2), gate=None)
    assert (scores.recall == 0).all()
    assert not scores.values.any()
    forced = retrieval_scores(bridge, planted_needles(2), gate=None, forced=True)  # the heads do look there
    layer, head = plan.heads(RETRIEVAL)[0]
    assert float(forced.mean().sel(layer=layer, head=head)) == 1
    with pytest.raises(ValueError, match=r"none of 2 prompts by more than gate=0.5 \(best 0.00, mean 0.00\)"):
        retrieval_scores(bridge, planted_needles(2))


def test_planted_heads_are_found_in_50_random_models() -> None:
    for seed in range(50):
        bridge, plan = planted_model(seed)
        scores = retrieval_scores(bridge, planted_needles(4, seed))
        assert set(scores.retrieval_heads(0.1)) == set(plan.heads(RETRIEVAL, HALF)), seed  # precision and recall 1.0


def test_a_wrong_span_is_what_makes_the_released_scores_wrong() -> None:
    """With the span of the copy that nobody attends to, the planted head scores 0: why spans must be exact."""
    bridge, plan = planted_model(1)
    moved = []
    for sample in planted_needles(2).samples:
        start = sample.labels["copy"]
        end = start + 1 + ANSWER
        moved.append(Needle(sample.tokens, (start, end), (start + 1, end), sample.answer, sample.length, 0.5))
    scores = retrieval_scores(bridge, Needles(tuple(moved))).mean()
    assert float(scores.sel(layer=plan.heads(RETRIEVAL)[0][0], head=plan.heads(RETRIEVAL)[0][1])) == 0
    assert [scores.sel(layer=a, head=b) for a, b in plan.heads("outside")] == [1]  # and a decoy is found


def test_stopping_early_finds_the_same_heads() -> None:
    bridge, plan = planted_model(2)
    needles = planted_needles(100)
    scores = retrieval_scores(bridge, needles, adaptive=True, look=20, batch_size=20)
    ran = scores.provenance["samples"]["run"]
    assert 20 < ran < 100  # 20 zeros do not yet rule out a mean of 0.1
    assert scores.provenance["adaptive"]["undecided"] == []
    assert set(scores.retrieval_heads()) == set(plan.heads(RETRIEVAL, HALF))
    assert scores.values.sizes["example"] == ran
    assert sorted(scores.values["example"].values.tolist()) != list(range(ran))  # drawn at random, kept by their number
    again = retrieval_scores(bridge, needles, adaptive=True, look=20, batch_size=7)
    assert np.array_equal(again.values, scores.values)


def test_no_tensor_of_the_whole_pattern_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patterns that the model makes while it reads in blocks of 4 are no larger than 4 rows."""
    bridge = tiny_bridge("llama")
    seen = []
    softmax = torch.nn.functional.softmax

    def watched(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(tensor.shape[-2])
        return softmax(tensor, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "softmax", watched)
    retrieval_scores(bridge, random_needles(2, length=40), gate=None, block=4)
    assert seen
    assert max(seen) <= 4


def test_hooks_and_state_are_left_as_found() -> None:
    bridge = fresh_bridge("gpt2")
    tokens = random_needles(2).samples[0].tokens[None]
    before = bridge(tokens)
    points = [point for point in bridge.hook_points() if point.fwd_hooks or point.bwd_hooks]
    retrieval_scores(bridge, random_needles(2), mode="ov", gate=None)
    with pytest.raises(ValueError, match="recalls the answer of none"):
        retrieval_scores(bridge, random_needles(2))
    assert [point for point in bridge.hook_points() if point.fwd_hooks or point.bwd_hooks] == points
    assert all(getattr(block.attn, "_pattern", None) is None for block in bridge.blocks)
    assert torch.equal(bridge(tokens), before)
    assert torch.is_grad_enabled()
    bridge.train()
    with pytest.raises(RuntimeError, match="training mode"):
        retrieval_scores(bridge, random_needles(2))


def test_results_keep_lengths_depths_and_recall(tmp_path: Path) -> None:
    bridge, _ = planted_model(4)
    samples = list(planted_needles(4).samples)
    broken = samples[1]
    tokens = broken.tokens.clone()
    tokens[-1] = 40  # the needle is not asked for
    samples[1] = Needle(tokens, broken.span, broken.answer_span, broken.answer, broken.length, 0.9)
    scores = retrieval_scores(bridge, Needles(tuple(samples)))
    assert scores.values["example"].values.tolist() == [0, 2, 3]
    assert scores.recall.values.tolist() == [1, 0, 1, 1]
    table = scores.recall_map()
    assert table.dims == ("depth", "length")
    assert table.values.ravel().tolist() == [1, 0]
    assert "layer" in scores.top(2)
    back = load(scores.save(tmp_path / "scores.nc"))
    assert isinstance(back, RetrievalScores)
    assert back.values.identical(scores.values)
    assert back.mode == "paper"
    assert back.recall_map().equals(table)
    frame = scores.summary()
    assert frame["score"].tolist()[:2] == [1.0, 0.5]
    assert (frame["low"] <= frame["score"]).all()
    for figure in (scores.plot(), scores.plot_recall(), scores.plot_activation(5)):
        assert figure.data
    counts = scores.counts()
    assert counts["heads"].sum() == 18
    assert counts["heads"].tolist()[-1] == 2
    mass = retrieval_scores(bridge, Needles(tuple(samples)), mode="mass")
    with pytest.raises(ValueError, match="every head has some"):
        mass.activation_frequency()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "top_n", "top_n": 0}, "top_n=0"),
        ({"look": 1}, "look=1"),
        ({"max_new_tokens": 60}, "context is 64"),
    ],
)
def test_what_cannot_be_scored_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        retrieval_scores(tiny_bridge("llama"), random_needles(2), **options)


def test_needles_of_another_tokenizer_are_refused() -> None:
    sample = Needle(torch.tensor([0, 5, 70, 6]), (1, 3), (1, 3), (5,), 4, 0.0)
    with pytest.raises(ValueError, match="sample 0 holds token 70"):
        retrieval_scores(tiny_bridge("llama"), Needles((sample,)))
