from __future__ import annotations

import pytest
import torch

from interp.metrics import logit_difference
from interp.patching import activation_patch, agreement, agreement_table, attribution_patch
from interp.prompts import Prompts
from tests.helpers import tiny_bridge, tiny_tokens


def test_the_table_holds_what_agreement_says_of_each_pair() -> None:
    bridge = tiny_bridge("llama")
    clean = tiny_tokens(4, 9)
    corrupted = clean.clone()
    corrupted[:, 3] = (clean[:, 3] - 3 + 11) % 57 + 3
    prompts = Prompts(clean, corrupted, torch.full((4,), 5), torch.full((4,), 8))
    metric = logit_difference(prompts)
    exact = {site: activation_patch(bridge, prompts, metric, site=site) for site in ("resid_pre", "q")}
    estimates = {
        "AtP": attribution_patch(bridge, prompts, metric, sites=("resid_pre", "q")),
        "frozen": attribution_patch(bridge, prompts, metric, sites="resid_pre", method="relp_ah"),
    }
    table = agreement_table(exact, estimates, k=3, n_resamples=200)
    assert list(table.columns) == ["method", "site", "statistic", "estimate", "low", "high"]
    assert set(map(tuple, table[["method", "site"]].values)) == {
        ("AtP", "resid_pre"),
        ("AtP", "q"),
        ("frozen", "resid_pre"),
    }
    one = agreement(exact["q"], estimates["AtP"]["q"], k=3, n_resamples=200)
    row = table.query("method == 'AtP' and site == 'q' and statistic == 'pearson'").iloc[0]
    assert row.estimate == pytest.approx(one.pearson)
    assert (row.low, row.high) == pytest.approx(one.interval("pearson"))
    with pytest.raises(ValueError, match=r"scores at \['q'\] but exact effects only at \['resid_pre'\]"):
        agreement_table({"resid_pre": exact["resid_pre"]}, estimates)
