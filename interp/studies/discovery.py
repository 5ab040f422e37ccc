"""Which studies there are, and what each says about itself."""

from __future__ import annotations

import ast
import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Study:
    """A notebook that answers one question.

    Attributes:
        name: File name without its ending, such as `01_activation_patching`.
        question: The paragraph after `**Question.**` in the first cell.
        paper: The paragraph after `**Paper.**`, empty if there is none.
        model: Default of the `MODEL` parameter; None if the notebook has none.
    """

    name: str
    path: Path
    title: str
    question: str
    paper: str
    model: str | None


def studies_dir() -> Path:
    """The folder of the studies: inside the installed package, or `notebooks/` of the checkout.

    Raises:
        FileNotFoundError: If neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "_notebooks", package.parent / "notebooks")
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"no studies: neither {places[0]} nor {places[1]} exists; reinstall the package")


def list_studies(directory: str | os.PathLike[str] | None = None) -> list[Study]:
    """Every notebook of `directory` (the package's own studies by default), in the order of their names."""
    folder = studies_dir() if directory is None else Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} to look for studies in")
    return [read_study(path) for path in sorted(folder.glob("*.ipynb"))]


def find_study(name: str, directory: str | os.PathLike[str] | None = None) -> Study:
    """The study called `name`: `01_activation_patching`, `activation_patching`, `01`, or the path of a notebook.

    Raises:
        ValueError: If no study or more than one has this name; the message lists the near or matching ones.
    """
    path = Path(name)
    if path.suffix == ".ipynb":
        if not path.is_file():
            raise ValueError(f"no notebook at {name!r}")
        return read_study(path)
    studies = list_studies(directory)
    matches = [s for s in studies if name == s.name] or [s for s in studies if name in _short_names(s.name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ValueError(f"{name!r} names {len(matches)} studies: {', '.join(s.name for s in matches)}")
    names = [s.name for s in studies]
    near = difflib.get_close_matches(name, names + [n.partition("_")[2] for n in names], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names) or 'none'}"
    raise ValueError(f"no study {name!r}; {hint}")


def read_study(path: str | os.PathLike[str]) -> Study:
    """What a notebook says about itself; it is not run.

    Raises:
        ValueError: If the file is no notebook or its first cell has no `# Title` or no `**Question.**`.
    """
    path = Path(path)
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        first = source_of(cells[0]) if cells and cells[0]["cell_type"] == "markdown" else ""
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a Jupyter notebook (version 4): {error}") from error
    title = re.search(r"^# +(.+)$", first, re.MULTILINE)
    question = _paragraph(first, "Question")
    if title is None or not question:
        raise ValueError(
            f"{path} does not say what it studies: its first cell must be Markdown with a line '# Title' and a "
            f"paragraph that starts with '**Question.**', but it begins with {first[:60]!r}"
        )
    at = parameters_cell(cells)
    model = None if at is None else _assigned_string(source_of(cells[at]), "MODEL")
    return Study(path.stem, path, title.group(1).strip(), question, _paragraph(first, "Paper"), model)


def parameters_cell(cells: Sequence[Any]) -> int | None:
    """Index of the code cell tagged `parameters`, otherwise of the first that assigns a string to `MODEL`, or None."""
    code = [i for i, cell in enumerate(cells) if cell["cell_type"] == "code"]
    tagged = [i for i in code if "parameters" in cells[i].get("metadata", {}).get("tags", [])]
    assigning = (i for i in code if _assigned_string(source_of(cells[i]), "MODEL") is not None)
    return tagged[0] if tagged else next(assigning, None)


def source_of(cell: Any) -> str:
    """The text of a cell, which the format allows to be a string or a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def python_of(cell: Any) -> str:
    """The text of a code cell as plain Python: lines of IPython magics and shell commands are blanked."""
    return re.sub(r"^[ \t]*[%!].*$", "pass", source_of(cell), flags=re.MULTILINE)


def _paragraph(text: str, label: str) -> str:
    found = re.search(rf"^\*\*{label}\.\*\*\s*(.+?)(?:\n\s*\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found.group(1).split()) if found else ""


def _assigned_string(source: str, name: str) -> str | None:
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of magics; it assigns nothing that we could replace
        return None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            value = node.value
            return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None
    return None


def _short_names(name: str) -> tuple[str, str]:
    number, _, rest = name.partition("_")
    return number, rest
