"""What a clamp does to activations: which neurons, which hook, which positions, which number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.hooks import Edit, hook_name, names
from interp.hooks.names import device_of
from interp.models import Geometry

Mode = Literal["set", "scale", "add", "ablate"]
Site = Literal["post", "pre", "pre_linear"]
Neuron = tuple[int, int]
Positions = int | Sequence[int] | Tensor | None


@dataclass(frozen=True)
class Clamps:
    """Neurons that are clamped together, by layer: indices `[neuron]`, and a number for each (unused by "ablate")."""

    layers: Mapping[int, tuple[Int[Tensor, "neuron"], Float[Tensor, "neuron"]]]


def new_activation(mode: Mode, old: Tensor, value: Tensor) -> Tensor:
    """The clamped activation; `value` broadcasts against `old`."""
    if mode == "set":
        return value.expand_as(old)
    if mode == "scale":
        return old * value
    return old + value if mode == "add" else torch.zeros_like(old)


def clamp_edits(
    bridge: Any, neurons: Sequence[Neuron], value: Any, mode: Mode, site: Site, positions: Positions = None
) -> dict[str, Edit]:
    """The edits of one clamp that is the same in every row, by hook name."""
    clamps = make_clamps(neurons, value, mode)

    def at(layer: int) -> Edit:
        columns, numbers = clamps.layers[layer]

        def edit(tensor: Tensor) -> Tensor:
            new = tensor.clone()
            index, number = columns.to(tensor.device), numbers.to(tensor)
            clamped = new_activation(mode, tensor[..., index], number)
            where = position_mask(positions, tensor.shape[0], tensor.shape[1]).to(tensor.device)
            new[..., index] = torch.where(where[..., None], clamped, tensor[..., index])
            return new

        return edit

    return {site_hook(bridge, site, layer): at(layer) for layer in clamps.layers}


def make_clamps(neurons: Sequence[Neuron], value: Any, mode: Mode) -> Clamps:
    """Neurons grouped by layer, each with its number."""
    numbers = _numbers(value, len(neurons), mode)
    layers: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in sorted({layer for layer, _ in neurons}):
        here = [i for i, neuron in enumerate(neurons) if neuron[0] == layer]
        layers[layer] = (torch.tensor([neurons[i][1] for i in here]), numbers[here])
    return Clamps(layers)


def _numbers(value: Any, n: int, mode: Mode) -> Tensor:
    if mode == "ablate":
        if value is not None:
            raise ValueError(
                f"mode='ablate' sets neurons to 0 but value={value!r}; to set another number use mode='set'"
            )
        return torch.zeros(n)
    if value is None:
        raise ValueError(f"mode={mode!r} needs a value, one number or one for each of the {n} neurons")
    numbers = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != n):
        raise ValueError(f"value has shape {tuple(numbers.shape)} for {n} neurons; expected one number, or one each")
    if not bool(numbers.isfinite().all()):
        raise ValueError(f"value={value!r} is not finite")
    return numbers.expand(n).clone()


def check_neurons(neurons: Iterable[Any], shape: Geometry, what: str = "neurons") -> list[Neuron]:
    """Pairs `(layer, index)` of ints, once they are known to exist and to be named once."""
    if isinstance(neurons, str | Mapping):
        raise ValueError(f"{what} is a {type(neurons).__name__}; expected pairs (layer, index)")
    try:
        pairs = [(int(layer), int(index)) for layer, index in neurons]
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be pairs (layer, index), for instance [(2, 17)]; got {neurons!r}") from None
    if not pairs:
        raise ValueError(f"{what} is empty; name at least one pair (layer, index)")
    wrong = [p for p in pairs if not (0 <= p[0] < shape.n_layers and 0 <= p[1] < shape.d_mlp)]
    if wrong:
        raise ValueError(
            f"{what} {wrong[:5]} do not exist: this model has layers 0 to {shape.n_layers - 1} with neurons 0 to "
            f"{shape.d_mlp - 1}"
        )
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"{what} names {next(p for p in pairs if pairs.count(p) > 1)} more than once")
    return pairs


def site_hook(bridge: Any, site: Site, layer: int) -> str:
    """The hook of a site: activations `[batch, pos, d_mlp]`.

    Raises:
        ValueError: If this model has no such activation.
    """
    if site == "post":
        return hook_name("neuron", layer)
    name = f"blocks.{layer}.mlp.hook_{site}"
    if name not in names(bridge, name):
        known = [kind for kind in get_args(Site) if names(bridge, f"blocks.{layer}.mlp.hook_{kind}")]
        raise ValueError(
            f"site={site!r}: {bridge.cfg.model_name} has no {name!r} (only gated MLPs have a linear input beside a "
            f"gate); use one of {', '.join(map(repr, known))}"
        )
    return name


def choice(name: str, value: Any, options: Iterable[Any]) -> None:
    """Raise unless `value` is one of the options."""
    if value not in (options := list(options)):
        raise ValueError(f"{name}={value!r}; expected one of {', '.join(map(repr, options))}")


def position_mask(positions: Positions, n: int, n_pos: int) -> Tensor:
    """Where a clamp acts, `[n, n_pos]` bool on the CPU. Ints and lists are the same positions in every row, tensors
    `[n]` or `[n, k]` are those of each row; negative ones count from the end; None is everywhere."""
    if positions is None:
        return torch.ones(n, n_pos, dtype=torch.bool)
    if isinstance(positions, Tensor):
        if positions.ndim not in (1, 2) or len(positions) != n or positions.is_floating_point():
            raise ValueError(
                f"positions is a {positions.dtype} tensor {tuple(positions.shape)} for {n} rows; expected integers "
                f"[{n}] or [{n}, k]. For the same positions in every row pass a list"
            )
        index = positions.detach().cpu().long().reshape(n, -1)
    else:
        index = torch.tensor([positions] if isinstance(positions, int) else list(positions), dtype=torch.long)
        index = index.expand(n, -1)
    wrong = (index < -n_pos) | (index >= n_pos)
    if index.numel() == 0 or bool(wrong.any()):
        raise ValueError(
            f"positions {index[wrong].unique().tolist()[:5]} do not exist: the forward has {n_pos} positions; expected "
            f"{-n_pos} to {n_pos - 1}, and at least one"
        )
    mask = torch.zeros(n, n_pos, dtype=torch.bool)
    return mask.scatter(1, index % n_pos, True)


def check_tokens(bridge: Any, tokens: Any, what: str = "tokens") -> Tensor:
    """`tokens` on the model's device, once they are known to be ids `[example, pos]` that it can take."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.is_floating_point() or 0 in tokens.shape:
        got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{what} is {got}; expected a tensor of token ids [example, pos]")
    low, high, d_vocab = int(tokens.min()), int(tokens.max()), int(bridge.cfg.d_vocab)
    if low < 0 or high >= d_vocab:
        raise ValueError(f"{what} has ids from {low} to {high}; this model's vocabulary is 0 to {d_vocab - 1}")
    return tokens.to(device_of(bridge))
