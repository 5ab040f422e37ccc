"""Which kind of module makes a first-order score wrong? Exact patching in a model of which that kind is linear.

Attribution patching is exact patching of a model in which every module is replaced by its tangent at the run that is
patched. So replacing one kind of module alone, and patching exactly, shows what that kind contributes to the error:
what then differs from the true effects is the curvature of those modules and of no others. Works on the Hugging Face
model itself and shares no code with `interp.patching`, which makes it a check of that as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from interp.types import Site

Kind = Literal["norm", "attention", "mlp"]
KINDS: tuple[Kind, ...] = ("norm", "attention", "mlp")
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
ROWS = 512  # cells x examples in one forward


def effects(
    model: Any, prompts: Any, metric: Callable[[Tensor], Tensor], site: str, linear: Sequence[Kind] = ()
) -> np.ndarray:
    """Effect of denoising every (layer, position), `[layer, pos, example]`, with some kinds of modules made linear.

    Args:
        model: A GPT-2 or Llama `...ForCausalLM` with eager attention, in evaluation mode.
        prompts: With `clean` and `corrupted` tokens of one length.
        metric: Logits of all examples in order to one number per example.
        linear: Kinds whose modules are replaced by their tangents at the corrupted run. None: exact patching. All
            three: attribution patching.
    """
    clean, corrupted = prompts.clean, prompts.corrupted
    n, length = clean.shape
    first = int((clean != corrupted).any(0).nonzero()[0])  # no position before it can matter
    blocks = parts(model)["block"]
    found = np.zeros((len(blocks), length, n))
    with torch.no_grad(), recorded(model, clean) as donor, recorded(model, corrupted) as base:
        baseline = metric(model(corrupted, use_cache=False).logits)
        step = max(1, ROWS // n)
        for layer in range(len(blocks)):
            for start in range(first, length, step):
                spots = range(start, min(start + step, length))
                with ExitStack() as stack:
                    for kind in linear:
                        for module in parts(model)[kind]:
                            stack.enter_context(tangent(module, base[module], len(spots)))
                    stack.enter_context(patched(model, site, layer, spots, donor))
                    logits = model(corrupted.repeat(len(spots), 1), use_cache=False).logits
                for spot, rows in zip(spots, logits.split(n), strict=True):
                    found[layer, spot] = (metric(rows) - baseline).numpy()
    return found


def parts(model: Any) -> dict[str, list[Any]]:
    """The modules of each kind, and the blocks."""
    if hasattr(model, "transformer"):
        blocks, last = model.transformer.h, model.transformer.ln_f
        norms, attention = ("ln_1", "ln_2"), "attn"
    else:
        blocks, last = model.model.layers, model.model.norm
        norms, attention = ("input_layernorm", "post_attention_layernorm"), "self_attn"
    return {
        "block": list(blocks),
        "norm": [*(getattr(block, name) for block in blocks for name in norms), last],
        "attention": [getattr(block, attention) for block in blocks],
        "mlp": [block.mlp for block in blocks],
    }


@contextmanager
def recorded(model: Any, tokens: Tensor) -> Iterator[dict[Any, tuple[Tensor, Tensor]]]:
    """Input and output of every module of a run."""
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def keep(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen[module] = _input(args, kwargs), _first(output)

    with ExitStack() as stack:
        for module in (module for kind in parts(model).values() for module in kind):
            stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        model(tokens, use_cache=False)
    yield seen


@contextmanager
def tangent(module: Any, base: tuple[Tensor, Tensor], copies: int) -> Iterator[None]:
    """Within the context the module is its first-order expansion about a base input, row by row."""
    true_forward, attends = module.forward, "Attention" in type(module).__name__
    at, value = base[0].repeat(copies, 1, 1), base[1].repeat(copies, 1, 1)

    def linear(*args: Any, **kwargs: Any) -> Any:
        def f(x: Tensor) -> Tensor:
            return _first(true_forward(x, *args[1:], **kwargs))

        moved = _input(args, kwargs) - at
        kwargs.pop("hidden_states", None)
        change = torch.func.jvp(f, (at,), (moved,))[1]
        return (value + change, None) if attends else value + change

    module.forward = linear
    try:
        yield
    finally:
        del module.forward


@contextmanager
def patched(
    model: Any, site: str, layer: int, spots: Sequence[int], donor: dict[Any, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Within the context, copy number i of the rows has the donor's activation at position `spots[i]`."""
    if site not in SITES:
        raise ValueError(f"site is {site!r}; expected one of {SITES}")
    module = parts(model)[{"resid_pre": "block", "attn_out": "attention", "mlp_out": "mlp"}[site]][layer]

    def put(tensor: Tensor, given: Tensor) -> Tensor:
        tensor, n = tensor.clone(), len(given)
        for copy, spot in enumerate(spots):
            tensor[copy * n : (copy + 1) * n, spot] = given[:, spot]
        return tensor

    def before(module: Any, args: tuple) -> tuple:
        return (put(args[0], donor[module][0]), *args[1:])

    def after(module: Any, args: tuple, output: Any) -> Any:
        changed = put(_first(output), donor[module][1])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_pre_hook(before) if site == "resid_pre" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _input(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
