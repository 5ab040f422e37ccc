"""The Bigram-Backcopy task: tables counted by hand, laws against samples, exact risks, and the script that trains on
it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch

from interp.attention.backcopy import BackcopyTask, backcopy_task

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the cat sat on the mat and the rat ate the hat, then all that was left lay there\n" * 3 + "x"


@pytest.fixture(scope="module")
def training() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_backcopy", ROOT / "experiments" / "train_backcopy.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_text():
    task = backcopy_task(TEXT)
    assert list(task.characters) == sorted(set(TEXT))
    assert [task.characters[trigger] for trigger in task.triggers] == sorted(set(TEXT), key=lambda c: -TEXT.count(c))[
        :3
    ]
    for a, first in enumerate(task.characters):
        assert float(task.unigram[a]) == pytest.approx(TEXT.count(first) / len(TEXT))
        following = [TEXT[i + 1] for i in range(len(TEXT) - 1) if TEXT[i] == first]
        for b, second in enumerate(task.characters):
            share = following.count(second) / len(following) if following else TEXT.count(second) / len(TEXT)
            assert float(task.transitions[a, b]) == pytest.approx(share)  # "x" ends the text: the unigram
    assert (task.bos, task.n_vocab) == (len(task.characters), len(task.characters) + 2)


def test_sequences_copy_after_triggers_and_follow_the_table_elsewhere():
    task = backcopy_task(TEXT)
    tokens = task.sample(4096, 65, seed=0)
    trigger = task.is_trigger(tokens)
    assert (tokens[:, 0] == task.bos).all()
    assert not (trigger[:, 1:] & trigger[:, :-1]).any()
    rows, places = torch.nonzero(trigger[:, :-1], as_tuple=True)
    assert torch.equal(tokens[rows, places + 1], tokens[rows, places - 1])
    rows, places = torch.nonzero(~trigger[:, 1:-1], as_tuple=True)
    counts = torch.zeros(task.bos, task.bos, dtype=torch.float64)
    pairs = (tokens[rows, places + 1], tokens[rows, places + 2])
    counts.index_put_(pairs, torch.ones(len(rows), dtype=torch.float64), accumulate=True)
    seen = counts.sum(1, keepdim=True)
    error = (counts / seen.clamp_min(1) - task.transitions).abs()[seen[:, 0] > 0]
    assert (error < 5 * (0.25 / seen[seen[:, 0] > 0]).sqrt()).all()
    assert torch.equal(tokens, task.sample(4096, 65, seed=0))
    assert not torch.equal(tokens, task.sample(4096, 65, seed=1))


@pytest.mark.parametrize(("first", "skip"), [("generator", False), ("generator", True), ("unigram", False)])
def test_exact_risk_is_that_of_the_oracle_on_many_sequences(first, skip: bool):
    task = backcopy_task(TEXT)
    tokens = task.sample(4096, 64, seed=3)
    logits = task.oracle(tokens, first=first).clamp_min(1e-300).log()
    sampled = task.risks(logits, tokens, first=first, skip_first=skip)
    exact = task.oracle_risks(64, first=first, skip_first=skip)
    assert sampled.bigram == pytest.approx(exact.bigram, abs=0.003)  # the tolerance of the published figure
    assert sampled.backcopy == pytest.approx(0, abs=1e-9) and exact.backcopy == 0
    assert float(task.is_trigger(tokens).double().mean()) == pytest.approx(task.trigger_share(64), abs=0.005)


def test_exact_risk_by_enumeration_of_all_sequences():
    transitions = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    task = BackcopyTask(("a", "b", "c"), transitions, torch.tensor([0.5, 0.3, 0.2]).double(), (0,))
    entropy, mass, triggers = 0.0, 0.0, 0.0
    sequences = [((3, first), p) for first, p in ((1, 0.6), (2, 0.4))]  # BOS is 3; "a" never comes first
    for _ in range(3):
        sequences = [
            ((*s, n), p * (float(s[-2] == n) if s[-1] == 0 else float(transitions[s[-1], n])))
            for s, p in sequences
            for n in range(3)
        ]
    for sequence, probability in sequences:
        for token in sequence[1:]:
            quiet = token != 0
            entropy += probability * quiet * float(-(transitions[token] * transitions[token].log()).sum())
            mass += probability * quiet
            triggers += probability * (not quiet)
    assert task.oracle_risks(5, skip_first=True).bigram == pytest.approx(entropy / mass, rel=1e-6)
    assert task.trigger_share(5) == pytest.approx(triggers / 5, rel=1e-6)


def test_a_model_that_knows_nothing_has_the_risk_of_a_guess():
    task = backcopy_task(TEXT, triggers="ta")
    tokens = task.sample(8, 20, seed=0)
    risks = task.risks(torch.zeros(8, 20, task.n_vocab), tokens)
    assert risks == pytest.approx((torch.tensor(float(task.n_vocab)).log().item(),) * 2)


def test_training_brings_the_dormant_head(training):
    """The published criterion at a small size and 350 steps: what needs longer is held a little looser."""
    task = backcopy_task(training.text_of(None))
    _, course = training.train("softmax-adamw-1", task, steps=350, d_model=48, n_pos=24, batch=48, lr=5e-3)
    end, oracle = course.iloc[-1], task.oracle_risks(24, skip_first=True)
    assert end.bigram_risk < oracle.bigram + 0.1
    assert end.backcopy_risk < 0.015
    assert end.bos_attention_quiet > 0.8 and end.bos_attention_trigger < 0.1
    assert end.bos_value < 0.3 * end.median_value
    assert abs(end.bigram_no_attention - end.bigram_risk) < 0.03
    assert end.backcopy_no_attention - end.backcopy_risk > 4.5


def test_the_shipped_courses_meet_the_published_criterion():
    courses = pd.read_csv(ROOT / "data" / "backcopy" / "courses.csv")
    runs = pd.read_csv(ROOT / "data" / "backcopy" / "runs.csv").set_index("run")
    assert sum(file.stat().st_size for file in (ROOT / "data" / "backcopy").iterdir()) < 200_000
    last: Any = courses[courses["step"] == courses.groupby("run")["step"].transform("max")]
    ends = last[last["layer"] == 0].set_index("run")
    one = ends.loc["softmax-adamw-1"]
    assert one.bigram_risk < runs.oracle_bigram_risk["softmax-adamw-1"] + 0.05  # 0.02 at the published size
    assert one.backcopy_risk < 0.01
    assert one.bos_attention_quiet > 0.8 and one.bos_attention_trigger < 0.1
    assert one.bos_value < 0.3 * one.median_value
    assert abs(one.bigram_no_attention - one.bigram_risk) < 0.02
    assert one.backcopy_no_attention - one.backcopy_risk > 5
    relu = ends.loc["relu-adamw-1"]
    assert relu.backcopy_risk < 0.01
    assert relu.bos_attention_quiet < 0.05 and relu.bos_value > 0.3 * relu.median_value  # neither sink nor drain


def test_a_stopped_run_goes_on_as_if_it_had_not_been(training, tmp_path):
    task = backcopy_task(TEXT)
    sizes = {"steps": 20, "d_model": 16, "n_pos": 12, "batch": 4}
    for name in ("softmax-adamw-1", "relu-sgd-3"):
        _, whole = training.train(name, task, **sizes)
        state = tmp_path / f"{name}.pt"
        training.train(name, task, **sizes, state_file=state, stop_at=9)
        _, resumed = training.train(name, task, **sizes, state_file=state)
        assert whole.equals(resumed)
        assert whole["layer"].nunique() == int(name[-1])
    with pytest.raises(ValueError, match="is of another run"):
        training.train("relu-sgd-3", task, **{**sizes, "batch": 5}, state_file=state)
    with pytest.raises(ValueError, match="is of another run"):
        training.train("relu-sgd-3", backcopy_task(TEXT, n_triggers=2), **sizes, state_file=state)
    with pytest.raises(ValueError, match="expected attention-optimizer-layers"):
        training.train("gelu-adamw-1", task)


def test_relu_attention_is_causal_and_not_normalised(training):
    attention = training.Attention(8, "relu")
    pattern = attention.pattern(torch.randn(2, 5, 8))
    assert torch.equal(pattern, pattern.tril())
    assert (pattern >= 0).all() and not torch.allclose(pattern.sum(-1), torch.ones(2, 5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: backcopy_task("a"), "text of 1 characters"),
        (lambda: backcopy_task("abab", n_triggers=2), "n_triggers=2 of 2 characters"),
        (lambda: backcopy_task("abab", triggers=["z"]), r"triggers \['z'\] are not characters"),
        (lambda: backcopy_task("abab", triggers=["a", "b"]), "every character is a trigger"),
        (lambda: backcopy_task("abab", triggers=["a", "a"]), "distinct ids"),
        (lambda: backcopy_task(TEXT).sample(1, 1, seed=0), "length=1"),
        (lambda: backcopy_task(TEXT).oracle(torch.zeros(1, 3, dtype=torch.long)), "must begin with BOS"),
        (lambda: backcopy_task(TEXT).oracle_risks(1), "n_pos=1"),
        (lambda: backcopy_task("abc", n_triggers=1).oracle(torch.tensor([[3, 4]])), "ids 0 to 2"),
        (
            lambda: BackcopyTask(("a", "b"), torch.ones(2, 2).double(), torch.tensor([0.5, 0.5]).double(), (0,)),
            "sum to 1",
        ),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
