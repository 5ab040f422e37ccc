"""What every result shares: labelled values, provenance, save and load, a long table, the largest cells.

A result is a frozen dataclass whose numbers are `xarray.DataArray`s: named dimensions, token coordinates, CPU float32,
NaN where nothing was measured. Files are netCDF-4 (written by xarray through h5netcdf): one self-describing file that
keeps names and coordinates, that R, Julia, MATLAB and `ncdump` open as well, and that runs no code on loading.
safetensors would have needed a second file for names and coordinates; zarr is a directory of many small files.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import xarray as xr
from torch import Tensor

from interp.stats import Interval

if TYPE_CHECKING:
    import pandas as pd

R = TypeVar("R", bound="Result")
_FORMAT = 1


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Base of every result.

    Attributes:
        values: The measured numbers, CPU float32 with named dimensions. Unmeasured cells are NaN.
        provenance: JSON-able record of what was run: model id and revision, weights state, dtype, seed, versions and
            the method's own settings.
    """

    values: xr.DataArray
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        for name, array in self._arrays().items():
            if array.dtype not in (np.float32, np.bool_) and not np.issubdtype(array.dtype, np.integer):
                raise TypeError(f"{type(self).__name__}.{name} is {array.dtype}; use float32 (see results.labelled)")
        try:
            json.dumps(self.provenance)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.provenance must be JSON-able: {error}") from error

    def __repr__(self) -> str:
        sizes = " x ".join(f"{name} {size}" for name, size in self.values.sizes.items())
        model = self.provenance.get("model")
        return f"{type(self).__name__}({sizes}{f'; {model}' if model else ''})"

    def to_dataframe(self) -> pd.DataFrame:
        """The values in long form: one row per cell, a column per dimension and coordinate, and `value`."""
        return self.values.rename("value").to_dataframe().reset_index()

    def top(
        self, k: int = 5, *, by: Literal["abs", "max", "min"] = "abs", reduce: str | Sequence[str] | None = "example"
    ) -> pd.DataFrame:
        """The `k` largest cells, best first, in long form.

        Args:
            k: Number of rows.
            by: `"abs"` ranks by magnitude, `"max"` and `"min"` by signed value.
            reduce: Dimensions averaged before ranking (those that the values do not have are passed over);
                `None` ranks every cell, examples included.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        names = [reduce] if isinstance(reduce, str) else list(reduce or [])
        values = self.values.mean([name for name in names if name in self.values.dims], keep_attrs=True)
        frame = values.rename("value").to_dataframe().reset_index().dropna(subset=["value"])
        key = {"abs": frame["value"].abs(), "max": frame["value"], "min": -frame["value"]}[by]
        return frame.loc[key.sort_values(ascending=False, kind="stable").index[:k]].reset_index(drop=True)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one netCDF-4 file. It appears under its name only when it is complete. Returns the path."""
        path = Path(path)
        meta = {"format": _FORMAT, "class": f"{type(self).__module__}.{type(self).__qualname__}"}
        meta["fields"] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not self._is_array(f.name)}
        dataset = xr.Dataset(
            {name: _without_coordinates(array, name) for name, array in self._arrays().items()},
            attrs={"interp": json.dumps(meta)},
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        try:
            dataset.to_netcdf(temporary, engine="h5netcdf")
            Path(temporary).replace(path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a result of this class.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, was not written by `save`, or holds another kind of result.
        """
        result = load(path)
        if not isinstance(result, cls):
            raise ValueError(f"{path} holds {type(result).__name__}, not {cls.__name__}; use interp.results.load")
        return result

    def _is_array(self, name: str) -> bool:
        return isinstance(getattr(self, name), xr.DataArray)

    def _arrays(self) -> dict[str, xr.DataArray]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if self._is_array(f.name)}


def load(path: str | os.PathLike[str]) -> Result:
    """Read any result that `Result.save` wrote, as the class that wrote it. Raises as `Result.load`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no result file at {path}")
    try:
        with xr.open_dataset(path, engine="h5netcdf", decode_timedelta=False) as stored:
            dataset = stored.load()
        meta = json.loads(dataset.attrs["interp"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged or was not written by Result.save ({error})") from error
    if meta["format"] != _FORMAT:
        raise ValueError(f"{path} has result format {meta['format']}; this version of interp reads {_FORMAT}")
    module, _, name = meta["class"].rpartition(".")
    # The name comes from a file, so only classes of this package, and only results, may be looked up.
    cls = getattr(importlib.import_module(module), name, None) if module.split(".")[0] == "interp" else None
    if not (isinstance(cls, type) and issubclass(cls, Result)):
        raise ValueError(f"{path} names {meta['class']!r}, which is not a result of interp")
    arrays = {str(name): _with_coordinates(array, str(name)) for name, array in dataset.data_vars.items()}
    return cls(**arrays, **meta["fields"])


def labelled(
    values: Tensor | np.ndarray,
    dims: Sequence[str],
    coords: Mapping[str, Any] | None = None,
    *,
    unit: str | None = None,
) -> xr.DataArray:
    """Values as a CPU float32 `DataArray`; `unit` is kept in its attributes for tables and plots."""
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    array = np.asarray(values, dtype=np.float32)
    if array.ndim != len(dims):
        raise ValueError(f"values have shape {array.shape}, but {len(dims)} dimension names were given: {tuple(dims)}")
    return xr.DataArray(array, dims=tuple(dims), coords=coords, attrs={"unit": unit} if unit else {})


def interval_arrays(found: Interval, template: xr.DataArray, *, unit: str, **attrs: Any) -> xr.Dataset:
    """`estimate`, `low` and `high` of an interval as arrays like `template`, which has no examples."""
    arrays = {
        name: template.copy(data=np.asarray(getattr(found, name), dtype=np.float32)).assign_attrs(unit=unit)
        for name in found._fields
    }
    return xr.Dataset(arrays, attrs=attrs)


def _without_coordinates(array: xr.DataArray, name: str) -> xr.DataArray:
    # Arrays of one result may share a dimension name with different coordinates (a listed subset of positions, say),
    # which one Dataset would silently align; each array therefore keeps dimensions of its own in the file.
    return array.rename({label: f"{name}__{label}" for label in {*array.dims, *array.coords}})


def _with_coordinates(array: xr.DataArray, name: str) -> xr.DataArray:
    own = f"{name}__"
    # A scalar coordinate of one array reaches all arrays of the Dataset; only its own are given back.
    array = array.drop_vars([label for label in array.coords if not str(label).startswith(own)])
    return array.rename({label: str(label).removeprefix(own) for label in {*array.dims, *array.coords}}).rename(None)
