"""Attention knockout against one forward per cell, and against what must follow when a token can read nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from interp import metrics
from interp.patching import Knockout, attention_knockout, token_groups
from tests.helpers import D_VOCAB, FAMILIES, N_LAYERS, fresh_bridge, tiny_bridge
from tests.patching.oracle import POS, N, prompts

GROUPS: dict[str, Any] = {"s1": "s1", "mid": [3, "s2"], "end": "end", "all but end": list(range(POS - 1))}
EDGES = [("s1", "end"), ("s1", "mid"), ("mid", "end")]


def masks(p: Any) -> dict[str, Tensor]:
    rows, out = torch.arange(N), {}
    for name, places in {"s1": ["s1"], "mid": [3, "s2"], "end": ["end"]}.items():
        out[name] = torch.zeros(N, POS, dtype=torch.bool)
        for place in places:
            out[name][rows, p.positions[place] if isinstance(place, str) else torch.full((N,), place)] = True
    return out


@torch.no_grad()
def knocked_out(bridge: Any, tokens: Tensor, source: Tensor, dest: Tensor, layers: list[int]) -> Tensor:
    """Logits of one whole forward: the blocked part of each pattern is 0, and the rest made to sum to 1 again."""

    def edit(pattern: Tensor, hook: Any) -> Tensor:
        kept = pattern * ~(dest[:, None, :, None] & source[:, None, None, :])
        return kept / kept.sum(-1, keepdim=True)

    return bridge.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_pattern", edit) for layer in layers])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", [1, 2])
def test_every_cell_is_what_the_definition_says(family: str, window: int) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.answer_log_prob(p)
    found = attention_knockout(bridge, p, metric, edges=EDGES, groups=GROUPS, window=window)
    with torch.no_grad():
        intact = metric(bridge(p.clean))
    assert torch.allclose(torch.tensor(found.intact.values), intact, atol=1e-5)
    at, largest = masks(p), 0.0
    for e, (source, dest) in enumerate(EDGES):
        for layer in range(N_LAYERS):
            layers = [each for each in range(layer - window // 2, layer - window // 2 + window) if 0 <= each < N_LAYERS]
            expected = metric(knocked_out(bridge, p.clean, at[source], at[dest], layers)) - intact
            assert torch.allclose(torch.tensor(found.values.values[e, layer]), expected, atol=2e-5)
            largest = max(largest, float(expected.abs().max()))
    assert largest > 0.05
    # what reaches no later position in the last block cannot reach the answer
    assert (found.values.sel(edge="s1 -> mid", layer=N_LAYERS - 1) == 0).all() or window > 1


def test_ways_of_running_agree() -> None:
    bridge, p = tiny_bridge("gemma2", sliding_window=4), prompts()
    metric = metrics.logit_difference(p)
    options: dict[str, Any] = {"edges": EDGES, "groups": GROUPS}
    fast = attention_knockout(bridge, p, metric, **options)
    for other in (
        attention_knockout(bridge, p, metric, **options, batch_size=3),
        attention_knockout(bridge, p, lambda logits: metric(logits), **options),
    ):
        assert abs(fast.values - other.values).max() < 2e-5
    assert abs(fast.values).max() > 0.05
    some = attention_knockout(bridge, p, metric, **options, layers=[2, 0])
    assert abs(some.values - fast.values.sel(layer=[2, 0])).max() < 2e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_who_can_read_nothing_else_says_the_same_of_any_prompt(family: str) -> None:
    bridge, p = tiny_bridge(family), prompts()
    metric = metrics.answer_log_prob(p)
    same = torch.full((N,), 7)

    def alone(clean: Tensor) -> Tensor:
        clean = torch.cat([clean[:, :-1], same[:, None]], 1)
        given = type(p)(clean, clean, p.answers[:1].repeat(N), p.foils[:1].repeat(N), {"end": p.positions["end"]})
        metric = metrics.answer_log_prob(given)
        groups, edges = {"others": GROUPS["all but end"], "end": "end"}, [("others", "end")]
        found = attention_knockout(bridge, given, metric, edges=edges, groups=groups, window=2 * N_LAYERS, layers=[0])
        return torch.tensor((found.values + found.intact).values).squeeze()

    others = torch.cat([p.clean[:, :1], 3 + (p.clean[:, 1:] + 8) % (D_VOCAB - 3)], 1)  # no BOS, no padding
    first, other = alone(p.clean), alone(others)
    assert torch.allclose(first, other, atol=1e-5) and float(first.std()) < 1e-5
    with torch.no_grad():
        assert float(metric(bridge(p.clean)).std()) > 0.05


def test_groups_and_edges_of_facts() -> None:
    p = prompts()
    groups = token_groups(p, subject=["s1", "s2"])
    assert list(groups) == ["first", "subject", "relation", "last"]
    assert torch.stack(list(groups.values())).sum(0).eq(1).all()  # every token in one group
    assert groups["subject"].sum(1).tolist() == [2] * N and groups["last"].sum(1).tolist() == [1] * N
    opening = token_groups(p, subject=0)  # a subject that opens the prompt is the subject, and nothing is first
    assert list(opening) == ["subject", "relation", "last"] and opening["subject"][:, 0].all()
    early = type(p)(
        p.clean, p.corrupted, p.answers, p.foils, {"end": torch.full((N,), 5), "subject": p.positions["s1"]}
    )
    assert not token_groups(early)["relation"][:, 5:].any()  # what follows the answer is in no group
    found = attention_knockout(tiny_bridge("gpt2"), early, metrics.logit_difference(early))
    assert found.values.edge.values.tolist() == [f"{name} -> last" for name in token_groups(early)]
    assert found.pairs.sel(edge="relation -> last").values.tolist() == [3] * N
    assert found.provenance["cost"]["forward_equivalents"] < found.provenance["cost"]["forwards_one_per_cell"]


def test_result(tmp_path: Any) -> None:
    bridge, p = tiny_bridge("llama"), prompts()
    found = attention_knockout(bridge, p, metrics.answer_prob(p), edges=EDGES, groups=GROUPS)
    relative = found.interval(of="relative")
    expected = found.values.mean("example") / float(found.intact.mean())
    assert np.allclose(relative["estimate"], expected, atol=1e-6)
    assert (relative["low"] <= relative["estimate"] + 1e-6).all() and (
        relative["high"] >= relative["estimate"] - 1e-6
    ).all()
    table = found.summary()
    assert np.allclose(table["relative"], expected.values.ravel(), atol=1e-6)
    assert len(table) == len(EDGES) * N_LAYERS
    figure = found.plot(of="relative")
    assert figure.layout.yaxis.title.text == "share of answer_prob" and len(found.top(3)) == 3
    assert "Relative change" in figure.layout.title.text and "one layer at a time" in figure.layout.title.text
    loaded = Knockout.load(found.save(tmp_path / "k.nc"))
    assert loaded.values.identical(found.values) and loaded.pairs.identical(found.pairs)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_scale_is_refused() -> None:
    p = prompts()
    found = attention_knockout(tiny_bridge("gpt2"), p, metrics.answer_prob(p), edges=EDGES, groups=GROUPS)
    with pytest.raises(ValueError, match="'change' or 'relative', got 'share'"):
        found.interval(of="share")  # type: ignore[arg-type]


def test_hooks_are_gone_after_an_exception() -> None:
    bridge, p = fresh_bridge("mistral", sliding_window=2), prompts()
    with torch.no_grad():
        before = bridge(p.clean)
    with pytest.raises(ValueError, match="nothing left to attend to in a layer whose attention is windowed"):
        attention_knockout(
            bridge, p, metrics.logit_difference(p), groups={"near": [POS - 2, POS - 1], "end": "end"},
            edges=[("near", "end")],
        )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(bridge(p.clean), before)
    assert not any(point.fwd_hooks for point in bridge.hook_points() if not _permanent(point))


def _permanent(point: Any) -> bool:
    return all(handle.is_permanent for handle in point.fwd_hooks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"edges": [("s1", "object")]}, r"names \['object'\]; the groups are 's1', 'mid', 'end', 'all but end'"),
        ({"edges": [("end", "s1")]}, r"no token of 's1' comes after one of 'end'.*edges are \(source, reader\)"),
        ({"edges": []}, "must name at least one"),
        ({"edges": [("s1", "end"), ("s1", "end")]}, "none twice"),
        ({"groups": {"a": list(range(POS)), "b": [4]}, "edges": [("a", "b")]}, "leaves position 4 of example 0"),
        ({"groups": {"a": [POS]}}, f"position {POS} is not in the prompts"),
        ({"groups": {"a": "subject"}}, "positions='subject' is unknown"),
        ({"groups": {"a": torch.ones(2, 3)}}, "must be a bool mask"),
        ({"groups": {"a": []}}, "group 'a' holds no token"),
        ({"groups": {}}, "groups is empty"),
        ({"groups": None}, "positions='subject' is unknown"),
        ({"window": 0}, "window=0 must be at least 1 layer"),
        ({"layers": [N_LAYERS]}, "do not exist"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_refusals(options: dict[str, Any], message: str) -> None:
    p = prompts()
    with pytest.raises(ValueError, match=message):
        attention_knockout(
            tiny_bridge("gpt2"), p, metrics.logit_difference(p), **{"groups": GROUPS, "edges": EDGES, **options}
        )


def test_refused_models_and_subjects() -> None:
    p = prompts()
    with pytest.raises(ValueError, match="scores cannot be edited; patch heads with activation_patch"):
        attention_knockout(tiny_bridge("gptj"), p, metrics.logit_difference(p), groups=GROUPS, edges=EDGES)
    with pytest.raises(ValueError, match=r"the subject of examples \[0, 1, 2, 3\] is at their last position"):
        token_groups(p, subject="end")
    training = fresh_bridge("gpt2")
    training.train()
    with pytest.raises(RuntimeError, match="training mode"):
        attention_knockout(training, p, metrics.logit_difference(p), groups=GROUPS, edges=EDGES)
