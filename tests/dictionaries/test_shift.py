"""SHIFT: a world whose latents are known, contributions against switching latents off, and what stays the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import hooks
from interp.dictionaries import (
    CuedTexts,
    ProbeAttribution,
    ReLUSAE,
    Shift,
    TopKSAE,
    attribute_probe,
    fit_text_probe,
    label_judge,
    pooled_activations,
    shift,
    spliced,
    token_rows,
    units_as_latents,
    without_latents,
)
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

EMBED, EARLY, LATE = "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"
WORDS = torch.arange(10, 22)  # 3 of each topic, then 3 of each dialect: latents 0 to 11 of the planted dictionary


def texts(n: int, seed: int, *, balanced: bool) -> CuedTexts:
    """BOS, four words of a topic and four of a dialect in any order, and a pad at the end of every other text."""
    draws = torch.Generator().manual_seed(seed)
    topic = torch.arange(n) % 2 == 1
    dialect = (torch.arange(n) // 2) % 2 == 1 if balanced else topic
    tokens = torch.zeros(n, 10, dtype=torch.long)
    for i in range(n):
        sets = (3 * int(topic[i]), 6 + 3 * int(dialect[i]))
        words = torch.cat([WORDS[start + torch.randint(3, (4,), generator=draws)] for start in sets])
        tokens[i, 1:9] = words[torch.randperm(8, generator=draws)]
        tokens[i, 9] = 1 if i % 2 else int(words[0])
    return CuedTexts(tokens, topic, dialect, (tokens != 0) & (tokens != 1))


def planted(bridge: Any) -> ReLUSAE:
    """Latent i is on, at 1, at word i and nowhere else, and decodes to its embedding: no error on these words."""
    rows = token_rows(bridge, WORDS[None], EMBED)
    sae = ReLUSAE(D_MODEL, 14, hook=EMBED).requires_grad_(False)
    sae.W_enc.zero_()
    sae.W_dec.zero_()
    sae.W_enc[:, :12] = torch.linalg.pinv(rows.values)
    sae.W_dec[:12] = rows.values
    sae.b_enc[:12] = -1e-4  # rounding is not an activation
    return sae


def dictionary(hook: str, **options: Any) -> TopKSAE:
    return TopKSAE(D_MODEL, 24, k=6, hook=hook, decoder_norm=1.0, **options).requires_grad_(False)


def planted_judge(sae: Any) -> Tensor:
    verdict = torch.zeros(sae.n_latents, dtype=torch.bool)
    verdict[6:12] = True
    return verdict


@pytest.mark.parametrize("hook", [EMBED, EARLY])
def test_a_planted_cue_is_found_and_taken_out(hook: str) -> None:
    bridge = tiny_bridge("llama")
    ambiguous, balanced = texts(120, 0, balanced=False), texts(160, 1, balanced=True)
    oracle = texts(120, 2, balanced=True)
    sae = planted(bridge)
    found = shift(bridge, ambiguous, balanced, [sae], planted_judge, hook=hook, n_top=14, oracle=oracle)
    table = found.summary(n_resamples=400).set_index("arm")
    off = found.removed.sel(arm="judged").values
    assert set(np.flatnonzero(off)) <= set(range(6, 12)) and off.sum() >= 4
    assert table.loc["original", "worst group"] < 0.8 and table.loc["original", "spurious accuracy"] > 0.55
    assert table.loc["judged, retrained", "accuracy"] > 0.97
    assert table.loc["judged, retrained", "worst group"] > 0.95
    assert table.loc["balanced", "accuracy"] > (0.99 if hook == EMBED else 0.9)
    for arm in ("judged", "judged, retrained", "all judged"):
        assert abs(table.loc[arm, "spurious accuracy"] - 0.5) < abs(table.loc["original", "spurious accuracy"] - 0.5)
    assert table.loc["judged", "accuracy"] > table.loc["random", "accuracy"] + 0.1
    assert (table["off"].drop(["original", "balanced", "all judged"]) == off.sum()).all()
    assert set(np.flatnonzero(found.removed.sel(arm="all judged"))) == set(range(6, 12))
    assert not found.removed.sel(arm="random 0").values[12:].any()  # never on: not drawn


def test_scores_are_counts_and_intervals_hold_them() -> None:
    bridge = tiny_bridge("llama")
    balanced = texts(40, 1, balanced=True)
    found = shift(bridge, texts(60, 0, balanced=False), balanced, [planted(bridge)], planted_judge, hook=EMBED)
    table = found.summary().set_index("arm")
    wanted, cue = balanced.intended.numpy(), balanced.spurious.numpy()
    for arm in ("original", "judged", "random"):
        kept = [a for a in found.values["arm"].values if a == arm or str(a).startswith(f"{arm} ")]
        said = found.values.sel(arm=kept).values > 0
        assert table.loc[arm, "accuracy"] == pytest.approx((said == wanted).mean())
        assert table.loc[arm, "spurious accuracy"] == pytest.approx((said == cue).mean())
        worst = np.mean([
            min((row == wanted)[(wanted == i) & (cue == j)].mean() for i in (0, 1) for j in (0, 1)) for row in said
        ])  # fmt: skip
        assert table.loc[arm, "worst group"] == pytest.approx(worst)
        assert table.loc[arm, "accuracy, low"] <= table.loc[arm, "accuracy"] <= table.loc[arm, "accuracy, high"]
    original = found.values.sel(arm="original").values
    probe = fit_text_probe(bridge, texts(60, 0, balanced=False), EMBED)
    expected = probe.score(pooled_activations(bridge, balanced, EMBED))
    np.testing.assert_array_equal(original, expected.numpy())


@pytest.mark.parametrize("method", ["gradient", "ig"])
def test_contributions_at_the_probes_own_hook_are_exact(method: Any) -> None:
    """There the margin is linear in the latents: each contribution is what turning that latent off takes away."""
    bridge, some = tiny_bridge("gpt2"), texts(12, 3, balanced=False)
    sae = dictionary(EARLY)
    probe = fit_text_probe(bridge, texts(40, 4, balanced=False), EARLY)
    found = attribute_probe(bridge, probe, some, [sae], method=method, n_steps=3, batch_size=5)
    sign = some.intended.float() * 2 - 1
    whole = probe.score(pooled_activations(bridge, some, EARLY))
    for latent in found.to_dataframe()["latent"].head(4):
        left = probe.score(pooled_activations(bridge, some, EARLY, removed=[(sae, [int(latent)])]))
        np.testing.assert_allclose(found.values.values[latent], sign * (whole - left), atol=2e-3)
    rows = token_rows(bridge, some.tokens, EARLY, skip_tokens=[0, 1])
    np.testing.assert_allclose(found.active.values, (sae.encode(rows.values) != 0).float().mean(0), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_contributions_sum_to_the_whole(family: str) -> None:
    bridge, some = tiny_bridge(family), texts(8, 3, balanced=False)
    saes = [dictionary(EMBED), dictionary(EARLY)]
    probe = fit_text_probe(bridge, texts(40, 4, balanced=False), LATE)
    found = attribute_probe(bridge, probe, some, saes, method="ig", n_steps=40)
    sign = some.intended.float() * 2 - 1
    whole = probe.score(pooled_activations(bridge, some, LATE))
    for number, sae in enumerate(saes):
        gone = probe.score(pooled_activations(bridge, some, LATE, removed=[(sae, range(24))]))
        total = found.values.sel(node=found.values["dictionary"] == number).sum("node").values
        np.testing.assert_allclose(total, sign * (whole - gone), atol=0.05 * float((whole - gone).abs().max()))
    plain = attribute_probe(bridge, probe, some, saes)
    alone = attribute_probe(bridge, probe, some, saes[1:])
    np.testing.assert_array_equal(plain.values.values[24:], alone.values.values)  # gradients do not pass through others


@pytest.mark.parametrize(("method", "middle"), [("gradient", 1.0), ("ig", 0.5)])
def test_gradients_against_differences(method: Any, middle: float) -> None:
    """With one step the integrated gradient is that half-way between all latents off and as they are."""
    bridge, some = tiny_bridge("llama"), texts(6, 5, balanced=False)
    sae = dictionary(EARLY)
    probe = fit_text_probe(bridge, texts(40, 4, balanced=False), LATE)
    found = attribute_probe(bridge, probe, some, [sae], method=method, n_steps=1)
    step = 1e-2
    for latent in (int(i) for i in found.to_dataframe()["latent"].head(3)):
        margins = []
        for share in (1 + step, 1 - step):

            def scaled(z: Tensor, _share: float = share, _latent: int = latent) -> Tensor:
                new = z * middle
                new[..., _latent] = z[..., _latent] * (middle + _share - 1)
                return new

            with torch.no_grad(), spliced(bridge, sae, edit=scaled, keep=some.keep):
                margins.append(probe.score(pooled_activations(bridge, some, LATE)))
        slope = (margins[0] - margins[1]) / (2 * step) * (some.intended.float() * 2 - 1)
        np.testing.assert_allclose(found.values.values[latent], slope, atol=0.02 * float(slope.abs().max()) + 1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_latents_is_the_model_to_the_bit_and_leaves_nothing(family: str) -> None:
    bridge, tokens, sae = tiny_bridge(family), tiny_tokens(), dictionary(EARLY)
    with torch.no_grad():
        plain = bridge(tokens)
        for removed in ([], [(sae, [])]):
            with without_latents(bridge, removed):
                assert torch.equal(bridge(tokens), plain)
        with without_latents(bridge, [(sae, [3, 5])]), hooks.reads(bridge, [EARLY]) as read:
            changed = bridge(tokens)
        with hooks.reads(bridge, [EARLY]) as before:
            bridge(tokens)
        z = sae.encode(before[EARLY])
        less = before[EARLY] - z[..., [3, 5]] @ sae.directions([3, 5])
        assert torch.allclose(read[EARLY], less, atol=1e-5) and not torch.allclose(changed, plain, atol=1e-4)
        keep = torch.zeros(tokens.shape, dtype=torch.bool)
        with without_latents(bridge, [(sae, range(24))], keep=keep):
            assert torch.equal(bridge(tokens), plain)
        assert torch.equal(bridge(tokens), plain)


def test_pooling_counts_kept_tokens_alone() -> None:
    bridge, some = tiny_bridge("neox"), texts(9, 3, balanced=False)
    rows = token_rows(bridge, some.tokens, EARLY, skip_tokens=[0, 1])
    found = pooled_activations(bridge, some, EARLY, batch_size=4)
    for i in range(9):
        assert torch.allclose(found[i], rows.values[rows.row == i].mean(0), atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_units_are_latents_without_error(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    hook = hooks.hook_name("neuron", 1)
    units = units_as_latents(bridge, hook)
    with torch.no_grad(), hooks.reads(bridge, [hook]) as read:
        bridge(tokens)
    x = read[hook]
    assert torch.equal(units(x), x) and units.n_latents == 2 * x.shape[-1]
    with torch.no_grad(), without_latents(bridge, [(units, [2])]), hooks.reads(bridge, [hook]) as off:
        bridge(tokens)
    expected = x.clone()
    expected[..., 2] = expected[..., 2].clamp(max=0)
    assert torch.allclose(off[hook], expected, atol=1e-6)


def test_a_judge_by_labels_goes_by_the_larger_correlation() -> None:
    bridge = tiny_bridge("llama")
    sae, some = planted(bridge), texts(80, 6, balanced=True)
    rows = token_rows(bridge, some.tokens, EMBED, skip_tokens=[0, 1])
    topic, dialect = some.intended[rows.row], some.spurious[rows.row]
    verdict = label_judge({EMBED: rows}, {"topic": topic}, {"dialect": dialect})(sae)
    assert verdict[:12].tolist() == [False] * 6 + [True] * 6
    swapped = label_judge({EMBED: rows}, {"dialect": dialect}, {"topic": topic})(sae)
    assert swapped[:12].tolist() == [True] * 6 + [False] * 6
    assert not verdict[12:].any() and not swapped[12:].any()  # never on: no verdict
    with pytest.raises(KeyError, match="no rows of 'blocks.1.hook_resid_pre' to judge by"):
        label_judge({EMBED: rows}, {"topic": topic}, {"dialect": dialect})(dictionary(EARLY))


def test_saved_and_shown(tmp_path: Path) -> None:
    bridge, ambiguous = tiny_bridge("llama"), texts(40, 0, balanced=False)
    sae = planted(bridge)
    probe = fit_text_probe(bridge, ambiguous, EMBED)
    contributions = attribute_probe(bridge, probe, ambiguous, [sae])
    again = ProbeAttribution.load(contributions.save(tmp_path / "contributions.nc"))
    assert again.values.equals(contributions.values) and again.plot().data
    balanced = texts(40, 1, balanced=True)
    found = shift(bridge, ambiguous, balanced, [sae], planted_judge, hook=EMBED, attribution=contributions, n_random=1)
    loaded = Shift.load(found.save(tmp_path / "shift.nc"))
    assert loaded.summary().equals(found.summary()) and loaded.plot().data
    assert repr(found).startswith("Shift(accuracy on balanced texts: original")
    np.testing.assert_allclose(found.attribution.values, contributions.values.mean("example").values, atol=1e-6)


def test_messages() -> None:
    bridge, ambiguous, balanced = tiny_bridge("llama"), texts(40, 0, balanced=False), texts(40, 1, balanced=True)
    sae = planted(bridge)
    with pytest.raises(ValueError, match="the labels of 20 of 40 ambiguous texts differ"):
        shift(bridge, balanced, balanced, [sae], planted_judge, hook=EMBED)
    with pytest.raises(ValueError, match=r"\[20, 0, 0, 20\]; expected some of each"):
        shift(bridge, ambiguous, ambiguous, [sae], planted_judge, hook=EMBED)
    with pytest.raises(ValueError, match="expected one bool for each of 14 latents"):
        shift(bridge, ambiguous, balanced, [sae], lambda d: torch.zeros(3, dtype=torch.bool), hook=EMBED)
    with pytest.raises(ValueError, match="does not depend on the dictionary"):
        shift(bridge, ambiguous, balanced, [dictionary(LATE)], lambda d: torch.zeros(24, dtype=torch.bool), hook=EARLY)
    with pytest.raises(ValueError, match=r"latents \[14\] do not exist; the dictionary has 0 to 13"):
        pooled_activations(bridge, ambiguous, EMBED, removed=[(sae, [14])])
    with pytest.raises(ValueError, match=r"texts \[0\] keep no token"):
        dataclasses.replace(ambiguous, keep=ambiguous.keep & (torch.arange(40) > 0)[:, None])
