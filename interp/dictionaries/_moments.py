"""Running sums from which a dictionary's reconstruction metrics are made, in float64."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Moments:
    """Sums over tokens of what `interp.dictionaries.evaluate` needs; the order and size of batches do not matter."""

    def __init__(self, n_latents: int, width: int) -> None:
        self.n = 0
        self.active = 0
        self.fired = torch.zeros(n_latents, dtype=torch.long)
        self.strength = torch.zeros(n_latents, dtype=torch.float64)
        self.sum = torch.zeros(width, dtype=torch.float64)
        names = ("square", "rebuilt", "error", "inner", "ratio", "cosine")
        self.sums: dict[str, float] = dict.fromkeys(names, 0.0)

    def add(
        self,
        latents: Float[Tensor, "token latent"],
        target: Float[Tensor, "token width"],
        rebuilt: Float[Tensor, "token width"],
    ) -> None:
        on = latents != 0
        self.n += len(latents)
        self.active += int(on.sum())
        self.fired += on.sum(0).cpu()
        self.strength += latents.double().sum(0).cpu()
        y, r = target.double(), rebuilt.double()
        self.sum += y.sum(0).cpu()
        norm, size = y.norm(dim=1), r.norm(dim=1)
        inner = (y * r).sum(1)
        tiny = torch.finfo(torch.float64).tiny
        for name, per_token in (
            ("square", norm.square()),
            ("rebuilt", size.square()),
            ("error", (y - r).square().sum(1)),
            ("inner", inner),
            ("ratio", size / norm.clamp(min=tiny)),
            ("cosine", inner / (norm * size).clamp(min=tiny)),
        ):
            self.sums[name] += float(per_token.sum())

    @property
    def mean(self) -> Float[Tensor, " width"]:
        return self.sum / self.n

    @property
    def density(self) -> np.ndarray:
        return self.fired.double().numpy() / self.n

    @property
    def mean_activation(self) -> np.ndarray:
        fired = self.fired.double()
        return torch.where(fired > 0, self.strength / fired.clamp(min=1), torch.nan).numpy()

    def metrics(self) -> dict[str, float]:
        n, s = self.n, self.sums
        variance = s["square"] / n - float(self.mean.square().sum())
        fvu = s["error"] / n / variance if variance > 0 else float("nan")
        return {
            "l0": self.active / n,
            "explained_variance": 1 - fvu,
            "fvu": fvu,
            "mse": s["error"] / n,
            "l2_ratio": s["ratio"] / n,
            "cosine": s["cosine"] / n,
            "reconstruction_bias": s["rebuilt"] / s["inner"] if s["inner"] else float("nan"),
            "dead": float((self.density == 0).mean()),
            "dense": float((self.density > 0.1).mean()),
        }
