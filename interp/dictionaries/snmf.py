"""Semi-nonnegative matrix factorisation of MLP activations: neuron groups, and how active each is on every token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

import interp
from interp.cache import ActivationStore
from interp.dictionaries._snmf_checks import check_explore, check_settings, check_start
from interp.dictionaries._snmf_files import read_factors, write_factors
from interp.dictionaries._snmf_fit import Fit, Settings, best_of
from interp.dictionaries._snmf_init import Init
from interp.dictionaries._snmf_minibatch import SAMPLE_ITERATIONS, fit_minibatch
from interp.dictionaries._snmf_source import Source
from interp.dictionaries._snmf_steps import Data, best_codes, exact_loss, gram, kept_neurons

_DEFAULTS = {
    "standard": {"max_iter": 300, "patience": 20, "repair": True},
    "official": {"max_iter": 500, "patience": 100, "repair": False},
    "minibatch": {"max_iter": 10, "patience": 3, "repair": True},
}
_EXPLORE, _PENALTY = 100, 0.1
_TWINS = 0.95


class SNMF:
    """Activations [token, neuron] as non-negative activations [token, component] times sparse components.

    Minimises the squared error of `activations_ @ components_`, with activations at least zero and each component a
    signed group of at most `ceil(sparsity * d_mlp)` neurons. A component times W_out is a direction in the residual
    stream.

        >>> snmf = SNMF(100, sparsity=0.01).fit(acts)          # acts [n_tokens, d_mlp], of one layer's neurons
        >>> snmf.components_.shape, snmf.activations_.shape    # [100, d_mlp], [n_tokens, 100]
        >>> snmf.transform(new_acts)                           # [n_new, 100]: the components as they are

    Components have norm one, so activations are in the data's unit, and are ordered by how much they carry. One fit is
    some 200 iterations of one dense product each (n_tokens x d_mlp x n_components); no language model is run.

    Args:
        n_components: Number of components, no more than tokens.
        sparsity: Share of the neurons that a component may use, in (0, 1]. Of equal magnitudes those of the lowest
            index are kept, so that the count is exact. 1 switches winner-take-all off; a factorisation is then not
            identified: many reach the same loss.
        init: `"kmeans"`, `"svd"` (both signs of each singular vector) or `"random"`; or activations to start from,
            [token, component].
        repair: Move the least needed component (dead, duplicate, or cheapest to drop) to the largest residual from time
            to time, where that lowers loss and penalty. True, except in mode `"official"`, which has none.
        restarts: Starts from different seeds, `seed`, `seed + 1`, ...; the one with the lowest loss is kept.
        max_iter: Most iterations of a start (300; 500 in mode `"official"`), or passes over the data where
            `batch_size` is given (10).
        explore: Iterations of the multiplicative rule before exact block updates take over: 100, or `max_iter` if that
            is less. `explore=max_iter` never changes over, 0 starts with block updates. Mode `"official"` has none.
        penalty: What block updates add to the loss, times the energy that each component has by itself, while they run
            (0.1); iterations and swaps are ranked by the sum. Without it they go on lowering the loss by large
            activations on most tokens that cancel each other, which nobody can read; the multiplicative rule is too
            slow to get there. 0 is least squares alone, as mode `"official"` is. Activations are least squares for the
            final components in any case.
        patience, tol: Stop when the loss has not fallen by this share within so many iterations. In mode `"official"`
            `tol` is absolute, as it was there.
        mode: `"official"` follows the released code: order of steps, absolute constants, all of equal magnitudes kept,
            activations of norm near one instead of components. It is for comparison; fp32 and fp64 as given.
        batch_size: Rows in memory at a time, for stores that do not fit. Activations (n_tokens x n_components) must.
            `explore` and `repair` then act on the sample that passes start from, which is fitted for 300 iterations.
        device: Where to compute; where the data is by default.
        dtype: float32 or float64; that of the data by default, float32 for narrower types. Inner products of factors
            and all losses are fp64.

    Attributes:
        components_: [component, neuron], CPU. Zero rows are dead components.
        activations_: [token, component], CPU, at least zero: the optimum for `components_` (mode `"official"`: the
            pair of the best iteration).
        loss_: Sum of squared errors of exactly these two; no penalty in it, nor in the other losses.
        relative_loss_: `loss_` over the data's sum of squares (not centred).
        history_: Loss after every iteration of the start that was kept.
        restart_losses_: Loss of every start.
        n_iter_, best_iter_, repairs_: Iterations run, the one whose pair was kept, swaps that were kept.
        dead_: [component], True where a component is zero or never active.
        duplicates_: Pairs of components with a cosine above 0.95, as (first, second, cosine).
        provenance: Settings and, for a store, what it was harvested from.

    Source:
        Shafran, Geiger, Geva, arXiv 2506.10920, with the multiplicative rule of Ding, Li and Jordan (2010). We differ
        (mode `"standard"`) in everything that was absolute being relative, in the exact count of kept neurons, in
        ending with exact block updates (which never raise the sum of loss and penalty although components are sparse;
        the loss by itself they may), in that penalty, in repair, and in the norm of components.

    Raises:
        ValueError: For settings that cannot be, or that the chosen way of fitting would not use.
    """

    components_: Float[Tensor, "component neuron"]
    activations_: Float[Tensor, "token component"]
    dead_: Bool[Tensor, "component"]
    duplicates_: list[tuple[int, int, float]]
    loss_: float
    relative_loss_: float
    history_: list[float]
    restart_losses_: list[float]
    n_iter_: int
    best_iter_: int
    repairs_: int

    def __init__(
        self,
        n_components: int,
        *,
        sparsity: float | int = 0.01,
        init: Init | Float[Tensor, "token component"] = "kmeans",
        repair: bool | None = None,
        restarts: int = 1,
        seed: int = 0,
        max_iter: int | None = None,
        explore: int | None = None,
        penalty: float | int | None = None,
        patience: int | None = None,
        tol: float = 1e-4,
        mode: Literal["standard", "official"] = "standard",
        batch_size: int | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        counts = {"n_components": n_components, "restarts": restarts, "max_iter": max_iter, "patience": patience}
        check_settings(
            {**counts, "batch_size": batch_size}, sparsity, init, repair, restarts, explore, penalty, mode, dtype
        )
        defaults = _DEFAULTS[mode if batch_size is None else "minibatch"]
        self.n_components = n_components
        self.sparsity = float(sparsity)
        self.init: Init | Tensor = init
        self.repair = bool(defaults["repair"] if repair is None else repair)
        self.restarts = restarts
        self.seed = seed
        self.max_iter = int(defaults["max_iter"] if max_iter is None else max_iter)
        # What is used, so that settings and provenance say so: the released algorithm has neither.
        official, batched = mode == "official", batch_size is not None
        longest = SAMPLE_ITERATIONS if batched else self.max_iter
        check_explore(explore, longest, f"{'the sample is' if batched else 'it is'} fitted for {longest} iterations")
        self.explore = None if official else min(_EXPLORE, longest) if explore is None else explore
        self.penalty = float((0.0 if official else _PENALTY) if penalty is None else penalty)
        self.patience = int(defaults["patience"] if patience is None else patience)
        self.tol = tol
        self.mode: Literal["standard", "official"] = mode
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.provenance: dict[str, Any] = {}

    def fit(self, A: Float[Tensor, "token neuron"] | tuple[ActivationStore, str], *, progress: bool = False) -> SNMF:
        """Factorise `A`, a matrix or a hook of a store. Positions that say nothing (BOS, padding) should not be in it.

        Raises:
            ValueError: If the data is not a matrix of finite floating-point numbers, is all zero, or has fewer rows
                than there are components; or if `init` does not fit it.
            KeyError: If the store has no such hook.
        """
        source = Source.of(A, self.device, self.dtype)
        n_tokens, d_neurons = source.shape
        if n_tokens < self.n_components:
            raise ValueError(
                f"{self.n_components} components need at least as many tokens, but there are {n_tokens}; "
                f"give more tokens or fewer components"
            )
        if isinstance(self.init, Tensor):
            check_start(self.init, (n_tokens, self.n_components))
        settings = Settings(
            keep=kept_neurons(self.sparsity, d_neurons),
            max_iter=self.max_iter,
            explore=self.explore or 0,
            patience=self.patience,
            tol=self.tol,
            repair=self.repair,
            penalty=self.penalty,
        )
        seeds = range(self.seed, self.seed + self.restarts)
        with torch.no_grad():
            if self.batch_size is not None:
                assert not isinstance(self.init, Tensor)
                found = fit_minibatch(source, self.n_components, self.init, settings, self.batch_size, seeds, progress)
                self._keep(*found, total=source.total)
            else:
                data = Data(source.rows())
                source.check(data.total)
                official = self.mode == "official"
                fit, losses = best_of(
                    data, self.n_components, self.init, settings, official=official, seeds=seeds, progress=progress
                )
                self._keep(fit, losses, total=data.total)
        versions = {"versions": {"interp": interp.__version__, "torch": torch.__version__}}
        self.provenance = {**versions, **source.provenance, **self._settings(), "n_tokens": n_tokens}
        return self

    def transform(
        self, A: Float[Tensor, "token neuron"] | tuple[ActivationStore, str], *, batch_size: int = 8192
    ) -> Float[Tensor, "token component"]:
        """Activations of new tokens: non-negative least squares with the components as they are. On the CPU.

        Raises:
            ValueError: If the data has another number of neurons, or is not a finite matrix.
        """
        source = Source.of(A, self.device, self.dtype)
        components = self._fitted(source.shape[1]).to(source.device, source.dtype)
        inner = gram(components)
        parts = []
        with torch.no_grad():
            for _, rows in source.batches(batch_size):
                cross = components @ rows.T
                parts.append(best_codes(torch.zeros_like(cross), inner, cross).T.cpu())
        return torch.cat(parts)

    def fit_transform(self, A: Float[Tensor, "token neuron"] | tuple[ActivationStore, str]) -> Tensor:
        """`fit`, then the activations of the same tokens."""
        return self.fit(A).activations_

    def inverse_transform(self, activations: Float[Tensor, "token component"]) -> Float[Tensor, "token neuron"]:
        """Neurons from activations: `activations @ components_`."""
        return activations @ self._fitted().to(activations)

    def score(self, A: Float[Tensor, "token neuron"] | tuple[ActivationStore, str]) -> float:
        """Share of the data's sum of squares (not centred) that is explained: 1 is perfect, 0 is no better than zero.

        Raises:
            ValueError: As `transform`, or if the data is all zero.
        """
        source = Source.of(A, self.device, self.dtype)
        components = self._fitted(source.shape[1]).to(source.device, source.dtype)
        loss = total = 0.0
        for _, rows in source.batches(8192):
            codes = self.transform(rows).to(rows)
            loss += exact_loss(rows, components, codes.T)
            total += float(rows.double().square().sum())
        source.check(total)
        return 1.0 - loss / total

    def save(self, path: str | os.PathLike[str]) -> Path:
        """One safetensors file; settings and history are JSON in its header. It replaces an older one only when whole.

        Raises:
            RuntimeError: If nothing was fitted.
        """
        self._fitted()
        facts = {
            "settings": self._settings(),
            "provenance": self.provenance,
            "loss": self.loss_,
            "relative_loss": self.relative_loss_,
            "history": self.history_,
            "restart_losses": self.restart_losses_,
            "best_iter": self.best_iter_,
            "repairs": self.repairs_,
        }
        return write_factors(path, {"components": self.components_, "activations": self.activations_}, "SNMF", facts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SNMF:
        """Read what `save` wrote, to compute where new data is. A start given as a tensor is not in the file.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        tensors, facts = read_factors(path, "SNMF")
        settings = dict(facts["settings"])
        settings["device"] = None
        settings["dtype"] = getattr(torch, settings["dtype"]) if settings["dtype"] else None
        settings["init"] = "kmeans" if settings["init"] == "given" else settings["init"]
        new = cls(settings.pop("n_components"), **settings)
        new.components_, new.activations_ = tensors["components"], tensors["activations"]
        new.loss_, new.relative_loss_ = facts["loss"], facts["relative_loss"]
        new.history_, new.restart_losses_ = facts["history"], facts["restart_losses"]
        new.n_iter_, new.best_iter_, new.repairs_ = len(facts["history"]), facts["best_iter"], facts["repairs"]
        new.provenance = facts["provenance"]
        new._describe()
        return new

    def __repr__(self) -> str:
        state = "not fitted"
        if hasattr(self, "components_"):
            n_dead = int(self.dead_.sum())
            state = f"{1.0 - self.relative_loss_:.1%} explained, {n_dead} dead, {len(self.duplicates_)} duplicate pairs"
        return f"SNMF({self.n_components}, sparsity={self.sparsity:g}; {state})"

    def _keep(self, fit: Fit, losses: list[float], total: float) -> None:
        components, codes = fit.components, fit.codes
        if self.mode == "standard":
            norms = torch.linalg.vector_norm(components, dim=1, keepdim=True, dtype=torch.float64)
            norms = torch.where(norms > 0, norms, 1.0)
            components, codes = (components / norms).to(components.dtype), (codes * norms).to(codes.dtype)
            order = codes.double().square().sum(1).argsort(descending=True, stable=True)
            components, codes = components[order], codes[order]
        self.components_, self.activations_ = components.cpu(), codes.T.contiguous().cpu()
        self.loss_, self.relative_loss_ = fit.loss, fit.loss / total
        self.history_, self.restart_losses_ = fit.history, losses
        self.n_iter_, self.best_iter_, self.repairs_ = len(fit.history), fit.best_iteration, fit.repairs
        self._describe()

    def _describe(self) -> None:
        self.dead_ = (self.components_ == 0).all(1) | (self.activations_ == 0).all(0)
        unit = torch.nn.functional.normalize(self.components_.double(), dim=1)
        near = (unit @ unit.T).triu(1)
        pairs = (near > _TWINS).nonzero().tolist()
        self.duplicates_ = [(i, j, float(near[i, j])) for i, j in pairs]

    def _settings(self) -> dict[str, Any]:
        names = "n_components sparsity repair restarts seed max_iter explore penalty patience tol mode batch_size"
        settings = {name: getattr(self, name) for name in names.split()}
        settings["init"] = "given" if isinstance(self.init, Tensor) else self.init
        settings["device"] = None if self.device is None else str(self.device)
        settings["dtype"] = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return settings

    def _fitted(self, d_neurons: int | None = None) -> Tensor:
        if not hasattr(self, "components_"):
            raise RuntimeError("this SNMF has no components yet; call fit(A) first, or SNMF.load(path)")
        if d_neurons is not None and d_neurons != self.components_.shape[1]:
            raise ValueError(
                f"the components were fitted on {self.components_.shape[1]} neurons, but these activations have "
                f"{d_neurons}; give activations of the same layer of the same model"
            )
        return self.components_
