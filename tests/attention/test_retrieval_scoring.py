"""Scores of recorded rows: parity with the released scorer, bounds of the paper's, intervals and stopping."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.attention import LostNeedle, score_rows
from interp.attention._scoring import score_interval, undecided
from interp.stats import proportion_interval

N_POS = 30


def released(rows: Tensor, written: list[int], tokens: Tensor, span: tuple[int, int]) -> Tensor:
    """The released scorer, step by step and head by head."""
    layers, heads = rows.shape[1:3]
    scores = torch.zeros(layers, heads)
    start, end = span
    for step, token in enumerate(written):
        for layer in range(layers):
            for head in range(heads):
                place = int(rows[step, layer, head].argmax())
                if start <= place < end and int(tokens[place]) == token:
                    scores[layer, head] += 1 / (end - start)
    return scores


def recorded(seed: int, *, repeats: bool) -> tuple[Tensor, list[int], Tensor, tuple[int, int]]:
    """Rows that often look at the needle, and words that are often its tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(0, high, size, generator=generator)

    start, size = int(draw(20, (1,))), 2 + int(draw(6, (1,)))
    tokens = torch.randperm(50, generator=generator)[:N_POS] if not repeats else draw(6, (N_POS,))
    needle = tokens[start : start + size]
    if repeats:
        written = needle[draw(size, (12,))].tolist()
    else:
        written = [*needle[torch.randperm(size, generator=generator)].tolist(), 60, 61]
    rows = torch.rand(len(written), 2, 3, N_POS + 15, generator=generator)
    for step, token in enumerate(written):  # half of the heads look at a place that holds the token
        holds = [i for i in range(N_POS) if int(tokens[i]) == token]
        for head in range(3):
            if holds and int(draw(2, (1,))):
                rows[step, 0, head, holds[int(draw(len(holds), (1,)))]] += 1
    return rows / rows.sum(-1, keepdim=True), written, tokens, (start, start + size)


@pytest.mark.parametrize("repeats", [False, True])
def test_official_mode_is_the_released_scorer(repeats: bool) -> None:
    above_one = 0
    for seed in range(100):
        rows, written, tokens, span = recorded(seed, repeats=repeats)
        official = score_rows(rows, written, tokens, span, mode="official")
        assert torch.allclose(official, released(rows, written, tokens, span), atol=1e-6)
        above_one += int((official > 1).any())
        paper = score_rows(rows, written, tokens, span, mode="paper")
        assert paper.min() >= 0
        assert paper.max() <= 1
        if not repeats:
            assert torch.allclose(paper, official, atol=1e-6)
            assert official.max() > 0
    assert (above_one > 10) == repeats


def test_paper_mode_is_the_set_recall() -> None:
    for seed in range(50):
        rows, written, tokens, (start, end) = recorded(seed, repeats=True)
        paper = score_rows(rows, written, tokens, (start, end))
        needle = set(tokens[start:end].tolist())
        for layer in range(2):
            for head in range(3):
                places = rows[:, layer, head].argmax(-1).tolist()
                pasted = {w for w, p in zip(written, places, strict=True) if start <= p < end and int(tokens[p]) == w}
                assert float(paper[layer, head]) == pytest.approx(len(pasted & needle) / len(needle))


def test_a_lost_needle_scores_0_only_as_released() -> None:
    rows, written, tokens, _ = recorded(0, repeats=False)
    zeros = score_rows(rows, written, tokens, (-1, -1), mode="official")
    assert zeros.shape == (2, 3)
    assert not zeros.any()
    for mode in ("paper", "top_n", "mass"):
        with pytest.raises(LostNeedle, match="has no score"):
            score_rows(rows, written, tokens, (-1, -1), mode=mode)


def one_row(**weights: float | int) -> Tensor:
    row = torch.zeros(1, 6)
    for name, weight in weights.items():
        row[0, int(name[1:])] = weight
    return row


def test_each_mode_measures_what_it_says() -> None:
    """One step that writes token 12, which stands at position 2; the needle is positions 1 to 3; 5 is written text."""
    tokens = torch.tensor([10, 11, 12, 13, 12])
    span, written = (1, 4), [12]

    def score(row: Tensor, **options: object) -> float:
        return round(float(score_rows(row, written, tokens, span, **options)), 6)  # pyright: ignore

    right = one_row(p2=0.6, p0=0.4)
    assert score(right) == score(right, mode="official") == round(1 / 3, 6)
    assert score(one_row(p3=0.6, p2=0.4)) == 0  # a needle token that is not the one written
    assert score(one_row(p4=0.6, p2=0.4)) == 0  # the right token outside the needle
    assert score(one_row(p5=0.6, p2=0.4)) == 0  # what was written before
    second = one_row(p0=0.5, p2=0.3, p4=0.2)
    assert score(second) == 0
    assert score(second, mode="top_n", top_n=2) == round(1 / 3, 6)
    assert score(second, mode="top_n", top_n=1) == 0
    assert score(one_row(p0=0.5, p1=0.3, p2=0.2), mode="mass") == 0.5
    # half of the attention on a sink with a tenth of the norm: 0.5 * 1 / (0.5 * 1 + 0.5 * 0.1)
    norms = torch.tensor([0.1, 1, 1, 1, 1, 1])
    assert score(one_row(p0=0.5, p2=0.5), mode="ov", norms=norms) == round(0.5 / 0.55, 6)
    # steps that write no token of the needle do not count towards mass
    rows = torch.cat([one_row(p2=0.5, p0=0.5), one_row(p0=1)])
    assert float(score_rows(rows, [12, 99], tokens, span, mode="mass")) == 0.5
    assert float(score_rows(rows, [99, 99], tokens, span, mode="mass")) == 0
    # what follows the end was not written
    assert float(score_rows(torch.cat([right, right]), [-1, 12], tokens, span)) == 0


def test_scores_refuse_what_does_not_fit() -> None:
    rows, written, tokens, span = recorded(0, repeats=False)
    for options, message in (
        ({"mode": "top_n", "top_n": 0}, "top_n=0"),
        ({"mode": "ov"}, "needs norms="),
        ({"mode": "mass", "norms": rows[0]}, "belongs to mode='ov'"),
    ):
        with pytest.raises(ValueError, match=message):
            score_rows(rows, written, tokens, span, **options)
    with pytest.raises(ValueError, match="rows for 2 steps"):
        score_rows(rows[:2], written, tokens, span)


def test_intervals_cover_the_mean() -> None:
    """Of heads that rarely paste and of graded scores, 95 % intervals hold the true mean nearly that often."""
    rng = np.random.default_rng(0)
    rates = np.array([0.0, 0.02, 0.1, 0.5, 0.95, 1.0])
    for n in (20, 60):
        yes = (rng.random((500, len(rates), n)) < rates[:, None]).astype(float)
        graded = rng.beta(8, 2, (500, 1, n))  # mean 0.8, a small spread
        for values, truth in ((yes, rates), (graded, np.array([0.8]))):
            _, low, high = score_interval(values, 0.95)
            assert ((low <= truth) & (truth <= high)).mean(0).min() > 0.91
        _, low, high = score_interval(graded, 0.95)
        rate = 1.96 * np.sqrt(0.8 * 0.2 / n)
        assert (high - low).mean() < 1.5 * rate  # of 2: a small spread is worth more prompts
    for rate in (0, 1):  # Wilson's own interval where there is nothing but yes and no
        bound = proportion_interval(30 * rate, 30)
        found = [float(part[0]) for part in score_interval(np.full((1, 30), float(rate)), 0.95)]
        assert found == pytest.approx([rate, float(bound.low), float(bound.high)], abs=1e-9)
    bound = proportion_interval(6, 30)
    mixed = score_interval(np.array([[1.0] * 6 + [0.0] * 24]), 0.95)
    assert [float(part[0]) for part in mixed] == pytest.approx([0.2, float(bound.low), float(bound.high)], abs=0.005)
    estimate, low, high = score_interval(np.full((1, 30), 1.4), 0.95)  # official scores exceed 1
    assert low[0] < estimate[0] == pytest.approx(1.4) == high[0]


def test_stopping_decides_only_what_is_clear() -> None:
    rng = np.random.default_rng(0)
    options = {"threshold": 0.1, "precision": 0.05, "level": 0.95, "looks": 10}
    zeros, clear = np.zeros((1, 20)), (rng.random((1, 20)) < 0.9).astype(float)
    near = (rng.random((1, 20)) < 0.12).astype(float)
    values = np.concatenate([zeros, clear, near])
    assert undecided(values, **options).tolist() == [True, False, True]  # 20 zeros may still be a rate of 0.2
    assert undecided(np.zeros((1, 100)), **options).tolist() == [False]
    assert undecided(values[:, :1], **options).all()
    # wrong decisions over all looks, at a true mean of exactly the threshold from below
    wrong = 0
    for seed in range(100):
        stream = (np.random.default_rng(seed).random(200) < 0.06).astype(float)[None]
        for n in range(20, 201, 20):
            if not undecided(stream[:, :n], **options).any():
                wrong += int(stream[0, :n].mean() >= 0.1)
                break
    assert wrong <= 5
