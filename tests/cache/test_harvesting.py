"""harvest: rows are the right ones, bytes do not depend on how it was run, and what is wrong is said."""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from interp.cache import ActivationStore, StoreError, capture, estimate, harvest
from interp.cache._assembly import Shard, fill
from tests.helpers import FAMILIES, fresh_bridge, tiny_bridge, tiny_tokens

RESIDUAL, Z, MLP = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.mlp.hook_post"


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def by_batch(bridge: Any, tokens: Tensor, hook: str, batch_size: int) -> Tensor:
    """What is to be stored, computed example by example from the forwards of the batches."""
    return capture(bridge, tokens, hook, batch_size=batch_size)[hook]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_aligned_with_tokens_and_labels(family: str, tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge(family), tiny_tokens(7, 5)
    topic = [["sea", "hill", "town"][example % 3] for example in range(7)]
    weight = torch.rand(7, 5)
    weight[2, 2] = float("nan")  # a label may be missing
    store = harvest(
        bridge,
        tokens,
        [RESIDUAL, Z],
        tmp_path / "s",
        batch_size=3,
        shard_tokens=8,
        labels={"topic": topic, "weight": weight},
    )
    assert store.hooks == [Z, RESIDUAL]  # forward order
    assert (store.n_tokens, store[Z].shape, store[RESIDUAL].shape) == (35, (35, 4, 8), (35, 32))
    expected = {hook: by_batch(bridge, tokens, hook, 3) for hook in (RESIDUAL, Z)}
    for row in range(35):
        example, position = int(store.examples[row]), int(store.positions[row])
        assert (example, position) == divmod(row, 5)
        assert int(store.tokens[row]) == int(tokens[example, position])
        assert store.label_names["topic"][int(store.labels["topic"][row])] == topic[example]
        torch.testing.assert_close(
            store.labels["weight"][row], weight[example, position], rtol=0, atol=0, equal_nan=True
        )
        for hook in (RESIDUAL, Z):
            assert torch.equal(store[hook][row], expected[hook][example, position])
    assert store.provenance["revision"] and store.verify().ok
    labels = {"topic": topic, "weight": weight}
    harvest(
        bridge, tokens, [RESIDUAL, Z], tmp_path / "s", batch_size=3, shard_tokens=8, labels=labels
    )  # finds no difference


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 9),
    pos=st.integers(1, 6),
    batch_size=st.integers(1, 10),
    shard_tokens=st.integers(1, 60),
    data=st.data(),
)
def test_any_sizes(tmp_path_factory: Any, n: int, pos: int, batch_size: int, shard_tokens: int, data: Any) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(n, pos, seed=n)
    positions = data.draw(st.none() | st.lists(st.integers(0, pos - 1), min_size=1, unique=True))
    keep = torch.zeros(n, pos, dtype=torch.bool)
    keep[:, list(range(pos)) if positions is None else positions] = True
    skip = data.draw(st.sampled_from([(), (0,)]))
    keep &= ~torch.isin(tokens, torch.tensor(skip, dtype=torch.long))
    path = tmp_path_factory.mktemp("any") / "s"
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "shard_tokens": shard_tokens,
        "positions": positions,
        "skip_tokens": skip,
    }
    if not keep.any():
        with pytest.raises(ValueError, match="leave no row"):
            harvest(bridge, tokens, RESIDUAL, path, **options)
        return
    store = harvest(bridge, tokens, RESIDUAL, path, **options)
    assert torch.equal(store[RESIDUAL][:], by_batch(bridge, tokens, RESIDUAL, batch_size)[keep])
    assert torch.equal(store.tokens[:], tokens[keep])
    sizes = [file.name.split(".")[-2] for file in sorted((path / "shards").glob("tokens.*"))]
    lengths = [int(stop) - int(start) for start, stop in (size.split("-") for size in sizes)]
    assert lengths[:-1] == [shard_tokens] * (len(lengths) - 1) and 0 < lengths[-1] <= shard_tokens
    assert sum(lengths) == int(keep.sum())
    # losing any one file and harvesting again brings back the same bytes
    whole = contents(path)
    lost = data.draw(st.sampled_from(sorted(name for name in whole if name.startswith("shards"))))
    (path / lost).unlink()
    harvest(bridge, tokens, RESIDUAL, path, **options)
    assert contents(path) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(4, 6)
    store = harvest(bridge, tokens, RESIDUAL, tmp_path / "s", batch_size=4, dtype=dtype, shard_tokens=10)
    assert store.dtype == store[RESIDUAL][:2].dtype == dtype
    assert torch.equal(store[RESIDUAL][:], by_batch(bridge, tokens, RESIDUAL, 4).flatten(0, 1).to(dtype))


def test_the_models_own_dtype_is_the_default(tmp_path: Path) -> None:
    bridge = tiny_bridge("llama", dtype=torch.bfloat16)
    assert harvest(bridge, tiny_tokens(), RESIDUAL, tmp_path / "s").dtype == torch.bfloat16


def test_files_are_ordinary_safetensors_named_by_content(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("gpt2"), tiny_tokens(2, 8)
    store = harvest(bridge, tokens, RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=12, dtype=torch.float16)
    revision = store.provenance["revision"].split(":")[-1][:12]
    ranges = ["000000000000-000000000012", "000000000012-000000000016"]
    names = [f"{RESIDUAL}.float16.{revision}.{rows}.safetensors" for rows in ranges]
    assert sorted(file.name for file in (tmp_path / "s" / "shards").iterdir()) == [
        *names, *(f"tokens.{rows}.safetensors" for rows in ranges)
    ]  # fmt: skip
    loaded = load_file(tmp_path / "s" / "shards" / names[1])
    assert torch.equal(loaded["activations"], store[RESIDUAL][12:])
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["manifest.json", "shards"]


def test_stream_and_tensor_give_the_same_shards(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(8, 6)
    codes = torch.arange(8)
    tensor = harvest(bridge, tokens, RESIDUAL, tmp_path / "a", batch_size=4, shard_tokens=7, labels={"code": codes})
    stream = ((tokens[i : i + 4], {"code": codes[i : i + 4]}) for i in (0, 4))
    streamed = harvest(bridge, stream, RESIDUAL, tmp_path / "b", batch_size=4, shard_tokens=7)
    assert streamed.n_tokens == tensor.n_tokens
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_streams_may_change_length_and_bring_any_batches(tmp_path: Path) -> None:
    bridge = tiny_bridge("gpt2")
    items = [tiny_tokens(3, 4, 1), tiny_tokens(1, 9, 2), tiny_tokens(5, 2, 3)]
    store = harvest(bridge, iter(items), RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=5)
    expected = torch.cat([by_batch(bridge, item, RESIDUAL, 2).flatten(0, 1) for item in items])
    assert torch.equal(store[RESIDUAL][:], expected)
    assert store.examples[:].tolist() == sum(([i] * n for i, n in enumerate([4, 4, 4, 9, 2, 2, 2, 2, 2])), [])


def test_memory_is_flat_in_the_number_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in memory at any time: those of the shard being filled, of the one being written and of one just
    finished."""
    bridge = tiny_bridge("llama")
    alive: weakref.WeakSet[Shard] = weakref.WeakSet()
    held: list[int] = []

    @dataclass(eq=False)
    class Watched(Shard):
        def __post_init__(self) -> None:
            alive.add(self)

    def watched_fill(*args: Any) -> None:
        fill(*args)
        held.append(sum(rows.nbytes for shard in alive for rows in shard.activations.values()))

    module = sys.modules["interp.cache.harvesting"]
    monkeypatch.setattr(module, "Shard", Watched)
    monkeypatch.setattr(module, "fill", watched_fill)
    for n in (4, 40):
        held.clear()
        stream = (tiny_tokens(8, 16, seed) for seed in range(n))
        harvest(bridge, stream, [RESIDUAL, MLP], tmp_path / str(n), batch_size=8, shard_tokens=128)
        assert len(held) == n and 0 < max(held) <= 3 * 128 * (32 + 48) * 4


def test_a_finished_store_is_compared_and_not_run_again(tmp_path: Path) -> None:
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(4, 6)
    harvest(bridge, tokens, RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=7)
    before = contents(tmp_path / "s")
    runs = count_forwards(bridge)
    harvest(bridge, tokens, RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=7)
    assert runs == [] and contents(tmp_path / "s") == before


def test_only_the_batches_of_missing_shards_are_run(tmp_path: Path) -> None:
    bridge, tokens = fresh_bridge("llama"), tiny_tokens(10, 4)
    store = harvest(bridge, tokens, RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=12)
    before = contents(tmp_path / "s")
    lost = next((tmp_path / "s" / "shards").glob(f"{RESIDUAL}.*-000000000024.*"))
    lost.unlink()
    assert [problem for problem in store.verify().problems if lost.name in problem and "missing" in problem]
    runs = count_forwards(bridge)
    harvest(bridge, tokens, RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=12)
    assert runs == [2, 2]  # rows 12 to 24 are in the batches of rows 8 to 16 and 16 to 24
    assert contents(tmp_path / "s") == before


def count_forwards(bridge: Any) -> list[int]:
    """Batch sizes of the forwards from now on."""
    runs: list[int] = []
    bridge.blocks[0].mlp.original_component.register_forward_hook(lambda _m, args, _o: runs.append(len(args[0])))
    return runs


def test_another_harvest_at_the_same_path_is_refused_by_name(tmp_path: Path) -> None:
    bridge, tokens, path = tiny_bridge("llama"), tiny_tokens(6, 5), tmp_path / "s"
    options: dict[str, Any] = {"batch_size": 2, "shard_tokens": 8, "labels": {"code": torch.arange(6)}}
    harvest(bridge, tokens, RESIDUAL, path, **options)
    before = contents(path)
    other = tokens.clone()
    other[4, 2] = 7 if other[4, 2] != 7 else 8
    cases: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
        (tiny_bridge("llama", seed=1), tokens, RESIDUAL, {}, "revision: 'parameters:"),
        (
            tiny_bridge("llama", dtype=torch.bfloat16),
            tokens,
            RESIDUAL,
            {"dtype": torch.float32},
            "model_dtype: 'float32' there",
        ),
        (bridge, tokens, Z, {}, "hooks: "),
        (bridge, tokens, RESIDUAL, {"dtype": torch.float16}, "dtype: 'float32' there, 'float16' now"),
        (bridge, tokens, RESIDUAL, {"shard_tokens": 9}, "shard_tokens: 8 there, 9 now"),
        (bridge, tokens, RESIDUAL, {"batch_size": 3}, "batch_size: 2 there, 3 now"),
        (bridge, tokens, RESIDUAL, {"positions": [1]}, r"positions: None there, \[1\] now"),
        (bridge, tokens, RESIDUAL, {"skip_tokens": [0]}, r"skip_tokens: \[\] there, \[0\] now.*rows: 30 there, 24 now"),
        (bridge, tokens[:5], RESIDUAL, {"labels": {"code": torch.arange(5)}}, "rows: 30 there, 25 now"),
        (bridge, other, RESIDUAL, {}, r"'tokens' differs.*row 22 \(example 4, position 2\)"),
        (
            bridge,
            tokens,
            RESIDUAL,
            {"labels": {"code": torch.arange(6) // 2}},
            r"'code' differs.*row 5 .*has 1 .*there and 0",
        ),
        (bridge, tokens, RESIDUAL, {"labels": {"code": torch.arange(6.0)}}, r"'code' differs.*int64.*float32"),
        (bridge, tokens, RESIDUAL, {"labels": None}, "has the columns"),
        (bridge, tokens, RESIDUAL, {"labels": {"code": list("aabbcc")}}, "label_names"),
        (bridge, iter([tokens[:2]]), RESIDUAL, {"labels": None}, "has the columns|end a shard"),
    ]
    for model, ids, hooks, changed, message in cases:
        with pytest.raises(StoreError, match=message):
            harvest(model, ids, hooks, path, **{**options, **changed})
    with pytest.raises(FileExistsError, match="holds a store already"):
        harvest(bridge, tokens, RESIDUAL, path, **options, resume=False)
    assert contents(path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not overwrite")
    with pytest.raises(FileExistsError, match="not empty and not an activation store"):
        harvest(bridge, tokens, RESIDUAL, tmp_path / "other", **options)


def test_a_stream_of_another_length_is_refused(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(6, 5)
    harvest(bridge, iter([tokens]), RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=10)
    with pytest.raises(StoreError, match="have 20 rows; the store .* has rows up to 30"):
        harvest(bridge, iter([tokens[:4]]), RESIDUAL, tmp_path / "s", batch_size=2, shard_tokens=10)


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    bridge, tokens, path = tiny_bridge("llama"), tiny_tokens(2, 4), tmp_path / "s"
    cases: list[tuple[Any, Any, dict[str, Any], type[Exception], str]] = [
        (tokens, "blocks.0.attn.hook_pattern", {}, ValueError, "no row of numbers per token; use interp.cache.capture"),
        (tokens, "embed.hook_in", {}, ValueError, "holds integers"),
        (tokens, RESIDUAL, {"batch_size": 0}, ValueError, "batch_size=0"),
        (tokens, RESIDUAL, {"shard_tokens": 0}, ValueError, "shard_tokens=0"),
        (tokens, RESIDUAL, {"dtype": torch.float64}, ValueError, "dtype=torch.float64; expected one of torch.float32"),
        (tokens, RESIDUAL, {"positions": [4]}, ValueError, r"positions \[4\] do not exist"),
        (tokens, RESIDUAL, {"positions": [1, 1]}, ValueError, "repeats itself"),
        (tokens, RESIDUAL, {"labels": {"row": [1, 2]}}, ValueError, "cannot be called 'row'"),
        (tokens, RESIDUAL, {"labels": {"k": [1, 2, 3]}}, ValueError, r"shape \(3,\); tokens has \(2, 4\)"),
        (tokens, RESIDUAL, {"labels": {"k": [None, 2]}}, ValueError, "expected numbers or text"),
        (iter([tokens]), RESIDUAL, {"labels": {"k": [1, 2]}}, ValueError, "yields .tokens, labels. pairs"),
        ("text", RESIDUAL, {}, TypeError, "tokens is a str"),
        (tokens + 60, RESIDUAL, {}, ValueError, "vocabulary is 0 to 59"),
        (tokens, "blocks.9.hook_resid_post", {}, KeyError, "blocks are numbered 0 to 2"),
    ]  # fmt: skip
    for ids, hooks, changed, kind, message in cases:
        with pytest.raises(kind, match=message):
            harvest(bridge, ids, hooks, path, **changed)
        assert not path.exists()
    for items, message in [(["text"], "batch 0 is a str"), ([(tokens, {"k": ["a", "b"]})], "labels in words"),
                           ([(tokens, {"k": [1, 2]}), tokens], "batch 1 has labels")]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=message):
            harvest(bridge, iter(items), RESIDUAL, tmp_path / message[:7])


def test_estimate_says_what_harvest_will_write(tmp_path: Path) -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens(9, 6)
    options: dict[str, Any] = {
        "batch_size": 4,
        "shard_tokens": 20,
        "dtype": torch.bfloat16,
        "labels": {"k": torch.arange(9)},
    }
    plan = estimate(bridge, tokens, [RESIDUAL, Z], **options)
    assert (plan.n_tokens, plan.n_shards) == (54, 3)
    assert plan.bytes_per_token == 2 * (32 + 32) + 3 * 8 + 8
    assert plan.bytes == 54 * plan.bytes_per_token
    assert plan.seconds is not None and plan.seconds * plan.tokens_per_second == pytest.approx(54)
    assert str(plan).startswith("54 tokens, 8.64 kB in 3 shards per hook, about ")
    harvest(bridge, tokens, [RESIDUAL, Z], tmp_path / "s", **options)
    written = sum(len(data) for name, data in contents(tmp_path / "s").items() if name.startswith("shards"))
    headers = sum(
        8 + int.from_bytes(data[:8], "little") for name, data in contents(tmp_path / "s").items() if "shards" in name
    )
    assert written - headers == plan.bytes
    stream = estimate(bridge, [tokens], RESIDUAL)
    assert stream.n_tokens is stream.bytes is stream.seconds is None and "unknown length" in str(stream)
    with pytest.raises(ValueError, match="iterator"):
        estimate(bridge, iter([tokens]), RESIDUAL)


def test_the_manifest_is_plain_and_says_where_it_came_from(tmp_path: Path) -> None:
    bridge = tiny_bridge("neox")
    harvest(bridge, tiny_tokens(), RESIDUAL, tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"], manifest["complete"]) == ("interp-activations", 1, True)
    assert (
        manifest["provenance"]["weights_state"] == "raw"
        and manifest["provenance"]["versions"]["torch"] == torch.__version__
    )
    assert manifest["settings"]["hooks"] == [{"name": RESIDUAL, "shape": [32]}]
    assert ActivationStore(tmp_path / "s").n_tokens == manifest["n_tokens"] == 18
