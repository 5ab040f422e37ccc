"""Steering: a direction added to, clamped in, or taken out of the activations of every forward inside a context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries._steering_edits import Gate, Mode, Positions, at_positions, check_steering
from interp.dictionaries.steering_latents import steering_edits
from interp.dictionaries.vectors import SteeringLatent, SteeringVector, separation
from interp.hooks import generate, interventions
from interp.models import require_eval


@contextmanager
def steer(
    bridge: Any,
    vector: SteeringVector,
    strength: float | int | Float[Tensor, " batch"] = 1.0,
    *,
    mode: Mode = "add",
    positions: Positions = "all",
    prompt_length: int | None = None,
    gate: Gate | None = None,
    keep_norm: bool = False,
) -> Iterator[None]:
    """Every forward inside the context is steered along a vector; nothing is left behind. Contexts nest.

    With h the activation of a token, v the vector and u = v / |v|: `"add"` gives h + strength v; `"clamp"` gives
    h + (strength - u.h) u, so the projection on the direction is `strength`, in units of the activations; `"ablate"`
    gives h - strength (u.h) u, so that 1 takes the direction out. Of a latent of a dictionary (`latent_vectors`) the
    latter two set or scale down the latent itself. Costs no forward of its own, but one over three tokens when a hook
    is first used.

    Args:
        strength: One number, or one per row of the batch: many strengths in one forward. A vector per row is what
            `strength_for_kl` and `compare_steering` use.
        positions: `"all"`, `"last"`, a list of positions or a bool mask [pos] or [batch, pos]; with `prompt_length`
            also `"prompt"` (those before it) and `"generated"` (from it on). For writing text use `generate_steered`.
        gate: Conditional steering: a function of the activation [batch, pos, ...] that gives a weight per token
            (bool, or 0 to 1), such as a `Probe`; or weights per row [batch], decided before. The change is multiplied
            by it.
        keep_norm: Scale each edited token back to the length it had before.

    Raises:
        KeyError: If the hook does not exist. ValueError: Before any forward, if mode, shape, positions or the hook
            cannot be honoured.

    Source:
        Addition at all positions as in arXiv:2506.10920 and in contrastive activation addition; clamping a rank-one
        coordinate as the knob of Minder et al. 2025 (ICLR); the gate as in weighted activation steering, whose
        released code trains the detector only. `keep_norm` is the rescaling option of Hojer et al. 2025 (ICLR).
    """
    _check(bridge, vector, mode)
    _check_positions(positions, prompt_length)
    edits = steering_edits(bridge, vector, strength, mode, gate=gate, keep_norm=keep_norm)
    with interventions(bridge, {hook: at_positions(edit, positions, prompt_length) for hook, edit in edits.items()}):
        yield


def generate_steered(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    n_tokens: int,
    vector: SteeringVector,
    strengths: float | int | Sequence[float | int] = 1.0,
    *,
    mode: Mode = "add",
    positions: Literal["all", "prompt", "generated", "last"] = "all",
    gate: Gate | None = None,
    temperature: float | int = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Int[Tensor, "strength batch written"]:
    """What the model writes under steering, for every strength: prompts followed by new tokens.

    All strengths are rows of one batch: `n_tokens` forwards in all, the first over the prompts and the others, where
    keys and values are cached, over one token. Strength 0 of `"add"` and of `"ablate"` is the unsteered model.

    Args:
        positions: See `interp.hooks.generate`; `"last"` is the prompt's last position and all generated ones.

    Raises:
        As `steer` and `interp.hooks.generate`, before any forward.
    """
    require_eval(bridge)
    _check(bridge, vector, mode)
    levels = [float(strengths)] if isinstance(strengths, (int, float)) else [float(level) for level in strengths]
    if not levels:
        raise ValueError("strengths is empty; give at least one")
    n = len(tokens)
    row_strengths = torch.tensor(levels).repeat_interleave(n)
    if isinstance(gate, Tensor):
        gate = gate.repeat(len(levels))
    edits = steering_edits(bridge, vector, row_strengths, mode, gate=gate, keep_norm=False)
    written = generate(
        bridge, tokens.repeat(len(levels), 1), n_tokens, edits=edits, positions=positions, temperature=temperature,
        top_k=top_k, top_p=top_p, seed=seed,
    )  # fmt: skip
    return written.reshape(len(levels), n, -1)


@dataclass(frozen=True)
class Knob:
    """A one-dimensional coordinate of the model that is read, and set to a constant.

    Attributes:
        vector: Its direction; only the direction counts.
        settings: Named values of the projection on the unit direction, such as the means under two instructions.
        spread: Standard deviation of the projection within each setting.
        separation: Area under the ROC curve of the projection between the two settings it was calibrated on.
    """

    vector: SteeringVector
    settings: Mapping[str, float]
    spread: Mapping[str, float]
    separation: float

    @classmethod
    def calibrate(cls, vector: SteeringVector, activations: Mapping[str, Float[Tensor, "n ..."]]) -> Knob:
        """Settings are the mean projections of activations (at the vector's hook) under two named conditions.

        Raises:
            ValueError: If there are not two conditions, or shapes do not fit the vector.

        Source:
            Minder et al. 2025 (ICLR) find the direction by rank-one alignment search at the last token and set it to a
            constant on the side wanted; here the constants are the means that the model itself shows.
        """
        if len(activations) != 2:
            raise ValueError(f"a knob is calibrated between two conditions; got {sorted(activations)}")
        unit = vector.unit().values.flatten()
        along: dict[str, Tensor] = {}
        for name, rows in activations.items():
            if rows.shape[1:] != vector.values.shape or len(rows) < 2:
                raise ValueError(
                    f"{name!r} has shape {tuple(rows.shape)}; expected [n >= 2, {tuple(vector.values.shape)}]"
                )
            along[name] = rows.detach().float().cpu().flatten(1) @ unit
        first, second = along.values()
        return cls(
            vector,
            {name: float(values.mean()) for name, values in along.items()},
            {name: float(values.std()) for name, values in along.items()},
            separation(second, first),
        )

    @contextmanager
    def turn(
        self, bridge: Any, to: str | float | int, *, positions: Positions = "last", gate: Gate | None = None
    ) -> Iterator[None]:
        """Inside the context the coordinate is set to a named setting or a number, at the last position by default."""
        if isinstance(to, str) and to not in self.settings:
            raise ValueError(f"no setting {to!r}; the knob has {', '.join(map(repr, self.settings))}, or give a number")
        value = self.settings[to] if isinstance(to, str) else float(to)
        # settings are projections, also where the direction is that of a latent
        vector = self.vector.plain() if isinstance(self.vector, SteeringLatent) else self.vector
        with steer(bridge, vector, value, mode="clamp", positions=positions, gate=gate):
            yield


def _check(bridge: Any, vector: SteeringVector, mode: Mode) -> None:
    """Latents that are set need not be projected on, and their hooks are checked with the dictionary."""
    if isinstance(vector, SteeringLatent) and mode in ("clamp", "ablate"):
        check_steering(bridge, vector.plain(), mode)
    else:
        check_steering(bridge, vector, mode)


def _check_positions(positions: Positions, prompt_length: int | None) -> None:
    if not isinstance(positions, str):
        if not isinstance(positions, Tensor) and not list(positions):
            raise ValueError("positions is empty: nothing would be steered")
        return
    if positions not in ("all", "prompt", "generated", "last"):
        raise ValueError(
            f"positions={positions!r}; expected 'all', 'prompt', 'generated', 'last', a list or a bool mask"
        )
    if (positions in ("prompt", "generated")) != (prompt_length is not None):
        raise ValueError(
            f"positions={positions!r} with prompt_length={prompt_length}; 'prompt' and 'generated' need the number of "
            f"prompt tokens, the others take none. For writing text use generate_steered"
        )
    if prompt_length is not None and prompt_length < 1:
        raise ValueError(f"prompt_length={prompt_length}; expected at least 1")
