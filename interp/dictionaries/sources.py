"""Where training batches come from: tensors, a store on disk, or a model that runs as they are needed.

A batch is a function of the seed and of its number alone, so that a run that was killed goes on with the batch that it
would have had, and several dictionaries can be compared on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from interp.cache import ActivationStore, capture
from interp.hooks import hook_name, layer_of, no_retained_graph, reads, resolve, taps
from interp.hooks.names import device_of
from interp.models import provenance, require_eval


@runtime_checkable
class Source(Protocol):
    """Endless batches of activations by hook, [token, width], the same for the same `batch_size`, `seed` and number."""

    @property
    def hooks(self) -> list[str]: ...

    def describe(self) -> dict[str, Any]:
        """What identifies the data, as plain values: a resumed run refuses other data."""
        ...

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]: ...


@dataclass(frozen=True)
class TensorSource:
    """Activations in memory, by hook, with equal numbers of rows [token, ...]; wider ones are flattened per token."""

    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        rows = {name: len(tensor) for name, tensor in self.tensors.items()}
        if not rows or len(set(rows.values())) != 1 or 0 in rows.values():
            raise ValueError(f"activations have {rows or 'no'} rows; expected the same number, above 0, for every hook")
        for name, tensor in self.tensors.items():
            if tensor.ndim < 2 or not tensor.is_floating_point():
                raise ValueError(f"{name!r} is {tensor.dtype} {tuple(tensor.shape)}; expected floats [token, width]")

    @property
    def hooks(self) -> list[str]:
        return list(self.tensors)

    def describe(self) -> dict[str, Any]:
        sums = {name: _checksum(tensor) for name, tensor in self.tensors.items()}
        return {"kind": "tensors", "shapes": {n: list(t.shape) for n, t in self.tensors.items()}, "sums": sums}

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        n = len(next(iter(self.tensors.values())))
        for rows in _shuffled_rows(n, batch_size, seed, start):
            yield {name: tensor[rows].flatten(1) for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class StoreSource:
    """Activations that `interp.cache.harvest` wrote to disk, read as needed (see `ActivationStore.batches`)."""

    store: ActivationStore
    names: tuple[str, ...]

    @property
    def hooks(self) -> list[str]:
        return list(self.names)

    def describe(self) -> dict[str, Any]:
        origin = {name: self.store.provenance.get(name) for name in ("model", "revision", "weights_state", "dtype")}
        sums = {name: _checksum(self.store[name][: min(4096, self.store.n_tokens)]) for name in self.names}
        return {"kind": "store", "n_tokens": self.store.n_tokens, "hooks": list(self.names), "sums": sums, **origin}

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        reader = self.store.batches(
            batch_size, hooks=list(self.names), seed=seed, epochs=None, start=start, drop_last=True
        )
        for batch in reader:
            yield {name: batch[name].float().flatten(1) for name in self.names}


@dataclass(frozen=True)
class LiveSource:
    """A model that runs while training: nothing is stored. Costs one forward, up to the last hook, per token and epoch.

    Attributes:
        tokens: [text, pos].
        names: Hooks that are read.
        texts_per_buffer: Activations of so many texts are mixed with each other.
        skip_first: Positions at the start of each text that are left out (BOS: 1).
        gradient_of: A hook at which batches also have `"gradient"`, [token, width]: that of the text's next-token
            losses, summed over its predictions, in nats. Costs a whole forward and a backward down to the hook. For
            gradient dictionaries.
        texts_per_backward: Texts whose graph is in memory at once.
    """

    bridge: Any
    tokens: Int[Tensor, "text pos"]
    names: tuple[str, ...]
    texts_per_buffer: int = 256
    skip_first: int = 1
    gradient_of: str | None = None
    texts_per_backward: int = 32

    def __post_init__(self) -> None:
        n, length = self.tokens.shape
        if not 0 <= self.skip_first < length or not self.texts_per_buffer >= 1:
            raise ValueError(
                f"skip_first={self.skip_first} of {length} positions, texts_per_buffer={self.texts_per_buffer}: "
                f"nothing would be left to train on"
            )
        if self.texts_per_backward < 1:
            raise ValueError(f"texts_per_backward={self.texts_per_backward}; expected at least 1")
        if self.gradient_of is not None:
            if length < 2:
                raise ValueError("texts of one token predict nothing: there is no gradient of a next-token loss")
            _tap_of(self.bridge, self.gradient_of)  # raises for hooks that do not exist

    @property
    def hooks(self) -> list[str]:
        return list(self.names)

    def describe(self) -> dict[str, Any]:
        record = provenance(self.bridge)
        return {
            "kind": "live",
            "model": {name: record[name] for name in ("model", "revision", "weights_state", "dtype")},
            "hooks": list(self.names),
            "shape": list(self.tokens.shape),
            "sums": _checksum(self.tokens),
            "texts_per_buffer": self.texts_per_buffer,
            "skip_first": self.skip_first,
            **({} if self.gradient_of is None else {"gradient_of": self.gradient_of}),
        }

    def batches(self, batch_size: int, *, seed: int, start: int = 0) -> Iterator[Mapping[str, Tensor]]:
        n, length = self.tokens.shape
        texts = min(self.texts_per_buffer, n)
        per_buffer = texts * (length - self.skip_first) // batch_size
        if per_buffer == 0:
            raise ValueError(
                f"{texts} texts of {length - self.skip_first} tokens give no batch of {batch_size}; take a larger "
                f"texts_per_buffer or a smaller batch"
            )
        number = start // per_buffer  # buffers before the first one needed are not computed
        chosen = _shuffled_rows(n, texts, seed, number)
        while True:
            found = self._read(self.tokens[next(chosen)])
            flat = {name: value[:, self.skip_first :].flatten(0, 1).flatten(1) for name, value in found.items()}
            order = torch.randperm(texts * (length - self.skip_first), generator=_draws(seed, number, 1))
            for i in range(start % per_buffer if number == start // per_buffer else 0, per_buffer):
                rows = order[i * batch_size : (i + 1) * batch_size]
                yield {name: value[rows.to(value.device)].float() for name, value in flat.items()}
            number += 1

    def _read(self, tokens: Tensor) -> dict[str, Tensor]:
        """Activations [text, pos, ...] of some texts, and the gradient if it is wanted."""
        if self.gradient_of is None:
            return capture(self.bridge, tokens, list(self.names))
        parts = [self._differentiated(some) for some in tokens.split(self.texts_per_backward)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _differentiated(self, tokens: Tensor) -> dict[str, Tensor]:
        assert self.gradient_of is not None
        require_eval(self.bridge)
        tap, tokens = _tap_of(self.bridge, self.gradient_of), tokens.to(device_of(self.bridge))
        with (
            no_retained_graph(self.bridge),
            torch.enable_grad(),
            taps(self.bridge, tap) as tapped,
            reads(self.bridge, list(self.names)) as found,
        ):
            log_probs = self.bridge(tokens)[:, :-1].float().log_softmax(-1)
            loss = -log_probs.gather(-1, tokens[:, 1:, None]).sum()
            (gradient,) = torch.autograd.grad(loss, tapped[tap], allow_unused=True)
            if gradient is None:
                raise ValueError(
                    f"the loss does not depend on {self.gradient_of!r} of {self.bridge.cfg.model_name}: the model "
                    f"computes past this hook, and there is no gradient at it"
                )
            return {**{name: found[name].detach() for name in self.names}, "gradient": gradient}


def _tap_of(bridge: Any, name: str) -> str:
    """The hook whose gradient is that of `name`."""
    name = resolve(bridge, name)
    if not name.endswith(".hook_resid_mid"):
        return name
    layer = layer_of(bridge, name)
    assert layer is not None
    return hook_name("attn_out", layer)  # on the stream's own path, where hook_resid_mid is on the MLP's branch


def as_source(activations: Any, hook: str, target_hook: str | None) -> Source:
    """Tensors, a pair of them for a transcoder, a store, or a source, as a source of these hooks."""
    wanted = [hook] if target_hook is None else [hook, target_hook]
    if isinstance(activations, Tensor):
        if target_hook is not None:
            raise ValueError("a transcoder is trained on a pair of tensors: (inputs, targets)")
        return TensorSource({hook: activations})
    if isinstance(activations, tuple):
        if len(activations) != 2:
            raise ValueError(f"{len(activations)} tensors; a transcoder is trained on a pair: (inputs, targets)")
        if target_hook is None:
            raise ValueError("a pair of tensors is for transcoders; an autoencoder is trained on one")
        return TensorSource(dict(zip(wanted, activations, strict=True)))
    if isinstance(activations, ActivationStore):
        missing = [name for name in wanted if name not in activations.hooks]
        if missing:
            raise ValueError(f"the store holds {', '.join(activations.hooks)}; {', '.join(missing)} is not among them")
        return StoreSource(activations, tuple(wanted))
    if not hasattr(activations, "batches") or not hasattr(activations, "describe"):
        raise TypeError(
            f"activations are a {type(activations).__name__}; expected a tensor [token, width], a pair of them, an "
            f"ActivationStore, or a LiveSource"
        )
    if missing := [name for name in wanted if name not in activations.hooks]:
        raise ValueError(f"the source gives {', '.join(activations.hooks)}; {', '.join(missing)} is not among them")
    return activations


def _checksum(tensor: Tensor) -> list[float]:
    """Two sums that other numbers, or the same in another order, do not give."""
    flat = tensor.detach().reshape(-1)
    n = min(len(flat), 2**22)  # enough to tell data apart, and quick
    part = flat[torch.linspace(0, len(flat) - 1, n, dtype=torch.float64, device=flat.device).long()].double().cpu()
    return [float(part.sum()), float((part * torch.arange(1, n + 1, dtype=torch.float64)).sum() / n)]


def _draws(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)


def _shuffled_rows(n: int, size: int, seed: int, start: int) -> Iterator[Int[Tensor, " batch"]]:
    """Batches of row numbers, every row at most once per epoch; the last rows of an epoch that fill no batch are left
    out of it."""
    if not 1 <= size <= n:
        raise ValueError(f"batches of {size} from {n} rows; expected 1 to {n}")
    per_epoch = n // size
    epoch, within = divmod(start, per_epoch)
    while True:
        order = torch.randperm(n, generator=_draws(seed, epoch))
        for i in range(within, per_epoch):
            yield order[i * size : (i + 1) * size]
        epoch, within = epoch + 1, 0
