"""What a set of backward rules does to each module of a model, said before it is done."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from interp.hooks.names import probe_tokens, without_hooks
from interp.models.identity import fingerprint
from interp.patching._parts import Parts, find_parts, tolerance
from interp.patching._relevance import relevance
from interp.patching._rule_hooks import attach_rules

if TYPE_CHECKING:
    import pandas as pd

    from interp.patching.rules import Preset, Rules


class UnsupportedModule(ValueError):
    """A rule cannot be honoured for a module of this model."""


def rule_coverage(bridge: Any, preset: Preset | Rules) -> pd.DataFrame:
    """One row per module: its `kind`, the `rule` it gets, `status` and `detail`.

    `status` is `"applied"` (its backward pass is changed), `"not applicable"` (linear, or the rules leave it alone, or
    nothing flows back to it) or `"unsupported"` (`backward_rules` raises). Costs a few forwards of a few tokens, once
    per model.
    """
    import pandas as pd

    from interp.patching.rules import resolve_rules

    rules = resolve_rules(preset)
    rows = _rows(_parts(bridge), rules)
    if _needs_conservation(rules) and not any(row["status"] == "unsupported" for row in rows):
        rows += _whole(bridge)
    return pd.DataFrame(rows, columns=["module", "kind", "rule", "status", "detail"])


def covered_parts(bridge: Any, rules: Rules) -> Parts:
    """The parts that the rules act on; raises `UnsupportedModule` if there is one that they cannot act on."""
    from interp.patching.rules import Rules

    if rules == Rules():
        return Parts()
    parts = _parts(bridge)
    rows = _rows(parts, rules)
    bad = [row for row in rows if row["status"] == "unsupported"]
    if not bad and _needs_conservation(rules):
        bad = [row for row in _whole(bridge) if row["status"] == "unsupported"]
    if bad:
        listed = "; ".join(f"{row['module']} ({row['rule']}): {row['detail']}" for row in bad[:4])
        more = f"; and {len(bad) - 4} more" if len(bad) > 4 else ""
        raise UnsupportedModule(
            f"backward rules do not cover {bridge.cfg.model_name}: {listed}{more}. "
            f"See interp.patching.rule_coverage(bridge, preset), and use the preset 'gradient'."
        )
    return parts


def _rows(parts: Parts, rules: Rules) -> list[dict[str, str]]:
    rows = [_row(path, kind.removesuffix("Bridge").lower(), "gradient") for path, kind in parts.linear]
    for norm in parts.norms:
        kind = "RMSNorm" if norm.module.uses_rms_norm else "LayerNorm"
        if norm.query_key and rules.attention == "AH":
            rows.append(_row(norm.path, kind, "gradient", "nothing flows back to queries and keys"))
        else:
            rows.append(_row(norm.path, kind, rules.norm))
    for attention in parts.attentions:
        detail = "its soft cap is differentiated" if attention.capped and rules.attention != "AH" else ""
        row = _row(f"{attention.path}.hook_pattern", "attention", rules.attention, detail)
        if rules.attention == "temperature" and not attention.softmax:
            row |= {
                "status": "unsupported",
                "detail": "its pattern cannot be edited, or is not a softmax of its scores",
            }
        rows.append(row)
        if tuple(rules.qkv) != (1, 1, 1):
            factors = ", ".join(f"{factor:g}" for factor in rules.qkv)
            rows.append(_row(f"{attention.path}.hook_q/k/v", "attention", f"factors {factors}"))
    for mlp in parts.mlps:
        fixed = mlp.gated and rules.gate == "detach"
        rows.append(_row(f"{mlp.path}.hook_pre", mlp.activation, "detach" if fixed else rules.activation))
        if mlp.gated:
            rows.append(_row(f"{mlp.path}.hook_post", "gated product", rules.gate))
    if parts.soft_cap is not None:
        rows.append(_row("unembed", f"soft cap {parts.soft_cap:g}", rules.activation))
    for path, why in parts.refused.items():
        rows.append({"module": path, "kind": "?", "rule": "?", "status": "unsupported", "detail": why})
    return rows


def _row(module: str, kind: str, rule: str, detail: str = "") -> dict[str, str]:
    status = "not applicable" if rule == "gradient" else "applied"
    return {"module": module, "kind": kind, "rule": rule, "status": status, "detail": detail}


def _needs_conservation(rules: Rules) -> bool:
    """Rules that stand on the whole model being linear once norms, activations, products and patterns are held."""
    return rules.norm == "LN"


_known: weakref.WeakKeyDictionary[Any, tuple[Any, Parts, list[dict[str, str]]]] = weakref.WeakKeyDictionary()


def _parts(bridge: Any) -> Parts:
    return _probed(bridge)[1]


def _whole(bridge: Any) -> list[dict[str, str]]:
    """A row on the whole model where holding all known nonlinear parts constant does not make it linear; else none."""
    return _probed(bridge)[2]


def _probed(bridge: Any) -> tuple[Any, Parts, list[dict[str, str]]]:
    flags = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")
    implementation = getattr(bridge.original_model.config, "_attn_implementation", None)
    key = (
        fingerprint(bridge),
        bool(bridge.compatibility_mode),
        implementation,
        *(getattr(bridge.cfg, f, False) for f in flags),
    )
    known = _known.get(bridge)
    if known is None or known[0] != key:
        with without_hooks(bridge):
            parts = find_parts(bridge)
            with torch.inference_mode(False), torch.enable_grad():
                rows = [] if parts.refused else _conservation_row(bridge, parts)
        known = _known[bridge] = (key, parts, rows)
    return known


def _conservation_row(bridge: Any, parts: Parts) -> list[dict[str, str]]:
    from interp.patching.rules import PRESETS

    tokens = probe_tokens(bridge)
    found = relevance(
        bridge,
        tokens,
        lambda logits: logits[:, -1, :2].float() @ logits.new_tensor([1.0, -1.0]).float(),
        lambda stack: attach_rules(stack, bridge, PRESETS["relp_ah"], parts),
    )
    gap = float((found.stream[0] + found.bias[0] - found.metric).abs().max())
    size = float(found.size.max()) + float(found.metric.abs().max())
    if gap <= 10 * tolerance(next(iter(bridge.original_model.parameters())).dtype) * size:
        return []
    why = (
        f"with every norm, activation, product and pattern held constant the model is still not linear: relevance "
        f"{float((found.stream[0] + found.bias[0]).max()):.4g} at the embedding against {float(found.metric.max()):.4g}"
    )
    return [{"module": "(whole model)", "kind": "?", "rule": "conservation", "status": "unsupported", "detail": why}]
