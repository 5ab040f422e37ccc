"""One second of doubt after loading: does the bridge compute what the model computes, and do its hooks do what they
say?"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp.hooks import SITE_HOOKS, editable, hook_name, names, reads, supports_prefix_reuse
from interp.models.identity import geometry, source_of, weights_state
from interp.models.report import CheckReport, CheckRow, Status
from interp.types import Site

_SMALL = 200_000_000
"""Parameters up to which a second copy is read from disk to compare with: about a second and 800 MB in float32."""


Finding = tuple[Status, str, str]


def self_check(bridge: Any, *, full: bool = False) -> CheckReport:
    """What is right and what is off about a loaded model, in about a second for small ones. Raises nothing.

    Compares with plain transformers, adds up the residual stream, and edits activations to see whether the output
    follows.

    Args:
        full: Also read a second copy from disk to compare with when the model has more than 200 million parameters.
    """
    started = time.perf_counter()
    rows = []
    checks: dict[str, Callable[[Any], Finding]] = {
        "family": _family,
        "weights": _weights,
        "mode": _mode,
        "logits": lambda bridge: _logits(bridge, full),
        "finite": _finite,
        "residual sum": _residual_sum,
        "embedding": _embedding,
        "pattern": _pattern,
        "unembedding": _unembedding,
        "hook edits": _edits,
        "bos": _bos,
        "vocabulary": _vocabulary,
        "prefix reuse": _prefix_reuse,
    }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, check in checks.items():
            try:
                status, value, detail = check(bridge)
            except Exception as error:  # a check that cannot run is a finding, not a crash
                status, value, detail = "fail", type(error).__name__, str(error).split("\n")[0]
            rows.append(CheckRow(name, status, value, detail))
    return CheckReport(str(bridge.cfg.model_name), tuple(rows), time.perf_counter() - started)


def _family(bridge: Any) -> Finding:
    shape = geometry(bridge)
    heads = f"{shape.n_heads} heads" + (f" on {shape.n_kv_heads} key-value heads" if shape.grouped else "")
    facts = [
        f"{shape.n_layers} layers, d_model {shape.d_model}, {heads}",
        shape.norm + (" before and after" if shape.post_norm else ""),
        "gated MLP" if shape.gated else "plain MLP",
        f"{'parallel' if shape.parallel else 'sequential'} blocks",
    ]
    cap = f", logits capped at {shape.soft_cap:g}" if shape.soft_cap else ""
    return "ok", ", ".join(facts), f"{shape.positional} positions, context {shape.n_ctx}{cap}"


def _weights(bridge: Any) -> Finding:
    parameters = list(bridge.original_model.parameters())
    kinds = {str(parameter.dtype).removeprefix("torch.") for parameter in parameters if parameter.is_floating_point()}
    places = {parameter.device.type for parameter in parameters}
    value = f"{weights_state(bridge)} {'+'.join(sorted(kinds))} on {'+'.join(sorted(places))}"
    said = str(bridge.cfg.dtype).removeprefix("torch."), torch.device(bridge.cfg.device).type
    if kinds != {said[0]} or places != {said[1]}:
        return "fail", value, f"the configuration says {said[0]} on {said[1]}; load with the dtype and device you want"
    return "ok", value, f"{sum(parameter.numel() for parameter in set(parameters)):,} parameters"


def _mode(bridge: Any) -> Finding:
    training = any(module.training for module in bridge.original_model.modules())
    graded = sum(parameter.requires_grad for parameter in bridge.original_model.parameters())
    if training:
        return "fail", "training mode", "dropout makes every measurement random: call bridge.eval()"
    if graded:
        return "warn", "parameters not frozen", f"{graded} collect gradients: call bridge.requires_grad_(False)"
    return "ok", "evaluation, frozen", ""


def _logits(bridge: Any, full: bool) -> Finding:
    source = source_of(bridge)
    if source is None:
        return "skip", "", "not loaded by interp.load_model: nothing to compare with"
    if source.tokens is not None and source.log_probs is not None:
        tokens, expected = source.tokens, source.log_probs
        against = "the model before it was wrapped"
    else:
        size = sum(parameter.numel() for parameter in bridge.original_model.parameters())
        if size > _SMALL and not full:
            return (
                "skip",
                "",
                f"{size / 1e9:.1f} billion parameters: self_check(bridge, full=True) reads a second copy to compare",
            )
        tokens = _tokens(bridge, min(16, int(bridge.cfg.n_ctx))).cpu()
        expected, against = _plain_log_probs(bridge, source.directory, tokens), "plain transformers"
    ours = bridge(tokens.to(_device(bridge))).float().log_softmax(-1).cpu()
    error = float((ours - expected).abs().max())
    limit = _room(bridge, 5e-3, 0.25)
    status: Status = "ok" if error <= limit else "fail"
    return status, f"{error:.1e}", f"largest difference of log-probabilities from {against} (limit {limit:g})"


def _plain_log_probs(bridge: Any, directory: Any, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    dtype = next(iter(bridge.original_model.parameters())).dtype
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        plain = AutoModelForCausalLM.from_pretrained(str(directory), dtype=dtype, attn_implementation="eager")
    finally:
        if shown:
            logging.enable_progress_bar()
    model: Any = plain
    model.to(_device(bridge)).eval()
    return model(tokens.to(_device(bridge))).logits.float().log_softmax(-1).cpu()


def _finite(bridge: Any) -> Finding:
    logits = bridge(_tokens(bridge))
    bad = int((~logits.isfinite()).sum())
    if bad:
        return "fail", f"{bad} of {logits.numel()}", "logits are NaN or infinite; try dtype='float32' or 'bfloat16'"
    return "ok", "yes", "no NaN or infinity in the logits"


def _residual_sum(bridge: Any) -> Finding:
    layers = range(len(bridge.blocks))
    first, last = hook_name("resid_pre", 0), hook_name("resid_post", len(bridge.blocks) - 1)
    parts = [hook_name(site, layer) for layer in layers for site in ("attn_out", "mlp_out")]
    absent = [name for name in [first, last, *parts] if name not in names(bridge)]
    if absent:
        return "warn", "", f"cannot be added up: {', '.join(absent[:4])} never fire"
    found = _read(bridge, [first, last, *parts])
    total = found[first].float() + sum(found[name].float() for name in parts)
    error = float((total - found[last].float()).abs().max() / found[last].float().abs().max())
    status: Status = "ok" if error <= _room(bridge, 1e-4, 0.05) else "fail"
    return (
        status,
        f"{error:.1e}",
        "relative difference of resid_pre 0 plus every attn_out and mlp_out from the last resid_post",
    )


def _embedding(bridge: Any) -> Finding:
    parts = [name for name in ("hook_embed", "hook_pos_embed") if name in names(bridge)]
    first = hook_name("resid_pre", 0)
    found = _read(bridge, [*parts, first])
    total = sum(found[name].float() for name in parts)
    error = float((total - found[first].float()).abs().max() / found[first].float().abs().max())
    status: Status = "ok" if error <= _room(bridge, 1e-5, 0.02) else "warn"
    return status, f"{error:.1e}", f"relative difference of {' + '.join(parts)} from resid_pre 0"


def _pattern(bridge: Any) -> Finding:
    wanted = [hook_name("pattern", layer) for layer in range(len(bridge.blocks))]
    live = [name for name in wanted if name in names(bridge)]
    if not live:
        return "warn", "", "this model shows no attention patterns"
    patterns = torch.stack([pattern.float() for pattern in _read(bridge, live).values()])
    error = float((patterns.sum(-1) - 1).abs().max())
    ahead = float(patterns.triu(1).abs().max())
    sums_to_one = error <= _room(bridge, 1e-4, 0.02) and ahead == 0 and float(patterns.min()) >= 0
    return (
        "ok" if sums_to_one else "fail",
        f"{error:.1e}",
        f"row sums from one; largest weight on later tokens {ahead:.1g}",
    )


def _unembedding(bridge: Any) -> Finding:
    with reads(bridge, ["ln_final.hook_out", "unembed.hook_out"]) as found:
        logits = bridge(_tokens(bridge)).float()
    computed = found["unembed.hook_out"].float()
    expected = (found["ln_final.hook_out"] @ bridge.W_U + bridge.b_U).float()
    cap = geometry(bridge).soft_cap
    capped = cap * torch.tanh(computed / cap) if cap else computed
    scale = float(logits.abs().max())
    error = max(float((expected - computed).abs().max()), float((capped - logits).abs().max())) / scale
    status: Status = "ok" if error <= _room(bridge, 1e-4, 0.05) else "warn"
    return (
        status,
        f"{error:.1e}",
        f"relative difference of ln_final @ W_U + b_U{' with the cap' if cap else ''} from the logits",
    )


def _edits(bridge: Any) -> Finding:
    layer = len(bridge.blocks) // 2
    live = set(names(bridge))
    sites: tuple[Site, ...] = tuple(SITE_HOOKS)
    absent = [site for site in sites if hook_name(site, layer) not in live]
    idle = [site for site in sites if site not in absent and not editable(bridge, hook_name(site, layer))]
    flat = [
        site for site in sites if site not in absent and site not in idle and _is_flat(bridge, hook_name(site, layer))
    ]
    notes = [f"{', '.join(absent)}: not on this model"] if absent else []
    notes += [f"{', '.join(idle)}: an edit has no effect"] if idle else []
    notes += [f"{', '.join(flat)}: without a batch axis"] if flat else []
    works = len(sites) - len(absent) - len(idle) - len(flat)
    expected_absence = absent == ["resid_mid"] and geometry(bridge).parallel
    status: Status = "ok" if not idle and not flat and (not absent or expected_absence) else "warn"
    return (
        status,
        f"{works} of {len(sites)} sites",
        "unsupported: " + "; ".join(notes) if notes else "an edit of each changes the logits",
    )


def _is_flat(bridge: Any, name: str) -> bool:
    """Some families (OPT) fold batch and position into one axis."""
    return _read(bridge, [name])[name].ndim < 3


def _bos(bridge: Any) -> Finding:
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        return "warn", "no tokenizer", "strings cannot be turned into tokens"
    tokens, bos = bridge.to_tokens("a b")[0].tolist(), tokenizer.bos_token_id
    count = tokens.count(bos)
    if count == 1 and tokens[0] == bos:
        return "ok", "once", f"to_tokens begins with {tokenizer.bos_token!r} (id {bos})"
    if count == 0 and not bridge.cfg.default_prepend_bos:
        return "ok", "none", "to_tokens adds no BOS: this family is trained without; pass prepend_bos=True to add it"
    return "fail", f"{count} times", f"to_tokens('a b') gives {tokens}; BOS is {bos}. Build token tensors yourself"


def _vocabulary(bridge: Any) -> Finding:
    if bridge.tokenizer is None:
        return "skip", "", "no tokenizer"
    rows = int(bridge.W_E.shape[0])
    largest = max(bridge.tokenizer.get_vocab().values())
    if largest >= rows:
        return (
            "fail",
            f"id {largest} of {rows}",
            "the tokenizer has ids without an embedding: is it this model's tokenizer?",
        )
    return "ok", f"{largest + 1} of {rows}", "the tokenizer's ids and the embedding's rows"


def _prefix_reuse(bridge: Any) -> Finding:
    if supports_prefix_reuse(bridge):
        return "ok", "yes", "keys and values of a shared prefix can be reused"
    return "warn", "no", "whole prompts are run instead: slower, same numbers"


def _tokens(bridge: Any, pos: int = 12) -> Tensor:
    """Fixed pseudo-random token ids [2, pos], without touching the global generator."""
    pos = min(pos, int(bridge.cfg.n_ctx))
    drawn = torch.randint(int(bridge.cfg.d_vocab), (2, pos), generator=torch.Generator().manual_seed(0))
    return drawn.to(_device(bridge))


def _read(bridge: Any, wanted: list[str]) -> dict[str, Tensor]:
    with reads(bridge, wanted) as found:
        bridge(_tokens(bridge))
    return found


def _device(bridge: Any) -> torch.device:
    return next(iter(bridge.original_model.parameters())).device


def _room(bridge: Any, exact: float, half: float) -> float:
    """Tolerance for the model's precision."""
    return exact if next(iter(bridge.original_model.parameters())).dtype in (torch.float32, torch.float64) else half
