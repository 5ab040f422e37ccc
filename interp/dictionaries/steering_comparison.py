"""Steering methods compared where they change the model equally: concept, fluency and both, at equal divergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from interp.dictionaries._comparison_runs import Job, Runs
from interp.dictionaries._steering_edits import Mode, check_steering
from interp.dictionaries.kl_strength import PUBLISHED_TARGETS, check_targets, require_unpadded
from interp.dictionaries.steering_result import SCORES, SteeringComparison
from interp.dictionaries.steering_scores import Concept, harmonic_mean, relative_fluency
from interp.dictionaries.vectors import SteeringVector, random_directions
from interp.models import provenance, require_eval
from interp.results import labelled

Vectors = Mapping[str, Mapping[str, SteeringVector | Sequence[SteeringVector]]]


def compare_steering(
    bridge: Any,
    vectors: Vectors,
    concepts: Sequence[Concept],
    prompts: Int[Tensor, "example pos"],
    *,
    neutral: Int[Tensor, "neutral pos"],
    targets: Sequence[float | int] = PUBLISHED_TARGETS,
    reference: str = "diff_means",
    draws: int = 5,
    n_tokens: int = 20,
    mode: Mode = "add",
    positions: Literal["all", "prompt", "generated", "last"] = "all",
    temperature: float | int = 1.0,
    top_k: int | None = 30,
    top_p: float | None = 0.3,
    tolerance: float = 0.05,
    seed: int = 0,
    batch_size: int | None = None,
) -> SteeringComparison:
    """Steer towards concepts by several methods, each as strongly as changes the model by the same amount.

    For every method, concept, draw and target divergence the strength is found on neutral prompts
    (`strength_for_kl`), the prompts are continued under steering, and the text is scored. Draws are seeds: of the
    sampling, and of the method where it gives a vector per draw. A method `"random"` (isotropic, of the reference
    vector's length, one direction per concept and draw) is added, so that every table shows what any change of that
    size does.

    Cost, in batches: those of `strength_for_kl` per hook; one partial forward per hook for the log-odds; `n_tokens`
    forwards over a batch of texts, one over the prompt and the others over one token, where keys and values are
    cached; one to score them. Rows are methods x concepts x draws x targets x prompts; `provenance["forwards"]` has
    the number. At temperature 0 a method with one vector per concept is written once and counts for all draws.

    Args:
        vectors: Method to concept name to its vector, or to one vector per draw. Methods may act at different hooks
            and layers. Give each vector the sign that should bring the concept about.
        concepts: What to score by, one per name in `vectors`.
        prompts: Texts to continue, of one length.
        neutral: Prompts on which divergence is measured, other than these.
        reference: The method that others are compared with; a supervised difference in means, by default.
        temperature, top_k, top_p: Of the sampling, as in the paper; without effect on the search.
        batch_size: Rows per forward; from a memory budget by default. Sampled texts depend on it, since all rows of a
            batch share one stream of random numbers.

    Raises:
        ValueError: Before any forward: a method lacks a concept, a name is used twice, the reference is missing,
            vectors do not fit their hooks, prompts are padded or too long. Before the search: unsteered text already
            scores what counts as full.

    Source:
        The protocol of Shafran, Geiger & Geva 2025 (arXiv:2506.10920), section 4, with these differences: scores are
        measured, not given by a language model; strengths meet their targets within `tolerance` or are left out; the
        best strength is chosen on other prompts than it is scored on (`best`); random directions are always shown;
        intervals are over concepts, seeds and prompts.
    """
    levels = [float(target) for target in targets]
    check_targets(levels, tolerance)
    _check(bridge, vectors, concepts, prompts, neutral, reference, draws, mode)
    methods = {name: _per_draw(found, concepts) for name, found in vectors.items()}
    methods["random"] = [
        random_directions(draws, like=methods[reference][c][0], seed=seed + c) for c in range(len(concepts))
    ]
    jobs = [
        Job(m, c, d, row[c][d])
        for m, row in enumerate(methods.values())
        for c in range(len(concepts))
        for d in range(draws if len(row[c]) > 1 else 1)
    ]
    runs = Runs(
        bridge, mode=mode, positions=positions, n_tokens=n_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip
    base_text = runs.unsteered(prompts, draws)  # [draw, example, token]
    base_scores = torch.stack([concept.of_text(base_text) for concept in concepts])  # [concept, draw, example]
    _check_room(concepts, base_scores)
    base_log_prob = runs.score(prompts, base_text)
    strength, achieved = runs.search(jobs, neutral, levels, tolerance)  # [job, target]
    sizes = (len(methods), len(concepts), draws, len(levels))
    values = np.full((len(SCORES), *sizes, len(prompts)), np.nan, dtype=np.float32)
    kept = {name: np.full(sizes, np.nan, dtype=np.float32) for name in ("strength", "achieved")}
    written = np.full((*sizes, len(prompts), n_tokens), -1, dtype=np.int32)
    odds = runs.log_odds(jobs, strength, prompts, concepts)  # [job, target, example]
    repeats = 1 if temperature == 0 else draws
    texts, log_prob = runs.write(jobs, strength, prompts, [1 if _own(methods, job) else repeats for job in jobs])
    for index, job in enumerate(jobs):
        concept = concepts[job.concept]
        start = float(base_scores[job.concept].mean())
        score = concept.of_text(texts[index])  # [draw or 1, target, example]
        score[texts[index][..., 0] < 0] = torch.nan
        reach = ((score - start) / (concept.reference - start)).clamp(0, 1)
        fluent = relative_fluency(log_prob[index], base_log_prob.mean())
        both = torch.where(score.isnan(), torch.nan, harmonic_mean(reach.nan_to_num(), fluent.nan_to_num()))
        rows = [reach, fluent, both, odds[index].expand_as(score), score, log_prob[index]]
        where = (job.method, job.concept, slice(job.draw, job.draw + 1) if _own(methods, job) else slice(None))
        values[(slice(None), *where)] = torch.stack(rows).numpy()
        written[where] = texts[index].numpy()
        kept["strength"][where], kept["achieved"][where] = strength[index], achieved[index]
    names = [concept.name for concept in concepts]
    labels = {"approach": list(methods), "concept": names, "draw": np.arange(draws), "target": levels}
    dims = ("approach", "concept", "draw", "target")
    return SteeringComparison(
        values=labelled(values, ("score", *dims, "example"), {"score": list(SCORES), **labels}),
        provenance=provenance(
            bridge, hooks={name: sorted({v.hook for row in found for v in row}) for name, found in methods.items()},
            kinds={name: found[0][0].kind for name, found in methods.items()}, reference=reference, mode=mode,
            positions=positions, n_tokens=n_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            tolerance=tolerance, n_prompts=len(prompts), n_neutral=len(neutral), forwards=runs.forwards,
            concept_reference={concept.name: concept.reference for concept in concepts},
        ),
        achieved=labelled(kept["achieved"], dims, labels, unit="nats"),
        strength=labelled(kept["strength"], dims, labels, unit="strength"),
        unsteered=labelled(
            torch.stack([base_scores, base_log_prob.expand_as(base_scores)]), ("score", "concept", "draw", "example"),
            {"score": ["text", "log_prob"], "concept": names, "draw": np.arange(draws)},
        ),
        written=xr.DataArray(written, dims=(*dims, "example", "token"), coords=labels),
    )  # fmt: skip


def _own(methods: Mapping[str, list[list[SteeringVector]]], job: Job) -> bool:
    """Whether the job's vector stands for its own draw only."""
    return len(list(methods.values())[job.method][job.concept]) > 1


def _per_draw(found: Mapping[str, Any], concepts: Sequence[Concept]) -> list[list[SteeringVector]]:
    listed = [found[concept.name] for concept in concepts]
    return [[row] if isinstance(row, SteeringVector) else list(row) for row in listed]


def _check_room(concepts: Sequence[Concept], scores: Tensor) -> None:
    for concept, found in zip(concepts, scores, strict=True):
        if float(found.mean()) >= concept.reference:
            raise ValueError(
                f"unsteered text scores {float(found.mean()):.3g} for {concept.name!r}, whose reference is "
                f"{concept.reference:.3g}: there is no way up. Take other prompts, or say with reference= what its own "
                f"texts score"
            )


def _check(
    bridge: Any,
    vectors: Vectors,
    concepts: Sequence[Concept],
    prompts: Tensor,
    neutral: Tensor,
    reference: str,
    draws: int,
    mode: Mode,
) -> None:
    require_eval(bridge)
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"concepts are named {names}; expected at least one, each name once")
    if "random" in vectors:
        raise ValueError("the method 'random' is added by compare_steering; give yours another name")
    if reference not in vectors:
        raise ValueError(
            f"no method {reference!r} among {', '.join(map(repr, vectors)) or 'none'}: steering is compared with a "
            f"supervised difference in means (see diff_means); name another with reference= if you have one"
        )
    if draws < 1:
        raise ValueError(f"draws={draws}; expected at least 1, and 5 or more for intervals")
    d_vocab = int(bridge.cfg.d_vocab)
    for concept in concepts:
        if len(concept.weights) != d_vocab:
            raise ValueError(f"concept {concept.name!r} weighs {len(concept.weights)} tokens, the model has {d_vocab}")
    for method, found in vectors.items():
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"method {method!r} has no vector for {', '.join(map(repr, missing))}")
        for concept, row in zip(names, _per_draw(found, concepts), strict=True):
            if len(row) not in (1, draws):
                raise ValueError(
                    f"method {method!r} has {len(row)} vectors for {concept!r}; expected 1, or one per draw ({draws})"
                )
            for vector in row:
                check_steering(bridge, vector, mode)
    for tokens in (prompts, neutral):
        if tokens.ndim != 2 or 0 in tokens.shape:
            raise ValueError(f"prompts have shape {tuple(tokens.shape)}; expected [example, pos]")
        require_unpadded(bridge, tokens, None)
