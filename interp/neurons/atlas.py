"""The atlas of a model's neurons: their tokens by neuron, and the neurons by token."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from interp.neurons._atlas_files import COLUMNS, LISTS, inverted, read_arrays
from interp.neurons._sides import Side
from interp.results import Result

if TYPE_CHECKING:
    import pandas as pd

_CELL = ("side", "layer", "neuron")
_UNITS = {"cosine": "cosine", "centred_cosine": "cosine", "dot": "dot product", "unit": "dot product",
          "logit": "logit", "prob": "probability"}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class NeuronAtlas(Result):
    """What `interp.neurons.decode` found. A neuron is `(layer, index)`; lists are best first.

    `values` (side, layer, neuron): the peak, the score of largest size with its sign (for `"prob"`: the largest
    probability). All are NaN, and ids -1, where a layer was not decoded or a neuron's vector is nothing.

    An atlas made with `path=` stays on disk and is mapped: arrays are read as they are used, and cannot be written to.

    Attributes:
        top_values, top_ids: (side, layer, neuron, rank) the largest scores and their tokens.
        bottom_values, bottom_ids: (side, layer, neuron, rank) the smallest, smallest first.
        mean, std: Of the scores over the vocabulary (for `"prob"`: of the logits).
        logsumexp: Log of the sum over the vocabulary of the exponentials of the logits; NaN for scores that are none.
        norm: Length of the neuron's vector, gains included if they were folded.
        null_peaks: (side, layer, draw) what `z` and `p` compare with: sizes of the peaks of null vectors (for `"dot"`
            per length of the vector, for `"prob"` largest logits); None without a null.
        z: Peak less the mean null peak, in standard deviations of null peaks.
        p: Chance that a null peak is as large.
        q: `p` corrected over all neurons of the side (Benjamini-Hochberg): the share of false ones among those up to
            here.
        label_counts: (side, token) how many neurons have the token as their label; its coordinate `string` is the text.
    """

    top_values: xr.DataArray
    top_ids: xr.DataArray
    bottom_values: xr.DataArray
    bottom_ids: xr.DataArray
    mean: xr.DataArray
    std: xr.DataArray
    logsumexp: xr.DataArray
    norm: xr.DataArray
    z: xr.DataArray
    p: xr.DataArray
    q: xr.DataArray
    label_counts: xr.DataArray
    null_peaks: xr.DataArray | None = None

    @property
    def sides(self) -> list[Side]:
        """The sides that were decoded."""
        return list(self.values["side"].values.tolist())

    @cached_property
    def token_strings(self) -> list[str]:
        """Text of every token by id; `#id` where the tokenizer has none."""
        return [str(text) for text in self.label_counts["string"].values]

    @cached_property
    def label_ids(self) -> xr.DataArray:
        """(side, layer, neuron) the token of the peak, whichever its sign."""
        return xr.where(self.values < 0, self.bottom_ids.isel(rank=0, drop=True), self.top_ids.isel(rank=0, drop=True))

    def best(self, side: Side, sign: Literal[1, -1] = 1) -> np.ndarray:
        """Token ids [layer, neuron] of the largest scores of a side, or with `sign=-1` of the smallest."""
        if sign not in (1, -1):
            raise ValueError(f"sign={sign}; expected 1 for the largest scores or -1 for the smallest")
        ids = self.top_ids if sign == 1 else self.bottom_ids
        return np.array(ids.values[self._place(side), :, :, 0])

    def token_id(self, token: str | int) -> int:
        """The id of a token given by its text, leading space included, or by its id.

        Raises:
            ValueError: If no token or several have this text.
        """
        strings = self.token_strings
        if not isinstance(token, str):
            if not 0 <= token < len(strings):
                raise ValueError(f"no token {token}; ids are 0 to {len(strings) - 1}")
            return int(token)
        found = [place for place, text in enumerate(strings) if text == token]
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"{len(found)} tokens have the text {token!r}: ids {found[:10]}; give the id")
        spaced = [text for text in strings if text.strip() == token.strip()]
        near = spaced or difflib.get_close_matches(token, strings, n=3)
        hint = f" Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else ""
        raise ValueError(f"no token has the text {token!r}.{hint} A word of several tokens has no direction of its own")

    def neuron(self, layer: int, index: int) -> pd.DataFrame:
        """Both lists of one neuron on every side. Columns: side, sign (1: largest scores, -1: smallest), rank, token,
        id, value."""
        import pandas as pd

        rows = []
        for side in self.sides:
            self._require_decoded(side, layer, index)
            for sign, ids, values in ((1, self.top_ids, self.top_values), (-1, self.bottom_ids, self.bottom_values)):
                for rank in range(ids.sizes["rank"]):
                    token = int(ids.values[self._place(side), layer, index, rank])
                    value = float(values.values[self._place(side), layer, index, rank])
                    text = self.token_strings[token] if token >= 0 else ""
                    rows.append({"side": side, "sign": sign, "rank": rank, "token": text, "id": token, "value": value})
        return pd.DataFrame(rows)

    def labels(self, side: Side | None = None) -> pd.DataFrame:
        """One row per neuron and side that was decoded: side, layer, neuron, token and id of the label (the token of
        the peak), sign, value, z, p, q, and hub: whether that token labels more neurons than chance explains
        (`interp.neurons.hubness`), so that it says little about this one."""
        import pandas as pd

        from interp.neurons.hubs import hubness

        ids = self.label_ids.values
        place, layer, neuron = np.nonzero(ids >= 0)
        cell = place, layer, neuron
        if not len(place):
            raise ValueError("no neuron of this atlas has a label")
        texts = np.array(self.token_strings, dtype=object)
        frame = pd.DataFrame(
            {
                "side": np.array(self.sides, dtype=object)[place],
                "layer": layer,
                "neuron": neuron,
                "token": texts[ids[cell]],
                "id": ids[cell],
                "sign": np.where(self.values.values[cell] < 0, -1, 1),
                "value": self.values.values[cell],
                **{name: getattr(self, name).values[cell] for name in ("z", "p", "q")},
                "hub": hubness(self).is_hub.values[place, ids[cell]],
            }
        )
        return frame if side is None else _rows(frame, frame["side"] == self.sides[self._place(side)])

    def specialised(self, q: float = 0.05, side: Side | None = None) -> pd.DataFrame:
        """Rows of `labels` whose peak stands out against the null, largest z first: of these a share of about `q` at
        most is expected to be there by chance. That a label is specific does not say that it is true: see
        `interp.neurons.validate`.

        Raises:
            ValueError: If the atlas was made without a null.
        """
        if self.null_peaks is None:
            raise ValueError("this atlas has no null to stand out against; decode(..., null='rotation') makes one")
        if not 0 < q < 1:
            raise ValueError(f"q={q}; expected a share between 0 and 1")
        frame = self.labels(side)
        found = _rows(frame, frame["q"] <= q)
        return _rows(found, np.argsort(-found["z"].to_numpy(), kind="stable"))

    def reads(self, token: str | int) -> pd.DataFrame:
        """Neurons that have a token in the lists of what they read (`"in"`, `"gate"`), largest scores first.

        Columns: side, layer, neuron, sign (1: among the largest scores, -1: among the smallest), rank, value, z, q.
        """
        sides: list[Side] = [side for side in ("in", "gate") if side in self.sides]
        if not sides:
            raise ValueError("this atlas has no reading side; decode(..., weights=('in', 'out')) makes one")
        return self._having(self.token_id(token), sides)

    def writes(self, token: str | int) -> pd.DataFrame:
        """Neurons that have a token in the lists of what they write (`"out"`); otherwise as `reads`."""
        if "out" not in self.sides:
            raise ValueError("this atlas has no writing side; decode(..., weights=('in', 'out')) makes one")
        return self._having(self.token_id(token), ["out"])

    def search(self, *, reads: str | int | None = None, writes: str | int | None = None) -> pd.DataFrame:
        """Neurons that read one token and write another: candidates for a stored relation between the two.

        Columns: layer, neuron, and side, sign, rank, value of both (`reads_side`, ..., `writes_value`); those first
        whose weaker score is largest in size. With only one of the two asked for, the same as `reads` or `writes`.
        """
        if reads is None or writes is None:
            if reads is None and writes is None:
                raise ValueError("search needs reads= or writes= or both")
            return self.reads(reads) if reads is not None else self.writes(writes)  # pyright: ignore[reportArgumentType]
        parts = {"reads": self.reads(reads), "writes": self.writes(writes)}
        named = [part.drop(columns=["z", "q"]).set_index(["layer", "neuron"]) for part in parts.values()]
        read, written = (part.add_prefix(f"{name}_") for name, part in zip(parts, named, strict=True))
        both = read.join(written, how="inner").reset_index()
        weaker = np.minimum(np.abs(both["reads_value"].to_numpy()), np.abs(both["writes_value"].to_numpy()))
        return _rows(both, np.argsort(-weaker, kind="stable"))

    def plot(self) -> Any:
        """Figure: size of the peaks by layer, median and the middle 90 % of neurons, with that of null vectors."""
        import pandas as pd

        from interp.plotting import lines

        rows = []
        for place, side in enumerate(self.sides):
            parts = {side: np.abs(self._peaks()[place])}
            if self.null_peaks is not None:
                parts[f"{side}, null"] = self.null_peaks.values[place]
            for name, peaks in parts.items():
                for layer, found in enumerate(peaks):
                    if np.isfinite(found).any():
                        low, middle, high = np.nanquantile(found, [0.05, 0.5, 0.95])
                        rows.append({"layer": layer, "side": name, "peak": middle, "low": low, "high": high})
        score = self.provenance["score"]
        return lines(
            pd.DataFrame(rows), x="layer", y="peak", group="side", interval=("low", "high"),
            title="Peak over the vocabulary, by layer",
            unit="largest logit" if score == "prob" else f"peak size ({_UNITS['unit' if score == 'dot' else score]})",
        )  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> NeuronAtlas:
        """Open what `decode(..., path=)` wrote, mapped, or read what `save` wrote.

        Raises:
            FileNotFoundError: If there is neither.
            ValueError: If the directory is not a finished atlas, or the file holds something else.
        """
        if not Path(path).is_dir():
            return super().load(path)
        arrays, strings, manifest = read_arrays(Path(path))
        atlas = assemble(arrays, strings, manifest["provenance"])
        atlas.__dict__["_index"] = {name: arrays[f"index_{name}"] for name in ("entries", "offsets")}
        return atlas

    @cached_property
    def _index(self) -> Mapping[str, np.ndarray]:
        return inverted(self.top_ids.values, self.bottom_ids.values, len(self.token_strings))

    def _having(self, token: int, sides: Sequence[Side]) -> pd.DataFrame:
        import pandas as pd

        entries = self._index["entries"][slice(*self._index["offsets"][token : token + 2])]
        lists = (2, *self.top_ids.shape)
        bottom, place, layer, neuron, rank = np.unravel_index(np.asarray(entries), lists)
        cell = place, layer, neuron
        top_values, bottom_values = self.top_values.values[(*cell, rank)], self.bottom_values.values[(*cell, rank)]
        frame = pd.DataFrame(
            {
                "side": np.array(self.sides, dtype=object)[place],
                "layer": layer,
                "neuron": neuron,
                "sign": np.where(bottom == 1, -1, 1),
                "rank": rank,
                "value": np.where(bottom == 1, bottom_values, top_values),
                "z": self.z.values[cell],
                "q": self.q.values[cell],
            }
        )
        frame = _rows(frame, frame["side"].isin(sides))
        return _rows(frame, np.argsort(-np.abs(frame["value"].to_numpy()), kind="stable"))

    def _peaks(self) -> np.ndarray:
        """Peaks on the scale of `null_peaks`."""
        score = self.provenance["score"]
        if score == "prob":
            return np.log(self.values.values) + self.logsumexp.values
        return self.values.values / self.norm.values if score == "dot" else self.values.values

    def _place(self, side: Side) -> int:
        if side not in self.sides:
            raise ValueError(f"this atlas has no side {side!r}; it has {', '.join(map(repr, self.sides))}")
        return self.sides.index(side)

    def _require_decoded(self, side: Side, layer: int, index: int) -> None:
        n_layers, d_mlp = (self.values.sizes[name] for name in ("layer", "neuron"))
        if not (0 <= layer < n_layers and 0 <= index < d_mlp):
            raise ValueError(f"no neuron ({layer}, {index}); layers are 0 to {n_layers - 1}, neurons 0 to {d_mlp - 1}")
        if layer not in self.provenance["layers"]:
            raise ValueError(f"layer {layer} was not decoded; {self.provenance['layers']} were")


def assemble(arrays: Mapping[str, np.ndarray], strings: Sequence[str], provenance: dict[str, Any]) -> NeuronAtlas:
    """An atlas around arrays, which are not copied."""
    sides, unit = list(provenance["sides"]), _UNITS[provenance["score"]]
    fields = {}
    for name in (*COLUMNS, *LISTS, "null_peaks"):
        if name in arrays:
            dims = {"null_peaks": ("side", "layer", "draw")}.get(name, (*_CELL, "rank") if name in LISTS else _CELL)
            coords = {dim: np.arange(size) for dim, size in zip(dims, arrays[name].shape, strict=True)}
            scored = name in ("values", "top_values", "bottom_values", "mean", "std")
            attrs = {"unit": unit} if scored else {}
            fields[name] = xr.DataArray(arrays[name], dims=dims, coords={**coords, "side": sides}, attrs=attrs)
    labels = np.where(arrays["values"] < 0, arrays["bottom_ids"][..., 0], arrays["top_ids"][..., 0])
    counts = [np.bincount(row[row >= 0], minlength=len(strings)) for row in labels.reshape(len(labels), -1)]
    label_counts = xr.DataArray(
        np.stack(counts).astype(np.int32), dims=("side", "token"),
        coords={"side": sides, "string": ("token", list(strings))},
    )  # fmt: skip
    return NeuronAtlas(provenance=provenance, label_counts=label_counts, **fields)


def _rows(frame: pd.DataFrame, which: Any) -> pd.DataFrame:
    """Rows by mask or in an order, numbered anew."""
    found: Any = frame.loc[which] if which.dtype == bool else frame.iloc[which]
    return found.reset_index(drop=True)
