"""Shares of heads and sources against values taken away by hand, a head that is known to copy, and the sum (A12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import hooks, results
from interp.dictionaries import (
    FeatureAttribution,
    HeadWeights,
    ReLUSAE,
    TensorSource,
    TopKSAE,
    TrainingConfig,
    direct_feature_attribution,
    head_weights,
    token_rows,
    train,
)
from interp.dictionaries.dictionary import Dictionary
from interp.hooks import hook_name, interventions
from tests.dictionaries.head_cases import (
    END,
    HEAD,
    KINDS,
    LATER,
    MARK,
    READS,
    X,
    copied_tokens,
    copier,
    copying_dictionary,
    made,
)
from tests.helpers import D_HEAD, D_MODEL, FAMILIES, MORE_FAMILIES, N_HEADS, fresh_bridge, tiny_bridge, tiny_tokens

LATENTS = [0, 7, 11]
HOOK = hook_name("z", 1)


def by_hand(dictionary: Dictionary, z: Tensor, at: Tensor | None = None) -> Tensor:
    """Pre-activations from the formulas, with the scale of the tokens `at` where it is by token; float64."""
    at = z if at is None else at
    z, at, width = z.double(), at.double(), z.shape[-1]
    if dictionary.normalisation == "layer_norm":
        z = (z - z.mean(-1, keepdim=True)) / (at.std(-1, keepdim=True) + 1e-5)
    elif dictionary.normalisation == "constant_norm":
        z = z / at.norm(dim=-1, keepdim=True) * width**0.5
    else:
        z = z * float(dictionary.input_scale)
    z = z - dictionary.b_dec.double() if dictionary.subtract_bias else z
    bias = dictionary.b_gate if dictionary.architecture == "gated" else dictionary.b_enc
    found = z @ dictionary.W_enc.double() + bias.double()
    return found * dictionary.W_dec.double().norm(dim=1) if dictionary.decoder == "rescaled" else found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_shares_sum_to_the_preactivation_without_its_bias(family: str, kind: str) -> None:
    """A12."""
    bridge, tokens = tiny_bridge(family), tiny_tokens(3, 9)
    sae = made(bridge, HOOK, kind)
    z = token_rows(bridge, tokens, HOOK).values
    expected = by_hand(sae, z)[:, LATENTS].T.reshape(len(LATENTS), *tokens.shape).detach().numpy()
    bias = by_hand(sae, torch.zeros_like(z[:1]), z[:1])[0, LATENTS].detach().numpy()
    whole = None
    for by in ("head_source", "head", "source"):
        found = direct_feature_attribution(bridge, sae, tokens, LATENTS, by=by)
        dims = [dim for dim in ("head", "src") if dim in found.values.dims]
        total = found.values.astype("float64").sum(dims)
        scale = max(1.0, float(np.abs(expected).max()))
        assert np.abs(total - (expected - bias[:, None, None])).max() < 1e-5 * scale
        assert np.allclose(found.preactivation, expected, atol=1e-5 * scale) and np.allclose(
            found.bias, bias, atol=1e-5
        )
        assert found.completeness() < 1e-5 and float(np.abs(found.gap()).max()) < 1e-5 * scale
        latents = sae.encode(z)[:, LATENTS].detach().T.reshape(found.activation.shape)
        assert np.allclose(found.activation, latents, atol=1e-5)
        whole = found if whole is None else whole
        other = whole.values.sum([dim for dim in ("head", "src") if dim not in found.values.dims])
        assert np.allclose(found.values, other.transpose(*found.values.dims), atol=1e-5)
    assert whole is not None and np.abs(whole.values).max() > 0.05
    assert (np.abs(whole.values.where(whole.values["src"] > whole.values["pos"])).max() == 0) and (
        np.abs(bias).max() > 0.05
    )


@pytest.mark.parametrize("kind", ["topk, rescaled, mean square", "topk, layer norm, rescaled"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_share_is_what_the_preactivation_loses_without_that_sources_value(family: str, kind: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 6)
    sae = made(bridge, HOOK, kind)
    found = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="head_source")
    z_name, v_name = HOOK, hook_name("v", 1)
    with torch.no_grad(), hooks.reads(bridge, [z_name, v_name]) as acts:
        bridge(tokens)
        z, n_kv = acts[z_name], acts[v_name].shape[2]
    before = by_hand(sae, z.flatten(2))
    for src in (0, 2, 5):
        for head in range(N_HEADS):

            def silence(v: Tensor, src: int = src, head: int = head) -> Tensor:
                v = v.clone()
                v[:, src, head * n_kv // N_HEADS] = 0.0
                return v

            # patterns do not depend on the values of their own layer
            with torch.no_grad(), interventions(bridge, {v_name: silence}), hooks.reads(bridge, z_name) as changed:
                bridge(tokens)
            without = z.clone()
            without[:, :, head] = changed[z_name][:, :, head]  # other heads may share the value
            lost = (before - by_hand(sae, without.flatten(2), z.flatten(2)))[..., LATENTS].detach()
            shares = found.values.sel(head=head, src=src).transpose("example", "pos", "latent")
            assert np.allclose(shares, lost, atol=2e-5), (head, src)


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_other_families(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 20)  # longer than the sliding windows
    sae = made(bridge, HOOK, "topk, layer norm, rescaled")
    for by in ("head", "source", "head_source"):
        assert direct_feature_attribution(bridge, sae, tokens, LATENTS, by=by).completeness() < 1e-5


def test_positions_and_batches_choose_and_do_not_change() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(5, 8)
    sae = made(bridge, HOOK)
    whole = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="head_source")
    some = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="head_source", positions=[2, -1], batch_size=2)
    assert some.values["pos"].values.tolist() == [2, 7] and some.provenance["n_forwards"] == 3
    assert np.allclose(some.values, whole.values.sel(pos=[2, 7]), atol=1e-6)
    where = torch.tensor([7, 3, -2, 0, 5])
    own = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="source", positions=where)
    assert own.values["position"].values[:, 0].tolist() == [7, 3, 6, 0, 5]
    for example, position in enumerate([7, 3, 6, 0, 5]):
        here = whole.values.sel(example=example, pos=position).sum("head")
        assert np.allclose(own.values.sel(example=example).isel(pos=0), here, atol=1e-5)
        assert own.values["token"].values[example, 0] == f"w{int(tokens[example, position])}".replace("w0", "<bos>")
    one = direct_feature_attribution(bridge, sae, tokens, [11], positions=3)
    assert np.allclose(one.values.sel(latent=11, pos=3), whole.values.sel(latent=11, pos=3).sum("src"), atol=1e-5)
    pairs = torch.stack([where % 8, (where + 1) % 8], 1)
    two = direct_feature_attribution(bridge, sae, tokens, LATENTS, positions=pairs)
    assert np.allclose(two.values.isel(pos=0), own_heads(whole, where % 8), atol=1e-5)


def own_heads(whole: FeatureAttribution, where: Tensor) -> np.ndarray:
    rows = [whole.values.sel(example=i, pos=int(p)).sum("src").values for i, p in enumerate(where)]
    return np.stack(rows, 1)


def test_a_head_that_copies_has_the_latent_that_reads_it() -> None:
    bridge, tokens = copier(), copied_tokens()
    sae = copying_dictionary(0, HEAD, READS)
    found = direct_feature_attribution(bridge, sae, tokens, [READS], by="head_source", positions=[4])
    at = found.values.sel(latent=READS, example=0, pos=4)
    assert tokens[0, 2] == X and tokens[0, 4] == MARK
    assert float(found.preactivation.max()) == pytest.approx(8.0, rel=1e-3)  # |LN(X)| along X's direction is 2 * 4
    assert float(at.sel(head=HEAD, src=2)) == pytest.approx(float(found.preactivation.max()), rel=1e-6)
    assert np.abs(at.where((at["head"] != HEAD) | (at["src"] != 2))).max() < 1e-6
    top = found.top(1).iloc[0]
    assert (top["head"], top["src"], top["src_token"], top["token"]) == (HEAD, 2, "w10", "w12")
    weights = head_weights(bridge, sae)
    assert weights.values.sel(latent=READS).values.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert np.isnan(weights.values.sel(latent=0)).all()  # a decoder row of zeros is nobody's
    assert weights.latents(HEAD, 1)["latent"].tolist() == [READS]
    later = direct_feature_attribution(bridge, copying_dictionary(1, LATER, READS), tokens, [READS], by="head_source")
    best = later.top(1, by="max").iloc[0]
    assert (best["head"], best["src_token"], best["token"]) == (LATER, f"w{MARK}", f"w{END}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_head_weights_are_norms_of_slices(family: str, kind: str) -> None:
    bridge = tiny_bridge(family)
    sae = made(bridge, HOOK, kind)
    found = head_weights(bridge, sae)
    assert np.allclose(found.values.sum("head"), 1, atol=1e-6)  # A12
    row = sae.W_dec[5].detach().numpy()
    norms = np.array([np.linalg.norm(row[h * D_HEAD : (h + 1) * D_HEAD]) for h in range(N_HEADS)])
    assert np.allclose(found.values.sel(latent=5), norms / norms.sum(), atol=1e-6)
    assert np.allclose(found.share([0, 2]).sel(latent=5), (norms[0] + norms[2]) / norms.sum(), atol=1e-6)
    ranked = found.latents(3, 4)
    assert ranked["share"].is_monotonic_decreasing and len(ranked) == 4
    assert ranked["share"][0] == pytest.approx(float(found.values.sel(head=3).max()))


def test_a_trained_dictionary_of_a_trained_model() -> None:
    import interp

    bridge = interp.load_model("tinyworld-llama", check=False)
    tokens = torch.randint(2, int(bridge.cfg.d_vocab), (24, 24), generator=torch.Generator().manual_seed(0))
    hook = hook_name("z", 2)
    rows = token_rows(bridge, tokens, hook)
    settings = {"architecture": "topk", "n_latents": 128, "k": 8, "hook": hook, "normalisation": "mean_norm"}
    config = TrainingConfig(settings, n_steps=60, batch_size=256, learning_rate=3e-3, log_every=60)
    sae = train(config, TensorSource({hook: rows.values}))
    on = sae.encode(rows.values).detach().sum(0).topk(3).indices.tolist()
    for by in ("head", "source", "head_source"):
        found = direct_feature_attribution(bridge, sae, tokens, on, by=by, positions=[5, 20])
        assert float(np.abs(found.gap()).max()) < 1e-5 * max(1.0, float(np.abs(found.preactivation).max()))
    assert np.allclose(head_weights(bridge, sae).values.sum("head"), 1, atol=1e-6)


def test_one_forward_and_hooks_are_gone() -> None:
    bridge, tokens = tiny_bridge("gemma2"), tiny_tokens(4, 9)
    sae = made(bridge, HOOK)
    plain = bridge(tokens)
    direct_feature_attribution(bridge, sae, tokens, LATENTS, by="source")  # names and layouts are known from here on
    fired = dict.fromkeys((0, 1, 2), 0)

    def counter(layer: int) -> Any:
        def count(tensor: Tensor) -> Tensor:
            fired[layer] += 1
            return tensor

        return count

    edits = {hook_name("k", layer): counter(layer) for layer in fired}
    with interventions(bridge, edits, must_fire=False):
        for by in ("head", "source", "head_source"):
            direct_feature_attribution(bridge, sae, tokens, LATENTS, by=by)
    assert fired == {0: 3, 1: 3, 2: 0}
    with interventions(bridge, edits, must_fire=False):
        found = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="head_source", memory_budget=2**15)
    assert fired[0] == 3 + found.provenance["n_forwards"] and found.provenance["n_forwards"] > 1
    assert torch.equal(bridge(tokens), plain)


def test_heads_are_attributed_where_patterns_do_not_tell() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = made(bridge, HOOK)

    def gate(z: Tensor) -> Tensor:
        return z * torch.linspace(0.2, 1.0, z.shape[-1])

    with interventions(bridge, {HOOK: gate}):
        assert direct_feature_attribution(bridge, sae, tokens, LATENTS).completeness() < 1e-5
        for by in ("source", "head_source"):
            with pytest.raises(ValueError, match=r'not pattern times values \(they differ by .*by="head" holds'):
                direct_feature_attribution(bridge, sae, tokens, LATENTS, by=by)


def test_half_precision_is_as_exact_as_the_model() -> None:
    bridge, tokens = fresh_bridge("llama", dtype=torch.bfloat16), tiny_tokens()
    sae = made(bridge, HOOK).float()
    assert direct_feature_attribution(bridge, sae, tokens, LATENTS).completeness() < 1e-5
    assert 0 < direct_feature_attribution(bridge, sae, tokens, LATENTS, by="source").completeness() < 0.02


def test_results_are_kept_and_drawn(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 7)
    sae = made(bridge, HOOK)
    found = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="head_source")
    again = FeatureAttribution.load(found.save(tmp_path / "dfa.nc"))
    assert again.values.equals(found.values) and again.completeness() == found.completeness()
    assert results.load(tmp_path / "dfa.nc").provenance == found.provenance
    table = found.to_dataframe()
    assert {"latent", "example", "pos", "head", "src", "token", "src_token", "value"} == set(table.columns)
    assert len(table) == 3 * 3 * 7 * N_HEADS * 7
    averaged = found.top(2, reduce="example")
    assert averaged["value"].abs().iloc[0] == pytest.approx(float(np.abs(found.values.mean("example")).max()))
    at = int(found.preactivation.sel(latent=7, example=1).values.argmax())
    figure: Any = found.plot(7, example=1)
    drawn = np.array(figure.data[0].z)
    assert np.allclose(drawn, found.values.sel(latent=7, example=1, pos=at).values[:, : at + 1])
    heads = direct_feature_attribution(bridge, sae, tokens, LATENTS)
    bars: Any = heads.plot(11)
    assert np.allclose(bars.data[0].y, heads.values.sel(latent=11).mean(["example", "pos"]))
    assert np.allclose(heads.plot(11, example=2, pos=3).data[0].y, heads.values.sel(latent=11, example=2, pos=3))  # type: ignore[attr-defined]
    sources = direct_feature_attribution(bridge, sae, tokens, LATENTS, by="source")
    assert np.allclose(sources.plot(0, pos=4).data[0].y, sources.values.sel(latent=0, example=0, pos=4)[:5])  # type: ignore[attr-defined]
    assert np.array(sources.plot(0).data[0].z).shape == (7, 7)  # type: ignore[attr-defined]
    weights = head_weights(bridge, sae)
    assert HeadWeights.load(weights.save(tmp_path / "weights.nc")).values.equals(weights.values)
    assert np.array(weights.plot([3, 4]).data[0].z).shape == (2, N_HEADS)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="latent=3 was not measured; there are \\[0, 7, 11\\]"):
        found.plot(3)


def test_messages(unchecked: None) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = made(bridge, HOOK)
    other = ReLUSAE(D_MODEL, 8, hook=hook_name("attn_out", 1))
    for call in (lambda d: head_weights(bridge, d), lambda d: direct_feature_attribution(bridge, d, tokens, [0])):
        with pytest.raises(ValueError, match=r"reads 'blocks.1.hook_attn_out'; .*such as 'blocks.1.attn.hook_z'"):
            call(other)
        with pytest.raises(ValueError, match="is 16 wide and .* 4 heads x 8 = 32"):
            call(ReLUSAE(16, 8, hook=HOOK))
        with pytest.raises(ValueError, match="does not say which hook it reads"):
            call(ReLUSAE(D_MODEL, 8))
        with pytest.raises(KeyError, match="numbered 0 to 2"):
            call(ReLUSAE(D_MODEL, 8, hook=hook_name("z", 7)))
    across = TopKSAE(D_MODEL, 8, k=2, hook=HOOK, target_hook=hook_name("mlp_out", 1))
    with pytest.raises(ValueError, match="rebuilds 'blocks.1.hook_mlp_out', whose decoder has no slice per head"):
        head_weights(bridge, across)
    assert direct_feature_attribution(bridge, across, tokens, [0]).completeness() < 1e-5  # it reads them
    alias = ReLUSAE(D_MODEL, 8, hook="blocks.1.attn.o.hook_in")
    assert direct_feature_attribution(bridge, alias, tokens, [0]).provenance["layer"] == 1
    for wrong in ([24], [-1], [], [3, 3]):
        with pytest.raises(ValueError, match="must name latents from 0 to 23"):
            direct_feature_attribution(bridge, sae, tokens, wrong)
    with pytest.raises(ValueError, match="by=.heads.; expected"):
        direct_feature_attribution(bridge, sae, tokens, [0], by="heads")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="positions \\[9\\] do not exist: expected -9 to 8"):
        direct_feature_attribution(bridge, sae, tokens, [0], positions=9)
    with pytest.raises(ValueError, match="name one position twice"):
        direct_feature_attribution(bridge, sae, tokens, [0], positions=[8, -1])
    with pytest.raises(ValueError, match="positions has 3 rows for 2 examples"):
        direct_feature_attribution(bridge, sae, tokens, [0], positions=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="positions is torch.float32"):
        direct_feature_attribution(bridge, sae, tokens, [0], positions=torch.zeros(2))
    with pytest.raises(ValueError, match='above memory_budget=0 MiB; ask for fewer latents or positions, or by="head"'):
        direct_feature_attribution(bridge, sae, tokens, [0], memory_budget=100)
    with pytest.raises(ValueError, match="has not been estimated"):
        fresh = ReLUSAE(D_MODEL, 8, hook=HOOK, normalisation="mean_norm")
        direct_feature_attribution(bridge, fresh, tokens, [0])

    class Bent(ReLUSAE):
        def _preactivations(self, z: Tensor) -> Tensor:
            return super()._preactivations(z).square()

    with pytest.raises(ValueError, match="they are no sum over heads"):
        direct_feature_attribution(bridge, Bent(D_MODEL, 8, hook=HOOK), tokens, [0])
    training = fresh_bridge("llama")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        direct_feature_attribution(training, sae, tokens, [0])
