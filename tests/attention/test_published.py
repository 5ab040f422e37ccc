"""Published files: readers, directed errors, what is computed from them. The tests write the files themselves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from interp.attention import (
    all_zero_samples,
    compare_scores,
    read_gates,
    read_head_scores,
    retrieval_scores,
    write_head_scores,
)
from interp.results import load
from tests.attention.planted import HALF, RETRIEVAL, planted_model, planted_needles

N_SAMPLES = 20
TOP = {(16, 19): 0.943, (11, 15): 0.920, (8, 26): 0.800, (6, 9): 0.618, (7, 12): 0.614, (17, 22): 0.557,
       (11, 2): 0.459, (6, 16): 0.437, (19, 15): 0.420, (21, 30): 0.400}  # fmt: skip
"""Means of the best heads of llama-2-7b-80k as published; six are at least 0.5."""


def published(path: Path, *, lost: int = 0) -> Path:
    """A file with the published counts of that model: 719 heads at 0, 272 below 0.1, 27 below 0.5, 6 from there on."""
    rng = np.random.default_rng(0)
    rest = [(a, b) for a in range(32) for b in range(32) if (a, b) not in TOP]
    rng.shuffle(rest)
    means = {**TOP, **dict.fromkeys(map(tuple, rest[:23]), 0.2), **dict.fromkeys(map(tuple, rest[23:295]), 0.02)}
    # two of the best heads and ten of the next are active in every sample: 12
    always = {(16, 19), (11, 15), *map(tuple, rest[:10])}
    table = {}
    for layer in range(32):
        for head in range(32):
            mean = means.get((layer, head), 0.0)
            scores = np.full(N_SAMPLES, mean)
            if mean and (layer, head) not in always:
                scores[0], scores[1] = 0, 2 * mean  # a sample without, and the mean stays
            if lost:
                scores[-lost:] = 0
            table[f"{layer}-{head}"] = scores.tolist()
    path.write_text(json.dumps(table))
    return path


def test_counts_best_heads_and_always_active_heads_are_recomputed(tmp_path: Path) -> None:
    scores = read_head_scores(published(tmp_path / "llama-2-7b-80k.json"))
    assert scores.values.sizes == {"layer": 32, "head": 32, "example": N_SAMPLES}
    assert scores.counts()["heads"].tolist() == [719, 272, 27, 6]
    assert scores.counts()["share"].round(4).tolist() == [0.7021, 0.2656, 0.0264, 0.0059]
    assert len(scores.retrieval_heads()) == 33
    assert scores.ranking()[:10] == list(TOP)
    best = scores.summary().head(10)["score"].to_numpy()
    assert np.abs(best - list(TOP.values())).max() < 0.0005
    assert len(scores.always_active()) == 12
    assert scores.mode == "official"
    assert scores.recall.isnull().all()
    assert scores.provenance["model"] == "llama-2-7b-80k"
    assert all_zero_samples(scores) == []
    with pytest.raises(ValueError, match="does not say how long"):
        scores.recall_map()
    assert scores.plot().data


def test_lost_needles_show_as_samples_of_zeros(tmp_path: Path) -> None:
    assert all_zero_samples(read_head_scores(published(tmp_path / "a.json", lost=2))) == [18, 19]


def test_subsets_of_samples_are_as_stable_as_they_are(tmp_path: Path) -> None:
    scores = read_head_scores(published(tmp_path / "a.json"))
    whole = scores.stability(N_SAMPLES, (10,), draws=3)
    assert whole["overlap"].tolist() == [1, 1]
    few = scores.stability(2, (10,), draws=50)
    assert few["overlap"].between(0.7, 1).all()
    with pytest.raises(ValueError, match="there are 20 prompts"):
        scores.stability(21)


def test_our_scores_are_written_in_the_published_format(tmp_path: Path) -> None:
    bridge, plan = planted_model(0)
    scores = retrieval_scores(bridge, planted_needles(2), mode="official")
    path = write_head_scores(scores, tmp_path / "ours" / "planted.json")
    data = json.loads(path.read_text())
    layer, head = plan.heads(HALF)[0]
    assert data[f"{layer}-{head}"] == [0.5, 0.5]
    again = read_head_scores(path)
    assert np.array_equal(again.values, scores.values)
    assert set(again.retrieval_heads()) == set(plan.heads(RETRIEVAL, HALF))
    assert load(again.save(tmp_path / "a.nc")).values.identical(again.values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: the released script leaves such a file when no sample passes its gate"),
        ("{}", "has no scores: the released script"),
        ('{"0-0": []}', "has no scores"),
        ("{'0-0': [1]}", "is not JSON"),
        ("[1, 2]", "holds a list"),
        ('{"L0H0": [1]}', "'L0H0': .* is not a head's scores"),
        ('{"0-0": [1, "a"]}', "is not a head's scores"),
        ('{"0-0": 1}', "is not a head's scores"),
        ('{"0-0": [1], "1-1": [1]}', "has 2 heads, but 2 layers of 2 heads would be 4; missing: 0-1, 1-0"),
        ('{"0-0": [1, 0], "0-1": [1]}', r"heads have 1 to 2 samples \(0-1 has 1\)"),
        ('{"0-0": [-1]}', "scores from -1.0 to -1.0"),
        ('{"0-0": [NaN]}', "expected finite ones"),
    ],
)
def test_bad_score_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_head_scores(path)
    with pytest.raises(FileNotFoundError, match="no head scores at"):
        read_head_scores(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a row of gates"),
        ("1\t0.5\n0.2\n", r"layers have \[1, 2\] heads"),
        ("1\tx\n", "line 1: could not convert"),
        ("1\tnan\n", "not finite"),
    ],
)
def test_bad_gate_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gates.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_gates(path)
    with pytest.raises(FileNotFoundError, match="no gates at"):
        read_gates(tmp_path / "none.tsv")


def gate_file(path: Path, gates: np.ndarray) -> Path:
    path.write_text("\n".join("\t".join(f"{gate:.18e}" for gate in row) for row in gates) + "\n")
    return path


def test_scores_and_gates_are_compared(tmp_path: Path) -> None:
    scores = read_head_scores(published(tmp_path / "a.json"))
    mean = scores.mean().values
    rng = np.random.default_rng(1)
    noisy = np.clip(mean + 0.001 * rng.random(mean.shape) + 0.6 * (mean >= 0.1), -0.0002, 1)
    gates = read_gates(gate_file(tmp_path / "gates.tsv", noisy))
    assert gates.share_above() == pytest.approx(33 / 1024)
    frame = compare_scores(scores, gates, top=(10, 33, 50)).set_index("statistic")
    assert frame.loc["top 10 with gate above 0.5", "value"] == 1
    assert frame.loc["top 33 with gate above 0.5", "value"] == 1
    assert frame.loc["top 50 with gate above 0.5", "value"] == pytest.approx(33 / 50)
    assert frame.loc["top 10 with gate above 0.5", "base"] == pytest.approx(33 / 1024)
    assert frame.loc["pearson", "value"] == pytest.approx(np.corrcoef(mean.ravel(), noisy.ravel())[0, 1], abs=1e-5)
    assert frame.loc["pearson", "low"] < frame.loc["pearson", "value"] < frame.loc["pearson", "high"]
    assert gates.plot().data
    assert load(gates.save(tmp_path / "g.nc")).values.identical(gates.values)
    same = compare_scores(scores, scores, top=(10,)).set_index("statistic")
    assert same.loc["spearman", "value"] == pytest.approx(1)
    assert same.loc["top 10 shared", "value"] == 1


def test_groups_share_a_gate(tmp_path: Path) -> None:
    """Four heads to a gate: a head has the gate of its group, a group the score of its best head."""
    scores = read_head_scores(published(tmp_path / "a.json"))
    grouped = scores.mean().values.reshape(32, 8, 4).max(-1)
    gates = read_gates(gate_file(tmp_path / "g.tsv", grouped))
    frame = compare_scores(scores, gates, top=(6,)).set_index("statistic")
    assert frame.loc["pearson", "value"] == pytest.approx(1)
    assert frame.loc["top 6 with gate above 0.5", "value"] == 1
    with pytest.raises(ValueError, match="cannot be compared with 31 layers"):
        compare_scores(scores, read_gates(gate_file(tmp_path / "h.tsv", grouped[:31])))
    small = read_head_scores(published(tmp_path / "b.json"))
    object.__setattr__(small, "values", small.values.isel(head=slice(0, 8)))
    with pytest.raises(ValueError, match="models of one shape"):
        compare_scores(scores, small)
