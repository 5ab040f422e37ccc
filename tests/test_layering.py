"""A module imports only from the rooms above its own. Ruff holds it in the editor, this file holds ruff to it."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import interp

ROOT = Path(interp.__file__).resolve().parents[1]

ORDER: list[set[str]] = [
    {"types"},
    {"metrics", "stats"},
    {"results"},
    {"prompts", "tinyworld"},
    {"models", "hooks"},
    {"cache"},
    {"patching", "dictionaries", "attention", "neurons"},
    {"cli", "studies", "notebook"},
]
"""Rooms from top to bottom; plotting stands beside them and is handled on its own."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
PLOTTING_SEES = {"types", "metrics", "stats", "results"}
LENS = {"models", "hooks"}  # who may know TransformerLens
DRAWS = {"results", "models", "hooks", "cache", "patching", "dictionaries", "attention", "neurons"}  # in .plot() only
EDGE = ORDER[-1]
PACKAGES = sorted(path.parent.name for path in ROOT.glob("interp/*/__init__.py"))


def room_of(module: str) -> str | None:
    """The room of `interp.ROOM.anything`; the functions of `interp` itself come from models."""
    parts = module.split(".")
    if parts[0] != "interp" or len(parts) == 1:
        return None
    room = "models" if parts[1] in interp._FUNCTIONS else parts[1]
    return room if room in LEVEL or room == "plotting" else None


def allowed(importer: str, imported: str, *, inside_function: bool) -> bool:
    if importer == imported:
        return True
    if importer == "plotting":
        return imported in PLOTTING_SEES
    if imported == "plotting":
        return importer in EDGE or (inside_function and importer in DRAWS)
    return LEVEL[imported] <= LEVEL[importer]


def imports(source: str) -> list[tuple[str, bool]]:
    """(module, whether inside a function) of every import that runs; those for type checkers only do not."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.extend((f"{node.module}.{alias.name}", inside) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "interp":
            found.append((f"interp.{node.attr}", inside))
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), False)
    return found


def violations(path: Path) -> list[str]:
    importer = path.relative_to(ROOT / "interp").parts[0].removesuffix(".py")
    if importer == "__init__":
        return []
    found = []
    for module, inside in imports(path.read_text(encoding="utf-8")):
        room = room_of(module)
        if room is not None and not allowed(importer, room, inside_function=inside):
            found.append(f"{path.relative_to(ROOT)} imports {module}")
        tool = inside and module.startswith("transformer_lens.tools.")  # public and model-free, such as sparse probing
        if module.split(".")[0] == "transformer_lens" and importer not in LENS and not tool:
            found.append(f"{path.relative_to(ROOT)} imports {module}")
    return found


def test_every_module_imports_only_from_above() -> None:
    paths = sorted(ROOT.glob("interp/**/*.py"))
    assert len(paths) > 20
    rooms = {path.relative_to(ROOT / "interp").parts[0].removesuffix(".py") for path in paths} - {"__init__"}
    assert rooms <= {*LEVEL, "plotting"}, f"rooms without a place in the order: {rooms - {*LEVEL, 'plotting'}}"
    assert [line for path in paths for line in violations(path)] == []


def test_the_walker_sees_every_kind_of_import() -> None:
    source = (
        "import interp.models\nfrom interp import plotting\nfrom interp.cache.store import X\nimport interp\n"
        "def f():\n    import transformer_lens.patching\n    return interp.load_model\n"
        "if TYPE_CHECKING:\n    import interp.hooks\n"
    )
    assert imports(source) == [
        ("interp.models", False),
        ("interp.plotting", False),
        ("interp.cache.store.X", False),
        ("interp", False),
        ("transformer_lens.patching", True),
        ("interp.load_model", True),
    ]
    assert room_of("interp.load_model") == "models"


def banned(filename: str, modules: list[str], *, inside_function: bool) -> set[str]:
    """The modules whose import ruff refuses in this file."""
    indent = "    " if inside_function else ""
    lines = [f"{indent}import {module}" for module in modules]
    source = "\n".join((["def f():"] if inside_function else []) + lines) + "\n"
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251,TID253", "--output-format", "json"]
        + ["--stdin-filename", filename, "-"],
        input=source, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    messages = (error["message"] for error in json.loads(done.stdout))
    return {re.findall(r"`([^`]+)`", message)[0] for message in messages}


MODULES = ["transformer_lens", *(f"interp.{room}" for room in sorted({*LEVEL, "plotting"}))]


@pytest.mark.parametrize("importer", [*PACKAGES, "metrics"])
@pytest.mark.parametrize("inside_function", [False, True])
def test_ruff_bans_what_the_order_forbids(importer: str, inside_function: bool) -> None:
    filename = f"interp/{importer}/new.py" if importer in PACKAGES else f"interp/{importer}.py"
    expected = {
        f"interp.{room}"
        for room in {*LEVEL, "plotting"}
        if not allowed(importer, room, inside_function=inside_function)
        and not (importer == "metrics" and room in {"metrics", "stats", "results", "types"})  # one list for interp/*.py
    }
    expected |= set() if importer in LENS else {"transformer_lens"}
    if importer == "metrics" and inside_function:
        expected.discard("interp.plotting")  # results, beside it, may draw
    assert banned(filename, MODULES, inside_function=inside_function) == expected


def test_ruff_leaves_tests_and_experiments_free() -> None:
    for filename in ("tests/test_new.py", "experiments/new.py"):
        assert banned(filename, MODULES, inside_function=False) == set()


@pytest.mark.parametrize("name", ["Optional", "Union", "List", "Dict"])
def test_ruff_refuses_old_typing(name: str) -> None:
    source = f"from __future__ import annotations\n\nfrom typing import {name}\n\nx: {name}[int, str]\n"
    for filename in ("interp/cache/new.py", "tests/test_new.py"):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", "check", "-q", "--stdin-filename", filename, "-"],
            input=source, capture_output=True, text=True, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == 1
        assert re.search(r"UP0(06|07|35|45)|TID251", done.stdout)
