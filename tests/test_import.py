"""`import interp` is cheap and pulls in nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import interp

HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "xarray", "numpy", "plotly", "matplotlib")

SCRIPT = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
{statement}
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""


def imported(statement: str) -> tuple[float, set[str]]:
    """Seconds that a statement takes in a fresh interpreter, and the modules that it loads."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(statement=statement)], capture_output=True, text=True, check=True
    )
    seconds, modules = json.loads(done.stdout)
    return seconds, set(modules)


@pytest.mark.parametrize("statement", ["import interp", "import interp.cli", "import interp, interp.notebook"])
def test_import_is_light(statement: str) -> None:
    runs = [imported(statement) for _ in range(3)]
    assert "interp" in runs[0][1]
    loaded = [name for name in HEAVY if name in runs[0][1]]
    assert not loaded, f"{statement} loads {loaded}"
    # The fastest of three: what is measured is the package and not what else the machine does.
    assert min(seconds for seconds, _ in runs) < 0.3


def test_listing_the_studies_needs_no_model_code() -> None:
    _, modules = imported("import interp.studies")
    assert not {"torch", "transformers", "nbclient"} & modules


def test_import_leaves_plotly_alone() -> None:
    code = (
        "import plotly.io as pio; before = pio.templates.default, pio.renderers.default\n"
        "import interp, interp.plotting, interp.notebook\n"
        "assert (pio.templates.default, pio.renderers.default) == before\n"
        "interp.notebook.setup()\n"
        "assert pio.renderers.default == 'interp' and pio.templates.default == before[0]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    assert set(interp.__all__) <= set(dir(interp))
    for name in interp.__all__:
        assert getattr(interp, name) is not None


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="load_model"):
        interp.load_modle  # noqa: B018


@pytest.mark.parametrize("package", ["attention", "dictionaries", "models", "neurons"])
def test_every_lazy_name_is_there_and_not_hidden_by_its_module(package: str) -> None:
    module = getattr(interp, package)
    assert set(module._HOMES) == set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
        # importing `package.module` would put the module where the name is looked up
        assert module._HOMES[name].rsplit(".", 1)[-1] != name
