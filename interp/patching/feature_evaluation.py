"""What feature circuits keep of a behaviour: every latent and error outside of them replaced, in one forward each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.models import provenance
from interp.patching._backward import metric_name
from interp.patching._batches import Split
from interp.patching._cells import _spots, choice
from interp.patching._feature_runs import AblatedRuns, FeatureAblation
from interp.patching._latent_places import latent_site
from interp.patching._latent_sites import LatentSite, fingerprint
from interp.patching._measure import checked
from interp.patching._resume import Reader
from interp.patching._size_curves import SizeCurve
from interp.patching.feature_attribution import Dictionaries, ordered
from interp.patching.feature_circuits import FeatureCircuit, FeatureSelection, nodes_of, ranked
from interp.patching.feature_scores import ERROR, FeatureEffects
from interp.results import labelled
from interp.types import Metric

Errors: TypeAlias = Literal["nodes", "keep", "remove"]


@dataclass(frozen=True, eq=False, repr=False)
class FeatureCurve(SizeCurve):
    """The metric of feature circuits, `values` (circuit, example), and the faithfulness that follows: see `SizeCurve`.

    Along `circuit` lie `share`, of all nodes, and `n_nodes`. As most latents are off in any prompt, shares are small
    numbers: look at `n_nodes`, and integrate with `axis="log"`.

    Attributes:
        nodes: The circuits, Bool (circuit, node, pos) or (circuit, node).
        errors: What was done with errors: `"nodes"`, `"keep"` or `"remove"`.
    """

    _size: ClassVar[tuple[str, str, str]] = ("n_nodes", "number of nodes", "feature circuits")

    nodes: xr.DataArray
    errors: str

    @property
    def circuits(self) -> list[FeatureCircuit]:
        """The circuits, in order, without scores."""
        plain = [self.nodes.isel(circuit=i, drop=True) for i in range(self.nodes.sizes["circuit"])]
        about = {key: self.provenance[key] for key in ("model", "dictionary", "positions", "all_positions")}
        about["prompts"] = self.provenance["discovered_on"]
        return [
            FeatureCircuit(mask, about, xr.full_like(mask, np.nan, dtype=np.float32)) for mask in plain
        ]  # fmt: skip

    def nodes_needed(self, f: float | int = 0.8) -> float:
        """The smallest number of nodes at which a circuit is at least this faithful; NaN if none is.

        One of the sizes that were evaluated: the truth lies between it and the one before. f need not rise with size.
        """
        enough = self.values["n_nodes"].values[self.faithfulness().values >= f]
        return float(enough.min()) if len(enough) else float("nan")

    def __repr__(self) -> str:
        counts, means = self.values["n_nodes"].values, self.values.mean("example").values
        points = ", ".join(f"{count}: {mean:.3g}" for count, mean in zip(counts[:12], means[:12], strict=True))
        return (
            f"FeatureCurve({len(counts)} {self.of}s x {self.values.sizes['example']} examples; {self.ablation} "
            f"ablation, errors: {self.errors}; {self.metric} in {self.values.attrs.get('unit', '?')}: model "
            f"{float(self.model.mean()):.3g}, empty circuit {float(self.empty.mean()):.3g}, at nodes {points}; "
            f"{self.provenance.get('model', 'unknown model')})"
        )


def feature_faithfulness(
    bridge: Any,
    prompts: Any,
    metric: Metric,
    dictionaries: Dictionaries,
    circuits: FeatureEffects | FeatureCircuit | Sequence[FeatureCircuit] | Mapping[str, FeatureCircuit],
    *,
    sizes: Sequence[float | int] | None = None,
    thresholds: Sequence[float | int] | None = None,
    absolute: bool = True,
    how: FeatureSelection = "top",
    ablation: FeatureAblation = "mean",
    of: Literal["circuit", "complement"] = "circuit",
    errors: Errors = "nodes",
    seed: int = 0,
    memory_budget: int = 2**30,
    batch_size: int | None = None,
    progress: bool = False,
) -> FeatureCurve:
    """The metric on the clean prompts with every feature outside of a circuit ablated, for every circuit and example.

    In each run the activations with dictionaries are taken apart into latents and error, in the order of computation;
    nodes outside of the circuit are replaced, those in it keep what this very run gives them, which is not what the
    intact model has once something below was ablated. What is no node (activations without dictionary, latents and
    positions that were not scored) is left to follow. The full circuit is the model itself, to the bit; in the empty
    one every activation with a dictionary is its mean (or the other run's, or the decoder's constant).

    Costs one forward for each circuit that leaves anything out, one for the clean run, one for the empty circuit and
    one for what goes in (none for `"zero"`); circuits are batched where there is room.

    Args:
        bridge, prompts, metric: As for `activation_patch`. Prompts may be others than those that gave the scores.
        dictionaries: Those that the circuits are of.
        circuits: One, several, or several by label; or the scores of `feature_effects`, from which circuits are
            selected.
        sizes: With scores: numbers of nodes, or, as floats, shares of all. By default 1, 2, 5, 10, ... as far as there
            are nodes that score anything, and all nodes.
        thresholds: With scores, in place of sizes: `select_features(threshold=...)`.
        absolute, how, seed: With scores: as for `select_features`.
        ablation: What ablated nodes carry. `"mean"`: their mean over the corrupted prompts at this position. `"swap"`:
            their value on the corrupted prompt of the same example. `"zero"`: latents and errors are nothing, and the
            decoder's constant stays.
        of: `"complement"` ablates the nodes in each circuit instead: what the rest can still do without them. A circuit
            is complete where that is near 0.
        errors: `"nodes"`: errors are nodes like others. `"keep"`: they are never ablated, also not in the empty
            circuit, so that f is about latents alone. `"remove"`: they always are, so that the full circuit is not the
            model but what the dictionaries rebuild.
        memory_budget, batch_size, progress: As for `faithfulness`.

    Returns:
        `FeatureCurve`, circuits in the order given.

    Raises:
        ValueError: If an option is unknown or does not fit, the circuits are of other dictionaries or of prompts of
            another length, or the budget is too small.
        RuntimeError: If the model is in training mode.

    Source:
        Marks et al. 2024 (arXiv:2403.19647), section 3: f = (m(C) - m(empty)) / (m(M) - m(empty)), ablation by means
        over the patch inputs. They give circuits the lowest layers for free; leave their dictionaries out for that.
        Intervals, swap and zero ablation are ours.

    Example:
        >>> interp.patching.feature_faithfulness(bridge, unseen, m, saes, scores, sizes=(10, 30, 100)).plot()
    """
    choice("ablation", ablation, get_args(FeatureAblation))
    choice("of", of, ("circuit", "complement"))
    choice("errors", errors, get_args(Errors))
    shape = checked(bridge, prompts, metric, "resid_pre")
    n = len(prompts)
    if ablation == "mean" and n < 2:
        raise ValueError("ablation='mean' needs other examples, but there is 1; pass more prompts or use 'swap'")
    chosen, about, source = _circuits(circuits, sizes, thresholds, absolute, how, seed, errors)
    named = ordered(bridge, dictionaries)
    placed = {name: latent_site(bridge, sae, None) for name, sae in named.items()}
    template = next(iter(chosen.values()))
    check_dictionaries(about["dictionary"], placed)
    spots = spots_of(prompts, template, about)
    reader = Reader(metric, torch.arange(n), n)
    split = Split.of(bridge, shape, reader, prompts.clean.shape[1], memory_budget, batch_size)
    kept = np.stack([mask.values for mask in chosen.values()])
    kept = kept if "pos" in template.dims else kept[..., None]  # [circuit, node, spot]
    ablated = kept if of == "complement" else ~kept
    ablated = np.concatenate([ablated, np.ones_like(ablated[:1])])  # the empty circuit
    is_error = template["latent"].values == ERROR
    if errors != "nodes":
        ablated[:, is_error] = errors == "remove"
    masks = {place.target: _units(ablated, template, name, place) for name, place in placed.items()}
    runs = AblatedRuns(
        bridge, list(placed.values()), prompts.clean, prompts.corrupted, reader, split, spots, ablation
    )  # fmt: skip
    values, base, forwards = runs.run(masks, progress=progress)
    unit = str(getattr(metric, "unit", "metric"))
    counted = np.ones(template.sizes["node"], dtype=bool) if errors == "nodes" else ~is_error
    counts = kept[:, counted].reshape(len(kept), -1).sum(1).tolist()
    total = int(counted.sum()) * kept.shape[2]
    by_example = {"example": list(range(n))}
    coords = {
        "circuit": list(chosen),
        "share": ("circuit", [count / total for count in counts]),
        "n_nodes": ("circuit", counts),
    }
    record = provenance(
        bridge,
        method="feature_faithfulness",
        ablation=ablation,
        of=of,
        errors=errors,
        **source,
        dictionary=about["dictionary"],
        positions=about.get("positions"),
        all_positions=about.get("all_positions", False),
        discovered_on=about.get("prompts"),
        prompts={"name": prompts.name, "seed": prompts.seed, "n": n, "tokens": int(prompts.clean.shape[1])},
        metric={"name": metric_name(metric), "unit": unit},
        cost={"forwards": forwards},
    )
    nodes = xr.concat(list(chosen.values()), "circuit").assign_coords(circuit=list(chosen))
    return FeatureCurve(
        labelled(values[:-1], ["circuit", "example"], {**coords, **by_example}, unit=unit),
        record,
        labelled(base, ["example"], by_example, unit=unit),
        labelled(values[-1], ["example"], by_example, unit=unit),
        metric_name(metric),
        ablation,
        of,
        nodes,
        errors,
    )


def _circuits(
    given: Any, sizes: Any, thresholds: Any, absolute: bool, how: FeatureSelection, seed: int, errors: Errors
) -> tuple[dict[str, xr.DataArray], dict[str, Any], dict[str, Any]]:
    """Masks by label, the provenance that says what their nodes are, and what to remember of where they come from."""
    if not isinstance(given, FeatureEffects):
        if sizes is not None or thresholds is not None:
            raise ValueError("sizes= and thresholds= select circuits from scores; these circuits have their sizes")
        if isinstance(given, FeatureCircuit):
            given = {f"{len(given)} nodes": given}
        named = given if isinstance(given, Mapping) else {str(i): circuit for i, circuit in enumerate(given)}
        if not named or not all(isinstance(circuit, FeatureCircuit) for circuit in named.values()):
            raise ValueError(
                "circuits must be FeatureEffects, a FeatureCircuit, or at least one in a list or dictionary"
            )
        circuits = list(named.values())
        for circuit in circuits:
            circuit._same(circuits[0])
        return {label: circuit.values for label, circuit in named.items()}, circuits[0].provenance, {}
    choice("how", how, get_args(FeatureSelection))
    if sizes is not None and thresholds is not None:
        raise ValueError("give sizes= or thresholds=, not both")
    order, support = ranked(given, absolute=absolute, how=how, seed=seed)
    mean = given.mean()
    if errors != "nodes":  # errors are decided on already, and no part of a size
        latents = np.repeat(mean["latent"].values != ERROR, mean.sizes.get("pos", 1))
        order, support = order[latents[order]], np.where(latents, support, -np.inf)
    n_nodes = len(order)
    if thresholds is not None:
        if how == "random":
            raise ValueError("thresholds= are of scores, and how='random' does not look at them; use sizes=")
        wanted = {f"at least {bound:g}": int((support >= bound).sum()) for bound in thresholds}
    else:
        if sizes is None:
            live = min(n_nodes, int((given.values.values != 0).any(-1).sum()))
            sizes = [base * 10**power for power in range(9) for base in (1, 2, 5) if base * 10**power < live]
            sizes = [*sizes, n_nodes]
        wanted = {
            f"{size:.3%}".replace(".000%", "%") if isinstance(size, float) else f"{size} nodes": nodes_of(
                size, mean.size
            )
            for size in sizes
        }
    if not wanted or len(wanted) < len(thresholds or sizes or ()):
        raise ValueError(f"sizes={sizes}, thresholds={thresholds} must name at least one circuit, and none twice")
    masks = {}
    for label, count in wanted.items():
        mask = np.zeros(mean.size, dtype=bool)
        mask[order[:count]] = True
        masks[label] = mean.copy(data=mask.reshape(mean.shape)).assign_attrs({})
    scored = {"method": given.method, "direction": given.direction, "value": given.value}
    return masks, given.provenance, {"scores": scored, "absolute": absolute, "how": how, "seed": seed}


def check_dictionaries(records: list[dict[str, Any]], placed: dict[str, LatentSite]) -> None:
    """Raise unless the dictionaries are those that the nodes are of."""
    known = {record["name"]: record["fingerprint"] for record in records}
    if list(known) != list(placed):
        raise ValueError(f"the circuits are of dictionaries of {list(known)}, but these are of {list(placed)}")
    for name, place in placed.items():
        if known[name] != fingerprint(place.dictionary):
            raise ValueError(f"the circuits are of another dictionary of {name!r} than the one that was passed")


def spots_of(prompts: Any, template: xr.DataArray, about: dict[str, Any]) -> Tensor:
    """Positions [spot, example, pos] of the circuits' nodes in these prompts."""
    if about.get("all_positions") and "pos" not in template.dims:
        return torch.ones(1, *prompts.clean.shape, dtype=torch.bool)
    labels: list[Any]
    if "pos" in template.dims:
        labels = template["pos"].values.tolist()
    else:
        labels = [name if name in prompts.positions else int(name) for name in about["positions"]]
    before, here = about["prompts"]["tokens"], int(prompts.clean.shape[1])
    if any(isinstance(label, int) for label in labels) and before != here:
        raise ValueError(
            f"the nodes are at positions of prompts of {before} tokens, and these have {here}: score with "
            "per_position=False, or with named positions (positions=['subject', 'end'])"
        )
    spots = _spots(prompts, labels)[0]
    return spots if "pos" in template.dims else spots.any(0, keepdim=True)


def _units(ablated: np.ndarray, template: xr.DataArray, name: str, place: LatentSite) -> Tensor:
    """Masks [circuit, spot, unit] of one dictionary, whose last unit is the error; what is no node is not ablated."""
    mine = np.flatnonzero(template["dictionary"].values == name)
    n_latents = int(place.dictionary.n_latents)
    units = template["latent"].values[mine]
    found = torch.zeros(len(ablated), ablated.shape[2], n_latents + 1, dtype=torch.bool)
    found[..., torch.from_numpy(np.where(units == ERROR, n_latents, units))] = torch.from_numpy(
        ablated[:, mine].transpose(0, 2, 1).copy()
    )
    return found
