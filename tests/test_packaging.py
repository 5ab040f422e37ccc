"""What is installed is what was tested, and the wheel carries the models and the studies."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import interp

ROOT = Path(interp.__file__).resolve().parents[1]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def required() -> list[Requirement]:
    return [Requirement(line) for line in metadata.requires("interp") or []]


def test_every_dependency_is_pinned_on_every_python(pins: list[Requirement]) -> None:
    assert len(required()) > 20
    for requirement in required():
        for python in PYTHONS:
            environment = {"python_version": python, "python_full_version": f"{python}.1"}
            found = [
                pin
                for pin in pins
                if canonicalize_name(pin.name) == canonicalize_name(requirement.name)
                and (pin.marker is None or pin.marker.evaluate(environment))
            ]
            assert len(found) == 1, f"{requirement.name} on Python {python}: {list(map(str, found))}"
            version = str(found[0].specifier).removeprefix("==")
            assert requirement.specifier.contains(version), f"{requirement} but {found[0]}"


def test_constraints_name_versions_and_no_places(pins: list[Requirement]) -> None:
    for pin in pins:
        assert pin.url is None
        assert re.fullmatch(r"==[^+*,]+", str(pin.specifier)), f"{pin} is not one version that any index has"
    named = {pin.name: str(pin.specifier) for pin in pins}
    assert named["torch"] == "==2.13.0"
    assert named["transformer-lens"] == "==4.3.0"
    assert "://" not in (ROOT / "constraints.txt").read_text()


def test_this_environment_has_the_pinned_versions(pins: list[Requirement]) -> None:
    checked = 0
    for pin in pins:
        if pin.marker is not None and not pin.marker.evaluate():
            continue
        try:
            version = metadata.version(pin.name)
        except metadata.PackageNotFoundError:  # of another platform, or CUDA where torch is a CPU build
            continue
        assert pin.specifier.contains(version.partition("+")[0], prereleases=True), f"{pin}, but {version} is installed"
        checked += 1
    assert checked > 100


def test_the_version_is_one(wheel: Path) -> None:
    assert wheel.name == f"interp-{interp.__version__}-py3-none-any.whl"
    assert metadata.version("interp") == interp.__version__
    assert f"\nversion: {interp.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_has_the_code_the_models_and_the_studies(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("interp/**/*.py", "interp/**/*.css", "interp/**/*.html")
        for path in ROOT.glob(pattern)
    }
    models = {
        f"interp/_data/{path.relative_to(ROOT / 'data').as_posix()}"
        for path in ROOT.glob("data/models/**/*")
        if path.is_file()
    }
    studies = {f"interp/_notebooks/{path.name}" for path in ROOT.glob("notebooks/*.ipynb")}
    assert "interp/studies/report.css" in expected
    assert any(name.endswith("/config.json") for name in models)
    assert any(name.endswith(".safetensors") for name in models)
    assert studies
    assert expected | models | studies <= names
    extra = {name for name in names - expected - models - studies if ".dist-info/" not in name}
    assert not {name for name in extra if not name.startswith(("interp/_notebooks/", "interp/_data/"))}, extra


def test_the_wheel_states_licence_and_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = f"interp-{interp.__version__}.dist-info"
    text = archive.read(f"{folder}/METADATA").decode()
    assert "\nLicense-Expression: MIT\n" in text
    assert "\nRequires-Python: >=3.10\n" in text
    assert "interp = interp.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert "The interp authors" in archive.read(f"{folder}/licenses/LICENSE").decode()
