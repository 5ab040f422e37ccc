"""The folder of a dashboard: what it is of, which pages are there, and refusing to mix two."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_RECORD = "dashboard.json"


class Folder:
    """Paths of a dashboard's files.

    Attributes:
        index: The index page.
    """

    def __init__(
        self, folder: str | os.PathLike[str], n_units: int, fingerprint: str, provenance: Mapping[str, Any]
    ) -> None:
        self.folder = Path(folder)
        self.index = self.folder / "index.html"
        self._record = {"format": 1, "fingerprint": fingerprint, "provenance": dict(provenance)}
        self._width = len(str(max(n_units - 1, 0)))

    def page(self, unit: int) -> Path:
        return self.folder / "latents" / f"{unit:0{self._width}d}.html"

    def pages(self) -> list[int]:
        """Units that have a page."""
        return sorted(
            int(path.stem)
            for path in (self.folder / "latents").glob("*.html")
            if path.stem.isdecimal() and len(path.stem) == self._width
        )

    def claim(self, overwrite: bool) -> None:
        """Make the folder this dashboard's, or refuse."""
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file; expected a folder")
        record = self.folder / _RECORD
        if record.is_file():
            try:
                before = json.loads(record.read_text(encoding="utf-8"))
                same = before["fingerprint"] == self._record["fingerprint"]
                known = before["provenance"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{record} is damaged or was not written by a dashboard: {error!r}") from error
            if same:
                return
            if not overwrite:
                raise ValueError(
                    f"{self.folder} holds a dashboard of {known.get('hook')} of {known.get('model')} on "
                    f"{known.get('n_tokens')} tokens, with other activations or settings; choose another folder, or "
                    f"overwrite=True, which removes its pages"
                )
            for unit in (self.folder / "latents").glob("*.html"):
                if unit.stem.isdecimal():
                    unit.unlink()
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty and holds no dashboard; choose another folder")
        from interp.plotting.export import write_text

        write_text(record, json.dumps(self._record, indent=1) + "\n")
