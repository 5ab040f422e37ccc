"""The result of patching: signs, recovery, intervals, figures."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from interp.patching import Effects
from interp.results import labelled

CLEAN, CORRUPTED = [4.0, 2.0, 6.0], [0.0, -2.0, 0.0]


def effects(direction: str, patched: list[list[float]]) -> Effects:
    """Two layers at one position, given the metric of the patched runs."""
    baseline = np.array(CORRUPTED if direction == "denoise" else CLEAN)
    values = labelled(
        (np.array(patched) - baseline)[:, None],
        ["layer", "pos", "example"],
        {"layer": [0, 1], "pos": [4], "token": ("pos", ["<s2>"])},
        unit="logits",
    )
    clean, corrupted = (labelled(np.array(end), ["example"], unit="logits") for end in (CLEAN, CORRUPTED))
    return Effects(values, {}, clean, corrupted, direction, "z", "swap", "logit_difference")


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_recovery_means_the_same_in_both_directions(direction: str) -> None:
    found = effects(direction, [CLEAN, CORRUPTED])
    assert found.baseline.values.tolist() == (CORRUPTED if direction == "denoise" else CLEAN)
    assert found.recovery().values.tolist() == [[1.0], [0.0]]
    assert found.recovery_per_example().values.tolist() == [[[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]]]
    sign = 1 if direction == "denoise" else -1
    moved = [[14 / 3], [0.0]] if direction == "denoise" else [[0.0], [14 / 3]]
    assert np.allclose(found.mean().values, sign * np.array(moved))


def test_recovery_is_a_ratio_of_means() -> None:
    found = effects("denoise", [[4.0, -2.0, 0.0], [0.0, -2.0, 6.0]])
    assert np.allclose(found.recovery().values.ravel(), [4 / 14, 6 / 14])
    assert np.allclose(found.recovery_per_example().mean("example").values.ravel(), [1 / 3, 1 / 3])


def test_intervals_hold_the_estimate_and_shrink_to_a_point_when_nothing_varies() -> None:
    found = effects("noise", [[1.0, 0.5, 5.0], [3.0, 1.0, 5.0]])
    for of in ("effect", "recovery"):
        interval = found.interval(of=of)  # type: ignore[arg-type]
        assert (interval.low <= interval.estimate).all() and (interval.estimate <= interval.high).all()
        assert (interval.low < interval.high).isel(layer=0).all()
        expected = found.mean() if of == "effect" else found.recovery()
        assert np.allclose(interval.estimate.values, expected.values)
        assert interval.estimate.dims == ("layer", "pos")
        assert interval.token.values.tolist() == ["<s2>"]
    constant = found.interval().isel(layer=1)
    assert np.allclose(constant.low, -1) and np.allclose(constant.high, -1)
    narrow, wide = found.interval(0.5), found.interval(0.99)
    assert (narrow.high - narrow.low).sum() < (wide.high - wide.low).sum()


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="of must be 'effect' or 'recovery', got 'ratio'"):
        effects("noise", [CLEAN, CORRUPTED]).interval(of="ratio")  # type: ignore[arg-type]


def test_summary_has_a_row_per_cell() -> None:
    frame = effects("denoise", [CLEAN, CORRUPTED]).summary()
    assert frame["layer"].tolist() == [0, 1] and frame["token"].tolist() == ["<s2>", "<s2>"]
    assert frame["recovery"].tolist() == [1.0, 0.0]
    assert np.allclose(frame["effect"], [14 / 3, 0.0])
    assert (frame["low"] <= frame["effect"]).all() and (frame["effect"] <= frame["high"]).all()


def test_recovery_without_a_gap_is_refused() -> None:
    found = effects("denoise", [CLEAN, CORRUPTED])
    same = Effects(found.values, {}, found.clean, found.clean, "denoise", "z", "swap", "m")
    with pytest.raises(ValueError, match="clean and corrupted have the same mean metric"):
        same.recovery()
    assert np.isnan(same.summary()["recovery"]).all()


def test_figures_show_the_mean_over_examples() -> None:
    found = effects("denoise", [CLEAN, CORRUPTED])
    figure = found.plot()
    assert np.allclose(np.ravel(figure.data[0].z), [14 / 3, 0.0])
    assert np.allclose(np.ravel(found.plot("recovery").data[0].z), [1.0, 0.0])
    by_layer = Effects(
        found.values.isel(pos=0, drop=True),
        {},
        found.clean,
        found.corrupted,
        "denoise",
        "z",
        "swap",
        "logit_difference",
    )
    assert len(by_layer.plot().data) >= 1
    cube = found.values.expand_dims(head=[0, 1])
    with pytest.raises(ValueError, match="plot a slice of two"):
        Effects(cube, {}, found.clean, found.corrupted, "denoise", "z", "swap", "m").plot()


def test_the_printed_result_tells_the_protocol() -> None:
    record = {
        "method": "relp", "rules": {"norm": "LN", "activation": "Identity", "gate": "Half", "attention": "gradient"},
        "steps": 5, "points": "midpoint", "positions": ["s2", "end"], "prompts": {"n": 3, "name": "ioi"}, "model": "m",
    }  # fmt: skip
    found = dataclasses.replace(effects("noise", [CLEAN, CORRUPTED]), provenance=record)
    assert repr(found) == (
        "Effects(layer 2 x pos 1 x example 3; relp (norm=LN, activation=Identity, gate=Half); noise, swap; site z; "
        "metric logit_difference in logits; 5 midpoint points; positions s2, end; 3 prompts of ioi; m)"
    )
    assert found.plot().layout.title.text == "relp effect of z (noise, swap)"
    assert "activation_patch; denoise, swap" in repr(effects("denoise", [CLEAN, CORRUPTED]))
