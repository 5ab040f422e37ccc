"""ACT: the released behaviour as a loop, and its pitfalls with and without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from interp.attention.calibration import RELEASED, SANE, Calibration, calibrate_pattern, calibrated, calibration_sinks
from interp.attention.sinks import sink_importance, sink_scores
from interp.cache import capture
from interp.hooks import hook_name
from tests.helpers import fresh_bridge, tiny_bridge, tiny_tokens


def patterns(n: int = 2, heads: int = 3, n_pos: int = 40, seed: int = 0) -> Tensor:
    """Random causal patterns with sinks at 0 and 9, unevenly strong."""
    logits = torch.randn(n, heads, n_pos, n_pos, generator=torch.Generator().manual_seed(seed))
    logits[..., 0] += 3.5
    logits[..., 9] += 3
    return logits.masked_fill(torch.ones(n_pos, n_pos).triu(1).bool(), -torch.inf).softmax(-1)


def released(pattern: Tensor) -> Tensor:
    """Steps 1 to 4 of the release, written row by row, for the first example of the batch."""
    new = pattern.clone().double()
    n_heads, n_pos = pattern.shape[1], pattern.shape[-1]
    for head in range(n_heads):
        old = pattern[0, head].double()
        sinks = [j for j in range(n_pos) if sum(float(old[t, j]) for t in range(j, n_pos)) / (n_pos - j) > 0.1]
        reduced = sinks[1:]  # the first is spared
        if not reduced:
            continue
        for i in range(1, n_pos):
            freed = 0.6 * sum(float(old[i, j]) for j in reduced)
            pool = [j for j in range(n_pos) if j not in reduced]
            total = sum(float(old[i, j]) for j in pool)
            for j in range(n_pos):
                if j in reduced:
                    new[0, head, i, j] = 0.4 * old[i, j]
                else:
                    new[0, head, i, j] = old[i, j] * (1 + freed / total) if total else torch.nan
        new[0, head, 0, 0] = 1.0
    return new


def test_released_constants_do_what_the_release_does():
    assert (RELEASED.beta, RELEASED.threshold) == (0.4, 0.1)
    pattern = patterns()
    new = calibrate_pattern(pattern, RELEASED)
    assert torch.allclose(new.double(), released(pattern), atol=1e-6)
    assert torch.equal(new[1], pattern[1])  # only the first example of the batch
    sinks = calibration_sinks(pattern, RELEASED)[0, 0].nonzero().flatten().tolist()
    assert sinks[:2] == [0, 9]
    alone = calibration_sinks(torch.eye(40)[None, None], RELEASED)[0, 0].nonzero().flatten().tolist()
    assert alone == list(range(31, 40))  # nine late keys, flagged by their own diagonal
    assert not calibration_sinks(torch.eye(40)[None, None], SANE).any()
    last = slice(20, 36)
    gained = (new - pattern)[0, :, last].clamp_min(0)
    assert float(gained[..., 0].sum() / gained.sum()) > 0.3  # the largest share returns to position 0
    assert int(gained.sum((0, 1)).argmax()) == 0


def test_a_row_of_nothing_but_sinks_divides_by_zero_in_the_release_only():
    pattern = torch.zeros(1, 1, 40, 40)
    pattern[..., 0, 0] = 1
    for i in range(1, 40):
        pattern[0, 0, i, [0, min(i, 9)]] = torch.tensor([0.5, 0.5])
    pattern[0, 0, 30] = 0
    pattern[0, 0, 30, 9] = 1.0
    assert calibrate_pattern(pattern, RELEASED)[0, 0, 30].isnan().any()
    sane = calibrate_pattern(pattern)
    assert sane.isfinite().all()
    assert torch.equal(sane[0, 0, 30], pattern[0, 0, 30])  # nobody to give to


def test_sane_settings_keep_row_sums_every_example_and_position_0():
    pattern = patterns(3)
    new = calibrate_pattern(pattern)
    assert torch.allclose(new.sum(-1), pattern.sum(-1), atol=1e-5)
    assert torch.equal(new[..., 0], pattern[..., 0])  # spared, and given nothing
    for example in range(3):  # each as by itself
        assert torch.allclose(new[example], calibrate_pattern(pattern[example : example + 1])[0])
    later = new[..., 12:, 9] / pattern[..., 12:, 9]
    assert torch.allclose(later, torch.full_like(later, SANE.beta), atol=1e-5)
    rest = [j for j in range(1, 40) if j != 9]
    growth = new[0, 0, 30, rest][:29] / pattern[0, 0, 30, rest][:29]
    assert torch.allclose(growth, growth[:1].expand_as(growth), rtol=1e-4)  # in proportion
    assert float(growth[0]) > 1


@pytest.mark.parametrize("offset", [0, 1])
def test_local_heads_are_left_alone_by_the_sane_settings_only(offset: int):
    pattern = 0.9 * torch.diag(torch.ones(64 - offset), -offset)[None, None]
    pattern = pattern + 0.1 * torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    assert torch.equal(calibrate_pattern(pattern), pattern)
    assert not torch.equal(calibrate_pattern(pattern, RELEASED), pattern)


def test_calibrated_edits_these_heads_and_leaves_no_hook():
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(2, 40)
    names = [hook_name("pattern", layer) for layer in range(3)]
    before, logits = capture(bridge, tokens, names), bridge(tokens)
    strict = Calibration(threshold=0.05, spare=None, min_queries=2)
    with calibrated(bridge, [(0, 1), (0, 3), (2, 0)], strict):
        during = capture(bridge, tokens, names)
        inside = sink_scores(bridge, tokens)
    expected = before[names[0]].clone()
    expected[:, [1, 3]] = calibrate_pattern(expected[:, [1, 3]], strict)
    assert torch.allclose(during[names[0]], expected, atol=1e-6)
    assert not torch.equal(during[names[0]], before[names[0]])
    of_patterns = sink_importance(during[names[0]]).permute(1, 2, 0)  # measured on what the model then uses
    assert np.allclose(inside.values.sel(layer=0), of_patterns, atol=1e-6)
    assert torch.equal(bridge(tokens), logits)
    with pytest.raises(RuntimeError, match="stop"), calibrated(bridge, [(0, 1)], strict):
        raise RuntimeError("stop")
    assert torch.equal(bridge(tokens), logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Calibration(beta=1.2), "beta=1.2 must lie between 0 and 1"),
        (lambda: Calibration(min_queries=0), "min_queries=0"),
        (lambda: calibrate_pattern(torch.ones(1, 1, 1, 5)), "1 queries and 5 keys"),
        (lambda: calibrated(tiny_bridge("llama"), []).__enter__(), "no heads were given"),
        (lambda: calibrated(tiny_bridge("llama"), [(0, 9)]).__enter__(), r"no head \(0, 9\).*0 to 2.*0 to 3"),
        (lambda: calibrated(tiny_bridge("gptj"), [(0, 1)]).__enter__(), "cannot be replaced"),
    ],
)
def test_errors(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()
