"""Latents as sites: one forward per cell, the sums of scores, hand-worked gates, and what is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks, metrics, results
from interp.dictionaries import JumpReLUSAE, ReLUSAE, TopKSAE, spliced
from interp.patching import LatentEffects, activation_patch, agreement, attribution_patch, miss_bound, verify
from interp.patching._joint import patch_sets
from interp.patching._latent_places import latent_site
from interp.patching._rerun import rerun
from interp.patching.activation import derangement
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens
from tests.patching.oracle import POS, N, prompts
from tests.patching.test_attribution import METHODS, _double, double, doubled, exact_scores, gates, micro, runs

__all__ = ["_double", "gates"]  # fixtures
from tests.patching.test_known_answers import logit, one_token

WIDTH = 24
Decode = Callable[[Tensor, Tensor], Tensor]


def dictionary(bridge: Any, hook: str, target: str | None = None, *, kind: Any = TopKSAE, **options: Any) -> Any:
    """A random dictionary of the model's own widths and dtype, with all biases set."""
    with torch.no_grad(), hooks.reads(bridge, [hook, *([target] if target else [])]) as found:
        bridge(tiny_tokens())
    own = {name: tensor.flatten(2).shape[-1] for name, tensor in found.items()}
    if kind is TopKSAE:
        options.setdefault("k", 4)
    dtype = next(iter(bridge.original_model.parameters())).dtype
    made = kind(
        own[hook],
        WIDTH,
        d_out=own[target or hook],
        hook=hook,
        target_hook=target,
        decoder_norm=1.0,
        dtype=dtype,
        **options,
    )
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in ("b_enc", "b_dec", "W_skip"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draws))
    if made.normalisation in ("mean_norm", "mean_square"):
        made.estimate_normalisation(
            found[hook].flatten(0, 1).flatten(1), found[target].flatten(0, 1) if target else None
        )
    return made.requires_grad_(False)


@torch.no_grad()
def read(bridge: Any, tokens: Tensor, *names: str) -> list[Tensor]:
    with hooks.reads(bridge, list(dict.fromkeys(names))) as found:
        bridge(tokens)
    return [found[name].flatten(2) for name in names]


@torch.no_grad()
def by_hand(
    bridge: Any, sae: Any, metric: Any, base: Tensor, latents: Tensor, activations: Tensor | None, cells: list[Any]
) -> dict[Any, Tensor]:
    """Effects of cells `(latent or "error", positions [row, k])`, one whole forward for each."""
    target = sae.target_hook or sae.hook
    x, own = read(bridge, base, sae.hook, target)
    f = sae.encode(x)
    error = sae.decode(latents, x) - own if activations is None else activations - own
    error = error - (sae.decode(latents, x) - sae.decode(f, x))
    start, found = metric(bridge(base)), {}
    for unit, where in cells:
        added = torch.zeros_like(own)
        for row, positions in enumerate(where.tolist()):
            for position in positions:
                if unit == "error":
                    added[row, position] = error[row, position]
                    continue
                new = f.clone()
                new[row, position, unit] = latents[row, position, unit]
                added[row, position] += (sae.decode(new, x) - sae.decode(f, x))[row, position]

        def edit(tensor: Tensor, *, hook: Any, _added: Tensor = added) -> Tensor:
            return tensor + _added.reshape(tensor.shape)

        key = (unit, *where[0].tolist())
        if target.endswith("hook_resid_mid"):
            with hooks.interventions(bridge, {target: lambda t, _a=added: t + _a.reshape(t.shape)}):
                found[key] = metric(bridge(base)) - start
        else:
            found[key] = metric(bridge.run_with_hooks(base, fwd_hooks=[(target, edit)])) - start
    return found


PLACES: list[tuple[str, str, str | None, dict[str, Any]]] = [
    ("gpt2", "blocks.1.hook_mlp_out", None, {}),
    ("llama", "blocks.0.hook_resid_pre", None, {"kind": JumpReLUSAE}),
    ("llama", "blocks.2.attn.hook_z", None, {"normalisation": "mean_norm"}),
    ("llama", "blocks.1.attn.hook_k", None, {}),
    ("llama", "blocks.2.mlp.hook_post", None, {"decoder": "rescaled"}),
    ("neox", "blocks.1.hook_attn_out", None, {"normalisation": "layer_norm"}),
    ("neox", "blocks.2.hook_resid_post", None, {"kind": ReLUSAE}),
    ("gemma2", "blocks.1.hook_resid_mid", None, {"normalisation": "constant_norm"}),
    ("gemma2", "blocks.2.mlp.hook_in", "blocks.2.mlp.hook_out", {"skip": True}),
    ("gpt2", "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out", {"skip": True, "normalisation": "mean_square"}),
    ("gpt2", "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post", {"kind": ReLUSAE}),
]


@pytest.mark.parametrize("number", range(len(PLACES)))
def test_effects_are_those_of_one_forward_per_cell(number: int) -> None:
    family, hook, target, options = PLACES[number]
    bridge, p = tiny_bridge(family), prompts()
    sae, metric = dictionary(bridge, hook, target, **options), metrics.logit_difference(p)
    direction = ("denoise", "noise")[number % 2]
    value = ("swap", "zero", "mean", "resample")[number % 4]
    base, other = runs(p, direction)
    x, own, latents = *read(bridge, other, hook, target or hook), torch.empty(0)
    latents = sae.encode(x)
    if value == "zero":
        latents, own = torch.zeros_like(latents), None
    elif value == "mean":
        latents, own = latents.mean(0).expand_as(latents), own.mean(0).expand_as(own)
    elif value == "resample":
        order = derangement(N, torch.Generator().manual_seed(0))
        latents, own = latents[order], own[order]
    moved = (latents != sae.encode(read(bridge, base, hook)[0])).any(0).any(0).nonzero()[:, 0].tolist()
    units, where = [*moved[:4], *({0, WIDTH - 1} - set(moved[:4]))], [2, 5, POS - 1]
    cells = [(unit, torch.full((N, 1), pos)) for unit in [*units, "error"] for pos in where]
    expected = by_hand(bridge, sae, metric, base, latents, own, cells)

    found = activation_patch(
        bridge,
        p,
        metric,
        site=sae,
        direction=direction,
        value=value,
        latents=units,
        positions=where,  # type: ignore[arg-type]
    )
    assert isinstance(found, LatentEffects) and found.values.dims == ("latent", "pos", "example")
    largest = {"latents": 0.0, "error": 0.0}
    for (unit, pos), effect in expected.items():
        got = found.error.sel(pos=pos) if unit == "error" else found.values.sel(latent=unit, pos=pos)
        assert torch.allclose(torch.from_numpy(got.values), effect, atol=2e-5, rtol=1e-4), (unit, pos)
        which = "error" if unit == "error" else "latents"
        largest[which] = max(largest[which], float(effect.abs().max()))
    assert min(largest.values()) > 1e-3, largest


@functools.cache
def sites_of(family: str) -> dict[str, Any]:
    """Dictionaries by the site that they rebuild, float64."""
    bridge = doubled(family)
    return {
        "mlp_out": dictionary(bridge, "blocks.1.hook_mlp_out"),
        "z": dictionary(bridge, "blocks.1.attn.hook_z", kind=ReLUSAE, normalisation="mean_square"),
        "resid_post": dictionary(bridge, "blocks.0.hook_resid_post", kind=JumpReLUSAE, normalisation="layer_norm"),
        "attn_out": dictionary(bridge, "blocks.1.hook_resid_pre", "blocks.2.hook_attn_out", skip=True),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_and_error_sum_to_the_score_of_the_activation(family: str) -> None:
    """Of every method, in the model's own precision; and dictionaries beside each other change nothing."""
    bridge, p = doubled(family), prompts()
    metric, saes = metrics.logit_difference(p), sites_of(family)
    some = {"llama": METHODS, "gpt2": ("gradient", "relp_ah"), "neox": ("gradient", "cp_lrp")}
    for number, method in enumerate(some.get(family, ("gradient", "relp"))):
        options: dict[str, Any] = {"method": method, "steps": 2, "direction": ("denoise", "noise")[number % 2]}
        if method == "relp":
            options["value"] = "mean"
        axes = dict.fromkeys(saes, ("layer", "pos"))
        found = exact_scores(bridge, p, metric, sites=(*saes.values(), *saes), axes=axes, **options)
        for site, sae in saes.items():
            layer = hooks.layer_of(bridge, sae.target_hook or sae.hook)
            node, latents = found[site][layer, :, 0], found[sae][0]
            assert latents.shape == (POS, WIDTH + 1, N)
            assert torch.allclose(latents.sum(1), node, rtol=0, atol=1e-9), (method, site)
            assert latents[:, :-1].abs().max() > 1e-3 and latents[:, -1].abs().max() > 1e-3
        if method in ("gradient", "integrated_gradients"):
            alone = exact_scores(bridge, p, metric, sites=saes["z"], **options)[saes["z"]]
            assert torch.allclose(alone, found[saes["z"]], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_derivatives_with_respect_to_spliced_latents(family: str) -> None:
    """The gradient is that of the dictionary spliced in with its error, times the change of latent and error."""
    bridge, p = doubled(family), prompts()
    metric = metrics.logit_difference(p)
    every = list(sites_of(family).items())
    for site, sae in every if family == "gpt2" else every[1:]:
        found = exact_scores(bridge, p, metric, sites=sae)[sae][0]  # [pos, latent and error, example]
        with hooks.no_retained_graph(bridge):
            with spliced(bridge, sae) as inside:
                loss = metric(bridge(p.corrupted)).sum()
            assert inside.latents is not None and inside.error is not None
            by_latent, by_error = torch.autograd.grad(loss, [inside.latents, inside.error])
        x, other = read(bridge, p.corrupted, sae.hook)[0], read(bridge, p.clean, sae.hook)[0]
        change = sae.encode(other) - sae.encode(x)
        assert torch.allclose(found[:, :-1].permute(2, 0, 1), change * by_latent, rtol=0, atol=1e-9), site
        if site in ("mlp_out", "z"):  # no skip, no normalisation by token: the error is the reconstruction's alone
            own, others = (read(bridge, t, sae.hook)[0] for t in (p.corrupted, p.clean))
            error = (others - sae(other)) - (own - sae(x))
            assert torch.allclose(found[:, -1].T, (error * by_error).sum(-1), rtol=0, atol=1e-9), site


def signs(bridge: Any, hook: str, target: str | None, rows: Tensor) -> ReLUSAE:
    """Latents relu(x0), relu(x1), relu(-x0), relu(-x1), with these rows and their opposites."""
    width = rows.shape[0]
    sae = ReLUSAE(width, 2 * width, d_out=width, hook=hook, target_hook=target, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(width), -torch.eye(width)], 1))
        sae.W_dec.copy_(torch.cat([rows, -rows]))
    return sae.requires_grad_(False)


@pytest.mark.parametrize(("direction", "sign"), [("denoise", 1.0), ("noise", -1.0)])
def test_a_linear_model_has_its_hand_worked_effects(direction: Any, sign: float) -> None:
    """The stream is (1, 1) or (-1, -1), and (5, 7) times that after a block; attention of block 1 adds 4 and 6 times.

    So each of the two latents that change carries half of the 50 and 98. The transcoder rebuilds 10 and 30 of the 20
    and 42 that attention adds; its error has the rest.
    """
    bridge = double(micro())
    cases = [
        (signs(bridge, "blocks.0.hook_resid_pre", None, torch.eye(2)), [[25.0, 0, 25, 0], [0, 49.0, 0, 49]], (0, 0)),
        (signs(bridge, "blocks.1.hook_resid_pre", None, torch.eye(2)), [[25.0, 0, 25, 0], [0, 49.0, 0, 49]], (0, 0)),
        (
            signs(bridge, "blocks.0.hook_resid_pre", "blocks.1.hook_attn_out", torch.diag(torch.tensor([10.0, 30.0]))),
            [[10.0, 0, 10, 0], [0, 30.0, 0, 30]],
            (20, 24),
        ),
    ]
    for sae, latents, errors in cases:
        for token in (0, 1):
            p, metric = one_token(0, 1), logit(token)
            exact = activation_patch(bridge, p, metric, site=sae, direction=direction)
            scores = [
                attribution_patch(bridge, p, metric, sites=sae, direction=direction, method=method)[sae]  # type: ignore[arg-type]
                for method in ("gradient", "integrated_gradients", "relp")[: 3 if token else 1]
            ]
            for found in (exact, *scores):
                assert isinstance(found, LatentEffects)
                assert found.values.values.ravel().tolist() == pytest.approx(
                    [sign * v for v in latents[token]], abs=1e-6
                )
                assert found.error.values.ravel().tolist() == pytest.approx([sign * errors[token]], abs=1e-6)


@pytest.mark.parametrize(
    ("gate", "direction", "exact", "gradient"),
    [
        ("and", "noise", [-0.75, -0.75, 0.0], [-1.0, -1.0, 0.0]),
        ("and", "denoise", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ("or", "noise", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
        ("or", "denoise", [0.75, 0.75, 0.0], [1.0, 1.0, 0.0]),
    ],
)
def test_the_latents_of_two_inputs_of_a_gate(  # gates by hand, see test_attribution
    gates: Any,
    gate: str,
    direction: Any,
    exact: list[float],
    gradient: list[float],
) -> None:
    """Latents 3, 4 and 5 are the inputs a, b and one that nothing reads."""
    p, metric = one_token(0, 1), logit(["and", "or"].index(gate))
    sae = signs(gates, "blocks.0.hook_resid_post", None, torch.eye(12)).to(torch.float32)
    found = activation_patch(gates, p, metric, site=sae, direction=direction, latents=[3, 4, 5])
    assert found.values.values.ravel().tolist() == pytest.approx(exact, abs=1e-6)
    scores = attribution_patch(gates, p, metric, sites=sae, direction=direction, latents=[3, 4, 5])[sae]
    assert scores.values.values.ravel().tolist() == pytest.approx(gradient, abs=1e-6)


def test_cells_that_join_latents_or_positions() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric, sae = metrics.logit_difference(p), dictionary(bridge, "blocks.1.hook_mlp_out")
    x, other = (read(bridge, tokens, sae.hook)[0] for tokens in (p.corrupted, p.clean))
    f, goes_in = sae.encode(x), sae.encode(other)

    def together(latents: list[int], positions: Tensor) -> Tensor:
        """All these latents at these positions, in one forward."""
        new = f.clone()
        for row, at in enumerate(positions.tolist()):
            for position in at:
                new[row, position, latents] = goes_in[row, position, latents]
        added = sae.decode(new, x) - sae.decode(f, x)
        with torch.no_grad(), hooks.interventions(bridge, {sae.hook: lambda t: t + added}):
            edited = metric(bridge(p.corrupted))
        with torch.no_grad():
            return edited - metric(bridge(p.corrupted))

    def close(got: Any, expected: Tensor) -> bool:
        return torch.allclose(torch.from_numpy(got.values), expected, atol=2e-5) and float(expected.abs().max()) > 1e-4

    chosen = sorted((f != goes_in).any(0).any(0).nonzero()[:, 0].tolist())[:6]
    end, everywhere = torch.full((N, 1), POS - 1), torch.arange(POS).repeat(N, 1)
    joint = activation_patch(bridge, p, metric, site=sae, axes=("pos",), latents=chosen)
    assert joint.values.dims == ("pos", "example") and close(joint.values.sel(pos=POS - 1), together(chosen, end))
    over = activation_patch(bridge, p, metric, site=sae, axes=["latent"], latents=chosen)
    assert over.values.dims == ("latent", "example") and isinstance(over, LatentEffects)
    assert over.error.dims == ("example",)
    assert close(over.values.sel(latent=chosen[0]), together(chosen[:1], everywhere))
    moves = (f != goes_in)[torch.arange(N), p.positions["s1"]].any(0).nonzero()[:, 0].tolist()
    chosen = [*moves[:2], *(i for i in chosen if i not in moves[:2])]
    named = activation_patch(bridge, p, metric, site=sae, positions=["s1", "end"], latents=chosen[::-1])
    assert named.values["latent"].values.tolist() == chosen[::-1] and named.values["pos"].values.tolist() == [
        "s1",
        "end",
    ]
    assert close(named.values.sel(latent=chosen[1], pos="s1"), together(chosen[1:2], p.positions["s1"][:, None]))

    scores = attribution_patch(bridge, p, metric, sites=sae, latents=chosen)[sae]
    summed = attribution_patch(bridge, p, metric, sites=("z", sae), axes={sae: ("pos",)}, latents={sae: chosen})
    assert tuple(summed) == ("z", sae) and isinstance(scores, LatentEffects)
    assert torch.allclose(
        torch.tensor(summed[sae].values.values), torch.tensor(scores.values.sum("latent").values), atol=1e-5
    )
    node = attribution_patch(bridge, p, metric, sites="mlp_out")["mlp_out"].values.sel(layer=1)
    whole = attribution_patch(bridge, p, metric, sites=sae)[sae]
    assert isinstance(whole, LatentEffects)
    assert torch.allclose(torch.tensor(whole.total().values), torch.tensor(node.values), atol=1e-5)


def test_batches_budgets_and_plain_callables_change_nothing() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric, sae = metrics.logit_difference(p), dictionary(bridge, "blocks.1.hook_resid_post", skip=False)
    expected = activation_patch(bridge, p, metric, site=sae, positions=[4, 7])
    assert isinstance(expected, LatentEffects)
    options: list[dict[str, Any]] = [{"batch_size": 3}, {"memory_budget": 400_000}]
    for option in options:
        found = activation_patch(bridge, p, metric, site=sae, positions=[4, 7], **option)
        assert abs(found.values - expected.values).max() < 2e-5 and abs(found.error - expected.error).max() < 2e-5
    whole = activation_patch(bridge, p, lambda logits: metric(logits), site=sae, positions=[4, 7])
    assert abs(whole.values - expected.values).max() < 2e-5 and abs(whole.error - expected.error).max() < 2e-5
    cost, moved = expected.provenance["cost"], abs(expected.values).max("example") > 0
    assert cost["cells"] == 2 * (WIDTH + 1) and cost["rows_run"] < cost["rows"] and 4 < int(moved.sum()) < 2 * WIDTH
    scores = attribution_patch(bridge, p, metric, sites=sae, positions=[4, 7])[sae]
    small = attribution_patch(bridge, p, metric, sites=sae, positions=[4, 7], batch_size=1)[sae]
    assert abs(scores.values - small.values).max() < 1e-5


def test_scores_are_compared_and_verified_with_their_dictionary() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric, sae = metrics.logit_difference(p), dictionary(bridge, "blocks.1.attn.hook_z", kind=ReLUSAE)
    exact = activation_patch(bridge, p, metric, site=sae)
    scores = attribution_patch(bridge, p, metric, sites=("z", sae), method="relp")[sae]
    found = agreement(exact, scores, k=5, n_resamples=100)
    assert found.pearson == pytest.approx(_correlation(exact.mean().values, scores.mean().values), abs=1e-5)
    checked = verify(bridge, p, metric, scores, k=8, n_random=300, n_resamples=100, warn_below=-1.0, dictionary=sae)
    seen = checked.values.notnull()
    assert bool(abs(checked.values - exact.values).where(seen, 0).max() < 2e-5)
    assert bool((exact.values.where(~seen, 0) == 0).all()) and int(seen.sum()) > 40 * N
    bound = miss_bound(bridge, p, metric, scores, k=4, n_subsets=64, share=0.2, dictionary=sae)
    assert bound.values.dims == ("latent", "pos")

    again = rerun(bridge, p, metric, scores, memory_budget=2**30, batch_size=None, dictionary=sae)
    sets = torch.rand(3, 1, POS, WIDTH, generator=torch.Generator().manual_seed(0)) < 0.2
    joint, _ = patch_sets(bridge, again, sets, progress=False)
    x, other = (read(bridge, tokens, sae.hook)[0] for tokens in (p.corrupted, p.clean))
    f = sae.encode(x)
    for chosen, got in zip(sets[:, 0], joint, strict=True):
        added = sae.decode(torch.where(chosen, sae.encode(other), f), x) - sae.decode(f, x)
        with torch.no_grad(), hooks.interventions(bridge, {sae.hook: lambda t, a=added: t + a.reshape(t.shape)}):
            expected = metric(bridge(p.corrupted))
        with torch.no_grad():
            assert torch.allclose(got, expected - metric(bridge(p.corrupted)), atol=2e-5)

    twin = dictionary(bridge, "blocks.1.attn.hook_z", kind=ReLUSAE, seed=5)
    with pytest.raises(ValueError, match="another dictionary: their fingerprint"):
        verify(bridge, p, metric, scores, dictionary=twin)
    with pytest.raises(ValueError, match="pass dictionary="):
        verify(bridge, p, metric, scores)
    with pytest.raises(ValueError, match="dictionary= is for scores of latents"):
        verify(bridge, p, metric, attribution_patch(bridge, p, metric, sites="z")["z"], dictionary=sae)
    with pytest.raises(ValueError, match="dictionary"):
        agreement(exact, attribution_patch(bridge, p, metric, sites=twin)[twin])


def _correlation(a: Any, b: Any) -> float:
    return float(torch.corrcoef(torch.stack([torch.tensor(a).ravel(), torch.tensor(b).ravel()]))[0, 1])


def test_repairs_figure_and_file(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric, sae = metrics.logit_difference(p), dictionary(bridge, "blocks.1.hook_mlp_out")
    found = attribution_patch(bridge, p, metric, sites=("q", sae), qk_fix=True, grad_drop=True)
    assert bool((found[sae].values >= 0).all()) and bool((found[sae].error >= 0).all())  # type: ignore[attr-defined]
    exact = activation_patch(bridge, p, metric, site=sae)
    assert isinstance(exact, LatentEffects)
    back = LatentEffects.load(exact.save(tmp_path / "effects.nc"))
    assert back.values.identical(exact.values) and back.error.identical(exact.error)
    assert isinstance(results.load(tmp_path / "effects.nc"), LatentEffects)
    assert "latents of blocks.1.hook_mlp_out" in repr(exact)
    figure = exact.plot(k=3)
    best = abs(exact.mean()).max("pos")
    names = [str(i) for i in sorted(best.argsort().values[::-1][:3].tolist())]
    assert list(figure.data[0].y) == [*names, "error"] or list(figure.layout.yaxis.ticktext) == [*names, "error"]
    assert activation_patch(bridge, p, metric, site=sae, axes=("pos",)).plot() is not None


def test_what_cannot_be_honoured_is_refused_before_any_forward() -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric, sae = metrics.logit_difference(p), dictionary(bridge, "blocks.1.hook_mlp_out")

    def refused(match: str, site: Any = sae, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            activation_patch(bridge, p, metric, site=site, **options)

    def at(hook: str, target: str | None = None, d_in: int = D_MODEL) -> Any:
        return TopKSAE(d_in, WIDTH, k=2, hook=hook, target_hook=target)

    refused("latents=.*24.* do not exist", latents=[3, WIDTH])
    refused("none twice", latents=[3, 3])
    refused("layers= is for named sites", layers=[1])
    refused("neurons= is for named sites", neurons=[1])
    refused("'layer' is unknown", axes=("layer", "pos"))
    refused("gaussian", value="gaussian")
    refused("n_draws=2", n_draws=2)
    refused("latents= chooses from a dictionary", site="mlp_out", latents=[0])
    with pytest.raises(ValueError, match="a site is a name or a dictionary"):
        latent_site(bridge, metric, None)
    refused("does not say which hook", site=at(""))
    refused("blocks are numbered 0 to 2", site=at("blocks.7.hook_mlp_out"))
    refused("outside the blocks", site=at("ln_final.hook_normalized"))
    refused("32 wide, the dictionary's d_in 16", site=at("blocks.1.hook_mlp_out", d_in=16))
    refused("one vector per position", site=at("blocks.1.attn.hook_pattern"))
    refused("comes after", site=at("blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"))
    refused("has not been estimated", site=TopKSAE(D_MODEL, 8, k=2, hook=sae.hook, normalisation="mean_norm"))

    class Squared(TopKSAE):
        def decode(self, latents: Tensor, x: Tensor | None = None) -> Tensor:
            return super().decode(latents.square(), x)

    refused("not affine", site=Squared(D_MODEL, WIDTH, k=2, hook=sae.hook))

    def unscored(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            attribution_patch(bridge, p, metric, **{"sites": (sae, "z"), **options})

    other = at("blocks.0.hook_mlp_out")
    unscored("none twice", sites=(sae, sae))
    unscored("2 dictionaries", sites=(sae, other), latents=[0])
    unscored("not among the sites", latents={other: [0]})
    unscored("not those of a dictionary", axes=("layer", "pos"))
    unscored(
        "no relevance reaches the latents of blocks.1.attn.hook_q", sites=at("blocks.1.attn.hook_q"), method="relp_ah"
    )
    unscored("axes= names the dictionary", axes={other: ("pos",)})
    assert not any(point.fwd_hooks or point.bwd_hooks for point in bridge.hook_points())


def test_attention_that_is_delegated_has_latents_of_its_outputs() -> None:
    bridge, p = tiny_bridge("gpt_neo"), prompts()
    with torch.no_grad(), hooks.reads(bridge, "blocks.1.attn.hook_z") as found:
        bridge(p.clean)
    width = found["blocks.1.attn.hook_z"].flatten(2).shape[-1]
    sae = TopKSAE(width, WIDTH, k=4, hook="blocks.1.attn.hook_z")
    assert activation_patch(bridge, p, metrics.logit_difference(p), site=sae).values.shape == (WIDTH, POS, N)
