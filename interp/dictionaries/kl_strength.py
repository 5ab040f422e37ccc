"""The strength at which a direction changes the model by a given amount: steering on an axis of equal damage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.cache import capture
from interp.dictionaries._bracketing import REACHED, crossings
from interp.dictionaries._steered_rows import SteeredRows
from interp.dictionaries._steering_edits import Mode, check_steering
from interp.dictionaries.vectors import SteeringVector
from interp.models import provenance, require_eval
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

_GRID = np.array([*range(-13, -6), *np.arange(-6, 0.5, 0.5)])  # octaves below the largest strength

PUBLISHED_TARGETS = (0.025, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5)
"""The divergences, in nats, at which arXiv:2506.10920 compares steering methods."""


@dataclass(frozen=True, eq=False, repr=False)
class KLStrengths(Result):
    """Strengths at which vectors reach given divergences from the unsteered model.

    Attributes:
        values: Strength, (vector, target); NaN where the target is not reached. Targets are in nats.
        achieved: Mean divergence over prompts at that strength, (vector, target); where it is not reached, the
            nearest that was seen: the largest of all, or that at the jump.
        nearest: The strength that `achieved` belongs to, (vector, target).
        reached: Whether `achieved` is within the tolerance of the target, (vector, target).
        monotone: Whether the divergence was seen to rise all the way up to that strength, (vector, target). Where it
            was not, the strength is the smallest crossing that the grid shows, and larger ones exist.
        curve, curve_strength: Every divergence that was measured and its strength, (vector, evaluation), outwards from
            where strengths start (0, or the mean projection for `"clamp"`); NaN behind the last.
        per_example: Divergence of every prompt at the strength, (vector, target, example).
    """

    achieved: xr.DataArray
    nearest: xr.DataArray
    reached: xr.DataArray
    monotone: xr.DataArray
    curve: xr.DataArray
    curve_strength: xr.DataArray
    per_example: xr.DataArray

    def to_dataframe(self) -> pd.DataFrame:
        """One row per vector and target: strength, achieved KL, its relative error, and what was found."""
        frame = self.values.to_dataframe(name="strength").reset_index()
        for name in ("achieved", "nearest", "reached", "monotone"):
            frame[name] = getattr(self, name).to_numpy().reshape(-1)
        frame["relative_error"] = frame["achieved"] / frame["target"] - 1
        frame["status"] = [row for rows in self.provenance["status"] for row in rows]
        return frame

    def plot(self) -> Any:
        """Divergence against strength, one line per vector."""
        from interp import plotting

        frame = self.curve.to_dataframe(name="kl").reset_index()
        frame["strength"] = self.curve_strength.to_numpy().reshape(-1)
        frame = frame.dropna().query("strength != 0")
        return plotting.lines(
            frame, x="strength", y="kl", group="vector", title="Divergence from the unsteered model",
            unit="KL (nats)", x_title="Strength", log_x=bool((frame["strength"] > 0).all()),
        )  # fmt: skip


def strength_for_kl(
    bridge: Any,
    vectors: SteeringVector | Sequence[SteeringVector],
    tokens: Int[Tensor, "example pos"],
    targets: Sequence[float | int] = PUBLISHED_TARGETS,
    *,
    mode: Mode = "add",
    positions: Literal["all", "last"] = "all",
    sign: Literal[1, -1] = 1,
    max_strength: float | int | None = None,
    tolerance: float = 0.05,
    max_rounds: int = 30,
    lengths: Int[Tensor, " example"] | None = None,
    batch_size: int | None = None,
) -> KLStrengths:
    """The smallest strength at which steering moves the next-token distribution by each target, for each vector.

    The distance is KL(unsteered || steered) at the last token of neutral prompts, in nats, averaged over the prompts.
    It need not grow with the strength, so nothing is assumed: a grid of 20 strengths up to `max_strength` (by factors
    of two, and of its root over the last six octaves) shows where each target is first crossed; false position on
    logarithms closes in on it, all vectors and targets in one batch per round. A target that is not reached, nor by a
    closer look around the highest strength, is said to be so, with the largest divergence seen.

    Cost: two partial forwards over the prompts up to the steered layer and one from there on; then, from that layer
    on, the prompts 20 times per vector, and once per open vector and target in each round (two to five, usually).
    `provenance["forwards"]` counts batches, `["evaluations"]` pairs of vector and strength.

    Args:
        vectors: All at one hook, in one unit or each in its own: only direction times strength counts.
        tokens: Neutral prompts, which the comparison is not made on.
        positions: Which positions are steered; `"last"` is the one that is read.
        sign: -1 steers against the vector. With `"clamp"`, strengths move away from the mean projection of the
            prompts, in this direction.
        max_strength: Largest strength (for `"clamp"`: distance from the mean projection); by default 32 times what
            takes the vector to the mean length of the activations; for `"ablate"` 4.
        tolerance: Relative to the target.
        lengths: Tokens of each prompt, if some are padded on the right.
        batch_size: Rows per forward; from a memory budget by default.

    Raises:
        ValueError: Before any forward, for vectors at several hooks, targets or a largest strength that are not
            positive, or prompts that end in padding when `lengths` is not given.

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920) bisect strengths from 1 to 2000 for 20 rounds, on one prompt
        ("I think that"), accept an error of 0.01 nats (40 % of the smallest target), and drop targets they do not
        meet. Here strengths are bounded by the activations' own length, the error is relative, and nothing is dropped.
    """
    listed = [vectors] if isinstance(vectors, SteeringVector) else list(vectors)
    levels = np.array([float(target) for target in targets])
    if max_strength is not None and max_strength <= 0:
        raise ValueError(f"max_strength={max_strength}; expected above 0: sign=-1 turns the direction round")
    _check(bridge, listed, tokens, levels, mode, sign, tolerance, lengths)
    rows = SteeredRows(
        bridge, tokens, listed, mode=mode, positions=positions, lengths=lengths, batch_size=batch_size
    )  # fmt: skip
    origins, scales = _scales(bridge, listed, tokens, mode, lengths, max_strength)
    rows.forwards += 0 if mode == "ablate" else 1
    kept: dict[tuple[int, float], Tensor] = {}

    def measure(which: np.ndarray, places: np.ndarray) -> np.ndarray:
        strengths = torch.tensor(origins[which] + sign * places, dtype=torch.float32)
        found = rows.divergence(torch.tensor(which), strengths)
        for i, place, row in zip(which, places, found, strict=True):
            kept[int(i), float(place)] = row
        return found.mean(1).double().numpy()

    starts = np.zeros(len(listed))
    if mode == "clamp":  # holding the projection at its mean is a change already
        starts = measure(np.arange(len(listed)), np.zeros(len(listed)))
    grids = scales[:, None] * 2.0**_GRID
    curves, found, rounds = crossings(measure, starts, grids, levels, tolerance=tolerance, max_rounds=max_rounds)

    shape = (len(listed), len(levels))
    strength, achieved, nearest = (np.full(shape, np.nan) for _ in range(3))
    reached, monotone = np.zeros(shape, bool), np.zeros(shape, bool)
    per_example = torch.full((*shape, len(tokens)), torch.nan)
    for i, (curve, row) in enumerate(zip(curves, found, strict=True)):
        for j, crossing in enumerate(row):
            nearest[i, j] = origins[i] + sign * crossing.place
            achieved[i, j], reached[i, j] = crossing.height, crossing.status == REACHED
            strength[i, j] = nearest[i, j] if reached[i, j] else np.nan
            monotone[i, j] = curve.rises_until(crossing.place)
            if (i, crossing.place) in kept:
                per_example[i, j] = kept[i, crossing.place]
    width = max(len(curve.places) for curve in curves) + 1
    lines = np.full((2, len(listed), width), np.nan)
    for i, curve in enumerate(curves):
        lines[0, i, : len(curve.places) + 1] = origins[i] + sign * np.array([0.0, *curve.places])
        lines[1, i, : len(curve.places) + 1] = [curve.start, *curve.heights]
    dims, coords = ("vector", "target"), {"vector": _names(listed), "target": levels}
    named = {"vector": _names(listed)}
    return KLStrengths(
        values=labelled(strength, dims, coords, unit="strength"),
        provenance=provenance(
            bridge, hook=listed[0].hook, mode=mode, positions=positions, sign=sign, tolerance=tolerance,
            n_prompts=len(tokens), forwards=rows.forwards, rounds=rounds, evaluations=len(kept),
            status=[[crossing.status for crossing in row] for row in found],
        ),
        achieved=labelled(achieved, dims, coords, unit="nats"),
        nearest=labelled(nearest, dims, coords, unit="strength"),
        reached=xr.DataArray(reached, dims=dims, coords=coords),
        monotone=xr.DataArray(monotone, dims=dims, coords=coords),
        curve=labelled(lines[1], ("vector", "evaluation"), named, unit="nats"),
        curve_strength=labelled(lines[0], ("vector", "evaluation"), named, unit="strength"),
        per_example=labelled(per_example, (*dims, "example"), coords, unit="nats"),
    )  # fmt: skip


def check_targets(levels: Sequence[float], tolerance: float) -> None:
    """Raise unless these are different positive divergences and a relative tolerance."""
    if not levels or not all(0 < level < np.inf for level in levels) or len(set(levels)) < len(levels):
        raise ValueError(f"targets={list(levels)}; expected different divergences above 0, in nats")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance}; expected a number between 0 and 1, relative to the target")


def require_unpadded(bridge: Any, tokens: Tensor, lengths: Tensor | None) -> None:
    """Raise if a row ends in padding and nothing says where it really ends: position -1 would be a pad token."""
    if lengths is not None:
        n_pos = tokens.shape[1]
        if lengths.shape != tokens.shape[:1] or int(lengths.min()) < 1 or int(lengths.max()) > n_pos:
            raise ValueError(
                f"lengths has shape {tuple(lengths.shape)} and runs from {int(lengths.min())} to "
                f"{int(lengths.max())}; expected one per row, from 1 to {n_pos}"
            )
        return
    tokenizer = getattr(bridge, "tokenizer", None)
    pad = getattr(tokenizer, "pad_token_id", None)
    if pad is None:
        return
    # where padding and end of text are one token, a text may end in one of them, but not in two
    shared = pad in (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "bos_token_id", None))
    tail = tokens[:, -2:] if shared else tokens[:, -1:]
    padded = (tail == pad).all(1)
    if tokens.shape[1] > 1 and bool(padded.any()):
        raise ValueError(
            f"rows {torch.where(padded)[0].tolist()[:8]} end in the padding token {pad}: their last position says "
            f"nothing of the prompt. Pass lengths=, or prompts of one length"
        )


def _scales(
    bridge: Any,
    vectors: Sequence[SteeringVector],
    tokens: Tensor,
    mode: Mode,
    lengths: Tensor | None,
    max_strength: float | int | None,
) -> tuple[Float[np.ndarray, " vector"], Float[np.ndarray, " vector"]]:
    """Where strengths start, and the largest to try."""
    n = len(vectors)
    if mode == "ablate":
        return np.zeros(n), np.full(n, float(max_strength or 4.0))
    hook = vectors[0].hook
    found = capture(bridge, tokens, hook)[hook].float().cpu().flatten(2)
    ends = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths.cpu()
    there = found[torch.arange(tokens.shape[1])[None] < ends[:, None]]  # [token, units]
    length = float(there.norm(dim=-1).mean())
    flat = torch.stack([vector.values.flatten() for vector in vectors])
    norms = flat.norm(dim=1)
    along = (there @ (flat / norms[:, None]).T).mean(0)
    if mode == "clamp":
        return along.double().numpy(), np.full(n, float(max_strength or 32 * length))
    largest = torch.full((n,), float(max_strength)) if max_strength else 32 * length / norms
    return np.zeros(n), largest.double().numpy()


def _names(vectors: Sequence[SteeringVector]) -> list[str]:
    names = [vector.name for vector in vectors]
    return [f"{name} [{i}]" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _check(
    bridge: Any,
    vectors: Sequence[SteeringVector],
    tokens: Tensor,
    levels: np.ndarray,
    mode: Mode,
    sign: int,
    tolerance: float,
    lengths: Tensor | None,
) -> None:
    require_eval(bridge)
    if not vectors:
        raise ValueError("no vectors were given")
    if len(hooks := sorted({vector.hook for vector in vectors})) > 1:
        raise ValueError(f"vectors act at {', '.join(hooks)}; call once per hook, so that they share their forwards")
    check_targets(levels.tolist(), tolerance)
    if sign not in (1, -1):
        raise ValueError(f"sign={sign}; expected 1 or -1")
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [example, pos]")
    require_unpadded(bridge, tokens, lengths)
    for vector in vectors:
        check_steering(bridge, vector, mode)
