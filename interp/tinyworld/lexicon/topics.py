"""Topics: each with its own nouns, past-tense verbs and adjectives. A new topic is one entry."""

from __future__ import annotations

from typing import NamedTuple


class Topic(NamedTuple):
    """The words that belong to one topic and to no other."""

    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]


def _topic(nouns: str, verbs: str, adjectives: str) -> Topic:
    return Topic(tuple(nouns.split()), tuple(verbs.split()), tuple(adjectives.split()))


TOPICS: dict[str, Topic] = {
    "sea": _topic("sailor anchor wave captain whale reef sail tide cargo lighthouse", "steered hoisted sank towed", "salty stormy deep coastal"),
    "kitchen": _topic("cook oven soup flour butter onion spoon recipe pepper dough", "stirred baked tasted chopped", "spicy sweet roasted crisp"),
    "music": _topic("violin singer drum melody choir piano concert flute chorus trumpet", "played tuned composed hummed", "loud gentle rhythmic solemn"),
    "law": _topic("judge lawyer court witness verdict trial jury statute prisoner contract", "accused sentenced defended acquitted", "guilty legal innocent unjust"),
    "garden": _topic("gardener rose tulip hedge soil lawn weed petal fountain orchid", "planted watered trimmed picked", "leafy fragrant muddy wild"),
    "school": _topic("pupil lesson exam chalk desk essay grammar homework tutor classroom", "taught graded copied studied", "clever lazy diligent curious"),
    "space": _topic("rocket planet astronaut comet orbit telescope moon galaxy satellite crater", "launched orbited observed explored", "distant lunar weightless cosmic"),
    "medicine": _topic("doctor nurse patient fever pill vaccine surgeon wound clinic symptom", "healed treated examined prescribed", "sick healthy contagious feverish"),
    "weather": _topic("cloud thunder rain frost breeze hail fog blizzard rainbow drizzle", "soaked chilled darkened flooded", "humid windy icy sunny"),
    "farm": _topic("farmer tractor cow wheat barn sheep plough harvest rooster hay", "milked sowed fed herded", "fertile rural fat woolly"),
    "theatre": _topic("actor stage curtain script audience costume drama director rehearsal mask", "performed applauded rehearsed staged", "tragic comic famous dramatic"),
    "money": _topic("banker loan profit debt tax invoice budget investor salary dividend", "borrowed invested audited repaid", "rich bankrupt cheap costly"),
    "mountain": _topic("climber summit glacier cliff ridge avalanche cave trail tent valley", "climbed reached descended crossed", "steep rocky snowy alpine"),
    "computing": _topic("programmer server keyboard network database screen compiler virus backup password", "compiled debugged deleted installed", "digital encrypted faulty obsolete"),
    "railway": _topic("conductor locomotive carriage platform signal tunnel timetable luggage passenger bridge", "boarded derailed delayed whistled", "express crowded punctual electric"),
    "sport": _topic("striker goal referee sprinter coach medal racket tournament defender trophy", "kicked scored trained defeated", "athletic fast victorious exhausted"),
}  # fmt: skip
