"""Given names (one gender each, so that a pronoun is determined), and the places and things of everyday scenes."""

from __future__ import annotations

from interp.tinyworld.lexicon._text import words

FEMALE = words(
    """
    Mary Anna Julia Sarah Emma Laura Alice Helen Nina Rosa Clara Diana Eva Fiona Grace Hannah Irene Jane Karen Lucy
    Maria Nora Olga Paula Rachel Sophie Tina Ursula Vera Wendy Yvonne Zoe Amy Betty Carol Daisy Ellen Frida Gloria
    Hilda Isabel Joan Kate Linda Molly Naomi Pamela Ruth
    """
)
MALE = words(
    """
    John Paul Peter Tom James David Mark Simon Adam Bruno Carl Daniel Eric Frank George Henry Ivan Jack Kevin Leo
    Martin Nick Oscar Philip Robert Samuel Thomas Victor Walter Xavier Alan Brian Colin Dennis Edward Felix Gary
    Hugo Ian Jacob Karl Louis Max Nathan Owen Ralph Steven William
    """
)
NAMES = tuple(name for pair in zip(FEMALE, MALE, strict=True) for name in pair)

PRONOUNS = {  # gender: (subject, object, possessive)
    "female": ("she", "her", "her"),
    "male": ("he", "him", "his"),
}

PLACES = words(
    """
    shop park station market library museum beach bakery hospital office bank airport cafe church harbour cinema
    stadium hotel palace tower
    """
)
THINGS = words(
    """
    book letter ring lamp cup hat bag key coin map pen rope mirror basket candle watch blanket ladder hammer camera
    umbrella wallet bottle ticket
    """
)


def gender(name: str) -> str:
    """`"female"` or `"male"`; KeyError for a word that is no name of this world."""
    if name in FEMALE:
        return "female"
    if name in MALE:
        return "male"
    raise KeyError(f"{name!r} is not a name of tinyworld; see interp.tinyworld.NAMES")
