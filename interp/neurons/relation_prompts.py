"""Prompts about relations, in two halves that share no entity: one to find neurons with, one to test them on."""

from __future__ import annotations

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch

from interp import prompts as tasks
from interp.prompts import Prompts
from interp.tinyworld import is_tinyworld
from interp.tinyworld.families.facts import bridge_country

Relation = Literal["capital", "language", "currency", "country", "landmark"]
Sets = dict[str, tuple[Prompts, ...]]


def distinct_facts(
    bridge: Any, relations: Sequence[Relation] = get_args(Relation), *, n: int = 400, seed: int = 0
) -> Sets:
    """Every fact that `prompts.facts` can ask, once per wording: relation to one `Prompts` per wording.

    For a tinyworld model both splits are asked (all facts were learned, some in other wordings); label `country` holds
    the country that a fact is about, which a capital or a landmark stands for.

    Args:
        n: Questions drawn per wording and split, in which subjects repeat; each subject is then kept once. More finds
            all of them.

    Raises:
        ValueError: If a relation is unknown, or cannot be asked in single tokens of this model's tokenizer.
    """
    unknown = [relation for relation in relations if relation not in get_args(Relation)]
    if unknown or not relations:
        raise ValueError(f"relations={list(relations)}; expected some of {', '.join(get_args(Relation))}")
    splits: tuple[Any, ...] = ("train", "heldout") if is_tinyworld(bridge.tokenizer) else (None,)
    found: Sets = {}
    for relation in relations:
        drawn: dict[int, list[Prompts]] = {}
        why: Exception | None = None
        for template in range(8):
            for split in splits:
                try:
                    some = tasks.facts(bridge, n, seed, relation=relation, template=template, split=split)
                except ValueError as error:  # no such wording, or too few subjects left in this split
                    why = error
                    continue
                drawn.setdefault(template, []).append(_once(some))
        if not drawn:
            raise ValueError(f"no {relation} questions for this tokenizer; make Prompts of your own") from why
        found[relation] = tuple(_with_country(_once(tasks.concatenate(*parts))) for parts in drawn.values())
    return found


def split_entities(
    prompts: Mapping[str, Sequence[Prompts]], *, by: str = "country", share: float = 0.5,
    wordings: Literal["shared", "disjoint"] = "disjoint", seed: int = 0,
) -> tuple[Sets, Sets]:  # fmt: skip
    """Two halves of labelled prompts: no entity is in both, in any label; by default no wording either.

    Args:
        by: The label of the prompts that names the entity.
        share: Share of the entities in the first half.
        wordings: `"disjoint"`: the first half takes every other of a label's `Prompts`, starting with the first, the
            second half the rest, so that neurons which know a wording do not pass for neurons which know a relation.
            `"shared"`: both halves are asked in all wordings.

    Raises:
        ValueError: If prompts do not carry the label, or a half would be empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}; expected a number between 0 and 1")
    if wordings not in ("shared", "disjoint"):
        raise ValueError(f'wordings={wordings!r}; expected "shared" or "disjoint"')
    entities: dict[Hashable, None] = {}
    for label, sets in prompts.items():
        for one in sets:
            if by not in one.labels:
                raise ValueError(f"the prompts of {label!r} are labelled {sorted(one.labels)}, not with {by!r}")
            entities |= dict.fromkeys(one.labels[by])
        if wordings == "disjoint" and len(sets) < 2:
            raise ValueError(f"{label!r} has {len(sets)} wordings; disjoint ones need two. Use wordings='shared'")
    order = sorted(entities, key=str)
    random.Random(seed).shuffle(order)
    first = set(order[: round(share * len(order))])
    halves: tuple[Sets, Sets] = ({}, {})
    for label, sets in prompts.items():
        for half in range(2):
            kept = []
            for number, one in enumerate(sets):
                rows = [i for i, entity in enumerate(one.labels[by]) if (entity in first) == (half == 0)]
                if rows and (wordings == "shared" or number % 2 == half):
                    kept.append(one[rows])
            if not kept:
                raise ValueError(f"{label!r} has no examples left in one half; change share={share} or seed={seed}")
            halves[half][label] = tuple(kept)
    return halves


def _once(prompts: Prompts) -> Prompts:
    """Each subject's first example."""
    rows = {subject: row for row, subject in reversed(list(enumerate(prompts.labels["subject"])))}
    return prompts[torch.tensor(sorted(rows.values()))]


def _with_country(prompts: Prompts) -> Prompts:
    countries = [_country(subject) for subject in prompts.labels["subject"]]
    return replace(prompts, labels={**prompts.labels, "country": countries})


def _country(subject: str) -> str:
    try:
        return bridge_country(subject)
    except KeyError:  # not in the table: it stands for itself
        return subject
