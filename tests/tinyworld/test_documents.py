"""Documents and their labels: what every family must satisfy, whatever the seed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import tinyworld
from interp.tinyworld import FAMILIES, SINGLE_ANSWER, TABLE, VOCABULARY, Document, Label
from interp.tinyworld.documents import belongs, fill, held_out, join, scatter_marks
from interp.tinyworld.families import facts
from interp.tinyworld.lexicon import dialects
from interp.tinyworld.lexicon.agreement import AUXILIARIES, BY_WORD
from interp.tinyworld.lexicon.dialects import NORTH_TO_SOUTH
from interp.tinyworld.lexicon.facts import BY_NAME, COUNTRIES, LANDMARKS
from interp.tinyworld.lexicon.marks import EMPTY_MARKS
from interp.tinyworld.lexicon.names import FEMALE, MALE, PRONOUNS, gender
from interp.tinyworld.lexicon.times import TWO_DIGITS
from interp.tinyworld.lexicon.topics import TOPICS

SEEDS = st.integers(0, 2**32)
HOLDING_OUT = [name for name in FAMILIES if TABLE[name].held_out != "nothing"]


def draw(family: str, seed: int = 0, **options: object) -> Document:
    return TABLE[family].draw(random.Random(seed), **options)


def by_role(document: Document) -> dict[str, list[str]]:
    words: dict[str, list[str]] = {}
    for word, label in zip(document.words, document.labels, strict=True):
        words.setdefault(label.role, []).append(word)
    return words


def test_size_of_the_world() -> None:
    assert len(VOCABULARY) == len(set(VOCABULARY)) >= 800
    assert len(TOPICS) >= 12
    assert len(COUNTRIES) >= 40
    assert all(len(word.split()) == 1 for word in VOCABULARY)


def test_topics_and_capitals_are_not_ambiguous() -> None:
    counts = Counter(word for topic in TOPICS.values() for group in topic for word in group)
    assert counts.most_common(1)[0][1] == 1, counts.most_common(3)
    assert len({country.capital for country in COUNTRIES}) == len(COUNTRIES)
    assert set(LANDMARKS.values()) <= set(BY_NAME)
    assert not set(FEMALE) & set(MALE)
    assert not set(NORTH_TO_SOUTH) & set(NORTH_TO_SOUTH.values())


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, marks=st.sampled_from([0.0, 0.3]))
def test_every_document_is_well_formed(family: str, seed: int, marks: float) -> None:
    document = tinyworld.sample(family, random.Random(seed), marks=marks)
    assert set(document.words) <= set(VOCABULARY)
    assert len(document.labels) == len(document.words) <= 127 or marks
    assert all(label.family == family for label in document.labels)
    assert list(document.answers) == sorted(set(document.answers))
    assert all(0 < answer < len(document) for answer in document.answers)
    if family not in SINGLE_ANSWER:
        assert document.answers == ()
    elif document.kind != "monologue":
        assert document.answers
    for word, label in zip(document.words, document.labels, strict=True):
        assert (label.role == "mark") == (word in EMPTY_MARKS), (word, label)
    again = tinyworld.sample(family, random.Random(seed), marks=marks)
    assert again == document


@pytest.mark.parametrize("family", HOLDING_OUT)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS)
def test_training_holds_nothing_held_out(family: str, seed: int) -> None:
    train = tinyworld.sample(family, random.Random(seed), split="train")
    heldout = tinyworld.sample(family, random.Random(seed), split="heldout")
    assert not any(held_out(family, combination) for combination in train.combinations)
    assert held_out(family, heldout.combinations[0])
    assert heldout.combinations[0] not in train.combinations


def test_one_combination_in_eight_is_held_out() -> None:
    share = sum(held_out("ioi", ("a", str(i))) for i in range(4000)) / 4000
    assert abs(share - 1 / 8) < 0.02
    assert [held_out("ioi", ("Mary", name)) for name in MALE[:8]] == [
        held_out("ioi", ("Mary", name)) for name in MALE[:8]
    ]


def test_no_fact_is_held_out_in_every_wording() -> None:
    for relation, wordings in facts.FACT_TEMPLATES.items():
        for subject in facts.subjects(relation):
            outs = [held_out("facts", (relation, subject, str(index))) for index in range(len(wordings))]
            assert not all(outs), (relation, subject)


@pytest.mark.parametrize("order", ["ABBA", "BABA"])
@pytest.mark.parametrize("template", range(8))
def test_ioi_roles(order: str, template: int) -> None:
    document = draw("ioi", order=order, template=template, io="Mary", subject="John", thing="ring", place="shop")
    (answer,) = document.answers
    assert document.words[answer] == "Mary" and document.labels[answer].role == "io2"
    named = ["Mary", "John"] if order == "ABBA" else ["John", "Mary"]
    assert [word for word in document.words if word in ("Mary", "John")] == [*named, "John", "Mary"]
    assert (document.index("io") < document.index("s1")) == (order == "ABBA")
    assert document.index("s1") < document.index("s2") < answer


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_facts_are_true(seed: int) -> None:
    document = draw("facts", seed)
    (answer,) = document.answers
    subject = document.combinations[0][1]
    record = BY_NAME[document.labels[answer].entity or ""]
    assert document.words[answer] in record
    assert subject in (*record, *(mark for mark, country in LANDMARKS.items() if country == record.name))
    assert document.words[answer] == facts.answer(document.kind, subject)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_two_hop_never_says_the_bridge(seed: int) -> None:
    document = draw("two_hop", seed)
    (answer,) = document.answers
    bridge = document.labels[answer].entity
    assert bridge in BY_NAME
    assert not set(document.words) & set(BY_NAME)
    given_word = document.combinations[0][1]
    assert facts.bridge_country(given_word) == bridge
    assert document.words[answer] == facts.answer(document.kind, given_word)
    assert (
        facts.answer("capital_language", "Cairo") == "Arabic" and facts.answer("landmark_capital", "Louvre") == "Paris"
    )


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_spans_end_later_in_the_same_century(seed: int) -> None:
    document = draw("greater_than", seed)
    roles = by_role(document)
    assert roles["century"][0] == roles["century"][1]
    assert TWO_DIGITS.index(roles["end"][0]) > TWO_DIGITS.index(roles["start"][0])


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_verbs_agree_with_their_subject_and_not_with_the_attractor(seed: int) -> None:
    document = draw("agreement", seed)
    roles = by_role(document)
    noun, verb = BY_WORD[roles["subject"][0]], roles["verb"][0]
    plural = roles["subject"][0] == noun.plural
    if "opening" in roles:
        assert verb == AUXILIARIES[roles["opening"][0]][plural]
    else:
        assert verb == (noun.verb_plural if plural else noun.verb_singular)
    if document.kind != "simple":
        assert document.index("subject") < document.index("attractor") < document.index("verb")


def test_attractor_number_changes_nothing_but_the_attractor() -> None:
    pair = [draw("agreement", 3, structure="prepositional", number="plural", attractor_number=n, opening="now")
            for n in ("singular", "plural")]  # fmt: skip
    differing = [i for i, (a, b) in enumerate(zip(pair[0].words, pair[1].words, strict=True)) if a != b]
    assert differing == [pair[0].index("attractor")]
    assert pair[0].words[pair[0].answers[0]] == "are"


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_pronouns_have_the_gender_of_their_name(seed: int) -> None:
    document = draw("pronoun", seed)
    roles = by_role(document)
    assert roles["pronoun"][0] in PRONOUNS[gender(roles["name"][0])]
    if "other" in roles:
        assert gender(roles["other"][0]) != gender(roles["name"][0])


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_mentions_name_the_only_person_again(seed: int) -> None:
    document = draw("mention", seed)
    roles = by_role(document)
    assert roles["again"] == roles["name"]
    assert [word for word in document.words if word in FEMALE + MALE] == roles["name"] * 2


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, kind=st.sampled_from(["framed", "bare"]), length=st.integers(2, 40))
def test_lists_repeat(seed: int, kind: str, length: int) -> None:
    document = draw("induction", seed, kind=kind, length=length)
    roles = by_role(document)
    assert len(set(roles["first"])) == length
    assert [*roles.get("restart", []), *roles["second"]] == roles["first"]
    assert [document.words[i] for i in document.answers] == roles["second"]


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_docstrings_name_the_parameters_in_order(seed: int) -> None:
    document = draw("docstring", seed)
    roles = by_role(document)
    assert roles["documented"] == roles["parameter"][: len(roles["documented"])]
    assert all(document.words[answer - 1] == ":param" for answer in document.answers)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, distance=st.integers(0, 90), pairs=st.integers(1, 4))
def test_needles_stand_at_the_distance_asked_for(seed: int, distance: int, pairs: int) -> None:
    document = draw("needle", seed, distance=distance, pairs=pairs, before=0)
    roles = by_role(document)
    assert roles["key"] == roles["query"] and roles["value"] == roles["answer"]
    assert len(roles.get("distractor_key", [])) == pairs - 1
    assert len({*roles["key"], *roles.get("distractor_key", [])}) == pairs
    needle_end = next(i for i in range(document.index("key"), len(document)) if document.words[i] == ".")
    question = next(i for i in range(needle_end, len(document)) if document.words[i] in ("what", "question"))
    assert question - needle_end - 1 == distance
    assert len(document) <= 127


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, dialect=st.sampled_from(dialects.DIALECTS))
def test_dialects_say_the_same_in_the_same_order(seed: int, dialect: str) -> None:
    from interp.tinyworld.families.prose import dialect_pair

    first, second = dialect_pair(random.Random(seed), dialect=dialect)
    north, south = (first, second) if dialect == "north" else (second, first)
    assert [dialects.say(word, "south") for word in north.words] == list(south.words)
    assert not set(north.words) & set(south.words)
    assert {label.dialect for label in first.labels} == {dialect}
    assert [label.entity for label in first.labels] == [label.entity for label in second.labels]


def test_translations_and_phrases_repeat_the_meaning_in_the_other_dialect() -> None:
    for seed in range(30):
        document = draw("dialect", seed, kind=("translation", "phrase")[seed % 2], dialect="south")
        said = [document.words[answer] for answer in document.answers]
        first = document.words[2 : document.words.index(";")]
        assert document.words[0] == "south" and [dialects.say(word, "south") for word in said] == list(first)
        assert bool(document.combinations) == (document.kind == "translation")


def test_topic_paragraphs_keep_to_their_topic_and_dialect() -> None:
    for seed in range(30):
        document = draw("topic", seed, topic="sea", dialect="south")
        assert {label.topic for label in document.labels} == {"sea"}
        own = {word for group in TOPICS["sea"] for word in group}
        content = {w for w, label in zip(document.words, document.labels, strict=True) if label.role != "frame"}
        assert content <= own
        assert not set(document.words) & set(dialects.FUNCTION_WORDS)


def test_marks_fall_anywhere_and_keep_answers() -> None:
    plain = draw("ioi", 5)
    marked = scatter_marks(plain, random.Random(0), 0.5)
    kept = [word for word, label in zip(marked.words, marked.labels, strict=True) if label.role != "mark"]
    assert tuple(kept) == plain.words and len(marked) > len(plain)
    assert marked.words[marked.answers[0]] == plain.words[plain.answers[0]]


def test_fill_labels_every_word() -> None:
    document = fill(
        "the {noun} and {many!} .", "x", {"noun": "ring", "many": ("book", "cup")}, dialect="south",
        entities={"noun": "Mary"},
    )  # fmt: skip
    assert document.words == ("ta", "ring", "ko", "book", "cup", ".")
    assert document.labels[1] == Label("x", "noun", None, "south", "Mary")
    assert document.labels[0].role == "frame" and document.answers == (3, 4)
    assert join([document, document]).answers == (3, 4, 9, 10)


def test_errors_say_what_to_do() -> None:
    rng = random.Random(0)
    with pytest.raises(KeyError, match="no family 'iio'.*ioi"):
        tinyworld.sample("iio", rng)
    with pytest.raises(ValueError, match="in split 'heldout'; held out is nothing"):
        tinyworld.sample("topic", rng, split="heldout")
    pair = next((a, b) for a in FEMALE for b in MALE if held_out("ioi", sorted((a, b))))
    with pytest.raises(ValueError, match="unordered pairs of names"):
        tinyworld.sample("ioi", rng, io=pair[0], subject=pair[1])
    with pytest.raises(ValueError, match="no word .* role 'end'; its roles are"):
        draw("ioi").index("end")
    with pytest.raises(ValueError, match="one label per word; got 1 words and 0 labels"):
        Document(("a",), ())


def test_same_documents_in_another_process() -> None:
    code = (
        "import random; from interp import tinyworld as t; "
        "print([t.sample(f, random.Random(7), split='train').text for f in t.FAMILIES])"
    )
    texts = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
                       capture_output=True, text=True, check=True).stdout for seed in ("1", "2")
    ]  # fmt: skip
    here = str([tinyworld.sample(family, random.Random(7)).text for family in FAMILIES])
    assert texts[0] == texts[1] == here + "\n"


def test_import_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, interp.tinyworld; print([m for m in ('torch', 'transformers', 'tokenizers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert out.stdout.strip() == "[]"


def test_belongs_of_a_document_without_combinations() -> None:
    document = draw("topic")
    assert belongs(document, "topic", "train") and not belongs(document, "topic", "heldout")
