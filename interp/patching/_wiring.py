"""How the blocks of a model read and write the residual stream, found by a probe and not by what parts are called.

To change what one reader sees, its query, key or value must be the norm of the stream times weights; to change what
one head wrote, attention's output must be a sum over heads. Both are checked on a few tokens, and a model that does not
obey is refused.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp import hooks
from interp.hooks.names import device_of, without_hooks
from interp.patching._parts import Norm, tolerance
from interp.patching.graph import Graph, graph_of

Branch = Literal["attn", "mlp"]
_NORMS: dict[Branch, tuple[str, ...]] = {"attn": ("ln1",), "mlp": ("ln2", "ln1")}  # the second where one serves both
_PROBE = 5  # tokens
_FLAGS = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


@dataclass(frozen=True)
class Layer:
    """What the probe found in one block.

    Attributes:
        norms: The module through which each branch reads the stream, and whether it is called itself (`"module"`) or
            its formula is used (`"formula"`), where folded weights made them differ.
        post: Whether attention's output is normalised before it is added.
        has_mlp: Whether there is an MLP.
    """

    norms: dict[Branch, tuple[str, str]]
    post: bool
    has_mlp: bool


@dataclass(frozen=True)
class Wiring:
    """A model's graph and how to compute what its readers see."""

    bridge: Any
    graph: Graph
    layers: tuple[Layer, ...]

    def normed(self, branch: Branch, layer: int, stream: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What a branch of a block reads of a stream: its norm. No hook fires."""
        return _apply(self.bridge, layer, self.layers[layer].norms[branch], stream)

    def added(self, layer: int, attention: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        """What is added to the stream of attention's output: the post-norm of it."""
        return self.bridge.blocks[layer].ln1_post.original_component(attention)

    def weight(self, name: Literal["q", "k", "v", "z"], layer: int) -> Tensor:
        """Weights by head: into `q`, `k`, `v` [head, d_model, d_head]; out of `z` [head, d_head, d_model]."""
        return getattr(self.bridge.blocks[layer].attn, {"q": "W_Q", "k": "W_K", "v": "W_V", "z": "W_O"}[name]).detach()

    def bias(self, layer: int) -> Float[Tensor, "d_model"] | None:
        """What attention adds to its heads' sum, which is no writer's."""
        bias = self.bridge.blocks[layer].attn.b_O
        return None if bias is None else bias.detach()

    def raw(self, layer: int) -> str:
        """The hook of attention's output before any post-norm."""
        return f"blocks.{layer}.attn.hook_out" if self.layers[layer].post else hooks.hook_name("attn_out", layer)


_found: weakref.WeakKeyDictionary[Any, tuple[Any, tuple[Layer, ...]]] = weakref.WeakKeyDictionary()


def wiring(bridge: Any) -> Wiring:
    """The wiring of a model; one forward over a few tokens the first time.

    Raises:
        ValueError: If the model reads or writes its stream in another way than by norms and linear maps of heads.
    """
    graph = graph_of(bridge)
    state = (getattr(bridge, "compatibility_mode", False), *(getattr(bridge.cfg, flag, False) for flag in _FLAGS))
    if bridge not in _found or _found[bridge][0] != state:
        with torch.no_grad(), without_hooks(bridge):
            _found[bridge] = (state, _probe(bridge, graph))
    return Wiring(bridge, graph, _found[bridge][1])


def _probe(bridge: Any, graph: Graph) -> tuple[Layer, ...]:
    live = set(hooks.names(bridge))
    sites = ("resid_pre", "attn_out", "q", "k", "v", "z", "mlp_out", "resid_post")
    per_layer = [
        {**{site: hooks.hook_name(site, layer) for site in sites},
         "raw": f"blocks.{layer}.attn.hook_out", "entered": f"blocks.{layer}.mlp.hook_in"}
        for layer in range(graph.n_layers)
    ]  # fmt: skip
    tokens = torch.randint(int(bridge.cfg.d_vocab), (2, _PROBE), generator=torch.Generator().manual_seed(0))
    wanted = [name for names in per_layer for name in names.values() if name in live]
    # two contexts: `reads` keeps one spelling of each hook point, and both names of attention's output are asked for
    raw = [name for name in wanted if name.endswith("attn.hook_out")]
    with (
        hooks.reads(bridge, [name for name in wanted if name not in raw]) as first,
        hooks.reads(bridge, raw) as second,
    ):
        bridge(tokens.to(device_of(bridge)), use_cache=False)
    found = {**first, **second}
    return tuple(
        _layer(bridge, graph, i, {key: found[name] for key, name in names.items() if name in found})
        for i, names in enumerate(per_layer)
    )


def _layer(bridge: Any, graph: Graph, layer: int, found: dict[str, Tensor]) -> Layer:
    block = bridge.blocks[layer]
    for site in ("resid_pre", "attn_out", "q", "k", "v", "z", "raw", "resid_post"):
        if site not in found:
            raise ValueError(_refusal(bridge, layer, f"there is no {site!r} to be read"))
    pre, attn_out, raw = found["resid_pre"], found["attn_out"], found["raw"]
    mlp_out = found.get("mlp_out")
    total = pre + attn_out + (0 if mlp_out is None else mlp_out)
    if _differ(total, found["resid_post"]):
        raise ValueError(_refusal(bridge, layer, "its output is not its input plus what attention and MLP return"))
    norms: dict[Branch, tuple[str, str]] = {}
    attn = _reader(bridge, layer, "attn", pre, lambda normed: _projects(block.attn, normed, found))
    if attn is None:
        raise ValueError(_refusal(bridge, layer, "queries, keys and values are not linear in the norm of the stream"))
    norms["attn"] = attn
    if mlp_out is not None:
        entered = found.get("entered")
        if entered is None:
            raise ValueError(_refusal(bridge, layer, "the input of its MLP cannot be edited"))
        stream = pre if graph.parallel else pre + attn_out
        mlp = _reader(bridge, layer, "mlp", stream, lambda normed: not _differ(normed, entered))
        if mlp is None:
            raise ValueError(_refusal(bridge, layer, "the MLP's input is not a norm of the stream"))
        norms["mlp"] = mlp
    post = block._modules.get("ln1_post") is not None
    z, w_o = found["z"], block.attn.W_O
    bias = 0 if block.attn.b_O is None else block.attn.b_O
    if z.ndim != 4 or _differ(torch.einsum("bphe,hed->bpd", z, w_o.to(z.dtype)) + bias, raw):
        raise ValueError(_refusal(bridge, layer, "attention's output is not a sum over its heads"))
    if _differ(block.ln1_post.original_component(raw) if post else raw, attn_out):
        raise ValueError(
            _refusal(bridge, layer, "what attention adds to the stream is not its output, or a norm of it")
        )
    return Layer(norms, post, mlp_out is not None)


def _reader(bridge: Any, layer: int, branch: Branch, stream: Tensor, reads: Any) -> tuple[str, str] | None:
    """The norm of this branch, if `reads(norm of the stream)` for any."""
    for name in _NORMS[branch]:
        if bridge.blocks[layer]._modules.get(name) is None:
            continue
        for how in ("module", "formula"):
            try:
                normed = _apply(bridge, layer, (name, how), stream)
            except AttributeError:  # the formula of what is no norm
                continue
            if reads(normed):
                return name, how
    return None


def _apply(bridge: Any, layer: int, norm: tuple[str, str], stream: Tensor) -> Tensor:
    module = bridge.blocks[layer]._modules[norm[0]]
    if norm[1] == "module":
        return module.original_component(stream)
    return Norm(f"blocks.{layer}.{norm[0]}", module, False)(stream)


def _projects(attention: Any, normed: Tensor, found: dict[str, Tensor]) -> bool:
    """Whether queries, keys and values are this times their weights, plus something constant."""
    for site, weight in (("q", attention.W_Q), ("k", attention.W_K), ("v", attention.W_V)):
        value = found[site]
        if value.ndim != 4 or weight is None or weight.ndim != 3 or weight.shape[0] != value.shape[2]:
            return False
        if _differ(_moved(torch.einsum("bpd,hde->bphe", normed, weight.to(normed.dtype))), _moved(value)):
            return False
    return True


def _moved(tensor: Tensor) -> Tensor:
    """Less its value at the first position, so that biases cancel."""
    return tensor - tensor[:, :1]


def _differ(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return True
    error = (found.double() - expected.double()).abs().max()
    return not bool(error <= tolerance(expected.dtype) * expected.double().abs().max().clamp_min(1e-6))


def _refusal(bridge: Any, layer: int, why: str) -> str:
    return (
        f"edges of {bridge.cfg.model_name} cannot be replaced one by one: in block {layer}, {why}. Patch whole "
        "activations instead, with interp.patching.activation_patch"
    )
