"""Topics: each with its own nouns, past-tense verbs and adjectives. A new topic is one entry."""

from __future__ import annotations

from typing import NamedTuple

from interp.tinyworld.lexicon._text import words


class Topic(NamedTuple):
    """The words that belong to one topic and to no other."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


TOPICS: dict[str, Topic] = {
    "sea": Topic(
        words("sailor anchor wave captain whale reef sail tide cargo lighthouse"),
        words("steered hoisted sank towed"),
        words("salty stormy deep coastal"),
    ),
    "kitchen": Topic(
        words("cook oven soup flour butter onion spoon recipe pepper dough"),
        words("stirred baked tasted chopped"),
        words("spicy sweet roasted crisp"),
    ),
    "music": Topic(
        words("violin singer drum melody choir piano concert flute chorus trumpet"),
        words("played tuned composed hummed"),
        words("loud gentle rhythmic solemn"),
    ),
    "law": Topic(
        words("judge lawyer court witness verdict trial jury statute prisoner contract"),
        words("accused sentenced defended acquitted"),
        words("guilty legal innocent unjust"),
    ),
    "garden": Topic(
        words("gardener rose tulip hedge soil lawn weed petal fountain orchid"),
        words("planted watered trimmed picked"),
        words("leafy fragrant muddy wild"),
    ),
    "school": Topic(
        words("pupil lesson exam chalk desk essay grammar homework tutor classroom"),
        words("taught graded copied studied"),
        words("clever lazy diligent curious"),
    ),
    "space": Topic(
        words("rocket planet astronaut comet orbit telescope moon galaxy satellite crater"),
        words("launched orbited observed explored"),
        words("distant lunar weightless cosmic"),
    ),
    "medicine": Topic(
        words("doctor nurse patient fever pill vaccine surgeon wound clinic symptom"),
        words("healed treated examined prescribed"),
        words("sick healthy contagious feverish"),
    ),
    "weather": Topic(
        words("cloud thunder rain frost breeze hail fog blizzard rainbow drizzle"),
        words("soaked chilled darkened flooded"),
        words("humid windy icy sunny"),
    ),
    "farm": Topic(
        words("farmer tractor cow wheat barn sheep plough harvest rooster hay"),
        words("milked sowed fed herded"),
        words("fertile rural fat woolly"),
    ),
    "theatre": Topic(
        words("actor stage curtain script audience costume drama director rehearsal mask"),
        words("performed applauded rehearsed staged"),
        words("tragic comic famous dramatic"),
    ),
    "money": Topic(
        words("banker loan profit debt tax invoice budget investor salary dividend"),
        words("borrowed invested audited repaid"),
        words("rich bankrupt cheap costly"),
    ),
    "mountain": Topic(
        words("climber summit glacier cliff ridge avalanche cave trail tent valley"),
        words("climbed reached descended crossed"),
        words("steep rocky snowy alpine"),
    ),
    "computing": Topic(
        words("programmer server keyboard network database screen compiler virus backup password"),
        words("compiled debugged deleted installed"),
        words("digital encrypted faulty obsolete"),
    ),
    "railway": Topic(
        words("conductor locomotive carriage platform signal tunnel timetable luggage passenger bridge"),
        words("boarded derailed delayed whistled"),
        words("express crowded punctual electric"),
    ),
    "sport": Topic(
        words("striker goal referee sprinter coach medal racket tournament defender trophy"),
        words("kicked scored trained defeated"),
        words("athletic fast victorious exhausted"),
    ),
}
