"""Activations as a dictionary wants them: one row per token, with where each row stands and what is true of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.cache import capture
from interp.cache._reading import layouts
from interp.hooks import resolve
from interp.models import provenance


@dataclass(frozen=True, eq=False, repr=False)
class TokenRows:
    """Activations of the kept tokens of some documents, in reading order.

    Attributes:
        values: [token, unit], on the model's device; units are in the hook's order, head by head where it has heads.
        tokens: The documents [batch, pos] as they were run, padding included.
        row: [token], which document each kept token stands in.
        position: [token], where in it.
        hook: The hook that was read.
        provenance: The model and what was kept.
    """

    values: Float[Tensor, "token unit"]
    tokens: Int[Tensor, "batch pos"]
    row: Int[Tensor, " token"]
    position: Int[Tensor, " token"]
    hook: str
    provenance: dict[str, Any]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        n, width = self.values.shape
        return f"TokenRows({n} tokens of {len(self.tokens)} documents x {width} units of {self.hook})"

    def select(self, chosen: Bool[Tensor, " row"]) -> TokenRows:
        """Only these rows, such as those of one label."""
        if len(chosen) != len(self) or not bool(chosen.any()):
            raise ValueError(f"{int(chosen.sum())} of {len(chosen)} rows are chosen; expected some of {len(self)}")
        kept = chosen.cpu().nonzero()[:, 0]
        record = {**self.provenance, "n_tokens": len(kept)}
        values = self.values[kept.to(self.values.device)]
        return TokenRows(values, self.tokens, self.row[kept], self.position[kept], self.hook, record)

    @property
    def ids(self) -> Int[Tensor, " token"]:
        """The token ids of the rows."""
        return self.tokens[self.row, self.position]

    @property
    def keep(self) -> Bool[Tensor, "batch pos"]:
        """Which tokens have a row, for `interp.neurons.contexts_of(scores, rows.tokens, keep=rows.keep)`."""
        kept = torch.zeros(self.tokens.shape, dtype=torch.bool)
        kept[self.row, self.position] = True
        return kept

    def grid(self, scores: Float[Tensor, "token unit"], *, fill: float | int = torch.nan) -> Tensor:
        """Scores of the rows put back where their tokens stand, [batch, pos, unit]; `fill` where no row was kept."""
        if len(scores) != len(self):
            raise ValueError(f"scores have {len(scores)} rows and there are {len(self)} tokens; expected one per token")
        out = scores.new_full((*self.tokens.shape, scores.shape[-1]), fill)
        out[self.row.to(scores.device), self.position.to(scores.device)] = scores
        return out


def token_rows(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    hook: str,
    *,
    skip_tokens: Sequence[int] = (),
    batch_size: int | None = 64,
) -> TokenRows:
    """One activation row per token of these documents, without the tokens in `skip_tokens`. One forward per batch.

    Args:
        hook: A hook with one vector per token, such as `interp.hooks.hook_name("neuron", layer)` for MLP neurons.
            Several axes per token, such as the heads of `hook_name("z", layer)`, are flattened, as dictionaries do.
        skip_tokens: Ids that get no row: padding, and BOS, whose activations are of another size than all others. The
            documents are run whole.

    Raises:
        KeyError: If the hook does not exist on this model.
        ValueError: If the hook does not hold numbers per token, or no row is left.
    """
    tokens = tokens.cpu()
    skipped = torch.tensor(sorted(set(map(int, skip_tokens))), dtype=tokens.dtype)
    keep = ~torch.isin(tokens, skipped)
    if not bool(keep.any()):
        raise ValueError(f"skip_tokens={list(skip_tokens)} leaves no token of the {tokens.numel()} given")
    layout = layouts(bridge, [resolve(bridge, hook)])[hook]
    if layout.row_shape in (None, ()) or not layout.floating:
        raise ValueError(
            f"{hook!r} is {(len(tokens), *layout.shape(tokens.shape[1]))} on tokens {tuple(tokens.shape)}; expected "
            f"one vector per token, such as hook_name('neuron', layer)"
        )
    found = capture(bridge, tokens, hook, batch_size=batch_size)[hook]
    row, position = keep.nonzero(as_tuple=True)
    record = provenance(bridge, hook=hook, n_tokens=len(row), n_documents=len(tokens), skip_tokens=skipped.tolist())
    values = found[row.to(found.device), position.to(found.device)].flatten(1)
    return TokenRows(values, tokens, row, position, hook, record)


def label_masks(
    rows: TokenRows,
    labels: Sequence[Sequence[Any]],
    *,
    fields: Sequence[str] = ("family", "role", "topic", "dialect", "entity"),
    min_tokens: int = 20,
    min_documents: int = 1,
) -> dict[str, Bool[Tensor, " token"]]:
    """For every value of every field of the labels, which rows have it: `{"topic=sea": mask, ...}`, commonest first.

    Args:
        labels: One label per token of `rows.tokens`, such as `interp.tinyworld.encode(documents).labels`; a label is
            any object with the attributes `fields`, or None where nothing is known.
        min_tokens: Values with fewer rows, or with fewer rows without them, are left out.
        min_documents: Values found in fewer documents are left out; probes and absorption, which fit on some documents
            and score on others, need 2.

    Raises:
        ValueError: If labels and tokens are not aligned, or no value is common enough.
    """
    if len(labels) != len(rows.tokens):
        raise ValueError(f"labels are of {len(labels)} documents and tokens of {len(rows.tokens)}; expected one each")
    at = list(zip(rows.row.tolist(), rows.position.tolist(), strict=True))
    short = next((r for r, p in at if p >= len(labels[r])), None)
    if short is not None:
        raise ValueError(f"document {short} has {len(labels[short])} labels for {rows.tokens.shape[1]} tokens")
    masks: dict[str, Tensor] = {}
    for name in fields:
        values = [getattr(labels[r][p], name) if labels[r][p] is not None else None for r, p in at]
        for value, count in Counter(v for v in values if v is not None).most_common():
            mask = torch.tensor([v == value for v in values])
            if min(count, len(at) - count) >= min_tokens and len(rows.row[mask].unique()) >= min_documents:
                masks[f"{name}={value}"] = mask
    if not masks:
        raise ValueError(
            f"no value of {', '.join(fields)} has {min_tokens} rows with it and without it in {min_documents} documents"
        )
    return masks


def mask_matrix(masks: Mapping[str, Tensor], n_tokens: int) -> Bool[Tensor, "token label"]:
    """Masks side by side, checked against the number of rows."""
    if not masks:
        raise ValueError("no labels: masks is empty; see interp.dictionaries.label_masks")
    for name, mask in masks.items():
        if mask.dtype != torch.bool or tuple(mask.shape) != (n_tokens,):
            raise ValueError(
                f"label {name!r} is {mask.dtype} {tuple(mask.shape)}; expected one bool for each of {n_tokens} tokens"
            )
    return torch.stack([mask.cpu() for mask in masks.values()], 1)
