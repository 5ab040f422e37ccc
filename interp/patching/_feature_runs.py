"""Runs in which chosen latents and errors of several dictionaries are replaced, and all else follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp import hooks
from interp.patching._backward import Runner, wide
from interp.patching._batches import Split
from interp.patching._latent_sites import LatentSite
from interp.patching._resume import Reader
from interp.patching.rules import Rules

FeatureAblation: TypeAlias = Literal["mean", "swap", "zero"]
"""What ablated nodes carry: their mean over the other run's examples, position by position, what they are on the same
example of it, or nothing."""
GoesIn: TypeAlias = dict[str, tuple[Tensor, Tensor | None]]
"""Latents and activations that go in, by the hook that is rebuilt; no activation where there is no error to put in."""


@dataclass(frozen=True)
class AblatedRuns:
    """Everything that is decided before a forward is run.

    Attributes:
        places: The dictionaries, each with all its latents.
        base: Tokens of the run that is ablated.
        other: Tokens of the run that replacements come from.
        spots: Positions by coordinate of the masks' second axis.
    """

    bridge: Any
    places: list[LatentSite]
    base: Int[Tensor, "example pos"]
    other: Int[Tensor, "example pos"]
    reader: Reader
    split: Split
    spots: Bool[Tensor, "spot example pos"]
    ablation: FeatureAblation

    @property
    def names(self) -> list[str]:
        """The hooks that are read."""
        return list(dict.fromkeys(name for place in self.places for name in place.names))

    @torch.no_grad()
    def run(
        self, masks: Mapping[str, Bool[Tensor, "circuit spot unit"]], *, progress: bool = False
    ) -> tuple[Float[Tensor, "circuit example"], Float[Tensor, "example"], int]:
        """The metric with the masked nodes replaced (the last unit is the error), the metric of the run as it is, and
        the forwards this took. Circuits in which nothing is replaced are not run."""
        n, at_once = len(self.base), self._rows()
        n_circuits = len(next(iter(masks.values())))
        n_examples = n if self.reader.whole else min(n, at_once)
        per_pass = max(1, at_once // n_examples)
        runner = Runner(self.bridge, self.reader, (), Rules(), self.split.device)
        live = torch.stack([mask.flatten(1).any(1) for mask in masks.values()]).any(0)
        values, base = torch.zeros(n_circuits, n), torch.zeros(n)
        chunks = torch.arange(n).split(n_examples)
        mean = self._means(n_examples) if self.ablation == "mean" and bool(live.any()) else None
        silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
        with tqdm(total=int(live.sum()) * len(chunks), disable=silent, desc="feature circuits") as bar:
            for rows in chunks:
                base[rows] = runner.plain(self.base[rows], rows).scores.float().cpu()
                values[(~live).nonzero(), rows] = base[rows]
                if not bool(live.any()):
                    continue
                goes_in = self._goes_in(rows, mean)
                for some in live.nonzero().flatten().split(per_pass):
                    ablate = {name: self._by_row(mask[some], rows) for name, mask in masks.items()}
                    repeated = {name: _repeat(pair, len(some)) for name, pair in goes_in.items()}
                    everyone = rows.repeat(len(some))
                    with ablating(self.bridge, self.places, repeated, ablate):
                        scores = runner.plain(self.base[everyone], everyone).scores.float().cpu()
                    values[some.unsqueeze(1), rows] = scores.view(len(some), -1)
                    bar.update(len(some))
        other = int(bool(live.any()) and self.ablation != "zero")
        return values, base, int(live.sum()) + 1 + other

    def _by_row(self, mask: Bool[Tensor, "circuit spot unit"], rows: Tensor) -> Bool[Tensor, "row pos unit"]:
        """Where nodes are replaced, rows circuit after circuit."""
        device = self.split.device
        where = self.spots[:, rows].to(device, torch.float32)  # [spot, row, pos]
        return torch.einsum("snp,csu->cnpu", where, mask.to(device, torch.float32)).flatten(0, 1) > 0

    def _read(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Latents and activations of the other run."""
        stop = hooks.stop_layer(self.bridge, self.names)
        with hooks.reads(self.bridge, self.names) as found:
            tokens = self.other[rows].to(self.split.device)
            self.bridge(tokens, **({"logits_to_keep": 1} if stop is None else {"stop_at_layer": stop}))
        return {p.target: (p.encode(found[p.hook]), found[p.target].flatten(2)) for p in self.places}

    def _means(self, n_rows: int) -> GoesIn:
        """Means over the examples of the other run."""
        total: dict[str, tuple[Tensor, Tensor]] = {}
        for rows in torch.arange(len(self.other)).split(n_rows):
            for name, pair in self._read(rows).items():
                latents, own = (wide(tensor).sum(0, keepdim=True) for tensor in pair)
                known = total.get(name)
                total[name] = (latents, own) if known is None else (known[0] + latents, known[1] + own)
        return {name: (pair[0] / len(self.other), pair[1] / len(self.other)) for name, pair in total.items()}

    def _goes_in(self, rows: Tensor, mean: GoesIn | None) -> GoesIn:
        if mean is not None:
            return {name: _repeat(pair, len(rows)) for name, pair in mean.items()}
        if self.ablation == "swap":
            return {name: (latents, own) for name, (latents, own) in self._read(rows).items()}
        shape = (len(rows), self.base.shape[1])
        return {
            p.target: (p.directions.new_zeros(*shape, int(p.dictionary.n_latents)), None) for p in self.places
        }  # fmt: skip

    def _rows(self) -> int:
        """Most rows (circuits x examples) of a pass."""
        split = self.split
        kept = sum(5 * int(place.dictionary.n_latents) + 6 * place.width for place in self.places)
        each = split.row_bytes(split.n_pos, split.n_pos) + max(4, split.item) * split.n_pos * kept
        return split.rows_at_once(each, "ablate features", "fewer prompts or dictionaries")


@contextmanager
def ablating(
    bridge: Any, places: list[LatentSite], goes_in: GoesIn, ablate: Mapping[str, Bool[Tensor, "row pos unit"]]
) -> Iterator[None]:
    """Every forward inside has the masked latents and errors replaced; the others are what its own activations give.

    Where nothing is replaced the activation stays as it is, to the bit.
    """
    found: dict[str, Tensor] = {}

    def edit_of(place: LatentSite) -> Callable[[Tensor], Tensor]:
        def edit(own: Tensor) -> Tensor:
            latents, activations = goes_in[place.target]
            x = own if place.hook == place.target else found[place.hook]
            change, mask = place.change(x, own, latents, activations), ablate[place.target]
            moved = change.latents * mask[..., :-1]
            moved = moved if change.scale is None else moved * change.scale
            added = moved @ place.directions.to(moved) + change.error * mask[..., -1:]
            return (own.flatten(2) + added.to(own.dtype)).reshape(own.shape)

        return edit

    edited = [place for place in places if bool(ablate[place.target].any())]
    inputs = [place.hook for place in edited if place.hook != place.target]
    # what transcoders read is read after the edits, which are entered first
    with (
        hooks.interventions(bridge, {place.target: edit_of(place) for place in edited}),
        hooks.reads(bridge, inputs) as read,
    ):
        found = read
        yield


def _repeat(pair: tuple[Tensor, Tensor | None], times: int) -> tuple[Tensor, Tensor | None]:
    """Rows again and again."""
    latents, own = pair
    return latents.repeat(times, 1, 1), None if own is None else own.repeat(times, 1, 1)
