"""k-sparse probing: how much of a concept a handful of latents tell, beside neurons and the controls that matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from tqdm.auto import tqdm

from interp.dictionaries.detection import Encoder
from interp.dictionaries.rows import TokenRows, mask_matrix
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

METRICS = ("accuracy", "f1", "auroc", "average_precision")
ARMS = ("latents", "random latents", "shuffled labels")


@dataclass(frozen=True, eq=False, repr=False)
class Probing(Result):
    """Held-out scores of probes on `k` latents.

    `values` has the dimensions (representation, k, label, arm, metric). The arm `"latents"` is the probe itself,
    `"random latents"` the mean over probes on as many latents drawn at random, `"shuffled labels"` over probes that
    were chosen and fitted on shuffled labels: what a probe scores by choosing and fitting alone.

    Attributes:
        chosen: (representation, k, label, rank): the latents of each probe, best first; -1 beyond `k`.
    """

    chosen: xr.DataArray

    def summary(self, metric: str = "accuracy", *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
        """One row per representation and k: the mean over labels with its interval over labels, and the two controls.

        Args:
            metric: `"accuracy"` (of classes weighted equally in the fit), `"f1"`, `"auroc"`, `"average_precision"`.
        """
        import pandas as pd

        rows = []
        for name in map(str, self.values["representation"].values):
            for k in map(int, self.values["k"].values):
                here = self.values.sel(representation=name, k=k, metric=metric)
                scores = here.sel(arm="latents").values
                found = bootstrap_interval(scores[~np.isnan(scores)], confidence=level, seed=seed)
                row = {"representation": name, "k": k, metric: float(found.estimate)}
                row |= {"low": float(found.low), "high": float(found.high)}
                rows.append({**row, **{arm: float(here.sel(arm=arm).mean()) for arm in ARMS[1:]}})
        return pd.DataFrame(rows)

    def plot(self, metric: str = "accuracy") -> Any:
        """Figure: mean score by representation with intervals over labels, a colour per k."""
        from interp.plotting import bars

        frame = self.summary(metric).assign(latents=lambda f: "k = " + f["k"].astype(str))
        return bars(
            frame, x="representation", y=metric, group="latents", interval=("low", "high"),
            title="k-sparse probing", unit=f"held-out {metric.replace('_', ' ')}",
        )  # fmt: skip


def sparse_probing(
    rows: TokenRows,
    labels: Mapping[str, Tensor],
    encoders: Mapping[str, Encoder],
    *,
    ks: Sequence[int] = (1, 2, 5),
    test_fraction: float = 0.2,
    n_random: int = 3,
    n_shuffles: int = 3,
    max_negatives: int | None = 2000,
    seed: int = 0,
    progress: bool = False,
) -> Probing:
    """Logistic probes on the `k` latents whose mean differs most between tokens with a label and tokens without.

    Whole documents are held out, and latents are chosen and standardised on the other documents alone. The units of the
    hook itself are probed as `"neurons"`. No forward.

    Args:
        rows: Activations at the dictionaries' hook (see `token_rows`).
        labels: `{name: [token] bool}` (see `label_masks`).
        encoders: By name, rows [token, unit] to latents [token, latent] (a dictionary's `encode`), or directions.
        ks: Numbers of latents, rising.
        test_fraction: Share of each class that is held out.
        n_random, n_shuffles: Control probes of either kind per label and k.
        max_negatives: At most so many tokens without a label are used, drawn at random; None for all.
        seed: Of the split, the negatives and the controls.
        progress: Show a progress bar.

    Raises:
        ValueError: If rows, labels or encoders do not fit, or a label stands in fewer than two documents.

    Source:
        Gurnee et al. 2023 (arXiv:2305.01610); SAEBench's sparse probing (Karvonen et al. 2025), which probes the mean
        over a text's tokens where we probe tokens. The probes are TransformerLens' `sweep_sparse_probe`, in float64 to
        a checked optimum.
    """
    from transformer_lens.tools.analysis.sparse_probing import sweep_sparse_probe  # noqa: TID251 - public and model-free

    ks = _check(rows, labels, encoders, ks)
    encoded = {"neurons": rows.values.detach().float().cpu()}
    for name, encoder in encoders.items():
        encoded[name] = apply_encoder(name, encoder, rows.values)
    if short := [name for name, found in encoded.items() if found.shape[1] < ks[-1]]:
        raise ValueError(f"ks={ks} asks for {ks[-1]} latents; {', '.join(short)} has fewer")
    values = np.full((len(encoded), len(ks), len(labels), len(ARMS), len(METRICS)), np.nan)
    chosen = np.full((len(encoded), len(ks), len(labels), ks[-1]), -1, dtype=np.int64)
    documents = rows.row.cpu().long()
    options: dict[str, Any] = {"preprocess": "standardize", "test_fraction": test_fraction, "seed": seed}
    options |= {"n_random_subsets": n_random, "n_label_shuffles": n_shuffles, "ks": ks}
    for j, mask in enumerate(tqdm(labels.values(), desc="probing", disable=None if progress else True)):
        used = sample_tokens(mask, max_negatives, seed)
        for i, latents in enumerate(encoded.values()):
            swept = sweep_sparse_probe(latents[used], mask[used].cpu(), groups=documents[used], **options)
            for a, k in enumerate(ks):
                probe = swept.results[a]
                values[i, a, j, 0] = _scores(probe.metrics)
                values[i, a, j, 1] = _scores(swept.random_coordinate_controls[a])
                values[i, a, j, 2] = _scores(swept.label_shuffle_controls[a])
                chosen[i, a, j, :k] = probe.selected_features.numpy()
    coords = {"representation": list(encoded), "k": list(ks), "label": list(labels), "arm": list(ARMS)}
    picked = xr.DataArray(
        chosen, {**{n: coords[n] for n in ("representation", "k", "label")}, "rank": range(ks[-1])},
        ["representation", "k", "label", "rank"],
    )  # fmt: skip
    coords["metric"] = list(METRICS)
    record = {**rows.provenance, "method": "sparse_probing", "test_fraction": test_fraction, "seed": seed}
    record |= {"n_random": n_random, "n_shuffles": n_shuffles, "max_negatives": max_negatives}
    record |= {"positives": {name: int(mask.sum()) for name, mask in labels.items()}, "class_weight": "balanced"}
    return Probing(labelled(values, tuple(coords), coords, unit="held-out score"), record, picked)


def apply_encoder(name: str, encoder: Encoder, rows: Tensor) -> Tensor:
    """Latents [token, latent] of rows in float32 on the CPU, without a graph."""
    with torch.no_grad():
        found = rows @ encoder.to(rows).T if isinstance(encoder, Tensor) else encoder(rows)
    if found.ndim != 2 or len(found) != len(rows):
        raise ValueError(
            f"encoders[{name!r}] gave {tuple(found.shape)} for {len(rows)} rows; expected [{len(rows)}, latent]"
        )
    return found.detach().float().cpu()


def sample_tokens(mask: Tensor, max_negatives: int | None, seed: int) -> Tensor:
    """Indices, in order, of every token with the label and of at most so many without."""
    negatives = (~mask.cpu()).nonzero()[:, 0]
    if max_negatives is not None and len(negatives) > max_negatives:
        drawn = torch.randperm(len(negatives), generator=torch.Generator().manual_seed(seed))[:max_negatives]
        negatives = negatives[drawn]
    return torch.cat([mask.cpu().nonzero()[:, 0], negatives]).sort().values


def check_documents(rows: TokenRows, labels: Mapping[str, Tensor]) -> None:
    """Raise unless every label can be fitted on some documents and scored on others."""
    documents = rows.row.cpu()
    for name, column in zip(labels, mask_matrix(labels, len(rows)).T, strict=True):
        there, not_there = documents[column].unique(), documents[~column].unique()
        if min(len(there), len(not_there)) < 2:
            raise ValueError(
                f"label {name!r} is true in {len(there)} documents and false in {len(not_there)}; expected at least 2 "
                f"of each, to fit on some and score on others"
            )


def _check(rows: TokenRows, labels: Mapping[str, Tensor], encoders: Mapping[str, Any], ks: Sequence[int]) -> list[int]:
    check_documents(rows, labels)
    if not encoders or "neurons" in encoders:
        raise ValueError(f"encoders={list(encoders)}; expected at least one, none called 'neurons'")
    found = list(map(int, ks))
    if not found or found[0] < 1 or found != sorted(set(found)):
        raise ValueError(f"ks={tuple(ks)}; expected rising numbers of latents, from 1")
    return found


def _scores(found: Any) -> list[float]:
    """Metrics of a probe, or their means over control probes; NaN where none converged."""
    columns = [found.accuracy, found.f1, found.roc_auc, found.average_precision]
    return [float(np.mean(np.asarray(c))) if np.size(np.asarray(c)) else float("nan") for c in columns]
