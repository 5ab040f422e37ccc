"""Exact patching against one forward per cell, on every site, direction, value and family; and its refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interp import hooks, metrics
from interp.models import geometry
from interp.patching import Effects, activation_patch
from interp.patching.activation import derangement
from interp.types import SITES
from tests.helpers import FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge
from tests.patching.oracle import POS, N, activations, patched, prompts

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
TOLERANCE = 1e-5


def runs(p: Any, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The run that is patched, and the other."""
    return (p.corrupted, p.clean) if direction == "denoise" else (p.clean, p.corrupted)


def sources(bridge: Any, site: str, base: torch.Tensor, other: torch.Tensor, value: str) -> dict[int, torch.Tensor]:
    """What `value` puts in, by its definition."""
    if value == "resample":
        other = other[derangement(len(other), torch.Generator().manual_seed(0))]
    found = activations(bridge, other, site)
    if value == "zero":
        return {layer: torch.zeros_like(tensor) for layer, tensor in found.items()}
    if value == "mean":
        return {layer: tensor.mean(0, keepdim=True).expand_as(tensor) for layer, tensor in found.items()}
    return found


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_one_forward_per_cell(family: str, site: Any) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.logit_difference(p)
    if site == "resid_mid" and geometry(bridge).parallel:
        with pytest.raises(ValueError, match="Attention and MLP run in parallel"):
            activation_patch(bridge, p, metric, site=site)
        return
    unit = None if site in STREAM else "neuron" if site == "neuron" else "head"
    units = {None: [None], "neuron": [0, 5], "head": [0, 1]}[unit]
    combinations = [("denoise", "swap"), ("noise", "swap"), ("noise", "mean")]
    combinations += [("denoise", "zero")] if SITES.index(site) % 2 else [("noise", "resample")]
    for direction, value in combinations:
        effects = activation_patch(
            bridge, p, metric, site=site, direction=direction, value=value,  # type: ignore[arg-type]
            axes=("layer", unit, "pos") if unit else None, neurons=[0, 5] if unit == "neuron" else None,
        )  # fmt: skip
        base, other = runs(p, direction)
        with torch.no_grad():
            baseline = metric(bridge(base))
        source = sources(bridge, site, base, other, value)
        assert torch.allclose(torch.tensor(effects.baseline.values), baseline, atol=TOLERANCE)
        largest = 0.0
        for layer in range(N_LAYERS):
            for position in (3, POS - 1):
                for one in units:
                    logits = patched(bridge, base, site, [layer], source, torch.full((N,), position), one)
                    expected = metric(logits) - baseline
                    got = effects.values.sel(layer=layer, pos=position)
                    got = got if one is None else got.sel({effects.cells[1]: one})
                    assert torch.allclose(torch.tensor(got.values), expected, atol=TOLERANCE), (layer, position, one)
                    largest = max(largest, float(expected.abs().max()))
        assert largest > 0.01  # else nothing was compared


@pytest.mark.parametrize("site", ["k", "v"])
def test_grouped_models_have_key_value_heads(site: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    effects = activation_patch(bridge, p, metrics.logit_difference(p), site=site)
    assert effects.values.sizes == {"layer": N_LAYERS, "kv_head": 2, "example": N}
    plain = activation_patch(tiny_bridge("gpt2"), p, metrics.logit_difference(p), site=site)
    assert plain.values.sizes == {"layer": N_LAYERS, "head": 4, "example": N}


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_of_any_kind(family: str) -> None:
    """A plain callable, a metric of all positions, and a metric that reads another place in every example."""
    bridge, p = tiny_bridge(family), prompts()
    with torch.no_grad():
        reference = bridge(p.clean)
    early = dataclasses.replace(p, positions={**p.positions, "end": torch.tensor([5, 7, 6, 5])})
    kinds: list[Any] = [
        metrics.logit_difference(early),
        metrics.kl_divergence(reference),
        lambda logits: logits[:, -1].max(-1).values,
        lambda logits: logits[:, 3:].logsumexp(-1).mean(-1),
    ]
    for site in ("resid_pre", "mlp_out", "z"):
        source = activations(bridge, p.clean, site)
        for metric in kinds:
            effects = activation_patch(bridge, p, metric, site=site, axes=("layer", "pos"))  # type: ignore[arg-type]
            with torch.no_grad():
                baseline = metric(bridge(p.corrupted))
            for layer in range(N_LAYERS):
                for position in (2, 6):
                    logits = patched(bridge, p.corrupted, site, [layer], source, torch.full((N,), position))
                    got = torch.tensor(effects.values.sel(layer=layer, pos=position).values)
                    assert torch.allclose(got, metric(logits) - baseline, atol=TOLERANCE)
            assert float(abs(effects.values).max()) > 0.001


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "v", "pattern"])
def test_named_positions_and_positions_together(site: Any) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    source = activations(bridge, p.clean, site)
    with torch.no_grad():
        baseline = metric(bridge(p.corrupted))
    named = activation_patch(bridge, p, metric, site=site, axes=("layer", "pos"), positions=["s2", "end", "s1"])
    assert named.values.pos.values.tolist() == ["s2", "end", "s1"]
    both = activation_patch(bridge, p, metric, site=site, axes=("layer",), positions=["s1", "s2"])
    for layer in range(N_LAYERS):
        for name in ("s1", "s2", "end"):
            expected = metric(patched(bridge, p.corrupted, site, [layer], source, p.positions[name])) - baseline
            assert torch.allclose(
                torch.tensor(named.values.sel(layer=layer, pos=name).values), expected, atol=TOLERANCE
            )
        where = torch.stack([p.positions["s1"], p.positions["s2"]], 1)
        expected = metric(patched(bridge, p.corrupted, site, [layer], source, where)) - baseline
        assert torch.allclose(torch.tensor(both.values.sel(layer=layer).values), expected, atol=TOLERANCE)


def test_position_coordinates_show_the_token_or_the_role() -> None:
    p = prompts()
    p = dataclasses.replace(p, strings={0: "<bos>", 20: "word"})
    p.clean[:, 3] = p.corrupted[:, 3] = 20
    effects = activation_patch(tiny_bridge("gpt2"), p, metrics.logit_difference(p), layers=[0])
    assert effects.values.pos.values.tolist() == list(range(POS))
    assert effects.values.token.values.tolist()[:4] == ["<bos>", "<1>", "<2>", "word"]
    assert effects.values.token.values.tolist()[-1] == "<end>"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_part_of_a_sweep_is_a_slice_of_the_whole(data: st.DataObject) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    metric = metrics.logit_difference(p)
    site = data.draw(st.sampled_from(["resid_pre", "mlp_out", "q"]))
    whole = activation_patch(bridge, p, metric, site=site, axes=("layer", "pos"))
    layers = data.draw(st.lists(st.integers(0, N_LAYERS - 1), min_size=1, unique=True))
    positions = data.draw(st.lists(st.integers(0, POS - 1), min_size=1, unique=True))
    batch_size = data.draw(st.integers(1, 40))
    part = activation_patch(
        bridge, p, metric, site=site, axes=("pos", "layer"), layers=layers, positions=positions, batch_size=batch_size
    )
    expected = whole.values.sel(layer=layers, pos=positions).transpose("pos", "layer", "example")
    assert part.values.dims == expected.dims
    assert abs(part.values.values - expected.values).max() < TOLERANCE
    assert part.provenance["cost"]["largest_batch"] <= batch_size


def test_cells_that_cannot_matter_are_exactly_zero_and_not_run() -> None:
    """Before the first difference of the prompts, after the position read, and elsewhere in the last block."""
    bridge, p = tiny_bridge("gpt2"), prompts()
    p = dataclasses.replace(p, positions={**p.positions, "end": torch.full((N,), 6)})
    effects = activation_patch(bridge, p, metrics.logit_difference(p), site="attn_out")
    assert (effects.values.sel(pos=[0, 1]) == 0).all()
    assert (effects.values.sel(pos=7) == 0).all()
    assert (effects.values.sel(layer=N_LAYERS - 1, pos=slice(0, 5)) == 0).all()
    assert (effects.values.sel(layer=0, pos=slice(4, 6)) != 0).any()
    cost = effects.provenance["cost"]
    assert cost["rows"] == N_LAYERS * POS * N
    assert cost["rows_run"] < 0.5 * cost["rows"]


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z"])
def test_the_cost_in_the_provenance_is_what_ran(site: Any) -> None:
    bridge, p = fresh_bridge("gpt2"), prompts()
    ran = 0

    def count(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal ran
        resid = args[0] if args else kwargs["hidden_states"]
        ran += resid.shape[0] * resid.shape[1]

    metric = metrics.logit_difference(p)
    geometry(bridge), hooks.supports_prefix_reuse(bridge)  # probes of their own, once per model
    for block in bridge.blocks:
        block.original_component.register_forward_pre_hook(count, with_kwargs=True)
    cost = activation_patch(bridge, p, metric, site=site, axes=("layer", "pos")).provenance["cost"]
    # besides the cells: the run that is patched and the other one, that one's metric, and two last blocks for each
    # score
    overhead = ran / (N * POS * N_LAYERS) - cost["forward_equivalents"]
    assert -1e-3 <= overhead <= 1 + 4 / N_LAYERS + 1e-3
    assert cost["forward_equivalents_minimum"] <= cost["forward_equivalents"] < cost["forwards_one_per_cell"] / 2


def test_memory_budget_bounds_the_batches() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts(n=12)
    metric = metrics.logit_difference(p)
    largest, values = [], []
    for budget in (2**30, 2**21, 2**19):
        effects = activation_patch(bridge, p, metric, site="z", axes=("layer", "pos"), memory_budget=budget)
        largest.append(effects.provenance["cost"]["largest_batch"])
        values.append(torch.tensor(effects.values.values))
    assert largest[0] > largest[1] > largest[2]
    assert all(torch.allclose(value, values[0], atol=TOLERANCE) for value in values)
    with pytest.raises(ValueError, match=r"memory_budget=1,000 bytes is too small: about [\d,]+ are needed"):
        activation_patch(bridge, p, metric, memory_budget=1000)
    with pytest.raises(ValueError, match="a batch must hold all 12 examples"):
        activation_patch(bridge, p, lambda logits: logits[:, -1, 0], memory_budget=2**18)


def test_gaussian_noise_is_seeded_sized_and_averaged() -> None:
    bridge, p = tiny_bridge("gemma2"), prompts()
    metric = metrics.logit_difference(p)

    def run(**options: Any) -> Effects:
        return activation_patch(bridge, p, metric, value="gaussian", direction="noise", **options)

    once = run()
    assert (once.values == run().values).all()
    assert (once.values != run(seed=1).values).any()
    assert (run(noise=0.0).values == 0).all()
    # the embedding enters the stream multiplied by the root of its width in this family
    scale = float(bridge.W_E.std()) * 32**0.5
    assert once.provenance["noise_std"] == pytest.approx(3 * scale, rel=1e-3)
    averaged = run(n_draws=3)
    assert averaged.values.sizes == once.values.sizes
    assert abs(averaged.baseline - once.baseline).max() < TOLERANCE
    with pytest.raises(ValueError, match="site='z' has other units"):
        run(site="z")


def test_derangements_have_no_fixed_points() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 7):
        for _ in range(20):
            order = derangement(n, generator)
            assert sorted(order.tolist()) == list(range(n))
            assert not (order == torch.arange(n)).any()


def test_everything_is_restored_after_an_error() -> None:
    bridge, p = fresh_bridge("llama"), prompts()
    before = [len(point.fwd_hooks) for point in bridge.hook_points()]
    calls = 0

    def metric(logits: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 5:
            raise ArithmeticError("in the middle of a sweep")
        return logits[:, -1, 0]

    with torch.no_grad():
        logits = bridge(p.clean)
    for site in ("resid_pre", "z", "resid_mid"):
        calls = 0
        with pytest.raises(ArithmeticError):
            activation_patch(bridge, p, metric, site=site)  # type: ignore[arg-type]
        assert [len(point.fwd_hooks) for point in bridge.hook_points()] == before
        assert all("forward" not in block.__dict__ for block in bridge.blocks)
        assert torch.is_grad_enabled()
        with torch.no_grad():
            assert torch.equal(bridge(p.clean), logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "residpre"}, "site='residpre' is unknown; did you mean 'resid_pre'"),
        ({"direction": "denoising"}, "direction='denoising' is unknown; did you mean 'denoise'"),
        ({"value": "means"}, "value='means' is unknown; did you mean 'mean'"),
        ({"axes": ("layer", "head")}, "axes='head' is unknown.*Expected one of 'layer', 'pos'"),
        ({"site": "z", "axes": ("head",)}, "must name 'layer'"),
        ({"positions": ["s3"]}, r"positions='s3' is unknown; did you mean 's[12]'\? Expected one of 's1', 's2', 'end'"),
        ({"positions": [8]}, "position 8 is not in the prompts, which have 8 tokens"),
        ({"positions": [1, 1]}, "none twice"),
        ({"layers": [0, 3]}, r"layers=\[0, 3\]: \[3\] do not exist; expected indices from 0 to 2"),
        ({"site": "neuron", "neurons": [48]}, r"\[48\] do not exist; expected indices from 0 to 47"),
        ({"neurons": [1]}, "neurons= is for site='neuron'"),
        ({"n_draws": 2}, "n_draws=2 with value='swap'"),
        ({"batch_size": 0}, "batch_size=0 is below 1"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals_come_before_any_forward(options: dict[str, Any], message: str) -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    geometry(bridge)
    ran = []
    handle = bridge.blocks[0].register_forward_pre_hook(lambda *args: ran.append(1))
    try:
        with pytest.raises(ValueError, match=message):
            activation_patch(bridge, p, metric, **options)
    finally:
        handle.remove()
    assert not ran


@pytest.mark.usefixtures("unchecked")
def test_refusals_of_models_metrics_and_prompts() -> None:
    bridge, p = tiny_bridge("gpt2"), prompts()
    metric = metrics.logit_difference(p)
    with pytest.raises(ValueError, match="needs other examples, but there is 1"):
        activation_patch(bridge, p[:1], metrics.logit_difference(p[:1]), value="mean")
    with pytest.raises(ValueError, match="built for 4 examples, but there are 2 prompts"):
        activation_patch(bridge, p[:2], metric)
    with pytest.raises(ValueError, match=r"the metric returned shape \(\) for logits of 4 examples"):
        activation_patch(bridge, p, lambda logits: logits.mean())
    with pytest.raises(ValueError, match="the metric is not finite on the run to be patched"):
        activation_patch(bridge, p, lambda logits: logits[:, -1, 0] * torch.nan)
    with pytest.raises(ValueError, match="pass a function of logits"):
        activation_patch(bridge, p, "logit_difference")  # type: ignore[arg-type]
    padded = dataclasses.replace(p, clean=torch.cat([p.clean[:, :-1], torch.ones(N, 1, dtype=torch.long)], 1))
    with pytest.raises(ValueError, match="padding"):
        activation_patch(bridge, padded, metric)
    with pytest.raises(ValueError, match="pattern cannot be edited"):
        activation_patch(tiny_bridge("gptj"), p, metric, site="pattern")
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        activation_patch(training, p, metric)


@pytest.mark.parametrize("site", ["resid_pre", "v", "pattern"])
def test_windowed_attention_is_exact(site: Any) -> None:
    """Prompts longer than the window: suffixes see a part of their prefix only."""
    bridge, p = tiny_bridge("gemma2", sliding_window=4), prompts(pos=10)
    metric = metrics.logit_difference(p)
    source = activations(bridge, p.clean, site)
    effects = activation_patch(bridge, p, metric, site=site, axes=("layer", "pos"))
    with torch.no_grad():
        baseline = metric(bridge(p.corrupted))
    for layer in range(N_LAYERS):
        for position in (5, 7, 9):
            logits = patched(bridge, p.corrupted, site, [layer], source, torch.full((N,), position))
            got = torch.tensor(effects.values.sel(layer=layer, pos=position).values)
            assert torch.allclose(got, metric(logits) - baseline, atol=TOLERANCE)
    assert float(abs(effects.values).max()) > 0.01


def test_families_that_delegate_attention_are_exact_too() -> None:
    p = prompts()
    metric = metrics.logit_difference(p)
    for family in ("opt", "gptj"):
        bridge = tiny_bridge(family)
        for site in ("mlp_out", "v"):
            source = activations(bridge, p.clean, site)
            effects = activation_patch(bridge, p, metric, site=site, axes=("layer", "pos"))
            with torch.no_grad():
                baseline = metric(bridge(p.corrupted))
            for layer in range(N_LAYERS):
                expected = metric(patched(bridge, p.corrupted, site, [layer], source, p.positions["s2"])) - baseline
                got = effects.values.sel(layer=layer).values[p.positions["s2"].numpy(), range(N)]
                assert torch.allclose(torch.tensor(got), expected, atol=TOLERANCE)


def test_results_are_saved_whole(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    effects = activation_patch(
        bridge, p, metrics.logit_difference(p), site="z", positions=["s2", "end"], axes=("layer", "head", "pos")
    )
    loaded = Effects.load(effects.save(tmp_path / "effects.nc"))
    assert loaded.values.identical(effects.values)
    assert loaded.clean.identical(effects.clean) and loaded.corrupted.identical(effects.corrupted)
    assert loaded.provenance == effects.provenance
    assert (loaded.direction, loaded.site, loaded.value, loaded.metric) == ("denoise", "z", "swap", "logit_difference")
    record = effects.provenance
    assert record["prompts"] == {"name": "random", "seed": 0, "n": N, "tokens": POS}
    assert record["positions"] == ["s2", "end"] and record["axes"] == ["layer", "head", "pos"]
    assert record["reference"] == "the same example of the other run" and record["dtype"] == "float32"
