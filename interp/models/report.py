"""The result of a self-check: rows, a verdict, one line and a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd

Status = Literal["ok", "warn", "fail", "skip"]


@dataclass(frozen=True)
class CheckRow:
    """One check: what was looked at, how it stands, the number or finding, and what it means."""

    name: str
    status: Status
    value: str
    detail: str


@dataclass(frozen=True)
class CheckReport:
    """What `self_check` found. `str(report)` is the whole table, `report.summary` one line."""

    model: str
    rows: tuple[CheckRow, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """No check failed. Warnings and skipped checks do not count."""
        return all(row.status != "fail" for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: model, family, verdict, and the names of the rows that are not as they should be."""
        by_name = {row.name: row for row in self.rows}
        facts = [by_name[name].value for name in ("family", "weights") if name in by_name]
        failed = [row.name for row in self.rows if row.status == "fail"]
        doubtful = [f"{row.name} ({row.value})" for row in self.rows if row.status == "warn"]
        verdict = f"FAILED: {', '.join(failed)}" if failed else "ok"
        if "logits" in by_name and by_name["logits"].status == "ok":
            facts.append(f"log-probabilities as in transformers (difference {by_name['logits'].value})")
        notes = f"; note: {', '.join(doubtful)}" if doubtful else ""
        more = "" if self.ok else " (see print(interp.self_check(bridge)))"
        return f"{self.model}: {'; '.join(facts)}; self-check {verdict}{notes} [{self.seconds:.1f} s]{more}"

    def to_dataframe(self) -> pd.DataFrame:
        """One row per check: name, status, value, detail."""
        return pd.DataFrame([vars(row) for row in self.rows], columns=["name", "status", "value", "detail"])

    def __str__(self) -> str:
        wide = max((len(row.name) for row in self.rows), default=0)
        value = min(max((len(row.value) for row in self.rows), default=0), 44)
        lines = [f"{row.status:4}  {row.name:{wide}}  {row.value:{value}}  {row.detail}".rstrip() for row in self.rows]
        return "\n".join(
            [f"self-check of {self.model}: {'ok' if self.ok else 'FAILED'} ({self.seconds:.1f} s)", *lines]
        )
