"""Errors of a dictionary on rows of activations, and the numbers that are made of their two parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries._linear_maps import AffineMap, fit_affine, r2, r2_by_width
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.pursuit import check_autoencoder
from interp.dictionaries.rows import TokenRows

DEFINITIONS = {
    "l0": "mean number of latents that are not zero",
    "fvu": "E|e|^2 / (E|x|^2 - |E x|^2), e = x - SAE(x)",
    "fvu_linear": "fvu - fvu_nonlinear",
    "fvu_nonlinear": "the same with e - linear(x) for e: what SAE(x) + linear(x) misses",
    "linear_share": "fvu_linear / fvu",
    "error_r2": "R2 of linear(x) for e, widths pooled: 1 - E|e - linear(x)|^2 / E|e - E e|^2",
    "error_r2_by_width": "the same for each width by itself, averaged (Engels et al.)",
    "norm_r2": "R2 of an affine map of x for |e|^2",
    "linear_norm_r2": "R2 of an affine map of x for |linear(x)|^2",
    "nonlinear_norm_r2": "R2 of an affine map of x for |e - linear(x)|^2",
    "norm_r2_size": "R2 of an affine map of |x| and |x|^2 for |e|^2: a baseline of norm_r2",
    "norm_r2_l0": "R2 of an affine map of the token's own l0 for |e|^2: a baseline",
    "norm_r2_token": "R2 for |e|^2 of its mean over the fitted tokens of the same id: a baseline; NaN without ids",
    "reconstruction_bias": "E|SAE(x)|^2 / E<x, SAE(x)>; below 1: shrunk",
}
BASELINE = "R2 of an affine map of the given numbers for |e|^2: a baseline"


def activations_of(
    dictionary: Dictionary, rows: TokenRows | Tensor, documents: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Activations [token, width], the documents that they are from and their token ids, where these are known."""
    if isinstance(rows, TokenRows):
        if documents is not None:
            raise ValueError("documents are for tensors; TokenRows know which document each row is from")
        x, documents, ids = rows.values.detach(), rows.row, rows.ids
    else:
        x, ids = rows.detach(), None
    check_autoencoder(dictionary, x)
    return x, None if documents is None else documents.cpu().long(), ids


@torch.no_grad()
def errors_of(
    dictionary: Dictionary, x: Tensor, encode: Callable[[Tensor], Tensor], *, batch_size: int = 4096
) -> tuple[Float[Tensor, "token width"], Float[Tensor, " token"]]:
    """x - SAE(x) in float64, and the number of active latents of each token."""
    errors, active = [], []
    for part in x.split(batch_size):
        latents = encode(part)
        errors.append(part.double() - dictionary.decode(latents, part).double())
        active.append((latents != 0).sum(1).double())
    return torch.cat(errors), torch.cat(active)


def split_error(
    dictionary: Dictionary,
    x: Tensor,
    test: Tensor,
    encode: Callable[[Tensor], Tensor],
    baselines: Mapping[str, Tensor],
    ids: Tensor | None,
    ridge: float | int,
) -> tuple[dict[str, float], Tensor, AffineMap]:
    """Metrics, squared norms per scored token and the map of the error, of one way to find latents."""
    error, l0 = errors_of(dictionary, x, encode)
    affine = fit_affine(x[~test], error[~test], ridge)
    linear = affine(x)
    rest = error - linear
    size = x.double().norm(dim=1)
    size = size / size.mean()  # and its square beside it: of like variance
    sizes = {name: tensor.square().sum(1) for name, tensor in (("error", error), ("linear", linear), ("rest", rest))}
    y = x[test].double()
    spread = (y - y.mean(0)).square().sum(1)

    def predicted_by(features: Tensor, wanted: Tensor) -> float:
        found = fit_affine(features[~test], wanted[~test, None], ridge)
        return r2(wanted[test, None], found(features[test]))

    fvu, left = (float(sizes[name][test].sum() / spread.sum()) for name in ("error", "rest"))
    rebuilt = y - error[test]
    metrics = {
        "l0": float(l0[test].mean()),
        "fvu": fvu,
        "fvu_linear": fvu - left,
        "fvu_nonlinear": left,
        "linear_share": (fvu - left) / fvu if fvu > 0 else float("nan"),
        "error_r2": r2(error[test], linear[test]),
        "error_r2_by_width": r2_by_width(error[test], linear[test]),
        "norm_r2": predicted_by(x, sizes["error"]),
        "linear_norm_r2": predicted_by(x, sizes["linear"]),
        "nonlinear_norm_r2": predicted_by(x, sizes["rest"]),
        "norm_r2_size": predicted_by(torch.stack([size, size.square()], 1), sizes["error"]),
        "norm_r2_l0": predicted_by(l0[:, None], sizes["error"]),
        "norm_r2_token": float("nan") if ids is None else _by_token(ids.to(x.device), test, sizes["error"]),
    }
    for name, numbers in baselines.items():
        metrics[f"norm_r2_{name}"] = predicted_by(numbers.to(x.device)[:, None], sizes["error"])
    metrics["reconstruction_bias"] = float(rebuilt.square().sum() / (y * rebuilt).sum())
    return metrics, torch.stack([*(found[test] for found in sizes.values()), spread]), affine


def _by_token(ids: Tensor, test: Tensor, wanted: Tensor) -> float:
    """R2 of the mean over fitted tokens of the same id; of all of them where the id is new."""
    kinds, kind = ids.unique(return_inverse=True)
    sums, counts = (wanted.new_zeros(len(kinds)) for _ in range(2))
    sums.index_add_(0, kind[~test], wanted[~test])
    counts.index_add_(0, kind[~test], torch.ones_like(wanted[~test]))
    means = torch.where(counts > 0, sums / counts.clamp(min=1), wanted[~test].mean())
    return r2(wanted[test, None], means[kind[test], None])
