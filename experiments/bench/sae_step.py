"""One training step of a TopK dictionary: sparse, as ours is, against dense, as SAELens' is.

    python experiments/bench/run.py --only sae_step

`dense` is a step written from a description of SAELens 6: dense encoder and decoder products forward and backward,
pre-activations and latents scaled by the decoder's norms, gradients clipped, Adam. Both start from the same weights
and see the same batches; losses after the last step are compared. SAELens cannot be installed beside TransformerLens
4.3: `python experiments/bench/sae_step.py PYTHON` runs its own trainer class in the environment of that interpreter,
on the same sizes and machine, after ours. Times are process seconds of one CPU thread, or wall seconds on a GPU; the
best of several steps.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from interp.dictionaries.topk import TopKSAE

SIZES = ((256, 4096, 1024), (512, 8192, 2048))
QUICK = ((64, 512, 256),)
K, RATE = 32, 3e-4

PEER = """
import json, sys, time, torch
from sae_lens.saes.sae import TrainStepInput
from sae_lens import saes
torch.set_num_threads(1)
d, h, n, k, steps = map(int, sys.argv[1:])
config = saes.TopKTrainingSAEConfig(d_in=d, d_sae=h, k=k, device="cpu", dtype="float32")
sae = saes.TopKTrainingSAE(config)
adam = torch.optim.Adam(sae.parameters(), lr=3e-4)
x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
best = float("inf")
for i in range(steps):
    start = time.process_time()
    out = sae.training_forward_pass(TrainStepInput(x, {}, torch.zeros(h, dtype=torch.bool), i, False))
    adam.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
    adam.step()
    best = min(best, time.process_time() - start)
print(json.dumps(best))
"""


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    return [compare(device, *size, steps=3 if quick else 6, peer=None) for size in (QUICK if quick else SIZES)]


def compare(device: str, width: int, n_latents: int, n_tokens: int, *, steps: int, peer: str | None) -> dict[str, Any]:
    batches = [torch.randn(n_tokens, width, generator=torch.Generator().manual_seed(i)).to(device) for i in range(2)]
    ours = TopKSAE(width, n_latents, k=K, decoder="rescaled", device=device)
    start = [p.detach().clone().contiguous() for p in (ours.W_enc, ours.b_enc, ours.W_dec, ours.b_dec)]
    weights = [torch.nn.Parameter(t) for t in start]
    fused = torch.optim.Adam(ours.parameters(), lr=RATE, fused=True)
    plain = torch.optim.Adam(weights, lr=RATE)
    times: dict[str, list[float]] = {"sparse": [], "dense": []}
    losses: dict[str, float] = {}
    for i in range(steps):
        x = batches[i % 2]
        for name, adam, loss in (
            ("sparse", fused, lambda x=x: ours.step(x).loss),
            ("dense", plain, lambda x=x: dense_loss(weights, x)),
        ):
            seconds, losses[name] = timed(device, adam, loss)
            times[name].append(seconds)
    sparse, dense = min(times["sparse"]), min(times["dense"])
    row: dict[str, Any] = {
        "width": width, "latents": n_latents, "batch": n_tokens, "k": K,
        "sparse tokens/s": round(n_tokens / sparse), "dense tokens/s": round(n_tokens / dense),
        "times as fast": round(dense / sparse, 2),
        "difference of losses": f"{abs(losses['sparse'] / losses['dense'] - 1):.1e}",
    }  # fmt: skip
    if peer is not None:
        arguments = [peer, "-c", PEER, *map(str, (width, n_latents, n_tokens, K, steps))]
        seconds = json.loads(
            subprocess.run(arguments, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        row |= {"SAELens tokens/s": round(n_tokens / seconds), "times SAELens": round(seconds / sparse, 2)}
    return row


def dense_loss(weights: list[torch.nn.Parameter], x: Tensor) -> Tensor:
    W_enc, b_enc, W_dec, b_dec = weights
    norms = W_dec.norm(dim=-1)
    pre = ((x - b_dec) @ W_enc + b_enc) * norms
    best = pre.topk(K, dim=-1, sorted=False)
    latents = torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())
    rebuilt = (latents * (1 / norms)) @ W_dec + b_dec
    return (rebuilt - x).square().sum(-1).mean()


def timed(device: str, adam: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> tuple[float, float]:
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    start = clock()
    value = loss()
    adam.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_([p for group in adam.param_groups for p in group["params"]], 1.0)
    adam.step()
    if on_gpu:
        torch.cuda.synchronize(device)
    return clock() - start, float(value.detach())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for size in SIZES:
        print(compare("cpu", *size, steps=6, peer=sys.argv[1] if len(sys.argv) > 1 else None))
