"""Massive activations, residual sinks and outlier metrics: planted spikes and the official formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.attention.massive import kurtosis, massive_activations, outlier_metrics, residual_sinks
from interp.cache import capture
from interp.hooks import hook_name, interventions
from interp.results import load
from tests.helpers import FAMILIES, tiny_bridge, tiny_tokens

SPIKES = {(0, 0, 5): 130.0, (0, 4, 31): -240.0, (1, 0, 5): 101.0, (1, 8, 0): 350.0}  # (example, pos, channel)


def spiked(spikes: dict[tuple[int, int, int], float], scale: float = 1.0) -> Tensor:
    """A stream [2, 9, 32] whose median magnitude is `0.1 * scale` in every row, with these spikes."""
    stream = torch.full((2, 9, 32), 0.1 * scale)
    stream[:, ::2] *= -1
    for place, value in spikes.items():
        stream[place] = value
    return stream


def measured(stream: Tensor, **options):
    bridge = tiny_bridge("llama")
    with interventions(bridge, {hook_name("resid_post", 2): lambda _old: stream}):
        return massive_activations(bridge, tiny_tokens(2, 9), **options)


def test_planted_spikes_are_listed_exactly():
    found = measured(spiked(SPIKES)).found()
    rows = dict(zip(zip(found["example"], found["pos"], found["d_model"], strict=True), found["value"], strict=True))
    assert rows == pytest.approx(SPIKES)
    assert set(found["state"]) == {3}
    assert found["ratio"].tolist() == pytest.approx([abs(v) / 0.1 for v in rows.values()], rel=1e-5)


@pytest.mark.parametrize(
    ("value", "scale", "expected"),
    [(101.0, 1.0, 1), (99.0, 0.5, 0), (101.0, 1.0 / 0.99, 0), (101.0, 1.01 / 1.0001, 1), (100.0, 0.5, 0)],
)  # both clauses met; 1 % below 100; 1 % above the median allowed; just at 1000 times it; 100 itself is not above 100
def test_one_percent_on_either_clause_decides(value: float, scale: float, expected: int):
    if scale == 1.0 / 0.99:
        scale *= 1.01  # median 0.102: 101 is 990 times it
    assert len(measured(spiked({(0, 3, 7): value}, scale)).found()) == expected


def test_a_clause_can_be_left_out():
    stream = spiked({(0, 3, 7): 60.0, (1, 2, 2): 150.0}, scale=10.0)  # 60 and 150 times the median of 1
    assert measured(stream, ratio=None, absolute=70).channels() == [2]
    assert sorted(measured(stream, absolute=None, ratio=50).channels()) == [2, 7]
    assert measured(stream, absolute=None, ratio=50).states() == [3]


@pytest.mark.parametrize("family", FAMILIES)
def test_top_and_median_are_those_of_the_streams(family: str, tmp_path):
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 7)
    result = massive_activations(bridge, tokens, batch_size=2)
    streams = [hook_name("resid_pre", 0), *(hook_name("resid_post", layer) for layer in range(3))]
    found = capture(bridge, tokens, streams)
    for state, name in enumerate(streams):
        magnitude = found[name].abs().flatten(1).sort(dim=1, descending=True).values
        for i in range(3):
            assert np.allclose(result.values.sel(state=state, statistic=f"top {i + 1}"), magnitude[:, i])
        assert np.allclose(
            result.values.sel(state=state, statistic="median"), found[name].abs().flatten(1).median(1)[0]
        )
    assert len(result.found()) == 0
    loaded = load(result.save(tmp_path / "massive.nc"))
    assert loaded.values.identical(result.values)
    assert len(loaded.places()) == 0  # pyright: ignore
    assert len(result.plot().data) == 4


def test_rows_of_every_batch_keep_their_number(tmp_path):
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(5, 6)
    whole, batched = (massive_activations(bridge, tokens, absolute=None, ratio=4, batch_size=n) for n in (None, 2))
    columns = ["example", "state", "pos", "d_model"]
    assert len(whole.found()) > 0
    assert set(map(tuple, whole.found()[columns].values)) == set(map(tuple, batched.found()[columns].values))
    assert load(whole.save(tmp_path / "m.nc")).found().equals(whole.found())  # pyright: ignore
    places = whole.places()
    assert places["n_examples"].sum() == len(whole.found())


def test_residual_sinks_are_the_tokens_with_a_dominant_channel():
    stream = spiked({(0, 4, 31): 100.0, (1, 0, 31): -100.0, (1, 6, 2): 100.0})
    bridge = tiny_bridge("llama")
    with interventions(bridge, {hook_name("resid_post", 2): lambda _old: stream}):
        result = residual_sinks(bridge, tiny_tokens(2, 9), [31, 5], threshold=5)
    rms = stream.square().mean(-1).sqrt()
    expected = stream[..., [31, 5]].abs().amax(-1) / rms
    assert np.allclose(result.values.sel(state=3), expected.T, rtol=1e-5)
    flags = result.flags().sel(state=3)
    assert [tuple(map(int, place)) for place in np.argwhere(flags.values.T == 1)] == [(0, 4), (1, 0)]
    assert result.plot().data[0].z.shape == (4, 9)


def official_kurtosis(x: Tensor, eps: float = 1e-6) -> Tensor:
    """As released: x is [batch, d]; torch's std is the unbiased one."""
    mu = x.mean(dim=1, keepdim=True)
    s = x.std(dim=1)
    mu4 = ((x - mu) ** 4.0).mean(dim=1)
    return mu4 / (s**4.0 + eps)


def test_kurtosis_is_the_official_formula():
    generator = torch.Generator().manual_seed(0)
    for scale in (0.01, 1.0, 30.0):
        x = scale * torch.randn(6, 5, 40, generator=generator, dtype=torch.double)
        x[0, 0, 0] = 50 * scale
        assert torch.allclose(kurtosis(x), official_kurtosis(x.flatten(1)), rtol=1e-6, atol=0)
    gaussian = torch.randn(1, 200_000, generator=generator)
    assert float(kurtosis(gaussian)) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_metrics_are_those_of_the_activations(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 7)
    result = outlier_metrics(bridge, tokens, batch_size=2)
    for site in ("attn_out", "mlp_out", "resid_post"):
        for layer in range(3):
            name = hook_name(site, layer)
            x = capture(bridge, tokens, name)[name].flatten(1).double()
            cell = result.values.sel(site=site, layer=layer)
            assert np.allclose(cell.sel(metric="inf_norm"), x.abs().amax(1), rtol=1e-6)
            assert np.allclose(cell.sel(metric="kurtosis"), official_kurtosis(x), rtol=1e-4)
    summary = result.summary().set_index("site")
    means = result.values.mean("example").sel(site="mlp_out")
    assert summary.loc["mlp_out", "inf_norm"] == pytest.approx(float(means.sel(metric="inf_norm").max()))
    assert summary.loc["mlp_out", "kurtosis"] == pytest.approx(float(means.sel(metric="kurtosis").mean()))
    assert len(result.plot().data) == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, t: massive_activations(b, t, absolute=None, ratio=None), "both None"),
        (lambda b, t: massive_activations(b, t, absolute=-1), "absolute=-1"),
        (lambda b, t: massive_activations(b, t, absolute=1e-6, ratio=None, max_found=10), "more than max_found=10"),
        (lambda b, t: residual_sinks(b, t, [99]), r"channels=\[99\]; expected at least one of 0 to 31"),
        (lambda b, t: residual_sinks(b, t, [1]), r"threshold=20.0 cannot be passed.*sqrt\(32\) = 5.7"),
        (lambda b, t: outlier_metrics(b, t, sites=[]), "sites is empty"),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(tiny_bridge("llama"), tiny_tokens(1, 9))
