"""Generation equals the loop that recomputes everything, with edits at exactly the positions asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp import hooks
from tests.helpers import D_VOCAB, FAMILIES, MORE_FAMILIES, N_CTX, tiny_bridge, tiny_tokens

ALL = FAMILIES + MORE_FAMILIES
N = 4
PUSH = torch.linspace(-3, 3, 32)


def push(tensor: Tensor) -> Tensor:
    return tensor + PUSH


def recomputed(bridge: Any, tokens: Tensor, name: str, first: int, end: int | None) -> Tensor:
    """Greedy writing where each step runs the whole text, edited from position `first` up to `end`."""
    for _ in range(N):

        def edit(tensor: Tensor) -> Tensor:
            new = tensor.clone()
            new[:, first:end] += PUSH
            return new

        with torch.no_grad(), hooks.interventions(bridge, {name: edit}):
            tokens = torch.cat([tokens, bridge(tokens)[:, -1].argmax(-1)[:, None]], 1)
    return tokens


@pytest.mark.parametrize("family", ALL)
def test_every_choice_of_positions_equals_recomputation(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens()
    n, name = tokens.shape[1], hooks.hook_name("mlp_out", 1)
    windows = {"all": (0, None), "prompt": (0, n), "generated": (n, None), "last": (n - 1, None)}
    found = {p: hooks.generate(bridge, tokens, N, edits={name: push}, positions=p) for p in windows}
    for positions, (first, end) in windows.items():
        assert torch.equal(found[positions], recomputed(bridge, tokens, name, first, end)), positions
        assert torch.equal(found[positions][:, :n], tokens)


def test_positions_differ_from_each_other() -> None:
    """Otherwise the comparison with recomputation could not tell a wrong window."""
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    seen: dict[str, list[int]] = {}
    for positions in ("all", "prompt", "generated", "last"):
        sizes = seen.setdefault(positions, [])

        def edit(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.shape[1])
            return tensor + 1

        name = hooks.hook_name("resid_mid", 0)
        hooks.generate(bridge, tokens, 3, edits={name: edit}, positions=positions)  # type: ignore[arg-type]
    n = tokens.shape[1]
    assert seen == {"all": [n, 1, 1], "prompt": [n], "generated": [1, 1], "last": [1, 1, 1]}


def test_one_forward_per_token_and_the_prompt_only_once() -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens()
    hooks.generate(bridge, tokens, 1)  # the probe of prefix reuse is run once per model
    fed: list[int] = []
    handle = bridge.blocks[0].original_component.register_forward_pre_hook(
        lambda _module, args, kwargs: fed.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    try:
        hooks.generate(bridge, tokens, N)
    finally:
        handle.remove()
    assert fed == [tokens.shape[1], *[1] * (N - 1)]


def test_draws_follow_the_softmax_the_seed_and_nothing_global() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()[:1]
    many = tokens.expand(4000, -1)
    before = torch.get_rng_state()
    drawn = hooks.generate(bridge, many, 1, temperature=2, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(drawn, hooks.generate(bridge, many, 1, temperature=2, seed=3))
    assert not torch.equal(drawn, hooks.generate(bridge, many, 1, temperature=2, seed=4))
    expected = (bridge(tokens)[0, -1].detach() / 2).softmax(-1)
    share = torch.bincount(drawn[:, -1], minlength=D_VOCAB) / 4000
    assert float((share - expected).abs().max()) < 5 * float((expected.max() / 4000).sqrt())
    best = expected.topk(3).indices
    few = hooks.generate(bridge, many, 1, temperature=2, top_k=3)[:, -1]
    assert set(few.tolist()) == set(best.tolist())
    most = hooks.generate(bridge, many, 1, temperature=2, top_p=float(expected[best[0]]) / 2)[:, -1]
    assert set(most.tolist()) == {int(best[0])}


def test_a_row_ends_with_its_stop_token() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    n = tokens.shape[1]
    free = hooks.generate(bridge, tokens, N)
    ends = int(free[0, n + 1])
    stopped = hooks.generate(bridge, tokens, N, stop=[ends])
    where = (free[0, n:] == ends).nonzero()[0, 0]
    assert stopped[0, n : n + where + 1].tolist() == free[0, n : n + where + 1].tolist()
    assert set(stopped[0, n + where :].tolist()) == {ends}
    first = [int(token) for token in free[:, n]]
    assert torch.equal(hooks.generate(bridge, tokens, N, stop=first), free[:, : n + 1])


def test_interventions_outside_are_seen_and_hooks_are_removed_after_an_error() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    name = hooks.hook_name("mlp_out", 1)
    inside = hooks.generate(bridge, tokens, N, edits={name: push})
    with hooks.interventions(bridge, {name: push}):
        assert torch.equal(hooks.generate(bridge, tokens, N), inside)
    plain = hooks.generate(bridge, tokens, N)
    assert not torch.equal(plain, inside)

    def broken(tensor: Tensor) -> Tensor:
        return tensor[:, :, 0]

    with pytest.raises(ValueError, match="the model expects"):
        hooks.generate(bridge, tokens, N, edits={name: broken}, positions="last")
    with pytest.raises(ValueError, match="in place"):
        hooks.generate(bridge, tokens, N, edits={name: lambda t: t.add_(1)}, positions="last")
    with pytest.raises(ValueError, match="not finite"):
        hooks.generate(bridge, tokens, N, edits={name: lambda t: t * float("nan")})
    assert torch.equal(hooks.generate(bridge, tokens, N), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"n_tokens": N_CTX}, f"context of {N_CTX}"),
        ({"positions": "first"}, "'first'"),
        ({"n_tokens": 1, "positions": "generated", "edits": {"blocks.0.hook_mlp_out": push}}, "at least 2"),
        ({"positions": "last", "edits": {"blocks.0.attn.hook_pattern": push}}, "query, key"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"top_k": 3}, "above 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_what_cannot_be_honoured_is_refused(options: dict[str, Any], message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        hooks.generate(tiny_bridge("gpt2"), tiny_tokens(), **{"n_tokens": 2, **options})


def test_tokens_are_checked() -> None:
    with pytest.raises(ValueError, match=f"0 to {D_VOCAB - 1}"):
        hooks.generate(tiny_bridge("gpt2"), tiny_tokens() + D_VOCAB, 2)
