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

from interp.prompts import _checks, _show
from interp.prompts._tokens import token_strings

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
            _set(self, key, _checks.token_ids(getattr(self, key), key, ndim=2))
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
            value = _checks.token_ids(getattr(self, key), key, ndim=1)
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
        _set(self, "positions", _checks.named_positions(self.positions, n, length))
        _set(self, "labels", _checks.plain_labels(self.labels, n))
        for key in ("answer_sets", "foil_sets"):
            _set(self, key, _checks.token_sets(getattr(self, key), key, n))
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
                _checks.check_bos(getattr(self, key), key, bridge)
                _checks.check_padding(getattr(self, key), key, bridge)
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
