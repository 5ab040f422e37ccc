"""Results: the file gives back exactly what was saved, or says what is wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import results
from interp.results import Result, labelled


def example_result() -> Result:
    values = labelled(
        torch.tensor([[[1.0, 3.0], [-9.0, -7.0]], [[torch.nan, torch.nan], [4.0, 0.0]]]),
        ("layer", "pos", "example"),
        {"layer": [0, 2], "token": ("pos", ["<bos>", " naïve\n"])},
        unit="logits",
    )
    return Result(values, {"model": "planted", "seed": 3, "nested": {"a": [1, None]}})


def test_top_ranks_means_over_examples_and_leaves_unmeasured_cells_out() -> None:
    top = example_result().top(5)
    assert top["value"].tolist() == [-8.0, 2.0, 2.0]
    assert top.loc[0, ["layer", "pos", "token"]].tolist() == [0, 1, " naïve\n"]
    assert example_result().top(1, by="max")["value"].item() == 2.0
    assert example_result().top(1, by="min")["value"].item() == -8.0
    assert example_result().top(1, reduce=None)["value"].item() == -9.0
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        example_result().top(0)


def test_long_form_has_one_row_per_cell_with_coordinates() -> None:
    frame = example_result().to_dataframe()
    assert len(frame) == 8
    row = frame[(frame["layer"] == 2) & (frame["pos"] == 1) & (frame["example"] == 0)]
    assert row["value"].item() == 4.0
    assert row["token"].item() == " naïve\n"


def test_save_and_load_give_back_the_same_result(tmp_path: Path) -> None:
    result = example_result()
    loaded = Result.load(result.save(tmp_path / "deep" / "effects.nc"))
    xr.testing.assert_identical(loaded.values, result.values)
    assert loaded.provenance == result.provenance
    assert repr(loaded) == "Result(layer 2 x pos 2 x example 2; planted)"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["effects.nc"]


@settings(max_examples=25, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 100),
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8),
)
def test_any_shape_and_any_text_survive_a_file(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], seed: int, text: str
) -> None:
    array = np.random.default_rng(seed).normal(size=shape)
    dims = [f"axis{i}" for i in range(len(shape))]
    values = labelled(array, dims, {"label": (dims[0], [f"{i}{text}" for i in range(shape[0])])})
    path = Result(values, {"text": text}).save(tmp_path_factory.mktemp("results") / "r.nc")
    loaded = Result.load(path)
    xr.testing.assert_identical(loaded.values, values)
    assert loaded.provenance == {"text": text}


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = example_result().save(tmp_path / "r.nc")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged or was not written by Result.save"):
        Result.load(path)
    with pytest.raises(FileNotFoundError, match="no result file"):
        Result.load(tmp_path / "missing.nc")
    xr.Dataset({"values": ("x", [1.0])}).to_netcdf(tmp_path / "foreign.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="not written by Result.save"):
        Result.load(tmp_path / "foreign.nc")
    meta = {"format": 1, "class": "os.path", "fields": {}}
    xr.Dataset({}, attrs={"interp": json.dumps(meta)}).to_netcdf(tmp_path / "class.nc", engine="h5netcdf")
    with pytest.raises(ValueError, match="not a result of interp"):
        results.load(tmp_path / "class.nc")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = example_result().save(tmp_path / "r.nc")
    before = path.read_bytes()

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full_disk)
    with pytest.raises(OSError, match="No space left"):
        example_result().save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.nc"]


@dataclass(frozen=True, eq=False, repr=False)
class _Other(Result):
    pass


def test_the_class_of_the_file_is_checked(tmp_path: Path) -> None:
    path = example_result().save(tmp_path / "r.nc")
    with pytest.raises(ValueError, match="holds Result, not _Other"):
        _Other.load(path)


def test_values_must_be_float32_and_provenance_json() -> None:
    with pytest.raises(TypeError, match=r"Result\.values is float64"):
        Result(xr.DataArray(np.zeros(2)), {})
    with pytest.raises(TypeError, match="provenance must be JSON-able"):
        Result(labelled(np.zeros(2), ["example"]), {"tensor": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"shape \(2,\), but 2 dimension names"):
        labelled(np.zeros(2), ["layer", "pos"])
