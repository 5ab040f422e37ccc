"""ActivationStore: indexing, shuffled batches that can be resumed, and finding damage."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.cache import ActivationStore, StoreError, harvest
from tests.helpers import tiny_bridge, tiny_tokens

ROOT = Path(__file__).resolve().parents[2]
HOOKS = ["blocks.0.attn.hook_z", "blocks.1.hook_resid_post"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """90 rows in 13 shards of 7."""
    path = tmp_path_factory.mktemp("store") / "s"
    words = [["red", "blue"][i % 2] for i in range(10)]
    return harvest(
        tiny_bridge("llama"), tiny_tokens(10, 9), HOOKS, path, batch_size=4, shard_tokens=7, labels={"colour": words}
    )


@pytest.fixture
def copy(store: ActivationStore, tmp_path: Path) -> Path:
    """The same store, to be damaged."""
    return harvest(
        tiny_bridge("llama"), tiny_tokens(10, 9), HOOKS, tmp_path / "s", batch_size=4, shard_tokens=7,
        labels={"colour": [["red", "blue"][i % 2] for i in range(10)]},
    ).path  # fmt: skip


@functools.cache
def whole(store: ActivationStore, hook: str) -> Tensor:
    return torch.cat([store[hook][row].unsqueeze(0) for row in range(store.n_tokens)])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_indexing_is_that_of_a_tensor(store: ActivationStore, data: Any) -> None:
    hook = data.draw(st.sampled_from(HOOKS))
    column, tensor, row = store[hook], whole(store, hook), st.integers(-90, 89)
    a, b, step = data.draw(st.none() | row), data.draw(st.none() | row), data.draw(st.sampled_from([None, 1, 2, 9]))
    assert torch.equal(column[a:b:step], tensor[a:b:step])
    rows = data.draw(st.lists(row, max_size=20))
    assert torch.equal(column[rows], tensor[torch.tensor(rows, dtype=torch.long)])
    assert torch.equal(column[torch.tensor(rows, dtype=torch.int32)], tensor[torch.tensor(rows, dtype=torch.long)])
    assert torch.equal(column[np.array(rows, dtype=np.int64)], tensor[torch.tensor(rows, dtype=torch.long)])
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=90, max_size=90)))
    assert torch.equal(column[mask], tensor[mask])
    one = data.draw(row)
    assert torch.equal(column[one], tensor[one])


def test_indexing_backwards_and_in_two_dimensions(store: ActivationStore) -> None:
    column, tensor = store[HOOKS[1]], whole(store, HOOKS[1])
    assert torch.equal(column[::-1], tensor.flip(0))
    grid = torch.tensor([[0, 8], [89, 44]])
    assert torch.equal(column[grid], tensor[grid])
    assert len(column) == len(store) == 90 and column.shape == (90, 32)
    assert torch.equal(torch.stack(list(store.tokens)), store.tokens[:])


def test_what_is_read_can_be_changed_without_changing_the_store(store: ActivationStore) -> None:
    store[HOOKS[0]][3:5].zero_()
    assert store[HOOKS[0]][3:5].abs().sum() > 0
    assert store.verify().ok


def test_wrong_indexes_and_names(store: ActivationStore) -> None:
    column = store[HOOKS[0]]
    with pytest.raises(IndexError, match="row 90 does not exist: the store has 90 rows"):
        column[90]
    with pytest.raises(IndexError, match="row -91"):
        column[[0, -91]]
    with pytest.raises(IndexError, match="mask of shape"):
        column[torch.ones(3, dtype=torch.bool)]
    with pytest.raises(IndexError, match="not torch.float32"):
        column[torch.tensor([0.5])]
    with pytest.raises(KeyError, match="it holds blocks.0.attn.hook_z, blocks.1.hook_resid_post"):
        store["blocks.1.hook_resid_pre"]
    with pytest.raises(ValueError, match="90 rows give no batch of 91"):
        store.batches(91, drop_last=True)
    with pytest.raises(ValueError, match="batch_size=0"):
        store.batches(0)
    with pytest.raises(KeyError, match="it holds"):
        store.batches(4, hooks=["elsewhere"])


def test_batches_hold_each_row_once_and_everything_aligned(store: ActivationStore) -> None:
    for options in ({"shuffle": False}, {}, {"mix_shards": 3}, {"mix_shards": 1}, {"mix_shards": None}):
        batches = list(store.batches(8, **options))
        assert [len(batch["row"]) for batch in batches] == [8] * 11 + [2]
        rows = torch.cat([batch["row"] for batch in batches])
        assert torch.equal(rows.sort().values, torch.arange(90))
        assert torch.equal(rows, torch.arange(90)) == (options == {"shuffle": False})
        for batch in batches:
            for hook in HOOKS:
                assert torch.equal(batch[hook], store[hook][batch["row"]])
            assert torch.equal(batch["tokens"], store.tokens[batch["row"]])
            assert torch.equal(batch["example"] * 9 + batch["position"], batch["row"])
            assert torch.equal(batch["colour"], 1 - batch["example"] % 2)  # "blue" is 0, "red" is 1
    assert store.label_names == {"colour": ("blue", "red")}
    assert [set(batch) for batch in store.batches(90, hooks=HOOKS[0])] == [
        {HOOKS[0], "row", "tokens", "example", "position", "colour"}
    ]
    assert len(list(store.batches(8, drop_last=True))) == 11


@settings(max_examples=30, deadline=None)
@given(
    batch_size=st.integers(5, 100),
    mix_shards=st.none() | st.integers(1, 14),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 5),
    start=st.integers(0, 40),
)
def test_start_goes_on_exactly_where_a_run_stopped(store: ActivationStore, start: int, **options: Any) -> None:
    if options["drop_last"] and options["batch_size"] > 90:
        return
    size = options.pop("batch_size")
    everything = [batch["row"].tolist() for batch in store.batches(size, hooks=[], epochs=3, **options)]
    rest = [batch["row"].tolist() for batch in store.batches(size, hooks=[], epochs=3, start=start, **options)]
    assert rest == everything[start:]


def test_epochs_and_seeds_differ_and_repeat(store: ActivationStore) -> None:
    def order(**options: Any) -> list[int]:
        return torch.cat([batch["row"] for batch in store.batches(9, hooks=[], **options)]).tolist()

    two = order(epochs=2)
    assert two[:90] == order() and two[90:] != two[:90] and sorted(two[90:]) == list(range(90))
    assert order(seed=1) != order() and order(seed=1) == order(seed=1)
    endless = store.batches(90, hooks=[], epochs=None)
    assert sorted(torch.cat([next(endless)["row"] for _ in range(5)]).tolist()) == sorted(list(range(90)) * 5)


def test_mixing_is_as_local_as_stated(store: ActivationStore) -> None:
    rows = torch.cat([batch["row"] for batch in store.batches(5, hooks=[], mix_shards=2)])
    shards = (rows // 7).tolist()
    groups = []
    while shards:  # each group is made of two whole shards (the last of one), interleaved
        members = sorted({*shards[:13]}) if len(shards) > 7 else [shards[0]]
        size = sum(6 if shard == 12 else 7 for shard in members)
        group, shards = shards[:size], shards[size:]
        assert {*group} == {*members}
        groups.append(group)
    assert len(groups) == 7 and any(group != sorted(group) for group in groups)


def damage(path: Path, how: str) -> Path:
    file = sorted((path / "shards").glob(f"{HOOKS[1]}*"))[4]
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "missing"),
        ("truncated", "truncated, {0} of {1} bytes"),
        ("longer", "altered, {2} bytes where {1} were written"),
        ("one bit", "altered, its SHA-256 is not the one in the manifest"),
    ],
)
def test_verify_names_each_damaged_file_and_harvest_rebuilds_it(copy: Path, how: str, said: str) -> None:
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()}
    file = damage(copy, how)
    report = ActivationStore(copy).verify()
    assert not report.ok and report.n_files == 39
    size = len(before[file])
    assert report.problems == (f"{file.name}: {said.format(size - 1, size, size + 1)}",)
    assert "39 files checked, 1 problem\n" in str(report)
    if how != "one bit":
        with pytest.raises(StoreError, match="rows 28 to 35 cannot be read.*Delete it"):
            ActivationStore(copy)[HOOKS[1]][30]
        assert ActivationStore(copy)[HOOKS[1]][:28].shape == (28, 32)  # the others still can
    file.unlink(missing_ok=True)
    words = [["red", "blue"][i % 2] for i in range(10)]
    harvest(
        tiny_bridge("llama"), tiny_tokens(10, 9), HOOKS, copy, batch_size=4, shard_tokens=7, labels={"colour": words}
    )
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before


def test_a_tokens_file_is_verified_too(copy: Path) -> None:
    file = sorted((copy / "shards").glob("tokens*"))[0]
    file.write_bytes(file.read_bytes().replace(b"\x03", b"\x04"))
    assert ActivationStore(copy).verify().problems == (
        f"{file.name}: altered, its SHA-256 is not the one in the manifest",
    )


def test_manifests_that_cannot_be_used(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="not an activation store: it has no manifest.json"):
        ActivationStore(tmp_path / "nowhere")
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:100])
    with pytest.raises(StoreError, match="not readable JSON"):
        ActivationStore(copy)
    manifest.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(StoreError, match="has version 2; this interp reads version 1"):
        ActivationStore(copy)
    manifest.write_text("[1]")
    with pytest.raises(StoreError, match="not the manifest of an activation store"):
        ActivationStore(copy)


def test_only_as_many_files_as_needed_stay_open(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.cache.store._OPEN_FILES", 3)
    fresh = ActivationStore(store.path)
    assert torch.equal(fresh[HOOKS[1]][:], whole(store, HOOKS[1]))
    assert len(fresh._open) == 3


def test_reading_maps_files_and_does_not_load_them(tmp_path: Path) -> None:
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("needs /proc")

    def resident() -> int:
        return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    bridge = tiny_bridge("llama")
    stream = (tiny_tokens(64, 64, seed) for seed in range(16))
    big = harvest(bridge, stream, "blocks.2.hook_resid_post", tmp_path / "s", batch_size=64, dtype=torch.float32)
    size = big.n_tokens * 32 * 4
    before = resident()
    column = ActivationStore(tmp_path / "s")["blocks.2.hook_resid_post"]
    assert column[[5, 60_000]].shape == (2, 32)
    assert resident() - before < size / 2


def test_opening_needs_no_model_code(store: ActivationStore) -> None:
    code = (
        "import sys; from interp.cache import ActivationStore; s = ActivationStore(sys.argv[1]); "
        "assert s['blocks.1.hook_resid_post'][:2].shape == (2, 32) and s.verify().ok; "
        "assert 'transformer_lens' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(store.path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
