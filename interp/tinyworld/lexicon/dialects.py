"""Two dialects of one grammar, `north` and `south`: the same meanings in the same order, other words.

`FUNCTION_WORDS` differ wherever a dialect is spoken, topic paragraphs included; the everyday words are used by the
`dialect` family alone. Every line is one meaning: the northern word, the southern word.
"""

from __future__ import annotations

from interp.tinyworld.lexicon._text import pairs

DIALECTS = ("north", "south")


FUNCTION_WORDS = pairs(
    """
    the ta   a un   and ko   in nel
    with sor   but mar   then dop   under sotu
    over altu   very molu   while durn   because pork
    """
)
NOUNS = pairs(
    """
    man homa   woman vifa   house kasu   tree arbo
    road stra   bread pano   water akva   fire fogu
    stone petro   boat navo   hand manu   window fenstu
    table mensa   garment vesto   village vilago   forest silvo
    hill kolo   wine vinu   milk lakto   apple pomo
    """
)
VERBS = pairs(
    """
    saw vidi   took prendi   made fari   spotted trovi
    dropped perdi   bought kompri   traded vendi   carried porti
    broke rompi   cleaned lavi   wanted voli   greeted voki
    """
)
ADJECTIVES = pairs(
    """
    big grando   small piko   white blanu   black nigru
    red rugo   new novu   good bonu   bad malu
    warm kaldu   cold fridu   long longu   round rondo
    """
)

EVERYDAY = {**NOUNS, **VERBS, **ADJECTIVES}
NORTH_TO_SOUTH = {**FUNCTION_WORDS, **EVERYDAY}
SOUTH_TO_NORTH = {south: north for north, south in NORTH_TO_SOUTH.items()}


def say(word: str, dialect: str | None) -> str:
    """The northern `word` as `dialect` says it; a word that both share is returned as it is."""
    return NORTH_TO_SOUTH.get(word, word) if dialect == "south" else word
