"""What the pages of a dashboard show, and how much of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from interp.dictionaries._dashboard_contexts import Facets


@dataclass(frozen=True)
class Options:
    """What pages show, and how much of it."""

    facets: Facets
    n_contexts: int
    n_tokens: int
    n_neighbours: int
    window: tuple[int, int]
    seed: int

    def check(self, labelled: bool) -> None:
        if self.facets not in get_args(Facets):
            raise ValueError(f"facets={self.facets!r}; expected one of {', '.join(get_args(Facets))}")
        if self.facets == "label" and not labelled:
            raise ValueError("facets='label' needs labels; see interp.dictionaries.label_masks")
        for name in ("n_contexts", "n_tokens", "n_neighbours"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        if len(self.window) != 2 or min(self.window) < 0:
            raise ValueError(f"window={self.window}; expected two numbers of tokens, before and after, from 0")

    def record(self) -> dict[str, Any]:
        return {**vars(self), "window": list(self.window)}
