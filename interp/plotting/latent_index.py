"""All units of a dictionary as one self-contained HTML table: sorted and searched in the page, ten thousand rows."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from interp.plotting.export import write_text
from interp.plotting.style import visible_token

_PAGE = Path(__file__).with_name("latent_index.html")
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"

Kind = Literal["number", "text", "label", "words", "bars"]


@dataclass(frozen=True)
class Column:
    """A column of the index. `kind`: `"number"` (NaN is shown as a dash), `"text"`, `"label"` (text with few values),
    `"words"` (lists of tokens) or `"bars"` (lists of counts)."""

    key: str
    title: str
    kind: Kind
    help: str


@dataclass(frozen=True, eq=False, repr=False)
class LatentIndex:
    """One row per unit; shows itself in a notebook.

    Attributes:
        title: Heading of the page.
        facts: Headline numbers, (what, value).
        columns: What there is; `unit` is the first.
        frame: One row per unit and one column per `Column`, by key.
        sort: The column that is sorted by at first, and whether the largest stand first.
        provenance: The model and the settings, (what, value).
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    columns: tuple[Column, ...]
    frame: pd.DataFrame
    sort: tuple[str, bool]
    provenance: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        return f"LatentIndex({len(self.frame)} units; {self.title!r})"

    def html(self, *, pages: Collection[int] | None = None, folder: str = "latents/") -> str:
        """The page. `pages` are the units that have a page in `folder`, from here; their rows become links."""
        words: dict[str, int] = {}  # each token once in the page
        labels: dict[str, int] = {}
        values: dict[str, list[Any]] = {}
        for column in self.columns:
            given = self.frame[column.key].tolist()
            if column.kind == "number":
                values[column.key] = [_rounded(value) for value in given]
            elif column.kind == "words":
                values[column.key] = [[words.setdefault(str(word), len(words)) for word in some] for some in given]
            elif column.kind == "label":
                known = [None if not isinstance(one, str) else labels.setdefault(one, len(labels)) for one in given]
                values[column.key] = [-1 if one is None else one for one in known]
            elif column.kind == "bars":
                values[column.key] = [_bars(np.asarray(counts)) for counts in given]
            else:
                values[column.key] = [str(value) for value in given]
        keys = [column.key for column in self.columns]
        data = {
            "n": len(self.frame),
            "facts": self.facts,
            "provenance": self.provenance,
            "columns": [vars(column) for column in self.columns],
            "sort": self.sort,
            "values": values,
            "words": [visible_token(word) for word in words],
            "labels": list(labels),
            "linked": "name" if "name" in keys else "unit",
            "alive": "density" if "density" in keys else keys[0],
            "pages": None if pages is None else sorted(map(int, pages)),
            "folder": folder,
            "width": name_width(len(self.frame)),
        }
        # Inside <script>, only these characters could end the element or start markup.
        text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
        text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
        page = _PAGE.read_text(encoding="utf-8").replace("{{title}}", html.escape(self.title))
        return page.replace("{{data}}", text)  # last: a token may look like a placeholder

    def _repr_html_(self) -> str:
        """The page inside a frame of its own."""
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" loading="lazy" '
            f'style="width:100%;height:640px;border:1px solid #ddd" srcdoc="{html.escape(self.html())}"></iframe>'
        )

    def save_html(
        self, path: str | os.PathLike[str], *, pages: Collection[int] | None = None, folder: str = "latents/"
    ) -> Path:
        """Write the page; the file is there whole or not at all."""
        return write_text(path, self.html(pages=pages, folder=folder))


def name_width(n: int) -> int:
    """Digits in the file names of `n` pages, so that they sort by number."""
    return len(str(max(n - 1, 0)))


def _rounded(value: float | int) -> float | int | None:
    if isinstance(value, float):
        if not np.isfinite(value):
            return None
        value = float(f"{value:.4g}")
        return int(value) if value.is_integer() else value
    return int(value)


def _bars(counts: np.ndarray) -> str:
    """Heights of a small histogram as one character each, on a logarithmic scale; a single token is still seen."""
    if not len(counts) or not counts.max():
        return ""
    heights = np.log10(counts.clip(1)) + 0.35
    scaled = np.where(counts > 0, np.ceil(heights / heights.max() * 35), 0).astype(int)
    return "".join(_DIGITS[height] for height in scaled)
