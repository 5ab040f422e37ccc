"""Which token is which row: batches of a token stream, the rows they give, and the columns that go beside activations.

Row order is that of the stream: examples in turn, positions in turn. Batches are cut from the stream alone, never
from what is on disk or from the number of processes, so that a batch holds the same examples in every run; on most
machines the same example in another batch rounds differently in the last bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.cache._manifest import DTYPES, ROW_COLUMNS, dtype_name
from interp.cache._reading import check_tokens


@dataclass(frozen=True)
class Batch:
    """Some consecutive examples, and which of their tokens are rows."""

    tokens: Tensor  # [batch, pos]
    keep: Tensor  # bool [batch, pos]
    columns: dict[str, Tensor]  # [row] each: tokens, example, position and the labels

    @property
    def n_rows(self) -> int:
        return len(self.columns["tokens"])

    def rows(self, activation: Tensor) -> Tensor:
        """The kept rows [row, ...] of an activation [batch, pos, ...]."""
        if bool(self.keep.all()):
            return activation.flatten(0, 1)
        return activation[self.keep.to(activation.device)]


@dataclass(frozen=True)
class Stream:
    """Tokens to be harvested: a tensor with labels, or an iterable of batches, with what is kept of them.

    Attributes:
        tokens: Ids [example, pos], or an iterable of such tensors or of (tensor, labels) pairs.
        labels: For a tensor: name to [example, pos]. An iterable brings its own.
        label_names: What the codes of labels given as text stand for.
    """

    bridge: Any
    tokens: Any
    labels: dict[str, Tensor]
    label_names: dict[str, list[str]]
    batch_size: int
    positions: tuple[int, ...] | None
    skip_tokens: tuple[int, ...]

    @property
    def n_rows(self) -> int | None:
        """How many rows there will be; None if only the stream's end will tell."""
        if not isinstance(self.tokens, Tensor):
            return None
        return int(self._keep(self.tokens).sum())

    def batches(self) -> Iterator[Batch]:
        first, kinds = 0, None
        for number, (tokens, labels) in enumerate(self._items()):
            found = {name: dtype_name(label.dtype) for name, label in labels.items()}
            if kinds is not None and found != kinds:
                raise ValueError(f"batch {number} has labels {found}; the batches before it have {kinds}")
            kinds = found
            keep = self._keep(tokens)
            for start in range(0, len(tokens), self.batch_size):
                part = slice(start, start + self.batch_size)
                kept = keep[part]
                examples, positions = kept.nonzero(as_tuple=True)
                columns = {
                    "tokens": tokens[part][kept].long(),
                    "example": examples + first + start,
                    "position": positions,
                }
                columns.update((name, label[part][kept]) for name, label in labels.items())
                yield Batch(tokens[part], kept, columns)
            first += len(tokens)

    def _items(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        if isinstance(self.tokens, Tensor):
            yield self.tokens.cpu(), self.labels
            return
        for number, item in enumerate(self.tokens):
            given, labels = item if isinstance(item, tuple) and len(item) == 2 else (item, {})
            tokens = check_tokens(self.bridge, given, f"batch {number}")
            encoded, names = encode_labels(labels, tuple(tokens.shape))
            if names:
                raise ValueError(
                    f"batch {number} has labels in words ({', '.join(names)}); the words of a whole stream are not "
                    f"known beforehand: give integer codes"
                )
            yield tokens.cpu(), encoded

    def _keep(self, tokens: Tensor) -> Tensor:
        keep = torch.ones(tokens.shape, dtype=torch.bool)
        if self.positions is not None:
            n_pos = tokens.shape[1]
            wrong = [position for position in self.positions if not -n_pos <= position < n_pos]
            if wrong:
                raise ValueError(f"positions {wrong} do not exist in tokens of {n_pos} positions")
            keep = torch.zeros(tokens.shape, dtype=torch.bool)
            keep[:, list(self.positions)] = True
        if self.skip_tokens:
            keep &= ~torch.isin(tokens.cpu(), torch.tensor(self.skip_tokens))
        return keep


def make_stream(
    bridge: Any,
    tokens: Any,
    *,
    labels: Mapping[str, Any] | None,
    batch_size: int,
    positions: Sequence[int] | None,
    skip_tokens: Sequence[int],
) -> Stream:
    """A checked stream; raises before anything is run."""
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1")
    if positions is not None and (not positions or len({*positions}) < len(positions)):
        raise ValueError(f"positions={list(positions)} is empty or repeats itself; list each position of a row once")
    encoded: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    if isinstance(tokens, Tensor):
        check_tokens(bridge, tokens)
        encoded, names = encode_labels(labels or {}, tuple(tokens.shape))
    elif not isinstance(tokens, Iterable) or isinstance(tokens, str | bytes | Mapping):
        raise TypeError(
            f"tokens is a {type(tokens).__name__}; expected ids [example, pos] or an iterable of such tensors"
        )
    elif labels:
        raise ValueError("labels= goes with tokens in one tensor; an iterable yields (tokens, labels) pairs instead")
    kept = None if positions is None else tuple(int(position) for position in positions)
    return Stream(bridge, tokens, encoded, names, batch_size, kept, tuple(int(token) for token in skip_tokens))


def encode_labels(labels: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Labels as tensors [example, pos], and for those given as text the sorted words that their codes stand for.

    Accepted are tensors, arrays and nested sequences of numbers or text, [example, pos] or one per example.
    """
    encoded: dict[str, Tensor] = {}
    names: dict[str, list[str]] = {}
    for name, label in labels.items():
        if not name.isidentifier() or name in (*ROW_COLUMNS, "row"):
            raise ValueError(
                f"a label cannot be called {name!r}; use a word other than {', '.join((*ROW_COLUMNS, 'row'))}"
            )
        if not isinstance(label, Tensor):
            array = np.asarray(label)
            if array.dtype.kind == "U":
                words, codes = np.unique(array, return_inverse=True)
                names[name], array = words.tolist(), codes.reshape(array.shape)
            if array.dtype.kind not in "iufb":
                raise ValueError(
                    f"label {name!r} holds {array.dtype}; expected numbers or text of shape {shape} or {shape[:1]}"
                )
            label = torch.as_tensor(array)
        if tuple(label.shape) not in (shape, shape[:1]):
            raise ValueError(
                f"label {name!r} has shape {tuple(label.shape)}; tokens has {shape}, so expected that or one per "
                f"example {shape[:1]}"
            )
        if dtype_name(label.dtype) not in DTYPES:
            raise ValueError(
                f"label {name!r} is {label.dtype}, which a store cannot hold; expected one of {', '.join(DTYPES)}"
            )
        label = label.detach().cpu()
        encoded[name] = label[:, None].expand(shape) if label.ndim == 1 else label
    return encoded, names
