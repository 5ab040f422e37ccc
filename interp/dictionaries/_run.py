"""One dictionary in training: a step, its bookkeeping, its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries._files import read_tensors, write_tensors
from interp.dictionaries._parallel import ALONE, Peers, together
from interp.dictionaries.dictionary import Dictionary, Step
from interp.dictionaries.l0_control import L0Controller
from interp.dictionaries.sources import Source
from interp.dictionaries.training_config import TrainingConfig

STATE, RESULT = "state.safetensors", "dictionary.safetensors"


class Run:
    """Advances one dictionary by one batch at a time.

    Attributes:
        step: Steps done.
        saved: Steps that the state on disk holds, None if there is none.
        silent: Tokens since each latent fired, [latent].
        history: An entry per `log_every` steps.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dictionary: Dictionary,
        source: Source,
        path: Path | None,
        *,
        resume: bool,
        peers: Peers = ALONE,
    ) -> None:
        self.config, self.dictionary, self.path, self.peers = config, dictionary, path, peers
        self.step, self.saved = 0, None
        self.silent = torch.zeros(dictionary.n_latents, dtype=torch.long, device=dictionary.W_dec.device)
        self.history: list[dict[str, float]] = []
        self.penalised = hasattr(dictionary, "coefficient")
        if config.target_l0 is not None and not self.penalised:
            raise ValueError(
                f"target_l0={config.target_l0}: {dictionary.architecture} has no sparsity coefficient to steer; its "
                f"budget is k={getattr(dictionary, 'k', None)}"
            )
        start = float(getattr(dictionary, "coefficient", 0.0))
        steps = max(1, round(0.25 * config.n_steps))
        self.control = None if config.target_l0 is None else L0Controller(config.target_l0, start, path_steps=steps)
        self.identity = {"config": plain(config.to_dict()), "source": plain(source.describe())}
        try:
            json.dumps(self.identity)
        except TypeError as error:
            raise ValueError(
                f"the settings cannot be written to a file, so the run could not go on: {error}"
            ) from error
        self.optimiser = torch.optim.Adam(self._groups(), lr=config.learning_rate, betas=config.betas, fused=True)
        state = None if path is None else path / STATE
        there = state is not None and state.exists() and resume
        peers.check_same("settings or data", self.identity)
        peers.check_same(f"files in {path} (do all see the same disk?)", there)
        if state is not None and there:
            self._load(state)
        else:
            self._start(source)
        peers.share([*dictionary.state_dict().values(), self.silent])

    def __str__(self) -> str:
        if not self.history:
            return ""
        last = self.history[-1]
        return f"loss {last['loss']:.4g}, L0 {last['l0']:.1f}, FVU {last['fvu']:.3f}, dead {last['dead']:.1%}"

    def advance(self, batch: Mapping[str, Tensor]) -> None:
        """One step on a batch of activations by hook, all of it in every process.

        Raises:
            FloatingPointError: If the loss or the gradient is not finite, before the weights change; or if weights
                are not when they are to be saved, which leaves the state on disk as it was.
        """
        dictionary, config = self.dictionary, self.config
        inputs, targets = self._of(batch)
        for group in self.optimiser.param_groups:
            group["lr"] = config.rate(self.step)
        options: dict[str, Any] = {"dead": self.silent > config.dead_tokens}
        if self.penalised:
            options["coefficient"] = config.sparsity(self.step) * self._coefficient()
        if dictionary.needs_gradient:
            options["gradient"] = self.peers.own(batch["gradient"].to(dictionary.W_dec.device))
        with together(dictionary, self.peers):
            step = dictionary.step(
                self.peers.own(inputs), None if targets is None else self.peers.own(targets), **options
            )
        step, loss = self._of_all(step)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")
        self.optimiser.zero_grad(set_to_none=True)
        step.loss.backward()
        self.peers.average_gradients(dictionary.parameters())
        dictionary.project_gradient()
        limit = math.inf if config.clip is None else config.clip
        norm = float(torch.nn.utils.clip_grad_norm_(dictionary.parameters(), limit))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        self.optimiser.step()
        dictionary.renormalise()
        self._account(step, inputs, targets, loss)
        if config.resample_every and self.step % config.resample_every == 0 and 2 * self.step <= config.n_steps:
            self._resample(inputs, targets)
        if self.path is not None and self.step % config.checkpoint_every == 0:
            self.save()

    def finish(self) -> None:
        """Write the last state and the result."""
        self.dictionary.metadata = {"history": self.history, "config": self.config.to_dict()}
        if self.path is None or (self.saved == self.step and (self.path / RESULT).exists()):
            return
        if self.saved != self.step:
            self.save()
        if not self.peers.first:
            return
        record = {"settings": self.dictionary.settings(), "metadata": plain(self.dictionary.metadata)}
        write_tensors(self.path / RESULT, self.dictionary.state_dict(), record)

    def save(self) -> None:
        assert self.path is not None
        bad = [name for name, value in self.dictionary.named_parameters() if not bool(value.isfinite().all())]
        if bad:  # never in place of a good state
            raise FloatingPointError(f"{', '.join(bad)} are not finite any more")
        self.peers.check_same("weights", self.dictionary.state_dict())
        if not self.peers.first:
            self.saved = self.step
            return
        tensors = {f"dictionary.{name}": value for name, value in self.dictionary.state_dict().items()}
        for i, moments in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": value for name, value in moments.items()}
        tensors["silent"] = self.silent
        control = None if self.control is None else {**self.control.state, "coefficient": self.control.coefficient}
        record = {"step": self.step, "history": self.history, "control": control, **self.identity}
        (self.path / RESULT).unlink(missing_ok=True)  # of an earlier run, or of fewer steps
        write_tensors(self.path / STATE, tensors, record)
        self.saved = self.step

    def _load(self, path: Path) -> None:
        tensors, record = read_tensors(path)
        for what in ("config", "source"):
            if record[what] != self.identity[what]:
                raise ValueError(
                    f"{path} belongs to other {'settings' if what == 'config' else 'data'}: "
                    f"{_differences(record[what], self.identity[what])}. Choose another path, or resume=False to "
                    f"train anew"
                )
        own = {
            name.removeprefix("dictionary."): value for name, value in tensors.items() if name.startswith("dictionary.")
        }
        self.dictionary.load_state_dict(own)
        state: dict[int, dict[str, Tensor]] = {}
        layouts = list(self.dictionary.parameters())
        for name, value in tensors.items():
            if name.startswith("adam."):
                _, i, moment = name.split(".")
                like = layouts[int(i)]
                # moments lie in memory as the weights do, which the fused step relies on
                state.setdefault(int(i), {})[moment] = (
                    torch.empty_like(like, dtype=value.dtype).copy_(value) if value.shape == like.shape else value
                )
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.silent.copy_(tensors["silent"])
        self.step = self.saved = int(record["step"])
        self.history = record["history"]
        if self.control is not None:
            saved = dict(record["control"])
            self.control.coefficient = saved.pop("coefficient")
            self.control.state = saved

    def _start(self, source: Source) -> None:
        """Normalising constants and the first bias, from the first batches."""
        config, dictionary = self.config, self.dictionary
        batches = source.batches(config.batch_size, seed=config.seed)
        first = next(batches)
        inputs, targets = self._of(first)
        if dictionary.normalisation in ("mean_norm", "mean_square"):
            more = [(inputs, targets)]
            while len(more) * config.batch_size < config.normalisation_tokens and len(more) < config.n_steps:
                more.append(self._of(next(batches)))
            joined = torch.cat([x for x, _ in more])
            dictionary.estimate_normalisation(
                joined, None if targets is None else torch.cat([y for _, y in more if y is not None])
            )
        if config.bias_start != "zero":
            _, target = dictionary._batch(inputs, targets)
            middle = target.mean(0) if config.bias_start == "mean" else geometric_median(target)
            with torch.no_grad():
                dictionary.b_dec.copy_(middle)

    def _of(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        device = self.dictionary.W_dec.device
        target = self.dictionary.target_hook
        return batch[self.dictionary.hook].to(device), None if target is None else batch[target].to(device)

    def _coefficient(self) -> float:
        return float(getattr(self.dictionary, "coefficient")) if self.control is None else self.control.coefficient  # noqa: B009

    def _account(self, step: Step, inputs: Tensor, targets: Tensor | None, loss: float) -> None:
        self.silent = torch.where(step.fired, 0, self.silent + len(inputs))
        if self.control is not None and self.config.sparsity(self.step) == 1.0:
            self.control.update(step.l0, self._highest(step))
        self.step += 1
        if self.step % self.config.log_every == 0 or self.step == self.config.n_steps:
            with torch.no_grad():
                _, target = self.dictionary._batch(inputs, targets)
                error = self.peers.sum((self.peers.own(target) - step.reconstruction).double().square().sum())
                fvu = float(error / (target - target.mean(0)).double().square().sum())
            dead = float((self.silent > self.config.dead_tokens).double().mean())
            entry = {"step": float(self.step), "loss": loss, "l0": step.l0, "fvu": fvu, "dead": dead}
            entry["rate"] = self.config.rate(self.step - 1)
            if self.penalised:
                entry["coefficient"] = self._coefficient()
            terms = {f"loss_{k}": float(self.peers.mean(v.detach())) for k, v in step.terms.items()}
            self.history.append(entry | terms)

    def _groups(self) -> list[Any]:
        """Parameters in their order. A controller changes the penalty by orders of magnitude within a run; thresholds,
        which it acts on directly, must not move by what the gradients were a thousand steps ago."""
        named = dict(self.dictionary.named_parameters())
        if self.control is None or "threshold" not in named:
            return list(named.values())
        own = {"betas": (self.config.betas[0], min(self.config.betas[1], 0.99))}
        return [{"params": [value], **(own if name == "threshold" else {})} for name, value in named.items()]

    def _highest(self, step: Step) -> float | None:
        """The largest sparsity coefficient that makes sense, where the architecture knows it."""
        highest = getattr(self.dictionary, "highest_coefficient", None)
        if highest is None or self.config.target_l0 is None:
            return None
        return highest(float(self.peers.mean(step.terms["reconstruction"].detach())), self.config.target_l0)

    def _of_all(self, step: Step) -> tuple[Step, float]:
        """A step's loss, and which latents fired and how many, in the whole batch."""
        if self.peers.size == 1:
            return step, float(step.loss.detach())
        sums = torch.tensor([float(step.loss.detach()), step.l0], dtype=torch.float64, device=step.fired.device)
        own = torch.cat([sums, step.fired.double()])  # one message for all of it
        mean = self.peers.mean(own)
        return replace(step, fired=mean[2:] > 0, l0=float(mean[1])), float(mean[0])

    @torch.no_grad()
    def _resample(self, inputs: Tensor, targets: Tensor | None) -> None:
        """Point dead latents at inputs that are rebuilt badly (Bricken et al. 2023), and forget their moments."""
        dead = (self.silent > self.config.dead_tokens).nonzero()[:, 0]
        if not len(dead):
            return
        dictionary = self.dictionary
        z, target = dictionary._batch(inputs, targets)
        latents = dictionary.activate(dictionary._preactivations(z))
        residual = target - dictionary._decoded(latents) - dictionary._skipped(z)
        draws = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        weights = residual.square().sum(1).square().double().cpu()
        picked = torch.multinomial(weights, len(dead), replacement=len(dead) > len(z), generator=draws).to(z.device)
        alive = torch.ones(dictionary.n_latents, dtype=torch.bool, device=z.device)
        alive[dead] = False
        size = (
            dictionary.W_enc[:, alive].norm(dim=0).mean() if bool(alive.any()) else dictionary.W_enc.norm(dim=0).mean()
        )
        inputs_of = dictionary._centred(z)[picked]
        dictionary.W_enc[:, dead] = (0.2 * size * inputs_of / inputs_of.norm(dim=1, keepdim=True).clamp(min=1e-12)).T
        rows = residual[picked] / residual[picked].norm(dim=1, keepdim=True).clamp(min=1e-12)
        dictionary.W_dec[dead] = rows * (1.0 if dictionary.decoder == "unit" else dictionary.decoder_norm)
        for name, parameter in dictionary.named_parameters():
            along = {"W_enc": (slice(None), dead), "W_dec": dead}.get(name, dead)
            if parameter.shape[-1:] != (dictionary.n_latents,) and name != "W_dec":
                continue  # b_dec and W_skip belong to no latent
            if name in ("b_enc", "b_gate", "b_mag"):
                parameter[dead] = 0.0
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][moment][along] = 0.0
        self.silent[dead] = 0
        moments = [value for state in self.optimiser.state.values() for value in state.values()]
        self.peers.share([*dictionary.state_dict().values(), *moments])


def geometric_median(points: Tensor, *, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances to all rows (Weiszfeld's iteration), [width]."""
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=1, keepdim=True).clamp(min=1e-12)
        new = (points * weights).sum(0) / weights.sum()
        moved = (new - median).norm()
        median = new
        if float(moved) <= tolerance * float(median.norm() + 1e-12):
            break
    return median


def plain(value: Any) -> Any:
    """As JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if hasattr(value, "item"):  # a number of numpy or torch
        return value.item()
    return value


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], under: str = "") -> str:
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.append(_differences(a, b, f"{under}{key}."))
        elif a != b:
            found.append(f"{under}{key} is {a} there and {b} here")
    return "; ".join(part for part in found if part)
