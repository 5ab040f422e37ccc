"""Prompts: pairs of clean and corrupted token rows, with their answers and named positions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from interp.prompts import _show
from interp.prompts._tokens import token_strings, uses_bos

if TYPE_CHECKING:
    import pandas as pd

FORMAT = "interp.prompts/1"

if TYPE_CHECKING:  # what the attributes are
    Positions: TypeAlias = dict[str, Tensor]
    Labels: TypeAlias = dict[str, tuple[Any, ...]]
    TokenSets: TypeAlias = tuple[tuple[int, ...], ...]
else:  # what the constructor takes
    Positions = Mapping[str, Any] | None
    Labels = Mapping[str, Sequence[Any]] | None
    TokenSets = Sequence[Sequence[int]]


@dataclass(frozen=True, eq=False, repr=False)
class Prompts:
    """Clean and corrupted prompts, token for token aligned, with what each example is asked.

    All rows have the same length and hold no padding, so position `p` means the same place in every example and a batch
    gives what one example at a time gives. Prompts of several lengths are several `Prompts` (`groups_from_text`).
    Tensors live on the CPU.

    Attributes:
        clean: Token ids of the intact prompts, BOS included if the model uses one.
        corrupted: The same prompts with the deciding token changed, so that the answer is no longer right.
        answers: The right next token of the clean prompt at position `end`.
        foils: The token it is compared with; in most tasks the right next token of the corrupted prompt.
        positions: Name to one position per example. Always has `"end"`, where the answer is read; default the last
            token.
        labels: Name to one plain value per example, such as the template or the order of names.
        answer_sets: For tasks with many right answers, the token ids that are right, per example (see
            `metrics.probability_difference`).
        foil_sets: The token ids that are wrong, per example.
        strings: Text of the token ids that occur, for display; `decoded(bridge)` fills it for one's own tensors.
        name: The task.
        seed: The seed the prompts were drawn with.

    Raises:
        ValueError: If shapes, ids, positions or labels do not fit together; the message names rows and values.
    """

    clean: Int[Tensor, "example pos"]
    corrupted: Int[Tensor, "example pos"]
    answers: Int[Tensor, "example"]
    foils: Int[Tensor, "example"]
    positions: Positions = None  # type: ignore[assignment]  # None becomes {"end": last}
    labels: Labels = None  # type: ignore[assignment]  # None becomes {}
    answer_sets: TokenSets | None = field(default=None, kw_only=True)
    foil_sets: TokenSets | None = field(default=None, kw_only=True)
    strings: dict[int, str] = field(default_factory=dict, kw_only=True)
    name: str = field(default="prompts", kw_only=True)
    seed: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for key in ("clean", "corrupted"):
            _set(self, key, _ids(getattr(self, key), key, ndim=2))
        if self.clean.shape != self.corrupted.shape:
            raise ValueError(
                f"clean has shape {tuple(self.clean.shape)} and corrupted {tuple(self.corrupted.shape)}; patching "
                "needs them equal, token for token. Make one Prompts per length (prompts.groups_from_text does so for "
                "strings)"
            )
        n, length = self.clean.shape
        if length == 0:
            raise ValueError("clean has rows of 0 tokens")
        for key in ("answers", "foils"):
            value = _ids(getattr(self, key), key, ndim=1)
            if len(value) != n:
                raise ValueError(
                    f"{key} has {len(value)} entries but there are {n} examples; one token id per example is expected"
                )
            _set(self, key, value)
        if same := (self.answers == self.foils).nonzero().flatten().tolist():
            raise ValueError(
                f"rows {same[:8]}: answer and foil are the same token ({int(self.answers[same[0]])} in row {same[0]}), "
                "so their logit difference is 0 whatever the model does"
            )
        _set(self, "positions", _positions(self.positions, n, length))
        _set(self, "labels", _labels(self.labels, n))
        for key in ("answer_sets", "foil_sets"):
            _set(self, key, _token_sets(getattr(self, key), key, n))
        _set(self, "strings", {int(token): str(text) for token, text in self.strings.items()})

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> Prompts:
        """The examples `rows` (an index, a slice, a list of indices or a boolean mask), as prompts."""
        index = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows].reshape(-1)
        chosen = index.tolist()
        return replace(
            self,
            clean=self.clean[index],
            corrupted=self.corrupted[index],
            answers=self.answers[index],
            foils=self.foils[index],
            positions={key: value[index] for key, value in self.positions.items()},
            labels={key: tuple(value[i] for i in chosen) for key, value in self.labels.items()},
            answer_sets=None if self.answer_sets is None else tuple(self.answer_sets[i] for i in chosen),
            foil_sets=None if self.foil_sets is None else tuple(self.foil_sets[i] for i in chosen),
        )

    def swap(self) -> Prompts:
        """Clean and corrupted exchanged, and with them answers and foils: a logit difference changes its sign."""
        return replace(
            self,
            clean=self.corrupted,
            corrupted=self.clean,
            answers=self.foils,
            foils=self.answers,
            answer_sets=self.foil_sets,
            foil_sets=self.answer_sets,
        )

    def decoded(self, bridge: Any) -> Prompts:
        """The same prompts with the text of their tokens, so that prompts made of one's own tensors show words."""
        ids = torch.cat([self.clean.flatten(), self.corrupted.flatten(), self.answers, self.foils]).unique().tolist()
        ids += [token for sets in (self.answer_sets or (), self.foil_sets or ()) for group in sets for token in group]
        return replace(self, strings=token_strings(bridge.tokenizer, ids))

    def check(self, bridge: Any) -> Prompts:
        """Refuse prompts that this model would misread; gives the prompts back.

        Every id is in the vocabulary, rows fit the context, BOS is there exactly once if the model uses one
        (`bridge.cfg.default_prepend_bos` and a BOS token of its tokenizer), and there is no padding. Costs no forward
        pass.

        Raises:
            ValueError: Naming the rows and what to do.
        """
        cfg, tokenizer = bridge.cfg, bridge.tokenizer
        for key in ("clean", "corrupted", "answers", "foils"):
            ids = getattr(self, key)
            if ids.numel() and int(ids.max()) >= cfg.d_vocab:
                rows = (ids >= cfg.d_vocab).reshape(len(self), -1).any(1).nonzero().flatten().tolist()
                raise ValueError(
                    f"{key}: rows {rows[:8]} hold token {int(ids.max())}, but the model's vocabulary has {cfg.d_vocab} "
                    "tokens; the prompts were made for another tokenizer"
                )
        if self.clean.shape[1] > cfg.n_ctx:
            raise ValueError(
                f"the prompts have {self.clean.shape[1]} tokens but the model's context is {cfg.n_ctx}; use shorter "
                "prompts"
            )
        if tokenizer is not None:
            for key in ("clean", "corrupted"):
                _check_bos(getattr(self, key), key, bridge)
                _check_padding(getattr(self, key), key, bridge)
        return self

    def tokens_str(self, which: str = "clean") -> list[list[str]]:
        """Token texts of the `"clean"` or `"corrupted"` prompts, one list per example; `#id` where unknown."""
        if which not in ("clean", "corrupted"):
            raise ValueError(f"which must be 'clean' or 'corrupted', got {which!r}")
        return [[self.text(token) for token in row] for row in getattr(self, which).tolist()]

    def text(self, token: int | Tensor) -> str:
        """Text of one token id, or `#id` if it is unknown."""
        return self.strings.get(int(token), f"#{int(token)}")

    def show(self, row: int = 0) -> _show.Shown:
        """One example token by token: clean, corrupted where it differs, and the named positions."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} examples")
        return _show.table(self, row % len(self))

    def __repr__(self) -> str:
        return _show.summary(self)

    def _repr_html_(self) -> str:
        return _show.html(self)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per example: texts, answer, foil, positions (columns `pos_NAME`) and labels."""
        import pandas as pd

        columns: dict[str, Any] = {"example": list(range(len(self)))}
        for which in ("clean", "corrupted"):
            columns[which] = [_show.join(row) for row in self.tokens_str(which)]
        columns["answer"] = [self.text(token) for token in self.answers.tolist()]
        columns["foil"] = [self.text(token) for token in self.foils.tolist()]
        columns |= {f"pos_{key}": value.tolist() for key, value in self.positions.items()}
        for key, value in self.labels.items():
            columns[f"label_{key}" if key in columns else key] = list(value)
        return pd.DataFrame(columns)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, labels and texts as JSON in its header; it appears whole or not at all."""
        path = Path(path)
        tensors = {key: getattr(self, key) for key in ("clean", "corrupted", "answers", "foils")}
        tensors |= {f"positions.{key}": value for key, value in self.positions.items()}
        header = {
            "format": FORMAT,
            "name": self.name,
            "seed": self.seed,
            "positions": list(self.positions),  # safetensors sorts its keys
            "labels": self.labels,
            "answer_sets": self.answer_sets,
            "foil_sets": self.foil_sets,
            "strings": self.strings,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            # clones: safetensors refuses tensors that share memory, as the rows of a slice do
            save_file(
                {key: value.clone() for key, value in tensors.items()},
                temporary,
                metadata={"interp": json.dumps(header)},
            )
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Prompts:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, altered beyond reading, or not a file of prompts.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"no prompts at {path}; Prompts.save(path) writes them")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("interp", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is truncated or not a file of prompts ({error}); save the prompts again"
            ) from None
        if header.get("format") != FORMAT:
            raise ValueError(
                f"{path} is a safetensors file but not one of prompts: format {header.get('format')!r}, expected "
                f"{FORMAT!r}"
            )
        return cls(
            **{key: tensors[key] for key in ("clean", "corrupted", "answers", "foils")},
            positions={key: tensors[f"positions.{key}"] for key in header["positions"]},
            strings={int(token): text for token, text in header["strings"].items()},
            **{key: header[key] for key in ("labels", "answer_sets", "foil_sets", "name", "seed")},
        )


def concatenate(*sets: Prompts) -> Prompts:
    """The examples of all, in order; the sets must have equal length and name the same positions and labels."""
    if not sets:
        raise ValueError("concatenate needs at least one Prompts")
    first = sets[0]
    for other in sets[1:]:
        if other.clean.shape[1] != first.clean.shape[1]:
            raise ValueError(
                f"prompts of {first.clean.shape[1]} and {other.clean.shape[1]} tokens cannot share a batch without "
                "padding; keep them as separate Prompts"
            )
        for what in ("positions", "labels"):
            a, b = set(getattr(first, what)), set(getattr(other, what))
            if a != b:
                raise ValueError(f"the sets name different {what}: {sorted(a ^ b)} are in one only")
        if (other.answer_sets is None) != (first.answer_sets is None) or (other.foil_sets is None) != (
            first.foil_sets is None
        ):
            raise ValueError("some of the sets have answer_sets or foil_sets and some have none")
        if clash := [t for t in other.strings if first.strings.get(t, other.strings[t]) != other.strings[t]]:
            raise ValueError(
                f"token {clash[0]} is {first.text(clash[0])!r} in one set and {other.text(clash[0])!r} in another; "
                "they were made for different tokenizers"
            )
    names = dict.fromkeys(p.name for p in sets)
    seeds = {p.seed for p in sets}
    return Prompts(
        **{key: torch.cat([getattr(p, key) for p in sets]) for key in ("clean", "corrupted", "answers", "foils")},
        positions={key: torch.cat([p.positions[key] for p in sets]) for key in first.positions},
        labels={key: tuple(v for p in sets for v in p.labels[key]) for key in first.labels},
        answer_sets=None if first.answer_sets is None else tuple(s for p in sets for s in p.answer_sets or ()),
        foil_sets=None if first.foil_sets is None else tuple(s for p in sets for s in p.foil_sets or ()),
        strings={token: text for p in sets for token, text in p.strings.items()},
        name="+".join(names),
        seed=seeds.pop() if len(seeds) == 1 else None,
    )


def _set(prompts: Prompts, key: str, value: Any) -> None:
    object.__setattr__(prompts, key, value)  # the dataclass is frozen for its users, not for its own checks


def _ids(value: Any, key: str, ndim: int) -> Tensor:
    shape = "[example, pos]" if ndim == 2 else "[example]"
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{key} is a {type(value).__name__}; expected a tensor of token ids {shape}. Strings go to "
            "prompts.from_text"
        )
    if value.ndim != ndim:
        raise ValueError(f"{key} has shape {tuple(value.shape)}; expected {shape}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{key} has dtype {value.dtype}; token ids are integers (torch.long)")
    value = value.detach().cpu().long().contiguous()
    if value.numel() and int(value.min()) < 0:
        raise ValueError(
            f"{key} holds {int(value.min())}; token ids start at 0 and there is no padding or ignore index"
        )
    return value


def _positions(positions: Mapping[str, Any] | None, n: int, length: int) -> dict[str, Tensor]:
    named = dict(positions or {})
    named.setdefault("end", torch.full((n,), length - 1))
    out = {}
    for key, value in named.items():
        if (
            not isinstance(value, Tensor)
            or value.ndim != 1
            or len(value) != n
            or value.is_floating_point()
            or value.dtype == torch.bool
        ):
            what = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"positions[{key!r}] is {what}; expected one index per example, an integer tensor of shape ({n},)"
            )
        value = value.detach().cpu().long()
        bad = ((value < 0) | (value >= length)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"positions[{key!r}] is {int(value[bad[0]])} in row {bad[0]}; expected 0 to {length - 1}, counted from "
                "the first token"
            )
        out[str(key)] = value
    return out


def _labels(labels: Mapping[str, Sequence[Any]] | None, n: int) -> dict[str, tuple[Any, ...]]:
    out = {}
    for key, values in (labels or {}).items():
        values = tuple(tuple(v) if isinstance(v, list) else v for v in values)
        if len(values) != n:
            raise ValueError(f"labels[{key!r}] has {len(values)} entries but there are {n} examples")
        for row, value in enumerate(values):
            for part in value if isinstance(value, tuple) else (value,):
                if part is not None and not isinstance(part, (str, int, float, bool)):
                    raise ValueError(
                        f"labels[{key!r}][{row}] is a {type(part).__name__}; labels are plain strings, numbers, "
                        "booleans or None, so that they can be saved"
                    )
        out[str(key)] = values
    return out


def _token_sets(sets: Sequence[Sequence[int]] | None, key: str, n: int) -> TokenSets | None:
    if sets is None:
        return None
    if len(sets) != n:
        raise ValueError(f"{key} has {len(sets)} entries but there are {n} examples")
    out = tuple(tuple(int(token) for token in ids) for ids in sets)
    if bad := [row for row, ids in enumerate(out) if not ids or min(ids) < 0]:
        raise ValueError(f"{key}: rows {bad[:8]} are empty or hold a negative id")
    return out


def _check_bos(ids: Tensor, key: str, bridge: Any) -> None:
    bos = bridge.tokenizer.bos_token_id
    if bos is None:
        return
    later = (ids[:, 1:] == bos).any(1).nonzero().flatten().tolist()
    if uses_bos(bridge):
        missing = (ids[:, 0] != bos).nonzero().flatten().tolist()
        # rows padded on the left do not start with BOS either, and there the padding is what is wrong
        missing = [row for row in missing if int(ids[row, 0]) != bridge.tokenizer.pad_token_id]
        if missing:
            raise ValueError(
                f"{key}: rows {missing[:8]} do not start with BOS (token {bos}, {bridge.tokenizer.bos_token!r}), which "
                "this model expects; prepend it, or set bridge.cfg.default_prepend_bos = False if the model is to run "
                "without"
            )
    if later and bos != bridge.tokenizer.pad_token_id:
        raise ValueError(
            f"{key}: rows {later[:8]} hold BOS (token {bos}) again after the first position; it belongs there exactly "
            "once"
        )


def _check_padding(ids: Tensor, key: str, bridge: Any) -> None:
    tokenizer = bridge.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None:
        return
    is_pad = ids == pad
    if pad == tokenizer.bos_token_id:
        # one leading BOS is right; any more is a doubled BOS or padding
        is_pad = is_pad[:, 1:] if uses_bos(bridge) else is_pad
    elif pad == tokenizer.eos_token_id:
        # an end-of-text inside a row separates documents; only at the edges is it padding
        is_pad = is_pad[:, [0, -1]]
    rows = is_pad.any(1).nonzero().flatten().tolist()
    if rows and pad == tokenizer.bos_token_id:
        raise ValueError(
            f"{key}: rows {rows[:8]} hold token {pad} ({tokenizer.pad_token!r}), which is both BOS and padding, "
            "outside the first position; BOS belongs there exactly once, and rows of different length go to "
            "prompts.groups_from_text"
        )
    if rows:
        side = "left" if int(ids[rows[0], 0]) == pad else "right" if int(ids[rows[0], -1]) == pad else "inside"
        raise ValueError(
            f"{key}: rows {rows[:8]} hold the padding token {pad} ({tokenizer.pad_token!r}; row {rows[0]}: {side}); "
            "positions would no longer mean the same place in every row. Group prompts by length instead "
            "(prompts.groups_from_text)"
        )
