"""Clamps: what is set where, every effect against whole forwards, controls rebuilt by hand, refusals, cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import metrics
from interp.cache import capture
from interp.hooks import generate, hook_name, interventions
from interp.models import geometry
from interp.neurons import _clamp_runs, clamp, clamped, generate_clamped, match_neurons, neuron_statistics
from interp.neurons._clamp_edits import site_hook
from interp.neurons._clamp_runs import ClampRuns
from interp.neurons._dosing import _directions
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

MODES = {
    "set": lambda old, value: torch.full_like(old, value),
    "scale": lambda old, value: old * value,
    "add": lambda old, value: old + value,
}
N, POS = 3, 8


def last_difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def answered(at: list[int]) -> Any:
    end = torch.tensor(at)
    answers, foils = torch.tensor([5, 6, 7]), torch.tensor([9, 9, 4])
    return SimpleNamespace(answers=answers, foils=foils, positions={"end": end})


@contextmanager
def counting(bridge: Any) -> Iterator[list[int]]:
    """Tokens that each call of any block computes."""
    seen: list[int] = []
    handles = [
        block.original_component.register_forward_hook(
            lambda _m, args, kwargs, _out: seen.append(
                (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()
            ),
            with_kwargs=True,
        )
        for block in bridge.blocks
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def no_forward(bridge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry(bridge)  # probes that run once
    for layer in range(3):
        site_hook(bridge, "pre", layer)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a forward ran before the options were checked")

    monkeypatch.setattr(type(bridge), "forward", refuse)


@pytest.mark.parametrize(
    ("family", "mode"), [*((family, "set") for family in FAMILIES), ("llama", "scale"), ("llama", "add")]
)
def test_clamped_neurons_have_the_value_there_and_only_there(family: str, mode: Any):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    for site in ["post", "pre", *(["pre_linear"] if geometry(bridge).gated else [])]:
        names = [site_hook(bridge, site, layer) for layer in (0, 2)]  # type: ignore[arg-type]
        before, logits = capture(bridge, tokens, names), bridge(tokens)
        with clamped(bridge, [(2, 5), (2, 3)], [1.5, -2.0], mode=mode, site=site, positions=[1, -1]):  # type: ignore[arg-type]
            after = capture(bridge, tokens, names)
            assert not torch.allclose(bridge(tokens), logits, atol=1e-4)
        expected = before[names[1]].clone()
        for place in (1, POS - 1):
            for index, value in ((5, 1.5), (3, -2.0)):
                expected[:, place, index] = MODES[mode](before[names[1]][:, place, index], value)
        assert torch.equal(after[names[1]], expected)
        assert torch.equal(after[names[0]], before[names[0]])
        assert torch.equal(bridge(tokens), logits)


def test_positions_are_everywhere_per_row_or_several_per_row():
    bridge, tokens, name = tiny_bridge("llama"), tiny_tokens(N, POS), hook_name("neuron", 1)
    everywhere = torch.ones(N, POS, dtype=torch.bool)
    each = torch.zeros_like(everywhere)
    each[0, 2] = each[1, 0] = each[2, 7] = True
    several = each.clone()
    several[0, 7] = several[1, 6] = several[2, 1] = True
    for positions, where in (
        (None, everywhere),
        (torch.tensor([2, 0, -1]), each),
        (torch.tensor([[2, -1], [0, 6], [7, 1]]), several),
    ):
        with clamped(bridge, [(1, 4)], 9.0, positions=positions):
            assert torch.equal(capture(bridge, tokens, name)[name][..., 4] == 9.0, where)


def test_every_neuron_gets_its_own_number_whatever_the_order_of_layers():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(N, POS)
    values = {(2, 4): 1.5, (0, 3): -2.5, (2, 1): 3.5, (1, 7): 4.5}
    with clamped(bridge, list(values), list(values.values())):
        found = capture(bridge, tokens, "blocks.*.mlp.hook_post")
    for (layer, index), value in values.items():
        assert bool((found[hook_name("neuron", layer)][..., index] == value).all())


def test_ablated_neurons_are_zero_and_everything_is_put_back_after_an_exception():
    bridge, tokens, name = tiny_bridge("gpt2"), tiny_tokens(N, POS), hook_name("neuron", 1)
    before = bridge(tokens)
    with pytest.raises(RuntimeError, match="stop"), clamped(bridge, [(1, 4), (0, 2)], mode="ablate"):
        found = capture(bridge, tokens, name)[name]
        assert bool((found[..., 4] == 0).all()) and not bool((found[..., 5] == 0).any())
        raise RuntimeError("stop")
    assert torch.equal(bridge(tokens), before)


def by_hand(
    bridge: Any, tokens: Tensor, neurons: Any, value: Any, metric: Any, labels: int, at: Tensor, **how: Any
) -> Any:
    """The four measures of a clamp, from two whole forwards and formulas of their own."""
    rows = torch.arange(len(tokens))
    intact = bridge(tokens)
    with clamped(bridge, neurons, value, **how):
        logits = bridge(tokens)
    p, q = (x[rows, at].double().softmax(-1) for x in (intact, logits))
    effect = (logits - intact)[rows, at]
    return (
        metric(logits) - metric(intact),
        (q[:, labels] / p[:, labels]).log(),
        torch.where(effect.abs().amax(-1) > 1e-5, (effect > effect[:, [labels]]).sum(-1), torch.nan),
        (p * (p / q).log()).sum(-1),
    )


@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "one position") for family in FAMILIES), ("llama", "plain"), ("neox", "kl")]
)
@pytest.mark.parametrize("positions", [None, -1, torch.tensor([[6, 3], [5, 4], [7, 6]])], ids=["all", "last", "rows"])
def test_effects_equal_those_of_whole_forwards(family: str, positions: Any, kind: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    ends = [6, 5, 7]
    metric: Any = {
        "one position": metrics.logit_difference(answered(ends)),
        "plain": last_difference,
        "kl": metrics.kl_divergence(bridge(tokens)),
    }[kind]
    at = torch.tensor(ends if kind == "one position" else [POS - 1] * N)
    neurons, levels = [(0, 3), (2, 7)], [0.5, 3.0]
    found = clamp(bridge, tokens, neurons, levels, metric, labels=[11, 12], positions=positions, controls=())
    for u, neuron in enumerate(neurons):
        for i, level in enumerate(levels):
            expected = by_hand(bridge, tokens, [neuron], level, metric, 11 + u, at, positions=positions)
            arrays = (found.values, found.label_log_prob, found.label_rank, found.kl)
            for array, numbers in zip(arrays, expected, strict=True):
                np.testing.assert_allclose(array.values[u, 0, i], numbers, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(found.baseline.values, metric(bridge(tokens)), rtol=1e-5, atol=1e-6)
    options: Any = {"labels": [11, 12], "positions": positions, "controls": ()}
    alone = clamp(bridge, tokens, neurons, levels, metric, **options, memory_budget=1)  # each example by itself
    for name in ("values", "label_log_prob", "kl", "baseline"):
        np.testing.assert_allclose(getattr(alone, name), getattr(found, name), rtol=1e-4, atol=2e-5)
    assert found.provenance["metric"] == getattr(metric, "name", "last_difference")


@pytest.mark.parametrize("read", [-2, torch.tensor([7, 6, 2])], ids=["one", "each"])
def test_labels_may_be_read_elsewhere_than_the_metric(read: Any):
    bridge, tokens, neurons = tiny_bridge("llama"), tiny_tokens(N, POS), [(1, 3)]
    metric = metrics.logit_difference(answered([6, 5, 7]))
    found = clamp(bridge, tokens, neurons, [3.0], metric, labels=[11], read=read, positions=[1, 4], controls=())
    at = torch.tensor([6, 6, 6]) if isinstance(read, int) else read
    expected = by_hand(bridge, tokens, neurons, 3.0, metric, 11, at, positions=[1, 4])
    for name, numbers in zip(("values", "label_log_prob", "label_rank", "kl"), expected, strict=True):
        np.testing.assert_allclose(getattr(found, name).values[0, 0, 0], numbers, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("family", "mode"),
    [*((family, "set") for family in FAMILIES), ("llama", "scale"), ("gemma2", "add"), ("llama", "ablate")],
)
def test_modes_sites_and_sets_equal_those_of_whole_forwards(family: str, mode: Any):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    metric = metrics.logit_difference(answered([6, 5, 7]))
    sets = {"one layer": [(1, 3), (1, 9)], "all layers": [(2, 4), (0, 3), (1, 9)]}
    levels: Any = None if mode == "ablate" else [2.0]
    for site in ["post", "pre", *(["pre_linear"] if geometry(bridge).gated else [])]:
        found = clamp(bridge, tokens, sets, levels, metric, mode=mode, site=site, positions=[3, 5], controls=())  # type: ignore[arg-type]
        assert found.values.dims[0] == "set" and bool(np.isnan(found.label_rank).all())
        for u, members in enumerate(sets.values()):
            with clamped(bridge, members, None if mode == "ablate" else 2.0, mode=mode, site=site, positions=[3, 5]):  # type: ignore[arg-type]
                expected = metric(bridge(tokens)) - torch.from_numpy(found.baseline.values)
            np.testing.assert_allclose(found.values.values[u, 0, 0], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_controls_are_what_they_are_said_to_be(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    metric = metrics.logit_difference(answered([7, 7, 7]))
    neurons, levels, positions = [(0, 3), (1, 9)], [-1.0, 4.0], [4, 6]
    found = clamp(bridge, tokens, neurons, levels, metric, positions=positions, n_controls=2, seed=3)
    assert list(found.values["arm"].values) == ["clamped", "matched 1", "matched 2", "random 1", "random 2"]
    assert list(found.values["kind"].values) == ["clamped", "matched", "matched", "random", "random"]
    intact = metric(bridge(tokens))
    directions = _directions(2, 2, bridge.cfg.d_model, 3)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(2, 2))
    for draw, pairs in enumerate(found.provenance["matched"]):
        for u, (layer, index, other_layer, other) in enumerate(pairs):
            assert (layer, index) == neurons[u] and other_layer == layer and (layer, other) not in neurons
            for i, level in enumerate(levels):
                with clamped(bridge, [(layer, other)], level, positions=positions):
                    effect = metric(bridge(tokens)) - intact
                np.testing.assert_allclose(found.values.values[u, 1 + draw, i], effect, rtol=1e-4, atol=2e-5)
                # a push of the stream leaving the layer, as long as the clamp's at each position, along one direction
                name = hook_name("resid_post", layer)
                resting = capture(bridge, tokens, name)[name]
                with clamped(bridge, [(layer, index)], level, positions=positions):
                    change = capture(bridge, tokens, name)[name] - resting
                sign = torch.sign(
                    level - capture(bridge, tokens, post := hook_name("neuron", layer))[post][..., [index]]
                )
                push = directions[u, draw] * change.norm(dim=-1, keepdim=True) * sign
                with interventions(bridge, {name: lambda resid, _push=push: resid + _push}):
                    effect = metric(bridge(tokens)) - intact
                np.testing.assert_allclose(found.values.values[u, 3 + draw, i], effect, rtol=1e-3, atol=5e-5)
    matches = match_neurons(neuron_statistics(bridge, tokens, layers=[0, 1]), neurons, n=2, seed=3)
    assert found.match_quality is not None and np.array_equal(found.match_quality.values, matches.values.values)
    other_seed = clamp(bridge, tokens, neurons, levels, metric, positions=positions, n_controls=2, seed=4)
    assert not np.allclose(other_seed.values.values[:, 3:], found.values.values[:, 3:])
    assert np.array_equal(other_seed.values.values[:, 0], found.values.values[:, 0])


def test_quantile_levels_are_each_neurons_own():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(6, 12)
    statistics = neuron_statistics(bridge, tokens)
    found = clamp(bridge, tokens, [(0, 3), (2, 5)], "quantiles", labels=[4, 5], n_controls=2)
    assert list(found.values["level"].values) == ["q0", "q50", "q90", "q99", "q99.9", "2 max"]
    who = [[(0, 3), *[(0, pairs[0][3]) for pairs in found.provenance["matched"]]]]
    who += [[(2, 5), *[(2, pairs[1][3]) for pairs in found.provenance["matched"]]]]
    for u in range(2):
        table = statistics.of(who[u])
        for a in range(3):
            row = table.iloc[a]
            expected = [row["q0"], row["q50"], row["q90"], row["q99"], row["q99.9"], 2 * row["max"]]
            np.testing.assert_allclose(found.doses.values[u, a], expected, rtol=1e-5)
        assert np.array_equal(found.doses.values[u, 3], found.doses.values[u, 0])
    # without a metric the label's log-probability is what is measured
    assert np.array_equal(found.values.values, found.label_log_prob.values)
    effect = by_hand(
        bridge, tokens, [(2, 5)], float(found.doses.values[1, 0, 3]), last_difference, 5, torch.tensor([11] * 6)
    )[1]
    np.testing.assert_allclose(found.values.values[1, 0, 3], effect, rtol=1e-4, atol=2e-5)
    given = clamp(bridge, tokens[:1], [(2, 5)], "quantiles", labels=[5], statistics=statistics, controls=())
    assert np.array_equal(given.doses.values[0, 0], found.doses.values[1, 0])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_the_cost_is_counted_and_a_small_budget_changes_no_number(family: str):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    metric = metrics.logit_difference(answered([7, 7, 7]))
    args: Any = (bridge, tokens, [(0, 3), (1, 2), (1, 9)], [1.0, 2.0], metric)
    options: Any = {
        "labels": [3, 4, 5],
        "positions": -1,
        "n_controls": 2,
        "statistics": neuron_statistics(bridge, tokens),
    }
    clamp(*args, **options)  # what is probed once is known from now on
    with counting(bridge) as seen:
        found = clamp(*args, **options)
    cost = found.provenance["cost"]
    assert cost["forward_equivalents"] == pytest.approx(sum(seen) / (N * POS * 3), abs=1e-3)
    own = 1 if family == "gemma2" else 0  # with a norm after the MLP a row enters at its own block
    per_arm = [2 + own, 1 + own, 1 + own]
    clamps = sum(3 * blocks for blocks in per_arm) * 2 * N  # clamped and two matched arms, two levels, one token
    pushes = sum(2 * blocks for blocks in (2, 1, 1)) * 2 * N
    assert sum(seen) == 3 * N * POS + clamps + pushes
    assert cost["rows"] == N + N + 5 * 3 * 2 * N
    small = clamp(*args, **options, memory_budget=1)
    assert small.provenance["cost"]["forwards"] > 4 * cost["forwards"]
    for name in ("values", "label_log_prob", "label_rank", "kl"):
        np.testing.assert_allclose(getattr(small, name), getattr(found, name), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_reusable_keys_and_values_whole_rows_run_and_give_the_same(
    family: str, monkeypatch: pytest.MonkeyPatch
):
    bridge, tokens = tiny_bridge(family), tiny_tokens(N, POS)
    metric = metrics.logit_difference(answered([6, 5, 7]))
    args: Any = (bridge, tokens, [(0, 3), (2, 7)], [1.0], metric)
    found = clamp(*args, labels=[3, 4], positions=[4], controls=("random",))
    monkeypatch.setattr(_clamp_runs.hooks, "supports_prefix_reuse", lambda _bridge: False)
    whole = clamp(*args, labels=[3, 4], positions=[4], controls=("random",))
    assert whole.provenance["cost"]["forward_equivalents"] > 1.3 * found.provenance["cost"]["forward_equivalents"]
    for name in ("values", "label_log_prob", "kl"):
        np.testing.assert_allclose(getattr(whole, name), getattr(found, name), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("family", "adds"), [("gpt2", True), ("llama", True), ("neox", True), ("gemma2", False)])
def test_rows_enter_above_their_block_where_the_output_is_added(family: str, adds: bool):
    tokens, where = tiny_tokens(N, POS), torch.ones(N, POS, dtype=torch.bool)
    for dtype in (torch.float32, torch.bfloat16):
        bridge = tiny_bridge(family, dtype=dtype)
        runs = ClampRuns(
            bridge, tokens, where, None, [0, 2], geometry(bridge), mode="set", site="post", work=_clamp_runs.Work()
        )
        assert runs.adds == ({0, 2} if adds and dtype == torch.float32 else set())


def test_half_precision_gives_what_whole_forwards_give():
    bridge, tokens = tiny_bridge("llama", dtype=torch.bfloat16), tiny_tokens(N, POS)
    found = clamp(bridge, tokens, [(1, 4)], [6.0], last_difference, controls=())
    with clamped(bridge, [(1, 4)], 6.0):
        expected = last_difference(bridge(tokens)) - last_difference(bridge(tokens) * 0)
    with_clamp = found.values.values[0, 0, 0] + found.baseline.values
    np.testing.assert_allclose(with_clamp, expected.float(), rtol=0.02, atol=0.03)


def test_a_planted_writer_raises_its_token_and_its_controls_do_not():
    bridge, token = fresh_bridge("llama"), 17
    direction = bridge.ln_final.weight.detach() * bridge.W_U[:, token].detach()
    bridge.blocks[1].mlp.original_component.down_proj.weight[:, 6] = 3 * direction / direction.norm()
    tokens = tiny_tokens(8, POS)
    found = clamp(bridge, tokens, [(1, 6)], [0.0, 3.0, 6.0], labels=[token], positions=-1)
    assert float(np.median(found.label_rank.values[0, 0, -1])) == 0
    assert float(found.values.values[0, 0, -1].min()) > 1
    contrast = found.contrast().iloc[0]
    assert contrast["low"] > 0.5 and contrast["p_value"] < 0.05
    slopes = found.slopes().set_index("kind")
    assert slopes.loc["clamped", "low"] > slopes.loc["matched", "high"]


def greedy_by_hand(bridge: Any, tokens: Tensor, n: int, context: Callable[[int], Any]) -> Tensor:
    for _ in range(n):
        with context(tokens.shape[1]):
            tokens = torch.cat([tokens, bridge(tokens)[:, -1:].argmax(-1)], 1)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_under_a_clamp_is_that_of_whole_forwards(family: str):
    bridge, tokens, neurons = tiny_bridge(family), tiny_tokens(2, 5), [(0, 3), (1, 7), (2, 11)]
    for positions, where in (("all", lambda n: list(range(n))), ("generated", lambda n: list(range(5, n)))):

        @contextmanager
        def context(n: int, _where: Any = where) -> Iterator[None]:
            if not _where(n):
                yield
                return
            with clamped(bridge, neurons, 15.0, positions=_where(n)):
                yield

        found = generate_clamped(bridge, tokens, 5, neurons, 15.0, positions=positions)  # type: ignore[arg-type]
        assert torch.equal(found, greedy_by_hand(bridge, tokens, 5, context))
    drawn = [generate_clamped(bridge, tokens, 5, neurons, 9.0, temperature=2.0, seed=s) for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(generate_clamped(bridge, tokens, 5, neurons, 1.0, mode="scale"), generate(bridge, tokens, 5))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": ({"neurons": [(3, 0)]}, r"\(3, 0\).*layers 0 to 2 with neurons 0 to 47"),
    "no such neuron": ({"neurons": [(0, 48)]}, r"\(0, 48\)"),
    "negative": ({"neurons": [(0, -1)]}, r"\(0, -1\)"),
    "twice": ({"neurons": [(0, 1), (0, 1)]}, "more than once"),
    "none": ({"neurons": []}, "empty"),
    "no sets": ({"neurons": {}}, "empty mapping"),
    "empty set": ({"neurons": {"a": []}}, "the set 'a' is empty"),
    "no levels": ({"values": []}, "finite numbers"),
    "None": ({"values": None}, "finite numbers"),
    "infinite": ({"values": [float("inf")]}, "finite"),
    "same level": ({"values": [1.0, 1.0]}, "twice"),
    "ablate with values": ({"mode": "ablate"}, "must be None"),
    "quantiles added": ({"values": "quantiles", "mode": "add"}, "mode='add'"),
    "quantiles before": ({"values": "quantiles", "site": "pre"}, "site='pre'"),
    "no gate": ({"site": "pre_linear"}, "use one of 'post', 'pre'"),
    "position": ({"positions": [8]}, r"positions \[8\]"),
    "no position": ({"positions": []}, "at least one"),
    "positions of other rows": ({"positions": torch.tensor([1, 2])}, "for 3 rows"),
    "metric of others": ({"metric": metrics.logit_difference(answered([1, 2, 3])).select([0])}, "built for 1 examples"),
    "nothing to measure": ({"metric": None, "labels": None}, "give a metric, or labels"),
    "label": ({"labels": [60]}, r"\[60\].*0 to 59"),
    "labels": ({"labels": [1, 2]}, "each of the 1"),
    "read": ({"read": 8}, "read=8"),
    "reads": ({"read": torch.tensor([1, 2, 9])}, "read="),
    "controls": ({"n_controls": 0}, "n_controls=0"),
    "deep random": ({"neurons": {"a": [(0, 1), (1, 1)]}}, "several layers"),
    "token": ({"tokens": torch.full((3, 8), 60)}, "ids from 60"),
    "tokens": ({"tokens": torch.zeros(0, 8, dtype=torch.long)}, "expected a tensor of token ids"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_before_any_forward(case: str, monkeypatch: pytest.MonkeyPatch):
    bridge, (change, message) = tiny_bridge("gpt2"), REFUSED[case]
    no_forward(bridge, monkeypatch)
    options = {
        "tokens": tiny_tokens(3, 8), "neurons": [(0, 1)], "values": [1.0], "metric": last_difference, "labels": [3],
        **change,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        clamp(bridge, **options)


def test_statistics_of_another_model_training_mode_and_wrong_values_are_refused(monkeypatch: pytest.MonkeyPatch):
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 8)
    other = neuron_statistics(tiny_bridge("gpt_neo"), tokens)
    training = fresh_bridge("gpt2")
    training.train()
    no_forward(bridge, monkeypatch)
    with pytest.raises(ValueError, match="4 layers"):
        clamp(bridge, tokens, [(0, 1)], "quantiles", last_difference, statistics=other)
    options: Any = {"tokens": tokens, "neurons": [(0, 1)], "values": [1.0], "metric": last_difference}
    for name, value in (
        ("controls", "matched"), ("controls", ["uniform"]), ("mode", "mean"), ("site", "mid"), ("values", "deciles"),
    ):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=name):  # a ValueError where types are not checked at run time
            clamp(bridge, **{**options, name: value})
    with pytest.raises(RuntimeError, match="training"):
        clamp(training, tokens, [(0, 1)], [1.0], last_difference)
    refused: Any = (
        (None, "set", "needs a value"),
        (1.0, "ablate", "ablate"),
        ([1.0, 2.0, 3.0], "set", "2 neurons"),
        (float("nan"), "add", "not finite"),
    )
    for value, mode, message in refused:
        for run in (
            lambda v=value, m=mode: clamped(bridge, [(0, 1), (0, 2)], v, mode=m).__enter__(),
            lambda v=value, m=mode: generate_clamped(bridge, tokens, 3, [(0, 1), (0, 2)], v, mode=m),
        ):
            with pytest.raises(ValueError, match=message):
                run()


def test_statistics_without_the_quantiles_or_of_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch):
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(N, POS)
    few = neuron_statistics(bridge, tokens, quantiles=(0, 0.5, 0.99))
    other = neuron_statistics(tiny_bridge("gpt2", seed=1), tokens)
    given = clamp(bridge, tokens, [(0, 1)], [1.0], labels=[3], statistics=few, n_controls=1)  # needs no quantile
    assert np.isfinite(given.values.values).all()
    no_forward(bridge, monkeypatch)
    with pytest.raises(ValueError, match=r"no q90, q99.9;.*quantiles=\(0, 0.5, 0.9, 0.99, 0.999\)"):
        clamp(bridge, tokens, [(0, 1)], "quantiles", labels=[3], statistics=few)
    with pytest.raises(ValueError, match="statistics are of tiny-gpt2 at .*this model is tiny-gpt2 at "):
        clamp(bridge, tokens, [(0, 1)], "quantiles", labels=[3], statistics=other)


def test_bad_metrics_are_named_and_hooks_are_removed():
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(N, POS)
    before = bridge(tokens)
    with pytest.raises(ValueError, match=r"shape \(3, 8\).*one number for each"):
        clamp(bridge, tokens, [(0, 1)], [1.0], lambda logits: logits[..., 0], controls=())
    with pytest.raises(ValueError, match=r"not finite without any clamp, on examples \[0, 1, 2\]"):
        clamp(bridge, tokens, [(0, 1)], [1.0], lambda logits: logits[:, -1, 0] * torch.nan, controls=())
    assert torch.equal(bridge(tokens), before) and not any(point.fwd_hooks for point in bridge.hook_points())
