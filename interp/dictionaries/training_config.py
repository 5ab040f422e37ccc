"""What to train and how, as plain values that go into a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class TrainingConfig:
    """One dictionary to be trained.

    Attributes:
        dictionary: Settings of `interp.dictionaries.build`: architecture, n_latents, hook and options. `d_in` and
            `d_out` are read off the activations.
        n_steps: Optimiser steps.
        batch_size: Tokens per step.
        learning_rate: Of Adam, after warm-up.
        betas: Of Adam.
        warmup_steps: Steps over which the learning rate rises linearly from 0.
        decay: Share of the steps, at the end, over which it falls linearly to 0.
        clip: Largest norm of the gradient of all parameters; None for none.
        sparsity_warmup_steps: Steps over which the sparsity coefficient rises linearly from 0.
        target_l0: Steer the coefficient to this many active latents per token; None keeps it as it is.
        dead_after: Tokens without firing after which a latent counts as dead; None for a fiftieth of the steps' worth,
            from 10 to 1,000 steps: a latent found dead late in a run has no time left to be revived.
        resample_every: Steps between replacing dead latents by poorly rebuilt inputs, in the first half of training;
            None for never. For architectures without an auxiliary loss.
        bias_start: First value of an autoencoder's `b_dec`: zero, the mean, or the geometric median of the first batch.
        normalisation_tokens: Tokens from which normalising constants are estimated.
        seed: Of the order of batches and of resampling; initial weights have `dictionary["seed"]`.
        log_every: Steps between entries of the history.
        checkpoint_every: Steps between checkpoints, where a path is given.
    """

    dictionary: Mapping[str, Any]
    n_steps: int = 10_000
    batch_size: int = 4096
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    decay: float = 0.2
    clip: float | None = 1.0
    sparsity_warmup_steps: int = 0
    target_l0: float | None = None
    dead_after: int | None = None
    resample_every: int | None = None
    bias_start: Literal["zero", "mean", "geometric_median"] = "zero"
    normalisation_tokens: int = 2**17
    seed: int = 0
    log_every: int = 100
    checkpoint_every: int = 1000
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("n_steps", "batch_size", "log_every", "checkpoint_every", "normalisation_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected at least 1")
        for name in ("warmup_steps", "sparsity_warmup_steps"):
            if not 0 <= getattr(self, name) <= self.n_steps:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 to n_steps={self.n_steps}")
        if not self.learning_rate > 0 or not 0 <= self.decay <= 1 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError(
                f"learning_rate={self.learning_rate}, decay={self.decay}, betas={self.betas}; expected a rate above 0, "
                f"a share from 0 to 1 and betas from 0 to below 1"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip={self.clip}; expected above 0, or None")
        if self.target_l0 is not None and not self.target_l0 > 0:
            raise ValueError(f"target_l0={self.target_l0}; expected above 0, or None")
        for name in ("dead_after", "resample_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value}; expected at least 1, or None")
        if self.bias_start not in ("zero", "mean", "geometric_median"):
            raise ValueError(f'bias_start={self.bias_start!r}; expected "zero", "mean" or "geometric_median"')
        if "architecture" not in self.dictionary or "n_latents" not in self.dictionary:
            raise ValueError(f"dictionary settings need architecture and n_latents; got {sorted(self.dictionary)}")

    @property
    def dead_tokens(self) -> int:
        return self.dead_after or self.batch_size * min(1000, max(10, self.n_steps // 50))

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        up = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decaying = self.decay * self.n_steps
        down = min(1.0, (self.n_steps - step) / decaying) if decaying else 1.0
        return self.learning_rate * up * down

    def sparsity(self, step: int) -> float:
        """The factor on the sparsity coefficient in step `step`."""
        return min(1.0, (step + 1) / self.sparsity_warmup_steps) if self.sparsity_warmup_steps else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a JSON file."""
        plain = dataclasses.asdict(self)
        return {**plain, "dictionary": dict(self.dictionary), "betas": list(self.betas), "notes": dict(self.notes)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """The other way round.

        Raises:
            ValueError: For names that a configuration does not have.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"a training configuration has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        options = dict(values)
        if "betas" in options:
            options["betas"] = tuple(options["betas"])
        return cls(**options)
