"""Keys and values of the retrieval task, and the words of the code-like task."""

from __future__ import annotations

from interp.tinyworld.lexicon._text import words

KEYS = words(
    """
    vault gate chest locker attic cellar drawer cabinet garage studio chapel bunker hut cottage castle fortress
    barracks warehouse archive chamber gallery lobby kiosk pavilion greenhouse shed stable windmill cabin terrace
    balcony corridor elevator staircase porch courtyard monastery temple shrine dungeon
    """
)
VALUES = words(
    """
    crimson amber azure ivory scarlet violet indigo turquoise maroon magenta olive beige silver golden copper
    bronze emerald ruby sapphire topaz opal pearl jade onyx coral quartz garnet cobalt lavender saffron mint lime
    peach lilac charcoal platinum hazel rust teal plum
    """
)
FUNCTIONS = words("load save sort parse merge split build render fetch check")
PARAMETERS = words(
    """
    path size mode index count width height color text items limit offset depth seed scale buffer user group token
    cache label shape axis rate step name
    """
)
