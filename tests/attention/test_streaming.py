"""Streaming equals the dense route on every family and kind of attention, and never makes a T x T tensor."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM

from interp.attention import (
    attention_entropy,
    column_entropy,
    pattern_scores,
    reduce_patterns,
    row_entropy,
    sink_importance,
    sink_scores,
)
from interp.attention.classic import detection_pattern
from interp.attention.streaming import (
    AttentionRows,
    AttentionStream,
    LayerStatistics,
    attention_rows,
    stream_statistics,
    streaming_rows,
    streaming_statistics,
)
from interp.hooks import interventions
from tests.helpers import (
    D_VOCAB,
    FAMILIES,
    MORE_FAMILIES,
    N_HEADS,
    fresh_bridge,
    randomise,
    tiny_bridge,
    tiny_tokenizer,
    tiny_tokens,
)

TARGETS = ("duplicate_token", "induction")
_SIZE: dict[str, Any] = {
    "vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
_MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ODD: dict[str, dict[str, Any]] = {
    "gpt_oss": {**_SIZE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "falcon": {
        "vocab_size": D_VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True,
        "new_decoder_architecture": False, "multi_query": False,
    },
    "mpt": {"vocab_size": D_VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "qwen3_next": {
        **_SIZE, **_MOE, "layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 16,
    },
    "bloom": {"vocab_size": D_VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip
"""Learned sinks with windows; ALiBi twice; a gate after attention; ALiBi that cannot go on from a cache."""


unchecked = inspect.unwrap(streaming_statistics)  # the tests' type checker would refuse some shapes first


class NoSquare(TorchDispatchMode):
    """Raises as soon as any operation gives a tensor of `limit` elements or more; remembers the largest."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.largest = limit, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.numel() >= self.limit:
                    raise MemoryError(f"{func} made {tuple(tensor.shape)}")
        return out


@functools.cache
def odd_bridge(kind: str) -> TransformerBridge:
    config = AutoConfig.for_model(kind, **ODD[kind], bos_token_id=0, eos_token_id=0, pad_token_id=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for name, parameter in model.named_parameters():
            randomise(name, parameter)
    model.config.architectures = [type(model).__name__]
    bridge = TransformerBridge.boot_transformers(
        f"tiny-{kind}", hf_model=model, tokenizer=tiny_tokenizer(), device="cpu"
    )
    bridge.eval()
    bridge.requires_grad_(False)
    return bridge


def qkv(n_pos: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(batch, heads, n_pos, 16), (batch, kv_heads, n_pos, 16), (batch, kv_heads, n_pos, 8)]
    q, k, v = (torch.randn(*size, generator=generator) for size in sizes)
    return q, k, v


def dense(
    q: Tensor,
    k: Tensor,
    *,
    window: int | None = None,
    alibi: Tensor | None = None,
    soft_cap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The whole pattern in float64, and the log of the sum of exponentials, written out."""
    n = q.shape[2]
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = q.double() @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    back = torch.arange(n)[:, None] - torch.arange(n)
    if alibi is not None:
        scores = scores - alibi.double()[:, None, None] * back
    hidden = (back < 0) | (back >= (window or n))
    scores = scores.masked_fill(hidden, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], -1)
    return scores.softmax(-1)[..., :n], scores.logsumexp(-1)


def check(found: LayerStatistics, pattern: Tensor, lse: Tensor, tokens: Tensor, offsets: tuple[int, ...], recent: int):
    """Every statistic against its definition on the whole pattern."""
    n = pattern.shape[-1]
    back = torch.arange(n)[:, None] - torch.arange(n)
    off = 1 - pattern.sum(-1)
    entropy = row_entropy(pattern)
    rows: dict[str, Tensor] = {
        "entropy": entropy,
        "entropy_normalised": entropy / torch.arange(1, n + 1).log(),
        "max": pattern.amax(-1),
        "top": pattern.argmax(-1).double(),
        "distance": (pattern * back).sum(-1) / pattern.sum(-1),
        "recent": (pattern * (back < recent)).sum(-1),
        "off_sequence": off,
        "lse": lse,
        "first": pattern[..., 0],
    }
    rows["entropy_normalised"][..., 0] = torch.nan
    for offset in offsets:
        name = {0: "current_token", 1: "previous_token"}.get(offset, f"offset_{offset}")
        rows[name] = (pattern * (back == offset)).sum(-1)
        rows[name][..., :offset] = torch.nan
    for name in TARGETS:
        mask = detection_pattern(tokens, name)
        mass = (pattern * mask[:, None]).sum(-1)
        rows[name] = torch.where(mask.any(-1)[:, None], mass, torch.nan)
    assert set(rows) | {"support"} == set(found.rows)
    for name, expected in rows.items():
        room = {"distance": 1e-6 * n}.get(name, 1e-6)
        torch.testing.assert_close(
            found.rows[name].double(), expected, atol=room, rtol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    support = 1 / (pattern.square().sum(-1) + off.square())
    torch.testing.assert_close(found.rows["support"].double(), support, atol=0, rtol=2e-6)
    importance = sink_importance(pattern)
    torch.testing.assert_close(found.importance.double(), importance, atol=1e-6, rtol=0)
    flags, close = found.importance > 0.3, (importance - 0.3).abs() < 1e-6
    assert bool(((flags == (importance > 0.3)) | close).all())
    torch.testing.assert_close(found.self_attention.double(), pattern.diagonal(0, -2, -1), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.column_max.double(), pattern.amax(-2), atol=1e-6, rtol=0)
    torch.testing.assert_close(found.column_entropy.double(), column_entropy(pattern), atol=3e-6, rtol=0)


SLOPES, LOGITS = torch.tensor([0.5, 0.25, 0.1, 0.0]), torch.tensor([2.0, -1.0, 0.0, 4.0])


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"window": 37},
        {"alibi": SLOPES},
        {"soft_cap": 1.5},
        {"sink_logits": LOGITS},
        {"window": 5, "alibi": SLOPES, "soft_cap": 3.0, "sink_logits": LOGITS},
    ],
)
@pytest.mark.parametrize("block", [7, 300])
def test_equals_the_dense_pattern_for_every_kind_of_attention(kind: dict[str, Any], block: int) -> None:
    n = 150
    (q, k, v), tokens = qkv(n, batch=2), torch.randint(0, 40, (2, n), generator=torch.Generator().manual_seed(1))
    offsets = (0, 1, 6, 90)
    found = streaming_statistics(
        q, k, v, **kind, block=block, offsets=offsets, recent=20, sets={"first": [0]}, targets=TARGETS, tokens=tokens
    )
    pattern, lse = dense(q, k, **kind)
    check(found, pattern, lse, tokens, offsets, 20)
    assert found.output is not None
    output = pattern @ v.double().repeat_interleave(2, 1)
    torch.testing.assert_close(found.output.double(), output, atol=2e-6, rtol=0)
    rows = streaming_rows(q, k, [0, 77, n - 1], **kind)
    torch.testing.assert_close(rows.double(), pattern[:, :, [0, 77, n - 1]], atol=1e-6, rtol=0)


def test_the_block_does_not_matter() -> None:
    (q, k, v), kind = qkv(70), {"window": 9, "sink_logits": LOGITS}
    whole = streaming_statistics(q.double(), k.double(), v.double(), **kind, block=70)
    for block in (1, 13, 64):
        found = streaming_statistics(q.double(), k.double(), v.double(), **kind, block=block)
        for name, row in whole.rows.items():
            torch.testing.assert_close(found.rows[name], row, atol=1e-12, rtol=1e-12, equal_nan=True)
        torch.testing.assert_close(found.importance, whole.importance, atol=1e-14, rtol=0)
        torch.testing.assert_close(found.output, whole.output, atol=1e-12, rtol=0)


def test_equals_the_dense_pattern_within_a_millionth_at_1024() -> None:
    n = 1024
    (q, k, _), tokens = qkv(n), torch.randint(0, 50, (1, n), generator=torch.Generator().manual_seed(1))
    found = streaming_statistics(q, k, sets={"first": [0]}, targets=TARGETS, tokens=tokens)
    pattern, lse = dense(q, k)
    check(found, pattern, lse, tokens, (0, 1), 64)
    exact = streaming_statistics(q.double(), k.double())
    torch.testing.assert_close(exact.rows["entropy"], row_entropy(pattern), atol=1e-12, rtol=0)
    torch.testing.assert_close(exact.importance, sink_importance(pattern), atol=1e-14, rtol=0)


def test_closed_forms() -> None:
    n, zero = 64, torch.zeros(1, 1, 64, 4)
    uniform = streaming_statistics(zero, zero, block=7)
    harmonic = torch.tensor([sum(1 / j for j in range(key, n + 1)) / (n - key + 1) for key in range(1, n + 1)])
    torch.testing.assert_close(uniform.importance[0, 0], harmonic, atol=1e-6, rtol=0)
    assert float(uniform.importance[0, 0, 0]) == pytest.approx(0.0741, abs=5e-5)
    counts = torch.arange(1, n + 1).float()
    torch.testing.assert_close(uniform.rows["entropy"][0, 0], counts.log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(uniform.rows["support"][0, 0], counts, atol=1e-4, rtol=0)
    torch.testing.assert_close(uniform.rows["lse"][0, 0], counts.log(), atol=1e-6, rtol=0)
    one = streaming_statistics(zero, zero, sink_logits=torch.zeros(1))  # the sink is one key more
    torch.testing.assert_close(one.rows["off_sequence"][0, 0], 1 / (counts + 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.rows["entropy"][0, 0], (counts + 1).log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(one.rows["support"][0, 0], counts + 1, atol=1e-4, rtol=0)


def test_a_gate_changes_the_output_and_no_row() -> None:
    q, k, v = qkv(40)
    gate = torch.rand(1, 4, 40, 8)
    plain, gated = streaming_statistics(q, k, v), streaming_statistics(q, k, v, gate=gate)
    assert plain.output is not None and gated.output is not None
    assert torch.equal(gated.output, plain.output * gate)
    assert all(torch.equal(row.nan_to_num(), gated.rows[name].nan_to_num()) for name, row in plain.rows.items())
    assert torch.equal(gated.rows["off_sequence"], plain.rows["off_sequence"])
    sdpa = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(plain.output, sdpa, atol=1e-6, rtol=0)


def test_key_sets_by_mask_and_by_example() -> None:
    q, k, _ = qkv(30, batch=2)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[0, [3, 9]] = mask[1, 20:] = True
    rows = streaming_statistics(q, k, sets={"own": mask, "listed": [3, 9]}, block=4).rows
    pattern, _ = dense(q, k)
    expected = (pattern * mask[:, None, None]).sum(-1)
    assert bool(rows["own"][0, :, :3].isnan().all()) and bool(rows["own"][1, :, :20].isnan().all())
    torch.testing.assert_close(rows["own"][0, :, 3:].double(), expected[0, :, 3:], atol=1e-6, rtol=0)
    torch.testing.assert_close(rows["own"][1, :, 20:].double(), expected[1, :, 20:], atol=1e-6, rtol=0)
    torch.testing.assert_close(rows["listed"][0], rows["own"][0], equal_nan=True)


def test_no_square_tensor_and_little_memory_on_tensors() -> None:
    n, block = 4096, 32
    (q, k, v), tokens = qkv(n, heads=1, kv_heads=1), torch.randint(0, 500, (1, n))
    with NoSquare(n * n) as guard:
        streaming_statistics(q, k, v, block=block, sets={"first": [0]}, targets=TARGETS, tokens=tokens)
    assert guard.largest <= block * n
    with pytest.raises(MemoryError), NoSquare(n * n):  # the guard itself
        torch.matmul(q, k.transpose(-1, -2))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_square_tensor_in_a_model(family: str) -> None:
    n, block = 2048, 128
    longer: dict[str, Any] = {"n_positions": n} if family == "gpt2" else {"max_position_embeddings": n}
    depth = 2 if family == "gemma2" else 1  # its second kind of layer has a window
    layers: dict[str, Any] = {"n_layer" if family == "gpt2" else "num_hidden_layers": depth}
    bridge, tokens = fresh_bridge(family, **longer, **layers), tiny_tokens(1, n)
    with NoSquare(n * n) as guard:
        found = stream_statistics(bridge, tokens, block=block, targets=("induction",), layers=[0], keep=["max"])
    assert guard.largest <= N_HEADS * block * n
    assert found.importance.sizes == {"layer": len(bridge.blocks), "head": N_HEADS, "key": n, "example": 1}
    total = (found.importance.sel(layer=0) * (n - found.importance["key"])).sum("key") / n
    assert float(abs(total - 1).max()) < 1e-5  # every row gives all its mass to some key


def check_against_the_dense_results(bridge: Any, tokens: Tensor, **options: Any) -> AttentionStream:
    found = stream_statistics(bridge, tokens, targets=TARGETS, sets={"first": [0]}, **options)

    def same(ours: Any, theirs: Any, room: float = 1e-6) -> None:
        assert ours.dims == theirs.dims and ours.shape == theirs.shape
        left, right = torch.tensor(ours.values), torch.tensor(theirs.values)
        torch.testing.assert_close(left, right, atol=room, rtol=0, equal_nan=True)

    sinks, expected = found.sink_scores(), sink_scores(bridge, tokens)
    same(sinks.values, expected.values)
    same(sinks.self_attention, expected.self_attention)
    same(sinks.off_sequence, expected.off_sequence)
    same(sinks.flags(diagonal=False, min_queries=4), expected.flags(diagonal=False, min_queries=4))
    same(found.entropy_scores().values, attention_entropy(bridge, tokens).values)
    names = ("previous_token", "current_token", *TARGETS)
    same(found.head_scores().values, pattern_scores(bridge, tokens, names).values)  # pyright: ignore
    dest = [0, 20, tokens.shape[1] - 1]
    rows = attention_rows(bridge, tokens, dest, block=7)
    whole = reduce_patterns(bridge, tokens, lambda _layer, pattern: pattern[:, :, dest])
    stacked = torch.stack([whole[layer] for layer in sorted(whole)]).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(torch.tensor(rows.values.values), stacked, atol=2e-6, rtol=0)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_dense_results(family: str) -> None:
    bridge = tiny_bridge(family)
    before = sum(len(point.fwd_hooks) for point in bridge.hook_points())
    check_against_the_dense_results(bridge, tiny_tokens(3, 40), block=7, batch_size=2)
    assert sum(len(point.fwd_hooks) for point in bridge.hook_points()) == before


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_equals_the_dense_patterns_of_more_families(family: str) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(2, 40)
    found = stream_statistics(bridge, tokens, block=9)
    whole = reduce_patterns(bridge, tokens, lambda _layer, pattern: pattern)
    room = 5e-6 if family == "gpt_neo" else 1e-6  # its scores are not scaled: rounding weighs more
    for layer, pattern in whole.items():
        at = {"layer": layer}
        importance = torch.tensor(found.importance.sel(at).values).permute(2, 0, 1)
        torch.testing.assert_close(importance, sink_importance(pattern), atol=room, rtol=0)
        rows = torch.tensor(found.rows.sel(at).sel(statistic=["entropy", "max"]).values).permute(0, 3, 1, 2)
        torch.testing.assert_close(rows[0], row_entropy(pattern), atol=3 * room, rtol=0)  # up to 4 nats
        torch.testing.assert_close(rows[1], pattern.amax(-1), atol=room, rtol=0)
    unread = bool(found.rows.sel(statistic="lse").isnull().all())
    assert unread == (family in ("gpt_neo", "gptj", "opt"))  # their scores cannot be read


@pytest.mark.parametrize("kind", ["gpt_oss", "falcon", "mpt", "qwen3_next"])
def test_odd_attention_gives_the_right_row_mass(kind: str) -> None:
    found = check_against_the_dense_results(odd_bridge(kind), tiny_tokens(2, 40), block=7)
    off = found.values.sel(statistic="off_sequence")
    if kind == "gpt_oss":
        assert float(off.max()) > 0.05  # a learned sink takes its share
    else:
        assert float(abs(off).max()) < 1e-6


def test_refuses_what_it_cannot_stream() -> None:
    with pytest.raises(NotImplementedError, match="streaming_statistics, or use the dense route"):
        stream_statistics(odd_bridge("bloom"), tiny_tokens(1, 20))
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(1, 20)
    with interventions(bridge, {"blocks.0.attn.hook_z": lambda z: z * 0}):
        with pytest.raises(ValueError, match="interventions=True"):
            stream_statistics(bridge, tokens)
        cut = check_cut(bridge, tokens)
    assert float(abs(cut.importance - stream_statistics(bridge, tokens).importance).sel(layer=1).max()) > 1e-3
    bridge.train()
    with pytest.raises(RuntimeError, match="training mode"):
        stream_statistics(bridge, tokens)


def check_cut(bridge: Any, tokens: Tensor) -> AttentionStream:
    cut = stream_statistics(bridge, tokens, block=6, interventions=True)
    expected = torch.tensor(sink_scores(bridge, tokens).values.values)
    torch.testing.assert_close(torch.tensor(cut.importance.values), expected, atol=1e-6, rtol=0)
    return cut


def test_lse_gives_weights_back_on_a_model() -> None:
    """exp(score - lse) is the weight: with the learned sink in it, too."""
    for bridge in (tiny_bridge("gemma2"), odd_bridge("gpt_oss")):
        tokens = tiny_tokens(1, 30)
        found = stream_statistics(bridge, tokens, block=8)
        _, cache = bridge.run_with_cache(tokens)
        for layer in range(len(bridge.blocks)):
            scores, pattern = (cache[f"blocks.{layer}.attn.hook_{name}"] for name in ("attn_scores", "pattern"))
            lse = torch.tensor(found.rows.sel(statistic="lse", layer=layer).values).permute(2, 0, 1)
            torch.testing.assert_close((scores - lse[..., None]).exp(), pattern, atol=2e-6, rtol=0)


def test_the_result(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(3, 24)
    found = stream_statistics(bridge, tokens, sets={"needle": [4, 5]}, keep=["needle", "top"], layers=[0, 2])
    assert found.values.dims == ("statistic", "layer", "head", "example")
    assert list(found.rows["statistic"].values) == ["needle", "top"]
    assert bool(found.values.sel(layer=1).isnull().all()) and bool(found.importance.sel(layer=1).isnull().all())
    group = found.of_rows(range(10, 20))
    expected = found.rows.sel(statistic="needle", dest=slice(10, 19)).mean("dest")
    torch.testing.assert_close(torch.tensor(group.sel(statistic="needle").values), torch.tensor(expected.values),
                               equal_nan=True)  # fmt: skip
    assert bool(found.rows.sel(statistic="needle", dest=slice(0, 3)).isnull().all())
    pairs = found.by_kv_head()
    assert pairs.dims == ("statistic", "layer", "kv_head", "example") and pairs.sizes["kv_head"] == 2
    mean = found.values.isel(head=[2, 3]).mean("head", skipna=False)
    torch.testing.assert_close(torch.tensor(pairs.sel(kv_head=1).values), torch.tensor(mean.values), equal_nan=True)
    loaded = AttentionStream.load(found.save(tmp_path / "stream.nc"))
    assert loaded.values.identical(found.values) and loaded.column_max.identical(found.column_max)
    assert loaded.provenance["cost"] == {"forwards": 1} and loaded.provenance["block"] == 24
    drawn = found.plot("needle").data[0].z
    assert (len(drawn), len(drawn[0])) == (3, N_HEADS)
    rows = attention_rows(bridge, tokens, [23, 5])
    assert list(AttentionRows.load(rows.save(tmp_path / "rows.nc")).values["dest"].values) == [23, 5]
    drawn = rows.plot().data[0].z
    assert (len(drawn), len(drawn[0])) == (3, N_HEADS)
    torch.testing.assert_close(torch.tensor(rows.values.sum("key").values), torch.ones(3, N_HEADS, 2, 3),
                               atol=1e-5, rtol=0)  # fmt: skip
    assert bool((rows.values.sel(dest=5, key=slice(6, None)) == 0).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offsets": (0, 40)}, "offsets"),
        ({"recent": 0}, "recent"),
        ({"sets": {"a": [50]}}, "key set 'a'"),
        ({"sets": {"a": torch.ones(7, dtype=torch.bool)}}, "expected \\(40,\\)"),
        ({"sets": {"entropy": [0]}}, "used twice"),
        ({"targets": ("induction",)}, "give tokens="),
        ({"targets": ("copying",), "tokens": torch.zeros(1, 40, dtype=torch.long)}, "no target 'copying'"),
        ({"tokens": torch.zeros(1, 9, dtype=torch.long)}, "tokens"),
        ({"block": 0}, "block"),
        ({"window": 0}, "window"),
        ({"soft_cap": -1.0}, "soft_cap"),
        ({"alibi": torch.ones(3)}, "alibi"),
        ({"sink_logits": torch.ones(2)}, "sink_logits"),
        ({"gate": torch.ones(1, 4, 40, 8)}, "give v"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    q, k, _ = qkv(40)
    with pytest.raises(ValueError, match=message):
        unchecked(q, k, **options)


def test_wrong_arguments_are_named() -> None:
    q, k, v = qkv(20)
    with pytest.raises(ValueError, match="share 3 key-value heads"):
        streaming_statistics(q, k[:, :1].repeat(1, 3, 1, 1))
    with pytest.raises(ValueError, match="v is"):
        unchecked(q, k, v[:, :, :5])
    with pytest.raises(ValueError, match="dest"):
        streaming_rows(q, k, [20])
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(2, 20)
    with pytest.raises(ValueError, match="keep"):
        stream_statistics(bridge, tokens, keep=["needle"])
    with pytest.raises(ValueError, match="batch_size"):
        stream_statistics(bridge, tokens, batch_size=0)
    with pytest.raises(ValueError, match="each once"):
        attention_rows(bridge, tokens, [3, 3])
    found = stream_statistics(bridge, tokens, offsets=(), keep=["max"])
    with pytest.raises(ValueError, match="nothing to score"):
        found.head_scores()
    with pytest.raises(ValueError, match="no statistic 'needle'"):
        found.plot("needle")
    with pytest.raises(ValueError, match="0 to 19"):
        found.of_rows([20])
