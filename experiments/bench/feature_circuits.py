"""Effects of all features of several dictionaries: estimates against patching them one by one, in one process.

    python experiments/bench/run.py --only feature_circuits

Random TopK dictionaries of what every attention and MLP layer of an embedded model writes. `exact` is
`activation_patch` of each dictionary, which runs only the nodes that change, from their block on; `plain exact` is what
it replaces: a whole forward with hooks for every latent and position, timed on some of them and multiplied. The
estimates' seconds are of all nodes. Correlations of random dictionaries say nothing; none is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import interp
from interp.dictionaries import TopKSAE
from interp.metrics import logit_difference
from interp.models import data_dir
from interp.patching import feature_edges, feature_effects, feature_faithfulness, select_features

LEAST_SPEED_UP = 10.0  # of relp over the exact effects
LEAST_OVER_LINES = 2.5  # of relp over ten steps for each dictionary, which skip the blocks below it
N_PLAIN = 12  # forwards that are timed for what a plain sweep would take


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    bridge, prompts, saes, name = case(device, quick)
    metric, clock = logit_difference(prompts), _clock(device)
    found: dict[str, tuple[float, Any]] = {}
    kinds: dict[str, dict[str, Any]] = {
        "gradient": {"method": "gradient"},
        "relp": {"method": "relp"},
        "integrated gradients, 10 left steps": {"method": "integrated_gradients"},
        "integrated gradients, 4 Gauss-Legendre": {
            "method": "integrated_gradients", "steps": 4, "points": "gauss_legendre",
        },
        "exact": {"method": "exact", "positions": ["end"]},
    }  # fmt: skip
    for kind, options in kinds.items():
        repeats = 1 if quick or kind == "exact" else 3
        found[kind] = timed(clock, repeats, lambda o=options: feature_effects(bridge, prompts, metric, saes, **o))
    scores = found["relp"][1]
    exact = found["exact"][0] * prompts.clean.shape[1]  # of every position as of the last, which is the cheapest
    plain, _ = timed(clock, 1, lambda: peer(bridge, prompts, saes[0], metric))
    nodes = scores.mean().size
    rows: list[dict[str, Any]] = []
    for kind, (seconds, effects) in found.items():
        cost = effects.provenance["cost"]
        rows.append(
            {
                "what": f"{kind}; {name}",
                "nodes": effects.mean().size,
                "forwards": cost.get("forwards", ""),
                "backwards": cost.get("backwards", ""),
                "seconds": round(seconds, 3),
            }
        )
    relp, line = found["relp"][0], found["integrated gradients, 10 left steps"][0]
    rows.append(
        {
            "what": f"relp against the others; {name}",
            "nodes": nodes,
            "integrated gradients / relp": round(line / relp, 1),
            "exact / relp": round(exact / relp),
            "plain exact / relp": round(plain / N_PLAIN * nodes / relp),
            "target": f">= {LEAST_OVER_LINES:g} and {LEAST_SPEED_UP:g}",
        }
    )
    circuit = select_features(scores, 30)
    seconds, edges = timed(clock, 1, lambda: feature_edges(bridge, prompts, metric, saes, circuit))
    rows.append({"what": f"edges among 30 nodes; {name}", **edges.provenance["cost"], "seconds": round(seconds, 3)})
    seconds, curve = timed(clock, 1, lambda: feature_faithfulness(bridge, prompts, metric, saes, scores))
    rows.append(
        {"what": f"faithfulness of {curve.values.sizes['circuit']} circuits; {name}",
         "forwards": curve.provenance["cost"]["forwards"], "seconds": round(seconds, 3)}
    )  # fmt: skip
    return rows


def case(device: str, quick: bool) -> tuple[Any, Any, list[Any], str]:
    """An embedded model with dictionaries of four times its width, on agreement prompts."""
    if not (data_dir() / "models" / "tinyworld-llama").is_dir():
        raise FileNotFoundError("the embedded model tinyworld-llama is not there")
    bridge = interp.load_model("tinyworld-llama", device=device, check=False)
    prompts = interp.prompts.agreement(bridge, n=4 if quick else 32)
    width, n_latents = bridge.cfg.d_model, (1 if quick else 4) * bridge.cfg.d_model
    hooks = [f"blocks.{layer}.hook_{site}" for layer in range(bridge.cfg.n_layers) for site in ("attn_out", "mlp_out")]
    made = [TopKSAE(width, n_latents, k=16, hook=hook, decoder_norm=1.0, device=device) for hook in hooks]
    saes = [sae.requires_grad_(False) for sae in made]
    return bridge, prompts, saes, f"tinyworld-llama, {len(saes)} x {n_latents} latents, {len(prompts)} prompts"


@torch.no_grad()
def peer(bridge: Any, prompts: Any, sae: Any, metric: Any) -> Tensor:
    """Some of the forwards of a plain sweep: one latent at one position, the whole model, the whole batch."""
    device, n_pos = sae.W_dec.device, prompts.clean.shape[1]
    other: list[Tensor] = []
    bridge.run_with_hooks(
        prompts.corrupted.to(device), fwd_hooks=[(sae.hook, lambda tensor, hook: other.append(sae.encode(tensor)))]
    )
    effects = []
    for cell in range(N_PLAIN):
        latent, pos = cell // n_pos, cell % n_pos

        def put(tensor: Tensor, hook: Any, latent: int = latent, pos: int = pos) -> Tensor:
            latents = sae.encode(tensor)
            new = latents.clone()
            new[:, pos, latent] = other[0][:, pos, latent]
            return tensor + sae.decode(new) - sae.decode(latents)

        effects.append(metric(bridge.run_with_hooks(prompts.clean.to(device), fwd_hooks=[(sae.hook, put)])))
    return torch.stack(effects)


def _clock(device: str) -> Callable[[], float]:
    """CPU time where the CPU computes: other programs on the machine do not count."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def synchronised() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronised


def timed(clock: Callable[[], float], repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Fewest seconds, and the result."""
    seconds, result = [], None
    for _ in range(repeats):
        start = clock()
        result = run()
        seconds.append(clock() - start)
    return min(seconds), result


if __name__ == "__main__":
    for line in main(quick=True):
        print(line)
