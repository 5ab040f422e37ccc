"""Feature absorption and splitting: does one latent hold a concept, do several share it, or do others swallow it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.probing import check_documents, sample_tokens
from interp.dictionaries.rows import TokenRows
from interp.results import Result, labelled

if TYPE_CHECKING:
    import pandas as pd

DEFINITIONS = {
    "probe_f1": "held-out F1 of a logistic probe on the activations",
    "f1_1": "held-out F1 of the probe on the best latent",
    "f1_split": "held-out F1 of the probe on the main latents",
    "split": "number of main latents: as long as one more raises F1 by more than `f1_gain`, it is one of them",
    "tokens": "held-out tokens with the label that the probe on the activations finds",
    "silent": "share of these on which no main latent is active",
    "absorbed": "share of these on which no main latent is active and others, aligned with the probe, make up at least "
    "`min_share` of the activation's projection on it",
    "fraction": "mean over these of others / (others + main), each the sum of positive projections on the probe",
}


@dataclass(frozen=True, eq=False, repr=False)
class Absorption(Result):
    """Splitting and absorption, label by label.

    `values` has the dimensions (statistic, label); `definitions` in the provenance says what each statistic is. NaN
    where the probe finds no held-out token.

    Attributes:
        main: (label, rank): the main latents of each label, -1 beyond their number.
        absorbers: (label, latent): on how many held-out tokens a latent stood in for silent main latents.
    """

    main: xr.DataArray
    absorbers: xr.DataArray

    def summary(self) -> pd.DataFrame:
        """One row per label: its statistics, its main latents and the latent that most often stands in for them."""
        frame = self.values.T.to_pandas()
        main = [[int(i) for i in row if i >= 0] for row in self.main.values]
        often = self.absorbers.argmax("latent").values
        counts = self.absorbers.max("latent").values
        return frame.assign(main=main, absorber=np.where(counts > 0, often, -1), times=counts).reset_index()

    def plot(self) -> Any:
        """Figure: by label, the share of tokens whose main latents are silent, and the share that is absorbed."""
        from interp.plotting import bars

        frame = self.values.sel(statistic=["silent", "absorbed"]).rename("value").to_dataframe().reset_index()
        return bars(
            frame, x="label", y="value", group="statistic", title="Tokens whose main latents are silent",
            unit="share of tokens that the probe finds",
        )  # fmt: skip


def absorption(
    dictionary: Dictionary,
    rows: TokenRows,
    labels: Mapping[str, Tensor],
    *,
    max_split: int = 5,
    f1_gain: float = 0.03,
    min_cosine: float = 0.1,
    min_share: float = 0.4,
    max_absorbers: int = 3,
    test_fraction: float = 0.3,
    max_negatives: int | None = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Absorption:
    """Which latents hold each label, and how often others stand in for them where they are silent.

    A probe on the activations finds the label's direction; k-sparse probes on the latents find its main latents. On
    held-out tokens that have the label and that the first probe gets right, latents that are silent although they stand
    for the label have been absorbed if other active latents carry it. No forward.

    Args:
        dictionary: An autoencoder. Activations and latents are taken as it sees them, normalised.
        rows: Activations at its hook (see `token_rows`).
        labels: `{name: [token] bool}` (see `label_masks`).
        max_split: The most main latents of a label.
        f1_gain: What one more latent must add to the held-out F1 to be a main latent.
        min_cosine: Of a latent's decoder row with the probe, to count as an absorber.
        min_share: Of the activation's projection on the probe that absorbers must make up.
        max_absorbers: So many absorbers of a token, those with the largest projections, are counted.
        test_fraction, max_negatives, seed: As for `sparse_probing`.
        progress: Show a progress bar.

    Raises:
        ValueError: If it is a transcoder, whose decoder does not live where the probe does, or if rows or labels do not
            fit.

    Source:
        Chanin et al. 2024 (arXiv:2409.14507), who tell absorbers by the effect of ablating them on the answer's logit,
        with a least cosine of .025 in a much wider space; the projections, `min_share` and `max_absorbers` are those of
        SAEBench (Karvonen et al. 2025). Their labels are first letters; these are whatever is given.
    """
    from transformer_lens.tools.analysis.sparse_probing import fit_sparse_probe, sweep_sparse_probe  # noqa: TID251

    _check(dictionary, rows, labels, max_split, max_absorbers)
    with torch.no_grad():
        z = dictionary._normalised(rows.values.detach())
        latents = dictionary.encode(rows.values.detach()).float()
        decoder = dictionary._rows().detach().float().cpu()
        centred = (z - dictionary.b_dec).float().cpu()  # what latents times rows, and the error, add up to
    latents, z = latents.cpu(), z.float().cpu()
    documents = rows.row.cpu().long()
    split: dict[str, Any] = {"test_fraction": test_fraction, "seed": seed, "preprocess": "standardize"}
    values = np.full((len(DEFINITIONS), len(labels)), np.nan)
    main = np.full((len(labels), max_split), -1, dtype=np.int64)
    absorbers = np.zeros((len(labels), dictionary.n_latents), dtype=np.int64)
    for j, mask in enumerate(tqdm(labels.values(), desc="absorption", disable=None if progress else True)):
        used = sample_tokens(mask, max_negatives, seed)
        truth = mask[used].cpu()
        probe = fit_sparse_probe(z[used], truth, k=z.shape[1], groups=documents[used], **split)
        ks = range(1, max_split + 1)
        swept = sweep_sparse_probe(latents[used], truth, ks=list(ks), groups=documents[used], **split).results
        f1 = [float(result.metrics.f1) for result in swept]
        n = next((k for k in range(1, max_split) if f1[k] - f1[k - 1] <= f1_gain), max_split)
        chosen = swept[n - 1].selected_features
        main[j, :n] = chosen.numpy()
        direction, right = _direction(probe, z[used], truth)
        at = used[right]
        found = [float(probe.metrics.f1), f1[0], f1[n - 1], float(n), float(len(at))]
        shares, counts = _shares(
            latents[at], decoder, centred[at], direction, chosen, min_cosine, min_share, max_absorbers
        )
        values[:, j] = [*found, *shares]
        absorbers[j] = counts
    coords = {"statistic": list(DEFINITIONS), "label": list(labels)}
    record = {**rows.provenance, "method": "absorption", "dictionary": dictionary.settings(), "seed": seed}
    record |= {"definitions": DEFINITIONS, "f1_gain": f1_gain, "min_cosine": min_cosine, "min_share": min_share}
    record |= {"max_split": max_split, "max_absorbers": max_absorbers, "test_fraction": test_fraction}
    return Absorption(
        labelled(values, tuple(coords), coords, unit="see definitions"),
        record,
        xr.DataArray(main, {"label": coords["label"]}, ["label", "rank"]),
        xr.DataArray(absorbers, {"label": coords["label"]}, ["label", "latent"]),
    )


def _direction(probe: Any, z: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """The probe's direction [unit] of norm 1 in the activations' own units, and the held-out tokens with the label that
    it gets right."""
    weights = torch.zeros(z.shape[1], dtype=torch.float64)
    weights[probe.selected_features] = probe.coefficients / probe.preprocess_scale
    means = torch.zeros_like(weights)
    means[probe.selected_features] = probe.preprocess_mean
    held = probe.test_indices
    logits = (z[held].double() - means) @ weights + probe.intercept
    return (weights / weights.norm()).float(), held[(logits > 0) & truth[held]]


def _shares(
    latents: Tensor,
    decoder: Tensor,
    centred: Tensor,
    direction: Tensor,
    main: Tensor,
    min_cosine: float,
    min_share: float,
    max_absorbers: int,
) -> tuple[list[float], np.ndarray]:
    """Silent, absorbed and fraction, and how often each latent stood in."""
    counts = np.zeros(latents.shape[1], dtype=np.int64)
    if not len(latents):
        return [float("nan")] * 3, counts
    along = decoder @ direction
    able = along / decoder.norm(dim=1).clamp(min=1e-12) >= min_cosine
    able[main] = False
    top = (latents * along * able).clamp(min=0).topk(min(max_absorbers, latents.shape[1]), dim=1)
    others = top.values.sum(1)
    own = (latents[:, main] * along[main]).clamp(min=0).sum(1)
    silent = (latents[:, main] == 0).all(1)
    absorbed = silent & (others > 0) & (others >= min_share * (centred @ direction))
    both = others + own
    fraction = torch.where(both > 0, others / both.clamp(min=1e-12), torch.zeros_like(both))
    stood_in = top.indices[absorbed][top.values[absorbed] > 0]
    np.add.at(counts, stood_in.numpy(), 1)
    return [float(silent.float().mean()), float(absorbed.float().mean()), float(fraction.mean())], counts


def _check(
    dictionary: Dictionary, rows: TokenRows, labels: Mapping[str, Tensor], max_split: int, max_absorbers: int
) -> None:
    if dictionary.is_transcoder:
        raise ValueError(
            f"this dictionary reads {dictionary.hook!r} and writes {dictionary.target_hook!r}: its decoder rows and a "
            f"probe on what it reads are not in one space; absorption is measured for autoencoders"
        )
    if rows.values.shape[1] != dictionary.d_in or (dictionary.hook and rows.hook != dictionary.hook):
        raise ValueError(
            f"{rows!r} and a dictionary of {dictionary.d_in} units of {dictionary.hook!r}; expected rows of its hook: "
            f"token_rows(bridge, tokens, dictionary.hook)"
        )
    if not 1 <= max_split <= dictionary.n_latents or max_absorbers < 1:
        raise ValueError(f"max_split={max_split}, max_absorbers={max_absorbers}; expected at least 1 of each")
    check_documents(rows, labels)
