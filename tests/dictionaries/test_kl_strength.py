"""Strength for a given divergence: the search on known curves, and on models against independent formulas."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq

from interp.cache import capture
from interp.dictionaries import KLStrengths, SteeringVector, random_directions, steer, strength_for_kl, through_w_out
from interp.dictionaries._bracketing import crossings
from interp.dictionaries._steering_edits import Mode
from interp.dictionaries.kl_strength import _GRID
from interp.hooks import hook_name
from interp.types import Site
from tests.helpers import D_MLP, D_MODEL, FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

TARGETS = (0.025, 0.1, 0.5)


def vectors(n: int, hook: str, width: int = D_MODEL) -> list[SteeringVector]:
    return random_directions(n, like=SteeringVector(torch.ones(width), hook), seed=3)


def search(curve, levels, *, start=0.0, top=8.0, tolerance=0.05, max_rounds=30):
    """One curve, with the places that were looked at."""
    seen: list[float] = []

    def measure(which, places):
        seen.extend(places.tolist())
        return np.array([curve(place) for place in places])

    grid = top * 2.0 ** _GRID[None]
    curves, found, rounds = crossings(
        measure, np.array([start]), grid, np.array(levels), tolerance=tolerance, max_rounds=max_rounds
    )
    return curves[0], found[0], rounds, seen


def kl_by_hand(bridge, tokens, vector, strength, **options) -> torch.Tensor:
    with torch.no_grad():
        base = bridge(tokens)[:, -1].double().log_softmax(-1)
        with steer(bridge, vector, strength, **options):
            steered = bridge(tokens)[:, -1].double().log_softmax(-1)
    return (base.exp() * (base - steered)).sum(-1)


@pytest.mark.parametrize(
    ("curve", "inverse"),
    [
        (lambda s: 0.3 * s**2, lambda level: math.sqrt(level / 0.3)),
        (lambda s: 0.01 * math.expm1(3 * s), lambda level: math.log1p(level / 0.01) / 3),
        (lambda s: 5 * s**6 / (1 + s**6), lambda level: (level / (5 - level)) ** (1 / 6)),
    ],
    ids=["square", "exponential", "saturating"],
)
def test_the_search_finds_known_crossings_in_few_rounds(curve, inverse) -> None:
    levels = [1e-6, 0.025, 0.1, 0.35, 0.5, 3.0]
    _, found, rounds, seen = search(curve, levels, tolerance=1e-3)
    for crossing, level in zip(found, levels, strict=True):
        assert crossing.status == "reached"
        assert abs(crossing.height / level - 1) <= 1e-3
        assert crossing.place == pytest.approx(inverse(level), rel=2e-3)
    assert rounds <= 9
    assert len(seen) == len(set(seen))  # nothing is measured twice


def test_levels_that_are_not_met_are_told_with_what_was_seen() -> None:
    plateau = lambda s: 0.2 * (1 - math.exp(-s))  # noqa: E731
    _, (low, high), _, _ = search(plateau, [0.1, 0.5])
    assert low.status == "reached"
    assert (high.status, high.place) == ("never so high", 8.0)
    assert high.height == pytest.approx(plateau(8.0))
    _, (jump,), rounds, _ = search(lambda s: 0.01 * s if s < 1.3 else 2.0 + s, [0.5])
    assert jump.status == "jumps over" and jump.place == pytest.approx(1.3, rel=1e-4)
    _, (below, crossed), _, _ = search(lambda s: 0.3 + s, [0.1, 0.6], start=0.3)
    assert (below.status, below.height) == ("higher at the start", 0.3)
    assert crossed.status == "reached" and crossed.place == pytest.approx(0.3, rel=0.2)
    _, (stopped,), rounds, _ = search(lambda s: math.expm1(s**3), [0.3], tolerance=1e-12, max_rounds=2)
    assert rounds == 3 and stopped.status == "jumps over"  # no success is claimed when rounds run out


def test_a_curve_that_falls_again_gives_its_first_crossing_and_says_so() -> None:
    bump = lambda s: 0.4 * math.sin(s) ** 2  # noqa: E731  up to pi/2, down to 0 at pi, up again
    curve, (first, top), _, _ = search(bump, [0.2, 0.399], top=6.0)
    assert first.place == pytest.approx(math.pi / 4, rel=0.05)
    assert curve.rises_until(first.place)
    assert not curve.rises_until(6.0)
    dip = lambda s: 0.4 * math.sin(s) ** 2 + 0.05 * s  # noqa: E731
    curve, (late,), _, _ = search(dip, [0.6], top=6.0)
    assert late.status == "reached" and late.place > 3.5  # behind the dip
    assert not curve.rises_until(late.place)


def test_numbers_that_are_not_finite_are_no_places_to_go_to() -> None:
    _, (reached, beyond), _, _ = search(lambda s: s if s < 2.5 else math.inf, [1.0, 2.4])
    assert reached.status == "reached"
    assert (beyond.status, beyond.place) == ("never so high", 2.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["neuron", "resid_post"])
def test_achieved_divergence_is_that_of_plain_forwards(family: str, site: Site) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(5, 6)
    hook = hook_name(site, 1)
    asked = vectors(3, hook, D_MLP if site == "neuron" else D_MODEL)
    found = strength_for_kl(bridge, asked, tokens, TARGETS)
    assert bool(found.reached[:, :2].all()) and found.provenance["status"][0][0] == "reached"
    for i, vector in enumerate(asked):
        for j, target in enumerate(TARGETS):
            strength = float(found.values[i, j])
            if not bool(found.reached[i, j]):  # a norm behind the MLP bounds what its neurons can do
                assert family == "gemma2" and site == "neuron" and math.isnan(strength)
                far = [float(kl_by_hand(bridge, tokens, vector, s).mean()) for s in (3.0, 10.0, 100.0)]
                assert max(far) < target and max(far) <= float(found.achieved[i, j]) * 1.05  # still creeping up
                continue
            by_hand = kl_by_hand(bridge, tokens, vector, strength)
            np.testing.assert_allclose(found.per_example[i, j], by_hand, rtol=2e-3, atol=2e-5)
            assert float(by_hand.mean()) == pytest.approx(target, rel=0.052)
            assert float(found.achieved[i, j]) == pytest.approx(float(by_hand.mean()), rel=1e-3)
    assert np.all(np.diff(found.values.to_numpy()[:, :2], axis=1) > 0)


def test_strength_solves_the_equation_by_another_method() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6)
    (vector,) = vectors(1, hook_name("resid_post", 2))
    found = strength_for_kl(bridge, vector, tokens, [0.1], tolerance=1e-4)
    exact: Any = brentq(lambda s: float(kl_by_hand(bridge, tokens, vector, s).mean()) - 0.1, 0, 20, xtol=1e-9)
    assert float(found.values[0, 0]) == pytest.approx(exact, rel=2e-4)
    other = strength_for_kl(bridge, vector, tokens, [0.1], tolerance=1e-4, sign=-1)
    exact = brentq(lambda s: float(kl_by_hand(bridge, tokens, vector, -s).mean()) - 0.1, 0, 20, xtol=1e-9)
    assert float(other.values[0, 0]) == pytest.approx(-exact, rel=2e-4)
    last = strength_for_kl(bridge, vector, tokens, [0.1], tolerance=1e-3, positions="last")
    by_hand = kl_by_hand(bridge, tokens, vector, float(last.values[0, 0]), positions="last")
    assert float(by_hand.mean()) == pytest.approx(0.1, rel=2e-3)


def test_only_direction_times_strength_counts() -> None:
    """A bisection from 1 to 2000 cannot return strengths below 1: long vectors would find nothing."""
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 5)
    (vector,) = vectors(1, hook_name("resid_post", 1))
    long = SteeringVector(vector.values * 1000, vector.hook)
    short = SteeringVector(vector.values / 1000, vector.hook)
    base, up, down = (strength_for_kl(bridge, v, tokens, TARGETS).values.to_numpy() for v in (vector, long, short))
    np.testing.assert_allclose(up * 1000, base, rtol=1e-4)
    np.testing.assert_allclose(down / 1000, base, rtol=1e-4)
    assert np.all(up < 1)


def test_unreachable_targets_are_said_not_dropped() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 5)
    (vector,) = vectors(1, hook_name("resid_post", 2))
    found = strength_for_kl(bridge, vector, tokens, [0.1, 500.0])  # a normalised stream bounds the divergence
    frame = found.to_dataframe()
    assert frame["reached"].tolist() == [True, False] and frame["status"].tolist() == ["reached", "never so high"]
    assert math.isnan(float(found.values[0, 1]))
    top = float(found.achieved[0, 1])
    assert 0.5 < top < 500 and top == pytest.approx(float(found.curve.max()))
    by_hand = kl_by_hand(bridge, tokens, vector, float(found.nearest[0, 1]))
    assert float(by_hand.mean()) == pytest.approx(top, rel=1e-4)
    capped = strength_for_kl(bridge, vector, tokens, [0.1], max_strength=0.05)
    assert not bool(capped.reached.any()) and float(capped.nearest.max()) == pytest.approx(0.05)


@pytest.mark.parametrize("mode", ["clamp", "ablate"])
def test_other_modes_are_searched_in_their_own_units(mode: Mode) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6)
    (vector,) = vectors(1, hook_name("resid_post", 1))
    found = strength_for_kl(bridge, vector, tokens, [0.2], mode=mode, max_strength=None if mode == "clamp" else 40)
    assert bool(found.reached.all())
    by_hand = kl_by_hand(bridge, tokens, vector, float(found.values[0, 0]), mode=mode)
    assert float(by_hand.mean()) == pytest.approx(0.2, rel=0.052)
    if mode == "clamp":  # strengths start at the mean projection, where holding it is a change already
        unit = vector.unit().values
        mean = float((capture(bridge, tokens, vector.hook)[vector.hook] @ unit).mean())
        assert float(found.curve_strength[0, 0]) == pytest.approx(mean, abs=1e-4)
        start = float(found.curve[0, 0])
        assert start > 0 and float(found.values[0, 0]) > mean
        low = strength_for_kl(bridge, vector, tokens, [start / 10], mode="clamp")
        if not bool(low.reached.any()):
            assert low.provenance["status"] == [["higher at the start"]]


def test_padded_prompts_need_their_lengths_and_then_count_as_unpadded() -> None:
    bridge = tiny_bridge("llama")
    tokens = tiny_tokens(3, 6)
    lengths = torch.tensor([6, 4, 5])
    padded = tokens.clone()
    for row, length in enumerate(lengths.tolist()):
        padded[row, length:] = 1  # the tokenizer's padding
    (vector,) = vectors(1, hook_name("resid_post", 1))
    with pytest.raises(ValueError, match=r"rows \[1, 2\] end in the padding token 1"):
        strength_for_kl(bridge, vector, padded, TARGETS)
    for positions in ("all", "last"):
        found = strength_for_kl(bridge, vector, padded, TARGETS, lengths=lengths, positions=positions)
        for j in range(len(TARGETS)):
            each = [
                float(
                    kl_by_hand(
                        bridge, tokens[row : row + 1, :n], vector, float(found.values[0, j]), positions=positions
                    )
                )
                for row, n in enumerate(lengths.tolist())
            ]
            np.testing.assert_allclose(found.per_example[0, j], each, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_stated_number_of_forwards_is_what_is_run(layer: int) -> None:
    bridge, tokens = fresh_bridge("gpt2"), tiny_tokens(3, 5)
    asked = vectors(2, hook_name("resid_post", layer))
    strength_for_kl(bridge, asked, tokens, TARGETS)  # what is probed once
    calls: list[int] = []
    blocks: list[int] = []
    handles = [
        bridge.register_forward_pre_hook(lambda _module, args: calls.append(len(args[0]))),
        bridge.blocks[0].original_component.register_forward_pre_hook(lambda *_: blocks.append(1)),
    ]
    found = strength_for_kl(bridge, asked, tokens, TARGETS)
    for handle in handles:
        handle.remove()
    rounds = found.provenance["rounds"]
    assert len(calls) == found.provenance["forwards"] == 3 + rounds  # up to the layer, from it on, lengths; then rounds
    assert 2 <= rounds <= 6
    assert sum(calls[3:]) == 3 * found.provenance["evaluations"]
    if layer == 2:
        assert len(blocks) == 2  # what lies below the steered layer runs for the prompts alone
    small = strength_for_kl(bridge, asked, tokens, TARGETS, batch_size=4)
    np.testing.assert_allclose(small.values, found.values, rtol=1e-4)
    assert small.provenance["forwards"] > found.provenance["forwards"]


@pytest.mark.parametrize(
    "hook", ["embed.hook_out", "blocks.1.attn.hook_z", "ln_final.hook_out", "blocks.1.ln1.hook_out"]
)
def test_any_hook_can_be_searched(hook: str) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(3, 5)
    shape = capture(bridge, tokens, hook)[hook].shape[2:]
    vector = SteeringVector(torch.randn(shape, generator=torch.Generator().manual_seed(0)), hook)
    found = strength_for_kl(bridge, vector, tokens, [0.1])
    by_hand = kl_by_hand(bridge, tokens, vector, float(found.values[0, 0]))
    assert float(by_hand.mean()) == pytest.approx(0.1, rel=0.052)


def test_neurons_and_their_image_in_the_stream_need_equal_strengths() -> None:
    bridge, tokens = tiny_bridge("gemma2"), tiny_tokens(3, 5)
    (vector,) = vectors(1, hook_name("neuron", 1), D_MLP)
    direct = strength_for_kl(bridge, vector, tokens, TARGETS, tolerance=1e-3)
    through = strength_for_kl(bridge, through_w_out(bridge, vector), tokens, TARGETS, tolerance=1e-3)
    np.testing.assert_allclose(direct.values, through.values, rtol=2e-3)


def test_result_is_saved_drawn_and_tabulated(tmp_path) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 5)
    found = strength_for_kl(bridge, vectors(2, hook_name("resid_post", 1)), tokens, TARGETS)
    again = KLStrengths.load(found.save(tmp_path / "strengths.nc"))
    assert again.values.equals(found.values) and again.curve.equals(found.curve)
    frame = again.to_dataframe()
    assert len(frame) == 6 and frame["relative_error"].abs().max() <= 0.05
    figure = again.plot()
    assert len(figure.data) == 2 and "log" in figure.layout.xaxis.type
    known = found.curve[0].dropna("evaluation").to_numpy()
    assert known[0] == 0 and len(known) >= 20


def test_what_cannot_be_searched_is_said_before_any_forward(unchecked: None) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(3, 5)
    good = vectors(1, hook_name("resid_post", 1))
    cases = [
        ({"vectors": []}, "no vectors"),
        ({"vectors": good + vectors(1, hook_name("resid_post", 0))}, "blocks.0.hook_resid_post, blocks.1"),
        ({"targets": [0.1, 0.0]}, "divergences above 0"),
        ({"targets": []}, "divergences above 0"),
        ({"targets": [0.1, 0.1]}, "different divergences"),
        ({"sign": 2}, "sign=2"),
        ({"tolerance": 0.0}, "tolerance=0.0"),
        ({"tokens": tokens[0]}, r"\[example, pos\]"),
        ({"lengths": torch.tensor([1, 2])}, "one per row, from 1 to 5"),
        ({"lengths": torch.tensor([1, 2, 6])}, "runs from 1 to 6"),
        ({"mode": "set"}, "mode='set'"),
        ({"max_strength": 0}, "max_strength=0; expected above 0"),
    ]
    for change, message in cases:
        given = {"vectors": good, "tokens": tokens, "targets": TARGETS, **change}
        with pytest.raises(ValueError, match=message):
            strength_for_kl(bridge, given.pop("vectors"), given.pop("tokens"), **given)
