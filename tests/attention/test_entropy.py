"""Entropies in closed form, and the detector of clean stripes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from interp.attention.entropy import attention_entropy, column_entropy, row_entropy
from interp.cache import capture
from interp.hooks import hook_name, interventions
from tests.attention.planted_sinks import plant, planted_bridge, planted_tokens
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens


def test_rows_in_closed_form():
    uniform = torch.ones(16, 16).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    assert np.allclose(row_entropy(uniform), [math.log(i) for i in range(1, 17)], atol=1e-5)
    assert (row_entropy(torch.eye(16)) == 0).all()
    # half of each row on a key that is not in the sequence: an even choice of two
    assert np.allclose(row_entropy(0.5 * torch.eye(16)), math.log(2), atol=1e-6)


def test_columns_in_closed_form():
    stripe = torch.zeros(16, 16)
    stripe[:, 0] = 1
    entropy = column_entropy(stripe)
    assert float(entropy[0]) == pytest.approx(math.log(16), abs=1e-5)
    assert entropy[1:].isnan().all()
    assert (column_entropy(torch.eye(16)) == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_means_of_the_formulas(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 20)
    found = attention_entropy(bridge, tokens, min_queries=5).values
    for layer in range(3):
        name = hook_name("pattern", layer)
        for row, pattern in enumerate(capture(bridge, tokens, name)[name].double().numpy()):
            for head in range(4):
                rows, columns = [], []
                for i in range(20):
                    p = pattern[head, i, : i + 1]
                    rows.append(-sum(x * math.log(x) for x in p if x > 0))
                for j in range(16):  # columns seen by at least 5 queries
                    c = pattern[head, j:, j] / pattern[head, j:, j].sum()
                    columns.append(-sum(x * math.log(x) for x in c if x > 0) / math.log(20 - j))
                cell = found.sel(layer=layer, head=head, example=row)
                assert float(cell.sel(measure="row")) == pytest.approx(np.mean(rows), abs=1e-4)
                normalised = np.mean([rows[i] / math.log(i + 1) for i in range(1, 20)])
                assert float(cell.sel(measure="row_normalised")) == pytest.approx(normalised, abs=1e-4)
                assert float(cell.sel(measure="column_normalised")) == pytest.approx(max(columns), abs=1e-4)
                later = [pattern[head, j + 1 :, j].mean() for j in range(16)]
                assert float(cell.sel(measure="key")) == int(np.argmax(later))


def test_stripes_are_the_planted_strong_sinks():
    bridge = planted_bridge()
    plants = plant(bridge, 1, 12)
    result = attention_entropy(bridge, planted_tokens(4, 1))
    found = result.stripes(row_below=0.25, column_above=0.98)
    strong = {(p.layer, p.head) for p in plants if p.kind == "bos" and p.logit > math.log(64) + 2}
    assert strong
    rows = set(zip(found["layer"], found["head"], strict=True))
    assert strong <= rows <= {(p.layer, p.head) for p in plants}
    at = found.set_index(["layer", "head"])["key"]
    assert all(at[cell] == 0 for cell in strong)
    part = attention_entropy(bridge, planted_tokens(4, 1), layers=[1])
    assert set(part.stripes(row_below=1, column_above=0)["layer"]) == {1}
    assert "entropy" in part.plot().layout.title.text


def test_mass_off_the_sequence_counts_as_one_more_key():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(1, 20)
    with interventions(bridge, {hook_name("pattern", 0): lambda old: 0.5 * torch.eye(20).expand_as(old)}):
        row = attention_entropy(bridge, tokens).values.sel(measure="row", layer=0)
    assert np.allclose(row, math.log(2), atol=1e-6)


@pytest.mark.parametrize("least", [1, 21])
def test_errors(least: int):
    with pytest.raises(ValueError, match=f"min_queries={least} must be 2 to 20"):
        attention_entropy(tiny_bridge("llama"), tiny_tokens(1, 20), min_queries=least)
