"""Years as two tokens, century and two digits, and the events that last for some of them."""

from __future__ import annotations

from interp.tinyworld.lexicon._text import words

TWO_DIGITS = tuple(f"{number:02d}" for number in range(100))
CENTURIES = ("11", "12", "13", "14", "15", "16", "17", "18")
EVENTS = words("""war siege reign dynasty voyage expedition rebellion famine plague alliance truce crusade treaty strike
    construction restoration exile conquest migration drought revolution regency embargo feud""")
