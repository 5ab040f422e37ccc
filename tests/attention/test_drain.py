"""Norms, value drain and the decomposition of logits, against loops over patterns, values, queries and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interp.attention.drain import qk_decomposition, sink_drain
from interp.attention.norms import norm_profile
from interp.cache import capture
from interp.hooks import hook_name, interventions
from interp.results import load
from tests.helpers import D_HEAD, FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens


def captured(bridge, tokens, layer: int):
    names = [hook_name(site, layer) for site in ("pattern", "v", "k")]
    found = capture(bridge, tokens, names)
    return [found[name].double() for name in names]


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_are_those_of_the_activations(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 7)
    profile = norm_profile(bridge, tokens)
    streams = [hook_name("resid_pre", 0), *(hook_name("resid_post", layer) for layer in range(3))]
    found = capture(bridge, tokens, streams)
    for state, name in enumerate(streams):
        expected = found[name].norm(dim=-1).T
        assert np.allclose(profile.values.sel(state=state), expected, rtol=1e-5)
    for layer in range(3):
        _, v, k = captured(bridge, tokens, layer)
        assert np.allclose(profile.value.sel(layer=layer), v.norm(dim=-1).permute(2, 1, 0), rtol=1e-5)
        assert np.allclose(profile.key.sel(layer=layer), k.norm(dim=-1).permute(2, 1, 0), rtol=1e-5)
        weight = bridge.blocks[layer].attn.W_O.double()  # [head, d_head, d_model]
        for head in range(4):
            written = v[:, :, head // (4 // v.shape[2])] @ weight[head]
            assert np.allclose(profile.output.sel(layer=layer, head=head), written.norm(dim=-1).T, rtol=1e-4)


def test_keys_are_taken_after_their_own_norm():
    bridge, tokens = tiny_bridge("qwen3"), tiny_tokens(1, 6)
    normed = capture(bridge, tokens, "blocks.1.attn.hook_k_normed")["blocks.1.attn.hook_k_normed"]
    profile = norm_profile(bridge, tokens)
    assert np.allclose(profile.key.sel(layer=1, example=0), normed[0].norm(dim=-1), rtol=1e-5)


def test_ratio_peaks_and_profile(tmp_path):
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 9)

    def lift(stream: torch.Tensor) -> torch.Tensor:
        new = stream.clone()
        new[:, 3] = 5000 * new[:, 3] / new[:, 3].norm(dim=-1, keepdim=True)
        return new

    with interventions(bridge, {hook_name("resid_post", 2): lift}):
        profile = norm_profile(bridge, tokens)
    peaks = profile.peaks(5)
    assert peaks[["state", "pos"]].values.tolist() == [[3, 3]]
    assert peaks["norm"].item() == pytest.approx(5000, rel=1e-5)
    norms = profile.values.sel(state=3)
    expected = 5000 / norms.where(norms.pos != 3).mean("pos")
    assert np.allclose(profile.ratio("residual", 3).sel(state=3), expected, rtol=1e-5)
    table = profile.profile("residual", 3).set_index(["state", "position"])
    assert table.loc[(3, "position 3"), "norm"] == pytest.approx(5000, rel=1e-5)
    assert (table["low"] <= table["norm"] + 1e-6).all()
    assert load(profile.save(tmp_path / "norms.nc")).output.identical(profile.output)  # pyright: ignore
    assert profile.plot("value").layout.title.text == "Value norm"
    assert profile.plot_ratio("output").data[0].z.shape == (3, 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_drain_equals_loops(family: str):
    bridge, tokens, key = tiny_bridge(family), tiny_tokens(2, 8), 1
    drain = sink_drain(bridge, tokens, key=key)
    for layer in range(3):
        pattern, v, _ = captured(bridge, tokens, layer)
        weight = bridge.blocks[layer].attn.W_O.double()
        for head in range(4):
            own = v[:, :, head // (4 // v.shape[2])]
            for row in range(2):
                a, value = pattern[row, head], own[row]
                mass = [float(a[i, key]) for i in range(key + 1, 8)]
                share, ratio = [], []
                for i in range(key + 1, 8):
                    part = float(a[i, key] * value[key].norm())
                    share.append(part / sum(float(a[i, j] * value[j].norm()) for j in range(8)))
                    ratio.append(part / float((a[i, :, None] * value).sum(0).norm()))
                others = [j for j in range(8) if j != key]
                written = value @ weight[head]
                expected = {
                    "mass": np.mean(mass),
                    "contribution": np.mean(share),
                    "ratio": np.mean(ratio),
                    "variation": np.mean(np.abs(np.array(mass) - np.mean(mass))) / np.mean(mass),
                    "value_ratio": float(value[key].norm()) / np.mean([float(value[j].norm()) for j in others]),
                    "output_ratio": float(written[key].norm()) / np.mean([float(written[j].norm()) for j in others]),
                }
                for name, number in expected.items():
                    got = float(drain.values.sel(measure=name, layer=layer, head=head, example=row))
                    assert got == pytest.approx(number, rel=1e-3), name


def test_85_percent_of_the_mass_on_a_value_of_5_percent_is_22_percent_of_the_contribution():
    bridge, tokens = fresh_bridge("gpt2"), tiny_tokens(2, 16)
    pattern = torch.zeros(2, 4, 16, 16)
    value = torch.ones(2, 16, 4, D_HEAD) / D_HEAD**0.5
    value[:, 0] *= 0.05
    for i in range(16):
        pattern[:, :, i, 0] = 0.85 if i else 1.0
        pattern[:, :, i, 1 : i + 1] = 0.15 / max(i, 1)
    edits = {hook_name("pattern", 0): lambda _old: pattern, hook_name("v", 0): lambda _old: value}
    with interventions(bridge, edits):
        drain = sink_drain(bridge, tokens).values.sel(layer=0).mean(["head", "example"])
    assert float(drain.sel(measure="mass")) == pytest.approx(0.85, abs=1e-6)
    assert float(drain.sel(measure="contribution")) == pytest.approx(0.2208, abs=1e-4)
    assert float(drain.sel(measure="ratio")) == pytest.approx(0.2208, abs=1e-4)  # parallel values do not cancel
    assert float(drain.sel(measure="variation")) == pytest.approx(0, abs=1e-6)
    assert float(drain.sel(measure="value_ratio")) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen3", "gemma3", "phi"])
def test_logits_are_scale_times_norms_times_cosine(family: str):
    bridge, tokens, key = tiny_bridge(family), tiny_tokens(2, 9), 0
    found = qk_decomposition(bridge, tokens, key=key, batch_size=1)
    values = found.values
    assert float(abs(values.sel(part="cosine")).max()) <= 1 + 1e-3
    assert np.allclose(found.scale, D_HEAD**-0.5, rtol=1e-3)
    # the one query that sees the key and itself alone: its means are single pairs
    short = qk_decomposition(bridge, tokens[:, :2], key=0)
    product = short.values.sel(part="query_norm") * short.values.sel(part="key_norm") * short.values.sel(part="cosine")
    scale = short.scale
    assert np.allclose(product * scale, short.values.sel(part="logit").transpose(*product.dims), rtol=1e-3, atol=1e-4)
    if family in ("llama", "qwen3", "phi"):  # where queries and keys can be read after the rotation
        names = [f"blocks.1.attn.hook_rot_{part}" for part in ("q", "k")]
        rotated = capture(bridge, tokens, names)
        q, k = (rotated[name].double() for name in names)
        q, k = (t if t.shape[1] in (2, 4) and t.shape[2] == 9 else t.transpose(1, 2) for t in (q, k))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        cosine = torch.nn.functional.cosine_similarity(q[:, :, 1:], k[:, :, :1], dim=-1).mean(-1)  # [example, head]
        got = values.sel(part="cosine", target="sink", layer=1)
        assert np.allclose(got.transpose("example", "head"), cosine, atol=1e-3)


def test_a_model_that_hides_its_scores_is_refused():
    with pytest.raises(ValueError, match="delegated attention shows its pattern"):
        qk_decomposition(tiny_bridge("gpt_neo"), tiny_tokens(1, 9))


def test_the_cap_on_scores_is_undone():
    plain, capped = (tiny_bridge("gemma2", attn_logit_softcapping=cap) for cap in (None, 1.0))
    tokens = tiny_tokens(2, 9)
    a, b = (qk_decomposition(bridge, tokens).values.sel(layer=0) for bridge in (plain, capped))
    assert np.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, t: sink_drain(b, t, key=8), "key=8 must be a position that a later query sees; expected 0 to 7"),
        (lambda b, t: qk_decomposition(b, t, key=-1), "key=-1"),
        (lambda b, t: norm_profile(b, t).ratio("value", 9), "key=9 is not a position"),
        (lambda b, t: norm_profile(b, t).plot_ratio("residual"), "has no heads"),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call(tiny_bridge("llama"), tiny_tokens(1, 9))
