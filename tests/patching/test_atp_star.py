"""The repairs of AtP*: against brute force on every family, and on models built to make attribution patching fail."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks, metrics
from interp.models import geometry
from interp.patching import activation_patch
from interp.patching._atp_star import key_effects, query_effects
from interp.patching.attribution import attribution_patch
from interp.prompts import Prompts
from interp.types import SITES
from tests.helpers import FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge
from tests.patching.oracle import POS, N, activations, prompts, write
from tests.patching.test_attribution import _double, exact_scores  # noqa: F401  (a fixture: float64 all the way)
from tests.patching.test_known_answers import blank, bridge_of, effect, logit, one_token

STREAM = ("resid_pre", "resid_mid", "resid_post")


@functools.cache
def doubled(family: str) -> Any:
    return fresh_bridge(family, dtype=torch.float64)


def slopes_at(
    bridge: Any, tokens: Tensor, metric: Any, names: list[str], dropped: int | None = None
) -> dict[str, Tensor]:
    """Gradients by backward hooks, which act behind edits, of one run of its own with one layer's outputs constant."""
    edits: dict[str, hooks.Edit] = {"blocks.0.hook_resid_pre": lambda tensor: tensor.detach().requires_grad_()}
    if dropped is not None:
        edits |= {
            hooks.hook_name(site, dropped): lambda tensor: tensor.detach() + 0 * tensor
            for site in ("attn_out", "mlp_out")
        }
    with hooks.no_retained_graph(bridge), hooks.interventions(bridge, edits):
        with hooks.gradients(bridge, names) as found:
            metric(bridge(tokens)).sum().backward()
        return dict(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_qk_fix_is_the_recomputed_pattern_times_the_gradient_at_the_pattern(family: str) -> None:
    """One run for every cell, in which that query or key alone is replaced, and its pattern read."""
    bridge, p = doubled(family), prompts()
    metric, heads = metrics.logit_difference(p), geometry(bridge).n_heads
    found = exact_scores(bridge, p, metric, sites=("q", "k"), axes=("layer", "pos", "head"), qk_fix=True)
    plain = exact_scores(bridge, p, metric, sites=("q", "k"), axes=("layer", "pos", "head"))
    patterns = [hooks.hook_name("pattern", layer) for layer in range(N_LAYERS)]
    slopes = slopes_at(bridge, p.corrupted, metric, patterns)
    base = activations(bridge, p.corrupted, "pattern")
    sites: tuple[tuple[Any, int], ...] = (("q", heads), ("k", geometry(bridge).n_kv_heads))
    for site, units in sites:
        other = activations(bridge, p.clean, site)
        for layer in range(N_LAYERS):
            for position in (4, POS - 1):
                for unit in range(layer % 2, units, 2 if site == "q" else 1):
                    put = functools.partial(write, site, source=other[layer], pos=torch.full((N,), position), unit=unit)
                    edit = {hooks.hook_name(site, layer): put}
                    with torch.no_grad(), hooks.interventions(bridge, edit), hooks.reads(bridge, patterns) as read:
                        bridge(p.corrupted)
                    change = read[patterns[layer]] - base[layer]
                    expected = (change * slopes[patterns[layer]]).sum((1, 2, 3))
                    got = found[site][layer, position, unit]
                    assert torch.allclose(got, expected, rtol=1e-8, atol=1e-10), (site, layer, position, unit)
        assert (found[site] - plain[site]).abs().max() > 0.01 * plain[site].abs().max()


def test_joint_cells_of_the_fix_are_sums_and_other_sites_are_as_without() -> None:
    bridge, p = doubled("llama"), prompts()
    metric = metrics.logit_difference(p)
    cells = exact_scores(bridge, p, metric, sites=("q", "k"), axes=("layer", "pos", "head"), qk_fix=True)
    joint = exact_scores(bridge, p, metric, sites=("q", "k"), axes=("layer",), qk_fix=True)
    for site in ("q", "k"):
        assert torch.allclose(joint[site], cells[site].sum((1, 2), keepdim=True), rtol=1e-9, atol=1e-12)
    mixed = exact_scores(bridge, p, metric, sites=("z", "k", "pattern"), layers=[2], qk_fix=True)
    plain = exact_scores(bridge, p, metric, sites=("z", "k", "pattern"), layers=[2])
    assert torch.equal(mixed["z"], plain["z"]) and torch.equal(mixed["pattern"], plain["pattern"])
    assert not torch.allclose(mixed["k"], plain["k"])


def test_the_change_of_a_key_is_exact_for_any_scores() -> None:
    """Against the softmax recomputed for each key with 60 digits, saturated and masked rows included."""
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    generator = torch.Generator().manual_seed(0)
    masked = torch.finfo(torch.float64).min
    for scale in (1.0, 20.0, 300.0):
        scores = scale * torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
        patched = scores + scale * torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
        gradient = torch.randn(1, 2, 4, 4, generator=generator, dtype=torch.float64)
        future = torch.ones(4, 4, dtype=torch.bool).triu(1)
        for fill in (masked, float("-inf")):
            a, b = scores.masked_fill(future, fill), patched.masked_fill(future, fill)
            got = key_effects(a, b, gradient, 1)
            for src in range(4):
                total, size = mpmath.mpf(0), mpmath.mpf(0)
                for head in range(2):
                    for dest in range(src, 4):
                        row = [mpmath.mpf(float(x)) for x in scores[0, head, dest, : dest + 1]]
                        new = [*row[:src], mpmath.mpf(float(patched[0, head, dest, src])), *row[src + 1 :]]
                        for j in range(dest + 1):
                            p, q = (mpmath.exp(r[j]) / sum(mpmath.exp(x) for x in r) for r in (row, new))
                            term = (q - p) * mpmath.mpf(float(gradient[0, head, dest, j]))
                            total, size = total + term, size + abs(term)
                assert abs(float(got[0, src, 0]) - float(total)) <= 1e-12 * float(size) + 1e-300, (scale, src)
            queries = query_effects(a, b, gradient)
            change = b.softmax(-1) - a.softmax(-1)
            assert torch.allclose(queries[0].T, (change * gradient).sum(-1)[0], atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_grad_drop_is_one_run_for_every_dropped_layer(family: str) -> None:
    bridge, p = doubled(family), prompts()
    metric = metrics.logit_difference(p)
    sites: list[Any] = [site for site in SITES if site != "resid_mid" or not geometry(bridge).parallel]
    found = exact_scores(bridge, p, metric, sites=sites, grad_drop=True)
    joint = exact_scores(bridge, p, metric, sites=sites, grad_drop=True, axes=("layer",), positions=[3, 5])
    names = {site: [hooks.hook_name(site, layer) for layer in range(N_LAYERS)] for site in sites}
    runs = [
        slopes_at(bridge, p.corrupted, metric, [n for site in sites for n in names[site]], dropped)
        for dropped in range(N_LAYERS)
    ]
    for site in sites:
        own, other = activations(bridge, p.corrupted, site), activations(bridge, p.clean, site)
        for layer in range(N_LAYERS):
            total = torch.zeros_like(found[site][layer])
            two = torch.zeros(N, dtype=torch.float64)
            for dropped, slopes in enumerate(runs):
                inside = site not in STREAM  # what is in the dropped layer reaches the metric no more; the stream does
                if inside and dropped == layer:
                    continue
                product = (other[layer] - own[layer]) * slopes[names[site][layer]]
                if site in (*STREAM, "attn_out", "mlp_out"):
                    cells = product.sum(-1).T.unsqueeze(1)
                elif site == "neuron":
                    cells = product.sum(1).T.unsqueeze(0)
                else:
                    cells = (product.sum((2, 3)) if site == "pattern" else product.sum((1, 3))).T.unsqueeze(0)
                total += cells.abs()
                picked = product[:, :, [3, 5]] if site == "pattern" else product[:, [3, 5]]
                two += picked.flatten(1).sum(1).abs()
            assert torch.allclose(found[site][layer], total / (N_LAYERS - 1), rtol=1e-9, atol=1e-12), (site, layer)
            assert torch.allclose(joint[site][layer, 0, 0], two / (N_LAYERS - 1), rtol=1e-9, atol=1e-12), (site, layer)


def test_both_repairs_together() -> None:
    """Each dropped backward with the fixed queries."""
    bridge, p = doubled("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    found = exact_scores(bridge, p, metric, sites="q", axes=("layer", "pos", "head"), qk_fix=True, grad_drop=True)["q"]
    patterns = [hooks.hook_name("pattern", layer) for layer in range(N_LAYERS)]
    base, other = activations(bridge, p.corrupted, "pattern"), activations(bridge, p.clean, "q")
    expected = torch.zeros(N, dtype=torch.float64)
    put = functools.partial(write, "q", source=other[0], pos=torch.full((N,), 5), unit=1)
    edit = {hooks.hook_name("q", 0): put}
    with torch.no_grad(), hooks.interventions(bridge, edit), hooks.reads(bridge, patterns) as read:
        bridge(p.corrupted)
    for dropped in range(1, N_LAYERS):
        slopes = slopes_at(bridge, p.corrupted, metric, patterns, dropped)
        expected += ((read[patterns[0]] - base[0]) * slopes[patterns[0]]).sum((1, 2, 3)).abs() / (N_LAYERS - 1)
    assert torch.allclose(found[0, 5, 1], expected, rtol=1e-8, atol=1e-12)


# Models built to fail


def saturated() -> Any:
    """One head whose last position looks at position 0 or away from it with a score of plus or minus 20.

    The sign is that of the key at position 0 (tokens 0 and 4) times that of the query (tokens 2 and 3); position 1
    (token 1) has a score of 0 and the value that is read. Dimension 7 of a head turns by 3e-4 per position.
    """
    model = blank(d_model=16, d_vocab=8, n_layers=1, n_heads=2)
    with torch.no_grad():
        embed, attention = model.model.embed_tokens.weight, model.model.layers[0].self_attn
        embed[2, 0], embed[3, 0], embed[0, 1], embed[4, 1], embed[1, 2] = 1, -1, 1, -1, 1
        attention.q_proj.weight[7, 0] = attention.k_proj.weight[7, 1] = 80**0.5  # a head divides by the root of 16
        attention.o_proj.weight[5, 2] = 1
        model.lm_head.weight[0, 5] = 1
    return bridge_of(model)


@pytest.mark.parametrize(("site", "clean", "corrupted"), [("q", [0, 1, 3], [0, 1, 2]), ("k", [4, 1, 2], [0, 1, 2])])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_saturated_head(site: Any, clean: list[int], corrupted: list[int], direction: Any) -> None:
    """Denoising starts from a head that looks at position 0 with all its weight, where its gradient has vanished."""
    bridge = saturated()
    p = Prompts(torch.tensor([clean]), torch.tensor([corrupted]), torch.tensor([0]), torch.tensor([1]))
    options: dict[str, Any] = {"axes": ("layer", "head"), "direction": direction}
    exact = effect(activation_patch(bridge, p, logit(0), site=site, **options))
    assert exact[0, 0] == pytest.approx(0.5 if direction == "denoise" else -0.5, rel=1e-3)  # it shares with itself
    plain = effect(attribution_patch(bridge, p, logit(0), sites=site, **options)[site])
    fixed = effect(attribution_patch(bridge, p, logit(0), sites=site, qk_fix=True, **options)[site])
    assert abs(plain[0, 0]) < 0.05 * abs(exact[0, 0])
    assert fixed[0, 0] == pytest.approx(float(exact[0, 0]), rel=1e-3)
    assert fixed[0, 1] == exact[0, 1] == 0  # the other head reads nothing


def cancelling() -> Any:
    """Heads copy six inputs; the first counts 1 to the output directly and -1 through neurons that soon saturate.

    The neurons take relu(x + 0.01) - relu(x - 0.1) from the output: slope 1 at 0, but only 0.1 in all from 0 to 1. The
    others count 0.1 to 0.5.
    """
    model = blank(d_model=18, d_vocab=4, n_layers=2, n_heads=6, d_mlp=2)
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[:, 14] = 1
        embed[0, :6] = 1
        first, second = model.model.layers
        for head in range(6):
            first.self_attn.o_proj.weight[6 + head, head * 18 + head] = 1
            model.lm_head.weight[0, 6 + head] = 1 if head == 0 else head / 10
        second.mlp.up_proj.weight[:, 14] = 1
        second.mlp.gate_proj.weight[:, 6] = 1
        second.mlp.gate_proj.weight[:, 14] = torch.tensor([0.01, -0.1])
        second.mlp.down_proj.weight[13] = torch.tensor([-1.0, 1.0])
        model.lm_head.weight[0, 13] = 1
    return bridge_of(model)


def test_a_cancelling_pair() -> None:
    bridge = cancelling()
    for site in ("z", "v"):
        exact = effect(activation_patch(bridge, one_token(0, 1), logit(0), site=site))[0]
        plain = effect(attribution_patch(bridge, one_token(0, 1), logit(0), sites=site)[site])[0]
        dropped = effect(attribution_patch(bridge, one_token(0, 1), logit(0), sites=site, grad_drop=True)[site])[0]
        assert exact[0] == pytest.approx(0.9, abs=1e-5)
        assert abs(plain[0]) < 0.05 * exact[0] and 0 not in plain.abs().topk(3).indices.tolist()
        assert 0 in dropped.topk(3).indices.tolist()
        assert torch.allclose(dropped, torch.tensor([1.0, 0.1, 0.2, 0.3, 0.4, 0.5]), atol=1e-6)  # (0 + |s|) / (2 - 1)


def test_a_pattern_that_is_not_the_softmax_of_its_scores_is_refused() -> None:
    """As attention with sinks has; here by an edit of the pattern."""
    bridge, p = tiny_bridge("llama"), prompts()
    edit = {hooks.hook_name("pattern", 1): lambda tensor: 0.5 * tensor}
    with hooks.interventions(bridge, edit), pytest.raises(ValueError, match="in layer 1 the two differ by 0.[45]"):
        attribution_patch(bridge, p, metrics.logit_difference(p), sites="q", qk_fix=True)


def test_grouped_and_plain_patterns_of_every_family_are_the_softmax_of_their_scores() -> None:
    for family in ("mistral", "qwen3", "phi"):
        bridge, p = tiny_bridge(family), prompts()
        found = attribution_patch(bridge, p, metrics.logit_difference(p), sites=("q", "k"), qk_fix=True)
        assert found["k"].provenance["qk_fix"] == ["q", "k"] and bool(abs(found["k"].values).max() > 1e-4)
