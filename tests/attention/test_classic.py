"""Pattern scores: TransformerLens' numbers where its strings can be matched, planted heads, controls."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
import torch
import transformer_lens
from transformer_lens.head_detector import detect_head

from interp.attention import attention_between, detection_pattern, pattern_scores, reduce_patterns
from interp.attention.classic import PATTERNS
from interp.hooks import hook_name
from tests.attention.classic_heads import N_HEADS as PLANTED_HEADS
from tests.attention.classic_heads import N_LAYERS as PLANTED_LAYERS
from tests.attention.classic_heads import planted_heads, repeats, text
from tests.helpers import FAMILIES, MORE_FAMILIES, N_HEADS, N_LAYERS, tiny_bridge, tiny_tokens

OF_TL = {
    "previous_token": "previous_token_head",
    "duplicate_token": "duplicate_token_head",
    "induction": "induction_head",
}
SENTENCES = ["w3 w7 w9 w3 w7 w4 w9 w3 w3", "w9 w8 w9 w8 w9 w8 w5 w9 w8"]


def digest(cache: Any) -> str:
    whole = hashlib.sha256()
    for name in sorted(cache):
        whole.update(cache[name].numpy().tobytes())
    return whole.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("excluded", [{}, {"exclude_bos": True, "exclude_current_token": True}])
def test_equals_detect_head_for_single_and_list_prompts(family: str, measure: Any, excluded: dict[str, bool]) -> None:
    bridge = tiny_bridge(family)
    tokens = bridge.to_tokens(SENTENCES)
    ours = pattern_scores(bridge, tokens, list(OF_TL), measure=measure, **excluded)  # pyright: ignore
    for name, theirs in OF_TL.items():
        options: dict[str, Any] = {"error_measure": measure, **excluded}
        both = detect_head(bridge, SENTENCES, theirs, **options)  # pyright: ignore
        np.testing.assert_allclose(ours.mean(name).values, both.numpy(), atol=1e-6)
        one = detect_head(bridge, SENTENCES[1], theirs, **options)  # pyright: ignore
        np.testing.assert_allclose(ours.values.sel(score=name, example=1).values, one.numpy(), atol=1e-6)


def test_a_cache_of_the_user_is_not_changed_and_there_is_no_other_model_class() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    _, cache = bridge.run_with_cache(tokens)
    before = digest(cache)
    pattern_scores(bridge, tokens, exclude_bos=True, exclude_current_token=True, measure="mul")
    assert digest(cache) == before
    with pytest.raises(ImportError, match="removed in TransformerLens 4"):
        _ = transformer_lens.HookedTransformer  # pyright: ignore


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_mean_scores_equal_a_loop_over_the_cached_pattern(family: str) -> None:
    bridge = tiny_bridge(family)
    tokens = torch.tensor([[0, 5, 6, 5, 6, 7, 5, 5], [0, 9, 3, 4, 9, 3, 9, 4]])
    found = pattern_scores(bridge, tokens, PATTERNS, batch_size=1)
    _, cache = bridge.run_with_cache(tokens)
    layer, head, row = int(bridge.cfg.n_layers) - 1, 2, 1
    pattern = cache[hook_name("pattern", layer)][row, head]
    ids = tokens[row].tolist()

    def mean_over(targets: list[list[int]]) -> float:
        sums = [float(sum(pattern[i, j] for j in keys)) for i, keys in enumerate(targets) if keys]
        return sum(sums) / len(sums)

    n = range(len(ids))
    expected = {
        "previous_token": mean_over([[i - 1] if i else [] for i in n]),
        "current_token": mean_over([[i] for i in n]),
        "first_token": mean_over([[0] if i else [] for i in n]),
        "duplicate_token": mean_over([[j for j in range(i) if ids[j] == ids[i]] for i in n]),
        "induction": mean_over([[j + 1 for j in range(i) if ids[j] == ids[i]] for i in n]),
    }
    for name, value in expected.items():
        ours = float(found.values.sel(score=name, layer=layer, head=head, example=row))
        assert ours == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("seed", range(12))
def test_planted_heads_are_found_and_controls_are_not(seed: int) -> None:
    bridge, places = planted_heads(seed)
    on_text = pattern_scores(bridge, text(seed=seed), ["previous_token", "current_token", "first_token"])
    on_lists = pattern_scores(bridge, repeats(seed=seed), ["duplicate_token", "induction"])
    wanted = {
        "previous_token": {places["source"], places["previous"]},
        "current_token": {places["current"], places["duplicate"]},
        "first_token": {places[kind] for kind in ("sink", "induction", "blind induction")},
        "duplicate_token": {places["duplicate"]},
        "induction": {places["induction"], places["blind induction"]},
    }
    for name, heads in wanted.items():
        scores = on_text if name in on_text.values["score"].values else on_lists
        mean = scores.mean(name).values
        found = {(int(layer), int(head)) for layer, head in np.argwhere(mean > 0.5)}
        assert found == heads, name  # precision and recall 1
        assert all(mean[head] > 0.97 for head in heads), name
        others = [mean[at] for at in np.ndindex(PLANTED_LAYERS, PLANTED_HEADS) if at not in heads]
        assert max(others) < 0.35, name  # uniform attention reaches 0.2 in the short rows


def test_masks_of_ones_own_and_the_stripe() -> None:
    bridge, places = planted_heads(1)
    tokens = repeats(length=12)
    stripe = detection_pattern(tokens, "offset", offset=11)
    found = pattern_scores(
        bridge, tokens, {"stripe": stripe[0], "all": torch.ones(len(tokens[0]), len(tokens[0])).tril()}
    )
    assert found.values.sel(score="all").values == pytest.approx(1, abs=1e-5)
    assert set(found.best("stripe", 2)) == {"L{}H{}".format(*places[name]) for name in ("induction", "blind induction")}


def test_intervals_hold_the_mean_and_skip_examples_without_a_target() -> None:
    bridge = tiny_bridge("llama")
    tokens = torch.cat([tiny_tokens(6, 12), torch.arange(12)[None]])
    tokens[:6, 8] = tokens[:6, 3]
    found = pattern_scores(bridge, tokens, ["duplicate_token", "previous_token"])
    assert found.values.sel(score="duplicate_token", example=6).isnull().all()
    assert found.values.sel(score="duplicate_token", example=0).notnull().all()
    bounds = found.interval()
    assert bool((bounds["low"] <= bounds["estimate"]).all())
    assert bool((bounds["estimate"] <= bounds["high"]).all())
    assert (bounds["high"] - bounds["low"]).sel(score="previous_token").max() > 0
    table = found.table()
    assert len(table) == 2 * N_LAYERS * N_HEADS
    assert table["estimate"].iloc[0] == pytest.approx(float(found.mean("duplicate_token").max()))


def test_layers_that_were_not_visited_are_nan(tmp_path: Any) -> None:
    found = pattern_scores(tiny_bridge("neox"), tiny_tokens(), layers=[1])
    assert found.values.sel(layer=1, score="previous_token").notnull().all()
    assert found.values.sel(layer=[0, 2]).isnull().all()
    again = type(found).load(found.save(tmp_path / "scores.nc"))
    assert again.values.identical(found.values)
    assert again.provenance["measure"] == "mean"
    for figure in (found.plot("previous_token"), found.plot()):
        assert figure.data


def test_attention_between_reads_single_cells() -> None:
    bridge, tokens = tiny_bridge("qwen2"), tiny_tokens(3, 8)
    dest, src = torch.tensor([7, 5, 6]), torch.tensor([2, 0, 6])
    found = attention_between(bridge, tokens, dest, {"a": src, "b": dest})
    whole = reduce_patterns(bridge, tokens, lambda _layer, pattern: pattern)
    for row in range(3):
        expected = whole[2][row, :, dest[row], src[row]]
        np.testing.assert_allclose(found.values.sel(score="a", layer=2, example=row).values, expected, atol=1e-6)


def test_what_is_refused() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    with pytest.raises(ValueError, match="marks keys after their query"):
        pattern_scores(bridge, tokens, {"mine": torch.ones(9, 9)})
    with pytest.raises(ValueError, match=r"pattern 'mine' has shape \(8, 8\); expected \(9, 9\) or \(2, 9, 9\)"):
        pattern_scores(bridge, tokens, {"mine": torch.eye(8)})
    with pytest.raises(ValueError, match="no patterns to score"):
        pattern_scores(bridge, tokens, [])
    with pytest.raises(ValueError, match="offset=None with pattern 'offset'"):
        detection_pattern(tokens, "offset")
    with pytest.raises(ValueError, match="'a': example 1 asks for attention from 3 to 4"):
        attention_between(bridge, tokens, torch.tensor([3, 3]), {"a": torch.tensor([3, 4])})
    with pytest.raises(KeyError, match="no score 'sink'; there is 'previous_token'"):
        pattern_scores(bridge, tokens, ["previous_token"]).mean("sink")
