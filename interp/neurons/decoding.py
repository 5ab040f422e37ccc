"""Every neuron's tokens: what it reads and writes, through the unembedding, exact and against a null."""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from interp.models import geometry, provenance
from interp.neurons._atlas_files import Arrays, inverted, shapes
from interp.neurons._readout import LOGITS, SCORES, Readout, Score
from interp.neurons._sides import SIDES, Side, check_sides, side_vectors
from interp.neurons._tiling import extremes, plan, scan, spread
from interp.neurons.atlas import NeuronAtlas, assemble
from interp.neurons.nulls import covariance_null, peak_statistics, rotation_null
from interp.prompts._tokens import token_strings
from interp.stats import adjust_p_values

Null = Literal["rotation", "covariance"]
_NULL_PEAKS = 1000  # at least so many are compared with, drawn several times from small layers


@torch.no_grad()
def decode(
    bridge: Any,
    *,
    weights: Side | Sequence[Side] | None = "out",
    top_k: int = 10,
    score: Score = "centred_cosine",
    fold: bool = True,
    scale: float | int | None = None,
    layers: Sequence[int] | None = None,
    null: Null | None = "rotation",
    seed: int = 0,
    memory_budget: int = 2**28,
    dtype: torch.dtype | Literal["float32", "bfloat16"] | None = None,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> NeuronAtlas:
    """The tokens that every neuron reads and writes most and least, from weights alone.

    The vector of each neuron is compared with the direction of each token; of every neuron the `top_k` largest and
    smallest scores are kept, with the lower id first among equal ones. Exact: nothing is sampled or passed over, and
    neurons x vocabulary is never in memory. No forward over text; the first call on a bridge runs one over three tokens
    to see how its blocks are built.

    Sign: a positive score of side `"out"` means that activating the neuron raises the token's logit, a negative one
    that it lowers it. A neuron of a gated MLP can have a negative activation, which turns both around.

    Args:
        weights: Side or sides: `"in"` and `"gate"` are what a neuron reads, `"out"` what it writes. None: all that the
            model has.
        top_k: Length of the lists.
        score: Of a vector v and the direction u of a token:

            - `"centred_cosine"`: cosine of v and u less the mean direction of the vocabulary, which softmax ignores.
              Free of the norms of tokens, so rare tokens with long vectors do not label everything.
            - `"cosine"`: cosine of v and u.
            - `"dot"`: v . u, in the units of the weights; `"unit"`: of v brought to length 1.
            - `"logit"`: of v brought to length `scale`. With the default, sqrt(d_model), that is what the final norm
              makes of v; its bias and that of the unembedding are left out, as is a soft cap, being the same for all
              neurons or monotone.
            - `"prob"`: softmax of `"logit"` over the vocabulary. The order is that of `"logit"`; the value says more
              about `scale` and the norms of tokens than about the neuron.
        fold: Put the gains of the norms into v and u (see `interp.neurons.side_vectors`); False: weights as stored.
        scale: Only with `"logit"` and `"prob"`.
        layers: Layers to decode; all by default. The others are NaN (ids -1).
        null: What peaks are compared with. `"rotation"`: the vectors of the layer turned by a random rotation,
            `"covariance"`: Gaussian vectors with the covariance of the layer. At least 1,000 null peaks are compared
            with (those of all layers together for a rotation, where each is that of a uniform direction); for models
            with fewer neurons than that the null is drawn several times. It costs as many products again. Where the
            vectors of a layer lean towards some tokens together, most of them beat the rotation; a peak that does not
            beat the covariance null as well belongs to the layer more than to the neuron. None: no z, p and q.
        seed: Of the null. Every layer and side draws its own.
        memory_budget: Bytes that may be used beside the model, the vectors of one layer (a few copies), a matrix
            d_model x d_model in float64 and the result. If the unembedding takes at most three quarters of it, it is
            kept as the score needs it, which saves making it again for every layer.
        dtype: Of the operands; `torch.bfloat16` rounds both to it, and products are added up in float32 either way. On
            a GPU that is several times faster. None: float32.
        path: A directory for the result, written layer by layer. A call that was killed goes on where it stopped when
            it is repeated; one that was finished is opened. The arrays stay on disk and are mapped.
        progress: Show a bar with the time left.

    Raises:
        ValueError: If an option is not one of the above or contradicts another, a layer or side does not exist, weights
            are NaN or infinite, the budget is too small, the model is built in a way that its neurons cannot be put
            beside tokens, or `path` holds something else.

    Source:
        Davies 2025, *Flash Interpretability: Decoding Specialised Feature Neurons in Large Language Models with the
        LM-Head* (arXiv:2501.02688), which takes `"in"` and the softmax at a scale that it does not state. Sides, score,
        signs and nulls are ours: a clamp acts through `"out"`, and a peak is a finding only against a null.
    """
    sides = _sides(bridge, weights)
    chosen = _layers(bridge, layers)
    kind = _dtype(dtype)
    _check_options(bridge, top_k, score, scale, null)
    shape = geometry(bridge)
    draws = math.ceil(_NULL_PEAKS / (shape.d_mlp * (len(chosen) if null == "rotation" else 1))) if null else 0
    readout = Readout(bridge, score, fold=fold, scale=scale, dtype=kind, room=memory_budget * 3 // 4)
    settings = {
        "sides": sides, "layers": chosen, "top_k": top_k, "score": score, "fold": fold,
        "scale": readout.scale if score in LOGITS else None, "null": null, "null_draws": draws, "seed": seed,
        "operands": str(kind).removeprefix("torch."),
    }  # fmt: skip
    record = provenance(bridge, method="decode", **settings)
    same = {name: record[name] for name in ("model", "revision", "weights_state", *settings)}
    wanted = shapes(len(sides), shape.n_layers, shape.d_mlp, top_k, draws * shape.d_mlp)
    arrays = Arrays(wanted, None if path is None else Path(path), same)
    if not arrays.complete:
        todo: list[tuple[Side, int]] = [
            (side, layer) for side in sides for layer in chosen if (side, layer) not in arrays.done
        ]
        _run(bridge, arrays, readout, todo, sides, top_k, null, draws, seed, memory_budget, progress)
        _add_significance(arrays.arrays, null, score, chosen)
        found = arrays.arrays
        index = inverted(found["top_ids"], found["bottom_ids"], shape.d_vocab)
        strings = _strings(bridge, shape.d_vocab)
        arrays.finish(strings, index, record)
        if path is None:
            return assemble(found, strings, record)
    assert path is not None
    return NeuronAtlas.load(path)


def _run(
    bridge: Any, arrays: Arrays, readout: Readout, todo: Sequence[tuple[Side, int]], sides: list[Side], top_k: int,
    null: Null | None, draws: int, seed: int, memory_budget: int, progress: bool,
) -> None:  # fmt: skip
    if not todo:
        return
    d_mlp = geometry(bridge).d_mlp
    tiling = plan(readout.d_model, d_mlp, readout.d_vocab, top_k, budget=memory_budget - readout.kept,
                  device=readout.device)  # fmt: skip
    moments = readout.moments(tiling)
    silent = not progress or os.environ.get("INTERP_PROGRESS") == "0"
    blocks = math.ceil(readout.d_vocab / tiling.columns)
    with tqdm(total=len(todo) * (1 + draws) * blocks, disable=silent, desc="decoding") as bar:
        for side, layer in todo:
            vectors = _finite(side_vectors(bridge, layer, side, fold=readout.fold).float(), side, layer)
            rows, norms, nothing = readout.rows(vectors)
            common = {"tiling": tiling, "after": bar.update}
            found = scan(rows, readout.columns, readout.d_vocab, top_k, logsumexp=readout.score in LOGITS, **common)
            mean, std = spread(rows, *moments)
            top, bottom = found.top.values, found.bottom.values
            if readout.score == "prob":
                assert found.logsumexp is not None
                top, bottom = ((part - found.logsumexp[:, None]).exp() for part in (top, bottom))
            peak = torch.where(bottom[:, 0].abs() > top[:, 0], bottom[:, 0], top[:, 0])
            numbers = {"top_values": top, "bottom_values": bottom, "values": peak, "mean": mean, "std": std}
            if found.logsumexp is not None:
                numbers["logsumexp"] = found.logsumexp
            for name, values in numbers.items():
                numbers[name] = torch.where(nothing if values.ndim == 1 else nothing[:, None], torch.nan, values)
            numbers["norm"] = norms
            numbers["top_ids"] = found.top.columns.masked_fill(nothing[:, None], -1)
            numbers["bottom_ids"] = found.bottom.columns.masked_fill(nothing[:, None], -1)
            if null is not None:
                peaks = []
                for draw in range(draws):
                    meant = _null_vectors(vectors, null, readout.centres, _seed(seed, side, layer, draw))
                    meant_rows, meant_norms, _ = readout.rows(meant)
                    high, low = extremes(meant_rows, readout.columns, readout.d_vocab, **common)
                    size = high if readout.score == "prob" else torch.maximum(high, -low)
                    size = size / meant_norms if readout.score == "dot" else size
                    peaks.append(torch.where(nothing, torch.nan, size))
                numbers["null_peaks"] = torch.cat(peaks)
            arrays.put(side, sides.index(side), layer, {name: v.cpu().numpy() for name, v in numbers.items()})


def _add_significance(arrays: Mapping[str, np.ndarray], null: Null | None, score: Score, layers: list[int]) -> None:
    """z, p and q of the peaks. A rotation makes any vector a uniform direction, so its peaks of all layers are one
    sample; those of the covariance null belong to their layer."""
    if null is None:
        return
    for place in range(len(arrays["values"])):
        peaks = np.abs(arrays["values"][place, layers].astype(np.float64))
        if score == "prob":  # compared as logits
            peaks = np.log(peaks) + arrays["logsumexp"][place, layers]
        elif score == "dot":  # per length of the vector
            peaks = peaks / arrays["norm"][place, layers]
        drawn = arrays["null_peaks"][place, layers]
        z, p = (np.full(peaks.shape, np.nan) for _ in range(2))
        for group in [slice(None)] if null == "rotation" else [slice(row, row + 1) for row in range(len(layers))]:
            measured = np.isfinite(peaks[group])
            if not measured.any():
                continue
            against = drawn[group][np.isfinite(drawn[group])]
            z[group][measured], p[group][measured] = peak_statistics(peaks[group][measured], against)
        arrays["z"][place, layers] = z
        arrays["p"][place, layers] = np.maximum(p, np.finfo(np.float32).tiny, where=~np.isnan(p), out=p)
        arrays["q"][place, layers] = adjust_p_values(p, method="bh")


def _null_vectors(
    vectors: Float[Tensor, "neuron d_model"], null: Null, centred: bool, seed: int
) -> Float[Tensor, "neuron d_model"]:
    """Null vectors that stay where the model's own can be: where norms take the mean out, vectors without a mean."""
    if null == "covariance":
        return covariance_null(vectors, seed)
    if not centred:
        return rotation_null(vectors, seed)
    # a reflection that takes the direction of the mean to the first axis; the others are rotated, and it is undone
    mirror = torch.full((vectors.shape[1],), -1 / math.sqrt(vectors.shape[1]), device=vectors.device)
    mirror[0] += 1
    mirror = mirror / mirror.norm()
    turned = _reflected(vectors, mirror)
    return _reflected(torch.cat([turned[:, :1], rotation_null(turned[:, 1:], seed)], 1), mirror)


def _reflected(rows: Tensor, mirror: Tensor) -> Tensor:
    return rows - 2 * torch.outer(rows @ mirror, mirror)


def _seed(seed: int, side: Side, layer: int, draw: int) -> int:
    return int(np.random.SeedSequence([seed, SIDES.index(side), layer, draw]).generate_state(1)[0])


def _finite(vectors: Tensor, side: Side, layer: int) -> Tensor:
    bad = (~vectors.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"side {side!r} of layer {layer} has NaN or infinite weights in {len(bad)} of {len(vectors)} "
                         f"neurons (the first is {bad[0]}), whose scores have no order")  # fmt: skip
    return vectors


def _sides(bridge: Any, weights: Any) -> list[Side]:
    if weights is None:
        return [side for side in SIDES if side != "gate" or bridge.cfg.gated_mlp]
    sides: Any = [weights] if isinstance(weights, str) else list(weights)
    if not sides or len(set(sides)) < len(sides):
        raise ValueError(f"weights={weights!r}; name each side once, or None for all that the model has")
    check_sides(bridge, sides)
    return sides


def _layers(bridge: Any, layers: Sequence[int] | None) -> list[int]:
    n_layers = int(bridge.cfg.n_layers)
    if layers is None:
        return list(range(n_layers))
    chosen = [int(layer) for layer in layers]
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= layer < n_layers for layer in chosen):
        raise ValueError(f"layers={list(layers)}; expected different layers from 0 to {n_layers - 1}")
    return sorted(chosen)


def _dtype(dtype: Any) -> torch.dtype:
    known = {None: torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16,
             torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}  # fmt: skip
    if dtype not in known:
        raise ValueError(f"dtype={dtype!r}; operands are float32 or bfloat16")
    return known[dtype]


def _check_options(bridge: Any, top_k: int, score: str, scale: Any, null: str | None) -> None:
    if score not in SCORES:
        raise ValueError(f"no score {score!r}; the scores are {', '.join(map(repr, SCORES))}")
    if scale is not None and score not in LOGITS:
        raise ValueError(f"scale={scale} has no part in score={score!r}; it belongs to 'logit' and 'prob'")
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale={scale}; expected a positive number, or None for sqrt(d_model)")
    if null is not None and null not in get_args(Null):
        raise ValueError(f"no null {null!r}; expected {', '.join(map(repr, get_args(Null)))} or None")
    d_vocab = int(bridge.W_U.shape[1])
    if not 1 <= top_k <= d_vocab:
        raise ValueError(f"top_k={top_k}; expected 1 to the {d_vocab} tokens of the vocabulary")


_texts: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()  # a second for 100,000 tokens


def _strings(bridge: Any, d_vocab: int) -> list[str]:
    """Text of every id; `#id` where there is none."""
    tokenizer = bridge.tokenizer
    if tokenizer is None:
        return [f"#{token}" for token in range(d_vocab)]
    texts = _texts.get(tokenizer)
    if texts is None or len(texts) != d_vocab:
        known = token_strings(tokenizer, range(d_vocab))
        texts = _texts[tokenizer] = [known[token] or f"#{token}" for token in range(d_vocab)]
    return texts
