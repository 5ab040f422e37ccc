"""Editing one fact in one MLP: a rank-one change of its down-projection, fitted, put in and taken out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.models.identity import weights_put_back
from interp.patching._cells import choice
from interp.patching._measure import checked, embedding_std, gaussian_rows
from interp.patching._rank_one import (
    Goal,
    fit_writes,
    keys_and_values,
    listeners,
    no_metric,
    require_mlp,
    second_moment,
)


@dataclass(frozen=True, eq=False)
class RankOneEdits:
    """One edit per example of the down-projection of one MLP: `W_out + outer(read[i], write[i])`.

    `W_out` maps neurons `[d_mlp]` to the stream `[d_model]`. `read` answers 1 to the neurons of the fact's subject and
    as little as it can to the neurons of other tokens; `write` is what the MLP then adds, before any norm behind it.

    Attributes:
        layer: The MLP's.
        read: In 1 / units of the neurons.
        write: In units of the MLP's output.
        targets: The token that each edit was fitted to make more probable (less, for `"erase"`).
        goal: `"inject"`, `"erase"` or `"force"`; see `fit_edits`.
        values_norm: Length of what the MLP wrote at the fact's position before the edit.
        noise_std: Standard deviation of the noise on the subject under which `"force"` was fitted, else 0.
        seed: For that noise.
    """

    layer: int
    read: Float[Tensor, "example d_mlp"]
    write: Float[Tensor, "example d_model"]
    targets: Int[Tensor, "example"]
    goal: Goal
    values_norm: Float[Tensor, "example"]
    noise_std: float = 0.0
    seed: int = 0

    @property
    def norms(self) -> Float[Tensor, "example"]:
        """Length of what each edit writes, over the length of what the MLP wrote there."""
        return (self.write.norm(dim=-1) / self.values_norm).float().cpu()

    def __len__(self) -> int:
        return len(self.targets)


def fit_edits(
    bridge: Any,
    prompts: Any,
    layer: int,
    *,
    goal: Goal = "inject",
    targets: Int[Tensor, "example"] | None = None,
    position: str = "subject",
    background: Int[Tensor, "row pos"] | None = None,
    ridge: float | int = 0.01,
    steps: int = 25,
    learning_rate: float | int = 0.3,
    max_norm: float | int = 4.0,
    noise: float | int = 3.0,
    seed: int = 0,
    batch_size: int = 64,
) -> RankOneEdits:
    """A rank-one edit of the MLP of one layer for each example, independent of the others. Weights are not changed.

    The edit listens to the subject: `read = C^-1 k / (k^T C^-1 k)`, with k the neurons at `position` and C the second
    moment of neurons over `background`. What it writes is found by Adam, so that the target gets probable when the
    edited model reads the prompt. Costs one forward of the background up to this layer and `steps` forward and
    backward passes of the prompts from this layer on.

    Args:
        prompts: Their clean tokens; `end` is where the answer is read.
        goal: `"inject"`: the foil (or `targets`) becomes the answer. `"erase"`: the answer loses its probability.
            `"force"`: the answer is given although noise on the subject has destroyed it (as in `causal_trace`; one
            draw for each example, the same wherever its subject stands).
        targets: The tokens to inject; by default the foils. Only for `goal="inject"`.
        position: The name of `prompts.positions` where the subject ends.
        background: Token ids of ordinary text, `[row, pos]`; by default the clean prompts. Text of few kinds leaves C
            nearly singular: then raise `ridge`.
        ridge: Added to the diagonal of C, in units of its mean.
        steps, learning_rate: Of Adam; the rate in units of the root mean square of what the MLP wrote there.
        max_norm: Longest `write`, in units of the norm of what the MLP wrote there. Without a bound any layer can do
            anything.
        noise: Standard deviation of the noise in standard deviations of the token embeddings. Only for `"force"`.
        batch_size: Most prompts of one forward.

    Raises:
        ValueError: If options or prompts do not fit, or this model's MLP is not one down-projection of neurons.
        RuntimeError: If the model is in training mode.

    Source:
        The update is that of Meng, Bau, Andonian & Belinkov 2022 (arXiv:2202.05262), section 3.1. There k is a mean
        over random prefixes, C is taken from Wikipedia, and what is written is fitted at the subject's position alone
        with a penalty on changes of what the subject is; here k is of the prompt itself, the edit is fitted as it
        will act, at every position, and the bound on its norm is all that keeps it small. The goals are three of the
        five of Hase, Bansal, Kim & Ghandeharioun 2023 (arXiv:2301.04213), section 5.
    """
    choice("goal", goal, get_args(Goal))
    checked(bridge, prompts, no_metric, "resid_pre")
    require_mlp(bridge, layer)
    choice("position", position, prompts.positions)
    where, ends = prompts.positions[position].cpu(), prompts.positions["end"].cpu()
    if bool((where > ends).any()):
        row = int((where > ends).nonzero()[0])
        raise ValueError(f"example {row}: the subject ends at {int(where[row])}, after the answer at {int(ends[row])}")
    if targets is not None and goal != "inject":
        raise ValueError(f"targets= are tokens to inject; goal={goal!r} is about the answers of the prompts")
    if targets is None:
        targets = prompts.foils if goal == "inject" else prompts.answers
    if targets is None:
        raise ValueError("these prompts have no foils to inject; pass targets=, one token id per prompt")
    if len(targets) != len(prompts) or not 0 <= int(targets.min()) <= int(targets.max()) < int(bridge.cfg.d_vocab):
        raise ValueError(
            f"targets are {len(targets)} ids from {int(targets.min())} to {int(targets.max())}; expected one for each "
            f"of {len(prompts)} prompts, below {int(bridge.cfg.d_vocab)}"
        )
    sizes = {"steps": steps, "learning_rate": learning_rate, "max_norm": max_norm, "ridge": ridge, "noise": noise}
    if wrong := {name: size for name, size in {**sizes, "batch_size": batch_size}.items() if not size > 0}:
        raise ValueError(f"{wrong} must be positive")
    sigma = noise * embedding_std(bridge) if goal == "force" else 0.0
    tokens = prompts.clean if background is None else background
    moment = second_moment(bridge, tokens, layer, batch_size)
    reads, writes, lengths = [], [], []
    for rows in torch.arange(len(prompts)).split(batch_size):
        some = prompts.clean[rows]
        shake = subject_noise(bridge, rows, where[rows], prompts.clean.shape[1], sigma, seed)
        keys, values = keys_and_values(bridge, some, where[rows], layer, shake)
        if not bool((keys.abs().amax(-1) > 0).all()):
            raise ValueError(
                f"all neurons of layer {layer} are 0 at {position!r} of some examples: nothing to listen to"
            )
        read = listeners(keys, moment, float(ridge))
        reads.append(read.to(values))
        lengths.append(values.norm(dim=-1))
        writes.append(
            fit_writes(
                bridge, some, ends[rows], targets[rows], layer, reads[-1], values, goal=goal, noise=shake, steps=steps,
                learning_rate=float(learning_rate), max_norm=float(max_norm),
            )
        )  # fmt: skip
    return RankOneEdits(
        layer, torch.cat(reads), torch.cat(writes), targets.cpu(), goal, torch.cat(lengths), float(sigma), seed
    )


@contextmanager
def edited_weights(bridge: Any, edits: RankOneEdits, example: int) -> Iterator[None]:
    """The weights themselves with the edit of one example in them; put back bit for bit on leaving, also by an
    exception.

    Contexts may be nested, so that several edits act together; leave them in reverse order.

    Raises:
        IndexError: If there is no such example.
        ValueError: If the edit is of another model, or the weight of this model's down-projection cannot be written.
    """
    if not -len(edits) <= example < len(edits):
        raise IndexError(f"example {example} of {len(edits)} edits")
    require_mlp(bridge, edits.layer)
    weight = _weight(bridge, edits.layer)
    change = torch.outer(edits.read[example].double(), edits.write[example].double())
    if change.shape != weight.shape:
        raise ValueError(
            f"the edit is {tuple(change.shape)} but W_out of layer {edits.layer} of {bridge.cfg.model_name} is "
            f"{tuple(weight.shape)}; it was fitted on another model"
        )
    before = weight.detach().clone()
    with weights_put_back(bridge):
        try:
            with torch.no_grad():
                weight.copy_((weight.double() + change.to(weight.device)).to(weight.dtype))
            yield
        finally:
            with torch.no_grad():
                weight.copy_(before)


def subject_noise(
    bridge: Any, examples: Tensor, where: Tensor, n_pos: int, sigma: float, seed: int
) -> Float[Tensor, "row pos d_model"] | None:
    """The noise that belongs to these examples, at `where` alone; None where there is none."""
    if sigma == 0:
        return None
    at = torch.arange(n_pos) == where[:, None]
    return sigma * gaussian_rows(examples, 1, int(bridge.cfg.d_model), seed) * at.unsqueeze(-1)


def _weight(bridge: Any, layer: int) -> Tensor:
    """`W_out` [d_mlp, d_model] as a view of the parameter, whichever way round that is kept."""
    mlp = bridge.blocks[layer].mlp
    weight = mlp.W_out
    if not any(parameter.data_ptr() == weight.data_ptr() for parameter in mlp.parameters()):
        raise ValueError(
            f"W_out of layer {layer} of {bridge.cfg.model_name} is not one matrix (quantised or sharded), so it cannot "
            "be edited in place"
        )
    return weight
