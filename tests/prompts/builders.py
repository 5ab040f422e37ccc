"""Tokenizers built in memory: tinyworld's, a word-level one, and a byte-level BPE in the manner of GPT-2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp.prompts import _agreement, _docstring, _facts, _greater_than, _ioi, _needle, _pronoun
from interp.tinyworld.families.lists import LIST_WORDS
from interp.tinyworld.lexicon import agreement, facts, names, needles, times


def stub(tokenizer: Any, *, n_ctx: int = 256, bos: bool = True, d_vocab: int | None = None) -> Any:
    """What prompts read of a bridge."""
    cfg = SimpleNamespace(d_vocab=d_vocab or len(tokenizer), n_ctx=n_ctx, default_prepend_bos=bos)
    return SimpleNamespace(tokenizer=tokenizer, cfg=cfg)


def english_words() -> list[str]:
    words = [*names.NAMES, *names.PLACES, *names.THINGS, *times.EVENTS, *needles.KEYS, *needles.VALUES, *LIST_WORDS]
    words += [*needles.FUNCTIONS, *needles.PARAMETERS, *agreement.PREPOSITIONS]
    words += [word for country in facts.COUNTRIES for word in country]
    words += [*facts.LANDMARKS, *(w for forms in names.PRONOUNS.values() for w in forms)]
    words += [form for noun in agreement.NOUNS for form in noun[:2]]
    words += [form for pair in agreement.RELATIVE_VERBS for form in pair]
    words += [form for one, many, _ in agreement.AUXILIARIES.values() for form in (one, many)]
    return list(dict.fromkeys(words))


def train_bpe(words: list[str], vocabulary: int = 6000) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on our own templates and the given words, with GPT-2's single special token."""
    templates = [*_ioi.TEMPLATES, *_greater_than.TEMPLATES, *_agreement.TEMPLATES.values()]
    templates += [
        text for table in (_facts.TEMPLATES, _facts.TWO_HOP_TEMPLATES) for row in table.values() for text in row
    ]
    templates += [text for _, text in _pronoun.TEMPLATES]
    templates += [*_needle.STATEMENTS, *_needle.QUESTIONS, *_needle.FILLER, _needle.OPENING, _docstring.LINE]
    templates += ['def load(self, path, size):\n    """ one two\n\n    :param path : one two']
    corpus = [f" {word}" for word in words for _ in range(3)] + templates * 3
    # years split as GPT-2 splits them: the century with its space, then two digits
    corpus += [f" {century}" for century in times.CENTURIES for _ in range(500)]
    corpus += [f"-{year}" for year in times.TWO_DIGITS for _ in range(100)]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=end, eos_token=end, unk_token=end)


def word_level() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with BOS, padding and unknown token, as small test models have."""
    vocabulary = [
        "<bos>",
        "<pad>",
        "<unk>",
        "the",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "mat",
        "and",
        "Mary",
        "John",
        "to",
    ]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"bos_token": "<bos>", "pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<bos>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)
