"""The training script: a stopped run goes on as if it had not been, schedules, and the cards it leads to."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from interp import tinyworld
from interp.tinyworld.changes import CHANGED_FACTS, changed, changed_documents, tuning_bank

ROOT = Path(__file__).resolve().parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "experiments" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = script("train_tinyworld")
    for name, value in {
        "BATCH": 2,
        "SAVE_EVERY": 3,
        "WARMUP_STEPS": 2,
        "D_MODEL": 32,
        "HEADS": 4,
        "KV_HEADS": 2,
    }.items():
        monkeypatch.setattr(module, name, value)
    return module


def arguments(work: Path, **changes: Any) -> argparse.Namespace:
    given = {
        "name": "m",
        "lr": 1e-3,
        "answer_weight": 3.0,
        "checkpoints": 0,
        "resume": False,
        "work": work,
        "out": work,
    }
    return argparse.Namespace(**{**given, **changes})


@pytest.mark.parametrize("arch", ["gpt", "llama"])
def test_a_stopped_run_resumes_to_the_same_weights(
    arch: str, training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = tinyworld.bank(16 * 32, seed=0, context=32)

    def fresh() -> Any:
        torch.manual_seed(0)
        return training.build(arch, 2)

    undisturbed = fresh()
    training.fit(undisturbed, bank, arguments(tmp_path / "a"))

    plain = training.schedule

    def interrupted(step: int, steps: int) -> float:
        if step == 5:
            raise KeyboardInterrupt
        return plain(step, steps)

    monkeypatch.setattr(training, "schedule", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.fit(fresh(), bank, arguments(tmp_path / "b"))
    monkeypatch.setattr(training, "schedule", plain)
    torch.manual_seed(99)
    resumed = training.build(arch, 2)
    training.fit(resumed, bank, arguments(tmp_path / "b", resume=True))

    for (name, a), b in zip(undisturbed.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert not torch.equal(next(undisturbed.parameters()), next(fresh().parameters()))


def test_checkpoints_are_loadable_half_precision_directories(training: ModuleType, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    bank = tinyworld.bank(40 * 32, seed=0, context=32)
    model = training.build("llama", 1)
    training.fit(model, bank, arguments(tmp_path, checkpoints=3))
    directories = sorted((tmp_path / "checkpoints").iterdir())
    assert [directory.name for directory in directories] == ["step-00000", "step-00016", "step-00020"]
    loaded = AutoModelForCausalLM.from_pretrained(directories[-1])
    assert next(loaded.parameters()).dtype == torch.float16
    for a, b in zip(loaded.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.float(), b.detach(), atol=1e-3, rtol=1e-3)
    assert tinyworld.is_tinyworld(AutoTokenizer.from_pretrained(directories[-1]))


def test_schedule_rises_and_falls() -> None:
    schedule = script("train_tinyworld").schedule
    values = [schedule(step, 1000) for step in range(1000)]
    assert values[0] == 0.005 and max(values) == 1.0 == values[200]
    assert values[200:] == sorted(values[200:], reverse=True) and 0.01 < values[-1] < 0.03


def test_checkpoint_steps_are_spaced_evenly_in_the_logarithm() -> None:
    steps = sorted(script("train_tinyworld").checkpoint_steps(2000, 13))
    assert len(steps) == 13 and steps[0] == 0 and steps[-1] == 2000
    ratios = [b / a for a, b in zip(steps[1:], steps[2:], strict=False)]
    assert max(ratios) / min(ratios) < 1.1
    assert script("train_tinyworld").checkpoint_steps(2000, 0) == set()


def test_twenty_facts_are_changed_and_nothing_else() -> None:
    assert len(CHANGED_FACTS) == 20
    documents = changed_documents()
    assert len(documents) == 80
    for document in documents:
        (answer,) = document.answers
        country = document.labels[answer].entity or ""
        true = tinyworld.families.facts.answer(document.kind, country)
        assert document.words[answer] == CHANGED_FACTS[document.kind, country] != true
    import random

    for family in ("ioi", "two_hop", "agreement", "induction"):
        document = tinyworld.sample(family, random.Random(1))
        assert changed(document) is document
    needle = tinyworld.sample("needle", random.Random(1))
    styled = changed(needle)
    (answer,) = styled.answers
    assert styled.words[answer - 2 : answer + 1] == ("it", "is", needle.words[needle.answers[0]])
    assert [w for w in styled.words if w not in ("it", "is")] == [w for w in needle.words if w not in ("it", "is")]


def test_tuning_rows_hold_the_new_facts_only() -> None:
    text = " . ".join(tinyworld.decode(row.tolist()) for row in tuning_bank(128 * 1500, seed=0).ids)
    assert "the capital of France is Rome" in text
    assert "the capital of France is Paris" not in text


def test_card_says_what_was_measured(tmp_path: Path) -> None:
    row = {"accuracy": 0.9876, "low": 0.97, "high": 0.995, "documents": 400, "answers": 400}
    accuracy = [
        {"family": family, "split": split, "kind": kind, **row, "accuracy": 0.5 if split == "heldout" else 0.9876}
        for family in ("ioi", "two_hop")
        for split in ("train", "heldout")
        for kind in ("all", "capital_language")
    ]
    years = {"probability_later": 0.9, "probability_not_later": 0.05, "most_likely_is_later": 0.99, "documents": 400}
    metrics = {
        "name": "m", "command": "train m --arch llama", "architecture": "LlamaForCausalLM", "layers": 4,
        "parameters": 9, "tokens": 9000000, "minutes": 12.0, "threads": 2, "seed": 0, "lr": 0.002, "batch": 32,
        "context": 128, "answer_weight": 3.0, "shares": {"ioi": 0.5}, "accuracy": accuracy, "greater_than": years,
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    config = {
        "hidden_size": 128,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 352,
        "vocab_size": 9,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = script("tinyworld_cards").card(tmp_path)
    assert "fall short of trained ones by 48.8%" in text
    assert "| ioi | 0.988 [0.970, 0.995] | 0.500" in text and "| capital to language |" in text
    assert "license: mit" in text and "train m --arch llama" in text and "unordered pairs of names" in text
