"""k-sparse probing: planted latents, controls at chance, TransformerLens' own probe, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformer_lens.tools.analysis.sparse_probing import fit_sparse_probe

from interp.dictionaries import sparse_probing, token_rows
from interp.hooks import hook_name
from tests.dictionaries.test_detection import made_rows
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens


@pytest.fixture(scope="module")
def planted() -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Units, labels and latents: latent 3 is on where "one" is true, latents 5 and 7 each on half of "two"."""
    generator = torch.Generator().manual_seed(0)
    n = 600
    one, two = torch.rand(n, generator=generator) < 0.3, torch.rand(n, generator=generator) < 0.4
    half = torch.rand(n, generator=generator) < 0.5
    latents = 0.3 * torch.rand(n, 12, generator=generator)
    latents[:, 3] = one * 2.0
    latents[:, 5], latents[:, 7] = (two & half) * 2.0, (two & ~half) * 2.0
    units = latents @ torch.randn(12, 8, generator=generator) + torch.randn(n, 8, generator=generator)
    return units, {"one": one, "two": two}, latents


def test_a_planted_latent_is_chosen_and_tells_all_while_controls_stay_at_chance(planted) -> None:
    units, labels, latents = planted
    found = sparse_probing(made_rows(units), labels, {"planted": lambda rows: latents}, ks=(1, 2), seed=1)
    assert found.values.dims == ("representation", "k", "label", "arm", "metric")
    probe = found.values.sel(representation="planted", arm="latents")
    assert found.chosen.sel(representation="planted", k=1, label="one").values.tolist() == [3, -1]
    assert sorted(found.chosen.sel(representation="planted", k=2, label="two").values.tolist()) == [5, 7]
    np.testing.assert_array_equal(probe.sel(label="one").values, 1.0)
    assert float(probe.sel(label="two", k=1, metric="f1")) < 0.8  # half of it
    np.testing.assert_array_equal(probe.sel(label="two", k=2).values, 1.0)
    for arm in ("random latents", "shuffled labels"):
        chance = found.values.sel(representation="planted", arm=arm, metric="auroc", k=1).values
        assert (np.abs(chance - 0.5) < 0.3).all()
    assert float(found.values.sel(representation="neurons", arm="latents", label="two", k=1, metric="f1")) < 0.95


def test_scores_are_those_of_transformer_lens_on_held_out_documents(planted) -> None:
    units, labels, _ = planted
    rows = made_rows(units)
    found = sparse_probing(rows, labels, {"half": torch.eye(8)[:6]}, ks=(2,), max_negatives=None, seed=3)
    own = fit_sparse_probe(
        units[:, :6], labels["two"], k=2, groups=rows.row, preprocess="standardize", test_fraction=0.2, seed=3
    )
    here = found.values.sel(representation="half", label="two", arm="latents", k=2)
    assert float(here.sel(metric="accuracy")) == pytest.approx(own.metrics.accuracy, abs=1e-7)
    assert float(here.sel(metric="auroc")) == pytest.approx(own.metrics.roc_auc, abs=1e-7)
    assert not set(rows.row[own.train_indices].tolist()) & set(rows.row[own.test_indices].tolist())


def test_summary_is_the_mean_over_labels_with_an_interval(planted) -> None:
    units, labels, latents = planted
    found = sparse_probing(made_rows(units), labels, {"planted": lambda rows: latents}, ks=(1,))
    frame = found.summary("f1").set_index("representation")
    cells = found.values.sel(representation="planted", k=1, arm="latents", metric="f1").values
    assert frame.loc["planted", "f1"] == pytest.approx(cells.mean(), abs=1e-6)
    assert frame.loc["planted", "low"] <= cells.mean() <= frame.loc["planted", "high"]
    assert len(found.plot("f1").data)


def test_negatives_are_sampled_and_positives_all_kept(planted) -> None:
    units, labels, latents = planted
    found = sparse_probing(made_rows(units), labels, {"a": lambda rows: latents}, ks=(1,), max_negatives=50)
    assert float(found.values.sel(representation="a", label="one", arm="latents", metric="accuracy", k=1)) == 1.0
    assert found.provenance["max_negatives"] == 50 and found.provenance["positives"]["one"] == int(labels["one"].sum())


def test_bad_input_is_refused(planted) -> None:
    units, labels, latents = planted
    rows = made_rows(units)
    with pytest.raises(ValueError, match="none called 'neurons'"):
        sparse_probing(rows, labels, {})
    with pytest.raises(ValueError, match=r"ks=\(2, 1\); expected rising"):
        sparse_probing(rows, labels, {"a": torch.eye(8)}, ks=(2, 1))
    with pytest.raises(ValueError, match="asks for 9 latents; neurons has fewer"):
        sparse_probing(rows, labels, {"a": lambda r: latents}, ks=(9,))
    with pytest.raises(ValueError, match=r"gave \(3, 12\) for 600 rows"):
        sparse_probing(rows, labels, {"a": lambda r: latents[:3]})
    alone = torch.zeros(600, dtype=torch.bool)
    alone[:4] = True
    with pytest.raises(ValueError, match="'alone' is true in 1 documents"):
        sparse_probing(rows, {"alone": alone}, {"a": torch.eye(8)})


@pytest.mark.parametrize("family", FAMILIES)
def test_on_the_activations_of_a_model(family: str) -> None:
    bridge = tiny_bridge(family)
    tokens = tiny_tokens(6, 8)
    rows = token_rows(bridge, tokens, hook_name("mlp_out", 1))
    masks = {"even": tokens.flatten() % 2 == 0}
    found = sparse_probing(rows, masks, {"some": torch.eye(rows.values.shape[1])[:3]}, ks=(1,), n_random=1)
    assert np.isfinite(found.values.values).all() and found.provenance["hook"] == rows.hook
