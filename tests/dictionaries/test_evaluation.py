"""The report against dictionaries whose numbers are known, and against sums written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import hooks, results
from interp.dictionaries._moments import Moments
from interp.dictionaries.evaluation import DEFINITIONS, DictionaryReport, evaluate
from interp.dictionaries.relu import ReLUSAE
from interp.dictionaries.topk import TopKSAE
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

HOOK = "blocks.1.hook_mlp_out"


def identity(width: int = D_MODEL, scale: float = 1.0) -> ReLUSAE:
    """Rebuilds `scale` times its input: a latent for every coordinate and sign."""
    sae = ReLUSAE(width, 2 * width, hook=HOOK)
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(scale * torch.cat([eye, -eye], 0))
    return sae


def constant(value: Tensor) -> ReLUSAE:
    sae = ReLUSAE(D_MODEL, 4, hook=HOOK, subtract_bias=False)
    with torch.no_grad():
        sae.W_dec.zero_()
        sae.b_enc.fill_(-100.0)
        sae.W_enc.zero_()
        sae.b_dec.copy_(value)
    return sae


def counted(bridge: Any, tokens: Tensor, skip: int = 1) -> Tensor:
    with torch.no_grad(), hooks.reads(bridge, HOOK) as found:
        bridge(tokens)
    return found[HOOK][:, skip:].flatten(0, 1)


def test_the_identity_the_mean_and_zero_have_the_values_they_must_have() -> None:
    """A10."""
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    x = counted(bridge, tokens)
    same = evaluate(identity(), bridge, tokens)
    assert same["explained_variance"] == pytest.approx(1, abs=1e-6) and same["l0"] == D_MODEL
    assert same["ce_score_zero"] == pytest.approx(1, abs=1e-4) and same["ce_score_mean"] == pytest.approx(1, abs=1e-4)
    assert same["kl_score_zero"] == pytest.approx(1, abs=1e-4) and abs(same["ce_rise"]) < 1e-5
    assert same["encoder_decoder_cosine"] == pytest.approx(1) and same["reconstruction_bias"] == pytest.approx(1)
    mean = evaluate(constant(x.mean(0)), bridge, tokens)
    assert abs(mean["explained_variance"]) < 1e-6 and abs(mean["ce_score_mean"]) < 1e-4 and mean["l0"] == 0
    assert mean["ce_spliced"] == pytest.approx(mean["ce_mean"], abs=1e-6) and mean["dead"] == 1
    nothing = evaluate(constant(torch.zeros(D_MODEL)), bridge, tokens)
    assert abs(nothing["ce_score_zero"]) < 1e-6 and abs(nothing["kl_score_zero"]) < 1e-6
    assert nothing["fvu"] > 1
    half = evaluate(identity(scale=0.5), bridge, tokens)
    assert half["reconstruction_bias"] == pytest.approx(0.5, abs=1e-6)
    assert half["l2_ratio"] == pytest.approx(0.5, abs=1e-6) and half["cosine"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_by_hand(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    sae = TopKSAE(D_MODEL, 24, k=3, hook=HOOK, decoder_norm=1.0)
    report = evaluate(sae, bridge, tokens, skip_first=2, batch_size=1)
    with torch.no_grad():
        clean = bridge(tokens).log_softmax(-1)

        def replace(x: Tensor) -> Tensor:
            new = x.clone()
            new[:, 2:] = sae(x[:, 2:])
            return new

        with hooks.interventions(bridge, {HOOK: replace}):
            changed = bridge(tokens).log_softmax(-1)
    at = slice(2, -1)
    ce = -changed[:, at].gather(-1, tokens[:, 3:, None])[..., 0]
    kl = (clean[:, at].exp() * (clean[:, at] - changed[:, at])).sum(-1)
    assert report["ce_spliced"] == pytest.approx(float(ce.mean()), rel=1e-5)
    assert report["kl_spliced"] == pytest.approx(float(kl.mean()), rel=1e-4)
    x = counted(bridge, tokens, 2)
    f = sae.encode(x).detach()
    assert report["l0"] == pytest.approx(float((f != 0).sum()) / len(x))
    assert np.allclose(report.density.values, (f != 0).float().mean(0).numpy())
    error = (x - sae(x)).detach().double().square().sum(1).mean()
    variance = (x - x.mean(0)).double().square().sum(1).mean()
    assert report["fvu"] == pytest.approx(float(error / variance), rel=1e-5)


def test_streams_equal_the_whole() -> None:
    draws = torch.Generator().manual_seed(0)
    f, y, r = (torch.randn(1000, width, generator=draws, dtype=torch.float64) for width in (6, 5, 5))
    f = f.relu()
    whole, stream = Moments(6, 5), Moments(6, 5)
    whole.add(f, y, r)
    for part in torch.arange(1000).split(37):
        stream.add(f[part], y[part], r[part])
    for name, value in whole.metrics().items():
        assert stream.metrics()[name] == pytest.approx(value, rel=1e-9), name
    assert np.allclose(whole.mean_activation, stream.mean_activation, rtol=1e-9)


def test_the_size_of_batches_changes_nothing() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = TopKSAE(D_MODEL, 24, k=3, hook=HOOK)
    one, all_ = (evaluate(sae, bridge, tokens, batch_size=size) for size in (1, len(tokens)))
    assert np.allclose(one.values, all_.values, rtol=2e-5, atol=2e-6)  # float32 forwards round differently
    assert np.array_equal(one.density, all_.density)


def test_padding_and_bos_are_left_out() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    sae = TopKSAE(D_MODEL, 24, k=3, hook=HOOK)
    short = evaluate(sae, bridge, tokens[:, :6])
    keep = torch.zeros_like(tokens, dtype=torch.bool)
    keep[:, :6] = True
    masked = evaluate(sae, bridge, tokens, keep=keep)
    for name in ("l0", "fvu", "ce_clean", "ce_spliced", "kl_spliced", "ce_mean"):
        assert masked[name] == pytest.approx(short[name], rel=1e-4), name
    assert short.provenance["n_tokens"] == 5 * len(tokens) and short.provenance["n_predictions"] == 4 * len(tokens)


def test_every_number_carries_its_definition_and_survives_a_file(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    report = evaluate(TopKSAE(D_MODEL, 24, k=3, hook=HOOK), bridge, tokens)
    for name in report.values.metric.values:
        assert report.definition(str(name)) == DEFINITIONS[str(name)]
    again = DictionaryReport.load(report.save(tmp_path / "report.nc"))
    assert np.array_equal(again.values, report.values, equal_nan=True) and again.provenance == report.provenance
    assert results.load(tmp_path / "report.nc").provenance["dictionary"]["k"] == 3
    low, high = report.interval("ce_rise")[1:]
    assert float(low) <= report["ce_rise"] <= float(high)
    assert float(report.interval("ce_score_mean")[0]) == pytest.approx(report["ce_score_mean"], rel=1e-4)
    figure = report.plot()
    assert "never fire" in figure.layout.title.text and sum(figure.data[0].y) == int((report.density > 0).sum())
    with pytest.raises(KeyError, match="there are l0"):
        report["loss"]
    with pytest.raises(ValueError, match="no interval"):
        report.interval("l0")


def test_what_cannot_be_measured_is_refused() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = TopKSAE(D_MODEL, 24, k=3, hook=HOOK)
    with pytest.raises(ValueError, match="no next token"):
        evaluate(sae, bridge, tokens, skip_first=tokens.shape[1] - 1)
    with pytest.raises(ValueError, match="no two neighbouring"):
        evaluate(sae, bridge, tokens, keep=torch.zeros_like(tokens, dtype=torch.bool))
    with pytest.raises(ValueError, match="another model or hook"):
        evaluate(TopKSAE(D_MODEL + 1, 24, k=3, hook=HOOK), bridge, tokens)
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(sae, bridge, tokens, batch_size=0)
