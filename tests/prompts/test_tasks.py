"""What every task promises, whatever the tokenizer."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import metrics, prompts
from interp.prompts import TASKS, Prompts
from interp.tinyworld.lexicon import times
from tests.prompts.builders import english_words, stub, train_bpe

BRIDGES = ("world", "english")


@pytest.fixture(params=BRIDGES)
def bridge(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def digest(p: Prompts) -> str:
    parts = [p.clean, p.corrupted, p.answers, p.foils, *p.positions.values()]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts) + repr(p.labels).encode()).hexdigest()


@pytest.mark.parametrize("task", TASKS)
@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=8)
def test_every_example_is_sound(bridges: dict[str, Any], task: str, n: int, seed: int) -> None:
    for bridge in bridges.values():
        p = TASKS[task](bridge, n, seed)
        bos = bridge.tokenizer.bos_token_id
        assert len(p) == n
        assert p.name == task
        assert p.seed == seed
        p.check(bridge)
        for ids in (p.clean, p.corrupted):
            assert (ids[:, 0] == bos).all()
            assert (ids == bos).sum().item() == n  # BOS once in every row
            assert (ids != bridge.tokenizer.unk_token_id)[:, 1:].all()
        assert (p.clean != p.corrupted).any(1).all()  # a corruption that changes nothing would patch nothing
        assert (p.answers != p.foils).all()
        assert p.positions["end"].tolist() == [p.clean.shape[1] - 1] * n
        assert (p.clean[:, -1] == p.corrupted[:, -1]).all()  # nothing is corrupted where the answer is read
        # all labels are told for every example
        assert all(len(values) == n for values in p.labels.values())


@pytest.fixture(scope="session")
def bridges(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {name: request.getfixturevalue(name) for name in BRIDGES}


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_prompts_and_another_seed_others(bridge: Any, task: str) -> None:
    first = TASKS[task](bridge, 16, 3)
    assert digest(TASKS[task](bridge, 16, 3)) == digest(first)
    assert digest(TASKS[task](bridge, 16, 4)) != digest(first)
    # a longer set begins with the shorter one, so that a study may be extended
    assert digest(TASKS[task](bridge, 24, 3)[:16]) == digest(first)


def test_the_same_in_every_process(world: Any) -> None:
    script = (
        "from tests.prompts.test_tasks import digest\n"
        "from tests.prompts.builders import stub\n"
        "from interp import prompts, tinyworld\n"
        "bridge = stub(tinyworld.tokenizer(), n_ctx=128)\n"
        "print([digest(task(bridge, 8, 5)) for task in prompts.TASKS.values()])\n"
    )
    here = str([digest(task(world, 8, 5)) for task in TASKS.values()])
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == here


@pytest.mark.parametrize("task", [task for task in TASKS if task != "induction"])
def test_a_tokenizer_without_whole_words_is_refused_and_told_what_works(letters: Any, task: str) -> None:
    message = (
        rf"{task} needs at least \d+ .* single tokens of this tokenizer \(vocabulary of 300\), but only 0 of \d+ are"
    )
    with pytest.raises(ValueError, match=message + ".*prompts.induction works with any tokenizer"):
        TASKS[task](letters, 4)


@pytest.fixture(scope="session")
def partial() -> Any:
    """A tokenizer for which a fifth of our words are in pieces."""
    return stub(train_bpe(random.Random(0).sample(english_words(), k=len(english_words()) * 4 // 5)))


@pytest.mark.parametrize("task", [task for task in TASKS if task != "induction"])
def test_only_words_that_are_single_tokens_are_used(partial: Any, task: str) -> None:
    ours = set(english_words())
    p = TASKS[task](partial, 32)
    said = {w for key, values in p.labels.items() if key not in ("bridge", "opening") for w in values if w in ours}
    said |= {p.text(token).strip() for token in (*p.answers.tolist(), *p.foils.tolist())}
    assert len(said) > 3
    assert all(len(partial.tokenizer(f" {word}")["input_ids"]) == 1 for word in said - {*times.TWO_DIGITS})


@pytest.mark.parametrize("task", TASKS)
def test_bad_requests_are_refused(bridge: Any, task: str) -> None:
    with pytest.raises(ValueError, match=rf"{task}\(\) was asked for n=0 examples"):
        TASKS[task](bridge, 0)


@pytest.mark.parametrize("task", TASKS)
def test_a_split_is_only_known_of_tinyworld(english: Any, task: str) -> None:
    with pytest.raises(ValueError, match=f"split='heldout' is a tinyworld option.*{task}"):
        TASKS[task](english, 4, split="heldout")


@pytest.mark.parametrize("task", [task for task in TASKS if task != "induction"])
def test_text_needs_a_tokenizer(task: str) -> None:
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        TASKS[task](stub(None, d_vocab=100), 4)


def test_every_task_is_exported() -> None:
    assert set(TASKS) < set(prompts.__all__)
    assert all(getattr(prompts, name) is task for name, task in TASKS.items())


def test_world_prompts_fit_the_context_of_the_embedded_models(world: Any) -> None:
    assert all(task(world, 8).clean.shape[1] <= 128 for task in TASKS.values())
    with pytest.raises(
        ValueError, match="distance=100 and before=40 make 1.. words, but a tinyworld haystack has at most 120"
    ):
        prompts.needle(world, 4, distance=100, before=40)


def test_one_at_a_time_gives_what_the_batch_gives() -> None:
    from tests.helpers import tiny_bridge

    bridge = tiny_bridge("llama")
    p = prompts.induction(bridge, 6, length=8)
    for build in (metrics.logit_difference, metrics.answer_log_prob):
        with torch.no_grad():
            batch = build(p)(bridge(p.clean))
            single = torch.cat([build(p[i])(bridge(p[i].clean)) for i in range(len(p))])
        assert torch.allclose(batch, single, atol=1e-5)


def test_real_bridges_say_what_prompts_read_of_them() -> None:
    from tests.helpers import FAMILIES, tiny_bridge

    begins = {}
    for family in FAMILIES:
        bridge = tiny_bridge(family)
        p = prompts.induction(bridge, 3, length=5)
        begins[family] = bool((p.clean[:, 0] == bridge.tokenizer.bos_token_id).all())
        assert begins[family] == (bridge.to_tokens("w5")[0, 0] == bridge.tokenizer.bos_token_id)
        assert bridge(p.clean).shape[:2] == p.clean.shape
        with pytest.raises(ValueError, match="ioi needs at least 5 names"):
            prompts.ioi(bridge)
    assert set(begins.values()) == {True, False}  # GPT-NeoX models are trained without BOS
