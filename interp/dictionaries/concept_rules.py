"""Rules over concepts and what follows from them: forward chaining to the fixpoint, with a proof of each conclusion."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Rule:
    """`head` holds of a text where all of `body` hold and none of `unless` does.

    Example:
        >>> str(Rule({"Egypt", "asks for the language"}, "Arabic"))
        'Egypt & asks for the language -> Arabic'
    """

    body: Collection[str]
    head: str
    name: str = ""
    unless: Collection[str] = ()

    def __post_init__(self) -> None:
        for part in ("body", "unless"):
            given = getattr(self, part)
            if isinstance(given, str):
                raise ValueError(f"{part}={given!r} is one string; give the names of concepts: {{{given!r}}}")
            object.__setattr__(self, part, frozenset(map(str, given)))
        if not self.body and not self.unless:
            raise ValueError(f"the rule for {self.head!r} has no body: it would hold of every text; give it as a fact")
        if both := sorted(set(self.body) & set(self.unless)):
            raise ValueError(f"the rule for {self.head!r} asks for {both} and against them: it can never fire")

    def __str__(self) -> str:
        premises = [*sorted(self.body), *(f"not {concept}" for concept in sorted(self.unless))]
        return f"{' & '.join(premises)} -> {self.head}"


@dataclass(frozen=True, eq=False, repr=False)
class Reasoning(Result):
    """What holds of each text, and why.

    `values` is bool (text, concept): the closure of what was given under the rules.

    Attributes:
        given: (text, concept), bool: what was known without rules.
        rule: (text, concept): the number of the rule in `rules` that derived a concept; -1 where none did.
        round: (text, concept): 0 where given, from 1 the round in which it was derived, -1 where it does not hold.
        rules: The rules as plain values, in their own order; see `rule_list`.
    """

    given: xr.DataArray
    rule: xr.DataArray
    round: xr.DataArray
    rules: list[dict[str, Any]]

    def __repr__(self) -> str:
        n, derived = len(self.values), int((self.round > 0).sum())
        return f"Reasoning({n} texts, {len(self.rules)} rules: {int(self.given.sum())} given, {derived} derived)"

    def rule_list(self) -> list[Rule]:
        """The rules, as `rule` counts them."""
        return [Rule(**rule) for rule in self.rules]

    def holds(self, text: int = 0) -> list[str]:
        """The concepts that hold of a text, given ones first, then in the order of derivation."""
        rounds = self.round.isel(text=text).values
        order = np.argsort(rounds, kind="stable")
        return [str(self.values["concept"].values[i]) for i in order if rounds[i] >= 0]

    def single(self, concepts: Iterable[str]) -> list[str | None]:
        """For every text the one of these concepts that holds; None where none or several do. See `steer_by_concept`.

        Raises:
            KeyError: If a concept is in no column.
        """
        names = [self._known(concept) for concept in dict.fromkeys(concepts)]
        held = self.values.sel(concept=names).values
        return [names[int(row.argmax())] if row.sum() == 1 else None for row in held]

    def proof(self, concept: str, text: int = 0) -> list[Rule]:
        """The rules that derive a concept of a text, premises before conclusions; empty for what was given.

        Raises:
            KeyError: If there is no such concept. ValueError: If it does not hold of this text.
        """
        here, rules = self.rule.isel(text=text), self.rule_list()
        if not bool(self.values.isel(text=text).sel(concept=self._known(concept))):
            raise ValueError(
                f"{concept!r} does not hold of text {text}; what does: {', '.join(self.holds(text)) or '-'}"
            )
        steps: list[int] = []

        def visit(wanted: str) -> None:
            number = int(here.sel(concept=wanted))
            if number >= 0 and number not in steps:
                for premise in sorted(rules[number].body):  # derived in earlier rounds: this ends
                    visit(premise)
                steps.append(number)

        visit(concept)
        return [rules[number] for number in steps]

    def explain(self, concept: str, text: int = 0) -> str:
        """The proof as lines to read."""
        steps = self.proof(concept, text)
        used = {premise for rule in steps for premise in rule.body} - {rule.head for rule in steps}
        lines = [f"given: {', '.join(sorted(used)) or concept}"]
        return "\n".join([*lines, *(f"{rule}{f'  ({rule.name})' if rule.name else ''}" for rule in steps)])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per text and concept that holds of it: `text, concept, round, rule`, the rule as text."""
        import pandas as pd

        rules, rounds, which = self.rule_list(), self.round.values, self.rule.values
        rows = [
            (int(t), name, int(rounds[i, c]), str(rules[which[i, c]]) if which[i, c] >= 0 else "given")
            for i, t in enumerate(self.values["text"].values)
            for c, name in sorted(enumerate(map(str, self.values["concept"].values)), key=lambda at: rounds[i, at[0]])
            if rounds[i, c] >= 0
        ]
        return pd.DataFrame(rows, columns=["text", "concept", "round", "rule"])

    def plot(self, *, concepts: Sequence[str] | None = None, n_texts: int = 40) -> Any:
        """Figure: the round in which each concept came to hold of each of the first texts, grey where it does not.

        Args:
            concepts: Which; by default all that hold of some text shown.
        """
        from interp.plotting import heatmap

        shown = self.round.isel(text=slice(n_texts))
        if concepts is None:
            shown = shown.isel(concept=np.flatnonzero((shown >= 0).any("text").values))
        else:
            shown = shown.sel(concept=[self._known(concept) for concept in concepts])
        return heatmap(
            shown.where(shown >= 0).T, title="When each concept came to hold", signed=False, origin="top",
            unit="round (0: given)",
        )  # fmt: skip

    def _known(self, concept: str) -> str:
        names = list(map(str, self.values["concept"].values))
        if concept not in names:
            near = difflib.get_close_matches(concept, names, 1) or names[:3]
            raise KeyError(f"no concept {concept!r}; did you mean {near[0]!r}? There are {len(names)}")
        return concept


def forward_chain(facts: xr.DataArray | Sequence[Collection[str]], rules: Iterable[Rule]) -> Reasoning:
    """Everything that follows from the facts of each text by the rules, to the fixpoint; all texts at once.

    In every round all rules see what held before it, so the result, proofs included, does not depend on their order: a
    concept is derived in the first round it can be, by the first rule that can, as text. The number of rounds is
    bounded by the number of concepts, cycles or not. Negation (`unless`) is failure to derive, and must be stratified:
    what a rule is barred by is settled before the rule is looked at. Without it more facts never give less.

    Args:
        facts: bool (text, concept), such as `Propositions.read` gives, or one set of concepts per text. Concepts that
            only rules mention are added.

    Raises:
        ValueError: If a rule could never fire, since no fact and no other rule is about a premise (a misspelling; not
            for sets, which name only what is true); if a concept depends on its own negation; or facts are not bool.
    """
    ordered = sorted(set(rules), key=lambda rule: (str(rule), rule.name))
    given, names = _matrix(facts)
    heads = {rule.head for rule in ordered}
    if isinstance(facts, xr.DataArray):
        _check_premises(ordered, {*names, *heads})
    extra = {name for rule in ordered for name in (*rule.body, *rule.unless, rule.head)}
    names = [*names, *sorted(extra - set(names))]
    place = {name: i for i, name in enumerate(names)}
    held = np.zeros((len(given), len(names)), dtype=bool)
    held[:, : given.shape[1]] = given
    known, which = held.copy(), np.full(held.shape, -1, dtype=np.int64)
    rounds, count = np.where(held, 0, -1), 0
    columns = [([place[c] for c in rule.body], [place[c] for c in rule.unless], place[rule.head]) for rule in ordered]
    for stratum in _strata(ordered):
        while True:
            new = np.zeros_like(held)
            for number in stratum:
                body, unless, head = columns[number]
                fires = held[:, body].all(1) & ~held[:, unless].any(1) & ~held[:, head] & ~new[:, head]
                new[fires, head] = True
                which[fires, head] = number
            if not new.any():
                break
            count += 1
            rounds[new] = count
            held |= new
    texts = facts["text"].values if isinstance(facts, xr.DataArray) and "text" in facts.coords else range(len(held))
    coords = {"text": texts, "concept": names}
    arrays = [xr.DataArray(a, dims=("text", "concept"), coords=coords) for a in (held, known, which, rounds)]
    plain = [
        {"body": sorted(r.body), "head": r.head, "name": r.name, "unless": sorted(r.unless)} for r in ordered
    ]  # fmt: skip
    record = {"method": "forward_chain", "n_rules": len(ordered), "rounds": count}
    return Reasoning(arrays[0], record, arrays[1], arrays[2], arrays[3], plain)


def _matrix(facts: xr.DataArray | Sequence[Collection[str]]) -> tuple[np.ndarray, list[str]]:
    if isinstance(facts, xr.DataArray):
        if facts.dims != ("text", "concept") or facts.dtype != np.bool_:
            raise ValueError(f"facts are {facts.dtype} {facts.dims}; expected bool ('text', 'concept')")
        names = list(map(str, facts["concept"].values))
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"concepts {twice[:5]} stand in several columns of the facts; expected one each")
        return facts.values, names
    if isinstance(facts, (str, set, frozenset)) or any(isinstance(text, str) for text in facts):
        raise ValueError("facts are of several texts: give a list with one set of concepts for each")
    names = sorted({str(concept) for text in facts for concept in text})
    return np.array([[name in text for name in names] for text in facts], dtype=bool).reshape(len(facts), -1), names


def _check_premises(rules: Sequence[Rule], known: set[str]) -> None:
    for rule in rules:
        for premise in sorted(set(rule.body) - known):
            near = difflib.get_close_matches(premise, sorted(known), 1)
            raise ValueError(
                f"'{rule}' can never fire: no fact and no rule is about {premise!r}"
                + (f"; did you mean {near[0]!r}?" if near else "; add it to the facts or leave the rule out")
            )


def _strata(rules: Sequence[Rule]) -> list[list[int]]:
    """Numbers of the rules by stratum: what a rule is barred by is derived in earlier ones."""
    level = dict.fromkeys((name for rule in rules for name in (*rule.body, *rule.unless, rule.head)), 0)
    for _ in range(len(level) + 1):
        changed = False
        for rule in rules:
            needed = max([level[c] for c in rule.body] + [level[c] + 1 for c in rule.unless])
            if needed > level[rule.head]:
                level[rule.head], changed = needed, True
        if not changed:
            found = sorted({level[rule.head] for rule in rules})
            return [[i for i, rule in enumerate(rules) if level[rule.head] == stratum] for stratum in found]
    highest = max(level.values())
    caught = sorted(name for name, value in level.items() if value == highest)
    raise ValueError(
        f"{', '.join(map(repr, caught[:4]))} would depend on their own absence: a cycle through 'unless' has no one "
        f"answer. Break the cycle, or give one of them as a fact"
    )
