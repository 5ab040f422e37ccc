"""Prompts: pairs of clean and corrupted prompts, aligned token for token, for every task of the workbench.

`Prompts` holds token ids, answers and named positions; `from_text` makes them from one's own strings; each task has a generator
`task(bridge, n=64, seed=0, *, options) -> Prompts`.
"""

from __future__ import annotations

from interp.prompts._from_text import from_text, groups_from_text
from interp.prompts._prompts import Prompts, concatenate

__all__ = ["Prompts", "concatenate", "from_text", "groups_from_text"]
