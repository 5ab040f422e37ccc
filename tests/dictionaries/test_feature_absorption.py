"""Absorption: dictionaries set by hand that absorb, split, or do neither."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.dictionaries import ReLUSAE, TokenRows, absorption
from interp.dictionaries.feature_absorption import DEFINITIONS
from tests.dictionaries.test_detection import made_rows

WIDTH, CHILDREN, N = 16, 4, 4000


@pytest.fixture(scope="module")
def world() -> tuple[TokenRows, torch.Tensor, torch.Tensor]:
    """Rows, the parent's mask, and the children's [token, child]: directions 0 (parent) and 1 to 4 (children, each on 4
    % of the parent's tokens, never two), beside others that have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    parent = torch.rand(N, generator=generator) < 0.3
    draw = torch.rand(N, generator=generator)
    children = torch.stack([parent & (draw >= 0.04 * i) & (draw < 0.04 * (i + 1)) for i in range(CHILDREN)], 1)
    x = (torch.rand(N, WIDTH, generator=generator) < 0.2).float()
    x[:, 0], x[:, 1 : 1 + CHILDREN] = parent.float(), children.float()
    return made_rows(x), parent, children


def by_hand(encoder: torch.Tensor, decoder: torch.Tensor) -> ReLUSAE:
    """A ReLU dictionary with these columns and rows, and no biases."""
    sae = ReLUSAE(WIDTH, len(decoder), hook="made")
    with torch.no_grad():
        sae.W_enc.copy_(encoder)
        sae.W_dec.copy_(decoder)
    return sae


def absorbing(carry: float = 1.0) -> ReLUSAE:
    """The parent's latent goes silent on children, whose latents write `carry` of the parent's direction."""
    encoder, decoder = torch.eye(WIDTH), torch.eye(WIDTH)
    encoder[1 : 1 + CHILDREN, 0] = -1.0
    decoder[1 : 1 + CHILDREN, 0] = carry
    return by_hand(encoder, decoder)


def test_a_planted_absorption_is_found_with_its_share_and_its_absorbers(world) -> None:
    rows, parent, children = world
    sae = absorbing()
    torch.testing.assert_close(sae(rows.values), rows.values)  # it rebuilds everything all the same
    found = absorption(sae, rows, {"parent": parent})
    got = {name: float(found.values.sel(statistic=name, label="parent")) for name in DEFINITIONS}
    share = float(children.any(1)[parent].float().mean())
    assert got["probe_f1"] == 1.0 and got["split"] == 1 and found.main.values[0, 0] == 0
    assert abs(got["absorbed"] - share) < 0.04 and 0.1 < share < 0.2
    assert got["silent"] == got["absorbed"]
    assert got["fraction"] == pytest.approx(got["absorbed"], abs=0.02)  # all of it where absorbed, nothing elsewhere
    counts = found.absorbers.values[0]
    assert (counts[1 : 1 + CHILDREN] > 0).all() and counts.sum() == counts[1 : 1 + CHILDREN].sum()
    assert counts.sum() == round(got["absorbed"] * got["tokens"])
    row = found.summary().iloc[0]
    assert row["main"] == [0] and row["absorber"] in range(1, 1 + CHILDREN) and row["times"] == counts.max()


def test_a_dictionary_that_keeps_the_parent_apart_absorbs_nothing(world) -> None:
    rows, parent, _ = world
    got = absorption(by_hand(torch.eye(WIDTH), torch.eye(WIDTH)), rows, {"parent": parent}).values.sel(label="parent")
    assert float(got.sel(statistic="absorbed")) == 0 and float(got.sel(statistic="silent")) == 0
    assert float(got.sel(statistic="fraction")) < 0.05  # the probe leans on the children a little: they tell the parent


@pytest.mark.parametrize("options", [{"min_share": 1.5}, {"min_cosine": 0.9}])
def test_silent_latents_that_nobody_stands_in_for_are_not_absorbed(world, options) -> None:
    rows, parent, _ = world
    got = absorption(absorbing(), rows, {"parent": parent}, **options).values.sel(label="parent")
    assert float(got.sel(statistic="silent")) > 0.1 and float(got.sel(statistic="absorbed")) == 0
    lost = absorption(absorbing(carry=0.0), rows, {"parent": parent}).values.sel(label="parent")
    assert float(lost.sel(statistic="silent")) > 0.1 and float(lost.sel(statistic="absorbed")) == 0


def test_a_concept_shared_by_two_latents_is_split_in_two(world) -> None:
    rows, _, _ = world
    x = rows.values.clone()
    label = torch.rand(N, generator=torch.Generator().manual_seed(5)) < 0.3
    half = torch.rand(N, generator=torch.Generator().manual_seed(6)) < 0.5
    x[:, 8], x[:, 9] = (label & half).float(), (label & ~half).float()
    found = absorption(by_hand(torch.eye(WIDTH), torch.eye(WIDTH)), made_rows(x), {"both": label})
    assert float(found.values.sel(statistic="split", label="both")) == 2
    assert sorted(found.main.values[0, :2].tolist()) == [8, 9] and (found.main.values[0, 2:] == -1).all()
    assert float(found.values.sel(statistic="f1_split", label="both")) == 1.0
    assert float(found.values.sel(statistic="f1_1", label="both")) < 0.8


def test_normalisation_and_folding_change_nothing(world) -> None:
    rows, parent, _ = world
    scaled = ReLUSAE(WIDTH, WIDTH, hook="made", normalisation="mean_square", decoder="rescaled")
    with torch.no_grad():
        scaled.estimate_normalisation(rows.values)
        scaled.W_enc.copy_(absorbing().W_enc)
        scaled.W_dec.copy_(absorbing().W_dec)
    a, b = (absorption(sae, rows, {"parent": parent}) for sae in (scaled, scaled.folded()))
    np.testing.assert_allclose(a.values.values, b.values.values, atol=1e-5)
    assert float(a.values.sel(statistic="absorbed", label="parent")) > 0.1


def test_bad_input_is_refused(world) -> None:
    rows, parent, _ = world
    transcoder = ReLUSAE(WIDTH, 8, hook="made", target_hook="elsewhere")
    with pytest.raises(ValueError, match="are not in one space"):
        absorption(transcoder, rows, {"parent": parent})
    with pytest.raises(ValueError, match="expected rows of its hook"):
        absorption(ReLUSAE(WIDTH, 8, hook="another"), rows, {"parent": parent})
    with pytest.raises(ValueError, match="max_split=9"):
        absorption(ReLUSAE(WIDTH, 8, hook="made"), rows, {"parent": parent}, max_split=9)
