"""What the README's code names exists, and the blocks that need no data of the reader's own run as they stand."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path

import pytest

import interp
from interp.patching import PoorApproximation, UnstableCircuit

README = Path(interp.__file__).resolve().parents[1] / "README.md"
RUNS = (
    "Ten lines",
    "Every effect from one backward pass, and how far to trust it",
    "Circuits",
    "Feature circuits",
    "Facts",
)


def blocks() -> dict[str, list[str]]:
    """The python blocks below each heading."""
    found: dict[str, list[str]] = {}
    heading = ""
    for part in re.split(r"^## (.+)$", README.read_text(), flags=re.MULTILINE):
        if "\n" not in part:
            heading = part
        elif code := re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL):
            found[heading] = code
    return found


def test_every_name_in_the_blocks_exists() -> None:
    every = "\n".join(code for some in blocks().values() for code in some)
    names = sorted(set(re.findall(r"\binterp(?:\.[A-Za-z_]\w*)+", every)))
    assert len(names) > 40
    missing = []
    for name in names:
        try:
            functools.reduce(getattr, name.split(".")[1:], interp)
        except AttributeError:
            missing.append(name)
    assert not missing


def test_blocks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the blocks that save leave their files
    found = blocks()
    code = "\n".join(block for heading in RUNS for block in found[heading])
    assert code.count("n=64") == 1
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        # 16 prompts instead of 64, the same calls: that they are too few for some answers is said, and right
        for category in (PoorApproximation, UnstableCircuit):
            warnings.simplefilter("ignore", category)
        exec(code.replace("n=64", "n=16"), names)
    assert (tmp_path / "ioi.nc").exists() and (tmp_path / "circuit.json").exists()
