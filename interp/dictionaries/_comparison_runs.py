"""The forwards of a comparison: strengths, predictions after the prompt, texts, and their scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._steered_rows import SteeredRows, rows_per_forward
from interp.dictionaries._steering_edits import Mode, make_edit
from interp.dictionaries.kl_strength import strength_for_kl
from interp.dictionaries.steering_scores import Concept, fluency, label_log_odds
from interp.dictionaries.vectors import SteeringVector
from interp.hooks import generate


@dataclass(frozen=True)
class Job:
    """One vector, and the place of its results."""

    method: int
    concept: int
    draw: int
    vector: SteeringVector


class Runs:
    """Runs the model for a comparison and counts forwards, partial ones included."""

    def __init__(
        self,
        bridge: Any,
        *,
        mode: Mode,
        positions: Literal["all", "prompt", "generated", "last"],
        n_tokens: int,
        temperature: float | int,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        batch_size: int | None,
    ) -> None:
        self.bridge, self.n_tokens, self.seed = bridge, n_tokens, seed
        self.mode: Mode = mode
        self.positions: Literal["all", "prompt", "generated", "last"] = positions
        self.sampling: dict[str, Any] = {"temperature": temperature}
        if temperature > 0:
            self.sampling |= {"top_k": top_k, "top_p": top_p}
        self.batch_size = batch_size
        self.forwards = 0
        # what a prompt shows of an intervention on written text only is its action where the next token is predicted
        self.read: Literal["all", "last"] = "all" if positions in ("all", "prompt") else "last"

    def search(
        self, jobs: Sequence[Job], neutral: Tensor, targets: list[float], tolerance: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Strength (NaN where not reached) and achieved divergence, [job, target]."""
        strength, achieved = np.full((2, len(jobs), len(targets)), np.nan)
        for index in _by_hook(jobs):
            found = strength_for_kl(
                self.bridge, [jobs[i].vector for i in index], neutral, targets, mode=self.mode, positions=self.read,
                tolerance=tolerance, batch_size=self.batch_size,
            )  # fmt: skip
            strength[index], achieved[index] = found.values.to_numpy(), found.achieved.to_numpy()
            self.forwards += found.provenance["forwards"]
        return strength, achieved

    def log_odds(
        self, jobs: Sequence[Job], strength: np.ndarray, prompts: Tensor, concepts: Sequence[Concept]
    ) -> Float[Tensor, "job target example"]:
        """Change of the log-odds of each job's concept right after the prompt."""
        n, found = len(prompts), torch.full((*strength.shape, len(prompts)), torch.nan)
        for index in _by_hook(jobs):
            rows = SteeredRows(
                self.bridge, prompts, [jobs[i].vector for i in index], mode=self.mode, positions=self.read,
                batch_size=self.batch_size,
            )  # fmt: skip
            for local, i in enumerate(index):
                tokens = concepts[jobs[i].concept].tokens
                reached = np.flatnonzero(np.isfinite(strength[i]))
                if not len(reached):
                    continue
                levels = torch.tensor(strength[i, reached], dtype=torch.float32).repeat_interleave(n)
                which = torch.full((len(levels),), local)
                after = rows.log_probs(which, levels, torch.arange(n).repeat(len(reached)))
                change = label_log_odds(after, tokens).reshape(-1, n) - label_log_odds(rows.base, tokens)
                found[i, reached] = change.cpu()
            self.forwards += rows.forwards
        return found

    def unsteered(self, prompts: Tensor, draws: int) -> Int[Tensor, "draw example token"]:
        repeats = 1 if self.sampling["temperature"] == 0 else draws
        texts = self._generate(prompts.repeat(repeats, 1), {}, self.seed).reshape(repeats, len(prompts), -1)
        return texts.expand(draws, -1, -1)

    def write(
        self, jobs: Sequence[Job], strength: np.ndarray, prompts: Tensor, repeats: Sequence[int]
    ) -> tuple[list[Int[Tensor, "draw target example token"]], list[Float[Tensor, "draw target example"]]]:
        """What is written by each job, so many times, and its log-probability per token; -1 and NaN if not reached."""
        n, width = len(prompts), strength.shape[1]
        texts = [torch.full((count, width, n, self.n_tokens), -1) for count in repeats]
        scores = [torch.full((count, width, n), torch.nan) for count in repeats]
        size = self.batch_size or rows_per_forward(self.bridge, prompts.shape[1] + self.n_tokens)
        for index in _by_hook(jobs):
            cells = [
                (i, draw, j, example)
                for i in index
                for j in np.flatnonzero(np.isfinite(strength[i])).tolist()
                for draw in range(repeats[i])
                for example in range(n)
            ]
            for start in range(0, len(cells), size):
                part = cells[start : start + size]
                values = torch.stack([jobs[i].vector.values for i, *_ in part])
                levels = torch.tensor([strength[i, j] for i, _, j, _ in part], dtype=torch.float32)
                tokens = prompts[[example for *_, example in part]]
                edits = {jobs[index[0]].vector.hook: make_edit(values, levels, self.mode)}
                new = self._generate(tokens, edits, self.seed + start + 1)
                log_prob = self.score(tokens, new)
                for (i, draw, j, example), row, value in zip(part, new, log_prob, strict=True):
                    texts[i][draw, j, example], scores[i][draw, j, example] = row, value
        return texts, scores

    def score(self, prompts: Tensor, written: Int[Tensor, "... token"]) -> Float[Tensor, "..."]:
        """Mean log-probability per written token under the unsteered model; prompts repeat over leading axes."""
        flat = written.reshape(-1, written.shape[-1])
        rows = torch.cat([prompts.cpu().repeat(len(flat) // len(prompts), 1), flat], 1)
        size = self.batch_size or rows_per_forward(self.bridge, rows.shape[1], read=self.n_tokens)
        self.forwards += -(-len(rows) // size)
        return fluency(self.bridge, rows, prompts.shape[1], batch_size=size).reshape(written.shape[:-1])

    def _generate(self, tokens: Tensor, edits: dict[str, Any], seed: int) -> Tensor:
        self.forwards += self.n_tokens
        written = generate(
            self.bridge, tokens, self.n_tokens, edits=edits, positions=self.positions, seed=seed, **self.sampling
        )  # fmt: skip
        return written[:, tokens.shape[1] :]


def _by_hook(jobs: Sequence[Job]) -> Iterator[list[int]]:
    for hook in dict.fromkeys(job.vector.hook for job in jobs):
        yield [i for i, job in enumerate(jobs) if job.vector.hook == hook]
