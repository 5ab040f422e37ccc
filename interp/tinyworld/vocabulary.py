"""Every word of tinyworld, in the order of its token id."""

from __future__ import annotations

from interp.tinyworld.families import agreement, facts, ioi, lists, mentions, needles, pronouns, prose, years
from interp.tinyworld.lexicon import agreement as number
from interp.tinyworld.lexicon import dialects, marks, names, times, topics
from interp.tinyworld.lexicon import facts as world
from interp.tinyworld.lexicon import needles as keyed

SPECIAL = ("<pad>", "<bos>", "<unk>")


def _template_words() -> list[str]:
    templates = [
        *ioi.TEMPLATES,
        *years.TEMPLATES,
        *agreement.STRUCTURES.values(),
        *pronouns.TEMPLATES,
        *mentions.TEMPLATES,
    ]
    for table in (facts.FACT_TEMPLATES, facts.TWO_HOP_TEMPLATES):
        templates += [template for wordings in table.values() for template in wordings]
    templates += [*needles.STATEMENTS, *needles.QUESTIONS, *prose.TOPIC_TEMPLATES, *prose.DIALECT_TEMPLATES]
    templates += lists.FRAME_WORDS
    return [word for text in templates for word in text.split() if not word.startswith("{")]


def _words() -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(
            [
                *SPECIAL,
                *marks.PUNCTUATION,
                *marks.EMPTY_MARKS,
                *_template_words(),
                *(word for forms in names.PRONOUNS.values() for word in forms),
                *names.NAMES,
                *names.PLACES,
                *names.THINGS,
                *(word for country in world.COUNTRIES for word in country),
                *world.LANDMARKS,
                *times.TWO_DIGITS,
                *times.EVENTS,
                *(word for noun in number.NOUNS for word in noun),
                *(word for pair in number.RELATIVE_VERBS for word in pair),
                *(
                    word
                    for opening, (one, many, next_words) in number.AUXILIARIES.items()
                    for word in (opening, one, many, *next_words)
                ),
                *number.PREPOSITIONS,
                *number.ADVERBS,
                *keyed.KEYS,
                *keyed.VALUES,
                *keyed.FUNCTIONS,
                *keyed.PARAMETERS,
                *dialects.DIALECTS,
                *(word for pair in dialects.NORTH_TO_SOUTH.items() for word in pair),
                *(word for topic in topics.TOPICS.values() for group in topic for word in group),
            ]
        )
    )


VOCABULARY: tuple[str, ...] = _words()
IDS: dict[str, int] = {word: index for index, word in enumerate(VOCABULARY)}
