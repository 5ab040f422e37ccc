"""Needles: exact spans for any tokenizer, lost needles raise, the released locator replayed."""

from __future__ import annotations

import functools
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from interp.attention import (
    LostNeedle,
    Needle,
    Needles,
    find_span,
    generate_haystack,
    insert_needles,
    needle_grid,
    official_span,
)
from interp.attention.needles import covering
from interp.prompts._tokens import Encoded
from tests.helpers import tiny_bridge

WORDS = (
    "the", "a", "old", "quiet", "man", "saw", "found", "red", "boat", "road", "letter", "code", "of", "vault", "is",
    "crimson", ".", ",", "?", "what", "opens",
)  # fmt: skip
KINDS = ("word", "bpe", "character")


def _corpus() -> list[str]:
    return [generate_haystack(400, seed) for seed in range(3)] + ["The code of the vault is crimson. naïve café"] * 3


@functools.cache
def tokenizer(kind: str) -> Any:
    """Word-level, byte-level BPE trained here, or characters; each with a BOS."""
    if kind == "word":
        vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", *WORDS])}
        raw: Any = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        raw.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
        )
        raw.train_from_iterator(_corpus(), trainer)
    else:
        characters = sorted({character for text in _corpus() for character in text} | set("?W"))
        raw = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<bos>", "<unk>", *characters])}, "<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    unknown = None if kind == "bpe" else "<unk>"
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>", unk_token=unknown)


def stand_in(kind: str) -> Any:
    """What the generators need of a model: a tokenizer and a few settings."""
    cfg = SimpleNamespace(default_prepend_bos=True, d_vocab=10_000, n_ctx=10_000)
    return SimpleNamespace(tokenizer=tokenizer(kind), cfg=cfg)


def true_span(kind: str, text: str, start: int, end: int, ids: list[int]) -> tuple[int, int]:
    """The needle's tokens from their lengths alone, without the tokenizer's offsets."""
    if kind == "character":  # one token per character, behind BOS
        return start + 1, end + 1
    if kind == "word":  # one token per word, behind BOS
        before = len(text[:start].split())
        return before + 1, before + 1 + len(text[start:end].split())
    names = tokenizer("bpe").convert_ids_to_tokens(ids[1:])  # one character of a name per byte
    first, last = len(text[:start].encode()), len(text[:end].encode())
    place, inside = 0, []
    for i, name in enumerate(names, 1):
        if place < last and place + len(name) > first:
            inside.append(i)
        place += len(name)
    return inside[0], inside[-1] + 1


def prose(rng: random.Random, kind: str, n: int) -> str:
    if kind != "word":
        return generate_haystack(n, rng.randrange(10**6))
    words = [rng.choice(WORDS[:11]) for _ in range(n)]
    return " ".join("." if i % 7 == 6 else word for i, word in enumerate(words))


NEEDLES = {
    "word": ("the code of the vault is crimson .", "crimson", " what opens the vault ? the code is"),
    "bpe": ("The code of the naïve café is crimson.", "crimson", " What is the code? The code is"),
    "character": ("The code of the vault is crimson.", "is crimson", " What is the code? The code"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_spans_are_exact_for_1000_random_insertions(kind: str) -> None:
    rng = random.Random(kind)
    needle, answer, question = NEEDLES[kind]
    bridge = stand_in(kind)
    room = len(bridge.tokenizer(needle + question)["input_ids"])
    done = 0
    while done < 334:  # 1,002 over the three families
        separator = " " if kind == "word" or rng.random() < 0.5 else ""
        found = insert_needles(
            bridge, prose(rng, kind, rng.randint(8, 60)), needle, question, answer=answer,
            lengths=[room + rng.randint(20, 90)], depths=[rng.random() for _ in range(9)] + [rng.choice((0, 1))],
            separator=separator,
        )  # fmt: skip
        for sample in found.samples:
            ids = sample.tokens.tolist()
            text = bridge.tokenizer.decode(ids[1:]) if kind != "character" else "".join(map(found.text, ids[1:]))
            start = text.index(needle)
            assert text.count(needle) == 1
            assert sample.span == true_span(kind, text, start, start + len(needle), ids)
            first = start + needle.index(answer)
            assert sample.answer_span == true_span(kind, text, first, first + len(answer), ids)
            assert sample.answer == tuple(ids[slice(*sample.answer_span)])
            assert len(ids) <= sample.length
            done += 1


def test_merged_boundary_tokens_count_as_the_needles() -> None:
    """Joined without a space, a token may hold the end of the haystack and the start of the needle."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "<bos>": 4, " ": 5}
    raw: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 4)])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<bos>")
    bridge = SimpleNamespace(tokenizer=fast, cfg=SimpleNamespace(default_prepend_bos=True, d_vocab=6, n_ctx=99))
    sample = insert_needles(bridge, "caca", "bcb", "c", lengths=[20], depths=[1], separator="")[0]
    assert fast.convert_ids_to_tokens(sample.tokens[slice(*sample.span)].tolist()) == ["ab", "c", "b"]
    assert sample.labels["merged"] is True
    apart = insert_needles(bridge, "cacc", "bcb", "c", lengths=[20], depths=[1], separator="")[0]
    assert fast.convert_ids_to_tokens(apart.tokens[slice(*apart.span)].tolist()) == ["b", "c", "b"]
    assert apart.labels["merged"] is False


def test_lengths_are_nearly_met_and_depths_are_in_order() -> None:
    bridge = stand_in("bpe")
    needle, answer, question = NEEDLES["bpe"]
    found = insert_needles(bridge, generate_haystack(30), needle, question, answer=answer, lengths=[120, 300])
    assert len(found) == 10
    for length in (120, 300):
        cell = [sample for sample in found.samples if sample.length == length]
        starts = [sample.span[0] for sample in cell]
        assert starts == sorted(starts) and starts[0] == 1
        assert all(length - 24 < len(sample.tokens) <= length for sample in cell)
    frame = found.to_dataframe()
    assert set(frame["answer"].str.strip()) == {answer}
    assert found[2:4].samples == found.samples[2:4]


def test_a_lost_needle_raises() -> None:
    bridge = stand_in("word")
    with pytest.raises(LostNeedle, match="cannot spell the needle 'the code is mauve .'"):
        insert_needles(bridge, "the old man .", "the code is mauve .", " the code is", lengths=[40])
    with pytest.raises(LostNeedle, match="no token for 'xyz'"):
        covering(Encoded([1, 2], [(0, 3), (6, 9)]), "abcxyzabc", 0, 9)
    tokens = torch.tensor([0, 5, 6, 7, 5, 6, 8])
    with pytest.raises(LostNeedle, match="occur 0 times"):
        find_span(tokens, [6, 9])
    with pytest.raises(LostNeedle, match=r"occur 2 times in the prompt, at \[1, 4\]"):
        find_span(tokens, [5, 6])
    with pytest.raises(LostNeedle, match="does not lie in a prompt of 7 tokens"):
        Needle(tokens, (-1, -1), (-1, -1), (5,), 7, 0.0)
    with pytest.raises(LostNeedle, match="not inside the needle"):
        Needle(tokens, (1, 3), (2, 4), (5,), 7, 0.0)
    assert find_span(tokens, [7, 5]) == (3, 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "blue"}, "occurs 0 times"),
        ({"haystack": "The vault is red. x"}, "already says"),
        ({"haystack": "  "}, "is empty"),
        ({"lengths": [5]}, "no room for the needle"),
        ({"depths": [1.5]}, "depth=1.5"),
    ],
)
def test_what_cannot_be_inserted_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {"haystack": generate_haystack(20), "answer": "red", "lengths": [60]} | changes
    haystack = settings.pop("haystack")
    with pytest.raises(ValueError, match=message):
        insert_needles(stand_in("bpe"), haystack, "The vault is red.", " The vault is", **settings)


def _ids(structure: str) -> list[int]:
    """Words of a needle as ids: equal words, equal ids."""
    words = structure.split()
    return [100 + words.index(word) for word in words]


@pytest.mark.parametrize(("structure", "offset"), [
    # 20 distinct words: a window one early misses one of 20 (5 %), and so is taken
    (" ".join(f"w{i}" for i in range(20)), -1),
    (" ".join(f"w{i}" for i in range(21)), -2),  # two of 21 are still less than a tenth
    (" ".join(f"w{i}" for i in range(10)), 0),  # one of 10 leaves exactly 0.9, which is not enough
    (" ".join([*(f"w{i}" for i in range(19)), "w3", "w5", "w7"]), -4),  # the last three occur earlier
    (" ".join([*(f"w{i}" for i in range(9)), "w0"]), -1),
])  # fmt: skip
def test_the_released_locator_is_early(structure: str, offset: int) -> None:
    needle = _ids(structure)
    tokens = torch.tensor([1, 2, 3, 4, 5, 6, *needle, 7, 8, 9])
    assert find_span(tokens, needle) == (6, 6 + len(needle))
    assert official_span(tokens, needle) == (6 + offset, 6 + offset + len(needle))
    # and by an independent formula: the earliest window that misses less than a tenth
    for start in range(len(tokens)):
        window = set(tokens[start : start + len(needle)].tolist())
        if sum(token in window for token in set(needle)) > 0.9 * len(set(needle)):
            break
    assert start == 6 + offset
    assert official_span(torch.arange(6), needle) == (-1, -1)


def test_grids_are_exact_on_tinyworld_and_english() -> None:
    import interp

    bridge = interp.load_model("tinyworld-gpt", check=False)
    grid = needle_grid(bridge, lengths=[50, 119], depths=[0, 0.3, 1], n=3, seed=1)
    assert len(grid) == 18
    frame = grid.to_dataframe()
    assert (frame["tokens"] == frame["length"]).all()
    for row in frame.itertuples():
        assert row.needle == f"the code of the {row.key} is {row.value} ."
        assert row.answer == row.value
    assert frame.query("depth == 0")["start"].unique().tolist() == [1]
    again = needle_grid(bridge, lengths=[50, 119], depths=[0, 0.3, 1], n=3, seed=1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(grid.samples, again.samples, strict=True))
    assert len(set(frame["value"])) > 8  # cells do not repeat each other
    with pytest.raises(ValueError, match="length=9 is shorter"):
        needle_grid(bridge, lengths=[9])
    with pytest.raises(ValueError, match="single tokens"):
        needle_grid(tiny_bridge("llama"))
    with pytest.raises(ValueError, match="no needle among"):
        Needles(())
