"""Data with a factorisation that is known: unit atoms of a few neurons, about three active per token."""

from __future__ import annotations

import torch
from torch import Tensor


def planted(
    seed: int, *, d_neurons: int = 256, n_tokens: int = 2000, n_atoms: int = 20, entries: int = 6, noise: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Data [token, neuron] and its atoms [atom, neuron]."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.zeros(n_atoms, d_neurons)
    for atom in atoms:
        where = torch.randperm(d_neurons, generator=generator)[:entries]
        atom[where] = torch.randn(entries, generator=generator)
    atoms /= atoms.norm(dim=1, keepdim=True)
    active = torch.rand(n_tokens, n_atoms, generator=generator) < 3 / n_atoms
    codes = active * torch.rand(n_tokens, n_atoms, generator=generator)
    return codes @ atoms + noise * torch.randn(n_tokens, d_neurons, generator=generator), atoms


def best_cosines(components: Tensor, atoms: Tensor) -> Tensor:
    """For every atom the largest |cosine| with any component."""
    unit = torch.nn.functional.normalize(components, dim=1)
    return (atoms @ unit.T).abs().amax(1)
