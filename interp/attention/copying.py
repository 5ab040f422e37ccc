"""What heads write when they attend: copying, name movers, successors. Grouped heads count one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.attention._patterns import check_layers, check_tokens, reduce_patterns
from interp.attention._texts import uses_bos
from interp.attention._weights import centred, eigenvalue_share, embedding, gains, head_weights, read_norm, unembedding
from interp.attention.classic import attention_between
from interp.attention.head_scores import HeadScores, collect, joined
from interp.hooks import hook_name, reads, run_until
from interp.hooks.names import device_of
from interp.models import require_eval
from interp.prompts import Prompts


def ov_copying(bridge: Any, *, norms: bool = True, layers: Sequence[int] | None = None) -> HeadScores:
    """Sum of the eigenvalues of W_E W_OV W_U over the sum of their sizes, from weights alone: 1 for a head that raises
    every token it attends to, -1 for one that lowers them, near 0 for neither.

    The circuit from token to logit through one head is d_vocab x d_vocab, but its non-zero eigenvalues are those of a
    d_head x d_head matrix. `values` [score, layer, head] without examples.

    Args:
        norms: Put the gains of the norms on the path (and take out the mean where they do), and take out of W_U what it
            says of all tokens alike, which the softmax ignores and which would pass for suppression; False for bare
            weights.

    Source:
        Elhage et al. 2021, A Mathematical Framework, "copying heads"; theirs are models without norms or MLPs. What
        the first MLP makes of a token is not seen here: `copy_scores` has it.
    """
    require_eval(bridge)
    weights, chosen = head_weights(bridge), check_layers(bridge, layers)
    read, write = embedding(bridge), bridge.W_U.detach().cpu().double()
    found = gains(bridge) if norms else None
    if found is not None:
        read, write = centred(read, 1, found.centred), centred(unembedding(bridge), 1)
    loop = write @ read  # [d_model, d_model]: what a written vector does to the embedding of the next token
    scores: dict[int, dict[str, Tensor]] = {}
    for layer in chosen:
        W_V, W_O = weights.W_V[layer], weights.W_O[layer]
        if found is not None:
            W_V, W_O = found.before[layer][:, None] * W_V, W_O * found.after[layer]
        scores[layer] = {"ov_copying": eigenvalue_share(W_O @ loop @ W_V)}
    return collect(bridge, scores, "share of eigenvalues", method="ov_copying", norms=norms)


def attended_token_copying(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    *,
    over: Literal["sequence", "vocabulary"] = "sequence",
    layers: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> HeadScores:
    """Of what a head raises in the logits, the share that lands on the token it attends to, from -1 to 1.

    The output of a head is a sum over keys. Each key's part is read by the unembedding, its mean over tokens is
    subtracted and the negative rest is cut; the share that lands on the key's own token is averaged with the head's
    attention as weight, and scaled by 2 share - 1. Position 0 is left out of the weights, since sinks write
    next to nothing. One forward per batch. `values` [score, layer, head, example]; NaN where a head attends to
    position 0 alone.

    Args:
        tokens: Random tokens that do not repeat (`interp.prompts.repeated_tokens(bridge, repeats=1)`).
        over: Which tokens share: those of the example (so that chance is 2 / pos - 1 for any vocabulary), or all.

    Source:
        Olsson et al. 2022 (arXiv:2209.11895), copying score on 25 random tokens. Ours splits the output by keys, so
        that a head that copies two tokens at once is not punished for it.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    if over not in ("sequence", "vocabulary"):
        raise ValueError(f"over must be 'sequence' or 'vocabulary', got {over!r}")
    if tokens.shape[1] < 3:
        raise ValueError(f"tokens has {tokens.shape[1]} positions; expected at least 3, the first of which is left out")
    device = device_of(bridge)
    write = unembedding(bridge).float().to(device)
    weights, after = head_weights(bridge), gains(bridge).after
    out = (weights.W_O * after[:, None, None]).float().to(device)  # [layer, head, d_head, d_model]
    n_heads = int(bridge.cfg.n_heads)

    def reduce(layer: int, pattern: Tensor, ids: Tensor, v: Tensor) -> dict[str, Tensor]:
        share = torch.stack(
            [_own_share(row @ out[layer], write, own, over) for row, own in zip(_by_head(v, n_heads), ids, strict=True)]
        )  # [batch, head, src]
        weight = pattern.sum(2)[..., 1:]
        score = (weight * share[..., 1:]).sum(-1) / weight.sum(-1)
        return {"attended_token_copying": 2 * score - 1}

    found = reduce_patterns(bridge, tokens, reduce, layers=layers, batch_size=batch_size, rows=[tokens], sites=["v"])
    return collect(bridge, found, "share, scaled", method="attended_token_copying", tokens=tokens, over=over)


def copy_scores(
    bridge: Any,
    tokens: Int[Tensor, "batch pos"],
    positions: Int[Tensor, "batch k"] | Int[Tensor, "batch"] | None = None,
    *,
    k: int = 5,
    targets: Int[Tensor, "batch k"] | Int[Tensor, "batch"] | None = None,
    layers: Sequence[int] | None = None,
) -> HeadScores:
    """Whether the OV circuit of a head, attending to a token alone, puts that token among its top `k` logits.

    The stream at a token after the first block is what the head reads, through its norm; what it writes goes to the
    logits directly. Heads of the first layer read the embedding instead. Scores: `copy` (share of tokens in the top
    `k`), and `negative_copy` (the same with the sign of the output turned: heads that suppress what they attend to).
    Costs one forward over one layer. `values` [score, layer, head, example].

    Args:
        positions: Which tokens to score, per example; all but the first by default.
        targets: The token that should be in the top `k` instead of the token itself, e.g. its successor.

    Source:
        Wang et al. 2022 (arXiv:2211.00593), section 3.2 and appendix: top 5, over 1000 names, 12 MLP and norms as
        here; published: name movers above 95 %, an average head below 20 % (quoted from memory). Value biases are left
        out, as there.
    """
    require_eval(bridge)
    check_tokens(bridge, tokens)
    n, n_pos = tokens.shape
    tokens = tokens.cpu()
    if positions is None:
        positions = torch.arange(1, n_pos).expand(n, n_pos - 1)
    positions = (positions[:, None] if positions.ndim == 1 else positions).cpu()
    if len(positions) != n or positions.numel() == 0 or bool(((positions < 0) | (positions >= n_pos)).any()):
        raise ValueError(f"positions {tuple(positions.shape)} do not fit tokens {tuple(tokens.shape)}; expected "
                         f"indices from 0 to {n_pos - 1}, a row for each example")  # fmt: skip
    wanted = tokens.gather(1, positions) if targets is None else targets.cpu().reshape(positions.shape)
    if not 1 <= k < int(bridge.cfg.d_vocab):
        raise ValueError(f"k={k}; expected 1 to {int(bridge.cfg.d_vocab) - 1}, below the size of the vocabulary")

    def score(logits: Tensor) -> Tensor:  # [batch, k, d_vocab]
        return (_rank(logits, wanted) < k).double().mean(-1)

    found = _through_heads(
        bridge, tokens, positions, layers, lambda logits: {"copy": score(logits), "negative_copy": score(-logits)}
    )
    return collect(bridge, found, f"share of tokens in the top {k}", method="copy_scores", tokens=tokens, k=k)


def successor_scores(
    bridge: Any, sequences: Sequence[Sequence[int]], *, cyclic: bool = False, layers: Sequence[int] | None = None
) -> HeadScores:
    """Whether a head, attending to an ordinal token, writes the next one more than any other of its sequence.

    Every token is read alone (after BOS, where the model uses one), as in `copy_scores`. `values` [score, layer, head,
    example], an example being a token that has a successor: 1 if the successor comes first among the sequence's
    tokens, else 0. Chance is one over the length of the sequence; `copy_in_sequence` is the same for the token itself.

    Args:
        sequences: Token ids in their order: days, months, numbers, letters, years.
        cyclic: Whether the first follows the last.

    Source:
        Gould et al. 2023 (arXiv:2312.09230), successor heads; the stream after the first MLP is what the head reads.
    """
    require_eval(bridge)
    rows = [list(sequence) for sequence in sequences]
    if not rows or any(len(set(row)) < 3 or len(set(row)) < len(row) for row in rows):
        raise ValueError(f"sequences of lengths {[len(row) for row in rows]}: expected at least one, each of 3 or more "
                         f"different tokens")  # fmt: skip
    first = bridge.tokenizer.bos_token_id if uses_bos(bridge) else None
    ids = torch.tensor([token for row in rows for token in row])
    tokens = ids[:, None] if first is None else torch.stack([torch.full_like(ids, first), ids], 1)
    check_tokens(bridge, tokens, "sequences")

    def score(logits: Tensor) -> dict[str, Tensor]:  # [token, 1, d_vocab]
        next_one, itself, start = [], [], 0
        for row in rows:
            best = logits[start : start + len(row), 0][:, torch.tensor(row)].argmax(-1)
            place = torch.arange(len(row))
            last = len(row) if cyclic else len(row) - 1
            next_one.append((best == (place + 1) % len(row))[:last])
            itself.append((best == place)[:last])
            start += len(row)
        return {"successor": torch.cat(next_one).double(), "copy_in_sequence": torch.cat(itself).double()}

    at_end = torch.full((len(ids), 1), tokens.shape[1] - 1)
    found = _through_heads(bridge, tokens, at_end, layers, score)
    return collect(bridge, found, "share of tokens", method="successor_scores", tokens=tokens, cyclic=cyclic)


def name_mover_scores(
    bridge: Any, prompts: Prompts, *, k: int = 5, layers: Sequence[int] | None = None, batch_size: int | None = None
) -> HeadScores:
    """The two halves of a name mover on indirect-object prompts, and their product.

    `attention_to_answer` (END to IO), `attention_to_subject` (END to S1 and S2 together, an S-inhibition head's or a
    duplicate reader's), `copy` and `negative_copy` of the name at IO (see `copy_scores`), `name_mover` = attention to
    answer times copy. `values` [score, layer, head, example]. Two forwards.

    Args:
        prompts: `interp.prompts.ioi(bridge)`; the clean prompts are read.

    Source:
        Wang et al. 2022 (arXiv:2211.00593), section 3; the product is ours.
    """
    missing = [name for name in ("io", "s1", "s2", "end") if name not in prompts.positions]
    if missing:
        raise ValueError(f"the prompts name no positions {missing}; they name {sorted(prompts.positions)}. Use "
                         f"interp.prompts.ioi(bridge), or attention_between and copy_scores")  # fmt: skip
    at, end = prompts.positions, prompts.positions["end"]
    sources = {"attention_to_answer": at["io"], "s1": at["s1"], "s2": at["s2"]}
    looks = attention_between(bridge, prompts.clean, end, sources, layers=layers, batch_size=batch_size)
    copies = copy_scores(bridge, prompts.clean, at["io"], k=k, layers=layers)
    subject = (looks.values.sel(score="s1") + looks.values.sel(score="s2")).drop_vars("score", errors="ignore")
    both = looks.values.sel(score="attention_to_answer", drop=True) * copies.values.sel(score="copy", drop=True)
    parts = {
        "attention_to_answer": looks.values.sel(score="attention_to_answer", drop=True),
        "attention_to_subject": subject,
        "copy": copies.values.sel(score="copy", drop=True),
        "negative_copy": copies.values.sel(score="negative_copy", drop=True),
        "name_mover": both,
    }
    return joined(parts, {**copies.provenance, "method": "name_mover_scores", "prompts": prompts.name}, "share")


def _through_heads(
    bridge: Any,
    tokens: Tensor,
    positions: Tensor,
    layers: Sequence[int] | None,
    score: Callable[[Tensor], dict[str, Tensor]],
) -> dict[int, dict[str, Tensor]]:
    """`score` of the direct logits [batch, k, d_vocab] that each head writes when it attends to one token alone."""
    chosen = check_layers(bridge, layers)
    entrance, early = hook_name("resid_pre", 0), hook_name("resid_post", 0)
    with torch.no_grad(), reads(bridge, [entrance, early]) as stream:
        run_until(bridge, tokens.to(device_of(bridge)), 1)
    weights, found = head_weights(bridge), gains(bridge)
    write = unembedding(bridge).float()
    results: dict[int, dict[str, Tensor]] = {}
    index = positions[..., None].to(device_of(bridge))
    for layer in chosen:
        source = stream[early if layer else entrance]
        read = read_norm(bridge, layer, source.gather(1, index.expand(-1, -1, source.shape[-1]))).float().cpu()
        per_head: list[dict[str, Tensor]] = []
        for head in range(int(bridge.cfg.n_heads)):
            out = read @ weights.W_V[layer, head].float() @ weights.W_O[layer, head].float()
            per_head.append(score((out * found.after[layer].float()) @ write))
        results[layer] = {name: torch.stack([each[name] for each in per_head], -1) for name in per_head[0]}
    return results


def _rank(logits: Tensor, wanted: Tensor) -> Tensor:
    """How many tokens have a higher logit than the wanted one; ties (a head that writes nothing) count against it."""
    own = logits.gather(-1, wanted[..., None])
    return (logits >= own).sum(-1) - 1


def _by_head(v: Tensor, n_heads: int) -> Float[Tensor, "batch head pos d_head"]:
    return v.repeat_interleave(n_heads // v.shape[2], 2).transpose(1, 2)


def _own_share(out: Tensor, write: Tensor, own: Tensor, over: str) -> Float[Tensor, "head pos"]:
    """Share of the raised logits of each key's output [head, pos, d_model] that is its own token's."""
    if over == "sequence":
        others, place = own.unique(return_inverse=True)
        write = write[:, others]
    else:
        place = own
    logits = out @ write  # [head, pos, tokens]
    raised = (logits - logits.mean(-1, keepdim=True)).relu()
    return raised.gather(-1, place.expand(len(out), -1)[..., None])[..., 0] / raised.sum(-1).clamp_min(1e-30)
