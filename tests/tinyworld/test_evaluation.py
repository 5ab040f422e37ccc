"""Scores of models whose behaviour is known, and of the embedded models against their cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from interp import tinyworld
from interp.tinyworld.changes import changed
from interp.tinyworld.encoding import BOS, PAD
from interp.tinyworld.evaluation import correct, evaluate, fresh, greater_than
from interp.tinyworld.families.years import valid_ends

MODELS = Path(__file__).resolve().parents[2] / "data" / "models"
NAMES = ("tinyworld-gpt", "tinyworld-llama", "tinyworld-llama-tuned")


def oracle(ids: np.ndarray) -> np.ndarray:
    """Logits that are largest at the true next token."""
    logits = np.zeros((*ids.shape, len(tinyworld.VOCABULARY)), dtype=np.float32)
    rows, columns = np.indices(ids[:, 1:].shape)
    logits[rows, columns, ids[:, 1:]] = 50.0
    return logits


def test_the_truth_scores_one_and_a_constant_scores_nothing() -> None:
    families = ("ioi", "facts", "induction", "dialect")
    assert {row["accuracy"] for row in evaluate(oracle, n=20, families=families)} == {1.0}

    def constant(ids: np.ndarray) -> np.ndarray:
        logits = np.zeros((*ids.shape, len(tinyworld.VOCABULARY)), dtype=np.float32)
        logits[..., tinyworld.IDS[PAD]] = 1.0
        return logits

    assert {row["accuracy"] for row in evaluate(constant, n=20, families=families)} == {0.0}


def test_an_answer_is_read_one_token_before_it() -> None:
    documents = fresh("ioi", 8, split="heldout", seed=0)

    def late(ids: np.ndarray) -> np.ndarray:  # right, but one position too late
        return np.roll(oracle(ids), 1, axis=1)

    assert all(r.all() for r in correct(oracle, documents))
    assert not any(r.any() for r in correct(late, documents))


def test_greater_than_reads_the_mass_of_later_years() -> None:
    def later(ids: np.ndarray) -> np.ndarray:
        logits = np.full((*ids.shape, len(tinyworld.VOCABULARY)), -50.0, dtype=np.float32)
        for row, sequence in enumerate(ids):
            years = [p for p, i in enumerate(sequence) if tinyworld.VOCABULARY[i].isdigit()]
            start = tinyworld.VOCABULARY[sequence[years[1]]]
            logits[row][:, [tinyworld.IDS[word] for word in valid_ends(start)]] = 50.0
        return logits

    scores = greater_than(later, n=20)
    assert scores["probability_later"] == pytest.approx(1.0) and scores["most_likely_is_later"] == 1.0
    uniform = greater_than(lambda ids: np.zeros((*ids.shape, len(tinyworld.VOCABULARY)), dtype=np.float32), n=20)
    total = uniform["probability_later"] + uniform["probability_not_later"]
    assert total == pytest.approx(100 / len(tinyworld.VOCABULARY), abs=2e-4)


@pytest.fixture(scope="module", params=NAMES)
def embedded(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], Any]:
    from transformers import AutoModelForCausalLM

    directory = MODELS / request.param
    metrics = json.loads((directory / "metrics.json").read_text())
    return directory, metrics, AutoModelForCausalLM.from_pretrained(directory).eval()


def test_embedded_models_score_what_their_cards_say(embedded: tuple[Path, dict[str, Any], Any]) -> None:
    directory, metrics, model = embedded
    stated = {(r["family"], r["split"]): r for r in metrics["accuracy"] if r["kind"] == "all"}
    tuned = directory.name.endswith("tuned")

    @torch.no_grad()
    def predict(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids), attention_mask=torch.from_numpy((ids != 0).astype(np.int64))).logits.numpy()

    card = (directory / "README.md").read_text()
    for row in evaluate(predict, n=40, seed=77, transform=changed if tuned else None):
        if row["kind"] == "all":
            said = stated[row["family"], row["split"]]
            assert row["low"] <= said["high"] and said["low"] <= row["high"], (row, said)
            assert (
                f"{said['accuracy']:.3f} [{said['low']:.3f}, {said['high']:.3f}]" in card or row["family"] == "two_hop"
            )


def test_embedded_base_models_reach_the_bar(embedded: tuple[Path, dict[str, Any], Any]) -> None:
    directory, metrics, _ = embedded
    if directory.name.endswith("tuned"):
        assert metrics["changed_facts_accuracy"]["trained wordings"] >= 0.98
        return
    for row in metrics["accuracy"]:
        if row["kind"] == "all" and row["family"] != "two_hop":
            assert row["accuracy"] >= 0.98, row
        if row["kind"] == "all" and row["family"] == "two_hop" and row["split"] == "train":
            assert row["accuracy"] >= 0.98, row


def test_embedded_directories_are_ordinary_and_small(embedded: tuple[Path, dict[str, Any], Any]) -> None:
    from transformers import AutoTokenizer

    directory, metrics, model = embedded
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == [metrics["architecture"]] == [type(model).__name__]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert tinyworld.is_tinyworld(tokenizer)
    assert tokenizer("the")["input_ids"] == [tinyworld.IDS[BOS], tinyworld.IDS["the"]]
    suffixes = {path.suffix for path in directory.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md"}


def test_the_shipped_data_fits_and_has_checkpoints() -> None:
    from transformers import AutoModelForCausalLM

    files = [path for path in MODELS.parent.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40 * 2**20
    checkpoints = sorted((MODELS / "tinyworld-llama" / "checkpoints").glob("step-*"))
    assert len(checkpoints) >= 12
    model = AutoModelForCausalLM.from_pretrained(checkpoints[-1], dtype=torch.float32)
    final = AutoModelForCausalLM.from_pretrained(MODELS / "tinyworld-llama")
    for a, b in zip(model.parameters(), final.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)
