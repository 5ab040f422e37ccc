"""A dictionary inside a model: unchanged to the bit with its error, and exactly its decoded changes otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks
from interp.dictionaries.splicing import spliced
from interp.dictionaries.topk import TopKSAE
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

SITES = ("resid_pre", "attn_out", "mlp_out", "z")


def dictionary(bridge: Any, site: str = "mlp_out", **options: Any) -> TopKSAE:
    hook = hooks.hook_name(site, 1)  # type: ignore[arg-type]
    with torch.no_grad(), hooks.reads(bridge, hook) as found:
        bridge(tiny_tokens())
    width = found[hook].flatten(2).shape[-1]
    return TopKSAE(width, 40, k=5, hook=hook, decoder_norm=1.0, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", SITES)
def test_with_its_error_nothing_changes_and_an_edit_adds_what_it_decodes_to(family: str, site: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    sae = dictionary(bridge, site)
    direction = sae.W_dec[7].detach()
    with torch.no_grad():
        plain = bridge(tokens)
        with spliced(bridge, sae) as inside:
            assert torch.equal(bridge(tokens), plain)
        assert inside.latents is not None and inside.latents.shape == (*tokens.shape, 40)

        def raise_latent(latents: Tensor) -> Tensor:
            new = latents.clone()
            new[..., 7] += 2.0
            return new

        with spliced(bridge, sae, edit=raise_latent):
            edited = bridge(tokens)
        push = {sae.hook: lambda x: x + (2 * direction).reshape(x.shape[2:])}
        with hooks.interventions(bridge, push):
            expected = bridge(tokens)
        assert torch.allclose(edited, expected, atol=1e-5) and not torch.allclose(edited, plain, atol=1e-3)
        assert torch.equal(bridge(tokens), plain)


def test_without_its_error_the_reconstruction_stands_there() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = dictionary(bridge)
    with torch.no_grad():
        with spliced(bridge, sae, error=False):
            found = bridge(tokens)
        with hooks.interventions(bridge, {sae.hook: lambda x: sae(x)}):
            assert torch.equal(found, bridge(tokens))
        assert not torch.equal(found, bridge(tokens))


def test_positions_that_are_not_kept_stay_the_models_own() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    sae = dictionary(bridge)
    keep = torch.ones_like(tokens, dtype=torch.bool)
    keep[:, :3] = False
    with torch.no_grad():
        plain = bridge(tokens)
        with spliced(bridge, sae, error=False, keep=keep):
            found = bridge(tokens)
    assert torch.equal(found[:, :3], plain[:, :3]) and not torch.equal(found[:, 3:], plain[:, 3:])


def test_a_transcoder_reads_one_hook_and_writes_another() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    read, write = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"
    transcoder = TopKSAE(D_MODEL, 40, k=5, hook=read, target_hook=write, skip=True, decoder_norm=1.0)
    with torch.no_grad():
        transcoder.get_parameter("W_skip").normal_(generator=torch.Generator().manual_seed(0))
        plain = bridge(tokens)
        with hooks.reads(bridge, read) as found:
            bridge(tokens)
        with spliced(bridge, transcoder) as inside:
            assert torch.equal(bridge(tokens), plain)
        assert inside.latents is not None
        assert torch.equal(inside.latents, transcoder.encode(found[read]))
        with spliced(bridge, transcoder, error=False):
            replaced = bridge(tokens)
        rebuilt = transcoder(found[read])
        with hooks.interventions(bridge, {write: lambda _: rebuilt}):
            assert torch.allclose(replaced, bridge(tokens), atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_latents_and_error(family: str) -> None:
    """d/d latent is the decoder row times the gradient at the hook, d/d error that gradient itself."""
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    sae = dictionary(bridge)
    with hooks.taps(bridge, sae.hook) as taps:
        expected = torch.autograd.grad(bridge(tokens)[:, -1, 3].sum(), taps[sae.hook])[0]
    with spliced(bridge, sae) as inside:
        loss = bridge(tokens)[:, -1, 3].sum()
    assert inside.latents is not None and inside.error is not None
    by_latents, by_error = torch.autograd.grad(loss, [inside.latents, inside.error])
    assert torch.allclose(by_error, expected, atol=1e-6)
    assert torch.allclose(by_latents, expected @ sae.W_dec.detach().T, atol=1e-5)


def test_backward_fills_the_gradients_of_latents_and_error() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = dictionary(bridge)
    found = []
    for backward in (False, True):
        with spliced(bridge, sae) as inside:
            loss = bridge(tokens)[:, -1, 3].sum()
        assert inside.latents is not None and inside.error is not None
        if backward:
            loss.backward()
            found.append([inside.latents.grad, inside.error.grad])
        else:
            found.append(torch.autograd.grad(loss, [inside.latents, inside.error]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    with pytest.raises(ValueError, match="which hook"), spliced(bridge, TopKSAE(D_MODEL, 8, k=2)):
        pass
    wrong = TopKSAE(D_MODEL, 8, k=2, hook="blocks.9.hook_mlp_out")
    with pytest.raises(KeyError, match="blocks.9"), spliced(bridge, wrong):
        pass
    narrow = TopKSAE(7, 8, k=2, hook="blocks.1.hook_mlp_out")
    with torch.no_grad():
        plain = bridge(tokens)
        with pytest.raises(ValueError, match=f"{D_MODEL} wide, the dictionary 7"), spliced(bridge, narrow):
            bridge(tokens)
        shrink = spliced(bridge, dictionary(bridge), edit=lambda f: f[..., 1:])
        with pytest.raises(ValueError, match="edit of the latents"), shrink:
            bridge(tokens)
        assert torch.equal(bridge(tokens), plain)
