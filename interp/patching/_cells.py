"""Which cells a sweep has: axes, positions, layers and units, from what the user wrote to masks and coordinates."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.patching._sites import n_units, unit_axis
from interp.types import Site

Positions = str | int | Sequence[str | int] | None


def choice(name: str, value: Any, options: Iterable[str]) -> None:
    """Raise unless `value` is one of the options."""
    options = list(options)
    if value not in options:
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"{name}={value!r} is unknown{hint} Expected one of {', '.join(map(repr, options))}")


@dataclass(frozen=True)
class Cells:
    """The cells of a sweep.

    Attributes:
        axes: Dimensions of the result without `example`: `layer`, and those of `pos` and the site's unit that were
            asked for.
        layers: The layers swept.
        spots: Positions patched together, for each coordinate of `pos` (one for all where there is no such axis).
        labels: The coordinates of `pos`: names or numbers.
        tokens: What stands there: the token where all prompts agree, else the position's role, else its number. None
            where positions have names.
        units: Units patched one at a time; None: all together.
    """

    axes: tuple[str, ...]
    layers: tuple[int, ...]
    spots: Bool[Tensor, "spot example pos"]
    labels: list[str] | list[int]
    tokens: list[str] | None
    units: Int[Tensor, "unit"] | None


def cells(
    prompts: Any,
    site: Site,
    geometry: Any,
    *,
    axes: Sequence[str] | None,
    positions: Positions,
    layers: Sequence[int] | None,
    neurons: Sequence[int] | None,
) -> Cells:
    """Everything about the cells, checked."""
    axes = _axes(site, geometry, axes)
    spots, labels, tokens = _spots(prompts, positions)
    if "pos" not in axes:
        spots = spots.any(0, keepdim=True)
    units = None
    axis = unit_axis(site, geometry.grouped)
    if neurons is not None and "neuron" not in axes:
        raise ValueError(f"neurons= is for site='neuron' with the axis 'neuron'; here site={site!r} and axes={axes}")
    if axis in axes:
        everything = range(n_units(site, geometry))
        units = torch.tensor(indices("neurons", neurons, len(everything)))
    return Cells(axes, tuple(indices("layers", layers, geometry.n_layers)), spots, labels, tokens, units)


def _axes(site: Site, geometry: Any, axes: Sequence[str] | None) -> tuple[str, ...]:
    unit = unit_axis(site, geometry.grouped)
    if axes is None:
        return ("layer", "pos") if unit is None else ("layer", unit)
    # "head" is what the site has heads of, so that one call fits grouped and plain models; the result says which
    given = tuple(
        unit if axis == "head" and unit == "kv_head" else axis for axis in ([axes] if isinstance(axes, str) else axes)
    )
    known = ["layer", "pos", *([unit] if unit else [])]
    for axis in given:
        choice("axes", axis, known)
    if len(set(given)) != len(given) or "layer" not in given:
        raise ValueError(
            f"axes={tuple(axes)} must name 'layer' and no axis twice; site={site!r} has {', '.join(known)}"
        )
    return given


def _spots(
    prompts: Any, positions: Positions
) -> tuple[Bool[Tensor, "spot example pos"], list[str] | list[int], list[str] | None]:
    n, length = prompts.clean.shape
    if positions is None:
        positions = list(range(length))
    elif isinstance(positions, (str, int)):
        positions = [positions]
    if len(positions) == 0 or len(set(positions)) != len(positions):
        raise ValueError(f"positions={positions} must name at least one position, and none twice")
    spots, tokens = torch.zeros(len(positions), n, length, dtype=torch.bool), []
    for i, position in enumerate(positions):
        if isinstance(position, str):
            choice("positions", position, prompts.positions)
            index = prompts.positions[position].cpu()
        else:
            if not 0 <= position < length:
                raise ValueError(
                    f"position {position} is not in the prompts, which have {length} tokens: expected 0 to {length - 1}"
                )
            index = torch.full((n,), int(position))
        spots[i, torch.arange(n), index] = True
        tokens.append(_token(prompts, index, position))
    if any(isinstance(position, str) for position in positions):
        return spots, [str(position) for position in positions], None
    return spots, [int(position) for position in positions], tokens


def _token(prompts: Any, index: Tensor, position: str | int) -> str:
    rows = torch.arange(len(index))
    ids = torch.cat([prompts.clean.cpu()[rows, index], prompts.corrupted.cpu()[rows, index]]).unique().tolist()
    if len(ids) == 1:
        return prompts.text(ids[0])
    roles = [name for name, where in prompts.positions.items() if torch.equal(where.cpu(), index)]
    return f"<{'/'.join(roles)}>" if roles else f"<{position}>"


def indices(name: str, given: Sequence[int] | None, size: int) -> list[int]:
    """The indices asked for, all of `size` for None; checked."""
    if given is None:
        return list(range(size))
    chosen = [int(index) for index in given]
    wrong = [index for index in chosen if not 0 <= index < size]
    if wrong or not chosen or len(set(chosen)) != len(chosen):
        what = f"{wrong} do not exist" if wrong else "must name at least one, and none twice"
        raise ValueError(f"{name}={chosen}: {what}; expected indices from 0 to {size - 1}")
    return chosen


def window_of(layer: int, size: int, n_layers: int) -> tuple[int, ...]:
    """The `size` layers from `layer - size // 2` on, as far as they exist."""
    start = layer - size // 2
    return tuple(range(max(0, start), min(n_layers, start + size)))
