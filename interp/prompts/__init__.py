"""Prompts: pairs of clean and corrupted prompts, aligned token for token, for every task of the workbench.

`Prompts` holds token ids, answers and named positions; `from_text` makes them from one's own strings. Each task has a
generator `task(bridge, n=64, seed=0, *, options) -> Prompts`. For a tinyworld model it speaks tinyworld, and by default
asks only what the models never saw; for any other tokenizer it writes English and uses only words that are single
tokens there. The same seed gives the same prompts in every process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from interp.prompts._agreement import agreement
from interp.prompts._docstring import docstring
from interp.prompts._facts import facts, two_hop
from interp.prompts._from_text import from_text, groups_from_text
from interp.prompts._greater_than import greater_than
from interp.prompts._induction import induction, repeated_tokens
from interp.prompts._ioi import ioi
from interp.prompts._needle import needle
from interp.prompts._prompts import Prompts, concatenate
from interp.prompts._pronoun import pronoun
from interp.prompts._recall import recall

TASKS: Mapping[str, Callable[..., Prompts]] = MappingProxyType(
    {
        task.__name__: task
        for task in (ioi, greater_than, agreement, facts, two_hop, pronoun, induction, needle, docstring)
    }
)
"""Every task by its name, for loops over all of them."""

__all__ = [
    "TASKS",
    "Prompts",
    "agreement",
    "concatenate",
    "docstring",
    "facts",
    "from_text",
    "greater_than",
    "groups_from_text",
    "induction",
    "ioi",
    "needle",
    "pronoun",
    "recall",
    "repeated_tokens",
    "two_hop",
]
