"""How good a dictionary is, with every number defined beside it.

Sums are kept in float64 and streamed over texts, so that the batch size changes nothing. "Explained variance" has at
least three meanings in the literature; ours is the one for which predicting the mean gives exactly 0 and the identity
exactly 1. Recovered loss is given against zero and mean ablation, and in nats, since in late layers almost anything
recovers almost everything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm.auto import tqdm

from interp.cache import capture
from interp.dictionaries._losses import losses_under
from interp.dictionaries._moments import Moments
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.splicing import check_place, check_width
from interp.models import provenance, require_eval
from interp.results import Result
from interp.stats import Interval, ratio_interval

if TYPE_CHECKING:
    import plotly.graph_objects as go

DEFINITIONS = {
    "l0": "mean number of latents that are not zero",
    "explained_variance": "1 - E|y - y^|^2 / (E|y|^2 - |E y|^2), y what is rebuilt",
    "fvu": "1 - explained_variance",
    "mse": "E|y - y^|^2, summed over the width",
    "l2_ratio": "E(|y^| / |y|)",
    "cosine": "E cos(y, y^)",
    "reconstruction_bias": "E|y^|^2 / E<y, y^>; below 1: shrunk (Rajamanoharan et al. 2024a, eq. 10)",
    "dead": "share of latents that never fire on these tokens",
    "dense": "share of latents that fire on more than 10 % of these tokens",
    "encoder_decoder_cosine": "mean over latents of cos(encoder column, decoder row); autoencoders only",
    "ce_clean": "mean cross-entropy of the next token, nats, of the model itself",
    "ce_spliced": "the same with the reconstruction in place of the activation",
    "ce_zero": "the same with zeros in its place",
    "ce_mean": "the same with the mean over these tokens in its place",
    "ce_rise": "ce_spliced - ce_clean",
    "ce_score_zero": "(ce_zero - ce_spliced) / (ce_zero - ce_clean)",
    "ce_score_mean": "(ce_mean - ce_spliced) / (ce_mean - ce_clean)",
    "kl_spliced": "mean KL(clean || spliced) of the next-token distribution, nats",
    "kl_score_zero": "(kl_zero - kl_spliced) / kl_zero",
    "kl_score_mean": "(kl_mean - kl_spliced) / kl_mean",
}


@dataclass(frozen=True, eq=False, repr=False)
class DictionaryReport(Result):
    """What `evaluate` measured.

    Attributes:
        values: One number per `metric`; `definitions` in the provenance says what each is.
        density: How often each latent fires, [latent].
        mean_activation: Mean of each latent where it fires, [latent]; NaN where it never does.
        per_text: Sums over the tokens of each text, [quantity, example]: cross-entropy and KL under each condition, and
            the number of predictions, from which intervals are made.
    """

    density: xr.DataArray
    mean_activation: xr.DataArray
    per_text: xr.DataArray

    def __getitem__(self, metric: str) -> float:
        names = [str(name) for name in self.values.metric.values]
        if metric not in names:
            raise KeyError(f"{metric!r} was not measured; there are {', '.join(names)}")
        return float(self.values.sel(metric=metric))

    def __repr__(self) -> str:
        found = {name: self[name] for name in ("l0", "fvu", "ce_rise", "ce_score_zero", "dead")}
        shown = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
        return f"DictionaryReport({shown}; {self.provenance['n_tokens']:,} tokens)"

    def definition(self, metric: str) -> str:
        """What a number of this report means."""
        return str(self.provenance["definitions"][metric])

    def interval(self, metric: str, *, confidence: float = 0.95, n_resamples: int = 1000, seed: int = 0) -> Interval:
        """Bootstrap interval over texts of a loss, its rise, or a recovered share."""
        sums = {str(name): self.per_text.sel(quantity=name).values for name in self.per_text.quantity.values}
        n = sums["predictions"]
        kind, _, against = metric.partition("_score_")
        if metric == "ce_rise":
            above, below = sums["ce_spliced"] - sums["ce_clean"], n
        elif metric in sums and metric != "predictions":
            above, below = sums[metric], n
        elif kind in ("ce", "kl") and against in ("zero", "mean"):
            clean = sums["ce_clean"] if kind == "ce" else np.zeros_like(n)
            above, below = sums[f"{kind}_{against}"] - sums[f"{kind}_spliced"], sums[f"{kind}_{against}"] - clean
        else:
            raise ValueError(f"no interval over texts for {metric!r}; there are ce_*, kl_*, ce_rise and the scores")
        return ratio_interval(above, below, confidence=confidence, n_resamples=n_resamples, seed=seed)

    def plot(self) -> go.Figure:
        """Histogram of how often latents fire, on a logarithmic scale; those that never do are in the title."""
        from interp.plotting import bars

        density = self.density.values
        n = self.provenance["n_tokens"]
        edges = np.linspace(np.floor(np.log10(1 / n)), 0, 25)
        counts, _ = np.histogram(np.log10(density[density > 0]), bins=edges)
        middles = [f"{(a + b) / 2:.2f}" for a, b in zip(edges[:-1], edges[1:], strict=True)]
        data = xr.DataArray(counts.astype(np.float32), {"density": middles}, ["density"], name="value")
        return bars(
            data,
            x="density",
            title=f"{int((density == 0).sum())} of {len(density)} latents never fire",
            unit="latents",
            x_title="log10 of the share of tokens on which a latent fires",
        )


def evaluate(
    dictionary: Dictionary,
    bridge: Any,
    tokens: Int[Tensor, "example pos"],
    *,
    keep: Bool[Tensor, "example pos"] | None = None,
    skip_first: int = 1,
    batch_size: int = 32,
    progress: bool = False,
) -> DictionaryReport:
    """Measure a dictionary on activations of a model, and the model with the dictionary in it.

    Positions that are left out (the first ones, and where `keep` is False) keep the model's own activations in every
    condition and enter no average. Cross-entropy is that of the next token at the positions that are kept.

    Args:
        keep: Positions that count; for padding.
        skip_first: Positions at the start of every text that do not: BOS by default.
        batch_size: Texts per forward.

    Returns:
        A `DictionaryReport`. Costs five forwards of all tokens (one of them up to the hook).

    Raises:
        ValueError: Before any forward, if nothing is left to measure; KeyError if the model has no such hook.
    """
    require_eval(bridge)
    n, length = tokens.shape
    if not 0 <= skip_first < length - 1:
        raise ValueError(f"skip_first={skip_first} of {length} positions leaves no next token to predict")
    counted = torch.ones(n, length, dtype=torch.bool) if keep is None else keep.bool().cpu().clone()
    if counted.shape != tokens.shape:
        raise ValueError(f"keep has shape {tuple(counted.shape)}, tokens {tuple(tokens.shape)}")
    counted[:, :skip_first] = False
    if int(counted.sum()) == 0 or int((counted[:, :-1] & counted[:, 1:]).sum()) == 0:
        raise ValueError("keep leaves no two neighbouring positions: there is nothing to rebuild and to predict")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    check_place(bridge, dictionary)
    moments = Moments(dictionary.n_latents, dictionary.d_out)
    hooks = [dictionary.hook] + ([dictionary.target_hook] if dictionary.target_hook is not None else [])
    starts = list(range(0, n, batch_size))
    with tqdm(total=2 * len(starts), desc="evaluating", disable=None if progress else True) as bar, torch.no_grad():
        for start in starts:
            rows = slice(start, start + batch_size)
            found = capture(bridge, tokens[rows], hooks)
            x, y = found[hooks[0]].flatten(2), found[hooks[-1]].flatten(2)
            check_width(x, dictionary.d_in, hooks[0])
            check_width(y, dictionary.d_out, hooks[-1])
            where = counted[rows].to(x.device)
            latents = dictionary.encode(x[where])
            moments.add(latents, y[where], dictionary.decode(latents, x[where]))
            bar.update()
        mean = moments.mean
        parts = []
        for start in starts:
            rows = slice(start, start + batch_size)
            parts.append(losses_under(bridge, dictionary, tokens[rows], counted[rows], mean))
            bar.update()
    per_text = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    values = {**moments.metrics(), **_recovered(per_text)}
    if not dictionary.is_transcoder:
        W_enc, rows = dictionary.W_enc.detach().double(), dictionary.W_dec.detach().double()
        cosines = torch.nn.functional.cosine_similarity(W_enc.T, rows, dim=1)
        values["encoder_decoder_cosine"] = float(cosines.mean())
    order = [name for name in DEFINITIONS if name in values]
    density, strength = moments.density, moments.mean_activation
    return DictionaryReport(
        values=xr.DataArray(np.array([values[m] for m in order], np.float32), {"metric": order}, ["metric"]),
        provenance=provenance(
            bridge,
            method="evaluate",
            dictionary=dictionary.settings(),
            n_tokens=moments.n,
            n_predictions=int(per_text["predictions"].sum()),
            left_out={"first": skip_first, "masked": keep is not None},
            definitions={name: DEFINITIONS[name] for name in order},
        ),
        density=xr.DataArray(density.astype(np.float32), dims=["latent"]),
        mean_activation=xr.DataArray(strength.astype(np.float32), dims=["latent"]),
        per_text=xr.DataArray(
            np.stack(list(per_text.values())).astype(np.float32),
            {"quantity": list(per_text)},
            ["quantity", "example"],
        ),
    )


def _recovered(per_text: dict[str, np.ndarray]) -> dict[str, float]:
    n = per_text["predictions"].sum()
    mean = {name: float(sums.sum() / n) for name, sums in per_text.items() if name != "predictions"}
    ce, kl = (lambda name: mean[f"ce_{name}"]), (lambda name: mean[f"kl_{name}"])
    found = {f"ce_{name}": ce(name) for name in ("clean", "spliced", "zero", "mean")}
    found["ce_rise"] = ce("spliced") - ce("clean")
    found["kl_spliced"] = kl("spliced")
    for name in ("zero", "mean"):
        found[f"ce_score_{name}"] = _share(ce(name) - ce("spliced"), ce(name) - ce("clean"))
        found[f"kl_score_{name}"] = _share(kl(name) - kl("spliced"), kl(name))
    return found


def _share(above: float, below: float) -> float:
    return above / below if below else float("nan")
