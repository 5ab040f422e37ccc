"""The parts of a model that backward rules act on, found by what they compute and not by what they are called.

One forward over a few tokens is read at the inputs and outputs of every norm, MLP and attention; a part is supported
if the formula that the rules assume gives what the model computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from interp import hooks
from interp.hooks.names import device_of

Coefficient = Callable[[Tensor], Tensor]
_CUBE = 0.044715  # of GELU's tanh form

COEFFICIENTS: dict[str, Coefficient] = {
    "gelu": lambda x: 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + _CUBE * x**3))),
    "silu": torch.sigmoid,
    "quick_gelu": lambda x: torch.sigmoid(1.702 * x),
    "relu": lambda x: (x > 0).to(x.dtype),
}
"""`act(x) / x` in closed form, which is right at 0."""

_SAME = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "swish": "silu"}
_PROBE = 5  # tokens


@dataclass(frozen=True)
class Norm:
    """A LayerNorm or RMSNorm at `path`."""

    path: str
    module: Any
    query_key: bool

    def __call__(self, x: Tensor, *, differentiable: bool = False) -> Tensor:
        """The norm with a constant denominator, unless asked otherwise: linear in `x`, apart from its bias."""
        raw, wide = self.module.original_component, _wide(x)
        centred = wide if self.module.uses_rms_norm else wide - wide.mean(-1, keepdim=True)
        scale = ((centred if differentiable else centred.detach()).pow(2).mean(-1, keepdim=True) + self._eps()).rsqrt()
        weight, bias = getattr(raw, "weight", None), getattr(raw, "bias", None)
        if weight is not None:
            weight = _wide(weight.detach())
            scale = scale * (1 + weight if self.module.uses_weight_offset else weight)
        result = centred * scale
        return (result if bias is None else result + _wide(bias.detach())).to(x.dtype)

    def _eps(self) -> float:
        for name in ("eps", "variance_epsilon"):
            if (eps := getattr(self.module.original_component, name, None)) is not None:
                return float(eps)
        return float(getattr(self.module.config, "eps", 1e-5))


@dataclass(frozen=True)
class Mlp:
    """An MLP at `path` with a known activation function."""

    path: str
    activation: str
    gated: bool

    def coefficient(self, x: Tensor, *, differentiable: bool = False) -> Tensor:
        """`act(x) / x`, constant unless asked otherwise."""
        wide = _wide(x) if differentiable else _wide(x.detach())
        return COEFFICIENTS[self.activation](wide).to(x.dtype)


@dataclass(frozen=True)
class Attention:
    """An attention at `path`; `softmax` if its pattern is the softmax of its scores and both can be edited."""

    path: str
    softmax: bool
    capped: bool


@dataclass(frozen=True)
class Parts:
    """What was found; `refused` says why a module does not obey the formulas, by its name."""

    norms: list[Norm] = field(default_factory=list)
    mlps: list[Mlp] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    linear: list[tuple[str, str]] = field(default_factory=list)
    soft_cap: float | None = None
    refused: dict[str, str] = field(default_factory=dict)


_LINEAR = {"EmbeddingBridge", "PosEmbedBridge", "RotaryEmbeddingBridge", "LinearBridge", "UnembeddingBridge"}


def find_parts(bridge: Any) -> Parts:
    """Every component of a bridge, classed by a probe of five tokens."""
    live = set(hooks.names(bridge))
    tokens = torch.randint(
        int(bridge.cfg.d_vocab), (2, _PROBE), generator=torch.Generator().manual_seed(0)
    )  # distinct rows: a batch mix-up shows
    with torch.no_grad(), hooks.reads(bridge, sorted(_wanted(live))) as found:
        bridge(tokens.to(device_of(bridge)))
    cap = float(getattr(bridge.cfg, "output_logits_soft_cap", -1.0) or -1.0)
    parts = Parts(soft_cap=cap if cap > 0 else None)
    for path, module in components(bridge):
        kind = type(module).__name__
        if hasattr(module, "hook_normalized"):
            _class_norm(parts, Norm(path, module, ".attn." in path), found)
        elif hasattr(module, "hook_pattern"):
            _class_attention(parts, bridge, path, module, found, live)
        elif "MLP" in kind:
            _class_mlp(parts, bridge, path, found)
        elif kind in _LINEAR:
            parts.linear.append((path, kind))
        elif not kind.endswith("BlockBridge"):  # a block adds up what its parts return
            parts.refused[path] = f"no rule is known for a {kind.removesuffix('Bridge')}"
    if any(getattr(bridge.cfg, flag, False) for flag in ("use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")):
        parts.refused["blocks.*.ln1"] = (
            "it is bypassed while the bridge's inputs are split; call bridge.set_use_split_qkv_input(False), "
            "bridge.set_use_attn_in(False) and bridge.set_use_hook_mlp_in(False)"
        )
    return parts


def components(bridge: Any) -> list[tuple[str, Any]]:
    """The wrapped modules by the prefix of their hooks' names, in the order of the blocks."""
    prefixes = {
        id(point): name.removesuffix(".hook_out")
        for name, point in reversed(list(bridge.hook_dict.items()))
        if name.endswith(".hook_out")
    }
    listed = []
    for _, module in bridge.named_modules():
        point = getattr(module, "hook_out", None)
        if module is not bridge and hasattr(module, "original_component") and id(point) in prefixes:
            listed.append((prefixes[id(point)], module))
    unique = {id(module): (path, module) for path, module in listed}
    return list(unique.values())


def tolerance(dtype: torch.dtype) -> float:
    """Relative error up to which two computations of one thing agree; float64 models compute norms in float32."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 8 * torch.finfo(dtype).eps


def _wanted(live: set[str]) -> set[str]:
    ends = ("hook_pre", "hook_pre_linear", "hook_post", "hook_v", "hook_z", "hook_pattern", "hook_attn_scores")
    found = {f"{name.removesuffix('.hook_normalized')}.{end}" for name in live for end in ("hook_in", "hook_out")
             if name.endswith(".hook_normalized")}  # fmt: skip
    return (found | {name for name in live if name.startswith("blocks.") and name.split(".")[-1] in ends}) & live


def _class_norm(parts: Parts, norm: Norm, found: dict[str, Tensor]) -> None:
    names = [f"{norm.path}.hook_in", f"{norm.path}.hook_out"]
    if not all(name in found for name in names):
        parts.refused[norm.path] = "its input and output cannot be read"
    elif _hands_on(norm, found[names[0]]):
        parts.linear.append((norm.path, "no norm"))
    elif _differ(norm(found[names[0]]), found[names[1]]):
        parts.refused[norm.path] = (
            f"{type(norm.module.original_component).__name__} is not the LayerNorm or RMSNorm it is taken for"
        )
    else:
        parts.norms.append(norm)


def _hands_on(norm: Norm, entered: Tensor) -> bool:
    """Whether the module in a norm's place returns its input, also a scaled one that no norm would return as it is."""
    other = 3 * entered
    return torch.equal(norm.module.original_component(other), other)


def _class_mlp(parts: Parts, bridge: Any, path: str, found: dict[str, Tensor]) -> None:
    pre, linear, post = (found.get(f"{path}.hook_{name}") for name in ("pre", "pre_linear", "post"))
    if pre is None or post is None or pre.shape != post.shape:
        parts.refused[path] = "its pre-activations and activations cannot be read one for one"
        return
    config = bridge.original_model.config
    given = (getattr(config, key, None) for key in ("activation_function", "hidden_activation", "hidden_act"))
    name = next((str(value) for value in given if value is not None), "unknown")
    name = _SAME.get(name, name)
    if name not in COEFFICIENTS:
        parts.refused[path] = f"no coefficient is known for its activation function {name!r}"
        return
    mlp = Mlp(path, name, linear is not None)
    value = pre * mlp.coefficient(pre)
    if _differ(value if linear is None else value * linear, post):
        parts.refused[path] = f"its activations are not {name}(x){'' if linear is None else ' times a linear branch'}"
    else:
        parts.mlps.append(mlp)


def _class_attention(
    parts: Parts, bridge: Any, path: str, module: Any, found: dict[str, Tensor], live: set[str]
) -> None:
    if not all(f"{path}.hook_{name}" in live for name in "qkv"):
        parts.refused[path] = "its queries, keys and values cannot be reached"
        return  # whether detaching them has an effect is seen by what is conserved over the whole model
    pattern, scores, v, z = (found.get(f"{path}.hook_{name}") for name in ("pattern", "attn_scores", "v", "z"))
    if pattern is not None and v is not None and z is not None and z.ndim == 4 and v.ndim == 4:
        values = v.repeat_interleave(z.shape[2] // v.shape[2], 2)
        if _differ(torch.einsum("bhds,bshe->bdhe", pattern.to(values.dtype), values), z):
            parts.refused[path] = "its output is not its pattern times its values: a gate or a cap comes in between"
            return
    editable = all(
        f"{path}.hook_{name}" in live and hooks.editable(bridge, f"{path}.hook_{name}")
        for name in ("pattern", "attn_scores")
    )
    softmax = editable and pattern is not None and scores is not None
    softmax = softmax and not _differ(scores.softmax(-1).to(pattern.dtype), pattern)  # type: ignore[union-attr]
    capped = getattr(module.original_component, "attn_logit_softcapping", None) is not None
    parts.attentions.append(Attention(path, softmax, capped))


def _differ(found: Tensor, expected: Tensor) -> bool:
    error = (found.double() - expected.double()).abs().max()
    return not bool(error <= tolerance(expected.dtype) * expected.double().abs().max())


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
