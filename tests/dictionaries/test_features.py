"""Reading features: output tokens against forwards, overlaps against counting, planted labels and contexts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from interp.dictionaries import (
    OutputTokens,
    auroc,
    feature_directions,
    group_overlaps,
    label_features,
    neuron_groups,
    output_tokens,
    read_features,
    token_rows,
)
from interp.dictionaries.reading import _document_draws, _weighted_auroc
from interp.hooks import hook_name, interventions, reads
from tests.helpers import D_MLP, D_MODEL, D_VOCAB, FAMILIES, N_LAYERS, tiny_bridge, tiny_tokens

LAST = N_LAYERS - 1


def components(n: int = 5, entries: int = 6, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(n, D_MLP, generator=torch.Generator().manual_seed(seed))
    return rows * (rows.abs() >= rows.abs().topk(entries, 1).values[:, -1:])


def effect_of_adding(bridge: Any, tokens: torch.Tensor, vector: torch.Tensor, step: float) -> torch.Tensor:
    """Change of the last position's logits, mean over the vocabulary taken out, by two forwards."""
    hook = hook_name("neuron", LAST)

    def logits(size: float) -> torch.Tensor:
        def add(post: torch.Tensor) -> torch.Tensor:
            new = post.clone()
            new[:, -1] += size * vector.to(post.dtype)
            return new

        with torch.no_grad(), interventions(bridge, {hook: add}):
            out = bridge(tokens)[0, -1].double()
        cap = float(getattr(bridge.cfg, "output_logits_soft_cap", -1.0) or -1.0)
        return cap * torch.atanh(out / cap) if cap > 0 else out  # a soft cap bends what the unembedding gave

    change = (logits(step) - logits(-step)) / (2 * step)
    return change - change.mean()


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_output_tokens_are_the_direction_in_which_logits_move(family: str) -> None:
    """Where no norm follows the MLP: the measured derivative is the read-out over the final norm's scale, up to what
    that norm takes out along the stream itself."""
    bridge, tokens = tiny_bridge(family, dtype=torch.float64), tiny_tokens(1, 6)
    found = output_tokens(bridge, LAST, components().double(), k=D_VOCAB)
    hook = hook_name("resid_post", LAST)
    with torch.no_grad(), reads(bridge, hook) as stream:
        bridge(tokens)
    here = stream[hook][0, -1].double()
    centred = here - here.mean() if family != "llama" else here
    scale = centred.pow(2).mean().sqrt()
    for i, row in enumerate(components().double()):
        unit = row / row.norm()
        written = feature_directions(bridge, LAST, unit[None])[0].double()
        measured = effect_of_adding(bridge, tokens, unit, 1e-2) * scale
        along = (written @ centred) / (centred @ centred)  # a norm removes the part along its input
        radial = effect_of_stream(bridge, centred)
        values = torch.zeros(D_VOCAB, dtype=torch.float64)
        ids = torch.from_numpy(found.ids.sel(feature=i, side="promoted").values.copy())
        values[ids] = torch.from_numpy(found.values.sel(feature=i, side="promoted").values.astype(float))
        torch.testing.assert_close(measured, values - along * radial, atol=2e-3, rtol=1e-3)


def effect_of_stream(bridge: Any, direction: torch.Tensor) -> torch.Tensor:
    from interp.neurons._sides import unembedding

    out = direction @ unembedding(bridge, fold=True).double()
    return out - out.mean()


@pytest.mark.parametrize("family", FAMILIES)
def test_both_ends_are_the_exact_extremes_and_ties_go_to_the_lowest_id(family: str) -> None:
    bridge = tiny_bridge(family)
    found = output_tokens(bridge, 1, components(), k=4)
    whole = output_tokens(bridge, 1, components(), k=D_VOCAB)
    assert (whole.values.sel(side="promoted").values == whole.values.sel(side="suppressed").values[:, ::-1]).all()
    assert (whole.values.diff("rank").sel(side="promoted") <= 0).all()
    np.testing.assert_allclose(whole.values.sel(side="promoted").mean("rank"), 0, atol=1e-5)
    np.testing.assert_allclose(whole.values.sel(side="promoted").std("rank", ddof=1), whole.spread, rtol=1e-4)
    assert (found.ids == whole.ids[..., :4]).all()
    assert found.words(0)[0] == f"w{int(found.ids[0, 0, 0])}" or int(found.ids[0, 0, 0]) < 3
    nothing = output_tokens(bridge, 1, torch.zeros(1, D_MLP), k=3)
    assert nothing.ids.values.tolist() == [[[0, 1, 2], [0, 1, 2]]]
    scaled = output_tokens(bridge, 1, 7 * components(), k=4)
    np.testing.assert_allclose(scaled.values, found.values, rtol=1e-4)  # of the unit feature


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_are_what_the_neurons_write(family: str) -> None:
    bridge = tiny_bridge(family)
    weight = bridge.blocks[1].mlp.W_out.detach()
    raw = feature_directions(bridge, 1, components(), fold=False)
    torch.testing.assert_close(raw, components() @ weight, atol=1e-5, rtol=1e-4)
    folded = feature_directions(bridge, 1, components())
    assert folded.shape == (5, D_MODEL)
    if family == "gemma2":  # the norm behind the MLP has a gain
        assert not torch.allclose(folded, raw, atol=1e-2)
    elif family == "llama":
        torch.testing.assert_close(folded, raw)
    with pytest.raises(ValueError, match="components have 47 columns and layer 1 has 48 neurons"):
        feature_directions(bridge, 1, components()[:, 1:])
    with pytest.raises(ValueError, match=f"k={D_VOCAB + 1}; expected 1 to {D_VOCAB}"):
        output_tokens(bridge, 1, components(), k=D_VOCAB + 1)


def test_groups_are_entries_above_a_share_of_the_largest() -> None:
    rows = torch.tensor([[0.0, 2.0, -1.0, 0.4], [0.0, 0.0, 0.0, 0.0]])
    assert neuron_groups(rows).tolist() == [[False, True, True, True], [False] * 4]
    assert neuron_groups(rows, share=0.3).tolist() == [[False, True, True, False], [False] * 4]
    with pytest.raises(ValueError, match=r"share=1; expected 0 <= share < 1"):
        neuron_groups(rows, share=1)


def test_overlaps_count_shared_neurons_beside_chance_and_agreement() -> None:
    rows = components(6, 8)
    rows[1] = rows[0]
    rows[2] = -rows[0]
    found = group_overlaps(rows)
    sets = [set(row.nonzero()[:, 0].tolist()) for row in rows]
    for i in range(6):
        for j in range(6):
            shared = sets[i] & sets[j]
            assert found.values.values[i, j] == len(shared)
            assert found.expected.values[i, j] == pytest.approx(64 / D_MLP)
            if i != j and shared:
                same = np.mean([bool(rows[i, n].sign() == rows[j, n].sign()) for n in shared])
                assert found.agreement.values[i, j] == pytest.approx(same)
    p = hypergeom.sf(7, D_MLP, 8, 8)
    assert found.q_value.values[0, 1] == pytest.approx(p * 15 / 3, rel=1e-3)  # three such pairs of fifteen
    assert np.isnan(np.diag(found.q_value.values)).all()
    assert {(0, 1), (0, 2), (1, 2)} == set(map(tuple, found.pairs(3)[["feature", "other"]].values.tolist()))
    assert found.pairs(3)["agreement"].sort_values().tolist() == [0, 0, 1]
    assert len(found.plot().data) > 0


def test_a_random_dictionary_shares_no_more_than_chance() -> None:
    wide = torch.randn(40, 400, generator=torch.Generator().manual_seed(0))
    wide = wide * (wide.abs() >= wide.abs().topk(20, 1).values[:, -1:])
    found = group_overlaps(wide)
    off = ~np.eye(40, dtype=bool)
    assert abs(found.values.values[off].mean() - 1.0) < 0.08
    assert np.nanmin(found.q_value.values) > 0.05


def test_resampled_auroc_is_auroc_when_nothing_is_resampled_and_repeats_what_is_drawn_twice() -> None:
    rng = np.random.default_rng(0)
    score, mask = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    plain = float(auroc(torch.from_numpy(score)[:, None], torch.from_numpy(mask)[:, None]))
    weights = rng.integers(0, 3, (2, 50)).astype(float)
    weights[0] = 1
    found = _weighted_auroc(score, mask, weights)
    assert found[0] == pytest.approx(plain)
    again = np.repeat(np.arange(50), weights[1].astype(int))
    repeated = auroc(torch.from_numpy(score[again])[:, None], torch.from_numpy(mask[again])[:, None])
    assert found[1] == pytest.approx(float(repeated))
    documents = torch.tensor([3, 3, 5, 5, 9])
    draws = _document_draws(documents, 100, 0)
    assert (draws[:, 0] == draws[:, 1]).all() and (draws[:, [0, 2, 4]].sum(1) == 3).all()


def test_labels_are_chosen_on_half_of_the_documents_and_scored_on_the_other() -> None:
    rng = torch.Generator().manual_seed(0)
    documents = torch.arange(600) // 10
    masks = {f"n{i}": torch.rand(600, generator=rng) < 0.2 for i in range(20)}
    truth = torch.stack(list(masks.values()), 1).float()
    planted = truth[:, :3] + 0.1 * torch.rand(600, 3, generator=rng)
    noise = torch.rand(600, 30, generator=rng)
    constant = torch.ones(600, 1)
    found = label_features(torch.cat([planted, noise, constant], 1), masks, documents)
    assert found["label"].tolist()[:3] == ["n0", "n1", "n2"]
    assert (found["auroc"][:3] == 1).all() and (found["precision"][:3] == 1).all()
    assert abs(found["auroc"][3:33].mean() - 0.5) < 0.03  # what was chosen by chance is worth nothing
    assert (found["low"][3:33] < 0.55).mean() > 0.9
    assert found.loc[33, ["label", "auroc", "low", "high", "precision", "base_rate"]].isna().all()
    with pytest.raises(ValueError, match="of at least 4 documents"):
        label_features(planted, masks, documents // 30)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reading_brings_contexts_neurons_tokens_and_labels_together(family: str) -> None:
    bridge, tokens, layer = tiny_bridge(family), tiny_tokens(8, 9), 1
    rows = token_rows(bridge, tokens, hook_name("neuron", layer), skip_tokens=[0])
    planted = (rows.ids == 7) | (rows.ids == 9)
    scores = torch.stack([planted.float(), rows.values[:, 3].clamp(min=0), torch.zeros(len(rows))], 1)
    found = read_features(bridge, layer, components(3), rows, scores, n_contexts=3, labels={"seven or nine": planted})
    frame = found.to_dataframe()
    assert set(frame.loc[0, "strongest_on"].split()[: int(planted.sum())]) <= {"w7", "w9"}
    assert frame.loc[0, "frequency"] == pytest.approx(float(planted.float().mean())) and frame.loc[2, "frequency"] == 0
    assert frame.loc[0, "neurons"] == 6
    largest = int(components(3)[0].abs().argmax())
    assert found.neurons[0][0] == (largest, pytest.approx(float(components(3)[0, largest])))
    row, pos = int(found.contexts.values.row[1, 0]), int(found.contexts.values.pos[1, 0])
    best = int(scores[:, 1].argmax())
    assert (row, pos) == (int(rows.row[best]), int(rows.position[best]))
    assert "<" in found.show(0)._repr_html_()
    with pytest.raises(ValueError, match=r"activations are \(64, 2\) for 64 rows and 3 features"):
        read_features(bridge, layer, components(3), rows, scores[:, :2])


def test_saved_and_loaded(tmp_path: Any) -> None:
    found = output_tokens(tiny_bridge("llama"), 1, components(), k=3)
    loaded = OutputTokens.load(found.save(tmp_path / "o.nc"))
    assert (loaded.ids.values == found.ids.values).all() and loaded.strings == found.strings
    assert len(found.to_dataframe()) == 5 * 2 * 3
    assert len(found.plot(1).data) > 0
