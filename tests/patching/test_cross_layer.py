"""Patching across layers against its definition, and on a model whose hops are in the wrong order by construction."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens import TransformerBridge

from interp import metrics
from interp.patching import CrossLayerEffects, activation_patch, cross_layer_patch, verify
from interp.patching._measure import gaussian_rows
from interp.prompts import Prompts
from interp.results import labelled, load
from tests.helpers import D_MODEL, FAMILIES, N_LAYERS, tiny_bridge, tiny_model, tiny_tokenizer, tiny_tokens
from tests.patching.oracle import POS, N, activations, patched, prompts

LAYERS = range(N_LAYERS)


def brute(
    bridge: Any,
    tokens: Tensor,
    metric: Any,
    site: str,
    vectors: Tensor,
    places: list[Tensor],
    layer: int,
) -> Tensor:
    """Change of the metric when `vectors` [slot, row, d_model] stand at `places` of one layer: a whole forward."""
    where = torch.stack(places, -1)
    wide = torch.zeros(*tokens.shape, vectors.shape[-1])
    for slot in range(len(places)):
        wide[torch.arange(len(tokens)), where[:, slot]] = vectors[slot]
    with torch.no_grad():
        return metric(patched(bridge, tokens, site, [layer], {layer: wide}, where)) - metric(bridge(tokens))


def at(acts: dict[int, Tensor], layer: int, place: Tensor) -> Tensor:
    return acts[layer][torch.arange(len(place)), place]


@pytest.mark.parametrize(
    ("family", "site"),
    [*((family, "resid_post") for family in FAMILIES), ("llama", "resid_pre"), ("gemma2", "mlp_out")]
    + [("gpt2", "resid_mid"), ("neox", "attn_out")],
)
def test_every_cell_is_one_forward_with_the_vector_of_another_layer(family: str, site: Any) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    effects = cross_layer_patch(bridge, None, p, metric, site=site, positions=["s2", "end"], control=None)
    acts = activations(bridge, p.clean, site)
    expected = torch.zeros(N_LAYERS, N_LAYERS, 2, N)
    for s in LAYERS:
        for t in LAYERS:
            for i, name in enumerate(("s2", "end")):
                place = p.positions[name]
                expected[s, t, i] = brute(bridge, p.clean, metric, site, at(acts, s, place)[None], [place], t)
    assert torch.allclose(torch.tensor(effects.values.values), expected, atol=2e-5)
    assert float(expected.abs().max()) > 0.1
    assert all((effects.values.values[layer, layer] == 0).all() for layer in LAYERS)  # put where it came from
    with torch.no_grad():
        assert torch.allclose(torch.tensor(effects.baseline.values), metric(bridge(p.clean)), atol=1e-5)
        assert torch.allclose(torch.tensor(effects.corrupted.values), metric(bridge(p.corrupted)), atol=1e-5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_another_prompt_of_another_length_is_a_source(together: bool, mapped: bool) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    source = prompts(pos=POS + 3, seed=5)
    metric = metrics.answer_log_prob(p)
    turn = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=torch.Generator().manual_seed(1)))[0]

    def layer_map(x: Tensor, s: int, t: int) -> Tensor:
        return x @ turn * (1 + s) + t

    effects = cross_layer_patch(
        bridge,
        source,
        p,
        metric,
        positions=["s1", 6],
        source_positions=[9, "s2"],
        together=together,
        rescale=mapped,
        layer_map=layer_map if mapped else None,
        source_layers=[2, 0],
        target_layers=[0, 1],
        control=None,
    )
    acts, own = activations(bridge, source.clean, "resid_post"), activations(bridge, p.clean, "resid_post")
    from_, to = [torch.full((N,), 9), source.positions["s2"]], [p.positions["s1"], torch.full((N,), 6)]
    for a, s in enumerate((2, 0)):
        for b, t in enumerate((0, 1)):
            vectors = torch.stack([at(acts, s, place) for place in from_])
            if mapped:
                vectors = layer_map(vectors, s, t)
                here = torch.stack([at(own, t, place) for place in to])
                vectors = vectors * here.norm(dim=-1, keepdim=True) / vectors.norm(dim=-1, keepdim=True)
            cells = [([0, 1], "s1+6")] if together else [([0], "s1"), ([1], "6")]
            for slots, label in cells:
                expected = brute(bridge, p.clean, metric, "resid_post", vectors[slots], [to[slot] for slot in slots], t)
                got = effects.values.sel(source_layer=s, target_layer=t, pos=label).values
                assert np.allclose(got, expected.numpy(), atol=2e-5), (a, b, label)
                assert float(expected.abs().max()) > 1e-3


def test_one_source_prompt_serves_all_examples_and_one_source_position_all_positions() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    options: dict[str, Any] = {"positions": ["s1", "end"], "source_positions": 3, "control": None, "run": "corrupted"}
    one = tiny_tokens(1, 5, seed=9)
    effects = cross_layer_patch(bridge, one, p, metric, **options)
    many = cross_layer_patch(bridge, one.repeat(N, 1), p, metric, **options)
    assert np.allclose(effects.values.values, many.values.values, atol=1e-6)
    acts = activations(bridge, one, "resid_post")
    place = p.positions["end"]
    vector = acts[1][0, 3].expand(1, N, -1)
    expected = brute(bridge, p.corrupted, metric, "resid_post", vector, [place], 0)
    assert np.allclose(effects.values.sel(source_layer=1, target_layer=0, pos="end").values, expected, atol=2e-5)
    assert effects.direction == "denoise" and effects.provenance["source"] == {"name": "tokens", "n": N}


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_equal_layers_are_activation_patching(family: str) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    for run, source, direction in (("corrupted", p, "denoise"), ("clean", p.swap(), "noise")):
        crossed = cross_layer_patch(bridge, source, p, metric, run=run, control=None)  # type: ignore[arg-type]
        plain = activation_patch(bridge, p, metric, site="resid_post", direction=direction)  # type: ignore[arg-type]
        diagonal = np.stack([crossed.values.values[layer, layer] for layer in LAYERS])
        assert np.allclose(diagonal, plain.values.values, atol=1e-5)
        assert np.allclose(crossed.clean, plain.clean, atol=1e-6)
        assert np.allclose(crossed.corrupted, plain.corrupted, atol=1e-6)
        assert crossed.direction == direction
        recovery = crossed.recovery()
        assert np.allclose([recovery.values[layer, layer] for layer in LAYERS], plain.recovery().values, atol=1e-4)


def test_controls_are_other_examples_or_random_directions_of_the_same_norm() -> None:
    bridge, p = tiny_bridge("llama"), prompts(6)
    metric = metrics.logit_difference(p)
    groups = ["a", "a", "a", "b", "b", "b"]
    options: dict[str, Any] = {"positions": "s2", "pairs": "back", "n_controls": 3, "seed": 4}
    effects = cross_layer_patch(bridge, None, p, metric, groups=groups, **options)
    assert effects.control is not None and effects.groups == groups
    acts, place = activations(bridge, p.clean, "resid_post"), p.positions["s2"]
    # each control value must be what one of the other group's vectors does, and not the example's own
    for s, t in ((1, 0), (2, 0), (2, 1)):
        vectors = at(acts, s, place)
        by_donor = torch.stack(
            [
                brute(bridge, p.clean, metric, "resid_post", vectors[donor].expand(1, 6, -1), [place], t)
                for donor in range(6)
            ]
        )
        got = torch.tensor(effects.control.sel(source_layer=s, target_layer=t).values)[:, 0]
        match = (got[:, None] - by_donor).abs() < 2e-5  # [draw, donor, example]
        assert match[:, 3:, :3].any(1).all() and match[:, :3, 3:].any(1).all()
        assert not match[:, :3, :3].any() and not match[:, 3:, 3:].any()
        own = torch.tensor(effects.values.sel(source_layer=s, target_layer=t).values)[0]
        assert torch.allclose(own, by_donor[range(6), range(6)], atol=2e-5)
    assert np.isnan(effects.control.sel(source_layer=0, target_layer=1)).all()
    assert np.unique(effects.control.sel(source_layer=2, target_layer=0).values).size > 6  # draws differ

    random = cross_layer_patch(bridge, None, p, metric, control="random", **options)
    assert random.control is not None and (random.values.fillna(0) == effects.values.fillna(0)).all()
    noise = gaussian_rows(torch.arange(6) + 6, N_LAYERS, D_MODEL, 4)[:, 2]  # draw 1, source layer 2
    noise = noise * at(acts, 2, place).norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    expected = brute(bridge, p.clean, metric, "resid_post", noise[None], [place], 0)
    assert np.allclose(random.control.sel(draw=1, source_layer=2, target_layer=0)[0], expected, atol=2e-5)


def test_batches_chunks_and_plain_metrics_give_the_same() -> None:
    bridge, p = tiny_bridge("gemma2"), prompts(5)
    metric = metrics.logit_difference(p)
    options: dict[str, Any] = {"positions": ["s1", "end"], "pairs": "back", "source_layers": [2]}
    whole = cross_layer_patch(bridge, None, p, metric, **options)
    for other in (
        cross_layer_patch(bridge, None, p, metric, **options, batch_size=2),
        cross_layer_patch(bridge, None, p, lambda logits: metric(logits), **options),
        cross_layer_patch(bridge, None, p, metric, **options, control="random"),
    ):
        assert np.allclose(whole.values, other.values, atol=1e-5, equal_nan=True)
    random = [cross_layer_patch(bridge, None, p, metric, **options, control="random", batch_size=k) for k in (2, 5)]
    assert random[0].control is not None and random[1].control is not None
    assert np.allclose(random[0].control, random[1].control, atol=1e-5, equal_nan=True)


def test_unmeasured_pairs_are_nan_and_cost_nothing() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    every = cross_layer_patch(bridge, None, p, metric, control=None)
    for pairs, keeps in (("back", np.tril(np.ones((3, 3)), -1)), ("forward", np.triu(np.ones((3, 3)), 1))):
        some = cross_layer_patch(bridge, None, p, metric, pairs=pairs, control=None)  # type: ignore[arg-type]
        keep = keeps.astype(bool)
        assert np.isnan(some.values.values[~keep]).all()
        assert np.allclose(some.values.values[keep], every.values.values[keep], atol=1e-6)
        cost = some.provenance["cost"]
        assert (
            cost["cells"] == 3 * POS and cost["forward_equivalents"] < every.provenance["cost"]["forward_equivalents"]
        )
    # a cell at position k and layer l runs neither the blocks up to l nor the positions before k
    cost = cross_layer_patch(bridge, None, p, metric, positions="end", pairs="back", control=None).provenance["cost"]
    blocks = {0: 2 * 2, 1: 1}  # target 0 is seen by two blocks, from two sources; target 1 by one, from one
    assert cost["forward_equivalents"] == pytest.approx(2 + sum(blocks.values()) / (N_LAYERS * POS), abs=1e-3)


# a model whose hops are in the wrong order


def late_hop() -> Any:
    """Tokens 3-8 become 9-14 in block 2 ("landmark to country"), 9-14 become 15-20 in block 1 ("country to capital").

    Streams are one-hot, attention writes nothing; so a landmark ends as its country, one hop short.
    """
    model = tiny_model("gpt2", n_layer=4, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        transformer = model.transformer
        transformer.wte.weight[: D_MODEL - 4] = torch.eye(D_MODEL)[: D_MODEL - 4]
        for norm in [transformer.ln_f, *(n for block in transformer.h for n in (block.ln_1, block.ln_2))]:
            norm.weight.fill_(1.0)
        for block, first in ((1, 9), (2, 3)):
            mlp = transformer.h[block].mlp
            seen = torch.eye(D_MODEL)[first] - 1 / D_MODEL
            size = 10 * float(seen[first] / seen.pow(2).mean().sqrt()) - 20
            for i in range(6):
                mlp.c_fc.weight[first + i, i] = 10.0
                mlp.c_fc.bias[i] = -20.0
                mlp.c_proj.weight[i, first + i] = -1 / size
                mlp.c_proj.weight[i, first + 6 + i] = 1 / size
    bridge = TransformerBridge.boot_transformers("late-hop", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu")
    return bridge.eval().requires_grad_(False)


def test_back_patching_repairs_a_hop_that_came_too_late_and_only_where_it_must() -> None:
    bridge = late_hop()
    clean = torch.stack([torch.tensor([0, 21, 3 + i]) for i in range(6)])
    corrupted = clean.roll(1, 0)
    p = Prompts(clean, corrupted, 15 + torch.arange(6), 9 + torch.arange(6), {"end": torch.full((6,), 2)})
    with torch.no_grad():
        assert (bridge(clean)[:, -1].argmax(-1) == p.foils).all()  # the country
    back = cross_layer_patch(bridge, None, p, metrics.accuracy(p), pairs="back", n_controls=2)
    mean = back.mean().values
    expected = np.full((4, 4, 3), 0.0)
    expected[2, 0, 2] = expected[3, 0, 2] = 1.0  # the country, seen once more by block 1
    expected[np.triu_indices(4)] = np.nan
    assert np.array_equal(mean, expected, equal_nan=True)
    assert back.control is not None and float(back.control.max()) == 0
    table = back.repair(0.5).set_index("what")
    assert table.loc["some cell", "mean"] == 1 and table.loc["some cell, control", "mean"] == 0
    assert table.loc["best cell, held out", "mean"] == 1 and table.loc["best cell, held out", "cells"] == "2 -> 0 at 2"
    found = back.test(alternative="greater")
    assert found["significant"].sum() == 2 and float(found["p_value"].min()) == 2**-6
    assert bool(found["significant"].sel(source_layer=3, target_layer=0, pos=2))

    # Patchscopes: the country found in a longer prompt is read out as its capital by a prompt that holds another word
    scope = Prompts(torch.tensor([[0, 25]] * 6), torch.tensor([[0, 24]] * 6), p.answers, p.foils)
    longer = torch.cat([clean[:, :1], torch.full((6, 2), 23), clean[:, 1:]], 1)
    read = cross_layer_patch(
        bridge, longer, scope, metrics.accuracy(scope), positions="end", source_positions=4, control="random"
    )
    expected = np.zeros((4, 4))
    expected[2:, 0] = 1
    assert np.array_equal(read.mean().values[..., 0], expected)


# the result


def made(values: np.ndarray, control: np.ndarray | None = None, groups: list[str] | None = None) -> CrossLayerEffects:
    """A result of [source 2, target 2, pos 1, example] with these numbers and a baseline of -1."""
    n = values.shape[-1]
    dims = ["source_layer", "target_layer", "pos", "example"]
    coords: dict[str, Any] = {"source_layer": [0, 1], "target_layer": [0, 1], "pos": ["end"], "example": list(range(n))}
    if groups is not None:
        coords["group"] = ("example", groups)
    base = labelled(-np.ones(n), ["example"])
    drawn = None if control is None else labelled(control, ["draw", *dims], coords)
    return CrossLayerEffects(
        labelled(values, dims, coords), {}, base, base, "noise", "resid_post", "cross_layer", "made", drawn
    )


def test_repair_counts_examples_and_holds_the_choice_of_a_cell_out() -> None:
    n = 8
    values, control = np.zeros((2, 2, 1, n)), np.zeros((2, 2, 2, 1, n))
    values[0, 1, 0, :4] = 3  # repairs half of them
    values[1, 0, 0, 4:6] = 3  # repairs two others
    control[0, 1, 1, 0, 0] = control[1, 0, 1, 0, 0] = control[1, 1, 0, 0, 1] = 3  # draw 0 repairs 1, draw 1 repairs 2
    effects = made(values, control)
    table = effects.repair(0.0).set_index("what")
    assert table.loc["some cell", "mean"] == 0.75
    assert table.loc["some cell, control", "mean"] == pytest.approx(1.5 / 8)
    assert table.loc["best cell, held out", "mean"] == 0.5
    assert table.loc["best cell, control", "mean"] == pytest.approx(0.5 / 8)
    assert "still right" not in table.index and (table["examples"] == n).all()
    assert table.loc["some cell", "low"] < 0.75 < table.loc["some cell", "high"]
    shifted = dataclasses.replace(effects, clean=effects.clean + np.r_[[0] * 6, 5, 5].astype(np.float32))
    table = shifted.repair(0.0).set_index("what")
    assert table.loc["some cell", "mean"] == 1 and table.loc["some cell", "examples"] == 6
    assert table.loc["still right", "mean"] == 1 and table.loc["still right", "examples"] == 2
    with pytest.raises(ValueError, match="no example is wrong"):
        effects.repair(-2.0)


def test_the_best_of_a_grid_of_noise_does_not_survive_holding_out() -> None:
    rng, gaps = np.random.default_rng(0), []
    for _ in range(80):
        frame = made(rng.normal(size=(2, 2, 1, 12)), rng.normal(size=(1, 2, 2, 1, 12))).held_out().set_index("what")
        gaps.append([frame.loc[row, "mean"] for row in frame.index])
    same, out, control = np.mean(gaps, 0)
    # the standard error of these means is 0.03
    assert same > 0.2 and abs(out) < 0.1 and abs(control) < 0.1
    values = rng.normal(size=(2, 2, 1, 12))
    values[1, 0] += 5
    frame = made(values, values[None] * 0).held_out().set_index("what")
    assert frame.loc["best cell, held out", "cells"] == "1 -> 0"
    assert frame.loc["best cell, held out", "mean"] == pytest.approx(values[1, 0].mean(), abs=1e-5)
    assert frame.loc["control, held out", "mean"] == 0


def test_groups_are_the_observations() -> None:
    values = np.zeros((2, 2, 1, 12))
    values[1, 0] = 1.0
    names = ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    alone, grouped = made(values, values[None] * 0), made(values, values[None] * 0, groups=names)
    assert float(alone.test(alternative="greater")["p_value"].min()) == pytest.approx(2**-12)
    found = grouped.test(alternative="greater")
    assert float(found["p_value"].min()) == pytest.approx(2**-3) and not found["significant"].any()
    assert found.attrs["n_groups"] == 3 and found.attrs["threshold"] == np.inf
    assert float(grouped.test("zero")["estimate"].max()) == 1
    fold = grouped._folds(5, 0)
    assert all(len(set(fold[i : i + 4])) == 1 for i in (0, 4, 8)) and len(set(fold)) == 3
    values[1, 0, 0] = np.arange(12)
    wide = made(values, values[None] * 0, groups=names).held_out().set_index("what")
    narrow = made(values, values[None] * 0).held_out().set_index("what")
    row = "best cell, same examples"
    assert wide.loc[row, "high"] - wide.loc[row, "low"] > 1.3 * (narrow.loc[row, "high"] - narrow.loc[row, "low"])


def test_prompts_of_several_lengths_are_pooled_into_one_grid(tmp_path: Any) -> None:
    bridge, parts = tiny_bridge("llama"), []
    for pos, seed, names in ((POS, 0, ["a", "a", "b", "b"]), (POS + 2, 1, ["c", "c", "a", "a"])):
        p = prompts(pos=pos, seed=seed)
        metric = metrics.logit_difference(p)
        parts.append(cross_layer_patch(bridge, None, p, metric, positions=["s1", "end"], groups=names, n_controls=2))
    whole = CrossLayerEffects.pool(parts)
    assert whole.groups == ["a", "a", "b", "b", "c", "c", "a", "a"]
    assert np.array_equal(whole.values.values, np.concatenate([part.values.values for part in parts], -1))
    assert whole.control is not None and parts[1].control is not None
    assert np.array_equal(whole.control.values[..., 4:], parts[1].control.values)
    assert np.array_equal(whole.baseline.values[4:], parts[1].baseline.values)
    assert [entry["prompts"]["tokens"] for entry in whole.provenance["pooled"]] == [POS, POS + 2]
    assert whole.test().attrs["n_groups"] == 3 and whole.held_out()["examples"].tolist() == [8, 8, 8]
    some = whole.select(np.arange(8) > 4)
    assert some.groups == ["c", "a", "a"] and np.array_equal(some.values.values, whole.values.values[..., 5:])
    assert some.control is not None and np.array_equal(some.control.values, whole.control.values[..., 5:])
    assert np.array_equal(some.baseline.values, whole.baseline.values[5:])
    assert np.array_equal(whole.select([1, 0]).clean.values, whole.clean.values[[1, 0]])
    for rows, message in ((np.ones(3, dtype=bool), "the mask has 3 entries for 8"), ([], "no example is selected")):
        with pytest.raises(ValueError, match=message):
            whole.select(rows)
    again = load(whole.save(tmp_path / "pooled.nc"))
    assert again.values.equals(whole.values)
    other = cross_layer_patch(bridge, None, p, metric, positions=["s1", "end"], groups=list("abcd"), n_controls=1)
    for wrong, message in (
        ([parts[0], other], "results with different n_controls cannot be pooled: 2 and 1"),
        ([parts[0], dataclasses.replace(parts[1], values=parts[1].values.isel(pos=[0]))], "different pos cannot be"),
        ([parts[0], dataclasses.replace(parts[1], values=parts[1].values.drop_vars("group"))], "with and without"),
        ([], "there is nothing to pool"),
    ):
        with pytest.raises(ValueError, match=message):
            CrossLayerEffects.pool(wrong)


def test_the_result_is_saved_drawn_and_described(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    effects = cross_layer_patch(
        bridge, None, p, metrics.logit_difference(p), positions=["s1", "end"], groups=["x", "y", "x", "y"]
    )
    again = load(effects.save(tmp_path / "effects.nc"))
    assert isinstance(again, CrossLayerEffects) and again.control is not None and again.groups == effects.groups
    assert again.values.equals(effects.values) and again.control.equals(effects.control)
    figure = effects.plot("difference", pos="end")
    assert np.allclose(figure.data[0].z, effects.difference().mean("example").sel(pos="end"), atol=1e-6)
    assert "Source" in figure.layout.yaxis.title.text and "Target" in figure.layout.xaxis.title.text
    assert repr(effects).startswith(
        "CrossLayerEffects(source_layer 3 x target_layer 3 x pos 2 x example 4; cross_layer"
    )
    assert effects.top(1)[["source_layer", "target_layer", "pos"]].shape == (1, 3)
    with pytest.raises(ValueError, match=r"pos=None: these effects have the positions \['s1', 'end'\]"):
        effects.plot()
    bare = dataclasses.replace(effects, control=None)
    assert np.allclose(bare.plot("recovery", pos="s1").data[0].z, effects.recovery().sel(pos="s1"), atol=1e-6)
    for call in (bare.difference, lambda: bare.plot("control", pos="end"), bare.test):
        with pytest.raises(ValueError, match="needs a control, but control=None was asked for"):
            call()
    with pytest.raises(ValueError, match="cross_layer_patch, which are exact already"):
        verify(bridge, p, metrics.logit_difference(p), effects)


# refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "z"}, "site='z' is unknown"),
        ({"pairs": "backward"}, "pairs='backward' is unknown; did you mean 'back'"),
        ({"run": "dirty"}, "run='dirty' is unknown"),
        ({"control": "none"}, "control='none' is unknown"),
        ({"n_controls": 0}, "n_controls=0: expected at least 1"),
        ({"layer_map": torch.eye(D_MODEL)}, "layer_map is Tensor; expected a function"),
        ({"source_layers": [0], "target_layers": [1, 2], "pairs": "back"}, "leaves no pair of source layers"),
        ({"source_layers": [3]}, r"source_layers=\[3\]: \[3\] do not exist"),
        ({"source_positions": ["s1", "s2"], "positions": ["s1", "s2", "end"]}, "names 2 positions and positions 3"),
        ({"source": tiny_tokens(N, POS + 1)}, "source has 9 tokens and target 8, so positions do not correspond"),
        ({"source": tiny_tokens(3, POS)}, "source has 3 examples and target 4; expected as many, or one for all"),
        ({"source": "text"}, "source is str; expected Prompts, token ids"),
        ({"source": torch.zeros(4, dtype=torch.long)}, r"source has shape \(4,\); expected token ids"),
        ({"source": tiny_tokens(1, POS)}, "none with other tokens for example 0; pass more examples"),
        ({"groups": ["a"] * N}, "none with other tokens and another group for example 0"),
        ({"groups": "subject"}, "groups='subject' is unknown"),
        ({"groups": ["a"]}, "groups has 1 entries for 4 examples"),
        ({"layer_map": lambda x, s, t: x[..., :3], "control": None}, r"layer_map returned \(4, 8, 3\) for vectors"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(options: dict[str, Any], message: str) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    source = options.pop("source", None)
    try:
        with pytest.raises(ValueError, match=message):
            cross_layer_patch(bridge, source, p, metrics.logit_difference(p), **options)
    finally:
        options["source"] = source
    with torch.no_grad():  # nothing is left behind
        assert not any(point.fwd_hooks for point in bridge.hook_points())
        assert not any("forward" in block.__dict__ for block in bridge.blocks)


def test_a_model_in_training_mode_is_refused() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    bridge.original_model.train()
    try:
        with pytest.raises(RuntimeError, match="is in training mode"):
            cross_layer_patch(bridge, None, p, metrics.logit_difference(p))
    finally:
        bridge.original_model.eval()
