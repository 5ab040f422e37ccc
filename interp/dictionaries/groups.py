"""Compositional neuron groups: what the features of related concepts share, what each has alone, and what either does
to the logits of every member when it is amplified."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.cache._reading import check_tokens
from interp.dictionaries.features import neuron_groups
from interp.hooks import hook_name, interventions, reads, run_from
from interp.hooks.names import device_of
from interp.models import geometry, provenance, require_eval
from interp.results import Result, labelled
from interp.stats import bootstrap_interval

if TYPE_CHECKING:
    import pandas as pd

CORE = "shared core"


@dataclass(frozen=True, eq=False, repr=False)
class FamilyGroups:
    """Neuron groups of a family of concepts.

    Attributes:
        members: Names of the concepts, in the order of their features.
        vectors: Group name to [unit]: the entries of the group, zero elsewhere, not scaled. `"shared core"` holds the
            mean of the members' unit features over the neurons that are in enough of them; `"NAME only"` holds NAME's
            unit feature over the neurons in no other one.
        counts: [unit], in how many members' groups each neuron is.
        provenance: How the groups were made.
    """

    members: tuple[str, ...]
    vectors: dict[str, Float[Tensor, " unit"]]
    counts: Int[Tensor, " unit"]
    provenance: dict[str, Any]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {int((vector != 0).sum())}" for name, vector in self.vectors.items())
        return f"FamilyGroups(neurons: {sizes})"

    def table(self) -> pd.DataFrame:
        """One row per group: how many neurons, and which share of the member's (squared) feature they carry."""
        import pandas as pd

        rows = [
            {"group": name, "neurons": int((vector != 0).sum()), "energy": float(vector.pow(2).sum())}
            for name, vector in self.vectors.items()
        ]
        return pd.DataFrame(rows)


def family_groups(
    components: Float[Tensor, "member unit"],
    members: Sequence[str],
    *,
    core_share: float | int = 1.0,
    share: float | int = 0.0,
) -> FamilyGroups:
    """Split the neurons of related features into a shared core and what is exclusive to each.

    Args:
        components: One feature per member.
        members: Their names.
        core_share: A neuron is in the core if at least this share of the members has it with one and the same sign;
            1 asks for all.
        share: As in `neuron_groups`.

    Raises:
        ValueError: If there are fewer than two members, names repeat, a feature is zero, or `core_share` is not in
            (1/n, 1]: a neuron of one member is not shared.

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920), the weekday study: core and exclusive neurons of the SNMF
        features of Monday to Sunday. Theirs come from the overlaps of binarised features; a threshold below all
        members, and the sign, are ours.
    """
    n = len(components)
    if n < 2 or len(members) != n or len(set(members)) != n:
        raise ValueError(f"{n} features and members {list(members)}; expected two or more, one distinct name for each")
    if not 1 / n < core_share <= 1:
        raise ValueError(f"core_share={core_share}; expected more than 1/{n} (one member alone) and at most 1")
    norms = components.detach().float().cpu().norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        empty = [members[i] for i in (norms[:, 0] == 0).nonzero()[:, 0].tolist()]
        raise ValueError(f"the features of {empty} are zero (dead); choose others for these members")
    unit = components.detach().float().cpu() / norms
    groups = neuron_groups(unit, share=share)
    counts = groups.sum(0)
    signed = (groups * unit.sign()).sum(0).abs()  # all that have it agree when this equals the count
    core = (counts >= core_share * n - 1e-9) & (signed >= counts - 1e-9)
    vectors = {CORE: (groups * unit).sum(0) / n * core}
    for i, name in enumerate(members):
        vectors[f"{name} only"] = unit[i] * (groups[i] & (counts == 1))
    record = {"method": "family_groups", "core_share": float(core_share), "share": float(share)}
    return FamilyGroups(tuple(members), vectors, counts, record)


@dataclass(frozen=True, eq=False, repr=False)
class GroupEffects(Result):
    """Change of every member's logit when a group is amplified. `values` has the dimensions (group, member, example),
    in logits over the mean of the vocabulary: positive means that the group raises the member.

    Attributes:
        control: (group, draw, member, example): the same for as many random neurons outside all groups, with the same
            entries in random order.
        sizes: (group,): neurons in each group.
    """

    control: xr.DataArray
    sizes: xr.DataArray

    def interval(self, level: float = 0.95, *, seed: int = 0) -> xr.Dataset:
        """Mean over examples with its bootstrap interval, (group, member)."""
        found = bootstrap_interval(self.values.values, confidence=level, seed=seed)
        mean = self.values.mean("example", keep_attrs=True)
        parts = {name: mean.copy(data=np.float32(getattr(found, name))) for name in found._fields}
        return xr.Dataset(parts)

    def table(self) -> pd.DataFrame:
        """Mean effects, a row per group and a column per member: the layout of the paper's weekday table."""
        return self.values.mean("example").to_pandas()

    def contrasts(self, level: float = 0.95, *, seed: int = 0) -> pd.DataFrame:
        """One row per group: effect on its own member (the core: on all), on the others, and own minus others, with
        intervals over examples; and the same for random neurons: mean of the draws and the range of the middle `level`
        of them.

        `p_value` is the rank of the group among its draws, (1 + draws at least as large) / (1 + draws), by own minus
        others (the core: by its mean effect), each averaged over examples: a group of random neurons has p <= 0.05 in
        one case of twenty. Examples say nothing of that, however many there are: one draw of neurons differs from the
        next by more than examples do. Draws limit it: 19 allow 0.05 at best, 39 allow 0.025; NaN without draws.
        """
        import pandas as pd

        members, rows = [str(m) for m in self.values["member"].values], []
        tails = ((1 - level) / 2, (1 + level) / 2)
        for g, group in enumerate(map(str, self.values["group"].values)):
            own = np.array([group in (f"{member} only", CORE) for member in members])
            cells, random = self.values.values[g], self.control.values[g].mean(-1)  # [member, example], [draw, member]
            parts, drawn = {"own": cells[own].mean(0)}, {"own": random[:, own].mean(1)}
            if not own.all():
                for found, of, axis in ((parts, cells, 0), (drawn, random.T, 0)):
                    found["others"] = of[~own].mean(axis)
                    found["own_minus_others"] = found["own"] - found["others"]
            row: dict[str, Any] = {"group": group, "neurons": int(self.sizes.values[g])}
            for name, part in parts.items():
                found = bootstrap_interval(part, confidence=level, seed=seed)
                row |= {name: float(found.estimate), f"{name}_low": float(found.low), f"{name}_high": float(found.high)}
            for name, part in drawn.items():
                low, high = np.quantile(part, tails) if len(part) else (np.nan, np.nan)
                middle = float(part.mean()) if len(part) else np.nan
                row |= {f"random_{name}": middle, f"random_{name}_low": float(low), f"random_{name}_high": float(high)}
            deciding = "own" if own.all() else "own_minus_others"
            gap, chance = parts[deciding].mean(), drawn[deciding]
            known = len(chance) and not np.isnan([gap, *chance]).any()
            p = (1 + int((chance >= gap).sum())) / (1 + len(chance)) if known else np.nan
            rows.append({**row, "p_value": p})
        return pd.DataFrame(rows)

    def summary(self) -> dict[str, float]:
        """Six numbers of one family, to compare families, methods and seeds by: mean effect of the core on all members
        and of random neurons in its place, mean effect of exclusive groups on their own member and on the others, own
        minus others for random neurons in their place, and the share of exclusive groups with p <= 0.05."""
        frame = self.contrasts().set_index("group")
        core, alone = frame.loc[CORE], frame.drop(CORE).dropna(subset=["own"])
        return {
            "core": float(core["own"]),
            "core, random neurons": float(core["random_own"]),
            "exclusive: own": float(alone["own"].mean()),
            "exclusive: others": float(alone["others"].mean()),
            "exclusive, random: own - others": float(alone["random_own_minus_others"].mean()),
            "exclusive with p <= 0.05": float((alone["p_value"] <= 0.05).mean()),
        }

    def plot(self) -> Any:
        """Figure: mean effect of every group on every member, with intervals when hovering."""
        from interp.plotting import heatmap

        found = self.interval()
        hover = {name: found[name] for name in ("low", "high")}
        return heatmap(
            found["estimate"], title="Effect of amplifying neuron groups", unit="logits", origin="top", hover=hover
        )


@torch.no_grad()
def amplify_groups(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    layer: int,
    groups: FamilyGroups,
    targets: Mapping[str, Sequence[int]],
    *,
    strength: float | int = 1.0,
    positions: Literal["last", "all"] = "last",
    n_random: int = 39,
    seed: int = 0,
    batch_size: int = 128,
) -> GroupEffects:
    """Add each group of neurons at `hook_post` and read every member's logit at the last position.

    All groups are added with the same norm: `strength` times the mean norm of this layer's activations at the edited
    positions, so that a small group is not weak because it is small. A member's logit is the mean over its target
    tokens, less the mean over the vocabulary. Random controls take as many neurons that are in no member's feature,
    with the same entries in random order. Costs one forward over the tokens, and for each group and each of its
    draws one from this layer on; draws share batches, and results do not depend on their size.

    Args:
        tokens: Contexts of equal length in which the members could come next, or neutral ones; at least two.
        targets: Member name to the token ids that stand for it.
        positions: Where the group is added: at the last position, or at all.
        n_random: Random draws per group, against which `contrasts` ranks it; groups that are larger than what is
            outside all groups have NaN controls.
        batch_size: Rows per forward.

    Returns:
        `GroupEffects`; a group without neurons (no shared core) is NaN.

    Raises:
        ValueError: If groups, targets, tokens or options do not fit, before any forward.

    Source:
        Shafran, Geiger & Geva 2025 (arXiv:2506.10920), the weekday table (GPT-2 Large: core neurons raise every day by
        4.7 to 6.0 logits, a day's own raise it by 1.3 to 2.6 and lower most others). How strongly and where they
        amplify is not in the text we have; equal norms, random controls and intervals are ours.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    _check(bridge, tokens, groups, targets, strength, n_random, batch_size)
    hook, entry, device = hook_name("neuron", layer), hook_name("resid_pre", layer), device_of(bridge)
    where: Any = slice(-1, None) if positions == "last" else slice(None)
    edited: dict[str, Tensor] = {name: _unit(vector) for name, vector in groups.vectors.items()}
    rng = torch.Generator().manual_seed(seed)
    added = torch.stack([  # [group, group itself and draws, unit]
        torch.stack([vector, *_random_like(vector, groups.counts, n_random, rng)]) for vector in edited.values()
    ])  # fmt: skip
    members = [torch.tensor(list(targets[name]), device=device) for name in groups.members]

    def measured(logits: Tensor) -> Tensor:
        logits = logits[:, -1].float()
        logits = logits - logits.mean(1, keepdim=True)
        return torch.stack([logits[:, ids].mean(1) for ids in members], 1).cpu()  # [row, member]

    base, entering, norms = [], [], []
    with reads(bridge, [hook, entry]) as seen:
        for part in tokens.split(batch_size):
            base.append(measured(bridge(part.to(device), logits_to_keep=1)))
            entering.append(seen[entry])
            norms.append(seen[hook][:, where].float().norm(dim=-1).cpu())
    before, resid, size = torch.cat(base), torch.cat(entering), float(torch.cat(norms).mean())
    alive = added.any(-1).nonzero()  # [vector, (group, draw)]
    effects = torch.full((*added.shape[:2], len(tokens), len(members)), torch.nan)
    batches = torch.cartesian_prod(torch.arange(len(alive)), torch.arange(len(tokens))).split(batch_size)
    for batch in batches if len(alive) else ():
        (g, d), example = alive[batch[:, 0]].T, batch[:, 1]
        vectors = (float(strength) * size * added[g, d]).to(device)[:, None]

        def add(tensor: Tensor, _vectors: Tensor = vectors) -> Tensor:
            new = tensor.clone()
            new[:, where] += _vectors.to(tensor.dtype)
            return new

        with interventions(bridge, {hook: add}):
            logits = run_from(bridge, resid[example.to(device)], layer, logits_to_keep=1, use_cache=False)
        effects[g, d, example] = measured(logits) - before[example]
    effects = effects.transpose(-1, -2)
    values, control = effects[:, 0], effects[:, 1:]
    coords = {"group": list(edited), "member": list(groups.members), "example": range(len(tokens))}
    settings: dict[str, Any] = {"layer": layer, "strength": float(strength), "positions": positions}
    settings |= {"n_random": n_random, "seed": seed, "norm": float(strength) * size, "groups": groups.provenance}
    settings["cost"] = {"forwards": len(base), "partial_forwards": len(batches) if len(alive) else 0}
    record = provenance(bridge, method="amplify_groups", **settings)
    drawn = {"group": coords["group"], "draw": range(n_random), **{n: coords[n] for n in ("member", "example")}}
    sizes = np.array([int((vector != 0).sum()) for vector in groups.vectors.values()])
    return GroupEffects(
        labelled(values, tuple(coords), coords, unit="logits"), record,
        labelled(control, tuple(drawn), drawn, unit="logits"),
        xr.DataArray(sizes, dims=("group",), coords={"group": coords["group"]}),
    )  # fmt: skip


def _check(
    bridge: Any, tokens: Tensor, groups: FamilyGroups, targets: Mapping[str, Sequence[int]], strength: float | int,
    n_random: int, batch_size: int,
) -> None:  # fmt: skip
    if len(groups.counts) != geometry(bridge).d_mlp:
        raise ValueError(f"groups are of {len(groups.counts)} neurons; this model has {geometry(bridge).d_mlp} a layer")
    if len(tokens) < 2:
        raise ValueError(f"tokens has {len(tokens)} row; intervals over examples need at least 2")
    if missing := [name for name in groups.members if not len(targets.get(name, ()))]:
        raise ValueError(f"targets has no tokens for {missing}; expected ids for each of {list(groups.members)}")
    wrong = [i for name in groups.members for i in targets[name] if not 0 <= int(i) < int(bridge.cfg.d_vocab)]
    if wrong:
        raise ValueError(f"targets name the tokens {wrong[:5]}; expected ids from 0 to {int(bridge.cfg.d_vocab) - 1}")
    if strength <= 0 or n_random < 0 or batch_size < 1:
        raise ValueError(f"strength={strength}, n_random={n_random}, batch_size={batch_size}; expected a positive "
                         f"strength, n_random of at least 0 and batch_size of at least 1")  # fmt: skip


def _random_like(vector: Tensor, counts: Tensor, n: int, rng: torch.Generator) -> list[Tensor]:
    """The entries of a group on random neurons that no member uses, in random order; zeros where there are too few."""
    entries, free = vector[vector != 0], (counts == 0).nonzero()[:, 0]
    drawn = []
    for _ in range(n):
        new = torch.zeros_like(vector)
        if 0 < len(entries) <= len(free):
            new[free[torch.randperm(len(free), generator=rng)[: len(entries)]]] = entries
        drawn.append(new)
    return drawn


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm().clamp(min=1e-30)
