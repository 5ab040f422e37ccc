"""Writing on from a prompt while activations are edited, with a choice of the positions that the edits see."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from interp.hooks.edits import Edit, check_edit, interventions, no_retained_graph
from interp.hooks.names import device_of
from interp.hooks.runs import supports_prefix_reuse

Positions = Literal["all", "prompt", "generated", "last"]
_NO_POSITION_AXIS = ("hook_pattern", "hook_attn_scores")


def generate(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    n_tokens: int,
    *,
    edits: Mapping[str, Edit] | None = None,
    positions: Positions = "all",
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[int] = (),
) -> Int[Tensor, "batch written"]:
    """The prompts followed by what the model writes, on the CPU: [batch, pos + n_tokens], fewer if all rows stopped.

    One forward over the prompt and one per further token, with keys and values cached where this model continues
    exactly from them (`supports_prefix_reuse`); otherwise every forward repeats the whole text, and gives the same.
    TransformerLens' `bridge.generate` is the better choice without edits; it draws from the global random state and
    leaves to its hooks to know where in the text they are. Interventions that are active are seen as well.

    Args:
        tokens: Prompts of equal length, without padding.
        edits: `fn(tensor) -> new tensor` by hook, as for `interventions`. It is given only the positions it may
            change, `[batch, some positions, ...]`, and is not called in a forward that holds none of them.
        positions: `"all"`; those of the `"prompt"`; the `"generated"` ones, from the first new token on, when it is
            fed back; or the `"last"` of the prompt and all generated ones: every position that predicts a new token.
        temperature: 0 takes the most likely token; above, tokens are drawn from softmax(logits / temperature).
        top_k: Draw from so many of the most likely tokens only.
        top_p: Draw from the fewest most likely tokens that hold this probability together.
        seed: Of the draws; they are made on the CPU and do not touch the global random state.
        stop: Tokens that end a row; the row is filled up with the one that ended it.

    Raises:
        ValueError: Before any forward, for sizes, sampling options or edits that cannot be honoured.
    """
    _check(bridge, tokens, n_tokens, edits or {}, positions, temperature, top_k, top_p)
    n_prompt = tokens.shape[1]
    window = {
        "all": (0, None),
        "prompt": (0, n_prompt),
        "generated": (n_prompt, None),
        "last": (n_prompt - 1, None),
    }[positions]
    at = [0]  # absolute position of the first one in this forward
    parts = {name: _windowed(name, fn, at, window) for name, fn in (edits or {}).items()}
    warpers = _warpers(temperature, top_k, top_p)
    draws = torch.Generator().manual_seed(seed)
    ends = torch.tensor(list(stop), dtype=torch.long)
    past = DynamicCache(config=bridge.original_model.config) if supports_prefix_reuse(bridge) else None
    written = tokens.detach().cpu().long()
    done = torch.zeros(len(tokens), dtype=torch.bool)
    with torch.no_grad(), no_retained_graph(bridge), interventions(bridge, parts):
        for _ in range(n_tokens):
            fed = written[:, at[0] :].to(device_of(bridge))
            reuse = {} if past is None else {"past_key_values": past, "logits_to_keep": 1}
            logits = bridge(fed, **reuse)[:, -1].float().cpu()
            new = _choose(written, logits, temperature, warpers, draws)
            new = torch.where(done, written[:, -1], new)
            written = torch.cat([written, new[:, None]], 1)
            done |= torch.isin(new, ends)
            if bool(done.all()):
                break
            at[0] = 0 if past is None else written.shape[1] - 1
    return written


def _windowed(name: str, fn: Edit, at: list[int], window: tuple[int, int | None]) -> Edit:
    """The edit of the part of a tensor [batch, pos, ...] that lies in a window of absolute positions."""

    def apply(tensor: Tensor) -> Tensor:
        n = tensor.shape[1]
        first = min(max(window[0] - at[0], 0), n)
        end = n if window[1] is None else min(max(window[1] - at[0], 0), n)
        if end <= first:
            return tensor
        part = tensor[:, first:end]
        version = None if part.is_inference() else part._version
        new = fn(part)
        check_edit(name, part, new, version)
        return torch.cat([tensor[:, :first], new, tensor[:, end:]], 1)

    return fn if window == (0, None) else apply


def _warpers(temperature: float | int, top_k: int | None, top_p: float | None) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if temperature > 0:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def _choose(
    written: Int[Tensor, "batch pos"],
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float | int,
    warpers: Callable[..., Any],
    draws: torch.Generator,
) -> Int[Tensor, " batch"]:
    if not bool(logits.isfinite().any(-1).all()) or bool(logits.isnan().any()):
        raise ValueError(
            f"the model's logits are not finite after {written.shape[1]} tokens; an edit may have taken an activation "
            f"out of the range of its type"
        )
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(warpers(written, logits).softmax(-1), 1, generator=draws)[:, 0]


def _check(
    bridge: Any,
    tokens: Tensor,
    n_tokens: int,
    edits: Mapping[str, Edit],
    positions: Positions,
    temperature: float | int,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [batch, pos] with at least one of each")
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens}; expected at least 1")
    d_vocab, n_ctx = int(bridge.cfg.d_vocab), getattr(bridge.cfg, "n_ctx", None)
    if int(tokens.min()) < 0 or int(tokens.max()) >= d_vocab:
        raise ValueError(
            f"tokens run from {int(tokens.min())} to {int(tokens.max())}; this model's vocabulary is 0 to {d_vocab - 1}"
        )
    if n_ctx is not None and tokens.shape[1] + n_tokens > int(n_ctx):
        raise ValueError(
            f"{tokens.shape[1]} tokens and {n_tokens} new ones exceed this model's context of {int(n_ctx)}; "
            f"shorten the prompt or ask for fewer"
        )
    if positions not in ("all", "prompt", "generated", "last"):
        raise ValueError(f'positions={positions!r}; expected "all", "prompt", "generated" or "last"')
    if positions == "generated" and edits and n_tokens < 2:
        raise ValueError('positions="generated" needs n_tokens of at least 2: the first new token is fed back second')
    if positions != "all" and (square := [name for name in edits if name.endswith(_NO_POSITION_AXIS)]):
        raise ValueError(
            f'{square[0]!r} is [batch, head, query, key]: positions={positions!r} cannot be applied to it; use "all" '
            f"and let the edit choose"
        )
    if temperature < 0:
        raise ValueError(f"temperature={temperature}; expected 0 (the most likely token) or more")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p restrict what is drawn from; they need a temperature above 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}; expected at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected above 0 and at most 1")
