"""Nouns and verbs in both numbers. Each noun has its own verb, so that a noun form determines one verb form."""

from __future__ import annotations

from typing import NamedTuple

from interp.tinyworld.lexicon._text import rows


class Noun(NamedTuple):
    """One lemma: noun singular and plural, and the verb it takes, singular and plural."""

    singular: str
    plural: str
    verb_singular: str
    verb_plural: str


NOUNS = tuple(
    Noun(*row)
    for row in rows("""
    dog     dogs      barks     bark
    cat     cats      purrs     purr
    bird    birds     chirps    chirp
    baby    babies    cries     cry
    horse   horses    gallops   gallop
    lion    lions     roars     roar
    wolf    wolves    howls     howl
    snake   snakes    hisses    hiss
    frog    frogs     croaks    croak
    bee     bees      buzzes    buzz
    duck    ducks     quacks    quack
    rabbit  rabbits   hops      hop
    eagle   eagles    soars     soar
    fish    fishes    swims     swim
    bell    bells     tolls     toll
    clock   clocks    ticks     tick
    river   rivers    flows     flow
    star    stars     shines    shine
    engine  engines   rumbles   rumble
    candidate candidates argues argue
    dancer  dancers   spins     spin
    runner  runners   sprints   sprint
    painter painters  paints    paint
    writer  writers   writes    write
    driver  drivers   drives    drive
    guard   guards    patrols   patrol
    child   children  laughs    laugh
    girl    girls     giggles   giggle
    boy     boys      shouts    shout
    king    kings     rules     rule
    worker  workers   digs      dig
    guest   guests    waits     wait
    door    doors     creaks    creak
    flag    flags     flutters  flutter
    leaf    leaves    falls     fall
    flower  flowers   blooms    bloom
    """)
)
BY_WORD = {form: noun for noun in NOUNS for form in (noun.singular, noun.plural)}

RELATIVE_VERBS = rows(  # (singular, plural) verbs inside relative clauses
    """
    sees     see
    likes    like
    knows    know
    fears    fear
    follows  follow
    hears    hear
    """
)
AUXILIARIES = {  # opening word: (singular, plural, words that may follow)
    "now": ("is", "are", ("old", "ready", "quiet", "busy")),
    "yesterday": ("was", "were", ("tired", "late", "angry", "happy")),
    "already": ("has", "have", ("left", "moved", "changed", "returned")),
}
PREPOSITIONS = ("near", "behind", "beside", "above")
ADVERBS = ("loudly", "often", "again", "today", "slowly", "alone")
