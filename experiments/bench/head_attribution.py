"""Attribution of latents of attention outputs to heads and sources, against loops over them, in one process.

    python experiments/bench/run.py --only head_attribution

A random model of GPT-2 small's shape and random TopK dictionaries of `hook_z` (24,576 latents, k 32). The loop of the
first rows takes one head and one source position at a time and multiplies its value by the latents' slice of the
encoder; that of the last takes one latent of the dictionary below, at one source, through one head at a time. All
include what `needed s` gives alone: the forward up to the layer that is read, and encoding with every dictionary, which
says where latents are on. `times faster beyond` leaves it out. The two ways agree to `largest gap`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from _measuring import measured
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from interp.dictionaries import TopKSAE, direct_feature_attribution, recursive_attribution
from interp.hooks import hook_name, reads, run_until

LAYER, N_LATENTS, K = 5, 24_576, 32


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    layer, n_latents = (2, 2_048) if quick else (LAYER, N_LATENTS)
    bridge, name = case(device, layer + 1)
    sae, below = (dictionary(bridge, device, at, n_latents) for at in (layer, layer - 1))
    rows = []
    for n_texts, n_pos, n_chosen in ((2, 32, 8), (8, 64, 32)) if quick else ((8, 64, 32), (4, 128, 32)):
        tokens = torch.randint(2, 300, (n_texts, n_pos), device=device)
        latents = list(range(n_chosen))
        found, seconds, gap = versus(
            device,
            lambda t=tokens, f=latents: torch.as_tensor(
                direct_feature_attribution(bridge, sae, t, f, by="head_source").values.values
            ),
            lambda t=tokens, f=latents: by_loop(bridge, sae, t, f, layer),
            lambda t=tokens: needed(bridge, t, layer, sae),
        )
        what = f"{n_chosen} latents by head and source, {n_texts} texts of {n_pos} tokens; {name}"
        rows.append(row(what, found, seconds, gap))
    tokens = torch.randint(2, 300, (1, 6 if quick else 12), device=device)

    def recursive() -> Tensor:
        table = recursive_attribution(bridge, sae, tokens, 0, upstream=[below]).to_dataframe()
        return torch.tensor(table.loc[(table["kind"] == "latent").to_numpy(), "contribution"].to_numpy())

    found, seconds, gap = versus(
        device,
        recursive,
        lambda: recursive_by_loop(bridge, sae, below, tokens, layer),
        lambda: needed(bridge, tokens, layer, sae, below),
    )
    what = f"1 latent through one dictionary below, {tokens.shape[1]} tokens; {name}"
    return [*rows, row(what, found, seconds, gap)]


def case(device: str, n_layers: int) -> tuple[Any, str]:
    """A random model of GPT-2 small's widths, as deep as is read."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=n_layers)).eval()
    bridge = interp.load_model(model.to(torch.device(device)), tokenizer=interp.tinyworld.tokenizer(), check=False)  # pyright: ignore[reportArgumentType]
    return bridge, f"layer {n_layers - 1} of GPT-2 small's shape"


def dictionary(bridge: Any, device: str, layer: int, n_latents: int) -> TopKSAE:
    return TopKSAE(
        int(bridge.cfg.d_model), n_latents, k=K, hook=hook_name("z", layer), decoder_norm=1.0, seed=layer
    ).to(device)


@torch.no_grad()
def forward(bridge: Any, tokens: Tensor, layer: int) -> None:
    run_until(bridge, tokens, layer + 1)


@torch.no_grad()
def needed(bridge: Any, tokens: Tensor, layer: int, first: TopKSAE, *below: TopKSAE) -> None:
    with reads(bridge, [one.hook for one in (first, *below)]) as found:
        forward(bridge, tokens, layer)
    for one in (first, *below):  # of the layer that is read at the last position alone, if another is below it
        z = found[one.hook].flatten(2)
        one.encode(z[:, -1:] if one is first and below else z)


@torch.no_grad()
def by_loop(bridge: Any, sae: TopKSAE, tokens: Tensor, latents: list[int], layer: int) -> Tensor:
    """[latent, example, pos, head, src]."""
    with reads(bridge, [hook_name(site, layer) for site in ("v", "pattern", "z")]) as found:
        forward(bridge, tokens, layer)
    v, pattern, z = (found[hook_name(site, layer)] for site in ("v", "pattern", "z"))
    sae.encode(z.flatten(2))
    W = sae.W_enc[:, latents].unflatten(0, v.shape[2:])
    out = torch.empty(len(latents), *tokens.shape, v.shape[2], tokens.shape[1])
    for head in range(v.shape[2]):
        for src in range(tokens.shape[1]):
            carried = pattern[:, head, :, src, None] * v[:, src, None, head]
            out[..., head, src] = (carried @ W[head]).movedim(-1, 0).cpu()
    return out


@torch.no_grad()
def recursive_by_loop(bridge: Any, sae: TopKSAE, below: TopKSAE, tokens: Tensor, layer: int) -> Tensor:
    """Contributions at the last position, in the order of the table: by head and source, of every latent that is on."""
    names = [hook_name("pattern", layer), hook_name("resid_pre", layer), hook_name("z", layer - 1)]
    with reads(bridge, [*names, sae.hook]) as found:
        forward(bridge, tokens, layer)
        sae.encode(found[sae.hook].flatten(2)[:, -1:])
    pattern, stream, z = (found[name] for name in names)
    latents = below.encode(z.flatten(2))[0]
    norm, attention, writes = bridge.blocks[layer].ln1, bridge.blocks[layer].attn, bridge.blocks[layer - 1].attn
    scale = (stream.var(-1, unbiased=False) + 1e-5).sqrt()[0]
    W_O, gain = writes.W_O.flatten(0, 1), norm.original_component.weight
    read = sae.W_enc[:, 0].unflatten(0, attention.W_V.shape[::2])
    contributions = []
    for head in range(len(attention.W_V)):
        for src, latent in latents.nonzero().tolist():
            wrote = latents[src, latent] * below.W_dec[latent] @ W_O
            value = (gain * (wrote - wrote.mean()) / scale[src]) @ attention.W_V[head]
            contributions.append(pattern[0, head, -1, src] * value @ read[head])
    return torch.stack(contributions).cpu()


def versus(
    device: str, ours: Callable[[], Tensor], loop: Callable[[], Tensor], plain: Callable[[], None]
) -> tuple[float | None, list[float], float]:
    """MiB of ours, fewest seconds of the three in turns, and the largest difference as a share of the largest value."""
    results, megabytes, seconds = [ours(), loop()], None, [[], [], []]
    for _ in range(2):
        for taken, run in zip(seconds, (ours, loop, plain), strict=True):
            spent, extra, _ = measured(device, run, time.process_time)
            taken.append(spent)
            megabytes = extra if run is ours else megabytes
    gap = float((results[0] - results[1]).abs().max() / results[1].abs().max())
    return megabytes, [min(taken) for taken in seconds], gap


def row(what: str, megabytes: float | None, seconds: list[float], gap: float) -> dict[str, Any]:
    return {
        "what": what,
        "seconds": round(seconds[0], 4),
        "loop s": round(seconds[1], 4),
        "times faster": round(seconds[1] / seconds[0], 1),
        "needed s": round(seconds[2], 4),
        "times faster beyond": round((seconds[1] - seconds[2]) / max(seconds[0] - seconds[2], 1e-3), 1),
        "extra MiB": None if megabytes is None else round(megabytes),
        "largest gap": float(f"{gap:.1e}"),
    }


if __name__ == "__main__":
    for line in main(quick=True):
        print(line)
