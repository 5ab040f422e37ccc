"""Concepts as propositions: which latents, above which activation, say that a concept is there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._threshold_fit import (
    SCORES,
    choose_latents,
    diff_means_scores,
    document_halves,
    mean_of_draws,
    random_scores,
    said,
    scored,
)
from interp.dictionaries.detection import Encoder
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.probing import apply_encoder
from interp.dictionaries.rows import TokenRows, mask_matrix
from interp.dictionaries.steering_latents import latent_vectors
from interp.dictionaries.vectors import SteeringVector
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

ARMS = ("latents", "DiffMeans", "random latents", "shuffled labels")


@dataclass(frozen=True, eq=False, repr=False)
class Propositions(Result):
    """Latents and thresholds that say of a token that a concept is there, and how often they are right.

    `values` has the dimensions (concept, arm, score): precision, recall and F1 on documents that had no part in the
    choice; precision is NaN where nothing was said to hold. `"DiffMeans"` is a threshold on the difference of means
    (supervised), `"random latents"` the mean over latents drawn at random, each with its own best threshold, `"shuffled
    labels"` the mean over choices made, and scored, with the labels of the tokens permuted.

    Attributes:
        latents: (concept, member), -1 beyond the last. A proposition holds where one of its latents is above its own
            threshold.
        thresholds: (concept, member), in units of the latent; NaN beyond the last.
        typical: (concept, member): mean activation of the latent over the tokens with the label.
        positives: (concept, half): tokens with the label, `"choose"` and `"score"`.
    """

    latents: xr.DataArray
    thresholds: xr.DataArray
    typical: xr.DataArray
    positives: xr.DataArray

    @property
    def concepts(self) -> list[str]:
        """Their names, in order."""
        return list(map(str, self.values["concept"].values))

    def __repr__(self) -> str:
        f1 = float(self.values.sel(arm="latents", score="f1").mean())
        return f"Propositions({len(self.concepts)} concepts at {self.provenance['hook']}; mean held-out F1 {f1:.3f})"

    def margins(
        self, encoder: Dictionary | Encoder, rows: TokenRows, *, positions: Int[Tensor, " batch"] | None = None
    ) -> xr.DataArray:
        """(text, concept): the largest activation less threshold over a text's rows, -inf for a text without rows.

        Args:
            encoder: The dictionary that the propositions were fitted on.
            positions: One per text; by default all rows count.
        """
        scores = _encoded(encoder, rows)
        if int(self.latents.max()) >= scores.shape[1]:
            raise ValueError(f"latent {int(self.latents.max())} does not exist; the dictionary has {scores.shape[1]}")
        members = torch.tensor(self.latents.values)
        limit = torch.tensor(self.thresholds.values).nan_to_num(torch.inf)
        above = (scores[:, members.clamp(min=0)] - limit).amax(-1)  # [token, concept]
        kept = torch.ones(len(rows), dtype=torch.bool)
        if positions is not None:
            if len(positions) != len(rows.tokens):
                raise ValueError(f"{len(positions)} positions for {len(rows.tokens)} texts; expected one each")
            kept = rows.position == positions.cpu()[rows.row]
        out = torch.full((len(rows.tokens), len(self.concepts)), -torch.inf)
        where = rows.row[kept][:, None].expand(-1, out.shape[1])
        out = out.scatter_reduce(0, where, above[kept], "amax")
        return labelled(out, ("text", "concept"), {"text": range(len(out)), "concept": self.concepts})

    def read(
        self, encoder: Dictionary | Encoder, rows: TokenRows, *, positions: Int[Tensor, " batch"] | None = None
    ) -> xr.DataArray:
        """bool (text, concept): which propositions hold of each text, at any of its rows or at one given position.

        A text without rows (there) has none. Facts for `forward_chain`.
        """
        return self.margins(encoder, rows, positions=positions) > 0

    def vectors(self, bridge: Any, dictionary: Dictionary) -> dict[str, SteeringVector]:
        """By concept, what its latents add to the activation where it is there: directions times typical activations.

        Raises:
            ValueError: As `latent_vectors`, and for normalisations that are undone token by token.
        """
        made = {}
        for concept, members, typical in zip(self.concepts, self.latents.values, self.typical.values, strict=True):
            used = [int(member) for member in members if member >= 0]
            parts = latent_vectors(bridge, dictionary, used)
            for part in parts:
                part.require_one_length()
            total = torch.stack([float(a) * part.values for a, part in zip(typical, parts, strict=False)]).sum(0)
            made[concept] = SteeringVector(total, parts[0].hook, concept, "latents", {"latents": used})
        return made

    def summary(self, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row per arm: mean precision, recall and F1 over concepts, the last with its interval over concepts."""
        import pandas as pd

        rows = []
        for arm in map(str, self.values["arm"].values):
            here = self.values.sel(arm=arm)
            found = bootstrap_interval(here.sel(score="f1").values, confidence=level, seed=seed)
            row = {"arm": arm, **{score: float(here.sel(score=score).mean()) for score in SCORES}}
            rows.append({**row, "f1_low": float(found.low), "f1_high": float(found.high), "concepts": len(here)})
        return pd.DataFrame(rows)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per concept: its latents and first threshold, tokens with the label, scores, and F1 of the others."""
        import pandas as pd

        rows = []
        for i, concept in enumerate(self.concepts):
            used = [int(member) for member in self.latents.values[i] if member >= 0]
            row = {"concept": concept, "latents": " ".join(map(str, used))}
            row |= {"threshold": float(self.thresholds[i, 0]), "positives": int(self.positives[i].sum())}
            row |= {score: float(self.values.sel(arm="latents", score=score)[i]) for score in SCORES}
            rows.append(row | {f"f1, {arm}": float(self.values.sel(arm=arm, score="f1")[i]) for arm in ARMS[1:]})
        return pd.DataFrame(rows)

    def plot(self, *, level: float = 0.95) -> Any:
        """Figure: mean held-out F1 by arm, with intervals over concepts."""
        from interp.plotting import bars

        return bars(
            self.summary(level=level), x="arm", y="f1", interval=("f1_low", "f1_high"),
            title="Propositions from latents and from controls", unit="held-out F1, mean over concepts", x_title="",
        )  # fmt: skip


def fit_propositions(
    encoder: Dictionary | Encoder,
    rows: TokenRows,
    masks: Mapping[str, Tensor],
    *,
    k: int = 1,
    unique: bool = False,
    n_random: int = 5,
    n_shuffles: int = 2,
    seed: int = 0,
) -> Propositions:
    """For every concept the latent, and the threshold on it, with the best F1 on half of the documents. No forward.

    Scored on the other half, beside controls that are chosen and scored alike. Thresholds lie midway between two
    activations; one that every token is above is not among them. With `k > 1` further latents are added, each with its
    own threshold, as long as one raises the F1 of the whole on the choosing half: the proposition is their disjunction.

    Args:
        encoder: A dictionary, or rows [token, unit] to scores [token, latent], or directions (see `detect_concepts`).
        rows: Activations at the dictionary's hook (see `token_rows`).
        masks: `{name: [token] bool}` (see `label_masks`).
        unique: No latent stands for two concepts (`assign_features` on the F1 of all pairs); k = 1 only.
        n_random, n_shuffles: Control latents per concept, and permutations.
        seed: Of the halves and the controls.

    Raises:
        ValueError: If sizes do not fit, or a label is not on some tokens and off others in both halves.

    Source:
        ActivationReasoning (arXiv:2510.18184) finds concepts as latents and thresholds them into propositions; how its
        thresholds are set we do not know. Held-out scores and the controls are ours.
    """
    scores = _encoded(encoder, rows)
    truth = mask_matrix(masks, len(rows))
    _check(scores, truth, list(masks), k, unique)
    draws = torch.Generator().manual_seed(seed)
    choosing = document_halves(rows.row, draws)
    for name, column in zip(masks, truth.T, strict=True):
        counts = [(int(column[half].sum()), int(half.sum())) for half in (choosing, ~choosing)]
        if any(not 0 < on < n for on, n in counts):
            raise ValueError(
                f"label {name!r} is on {counts[0][0]} of {counts[0][1]} tokens to choose on and {counts[1][0]} of "
                f"{counts[1][1]} to score on; expected some on and off in both: give more documents, or leave it out"
            )
    seen, unseen, known, asked = scores[choosing], scores[~choosing], truth[choosing], truth[~choosing]
    members, limits = choose_latents(seen, known, k, unique)
    values = np.full((len(masks), len(ARMS), len(SCORES)), np.nan)
    values[:, 0] = scored(said(unseen, members, limits), asked)
    values[:, 1] = diff_means_scores(rows.values[choosing], rows.values[~choosing], known, asked)
    values[:, 2] = random_scores(seen, unseen, known, asked, n_random, draws)
    permuted = []
    for _ in range(n_shuffles):
        mixed, check = (half[torch.randperm(len(half), generator=draws)] for half in (known, asked))
        permuted.append(scored(said(unseen, *choose_latents(seen, mixed, k, unique)), check))
    if permuted:
        values[:, 3] = mean_of_draws(permuted)
    hits = known.T.double()
    typical = (hits @ seen.double() / hits.sum(1, keepdim=True)).gather(1, members.clamp(min=0)).float()
    names, places = list(masks), {"concept": list(masks), "member": range(k)}
    record = {**rows.provenance, "method": "fit_propositions", "k": k, "unique": unique, "seed": seed}
    record |= {"n_random": n_random, "n_shuffles": n_shuffles, "documents_to_choose": int(choosing.sum())}
    coords = {"concept": names, "arm": list(ARMS), "score": list(SCORES)}
    counts = np.stack([known.sum(0).numpy(), asked.sum(0).numpy()], 1)
    return Propositions(
        labelled(values, tuple(coords), coords),
        record,
        xr.DataArray(members.numpy(), dims=tuple(places), coords=places),
        labelled(limits, tuple(places), places),
        labelled(typical.masked_fill(members < 0, torch.nan), tuple(places), places),
        xr.DataArray(counts, dims=("concept", "half"), coords={"concept": names, "half": ["choose", "score"]}),
    )


def _encoded(encoder: Dictionary | Encoder, rows: TokenRows) -> Float[Tensor, "token latent"]:
    if isinstance(encoder, Dictionary):
        if encoder.hook and encoder.hook != rows.hook:
            raise ValueError(f"the dictionary reads {encoder.hook!r} and the rows are of {rows.hook!r}")
        return apply_encoder("dictionary", encoder.encode, rows.values)  # called itself, it would reconstruct
    return apply_encoder("encoder", encoder, rows.values)


def _check(scores: Tensor, truth: Tensor, names: list[str], k: int, unique: bool) -> None:
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k={k}; expected 1 to {scores.shape[1]}, the number of latents")
    if unique and k > 1:
        raise ValueError(f"unique=True with k={k}; latents are assigned one to a concept: use k=1")
    if unique and len(names) > scores.shape[1]:
        raise ValueError(f"unique=True with {len(names)} concepts and {scores.shape[1]} latents; expected no more")
