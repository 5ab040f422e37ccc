"""Steering by latents: what is added, set and taken away, in forwards and while writing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks
from interp.dictionaries import (
    Knob,
    ReLUSAE,
    SteeringLatent,
    TopKSAE,
    generate_steered,
    latent_vectors,
    spliced,
    steer,
    strength_for_kl,
)
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

LATENT = 7


def dictionary(bridge: Any, hook: str, target: str | None = None, **options: Any) -> Any:
    with torch.no_grad(), hooks.reads(bridge, [hook, *([target] if target else [])]) as found:
        bridge(tiny_tokens())
    width = {name: tensor.flatten(2).shape[-1] for name, tensor in found.items()}
    sae = ReLUSAE(
        width[hook], 24, d_out=width[target or hook], hook=hook, target_hook=target, decoder_norm=1.0, **options
    )
    with torch.no_grad():
        for number, bias in enumerate((sae.b_enc, sae.b_dec)):
            bias.copy_(0.2 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(number)))
    if sae.normalisation == "mean_norm":
        sae.estimate_normalisation(
            found[hook].flatten(0, 1).flatten(1), found[target].flatten(0, 1) if target else None
        )
    return sae.requires_grad_(False)


PLACES: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("gpt2", "blocks.1.hook_mlp_out", None, {"normalisation": "mean_norm"}),
    ("llama", "blocks.1.attn.hook_z", None, {}),
    ("neox", "blocks.1.hook_resid_pre", None, {"decoder": "rescaled"}),
    ("gemma2", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", {"skip": True, "normalisation": "mean_norm"}),
]


@pytest.mark.parametrize("place", PLACES, ids=FAMILIES)
def test_a_latent_is_raised_set_and_turned_off(place: Any) -> None:
    """Each mode is an edit of the latent of the dictionary spliced in with its error, and nothing else."""
    family, hook, target, options = place
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    sae = dictionary(bridge, hook, target, **options)
    with torch.no_grad(), spliced(bridge, sae) as inside:
        bridge(tokens)
    assert inside.latents is not None
    latent = int(inside.latents.sum((0, 1)).argmax())  # one that is on: turning off another would show nothing
    (vector,) = latent_vectors(bridge, sae, [latent])
    assert isinstance(vector, SteeringLatent) and vector.hook == (target or hook)
    strengths = torch.tensor([3.0, 0.5])

    def change(mode: str, s: Tensor) -> Any:
        def edit(latents: Tensor) -> Tensor:
            new, old = latents.clone(), latents[..., latent]
            new[..., latent] = {"add": old + s, "clamp": s.expand_as(old), "ablate": old * (1 - s)}[mode]
            return new

        return edit

    with torch.no_grad():
        plain = bridge(tokens)
        for mode in ("add", "clamp", "ablate"):
            with spliced(bridge, sae, edit=change(mode, strengths[:, None])):
                expected = bridge(tokens)
            with steer(bridge, vector, strengths, mode=mode):  # type: ignore[arg-type]
                found = bridge(tokens)
            assert torch.allclose(found, expected, atol=2e-5), mode
            assert not torch.allclose(found, plain, atol=1e-3), mode
        with steer(bridge, vector, 3.0, mode="clamp", positions=[-1]):
            assert torch.equal(bridge(tokens)[:, :-1], plain[:, :-1])
        with steer(bridge, vector, 3.0, mode="clamp", gate=torch.zeros(len(tokens))):
            assert torch.equal(bridge(tokens), plain)
        with hooks.reads(bridge, vector.hook) as intact:
            bridge(tokens)
        for keep_norm in (False, True):
            with (
                steer(bridge, vector, 3.0, mode="clamp", keep_norm=keep_norm),
                hooks.reads(bridge, vector.hook) as held,
            ):
                bridge(tokens)
            lengths = [found[vector.hook].flatten(2).norm(dim=-1) for found in (intact, held)]
            assert torch.allclose(*lengths, atol=1e-4) == keep_norm
        assert torch.equal(bridge(tokens), plain)


@pytest.mark.parametrize("place", PLACES[2:], ids=FAMILIES[2:])
def test_writing_with_a_latent_set_is_that_of_whole_forwards(place: Any) -> None:
    family, hook, target, options = place
    bridge, tokens = tiny_bridge(family), tiny_tokens(pos=4)
    sae = dictionary(bridge, hook, target, **options)
    (vector,) = latent_vectors(bridge, sae, [LATENT])
    found = generate_steered(bridge, tokens, 4, vector, [0.0, 30.0], mode="clamp", positions="all")
    for row, strength in enumerate((0.0, 30.0)):
        written = tokens
        for _ in range(4):
            with torch.no_grad(), steer(bridge, vector, strength, mode="clamp"):
                written = torch.cat([written, bridge(written)[:, -1].argmax(-1)[:, None]], 1)
        assert torch.equal(found[row], written)
    assert not torch.equal(found[0], found[1])


def test_a_vector_of_a_latent_is_what_it_decodes_to() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = dictionary(bridge, "blocks.1.hook_mlp_out", normalisation="mean_norm")
    first, second = latent_vectors(bridge, sae, [3, LATENT])
    zero, one = torch.zeros(24), torch.zeros(24)
    one[LATENT] = 1
    assert torch.allclose(second.values, sae.decode(one) - sae.decode(zero), atol=1e-6)
    assert first.latent == 3 and not isinstance(first.unit(), SteeringLatent)
    assert first.unit().norm == pytest.approx(1.0) and torch.equal(first.reversed().values, -first.values)
    found = strength_for_kl(bridge, [first, second], tokens, [0.02])
    assert bool(found.reached.all())
    knob = Knob.calibrate(second, {"a": torch.randn(4, D_MODEL) - 1, "b": torch.randn(4, D_MODEL) + 1})
    with torch.no_grad():
        with knob.turn(bridge, 2.0, positions="all"), hooks.reads(bridge, sae.hook) as held:
            bridge(tokens)
        assert torch.allclose(held[sae.hook] @ second.unit().values, torch.tensor(2.0), atol=1e-5)


def test_what_cannot_be_steered_is_refused() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    sae = dictionary(bridge, "blocks.1.hook_mlp_out")
    (vector,) = latent_vectors(bridge, sae, [LATENT])
    with pytest.raises(ValueError, match=r"latents \[24\] do not exist"):
        latent_vectors(bridge, sae, [24])
    with pytest.raises(ValueError, match="32 wide, the dictionary 16"):
        latent_vectors(bridge, TopKSAE(16, 8, k=2, hook=sae.hook), [0])
    with pytest.raises(ValueError, match="sets a latent, which steer"):
        strength_for_kl(bridge, vector, tokens, [0.02], mode="clamp")
    by_token = dictionary(bridge, "blocks.1.hook_mlp_out", normalisation="layer_norm")
    (uneven,) = latent_vectors(bridge, by_token, [LATENT])
    with pytest.raises(ValueError, match="another length at every token"), steer(bridge, uneven, 1.0):
        pass
    with (
        torch.no_grad(),
        spliced(
            bridge,
            by_token,
            edit=lambda f: torch.cat([f[..., :LATENT], 0 * f[..., LATENT : LATENT + 1] + 2, f[..., LATENT + 1 :]], -1),
        ),
    ):
        expected = bridge(tokens)
    with torch.no_grad(), steer(bridge, uneven, 2.0, mode="clamp"):
        assert torch.allclose(bridge(tokens), expected, atol=2e-5)
