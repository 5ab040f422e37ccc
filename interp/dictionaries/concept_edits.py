"""What is done to an activation so that it stands for a concept: a vector added, a state put in, latents set."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.propositions import Propositions
from interp.dictionaries.rows import TokenRows, mask_matrix
from interp.dictionaries.splicing import check_width
from interp.dictionaries.vectors import SteeringVector


@runtime_checkable
class ConceptEdit(Protocol):
    """What `steer_by_concept` adds, times a strength, to one activation per text, given the concept of each."""

    @property
    def hook(self) -> str: ...

    @property
    def concepts(self) -> Sequence[str]: ...

    def change(self, x: Float[Tensor, "row width"], concepts: Sequence[str]) -> Float[Tensor, "row width"]: ...


@dataclass(frozen=True, eq=False)
class VectorEdit:
    """One vector per concept: added (`"add"`), or put in the activation's place (`"replace"`: x + s (v - x)).

    Attributes:
        vectors: By concept, all at one hook: directions to add, or states to put in.
    """

    vectors: Mapping[str, SteeringVector]
    mode: Literal["add", "replace"] = "add"

    def __post_init__(self) -> None:
        if self.mode not in ("add", "replace"):
            raise ValueError(f"mode={self.mode!r}; expected 'add' or 'replace'")
        hooks = {vector.hook for vector in self.vectors.values()}
        if len(hooks) != 1:
            raise ValueError(f"vectors act at {sorted(hooks) or 'no hook'}; expected one hook for all concepts")

    @classmethod
    def diff_means(cls, rows: TokenRows, masks: Mapping[str, Tensor]) -> VectorEdit:
        """Added is the mean over a concept's tokens less the mean of all concepts' means: the supervised baseline."""
        means = cls.means(rows, masks).vectors
        centre = torch.stack([vector.values for vector in means.values()]).mean(0)
        return cls({
            name: SteeringVector(mean.values - centre, rows.hook, name, "diff_means") for name, mean in means.items()
        })  # fmt: skip

    @classmethod
    def means(cls, rows: TokenRows, masks: Mapping[str, Tensor]) -> VectorEdit:
        """Put in is the mean over a concept's tokens."""
        columns = mask_matrix(masks, len(rows)).T
        if empty := [name for name, column in zip(masks, columns, strict=True) if not bool(column.any())]:
            raise ValueError(f"concepts {empty[:5]} have no token: there is no mean")
        values = rows.values.detach().float().cpu()
        made = {
            name: SteeringVector(values[column].mean(0), rows.hook, name, "mean")
            for name, column in zip(masks, columns, strict=True)
        }
        return cls(made, "replace")

    @property
    def hook(self) -> str:
        return next(iter(self.vectors.values())).hook

    @property
    def concepts(self) -> list[str]:
        return list(self.vectors)

    def change(self, x: Float[Tensor, "row width"], concepts: Sequence[str]) -> Float[Tensor, "row width"]:
        """What strength 1 adds."""
        require_concepts(concepts, self.concepts)
        rows = torch.stack([self.vectors[name].values.flatten() for name in concepts]).to(x)
        check_width(rows, x.shape[-1], self.hook)
        return rows - x if self.mode == "replace" else rows


@dataclass(frozen=True, eq=False)
class SetLatents:
    """The concept's latents are set to their typical activation; all else of the activation, the error too, stays.

    Attributes:
        exclusive: Latents of the other propositions are turned off: of these concepts only one holds at a place.
    """

    dictionary: Dictionary
    propositions: Propositions
    exclusive: bool = True

    def __post_init__(self) -> None:
        if self.dictionary.is_transcoder:
            raise ValueError("a transcoder's latents are not read where they act; use an autoencoder")
        if self.dictionary.hook != (hook := self.propositions.provenance["hook"]):
            raise ValueError(
                f"the propositions were read at {hook!r} and the dictionary is of {self.dictionary.hook!r}"
            )

    @property
    def hook(self) -> str:
        return self.dictionary.hook

    @property
    def concepts(self) -> list[str]:
        return self.propositions.concepts

    @torch.no_grad()
    def change(self, x: Float[Tensor, "row width"], concepts: Sequence[str]) -> Float[Tensor, "row width"]:
        """What strength 1 adds."""
        require_concepts(concepts, self.concepts)
        before = self.dictionary.encode(x)
        after = before.clone()
        members, typical = (torch.tensor(a.values) for a in (self.propositions.latents, self.propositions.typical))
        if self.exclusive:
            after[:, members[members >= 0].unique().to(after.device)] = 0.0
        for row, name in enumerate(concepts):
            place = self.concepts.index(name)
            used = members[place] >= 0
            after[row, members[place][used].to(after.device)] = typical[place][used].to(after)
        return (self.dictionary.decode(after, x) - self.dictionary.decode(before, x)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class RandomEdit:
    """The control: a random direction for each concept, as long, at every token, as what another edit would add."""

    edit: ConceptEdit
    seed: int = 0
    _drawn: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def hook(self) -> str:
        return self.edit.hook

    @property
    def concepts(self) -> Sequence[str]:
        return self.edit.concepts

    def change(self, x: Float[Tensor, "row width"], concepts: Sequence[str]) -> Float[Tensor, "row width"]:
        """What strength 1 adds."""
        lengths = self.edit.change(x, concepts).norm(dim=-1, keepdim=True)
        return lengths * torch.stack([self._direction(name, x.shape[-1]) for name in concepts]).to(x)

    def _direction(self, concept: str, width: int) -> Tensor:
        if (concept, width) not in self._drawn:
            number = list(self.concepts).index(concept)
            noise = torch.randn(width, generator=torch.Generator().manual_seed(1009 * self.seed + number))
            self._drawn[concept, width] = noise / noise.norm()
        return self._drawn[concept, width]


def require_concepts(asked: Sequence[str], known: Sequence[str]) -> None:
    """Raise unless every concept is known, with the nearest name."""
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(name, list(known), 1) or list(known)[:3]
            raise KeyError(f"no vector for concept {name!r}; did you mean {near[0]!r}? There are {len(known)}")
