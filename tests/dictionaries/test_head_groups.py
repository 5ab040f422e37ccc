"""Heads that serve planted groups, labels of planted latents, groups of labels by hand, counts against loops."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import results
from interp.dictionaries import (
    HeadPolysemanticity,
    ReLUSAE,
    TokenRows,
    head_polysemanticity,
    head_weights,
    label_groups,
    label_latents,
    random_latents,
)
from interp.dictionaries.head_groups import _counts, _latents_of, _shuffled
from tests.helpers import D_HEAD, FAMILIES, N_HEADS, tiny_bridge

HOOK = "blocks.1.attn.hook_z"
N_DOCUMENTS, PER_DOCUMENT = 80, 12
LABELS = ("a1", "a2", "a3", "b1", "c1", "c2")
GROUPS = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "c1": "c", "c2": "c"}
LATENTS = {0: ("a1", "a2", "a3"), 1: ("a1", "b1", "c1", "c2"), 2: (None, "b1"), 3: (None, None)}
"""What each head's latents fire on: head 0 serves one group, head 1 three, head 2 one beside noise, head 3 none."""


def planted(seed: int = 0, noise: float = 0.0) -> tuple[ReLUSAE, TokenRows, dict[str, Tensor]]:
    """A dictionary whose latents read, and write, one direction each inside one head, and rows on which each latent is
    on where its label is (or anywhere, for None)."""
    draw = torch.Generator().manual_seed(seed)
    n, served = N_DOCUMENTS * PER_DOCUMENT, [(head, label) for head, labels in LATENTS.items() for label in labels]
    topic = torch.randint(0, len(LABELS) + 2, (n,), generator=draw)
    masks = {label: topic == i for i, label in enumerate(LABELS)}
    sae = ReLUSAE(N_HEADS * D_HEAD, len(served) + 1, hook=HOOK)  # the last latent never fires
    values = torch.zeros(n, N_HEADS, D_HEAD)
    with torch.no_grad():
        for parameter in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec):
            parameter.zero_()
        for i, (head, label) in enumerate(served):
            on = torch.rand(n, generator=draw) < 0.15 if label is None else masks[label]
            values[:, head, i % D_HEAD] += on.float()
            sae.W_enc[head * D_HEAD + i % D_HEAD, i] = 1.0
            sae.W_dec[i, head * D_HEAD + i % D_HEAD] = 1.0
            sae.W_dec[i, ((head + 1) % N_HEADS) * D_HEAD] = 0.05
        sae.W_dec[-1, :D_HEAD] = 1.0  # all of head 0's, but dead
        sae.b_enc[:] = -0.5
    values += noise * torch.randn(values.shape, generator=draw)
    tokens = torch.zeros(N_DOCUMENTS, PER_DOCUMENT, dtype=torch.long)
    row, position = torch.ones_like(tokens).nonzero(as_tuple=True)
    return sae, TokenRows(values.flatten(1), tokens, row, position, HOOK, {}), masks


def measured(seed: int = 0, **options: Any) -> HeadPolysemanticity:
    sae, rows, masks = planted(seed)
    given = {"n": 4, "groups": GROUPS, "n_draws": 60, "choose": "largest"}
    return head_polysemanticity(tiny_bridge("gpt2"), sae, rows, masks, **{**given, **options})


@pytest.mark.parametrize("seed", range(4))
def test_planted_heads_serve_the_groups_that_they_were_given(seed: int) -> None:
    found = measured(seed)
    quantity = {name: found.values.sel(quantity=name).values.tolist() for name in ("labelled", "groups")}
    assert quantity == {"labelled": [3, 4, 1, 0], "groups": [1, 3, 1, 0]}
    effective = found.values.sel(quantity="effective").values
    shares = np.array([1, 1, 2]) / 4
    assert effective[:3] == pytest.approx([1, math.exp(-(shares * np.log(shares)).sum()), 1])
    assert np.isnan(effective[3])
    summary = found.summary().set_index("head")
    assert summary.loc[0, "which"] == "a 3" and set(summary.loc[1, "which"].split(", ")) == {"c 2", "a 1", "b 1"}
    assert summary.loc[3, "which"] == ""
    assert (summary["low"] <= summary["groups"]).all() and (summary["groups"] <= summary["high"]).all()
    assert found.polysemantic() == 0.5 and found.polysemantic(4) == 1.0
    served = found.served(2)
    assert served["label"].isna().sum() == 1 and set(served["group"].dropna()) == {"b"}
    assert 11 not in found.latents.values  # dead latents serve nobody
    assert np.isnan(found.p_values().sel(head=3)).all()


def test_labels_of_one_group_count_once_and_others_each() -> None:
    apart = measured(groups={})
    assert apart.values.sel(quantity="groups").values.tolist() == [3, 4, 1, 0]
    derived = measured(groups=None)  # disjoint masks: none belongs to another
    assert np.array_equal(derived.values, apart.values, equal_nan=True)
    assert derived.provenance["groups"] == {label: label for label in LABELS}


def test_the_largest_share_gives_a_latent_to_one_head_and_weight_to_several() -> None:
    sae, rows, masks = planted()
    by_weight = measured(choose="weight", n=5).latents
    weights = head_weights(tiny_bridge("gpt2"), sae)
    alive = set(range(11))
    for head in range(N_HEADS):
        order = [i for i in weights.latents(head, 12)["latent"] if i in alive][:5]
        assert by_weight.sel(head=head).values.tolist() == order
        own = measured().latents.sel(head=head).values.tolist()
        assert {i for i in own if i >= 0} == {i for i in alive if int(weights.values.values[i].argmax()) == head}
    shares = measured(choose="weight", n=5).shares
    assert float(shares.sel(head=1, rank=0)) == pytest.approx(float(weights.values.sel(head=1)[:11].max()))


def test_shuffled_labels_keep_each_heads_number_and_the_whole_pool() -> None:
    found = measured(n_draws=400)
    null = found.null.sel(null="shuffled")
    kept = null.sel(quantity="labelled")
    assert (kept == found.values.sel(quantity="labelled")).all()
    # of eight labels (4 a, 2 b, 2 c) dealt at random, three are of one group with chance C(4, 3) / C(8, 3)
    pool = Counter(GROUPS[label] for labels in LATENTS.values() for label in labels if label)
    alike = sum(math.comb(count, 3) for count in pool.values()) / math.comb(sum(pool.values()), 3)
    drawn = null.sel(quantity="groups", head=0)
    assert float((drawn == 1).mean()) == pytest.approx(alike, abs=4 * math.sqrt(alike * (1 - alike) / 400))
    fewer = float(found.p_values().sel(alternative="fewer", head=0))
    assert fewer == pytest.approx((int((drawn <= 1).sum()) + 1) / 401)
    more = float(found.p_values().sel(alternative="more", head=1))
    assert more == pytest.approx((int((null.sel(quantity="groups", head=1) >= 3).sum()) + 1) / 401)
    overall = found.overall().set_index("null")
    assert overall.loc["shuffled", "value"] == pytest.approx(5 / 4)
    assert overall.loc["shuffled", "expected"] == pytest.approx(float(null.sel(quantity="groups").mean()), abs=1e-5)
    mean = null.sel(quantity="groups").mean("head")
    assert overall.loc["shuffled", "p_fewer"] == pytest.approx((int((mean <= 1.25 + 1e-6).sum()) + 1) / 401)


def test_rotated_subspaces_keep_latents_and_lose_heads() -> None:
    """With one label per latent of a head and heads of one group each, rotations mix what heads keep apart."""
    null = measured(n_draws=80, choose="weight", n=3).null.sel(null="rotated")
    assert float(null.sel(quantity="labelled").max()) <= 3
    spread = null.sel(quantity="groups").values
    assert np.unique(spread).size > 1  # draws differ
    assert not np.array_equal(spread[:, 0], spread[:, 1])
    assert float(null.sel(quantity="groups", head=0).mean()) == pytest.approx(
        float(null.sel(quantity="groups", head=1).mean()), abs=0.35
    )  # subspaces have no numbers
    again = measured(n_draws=80, choose="weight", n=3).null
    assert np.array_equal(again.sel(null="rotated"), null, equal_nan=True)


def test_counts_against_a_loop() -> None:
    rng = np.random.default_rng(0)
    kind, found = rng.integers(0, 5, 40), rng.random(40) < 0.6
    weights = rng.random((40, 6))
    chosen = _latents_of(weights, rng.random(40) < 0.8, 7, "largest")
    counted = _counts(chosen, kind, found)
    for head in range(6):
        groups = [int(kind[i]) for i in chosen[head] if i >= 0 and found[i]]
        shares = [count / len(groups) for count in Counter(groups).values()]
        entropy = -sum(share * math.log(share) for share in shares)
        expected = [len(groups), len(set(groups)), math.exp(entropy) if groups else math.nan]
        assert counted[:, head] == pytest.approx(expected, nan_ok=True)


def test_shuffling_deals_the_labels_of_labelled_latents_and_no_others() -> None:
    rng = np.random.default_rng(0)
    kind, found = np.arange(40), rng.random(40) < 0.5
    chosen = np.stack([np.arange(0, 12), np.arange(8, 20), np.full(12, -1)])
    pool = [i for i in range(20) if found[i]]
    new = _shuffled(chosen, kind, found, rng)
    assert sorted(new[pool].tolist()) == pool and new[pool].tolist() != pool
    others = [i for i in range(40) if i not in pool]
    assert new[others].tolist() == others


def test_intervals_are_over_documents() -> None:
    """A label that rests on one document is not there in the draws without it."""
    sae, rows, masks = planted()
    found = head_polysemanticity(
        tiny_bridge("gpt2"), sae, rows, masks, n=4, groups=GROUPS, choose="largest", n_draws=100, min_fires=45
    )
    fires = np.array([entry["fires"] for entry in found.labels])
    assert ((fires > 45) & (fires < 75)).any()
    assert (found.low <= found.values).all() | np.isnan(found.values).any()
    assert float((found.high - found.low).sel(quantity="labelled").max()) >= 1


def test_labels_of_latents_are_chosen_on_one_half_and_scored_on_the_other() -> None:
    documents = torch.arange(40).repeat_interleave(10)
    even = documents % 2 == 0
    label = torch.zeros(400, dtype=torch.bool)
    label[::5] = True
    masks = {"x": label, "y": torch.roll(label, 1)}
    honest, turncoat, rare, dead = (torch.zeros(400) for _ in range(4))
    honest[label] = 2.0
    turncoat[even & label] = 1.0
    turncoat[~even & masks["y"]] = 1.0
    rare[label.nonzero()[:6, 0]] = 1.0
    rows = torch.stack([honest, turncoat, rare, dead, torch.roll(honest, 1)], 1)
    frame = label_latents(rows, masks, documents).set_index("latent")
    assert frame["label"].fillna("none").tolist() == ["x", "x", "x", "none", "y"]
    assert frame["found"].tolist() == [True, False, False, False, True]
    assert frame.loc[0, ["precision", "base_rate", "recall", "fires"]].tolist() == [1, 0.2, 1, 40]
    assert frame.loc[1, "precision"] == 0  # chosen on even documents, wrong on odd ones
    half = rows.clone()
    half[(~label).nonzero()[:80, 0], 0] = 1.0  # as often beside the label: precision one half, or less
    scored = label_latents(half, masks, documents, precision=0.4).loc[0]
    odd = ~even
    fired = (half[:, 0] != 0) & odd
    assert scored["precision"] == pytest.approx(float((fired & label).sum() / fired.sum()))
    assert scored["recall"] == pytest.approx(1)
    assert bool(scored["found"]) == (float(scored["precision"]) >= 0.4)
    assert not label_latents(rows, masks, documents, lift=6.0)["found"].any()  # base rate .2: no lift above 5
    assert not label_latents(rows, masks, documents, min_fires=41)["found"].any()
    sparse = label_latents(rows, masks, documents, min_fires=1).set_index("latent")
    assert bool(sparse.loc[0, "found"]) and not bool(sparse.loc[3, "found"])


def test_groups_of_labels_by_hand() -> None:
    n = 100

    def over(*tokens: int) -> Tensor:
        mask = torch.zeros(n, dtype=torch.bool)
        mask[list(tokens)] = True
        return mask

    family = over(*range(20))
    masks = {
        "role": over(*range(5)), "part": over(*range(4), 50), "most": over(*range(15), 60, 61, 62), "family": family,
        "other": over(*range(10, 30)), "everywhere": over(*range(90)), "twin": over(*range(70, 80)),
        "copy": over(*range(70, 80)), "apart": over(95, 96), "word": over(*range(40, 44)),
        "phrase": over(*range(40, 46)), "page": over(*range(30, 44)),
    }  # fmt: skip
    groups = label_groups(masks)
    assert groups == {
        "role": "family", "part": "family", "most": "family",
        "family": "family", "other": "other", "everywhere": "everywhere", "twin": "twin", "copy": "twin",
        "apart": "apart", "word": "phrase", "phrase": "phrase", "page": "page",
    }  # fmt: skip
    assert label_groups(masks, containment=0.9)["most"] == "most"
    wide = label_groups(masks, widest=1.0)
    assert wide["family"] == wide["role"] == wide["other"] == "everywhere" and wide["apart"] == "apart"
    with pytest.raises(ValueError, match="containment=0.4, widest=0.25; expected 0.5 < containment <= 1"):
        label_groups(masks, containment=0.4)


def test_random_latents_fire_as_often_and_along_other_directions(unchecked: None) -> None:
    values = torch.randn(300, 12, generator=torch.Generator().manual_seed(0)) + 3.0
    activations = torch.zeros(300, 5)
    for i, n in enumerate((0, 1, 17, 150, 300)):
        activations[:n, i] = 1.0
    drawn = random_latents(values, activations, seed=1)
    assert (drawn != 0).sum(0).tolist() == [0, 1, 17, 150, 300]
    assert (drawn >= 0).all()
    assert torch.equal(drawn, random_latents(values, activations, seed=1))
    assert not torch.equal(drawn, random_latents(values, activations, seed=2))
    on = drawn[:, 3] > 0
    fitted = torch.linalg.lstsq(torch.cat([values[on], torch.ones(150, 1)], 1), drawn[on, 3:4])
    assert float((torch.cat([values[on], torch.ones(150, 1)], 1) @ fitted.solution - drawn[on, 3:4]).abs().max()) < 1e-3
    with pytest.raises(ValueError, match="values are of 300 tokens and activations of 4"):
        random_latents(values, activations[:4])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_and_keeping(family: str, tmp_path: Path) -> None:
    bridge = tiny_bridge(family)
    sae, rows, masks = planted(noise=0.05)
    found = head_polysemanticity(bridge, sae, rows, masks, n=3, groups=GROUPS, n_draws=20)
    assert found.values.sizes["head"] == N_HEADS and found.null.shape == (2, 3, 20, N_HEADS)
    again = results.load(found.save(tmp_path / "heads.nc"))
    assert isinstance(again, HeadPolysemanticity)
    assert np.array_equal(again.values, found.values, equal_nan=True) and again.labels == found.labels
    assert np.array_equal(again.latents, found.latents) and again.latents.dtype.kind == "i"
    assert again.summary().equals(found.summary())
    kinds = {trace.name for trace in again.plot().data}
    assert kinds == {"heads", "shuffled", "rotated"}
    assert {trace.name for trace in again.plot("effective").data} == kinds


def test_what_is_refused(unchecked: None) -> None:
    bridge, (sae, rows, masks) = tiny_bridge("gpt2"), planted()
    other = TokenRows(rows.values, rows.tokens, rows.row, rows.position, "blocks.0.attn.hook_z", {})
    with pytest.raises(ValueError, match="reads 'blocks.1.attn.hook_z' and the rows are of 'blocks.0.attn.hook_z'"):
        head_polysemanticity(bridge, sae, other, masks)
    with pytest.raises(ValueError, match="choose='best', n=10"):
        head_polysemanticity(bridge, sae, rows, masks, choose="best")  # pyright: ignore
    with pytest.raises(ValueError, match="none of the 11 latents of these heads has a label with precision=1.1"):
        head_polysemanticity(bridge, sae, rows, masks, precision=1.1)
    with pytest.raises(ValueError, match="no head has 9 labelled latents; they have at most 4"):
        measured().polysemantic(9)
    with pytest.raises(ValueError, match="documents has 960 entries, 1 different"):
        label_latents(torch.ones(960, 2), masks, torch.zeros(960, dtype=torch.long))
    with pytest.raises(ValueError, match="no labels: masks is empty"):
        label_groups({})
