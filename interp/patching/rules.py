"""Backward rules: change what the backward pass computes, and nothing that the forward pass computes.

Gradients of a deep model are poor guides to what an activation does: norms, activation functions and products make the
first-order term small or large where the effect is not. Layer-wise relevance propagation replaces the derivative of
each such module by the coefficient with which it multiplied its input. All methods of the family differ only in a
few of those replacements, so one engine with named presets serves them all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias, get_args

from interp.patching._cells import choice
from interp.patching._rule_hooks import attach_rules
from interp.patching.coverage import covered_parts

Preset: TypeAlias = Literal["gradient", "relp", "relp_ah", "cp_lrp", "attnlrp", "gim"]
NormRule: TypeAlias = Literal["gradient", "LN"]
ActivationRule: TypeAlias = Literal["gradient", "Identity"]
GateRule: TypeAlias = Literal["gradient", "Half", "detach"]
AttentionRule: TypeAlias = Literal["gradient", "AH", "temperature"]


@dataclass(frozen=True)
class Rules:
    """Which backward rule each kind of module gets. The default, `"gradient"` everywhere, is the ordinary gradient.

    Attributes:
        norm: `"LN"` holds the denominator of every LayerNorm and RMSNorm constant (block, post-, final and query-key
            norms); centring, gain and bias are differentiated.
        activation: `"Identity"` treats `act(x)` as `x` times the constant `act(x) / x`, in closed form (the normal
            distribution function for GELU, the sigmoid for SiLU, a step for ReLU), so that it is right at 0. In a gated
            MLP it is the gate's activation. A soft cap on the logits is treated alike.
        gate: For the product `act(gate) * linear` of gated MLPs: `"Half"` gives each branch half of its gradient, so
            that the product is not counted twice; `"detach"` holds `act(gate)` constant, whatever `activation` says.
        attention: `"AH"` holds the attention pattern constant (queries and keys are detached, which works on every
            attention implementation), so that nothing flows back through them. `"temperature"` takes the Jacobian of
            the softmax at temperature 2, diag(p) - p p^T with the softer p, without the factor 1/2 of the chain rule.
        qkv: Factors on what flows back into queries, keys and values.

    Source:
        LN and AH: Ali et al. 2022 (arXiv:2202.07304). Identity and Half: Rezaei Jafari et al. 2025 (arXiv:2508.21258),
        section 3. The released code of the latter divides by x plus a stabiliser, which is wrong within 1e-5 of 0, and
        leaves the Identity rule off when its flags are set as its README says; ours has no stabiliser.
    """

    norm: NormRule = "gradient"
    activation: ActivationRule = "gradient"
    gate: GateRule = "gradient"
    attention: AttentionRule = "gradient"
    qkv: tuple[float | int, float | int, float | int] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        choice("norm", self.norm, get_args(NormRule))
        choice("activation", self.activation, get_args(ActivationRule))
        choice("gate", self.gate, get_args(GateRule))
        choice("attention", self.attention, get_args(AttentionRule))
        if len(self.qkv) != 3 or not all(0 <= factor < float("inf") for factor in self.qkv):
            raise ValueError(f"qkv={self.qkv} must be three factors, for queries, keys and values, of 0 or more")
        if self.attention == "AH" and any(self.qkv[:2]) and tuple(self.qkv[:2]) != (1, 1):
            raise ValueError(f"qkv={self.qkv} scales queries and keys, to which nothing flows back with attention='AH'")

    def to_dict(self) -> dict[str, Any]:
        """As in the provenance of a result."""
        return {**asdict(self), "qkv": list(self.qkv)}


PRESETS: dict[Preset, Rules] = {
    "gradient": Rules(),
    "relp": Rules(norm="LN", activation="Identity", gate="Half"),
    "relp_ah": Rules(norm="LN", activation="Identity", gate="Half", attention="AH"),
    "cp_lrp": Rules(norm="LN", activation="Identity", gate="detach", attention="AH"),
    "attnlrp": Rules(norm="LN", activation="Identity", gate="Half", qkv=(0.25, 0.25, 0.5)),
    "gim": Rules(norm="LN", gate="Half", attention="temperature", qkv=(0.25, 0.25, 0.5)),
}
"""The methods of the field, as rules.

- `gradient`: the ordinary gradient, as attribution patching uses it (Nanda 2023; Syed et al. 2023, arXiv:2310.10348).
- `relp`, `relp_ah`: relevance patching without and with a frozen attention pattern (Rezaei Jafari et al. 2025,
  arXiv:2508.21258). Both go by the name RelP: the paper lists the AH-rule, the released code has it off.
- `cp_lrp`: conservative propagation (Ali et al. 2022, arXiv:2202.07304) as in the LXT package.
- `attnlrp`: AttnLRP (Achtibat et al. 2024, arXiv:2402.05602) in the efficient form of LXT.
- `gim`: gradient interaction modifications (arXiv:2505.17630), with the softmax Jacobian of the released package.
"""

_active: weakref.WeakKeyDictionary[Any, Rules] = weakref.WeakKeyDictionary()


def resolve_rules(preset: Preset | Rules) -> Rules:
    """The rules behind a preset's name, or the rules themselves."""
    if isinstance(preset, Rules):
        return preset
    choice("preset", preset, PRESETS)
    return PRESETS[preset]


@contextmanager
def backward_rules(bridge: Any, preset: Preset | Rules) -> Iterator[Rules]:
    """Within the context, every backward pass of a forward run there obeys the rules; the forward is unchanged, bit for
    bit.

    Implemented by forward hooks that return the value the model computed with the gradient of a surrogate, so it
    combines with other hooks, `torch.autograd.grad` and TransformerLens' own attribution tools. Hooks added inside the
    context come after those of the rules. Costs no forwards; a forward and backward pass takes between 0.8 and 1.25
    times that without rules (the presets on the embedded models, one CPU thread). The first use on a model runs a few
    forwards over a few tokens to see which formulas its modules obey, and one backward to see that relevance is
    conserved.

    Raises:
        UnsupportedModule: (a ValueError) If a rule cannot be honoured for some module, which is named. See
            `rule_coverage`.
        RuntimeError: If rules are active on this bridge already, which would apply both.

    Example:
        >>> with interp.patching.backward_rules(bridge, "relp"), interp.hooks.taps(bridge, "*.hook_resid_pre") as at:
        ...     coefficients = torch.autograd.grad(metric(bridge(tokens)).sum(), list(at.values()))
    """
    rules = resolve_rules(preset)
    if bridge in _active:
        raise RuntimeError(f"backward rules are active on this bridge already ({_active[bridge]}); leave that context")
    parts = covered_parts(bridge, rules)
    with ExitStack() as stack:
        _active[bridge] = rules
        stack.callback(_active.pop, bridge)
        attach_rules(stack, bridge, rules, parts)
        yield rules
