from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp import metrics
from interp.metrics import ExampleMetric
from interp.prompts import Prompts

N, LENGTH, D_VOCAB = 5, 4, 11
ENDS = torch.tensor([3, 2, 0, 3, 1])


def make(ends: Tensor = ENDS) -> Prompts:
    tokens = torch.randint(0, D_VOCAB, (N, LENGTH), generator=torch.Generator().manual_seed(1))
    answers, foils = torch.tensor([0, 3, 10, 5, 5]), torch.tensor([1, 2, 4, 6, 7])
    return Prompts(tokens, tokens.flip(1), answers, foils, {"end": ends})


def make_logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(N, LENGTH, D_VOCAB, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sets(p: Prompts) -> ExampleMetric:
    right = [[int(a), 8] for a in p.answers]
    wrong = [[int(f), 9] for f in p.foils]
    return metrics.probability_difference(p, answers=right, foils=wrong)


SINGLE: dict[str, Callable[[Prompts], ExampleMetric]] = {
    "logit_difference": metrics.logit_difference,
    "answer_log_prob": metrics.answer_log_prob,
    "answer_prob": metrics.answer_prob,
    "answer_rank": metrics.answer_rank,
    "accuracy": metrics.accuracy,
    "probability_difference": sets,
    "kl_divergence": lambda p: metrics.kl_divergence(make_logits(9), positions=p.positions["end"]),
}
SMOOTH = [name for name in SINGLE if name not in ("answer_rank", "accuracy")]
EVERY = {**SINGLE, "kl_all_positions": lambda p: metrics.kl_divergence(make_logits(9))}


def by_hand(name: str, p: Prompts, logits: Tensor) -> Tensor:
    """Every metric written out for one example at a time."""
    out = []
    for i in range(N):
        at = logits[i, p.positions["end"][i]]
        answer, foil = int(p.answers[i]), int(p.foils[i])
        probabilities = at.exp() / at.exp().sum()
        reference = make_logits(9)[i, p.positions["end"][i]]
        q = reference.exp() / reference.exp().sum()
        out.append(
            {
                "logit_difference": at[answer] - at[foil],
                "answer_log_prob": probabilities[answer].log(),
                "answer_prob": probabilities[answer],
                "answer_rank": sum(x > at[answer] for x in at),
                "accuracy": float(at.argmax() == answer),
                "probability_difference": probabilities[[answer, 8]].sum() - probabilities[[foil, 9]].sum(),
                "kl_divergence": (q * (q / probabilities).log()).sum(),
            }[name]
        )
    return torch.tensor([float(x) for x in out], dtype=torch.float64)


@pytest.mark.parametrize("name", SINGLE)
@given(seed=st.integers(0, 100))
@settings(deadline=None, max_examples=10)
def test_values_are_those_written_out_by_hand(name: str, seed: int) -> None:
    p, logits = make(), make_logits(seed)
    metric = SINGLE[name](p)
    assert torch.allclose(metric(logits).double(), by_hand(name, p, logits), atol=1e-9)
    # what other positions say does not matter
    other = torch.randn_like(logits)
    other[torch.arange(N), ENDS] = logits[torch.arange(N), ENDS]
    assert torch.equal(metric(other), metric(logits))


@pytest.mark.parametrize("name", EVERY)
def test_select_scores_any_batch_of_examples(name: str) -> None:
    metric, logits = EVERY[name](make()), make_logits()
    whole = metric(logits)
    for rows in ([2], [4, 0, 0, 3], list(range(N)), [1] * 7):
        part = metric.select(torch.tensor(rows))
        assert torch.equal(part(logits[rows]), whole[rows])
        assert len(part) == len(rows)
    assert torch.equal(metric.select(slice(1, 3))(logits[1:3]), whole[1:3])
    mask = torch.tensor([True, False, False, True, False])
    assert torch.equal(metric.select(mask)(logits[mask]), whole[mask])
    twice = metric.select([3, 1, 4]).select([2, 0])
    assert torch.equal(twice(logits[[4, 3]]), whole[[4, 3]])
    if metric.positions is not None:
        assert torch.equal(metric.select([4, 0]).positions, ENDS[[4, 0]])  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=f"{metric.name} has 5 examples; cannot select rows"):
        metric.select([5])


@pytest.mark.parametrize("name", SINGLE)
def test_at_is_the_metric_on_logits_of_the_read_positions(name: str) -> None:
    metric, logits = SINGLE[name](make()), make_logits()
    assert metric.positions is not None
    assert torch.equal(metric.positions, ENDS)
    assert torch.equal(metric.at(logits[torch.arange(N), ENDS]), metric(logits))
    assert torch.equal(metric.select([3]).at(logits[[3], [3]]), metric(logits)[[3]])


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    metric, logits = SINGLE[name](make()), make_logits().requires_grad_()
    assert torch.autograd.gradcheck(metric, (logits,), atol=1e-6)
    (gradient,) = torch.autograd.grad(metric(logits).sum(), logits)
    read = torch.zeros(N, LENGTH, dtype=torch.bool)
    read[torch.arange(N), ENDS] = True
    assert (gradient[~read] == 0).all()
    assert (gradient[read].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_read_in_float32(dtype: torch.dtype) -> None:
    p = make()
    logits = make_logits(dtype=torch.float32).to(dtype)
    for name, build in SINGLE.items():
        value = build(p)(logits)
        # the reference of a KL divergence stays in its own, higher precision
        assert value.dtype == (torch.float64 if name == "kl_divergence" else torch.float32)
        assert torch.allclose(value, build(p)(logits.float()), atol=1e-6)
    assert metrics.logit_difference(p)(make_logits()).dtype == torch.float64
    # 256 + 1 and 256 both round to 256 in bfloat16 once subtracted there
    apart = torch.zeros(N, LENGTH, D_VOCAB, dtype=torch.bfloat16)
    apart[torch.arange(N), ENDS, p.answers] = 258.0
    apart[torch.arange(N), ENDS, p.foils] = -0.5
    assert metrics.logit_difference(p)(apart).tolist() == [258.5] * N


def test_names_and_units() -> None:
    p = make()
    built = {build(p).name: build(p).unit for build in EVERY.values()}
    assert built == {
        "logit_difference": "logits",
        "answer_log_prob": "nats",
        "answer_prob": "probability",
        "answer_rank": "rank",
        "accuracy": "fraction correct",
        "probability_difference": "probability",
        "kl_divergence": "nats",
    }


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    p, logits = make(), make_logits()
    for build in EVERY.values():
        assert torch.allclose(build(p)(logits + 7.5), build(p)(logits), atol=1e-9)


def test_kl_is_zero_with_zero_gradient_at_the_reference_and_positive_elsewhere() -> None:
    for metric in (EVERY["kl_divergence"](make()), EVERY["kl_all_positions"](make())):
        same = make_logits(9).requires_grad_()
        (gradient,) = torch.autograd.grad(metric(same).sum(), same)
        assert torch.allclose(metric(same), torch.zeros(N, dtype=torch.float64), atol=1e-12)
        assert gradient.abs().max() < 1e-12
        assert (metric(make_logits(3)) > 0.1).all()


def test_kl_over_all_positions_is_the_mean_of_the_positions() -> None:
    logits = make_logits(3)
    every = [metrics.kl_divergence(make_logits(9), positions=torch.full((N,), i))(logits) for i in range(LENGTH)]
    assert torch.allclose(EVERY["kl_all_positions"](make())(logits), torch.stack(every).mean(0))
    assert EVERY["kl_all_positions"](make()).positions is None


def test_kl_keeps_no_graph_of_its_reference() -> None:
    reference = make_logits(9).requires_grad_()
    assert not metrics.kl_divergence(reference)(make_logits(1)).requires_grad


def test_ties_and_nan_never_look_right() -> None:
    p = make()
    flat = torch.zeros(N, LENGTH, D_VOCAB)
    assert metrics.answer_rank(p)(flat).tolist() == [D_VOCAB - 1] * N
    assert metrics.accuracy(p)(flat).tolist() == [0.0] * N
    assert metrics.accuracy(p)(flat * torch.nan).tolist() == [0.0] * N
    flat[torch.arange(N), ENDS, p.answers] = 1.0
    assert metrics.accuracy(p)(flat).tolist() == [1.0] * N
    assert metrics.answer_rank(p)(flat).tolist() == [0.0] * N


def test_probability_difference_takes_its_sets_from_the_prompts() -> None:
    p = make()
    own = Prompts(
        p.clean, p.corrupted, p.answers, p.foils, p.positions,
        answer_sets=[[int(a), 8] for a in p.answers], foil_sets=[[int(f), 9] for f in p.foils],
    )  # fmt: skip
    assert torch.equal(metrics.probability_difference(own)(make_logits()), sets(p)(make_logits()))


@pytest.mark.parametrize(
    ("answers", "foils", "message"),
    [
        (None, None, r"these prompts carry none; pass answers=\[\[ids\]"),
        ([[1]] * 4, [[2]] * N, "answers has 4 sets but the prompts have 5 examples"),
        ([[1]] * N, [[2], [], [2], [], [2]], r"foils has empty sets in rows \[1, 3\]"),
        ([[1, 2]] * N, [[2]] * N, r"row 0: tokens \[2\] are both right and wrong"),
    ],
)
def test_probability_difference_refuses_sets_that_make_no_sense(answers: Any, foils: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.probability_difference(make(), answers=answers, foils=foils)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", SINGLE)
def test_logits_that_do_not_fit_are_refused_with_the_way_out(name: str) -> None:
    metric, logits = SINGLE[name](make()), make_logits()
    with pytest.raises(ValueError, match=r"the batch has 10 rows but this \w+ was built for 5.*metric.select\(rows\)"):
        metric(logits.repeat(2, 1, 1))
    with pytest.raises(ValueError, match=r"the batch has 2 rows .*metric.select\(rows\)"):
        metric.at(logits[:2, 0])
    with pytest.raises(ValueError, match=r"expects logits \[batch, pos, d_vocab\] but got shape \(5, 11\).*metric.at"):
        metric(logits[:, 0])
    with pytest.raises(ValueError, match=r"\.at expects the logits of one position per example.*\(5, 4, 11\)"):
        metric.at(logits)
    # an engine that unembedded the last position alone must say so: position 3 of one is not guessed
    with pytest.raises(ValueError, match=r"reads position 3 of row 0, but the logits have only 1 positions.*metric.at"):
        metric(logits[:, -1:])
    with pytest.raises(ValueError, match=r"token 10 but the logits have a vocabulary of 10|of shape \(5, 10\)"):
        metric(logits[..., :10])


@pytest.mark.usefixtures("unchecked")
def test_kl_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"reference_logits must be \[example, pos, d_vocab\] but has shape \(4, 11\)"):
        metrics.kl_divergence(make_logits()[0])
    with pytest.raises(
        ValueError, match=r"positions must hold one index per example, shape \(5,\), but has shape \(2,\)"
    ):
        metrics.kl_divergence(make_logits(), positions=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="positions run from 0 to 4; expected 0 to 3"):
        metrics.kl_divergence(make_logits(), positions=torch.tensor([0, 1, 2, 3, 4]))
    metric = EVERY["kl_all_positions"](make())
    with pytest.raises(ValueError, match=r"logits of shape \(5, 2, 11\) with a reference of shape \(5, 4, 11\)"):
        metric(make_logits()[:, :2])
    with pytest.raises(ValueError, match="reads all positions, so there is no single one to score"):
        metric.at(make_logits()[:, 0])


def test_prompts_without_an_end_are_refused() -> None:
    class Endless:
        answers, foils, positions = torch.tensor([1]), torch.tensor([2]), {"last": torch.tensor([0])}

    with pytest.raises(ValueError, match=r"name positions \['last'\] but not 'end'"):
        metrics.logit_difference(Endless())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_metrics_follow_the_logits_to_the_gpu(dtype: torch.dtype) -> None:
    p, logits = make(), make_logits(dtype=torch.float32).to(dtype)
    for build in EVERY.values():
        metric = build(p)
        there = metric(logits.cuda())
        assert there.is_cuda
        assert torch.allclose(there.cpu(), metric(logits), atol=1e-5)
        rows = torch.tensor([3, 0], device="cuda")
        assert torch.allclose(metric.select(rows)(logits.cuda()[rows]), there[rows])
