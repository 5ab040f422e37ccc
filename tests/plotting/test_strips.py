"""Tests of strips: every example is shown, means and intervals are those given, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from interp import plotting

WORDS = {"title": "T", "unit": "logit difference (logits)"}


def test_strip_shows_every_example_its_mean_and_interval() -> None:
    values = {"clean": [1.0, np.nan, 3.0], "corrupted": [-1.0, -2.0]}
    figure = plotting.strip(values, interval={"corrupted": (-2.5, -1.0), "clean": (1.5, 2.25)}, **WORDS)
    clean, corrupted, centre = figure.data
    assert list(clean.y) == [1.0, 3.0] and list(corrupted.y) == [-1.0, -2.0]
    assert list(clean.text) == ["example 0", "example 2"]
    assert (abs(clean.x - 0) <= 0.25).all() and (abs(corrupted.x - 1) <= 0.25).all()
    assert list(centre.y) == [2.0, -1.5]
    assert list(centre.error_y.array) == [0.25, 0.5] and list(centre.error_y.arrayminus) == [0.5, 1.0]
    assert list(figure.layout.xaxis.ticktext) == ["clean", "corrupted"]


def test_strip_takes_labelled_arrays_and_a_given_mean() -> None:
    values = xr.DataArray(np.arange(6.0).reshape(3, 2), dims=("example", "head"), coords={"head": [4, 7]})
    figure = plotting.strip(values, mean=[10.0, 20.0], labels=["a", "<b>", "c"], **WORDS)
    assert list(figure.data[1].y) == [1.0, 3.0, 5.0] and list(figure.data[2].y) == [10.0, 20.0]
    assert list(figure.data[0].text)[1] == "example 1<br>&lt;b&gt;"
    assert list(figure.layout.xaxis.ticktext) == ["4", "7"]
    assert figure.layout.xaxis.title.text == "Head"
    assert list(plotting.strip(values[:, 0], interval=[0, 4], **WORDS).data[0].y) == [0.0, 2.0, 4.0]


def test_strip_refusals_say_what_to_do() -> None:
    cube = xr.DataArray(np.zeros((2, 3, 4)), dims=("layer", "pos", "example"))
    with pytest.raises(ValueError, match=r"at most one other.*sel\(layer="):
        plotting.strip(cube, **WORDS)
    with pytest.raises(ValueError, match=r"interval has shape \(3,\) but the groups need \[1, 2\]"):
        plotting.strip({"a": [1.0]}, interval=[1, 2, 3], **WORDS)
    with pytest.raises(ValueError, match="group 'b' has no values: all 1 are NaN"):
        plotting.strip({"a": [1.0], "b": [np.nan]}, **WORDS)
    with pytest.raises(ValueError, match=r"no entry for the groups \['b'\]"):
        plotting.strip({"a": [1.0], "b": [1.0]}, interval={"a": (0, 1)}, **WORDS)
    with pytest.raises(ValueError, match="got 1 labels for 2 examples in group 'a'"):
        plotting.strip({"a": [1.0, 2.0]}, labels=["x"], **WORDS)
    with pytest.raises(ValueError, match=r"ends below its start: \[2\.0, 1\.0\]"):
        plotting.strip({"a": [1.0]}, interval=[2, 1], **WORDS)
