"""Maps between layers against the formula, on a model whose layers are known, and on their way into a patch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformer_lens import TransformerBridge

from interp import metrics
from interp.patching import LayerMaps, cross_layer_patch, fit_layer_maps
from interp.results import load
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens
from tests.patching.oracle import activations, patched, prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_ridge_regression_on_the_rows_that_are_not_held_out(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(20, 9, 3)
    maps = fit_layer_maps(bridge, tokens, source_layers=[2, 0], ridge=0.01, held_out=0.25, skip_first=2, seed=5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    test, fit = order[:5], order[5:]
    acts = {layer: x[:, 2:].double().numpy() for layer, x in activations(bridge, tokens, "resid_post").items()}
    for s in (2, 0):
        for t in range(3):
            x, y = (acts[layer][fit].reshape(-1, D_MODEL) for layer in (s, t))
            centred = x - x.mean(0)
            size = 0.01 * (centred**2).sum() / D_MODEL
            # ridge regression is least squares with rows that pull the weights to zero
            tall = np.vstack([centred, np.sqrt(size) * np.eye(D_MODEL)])
            solved = np.linalg.lstsq(tall, np.vstack([y - y.mean(0), np.zeros((D_MODEL, D_MODEL))]), rcond=None)[0]
            u, v = (acts[layer][test].reshape(-1, D_MODEL) for layer in (s, t))
            guess = y.mean(0) + (u - x.mean(0)) @ solved
            r2 = 1 - ((guess - v) ** 2).sum() / ((v - y.mean(0)) ** 2).sum()
            assert float(maps.values.sel(source_layer=s, target_layer=t)) == pytest.approx(r2, abs=1e-4)
            assert np.allclose(maps(torch.tensor(u).float(), s, t).numpy(), guess, atol=1e-3)
    assert maps.provenance["rows"] == 15 and maps.provenance["positions"] == 7


def test_layers_that_change_nothing_have_the_identity_as_their_map() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    still = TransformerBridge.boot_transformers("still", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu")
    bridge = still.eval().requires_grad_(False)
    maps = fit_layer_maps(bridge, tiny_tokens(40, 12), ridge=1e-9)
    x = activations(bridge, tiny_tokens(2, 9, 8), "resid_post")[0]
    assert torch.allclose(maps(x, 0, 2), x, atol=1e-3) and float(maps.values.min()) > 0.999
    # fewer positions than dimensions fit anything; the rows held out say so
    few, many = (fit_layer_maps(tiny_bridge("llama"), tiny_tokens(n, 9), ridge=0.0) for n in (3, 60))
    at = {"source_layer": 0, "target_layer": 2}
    assert float(few.values.sel(at)) < float(many.values.sel(at)) < 1


def test_a_patch_takes_them_and_they_are_saved(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    maps = fit_layer_maps(bridge, tiny_tokens(30, 9, 4), source_layers=[2], target_layers=[0])
    again = load(maps.save(tmp_path / "maps.nc"))
    assert isinstance(again, LayerMaps)
    metric, place = metrics.logit_difference(p), p.positions["s2"]
    options: dict[str, Any] = {"source_layers": [2], "target_layers": [0], "positions": "s2", "control": None}
    effects = cross_layer_patch(bridge, None, p, metric, layer_map=again, **options)
    source = {0: again(activations(bridge, p.clean, "resid_post")[2], 2, 0)}
    with torch.no_grad():
        expected = metric(patched(bridge, p.clean, "resid_post", [0], source, place)) - metric(bridge(p.clean))
    assert np.allclose(effects.values.values[0, 0, 0], expected.numpy(), atol=2e-5)
    assert effects.provenance["layer_map"] == "affine maps, ridge 0.001"
    assert maps.plot().data[0].z.shape == (1, 1)
    with pytest.raises(ValueError, match=r"no map for source_layer 1; there are maps for \[2\]"):
        cross_layer_patch(bridge, None, p, metric, layer_map=again, **{**options, "source_layers": [1]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "z"}, "site='z' is unknown"),
        ({"source_layers": [7]}, r"source_layers=\[7\]: \[7\] do not exist"),
        ({"skip_first": 9}, "skip_first=9 leaves no position of rows of 9"),
        ({"held_out": 1.0}, "held_out=1.0 must lie between 0 and 1"),
        ({"ridge": -1.0}, "ridge=-1.0 must not be negative"),
        ({"tokens": tiny_tokens(1, 9)}, "1 rows are too few to hold 1 out"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(options: dict[str, Any], message: str) -> None:
    tokens = options.get("tokens", tiny_tokens(4, 9))
    rest = {key: value for key, value in options.items() if key != "tokens"}
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        fit_layer_maps(tiny_bridge("gpt2"), tokens, **rest)
    assert isinstance(caught.value, ValueError)
