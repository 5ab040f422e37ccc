"""The report: planted heads get exactly their roles, every score is that of its own function, honest gaps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from interp import load_model
from interp.attention import (
    ROLES,
    HeadReport,
    attended_token_copying,
    composition_scores,
    copy_scores,
    head_report,
    ov_copying,
    pattern_scores,
)
from tests.attention import classic_heads
from tests.helpers import FAMILIES, N_HEADS, N_LAYERS, tiny_bridge, tiny_tokens


def planted_report(seed: int) -> tuple[HeadReport, dict[str, tuple[int, int]]]:
    bridge, places = classic_heads.planted_heads(seed)
    data = {"text": classic_heads.text(seed=seed), "repeated": classic_heads.repeats(seed=seed)}
    sequences = [list(range(2, classic_heads.D_VOCAB))]
    return head_report(bridge, **data, prompts=classic_heads.names(seed=seed), sequences=sequences), places  # pyright: ignore


@pytest.mark.parametrize("seed", range(6))
def test_planted_heads_get_their_roles_and_no_other_head_gets_one(seed: int) -> None:
    report, places = planted_report(seed)
    expected = {
        (f"L{layer}H{head}", role) for kind, (layer, head) in places.items() for role in classic_heads.ROLES[kind]
    }
    found = {(name, role) for role in ROLES for name in report.heads(role)}
    assert found == expected  # precision and recall 1.0
    table = report.table().set_index("name")
    layer, head = places["mover"]
    assert table.loc[f"L{layer}H{head}", "roles"] == "copying, name mover"
    assert report.provenance["left_out"] == {}


def repeated(n: int = 4) -> torch.Tensor:
    rows = torch.stack([3 + torch.randperm(50, generator=torch.Generator().manual_seed(i))[:8] for i in range(n)])
    return torch.cat([torch.zeros(n, 1, dtype=torch.long), rows, rows, rows], 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_score_is_that_of_its_own_function(family: str) -> None:
    bridge, text, lists = tiny_bridge(family), tiny_tokens(4, 12), repeated()
    report = head_report(bridge, text=text, repeated=lists)
    assert set(report.provenance["left_out"]) == {"indirect object", "successor"}
    once = lists[:, :9]
    expected = {
        "previous_token": pattern_scores(bridge, text, ["previous_token"]).mean("previous_token"),
        "induction": pattern_scores(bridge, lists, ["induction"]).mean("induction"),
        "duplicate_token": pattern_scores(bridge, lists, ["duplicate_token"]).mean("duplicate_token"),
        "copy": copy_scores(bridge, once).mean("copy"),
        "attended_token_copying": attended_token_copying(bridge, once).mean("attended_token_copying"),
        "ov_copying": ov_copying(bridge).mean("ov_copying"),
        "k_composition": composition_scores(bridge, "K", subtract_baseline=True).strongest(),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(report.estimate(name), values, atol=1e-6, err_msg=name)
    assert report.estimate("successor").isnull().all()
    bounds = report.values.sel(score="induction")
    assert bool((bounds.sel(bound="low") <= bounds.sel(bound="estimate")).all())
    assert len(report.table()) == N_LAYERS * N_HEADS
    assert "induction_low" in report.table(bounds=True).columns


def test_roles_follow_the_rules_given_and_extra_scores_take_part() -> None:
    bridge, text, lists = tiny_bridge("llama"), tiny_tokens(4, 12), repeated()
    mine = pattern_scores(bridge, text, ["first_token"]).values.sel(score="first_token", drop=True)
    report = head_report(
        bridge, text=text, repeated=lists, extra={"mine": mine}, roles={"some": {"mine": 0.1, "copy": -1}}
    )
    bounds = report.values.sel(score="mine")
    low, estimate = bounds.sel(bound="low").values, bounds.sel(bound="estimate").values
    assert report.heads("some") == [f"L{layer}H{head}" for layer, head in np.argwhere(low > 0.1)]
    # a threshold between the estimate and the lower end of the interval: the head is not surely above it
    layer, head = np.unravel_index((estimate - low).argmax(), low.shape)
    between = float(low[layer, head] + estimate[layer, head]) / 2
    careful = head_report(bridge, text=text, repeated=lists, extra={"mine": mine}, roles={"sure": {"mine": between}})
    assert f"L{layer}H{head}" not in careful.heads("sure")
    np.testing.assert_allclose(report.estimate("mine"), mine.mean("example"), atol=1e-6)


def test_on_an_embedded_model_everything_is_measured_in_one_call(tmp_path: Any) -> None:
    bridge = load_model("tinyworld-llama", check=False)
    report = head_report(bridge, n=4)
    again = head_report(bridge, n=4)
    assert report.values.identical(again.values)
    assert report.provenance["left_out"] == {}
    assert report.heads("induction") == ["L2H2", "L2H3", "L2H6", "L2H7"]
    assert "L3H6" in report.heads("subject reader")
    chance = report.chance.to_series()
    assert chance["copy"] == pytest.approx(5 / bridge.cfg.d_vocab, rel=1e-5)
    assert 0.02 < chance["induction"] < 0.05
    loaded = HeadReport.load(report.save(tmp_path / "report.nc"))
    assert loaded.roles.identical(report.roles)
    assert loaded.heads("induction") == report.heads("induction")
    assert report.plot().data
    assert report.plot(["induction", "copy"]).data


def test_what_is_refused() -> None:
    bridge, text, lists = tiny_bridge("gpt2"), tiny_tokens(4, 12), repeated()
    with pytest.raises(ValueError, match=r"the role 'odd' names scores \['oddness'\]; there are previous_token, "):
        head_report(bridge, text=text, repeated=lists, roles={"odd": {"oddness": 1}})
    with pytest.raises(ValueError, match="repeated says a token twice within its first"):
        head_report(bridge, text=text, repeated=torch.zeros(2, 8, dtype=torch.long))
    values = pattern_scores(bridge, text, ["previous_token"]).values
    with pytest.raises(
        ValueError, match=r"extra\['mine'\] has dimensions .*; expected \(layer, head\) or \(layer, head, example\)"
    ):
        head_report(bridge, text=text, repeated=lists, extra={"mine": values})
    with pytest.raises(ValueError, match=r"two scores are called \['induction'\]"):
        head_report(
            bridge, text=text, repeated=lists, extra={"induction": values.sel(score="previous_token", drop=True)}
        )
    with pytest.raises(KeyError, match="no role 'mover'; there is 'previous token'"):
        head_report(bridge, text=text, repeated=lists).heads("mover")
