"""What every task's generator shares: texts with named parts, single-token word lists, templates of one length."""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from interp import tinyworld
from interp.prompts._from_text import from_parts
from interp.prompts._prompts import Prompts
from interp.prompts._tokens import Text, pieces, require_tokenizer, token_strings
from interp.tinyworld import Document, Split

T = TypeVar("T")


@dataclass(frozen=True)
class Pair:
    """One example before tokenisation.

    `answers` and `foils` are strings that follow the prompt; the first of each is the pair that a logit difference
    compares, and all of them are the sets of a probability difference where there are several.
    """

    clean: Text
    corrupted: Text
    answers: Sequence[str]
    foils: Sequence[str]
    labels: Mapping[str, Any] = field(default_factory=dict)


def build(bridge: Any, task: str, seed: int, pairs: Sequence[Pair]) -> Prompts:
    """Tokenise examples and check them against the model."""
    labels = {key: [pair.labels[key] for pair in pairs] for key in pairs[0].labels}
    prompts = from_parts(
        bridge,
        [pair.clean for pair in pairs],
        [pair.corrupted for pair in pairs],
        [pair.answers[0] for pair in pairs],
        [pair.foils[0] for pair in pairs],
        labels=labels,
        name=task,
        seed=seed,
    )
    if all(len(pair.answers) == len(pair.foils) == 1 for pair in pairs):
        return prompts
    tokenizer = require_tokenizer(bridge)
    known: dict[str, int] = {}
    for word in {word for pair in pairs for word in (*pair.answers, *pair.foils)}:
        ids = pieces(tokenizer, word)
        if len(ids) != 1:
            raise ValueError(f"{task}: {word!r} is {len(ids)} tokens, so it cannot be one of many right answers")
        known[word] = ids[0]
    return replace(
        prompts,
        answer_sets=tuple(tuple(known[word] for word in pair.answers) for pair in pairs),
        foil_sets=tuple(tuple(known[word] for word in pair.foils) for pair in pairs),
        strings={**prompts.strings, **token_strings(tokenizer, known.values())},
    )


def fill(template: str, **slots: str) -> Text:
    """An English template with its `{slots}` filled; every slot is a named part of the text."""
    text, spans = "", {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            spans[name] = (len(text), len(text) + len(slots[name]))
            text += slots[name]
    return Text(text, spans)


def joined(*texts: Text) -> Text:
    """Texts one after another, as they are; a part keeps the name it had, the last of several with one name."""
    text, spans = "", {}
    for part in texts:
        spans |= {name: (len(text) + start, len(text) + end) for name, (start, end) in part.spans.items()}
        text += part.text
    return Text(text, spans)


def document_text(
    document: Document, stop: int, parts: Mapping[str, int], words: Mapping[int, str] | None = None
) -> Text:
    """The first `stop` words of a tinyworld document as text, with named parts given by word index.

    Args:
        words: Words to put in place of the document's own, by index.
    """
    changed = [(words or {}).get(i, word) for i, word in enumerate(document.words[:stop])]
    starts = [0]
    for word in changed:
        starts.append(starts[-1] + len(word) + 1)
    return Text(" ".join(changed), {key: (starts[i], starts[i] + len(changed[i])) for key, i in parts.items()})


def is_world(bridge: Any) -> bool:
    """Whether the model speaks tinyworld."""
    return tinyworld.is_tinyworld(require_tokenizer(bridge))


def world_split(task: str, split: Split | None, *, world: bool) -> Split:
    """The split to draw from, `"heldout"` unless asked; refused where there is none."""
    if split not in (None, "train", "heldout"):
        raise ValueError(f"split must be 'train', 'heldout' or None, got {split!r}")
    if split is not None and not world:
        raise ValueError(
            f"split={split!r} is a tinyworld option: nothing is known of what this model was trained on. "
            f"Leave it out of {task}()"
        )
    return split or "heldout"


def check_n(task: str, n: int) -> None:
    if n < 1:
        raise ValueError(f"{task}() was asked for n={n} examples; n must be at least 1")


def choose(what: str, value: T | None, options: Iterable[T]) -> list[T]:
    """All options, or the given one; refuses what is not an option."""
    options = list(options)
    if value is None:
        return options
    if value not in options:
        raise ValueError(f"{what}={value!r} is not one of {options}")
    return [value]


def single_tokens(bridge: Any, words: Iterable[str]) -> list[str]:
    """The words that are one token each after another word, in order."""
    tokenizer = require_tokenizer(bridge)
    frame = pieces(tokenizer, "the")
    kept = []
    for word in words:
        ids = pieces(tokenizer, f"the {word}")
        if len(ids) == len(frame) + 1 and ids[: len(frame)] == frame and ids[-1] != tokenizer.unk_token_id:
            kept.append(word)
    return kept


def too_few(bridge: Any, task: str, what: str, kept: int, given: int, needed: int) -> ValueError:
    return ValueError(
        f"{task} needs at least {needed} {what} that are single tokens of this tokenizer (vocabulary of "
        f"{len(bridge.tokenizer)}), but only {kept} of {given} are. prompts.induction works with any tokenizer, and "
        "prompts.from_text takes one's own strings"
    )


def require(bridge: Any, task: str, what: str, words: Sequence[str], needed: int) -> list[str]:
    """The single-token words of a list, if there are enough."""
    kept = single_tokens(bridge, words)
    if len(kept) < needed:
        raise too_few(bridge, task, what, len(kept), len(words), needed)
    return kept


def of_one_length(bridge: Any, templates: Sequence[T], render: Callable[[T], Text]) -> list[T]:
    """The templates whose prompts have the commonest length in tokens (on a tie the first), to share a batch."""
    lengths = [len(pieces(require_tokenizer(bridge), render(template).text)) for template in templates]
    wanted = Counter(lengths).most_common(1)[0][0]
    return [template for template, length in zip(templates, lengths, strict=True) if length == wanted]


def generator(task: str, seed: int) -> random.Random:
    """The source of every choice of a task; a string seed is hashed by SHA-512, so it is the same in every process."""
    return random.Random(f"interp.prompts {task} {seed}")
