"""What ablating edges means, edge by edge: TransformerLens' split inputs give every reader an input of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from interp.patching.graph import Graph


class EdgeOracle:
    """A bridge of its own, whose flags it sets. `other` is a run as `written` gives it, by writer's name."""

    def __init__(self, bridge: Any, graph: Graph) -> None:
        self.bridge, self.graph = bridge, graph
        bridge.set_use_attn_result(True)
        bridge.set_use_split_qkv_input(True)
        bridge.set_use_hook_mlp_in(True)
        self.post = bridge.blocks[0]._modules.get("ln1_post") is not None

    @torch.no_grad()
    def written(self, tokens: Tensor) -> dict[str, Tensor]:
        """What every writer writes: heads before any post-norm."""
        found: dict[str, Tensor] = {}
        self.bridge.run_with_hooks(tokens, fwd_hooks=self._watching(found))
        return found

    @torch.no_grad()
    def __call__(self, tokens: Tensor, other: dict[str, Tensor], edges: Iterable[str]) -> Tensor:
        """Logits of a forward with these edges replaced, one after the other."""
        now: dict[str, Tensor] = {}
        into: dict[str, list[str]] = {}
        for edge in edges:
            writer, _, reader = edge.partition("->")
            into.setdefault(reader, []).append(writer)

        def change(reader: str, seen: Tensor) -> Tensor:
            for layer in range(self.graph.n_layers):
                heads = [f"a{layer}.h{head}" for head in range(self.graph.n_heads)]
                patched = [head for head in heads if head in into.get(reader, [])]
                if not patched:
                    continue
                if self.post:
                    raw = now[f"raw{layer}"]
                    mixed = raw
                    for head in patched:
                        mixed = mixed + other[head] - now[head]
                    norm = self.bridge.blocks[layer].ln1_post.original_component
                    seen = seen + norm(mixed) - norm(raw)
                else:
                    for head in patched:
                        seen = seen + other[head] - now[head]
            for writer in into.get(reader, []):
                if not writer.startswith("a"):
                    seen = seen + other[writer] - now[writer]
            return seen

        fwd_hooks = self._watching(now)
        for layer in range(self.graph.n_layers):
            for part, n in (("q", self.graph.n_heads), ("k", self.graph.n_kv_heads), ("v", self.graph.n_kv_heads)):

                def split(tensor: Tensor, *, hook: Any, layer: int = layer, part: str = part, n: int = n) -> Tensor:
                    assert tensor.shape[2] == n
                    heads = [change(f"a{layer}.h{head}<{part}>", tensor[:, :, head]) for head in range(n)]
                    return torch.stack(heads, 2)

                fwd_hooks.append((f"blocks.{layer}.attn.hook_{part}_input", split))

            def mlp(tensor: Tensor, *, hook: Any, layer: int = layer) -> Tensor:
                return change(f"m{layer}", tensor)

            fwd_hooks.append((f"blocks.{layer}.hook_mlp_in", mlp))

        def final(tensor: Tensor, *, hook: Any) -> Tensor:
            return change("logits", tensor)

        fwd_hooks.append((f"blocks.{self.graph.n_layers - 1}.hook_resid_post", final))
        return self.bridge.run_with_hooks(tokens, fwd_hooks=fwd_hooks)

    def _watching(self, found: dict[str, Tensor]) -> list[tuple[str, Any]]:
        """Hooks that note what writers write."""

        def note(name: str) -> Any:
            def keep(tensor: Tensor, *, hook: Any) -> None:
                found[name] = tensor.detach().clone()

            return keep

        def note_heads(layer: int) -> Any:
            def keep(tensor: Tensor, *, hook: Any) -> None:
                for head in range(self.graph.n_heads):
                    found[f"a{layer}.h{head}"] = tensor[:, :, head].detach().clone()

            return keep

        watching: list[tuple[str, Any]] = [("blocks.0.hook_resid_pre", note("input"))]
        for layer in range(self.graph.n_layers):
            watching.append((f"blocks.{layer}.attn.hook_result", note_heads(layer)))
            watching.append((f"blocks.{layer}.attn.hook_out", note(f"raw{layer}")))
            watching.append((f"blocks.{layer}.hook_mlp_out", note(f"m{layer}")))
        return watching
