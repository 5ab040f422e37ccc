from __future__ import annotations

from typing import Any

import pytest
import torch

from interp.prompts import from_text, groups_from_text
from tests.prompts.builders import stub, word_level

CLEAN = ["the cat sat on the mat and Mary ran to", "the dog ran on the mat and John sat to"]
CORRUPTED = ["the dog sat on the mat and Mary ran to", "the cat ran on the mat and John sat to"]


def test_tokens_answers_and_bos_are_what_the_tokenizer_says(words: Any) -> None:
    prompts = from_text(words, CLEAN, CORRUPTED, [" Mary", "John"], ["John", " Mary"])
    tokenizer = words.tokenizer
    for row, text in zip(prompts.clean.tolist(), CLEAN, strict=True):
        assert row == [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert tokenizer.convert_ids_to_tokens(prompts.answers.tolist()) == ["Mary", "John"]
    assert prompts.positions["end"].tolist() == [10, 10]
    without = from_text(stub(word_level(), bos=False), CLEAN, CORRUPTED, ["Mary", "John"], ["John", "Mary"])
    assert torch.equal(without.clean, prompts.clean[:, 1:])


def test_positions_by_substring_token_index_and_name(words: Any) -> None:
    prompts = from_text(
        words, CLEAN, CORRUPTED, ["Mary", "John"], ["John", "Mary"],
        positions={"subject": ["the cat", "dog"], "mat": "mat", "third": [3, 3], "end": [9, 10]},
        labels={"kind": ["a", "b"]},
    )  # fmt: skip
    assert prompts.positions["subject"].tolist() == [2, 2]
    assert prompts.positions["mat"].tolist() == [6, 6]
    assert prompts.positions["third"].tolist() == [3, 3]
    assert prompts.positions["end"].tolist() == [9, 10]
    assert prompts.labels["kind"] == ("a", "b")


def test_a_part_of_several_tokens_is_at_its_last(english: Any) -> None:
    tokenizer = english.tokenizer
    text = "When Mary and John went to the shop, xyzzyqu gave a ring to"
    prompts = from_text(
        english, [text], [text.replace("John", "Paul")], [" Mary"], [" John"], positions={"name": "xyzzyqu"}
    )
    position = int(prompts.positions["name"])
    covered = tokenizer.decode(prompts.clean[0, : position + 1])
    assert covered.endswith("xyzzyqu")
    assert not tokenizer.decode(prompts.clean[0, :position]).endswith("xyzzyqu")


def test_an_answer_must_be_one_token_and_the_leading_space_is_suggested(english: Any) -> None:
    text = ["When Mary and John went to the shop, Mary gave a ring to"]
    assert len(english.tokenizer("Mary")["input_ids"]) > 1
    with pytest.raises(
        ValueError, match=r"example 0: answer 'Mary' is \d tokens \[.*\].*' Mary', with its leading space"
    ):
        from_text(english, text, text, ["Mary"], [" John"])
    with pytest.raises(ValueError, match=r"answer ' Mary John' is 2 tokens \['ĠMary', 'ĠJohn'\].*choose an answer"):
        from_text(english, text, text, [" Mary John"], [" John"])
    assert int(from_text(english, text, text, [" Mary"], [" John"]).answers) == english.tokenizer.convert_tokens_to_ids(
        "ĠMary"
    )


def test_sentencepiece_splits_a_lone_answer_but_not_one_in_context() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # a leading space becomes a lone "▁" only at the start of a text, as Llama's tokenizer has it
    vocabulary = {
        t: i for i, t in enumerate(["<unk>", "<s>", "▁", "▁▁", "▁to", "▁Mary", "▁gave", "M", "a", "r", "y", "g"])
    }
    for letter in "veto":
        vocabulary.setdefault(letter, len(vocabulary))
    scores = [(token, 0.0 if len(token) < 2 else float(len(token))) for token in vocabulary]
    raw = Tokenizer(models.Unigram(scores, unk_id=0))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", unk_token="<unk>")
    prompts = from_text(stub(tokenizer), ["Mary gave to"], ["gave gave to"], [" Mary"], ["gave"])
    assert int(prompts.answers) == vocabulary["▁Mary"]
    assert prompts.text(int(prompts.answers)) == " Mary"


def test_unequal_lengths_are_shown_side_by_side(words: Any) -> None:
    shown = r"from position 1, clean \['the', 'cat', 'sat'\] and corrupted \['the', 'dog', 'and', 'cat'\]"
    with pytest.raises(ValueError, match="example 0: clean has 4 tokens and corrupted 5.*" + shown):
        from_text(words, ["the cat sat"], ["the dog and cat"], ["on"], ["to"])


def test_prompts_of_several_lengths_are_refused_or_grouped(words: Any) -> None:
    clean = ["the cat sat", "the dog ran on", "the dog sat"]
    corrupted = ["the dog sat", "the cat ran on", "the cat sat"]
    arguments = (words, clean, corrupted, ["on", "the", "on"], ["to", "to", "to"])
    with pytest.raises(
        ValueError, match=r"2 different lengths \(4 tokens: examples \[0, 2\]; 5 tokens.*groups_from_text"
    ):
        from_text(*arguments)
    short, long = groups_from_text(
        *arguments, positions={"animal": ["cat", "dog", "dog"]}, labels={"k": ["a", "b", "c"]}
    )
    assert short.clean.shape == (2, 4)
    assert long.clean.shape == (1, 5)
    assert short.labels == {"k": ("a", "c"), "index": (0, 2)}
    assert long.labels == {"k": ("b",), "index": (1,)}
    assert short.positions["animal"].tolist() == [2, 2]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clean": "the cat"}, r"clean is one string; pass a list of strings, one per example: clean=\['the cat'\]"),
        ({"answers": ["on", "on"]}, "answers has 2 strings but clean has 1"),
        ({"clean": [], "corrupted": [], "answers": [], "foils": []}, "clean is empty; at least one prompt"),
        ({"clean": [" "]}, "prompt ' ' is empty"),
        ({"clean": ["the cat "]}, "ends in a space.*drop it"),
        ({"clean": ["<bos> the cat"]}, "spells out the special token '<bos>'; BOS is added once"),
        ({"corrupted": ["the <pad>"]}, "spells out the special token '<pad>'"),
        ({"clean": ["the zebra"]}, r"'zebra' is not in the tokenizer's vocabulary \(it becomes <unk>\)"),
        ({"foils": ["zebra"]}, r"answer 'zebra' is 1 tokens \['<unk>'\]"),
        ({"foils": ["on"]}, "answer and foil are the same token"),
        ({"positions": {"x": "t"}}, r"positions\['x'\], example 0: 't' occurs 2 times in 'the cat'"),
        ({"positions": {"x": "dog"}}, "'dog' occurs 0 times in 'the cat'"),
        ({"positions": {"x": ["the", "cat"]}}, r"positions\['x'\] has 2 entries but there are 1"),
        ({"positions": {"x": [7]}}, r"positions\['x'\] is 7 in row 0; expected 0 to 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(words: Any, changes: dict[str, Any], message: str) -> None:
    arguments = {"clean": ["the cat"], "corrupted": ["the mat"], "answers": ["on"], "foils": ["to"]}
    with pytest.raises(ValueError, match=message):
        from_text(words, **{**arguments, **changes})


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.*make Prompts\(...\) from token tensors"):
        from_text(stub(None, d_vocab=9), ["the cat"], ["the dog"], ["on"], ["to"])
