"""Scores of several dictionaries' nodes: integrated gradients of single activations, identities, costs, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import hooks, results
from interp.metrics import logit_difference
from interp.patching import (
    PRESETS,
    FeatureEffects,
    LatentEffects,
    activation_patch,
    agreement,
    attribution_patch,
    feature_effects,
)
from interp.patching._quadrature import quadrature
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge
from tests.patching.feature_cases import PLAIN, several, target_of
from tests.patching.oracle import POS, N, prompts
from tests.patching.test_attribution import _double, double, doubled, gates, micro, runs
from tests.patching.test_known_answers import logit, one_token
from tests.patching.test_latents import WIDTH, dictionary, read, signs

__all__ = ["_double", "gates"]  # fixtures

P = prompts()
METRIC = logit_difference(P)


def scores(family: str, method: Any = "relp", kind: str = "plain", **options: Any) -> FeatureEffects:
    return feature_effects(tiny_bridge(family), P, METRIC, several(family, kind=kind), method=method, **options)


def by_autograd(bridge: Any, sae: Any, direction: str, points: Any, steps: int) -> tuple[Tensor, Tensor]:
    """Mean gradients by latents [row, pos, latent] and by the error, each times its change: the definition, with the
    state (f, error) interpolated and a whole forward for each point."""
    base, other = runs(P, direction)
    target = target_of(sae)
    x, own = (read(bridge, base, sae.hook, target) * 2)[:2]
    x_other, own_other = (read(bridge, other, sae.hook, target) * 2)[:2]
    f, f_other = sae.encode(x), sae.encode(x_other)
    error = own - sae.decode(f, x)
    error_other = own_other - sae.decode(f_other, x)  # all that the latents do not carry, decoded where they go in
    by_latent, by_error = torch.zeros_like(f), torch.zeros_like(error)
    for point, weight in zip(*quadrature(points, steps), strict=True):
        at = torch.lerp(f, f_other, point).requires_grad_()
        rest = torch.lerp(error, error_other, point).requires_grad_()

        def edit(tensor: Tensor, *, hook: Any = None, _at: Tensor = at, _rest: Tensor = rest) -> Tensor:
            return (sae.decode(_at, x) + _rest).reshape(tensor.shape)

        with torch.enable_grad(), hooks.no_retained_graph(bridge):
            if target.endswith("resid_mid"):
                with hooks.interventions(bridge, {target: edit}):
                    total = METRIC(bridge(base)).sum()
            else:
                with bridge.hooks(fwd_hooks=[(target, edit)]):
                    total = METRIC(bridge(base)).sum()
            found = torch.autograd.grad(total, [at, rest])
        by_latent += weight * found[0]
        by_error += weight * found[1]
    return (f_other - f) * by_latent, ((error_other - error) * by_error).sum(-1)


@pytest.mark.parametrize("kind", ["plain", "with input"])
@pytest.mark.parametrize("family", FAMILIES)
def test_integrated_gradients_are_those_of_the_interpolated_state(family: str, kind: str) -> None:
    """Latents and error on their lines, by autograd; decoded, that is the activation on its line."""
    bridge, saes = doubled(family), several(family, True, kind)
    for number, points in enumerate(("left", "midpoint", "gauss_legendre")):
        direction: Any = ("noise", "denoise")[number % 2]
        found = feature_effects(
            bridge,
            P,
            METRIC,
            saes,
            method="integrated_gradients",
            steps=3,
            points=points,
            direction=direction,  # type: ignore[arg-type]
        )
        for sae in saes:
            latents, error = by_autograd(bridge, sae, direction, points, 3)
            mine = found.of(sae)
            assert np.allclose(mine.values.transpose("example", "pos", "latent"), latents, atol=1e-6), (
                sae.hook,
                points,
            )
            assert np.allclose(mine.error.transpose("example", "pos"), error, atol=1e-6), (sae.hook, points)
            assert latents.abs().max() > 1e-3 and error.abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_along_a_line_sum_to_the_whole_change(family: str) -> None:
    """Completeness: all nodes of a dictionary together are its activation patched as a whole."""
    for value in ("swap", "mean"):
        found = scores(family, "integrated_gradients", points="gauss_legendre", steps=8, value=value)
        total = found.total().sum("pos")
        assert total["dictionary"].values.tolist() == list(PLAIN)
        for name in PLAIN:
            layer, site = name.split(".")
            whole: Any = {"axes": ("layer",), "layers": [int(layer)], "direction": "noise", "value": value}
            exact = activation_patch(tiny_bridge(family), P, METRIC, site=site, **whole)  # type: ignore[arg-type]
            gap = np.abs(total.sel(dictionary=name).values - exact.values.values[0]).max()
            assert gap < 5e-3 < 0.05 < float(abs(exact.values).max()), (name, value, gap)  # most with soft caps
        left = scores(family, "integrated_gradients", steps=8, value=value).total().sum("pos")
        assert float(abs(left - total).max()) > 5e-3  # a left sum of eight is another number


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lines_to_zero_end_at_what_the_decoder_gives_without_latents(family: str) -> None:
    bridge, saes = tiny_bridge(family), several(family, kind="with input")
    options: Any = {
        "points": "gauss_legendre",
        "steps": 128,
        "value": "zero",
    }  # the stream shrinks below a norm: curved
    found = scores(family, "integrated_gradients", "with input", **options)
    for sae in saes:
        x = read(bridge, P.clean, sae.hook)[0]
        instead = sae.decode(torch.zeros_like(sae.encode(x)), x)
        with (
            torch.no_grad(),
            hooks.interventions(bridge, {target_of(sae): lambda t, _new=instead: _new.reshape(t.shape)}),
        ):
            gone = METRIC(bridge(P.clean))
        change = (gone - METRIC(bridge(P.clean)).detach()).numpy()
        total = found.total().sel(dictionary=found._name(sae)).sum("pos").values
        assert np.allclose(total, change, atol=1e-3) and np.abs(change).max() > 0.05, sae.hook


@pytest.mark.parametrize("family", FAMILIES)
def test_one_left_step_is_the_gradient(family: str) -> None:
    """And with rules what they give: so the line begins at the run that is patched."""
    kind = "with input" if family == "llama" else "plain"
    rules: list[tuple[Any, Any]] = [(None, "gradient"), ("relp", "relp"), ("gim", PRESETS["gim"])]
    turned = list(FAMILIES).index(family)  # over the families every value meets every rule
    for i, value in enumerate(("swap", "zero", "mean")):
        own, method = rules[(i + turned) % 3]
        one = scores(family, "integrated_gradients", kind, steps=1, value=value, rules=own)
        plain = scores(family, method, kind, value=value)
        assert np.allclose(one.values, plain.values, atol=1e-5), (value, method)
        assert one.nodes == plain.nodes


def test_nodes_are_those_of_the_single_methods() -> None:
    """Every method gives what it gives for each dictionary alone, under the names of nodes."""
    bridge, saes = tiny_bridge("llama"), several("llama", kind="with input")
    options: Any = {"direction": "denoise", "value": "mean"}
    found = scores("llama", "relp", "with input", **options)
    alone = attribution_patch(bridge, P, METRIC, sites=saes, method="relp", **options)
    exact = scores("llama", "exact", "with input", positions=["s1", "end"], latents={saes[0]: [3, 5]}, **options)
    inputs = scores("llama", "integrated_gradients_inputs", "with input", steps=2, points="midpoint")
    line = attribution_patch(
        bridge, P, METRIC, sites=saes, method="integrated_gradients", direction="noise", steps=2, points="midpoint"
    )
    for sae in saes:
        name = found._name(sae)
        for mine, its in ((found, alone[sae]), (inputs, line[sae])):
            assert isinstance(its, LatentEffects)
            assert np.array_equal(mine.of(sae).values, its.values) and np.array_equal(mine.of(name).error, its.error)
            assert mine.of(sae).provenance["dictionary"] == its.provenance["dictionary"]
            assert agreement(its, mine.of(sae), n_resamples=100).pearson == pytest.approx(1)
        few = [3, 5] if sae is saes[0] else None
        patched = activation_patch(bridge, P, METRIC, site=sae, positions=["s1", "end"], latents=few, **options)
        assert isinstance(patched, LatentEffects)
        assert np.array_equal(exact.of(sae).values, patched.values) and np.array_equal(
            exact.of(sae).error, patched.error
        )
        error = found.values.sel(node=f"{name}/error", pos=4)
        assert np.array_equal(error, alone[sae].error.sel(pos=4)) and int(error["latent"]) == -1  # type: ignore[attr-defined]
        seven = found.values.sel(node=f"{name}/7")
        assert np.array_equal(seven, alone[sae].values.sel(latent=7))
    assert exact.method == "activation_patch" and found.method == "relp"
    layers = found.values["layer"].values
    assert (np.diff(layers) >= 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_sum_over_positions_and_nodes(family: str) -> None:
    """Nodes of all positions are sums of nodes; those of a dictionary sum to the score of the activation."""
    for method in ("gradient", "integrated_gradients"):
        found, together = scores(family, method), scores(family, method, per_position=False)
        assert np.allclose(found.values.sum("pos"), together.values, atol=1e-5)
        assert together.values.dims == ("node", "example") and not together.per_position
    total = scores(family, "gradient").total()
    whole = attribution_patch(tiny_bridge(family), P, METRIC, sites=("z", "attn_out", "mlp_out", "resid_post"),
                              axes=("layer", "pos"), direction="noise")  # fmt: skip
    for name in PLAIN:
        layer, site = name.split(".")
        expected = whole[site].values.sel(layer=int(layer))
        assert np.allclose(total.sel(dictionary=name), expected, atol=1e-5) and float(abs(expected).max()) > 1e-3


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1.0), ("noise", -1.0)])
def test_a_linear_model_has_its_hand_worked_effects(direction: Any, sign: float) -> None:
    """As in test_latents: the stream is (1, 1) or (-1, -1); every method must find the same numbers."""
    bridge = double(micro())
    eye = torch.eye(2)
    saes = [signs(bridge, f"blocks.{layer}.hook_resid_pre", None, eye) for layer in (1, 0)]
    for token, expected in ((0, [25.0, 0, 25, 0, 0]), (1, [0, 49.0, 0, 49, 0])):
        p, metric = one_token(0, 1), logit(token)
        for method in ("gradient", "relp", "integrated_gradients", "integrated_gradients_inputs", "exact"):
            found = feature_effects(bridge, p, metric, saes, method=method, direction=direction)  # type: ignore[arg-type]
            assert found.values.values.ravel().tolist() == pytest.approx([sign * v for v in expected] * 2, abs=1e-4)
            assert found.dictionaries == ["0.resid_pre", "1.resid_pre"]
            best = set(found.top(4)["node"])
            assert best == {f"{layer}.resid_pre/{unit}@0" for layer in (0, 1) for unit in (token, token + 2)}


def test_lines_find_what_the_gradient_misses(gates: Any) -> None:
    """An OR gate is flat where both inputs are on: the gradient of noising is 0, a line to its other end is not."""
    p, metric = one_token(0, 1), logit(1)
    sae = signs(gates, "blocks.0.hook_resid_post", None, torch.eye(12)).to(torch.float32)
    latents = [3, 4, 5]  # a, b, and one that nothing reads
    line, gradient, exact = (
        feature_effects(gates, p, metric, sae, method=method, latents=latents, points="midpoint", steps=100)  # type: ignore[arg-type]
        .of(sae).values.values.ravel()
        for method in ("integrated_gradients", "gradient", "exact")
    )  # fmt: skip
    assert gradient.tolist() == exact.tolist() == [0, 0, 0]
    whole = activation_patch(gates, p, metric, site="resid_post", layers=[0], direction="noise").values.values.ravel()
    assert line[0] == pytest.approx(line[1]) and line[0] + line[1] == pytest.approx(whole[0], abs=1e-2) and line[2] == 0
    assert abs(whole[0]) > 0.5


def test_costs() -> None:
    """Backward passes counted where they happen, forwards at the last block."""
    bridge, saes, counts = tiny_bridge("gpt2"), several("gpt2"), {"forwards": 0, "backwards": 0}

    def forward(*_: Any) -> None:
        counts["forwards"] += 1

    original = torch.autograd.grad

    def grad(*args: Any, **options: Any) -> Any:
        counts["backwards"] += 1
        return original(*args, **options)

    expected = {
        "relp": (2, 1), "gradient": (2, 1), "integrated_gradients": (2 + 4 * 3, 4 * 3),
        "integrated_gradients_inputs": (2 + 3, 3),
    }  # fmt: skip
    for method, cost in expected.items():
        options: Any = {"steps": 3, "batch_size": N}
        scores("gpt2", method, **options)  # what is probed once, is
        counts.update(forwards=0, backwards=0)
        with pytest.MonkeyPatch.context() as patch, bridge.blocks[-1].register_forward_hook(forward):
            patch.setattr(torch.autograd, "grad", grad)
            found = scores("gpt2", method, **options)
        stated = found.provenance["cost"]
        probes, pullbacks = 2 * len(saes), 2 * 3 * len(saes)  # of placing dictionaries: three tokens
        assert (stated["forwards"], stated["backwards"]) == cost
        assert counts["backwards"] - pullbacks == cost[1] and counts["forwards"] - probes in (cost[0], cost[0] + 1)
        small = scores("gpt2", method, steps=3, batch_size=2)
        assert np.allclose(small.values, found.values, atol=1e-5)
    exact = scores("gpt2", "exact", positions=["end"])
    assert exact.provenance["cost"]["cells"] == len(saes) * (WIDTH + 1)


def test_selected_nodes_and_tables(tmp_path: Any) -> None:
    found = scores("gpt2")
    names = found.top(7)["node"].tolist()
    assert found.top(1)["value"].item() == pytest.approx(
        found.mean().values.ravel()[np.abs(found.mean().values).argmax()]
    )
    few = found.at([*names, "2.resid_post/error@0"])
    assert few.values.dims == ("node", "example") and few.values["node"].values.tolist()[:7] == names
    assert np.allclose(few.mean().values[:7], found.top(7)["value"])
    exact = scores("gpt2", "exact", nodes=[*names, "2.resid_post/error"])
    assert set(names) < set(exact.nodes) and len(exact.nodes) < len(found.nodes) / 2
    found_agreement = agreement(exact.at(names), found.at(names), k=3,
                                n_resamples=100)  # fmt: skip
    assert found_agreement.provenance["n_cells"] == 7
    with pytest.raises(ValueError, match="no node '1.mlp_out/99@0'"):
        found.at(["1.mlp_out/99@0"])
    with pytest.raises(ValueError, match="no node '1.mlp_out/3'"):
        found.at(["1.mlp_out/3"])
    again = results.load(found.save(tmp_path / "scores.nc"))
    assert isinstance(again, FeatureEffects) and repr(again) == repr(found) and again.nodes == found.nodes
    assert np.array_equal(again.of("1.z").values, found.of("1.z").values)
    frame = found.to_dataframe()
    assert {"node", "dictionary", "layer", "latent", "pos", "example", "value"} <= set(frame.columns)
    figure = found.plot(k=9)
    assert len(figure.data[0].x) == 9 and "relp" in figure.layout.title.text
    assert len(found.plot("recovery", k=4).data[0].x) == 4
    assert len(found.nodes) == found.mean().size == 4 * (WIDTH + 1) * POS


def test_hooks_and_gradients_are_left_as_found() -> None:
    bridge = fresh_bridge("llama")
    saes = several("llama")
    bridge.requires_grad_(True)
    before = METRIC(bridge(P.clean))
    feature_effects(bridge, P, METRIC, saes, method="integrated_gradients", steps=2)
    assert torch.equal(METRIC(bridge(P.clean)), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in bridge.parameters())
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_points())
    calls = 0

    def fails(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise ZeroDivisionError
        return METRIC(logits)

    with pytest.raises(ZeroDivisionError):
        feature_effects(bridge, P, fails, saes, method="integrated_gradients", steps=2)
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_points())
    with pytest.raises(RuntimeError, match="training mode"):
        feature_effects(bridge.train(), P, METRIC, saes)


@pytest.mark.usefixtures("unchecked")
def test_what_is_refused() -> None:
    bridge, saes = tiny_bridge("llama"), several("llama")
    queries = dictionary(bridge, "blocks.1.attn.hook_q")
    ig: Any = {"method": "integrated_gradients"}

    def run(dictionaries: Any = saes, **options: Any) -> Any:
        return feature_effects(bridge, P, METRIC, dictionaries, **options)

    for message, call in {
        "method='ig' is unknown": lambda: run(method="ig"),
        "direction='up' is unknown": lambda: run(direction="up"),
        "value='resample' is unknown": lambda: run(value="resample"),
        "points='right one' is unknown": lambda: run(points="right one"),
        "no dictionaries": lambda: run(()),
        "several dictionaries rebuild": lambda: run((saes[1], saes[1])),
        "rules= replaces the gradient": lambda: run(method="relp", rules="gim"),
        "embeddings lie between": lambda: run(method="integrated_gradients_inputs", value="mean"),
        "steps=0 must be at least 1": lambda: run(steps=0, **ig),
        "no relevance reaches the latents of blocks.1.attn.hook_q": lambda: run(queries, rules="relp_ah", **ig),
        "needs other examples": lambda: feature_effects(
            bridge, P[:1], logit_difference(P[:1]), saes, value="mean", **ig
        ),
        "give latents= or nodes=": lambda: run(latents={saes[0]: [1]}, nodes=["1.z/1"]),
        "nodes='9.z' is unknown": lambda: run(nodes=["9.z/1"]),
        "no node '1.z/x'": lambda: run(nodes=["1.z/x"]),
        "latents= is one list": lambda: run(latents=[1]),
        "too small": lambda: run(memory_budget=1000, **ig),
        "has no gradient": lambda: feature_effects(
            bridge, P, lambda logits: logits[:, -1].argmax(-1).float(), saes, **ig
        ),
        "a site is a name or a dictionary": lambda: run((torch.nn.Linear(2, 2),)),
        "not of this dictionary": lambda: run().of(queries),
        "dictionary='9.z' is unknown": lambda: run().of("9.z"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
