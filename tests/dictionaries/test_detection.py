"""Detection: AUROC against pair counting, planted features, selection that must not leak, the undefined cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp.dictionaries import (
    TokenRows,
    assign_features,
    auroc,
    concept_score,
    detect_concepts,
    label_concept_scores,
    label_masks,
    sentence_maxima,
    token_rows,
)
from interp.dictionaries.concept_scores import CASES, STATISTICS
from interp.hooks import hook_name
from tests.helpers import D_HEAD, D_MLP, FAMILIES, N_HEADS, tiny_bridge, tiny_tokens


def made_rows(values: torch.Tensor, per_document: int = 10) -> TokenRows:
    """Rows as if documents of equal length had been run."""
    n = len(values)
    tokens = torch.arange(n).reshape(-1, per_document)
    row, position = torch.ones_like(tokens).nonzero(as_tuple=True)
    return TokenRows(values, tokens, row, position, "made", {"model": "made"})


def brute_auroc(scores: np.ndarray, labels: np.ndarray) -> float:
    above = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    return float(np.mean(above)) if above else float("nan")


def test_auroc_counts_pairs_with_ties_as_halves() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 5, (40, 6)).astype(float), rng.random((40, 3)) < 0.3
    found = auroc(torch.from_numpy(scores), torch.from_numpy(labels)).numpy()
    expected = [[brute_auroc(scores[:, u], labels[:, k]) for u in range(6)] for k in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_auroc_of_a_label_without_positives_or_negatives_is_nan_and_nan_scores_are_refused() -> None:
    scores = torch.randn(6, 2)
    labels = torch.tensor([[False, True, i < 3] for i in range(6)])
    found = auroc(scores, labels)
    assert found[:2].isnan().all() and not found[2].isnan().any()
    scores[0, 0] = torch.nan
    with pytest.raises(ValueError, match="1 scores are NaN"):
        auroc(scores, labels)
    with pytest.raises(ValueError, match="scores are of 6 tokens and labels of 5"):
        auroc(scores, labels[:5])


def test_assignment_gives_no_feature_twice() -> None:
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.2, 0.3]])
    assert assign_features(scores).tolist() == [1, 0]  # 0.8 + 0.9, not 0.9 + 0.3
    with pytest.raises(ValueError, match=r"scores are \(3, 2\), 0 of them NaN"):
        assign_features(scores.T.contiguous())


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_activations_of_kept_tokens_in_reading_order(family: str) -> None:
    bridge, tokens, hook = tiny_bridge(family), tiny_tokens(4, 7), hook_name("neuron", 1)
    tokens[1, 3:] = 1  # padding
    rows = token_rows(bridge, tokens, hook, skip_tokens=[0, 1], batch_size=2)
    _, cache = bridge.run_with_cache(tokens)
    kept = (tokens != 0) & (tokens != 1)
    assert torch.equal(rows.keep, kept)
    torch.testing.assert_close(rows.values, cache[hook][kept], atol=1e-5, rtol=1e-4)
    assert torch.equal(rows.ids, tokens[kept])
    grid = rows.grid(rows.values)
    assert grid.shape == (4, 7, D_MLP)
    assert torch.equal(grid.isnan().all(-1), ~kept)
    assert torch.equal(grid[kept], rows.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_several_axes_per_token_are_flattened_head_by_head(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 7)
    _, cache = bridge.run_with_cache(tokens)
    for site in ("z", "v"):
        hook = hook_name(site, 1)
        rows = token_rows(bridge, tokens, hook, skip_tokens=[0], batch_size=2)
        kept = cache[hook][tokens != 0]
        heads = [kept[:, head] for head in range(kept.shape[1])]
        torch.testing.assert_close(rows.values, torch.cat(heads, 1), atol=1e-5, rtol=1e-4)
        assert rows.grid(rows.values).shape == (3, 7, len(heads) * D_HEAD)


def test_rows_refuse_hooks_without_a_vector_per_token_and_nothing_left() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    square = tiny_tokens(2, N_HEADS)  # as many heads as positions: shapes alone do not tell
    pattern = hook_name("pattern", 0)
    for hook, given in ((pattern, tokens), (pattern, square), ("embed.hook_in", tokens)):
        with pytest.raises(ValueError, match="expected one vector per token"):
            token_rows(bridge, given, hook)
    with pytest.raises(ValueError, match="does not hold examples"):
        token_rows(bridge, tokens, "rotary_emb.hook_cos")
    with pytest.raises(KeyError, match="no hook point"):
        token_rows(bridge, tokens, "blocks.9.hook_mlp_out")
    with pytest.raises(ValueError, match="leaves no token of the 18"):
        token_rows(bridge, tokens, hook_name("neuron", 0), skip_tokens=range(60))
    rows = token_rows(bridge, tokens, hook_name("neuron", 0))
    with pytest.raises(ValueError, match="scores have 3 rows and there are 18 tokens"):
        rows.grid(torch.zeros(3, 2))


def test_label_masks_follow_labels_and_drop_rare_values() -> None:
    rows = made_rows(torch.zeros(20, 2))

    class Said:
        def __init__(self, role: str, topic: str | None) -> None:
            self.role, self.topic = role, topic

    labels = [
        [Said("noun" if p < 4 else "verb", "sea" if r == 0 and p == 2 else None) for p in range(10)] for r in (0, 1)
    ]
    labels[0][0] = None  # pyright: ignore
    masks = label_masks(rows, labels, fields=("role", "topic"), min_tokens=3)
    assert list(masks) == ["role=verb", "role=noun"]
    assert masks["role=noun"].tolist() == [False, True, True, True, *[False] * 6, *[True] * 4, *[False] * 6]
    with pytest.raises(ValueError, match="labels are of 1 documents and tokens of 2"):
        label_masks(rows, labels[:1])
    with pytest.raises(ValueError, match="no value of topic has 3 rows"):
        label_masks(rows, labels, fields=("topic",), min_tokens=3)
    with pytest.raises(ValueError, match="document 0 has 4 labels for 10"):
        label_masks(rows, [label[:4] for label in labels])


def planted(n: int = 400, d: int = 12, seed: int = 0) -> tuple[TokenRows, dict[str, torch.Tensor], torch.Tensor]:
    """Three concepts, each a direction of several neurons, whose size varies far more along other directions."""
    rng = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(99)))[0]
    truth = torch.rand(n, 3, generator=rng) < 0.2
    values = truth.float() @ axes[:3] + torch.randn(n, d - 3, generator=rng) @ axes[3:]
    values += 0.05 * torch.randn(n, d, generator=rng)
    return made_rows(values), {f"c{i}": truth[:, i] for i in range(3)}, axes


def test_planted_features_are_found_and_no_baseline_without_labels_reaches_them() -> None:
    (train, seen, axes), (test, unseen, _) = planted(seed=1), planted(seed=2)
    found = detect_concepts(train, test, seen, unseen, {"planted": [axes[:5], -axes[:5]], "others": [axes[3:8]]})
    best = found.mean().sel(k=1)
    assert (best.sel(detector="planted") > 0.99).all()  # either sign
    assert (found.chosen.sel(detector="planted", seed=0).values == [0, 1, 2]).all()
    assert float(best.sel(detector="others").mean()) < 0.6
    assert float(best.sel(detector="probe").min()) > 0.99
    assert float(best.sel(detector="DiffMeans").mean()) > 0.85
    for unsupervised in ("neurons", "random"):
        assert float(best.sel(detector=unsupervised).mean()) < 0.85
    frame = found.summary().set_index(["k", "detector"])
    assert frame.loc[(1, "others"), "gap_high"] < -0.3
    assert np.isnan(frame.loc[(1, "planted"), "p_value"]) and frame.loc[(1, "planted"), "minus_reference"] == 0
    assert (5, "probe") not in frame.index
    assert found.provenance["n_random"] == 5
    assert len(found.plot().data) > 0


def test_five_features_do_what_one_cannot() -> None:
    (train, seen, axes), (test, unseen, _) = planted(seed=3), planted(seed=4)
    turn = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    mixed = turn @ axes[:3]  # each concept needs all three
    found = detect_concepts(train, test, seen, unseen, {"mixed": [mixed]}, k=(1, 3), baselines=())
    assert float(found.values.sel(k=3).min()) > 0.99
    assert float(found.values.sel(k=1).mean()) < 0.97


def test_features_are_chosen_without_the_test_rows() -> None:
    """On labels that are noise the best of many features must score one half; chosen on the test rows it would not."""
    rng = torch.Generator().manual_seed(0)
    train, test = (made_rows(torch.randn(200, 60, generator=rng)) for _ in range(2))
    masks = [{f"n{i}": torch.rand(200, generator=rng) < 0.3 for i in range(30)} for _ in range(2)]
    found = detect_concepts(train, test, *masks, {"all": [torch.eye(60)]}, baselines=("probe", "DiffMeans"))
    for mean in found.values.mean(("seed", "label")).values.ravel():
        assert np.isnan(mean) or abs(mean - 0.5) < 0.03
    cheating = detect_concepts(test, test, masks[1], masks[1], {"all": [torch.eye(60)]}, k=(1,), baselines=())
    assert float(cheating.values.mean()) > 0.58


def test_what_is_not_in_the_test_rows_is_nan_and_arguments_are_checked() -> None:
    (train, seen, axes), (test, unseen, _) = planted(seed=1), planted(seed=2)
    none = {**unseen, "c1": torch.zeros(400, dtype=torch.bool)}
    found = detect_concepts(train, test, seen, none, {"planted": [axes]}, k=(1, 2))
    assert (
        found.values.sel(label="c1").isnull().all() and found.values.sel(label="c0", detector="planted").notnull().all()
    )
    assert int(found.summary()["labels"].max()) == 2
    run: Any = detect_concepts
    with pytest.raises(ValueError, match="no label is in both"):
        run(train, test, seen, {"other": unseen["c0"]}, {"planted": [axes]})
    with pytest.raises(ValueError, match=r"directions \(12, 11\); expected \[feature, 12\]"):
        run(train, test, seen, unseen, {"planted": [axes[:, 1:]]})
    with pytest.raises(ValueError, match="is empty; expected one encoder per seed"):
        run(train, test, seen, unseen, {"planted": []})
    with pytest.raises(ValueError, match="have the names of baselines"):
        run(train, test, seen, unseen, {"random": [axes]})
    with pytest.raises(ValueError, match=r"no baselines \['sae'\]"):
        run(train, test, seen, unseen, {"planted": [axes]}, baselines=("sae",))
    with pytest.raises(ValueError, match=r"k=\(0,\)"):
        run(train, test, seen, unseen, {"planted": [axes]}, k=(0,))
    with pytest.raises(ValueError, match=r"gave \(400,\) for 400 rows"):
        run(train, test, seen, unseen, {"planted": [lambda rows: rows[:, 0]]})
    with pytest.raises(ValueError, match="expected one bool for each of 400 tokens"):
        run(train, test, {**seen, "c0": seen["c0"].float()}, unseen, {"planted": [axes]})
    with pytest.raises(KeyError, match="no detector 'sae'"):
        found.summary("sae")


def test_sentence_maxima_are_the_largest_cosines_by_sentence() -> None:
    rng = torch.Generator().manual_seed(0)
    features, rows = torch.randn(3, 5, generator=rng), torch.randn(9, 5, generator=rng)
    rows[4] = 0
    sentence = torch.tensor([7, 7, 2, 2, 5, 7, 2, 2, 7])
    found = sentence_maxima(features, rows, sentence)
    cosine = torch.nan_to_num(torch.nn.functional.cosine_similarity(rows[:, None], features[None], dim=-1))
    expected = torch.stack([cosine[sentence == s].amax(0) for s in (2, 5, 7)])
    torch.testing.assert_close(found, expected)
    assert (found[1] == 0).all()  # the sentence of the zero activation
    with pytest.raises(ValueError, match="one sentence number per token"):
        sentence_maxima(features, rows, sentence[:3])


def test_concept_scores_are_log_ratios_and_say_where_there_is_none() -> None:
    on = torch.tensor([[0.8, 0.2, -0.1, -0.2], [0.6, 0.2, -0.3, -0.2], [0.7, 0.2, 0.1, -0.2]])
    off = torch.tensor([[0.1, -0.1, 0.2, -0.3], [0.3, 0.0, 0.2, -0.1]])
    found = concept_score(on, off)
    frame = found.to_dataframe()
    assert frame["case"].tolist() == list(CASES)
    assert frame.loc[0, "score"] == pytest.approx(np.log(0.7 / 0.2), abs=1e-6)
    assert frame.loc[0, "low"] < frame.loc[0, "score"] < frame.loc[0, "high"]
    assert frame.loc[1:, ["score", "low", "high"]].isna().all(axis=None)
    assert frame[["activating", "neutral", "difference", "auroc"]].notna().all(axis=None)
    assert frame["auroc"].tolist() == [1.0, 1.0, 0.0, 0.5]
    summary = found.summary()
    assert summary["defined"] == 0.25 and summary["above_zero_defined"] == 1.0 and summary["above_zero"] == 0.5
    assert list(found.values["statistic"].values) == list(STATISTICS)
    assert len(found.plot().data) > 0


def test_labels_stand_in_for_the_sentences() -> None:
    values = torch.zeros(40, 3)
    values[:, 2] = 1
    with_label = torch.zeros(40, dtype=torch.bool)
    with_label[[3, 25]] = True  # one token each of the first and the third document of ten tokens
    values[with_label, 0] = 2
    rows = made_rows(values)
    found = label_concept_scores(torch.eye(3)[[0, 2]], rows, {"it": with_label}, ["it", "it"])
    frame = found.to_dataframe()
    assert frame.loc[0, "activating"] == pytest.approx(2 / 5**0.5) and frame.loc[0, "neutral"] == 0
    assert frame["case"].tolist() == ["neutral mean not positive", "defined"]
    assert frame.loc[1, "score"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(KeyError, match=r"no labels \['that'\]"):
        label_concept_scores(torch.eye(3)[:1], rows, {"it": with_label}, ["that"])
    with pytest.raises(ValueError, match="4 of 4 documents have 'all'"):
        label_concept_scores(torch.eye(3)[:1], rows, {"all": torch.ones(40, dtype=torch.bool)}, ["all"])
    with pytest.raises(ValueError, match="1 names for 3 features"):
        label_concept_scores(torch.eye(3), rows, {"it": with_label}, ["it"])


def test_concept_scores_take_sentences_of_its_own_for_each_feature_and_check_them() -> None:
    together = concept_score(torch.full((3, 2), 0.5), torch.full((2, 2), 0.25))
    apart = concept_score([torch.full((3,), 0.5)] * 2, [torch.full((4,), 0.25), torch.full((2,), 0.25)])
    np.testing.assert_allclose(together.values.values, apart.values.values, atol=1e-6)
    with pytest.raises(ValueError, match="expected cosines"):
        concept_score(torch.full((3, 2), 2.0), torch.full((2, 2), 0.25))
    with pytest.raises(ValueError, match="of 2 features and neutral of 1"):
        concept_score(torch.zeros(3, 2), torch.zeros(3, 1))
    with pytest.raises(ValueError, match="at least one sentence"):
        concept_score(torch.zeros(0, 2), torch.zeros(3, 2))
