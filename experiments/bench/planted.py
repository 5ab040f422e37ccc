"""Dictionaries on data whose features are known: what each architecture finds, over five seeds.

    python experiments/bench/run.py --only planted

128 unit directions in 64 dimensions, each on with chance 0.03 and an amplitude between 0.5 and 1.5 (3.84 active on
average), 1,500 steps of 1,024 samples, learning rate 3e-3, everything else as it comes. `MMCS` is the mean over true
features of the best cosine, `MCC` that of the best one-to-one assignment; of MMCS the mean and the lowest seed are
given. L0, FVU and dead latents are those of inference on 8,192 new samples. Then:

- the controller: four first coefficients from 1e-3 to 1, three targets, three architectures; the largest deviation
  from the target over coefficients and seeds (the aim is 10 %);
- four times as many latents as features: how many die under each allocation;
- a feature with little variance on which alone the loss depends, among 256 in 128 dimensions, ten active on average
  and six latents allowed: the best cosine of a latent of TopK and of the gradient dictionary with it;
- transcoders of a sparse MLP of 128 units, with and without a linear map past it (its R2 in the last column).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from interp.dictionaries import PlantedSource, TrainingConfig, recovery, train_many
from interp.dictionaries.planted import PlantedMLP

SIZE = {"width": 64, "n_features": 128}
SMALL = {"width": 24, "n_features": 32, "density": 0.08}
STARTS, TARGETS = (1e-3, 1e-2, 1e-1, 1.0), (4.0, 8.0, 16.0)
PLAIN: dict[str, dict[str, Any]] = {
    "relu, coefficient 0.1": {"architecture": "relu", "coefficient": 0.1},
    "topk 4": {"architecture": "topk", "k": 4},
    "batch_topk 4": {"architecture": "batch_topk", "k": 4},
    "gated, target L0 4": {"architecture": "gated", "coefficient": 0.1, "target_l0": 4.0},
    "jumprelu, target L0 4": {"architecture": "jumprelu", "coefficient": 0.1, "target_l0": 4.0},
    "matryoshka 4": {"architecture": "matryoshka", "k": 4},
    "mutual_choice 4": {"architecture": "mutual_choice", "k": 4},
    "feature_choice 4": {"architecture": "feature_choice", "k": 4},
}


def main(device: str = "cpu", quick: bool = False) -> list[dict[str, Any]]:
    seeds = range(1 if quick else 5)
    steps = {"n_steps": 200, "batch_size": 128} if quick else {"n_steps": 1500, "batch_size": 1024}
    rows = found(device, seeds, PLAIN, SMALL if quick else SIZE, steps)
    rows += controlled(device, seeds, SMALL if quick else SIZE, steps)
    rows += spare(device, seeds, SMALL if quick else SIZE, steps)
    rows += quiet(device, seeds, SMALL if quick else SIZE, steps)
    return rows + transcoders(device, seeds, SMALL if quick else SIZE, steps)


def found(
    device: str, seeds: Iterable[int], kinds: Mapping[str, Any], size: dict[str, Any], steps: dict[str, Any]
) -> list[dict[str, Any]]:
    """A4: recovery with as many latents as features."""
    n = size["n_features"]
    kept: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        source = PlantedSource(**size, seed=seed)
        for name, dictionary in _trained(kinds, n, source, seed, device, steps).items():
            kept.setdefault(name, []).append(
                recovery(dictionary.W_dec, source.features) | _at_inference(dictionary, source)
            )
    return [
        {
            "problem": "features",
            "dictionary": name,
            "seeds": len(some),
            "MMCS": _mean(some, "mmcs"),
            "lowest": min(one["mmcs"] for one in some),
            **{column: _mean(some, key) for column, key in (("MCC", "mcc"), ("L0", "l0"), ("FVU", "fvu"))},
            "dead": f"{_mean(some, 'dead'):.1f} of {n}",
        }
        for name, some in kept.items()
    ]


def controlled(device: str, seeds: Iterable[int], size: dict[str, Any], steps: dict[str, Any]) -> list[dict[str, Any]]:
    """A5: how far the final L0 is from its target, whatever coefficient training starts with."""
    rows = []
    for architecture in ("jumprelu", "gated", "relu"):
        kinds = {
            (target, start): {"architecture": architecture, "coefficient": start, "target_l0": target}
            for target in TARGETS
            for start in STARTS
        }
        ends: dict[float, list[float]] = {}
        for seed in seeds:
            source = PlantedSource(**size, seed=seed)
            for (target, _), one in _trained(kinds, size["n_features"], source, seed, device, steps).items():
                ends.setdefault(target, []).append(_at_inference(one, source)["l0"] / target - 1)
        rows += [
            {
                "problem": "controller",
                "dictionary": f"{architecture}, target L0 {target:g}",
                "seeds": len(some) // len(STARTS),
                "off target at most": f"{max(map(abs, some)):.1%}",
                "runs within 10 %": f"{sum(abs(x) <= 0.1 for x in some)} of {len(some)}",
            }
            for target, some in ends.items()
        ]
    return rows


def spare(device: str, seeds: Iterable[int], size: dict[str, Any], steps: dict[str, Any]) -> list[dict[str, Any]]:
    """A6: latents that die when there are four times as many as features, and L0 by thresholds."""
    n = 4 * size["n_features"]
    kinds = {
        "topk 4 without auxiliary loss": {"architecture": "topk", "k": 4, "aux": "none"},
        "topk 4": {"architecture": "topk", "k": 4},
        "batch_topk 4": {"architecture": "batch_topk", "k": 4},
        "mutual_choice 4": {"architecture": "mutual_choice", "k": 4},
        "feature_choice 4": {"architecture": "feature_choice", "k": 4},
    }
    kept: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        source = PlantedSource(**size, seed=seed)
        for name, dictionary in _trained(kinds, n, source, seed, device, steps).items():
            kept.setdefault(name, []).append(_at_inference(dictionary, source, 2**16))
    return [
        {
            "problem": "spare latents",
            "dictionary": name,
            "seeds": len(some),
            "L0": _mean(some, "l0"),
            "FVU": _mean(some, "fvu"),
            "dead": f"{_mean(some, 'dead'):.1f} of {n}",
        }
        for name, some in kept.items()
    ]


def quiet_source(seed: int, width: int = 128, n_features: int = 256, density: float = 0.04) -> PlantedSource:
    """The last feature has 0.3 of the others' strength, less than a quarter of their variance, and the loss depends on
    it alone."""
    return PlantedSource(
        width=width,
        n_features=n_features,
        seed=seed,
        density=(density,) * (n_features - 1) + (0.1,),
        scales=(1.0,) * (n_features - 1) + (0.3,),
        sensitivities=(0.0,) * (n_features - 1) + (1.0,),
    )


def quiet(device: str, seeds: Iterable[int], size: dict[str, Any], steps: dict[str, Any]) -> list[dict[str, Any]]:
    """A7: a feature that matters although it is small, where every token has more features than latents allowed.

    One of 31 settings tried, chosen on seed 0, and the only one in which the gradient dictionary alone finds the
    feature: with free places among the k, TopK finds it too, and elsewhere it is mixed with what is left over.
    """
    # without an auxiliary loss: that points dead latents at what is left over, chosen by the loss or not
    kinds = {
        "topk 6": {"architecture": "topk", "k": 6, "aux": "none"},
        "gradient 6, beta 10": {"architecture": "gradient", "k": 6, "aux": "none", "beta": 10.0},
        "gradient 6, beta 30": {"architecture": "gradient", "k": 6, "aux": "none", "beta": 30.0},
        "topk 6, auxiliary loss": {"architecture": "topk", "k": 6},
        "gradient 6, beta 30, auxiliary loss": {"architecture": "gradient", "k": 6, "beta": 30.0},
    }
    n_features = 2 * size["n_features"]
    steps = steps | {"batch_size": max(steps["batch_size"] // 2, 1)}
    found: dict[str, list[dict[str, float]]] = {}
    for seed in seeds:
        source = quiet_source(seed, 2 * size["width"], n_features)
        for name, dictionary in _trained(kinds, 5 * n_features // 4, source, seed, device, steps).items():
            cosine = recovery(dictionary.W_dec, source.features[-1:])["mmcs"]
            found.setdefault(name, []).append({"cosine": cosine} | _at_inference(dictionary, source))
    return [
        {
            "problem": "quiet feature",
            "dictionary": name,
            "seeds": len(some),
            "cosine": f"{min(one['cosine'] for one in some):.3f} to {max(one['cosine'] for one in some):.3f}",
            "above 0.9": f"{sum(one['cosine'] > 0.9 for one in some)} of {len(some)}",
            "FVU": _mean(some, "fvu"),
        }
        for name, some in found.items()
    ]


def transcoders(device: str, seeds: Iterable[int], size: dict[str, Any], steps: dict[str, Any]) -> list[dict[str, Any]]:
    """A13: units of a sparse MLP, and a linear map past it."""
    n = size["n_features"]
    kept: dict[tuple[str, str], list[dict[str, float]]] = {}
    for linear, skip in ((0.0, False), (1.0, False), (1.0, True)):
        name = f"batch_topk 4{', skip' if skip else ''}"
        problem = "sparse MLP" if not linear else "sparse MLP + linear map"
        for seed in seeds:
            source = PlantedMLP(width=size["width"], n_units=n, seed=seed, linear=linear)
            kind = {"architecture": "batch_topk", "k": 4, "hook": "in", "target_hook": "out", "skip": skip}
            dictionary = _trained({name: kind}, n, source, seed, device, steps)[name]
            scores = recovery(dictionary.W_dec, source.W_out)
            scores["read"] = recovery(dictionary.W_enc.T, source.W_in.T)["mmcs"]
            scores["r2"] = math.nan
            if skip:
                missed = (dictionary.W_skip.detach().cpu().T - source.linear_map).square().sum()
                scores["r2"] = float(1 - missed / source.linear_map.square().sum())
            kept.setdefault((problem, name), []).append(scores)
    return [
        {
            "problem": problem,
            "dictionary": name,
            "seeds": len(some),
            "MMCS": _mean(some, "mmcs"),
            "lowest": min(one["mmcs"] for one in some),
            "MCC": _mean(some, "mcc"),
            "MMCS of the encoder": _mean(some, "read"),
            **({} if math.isnan(some[0]["r2"]) else {"R2 of the skip": _mean(some, "r2")}),
        }
        for (problem, name), some in kept.items()
    ]


def _trained(
    kinds: Mapping[Any, Mapping[str, Any]], n_latents: int, source: Any, seed: int, device: str, steps: dict[str, Any]
) -> dict[Any, Any]:
    configs = []
    for kind in kinds.values():
        settings = {"n_latents": n_latents, "seed": seed, **kind}
        target = settings.pop("target_l0", None)
        if settings["architecture"] == "matryoshka":
            settings["widths"] = [n_latents // 4, n_latents // 2, n_latents]
        configs.append(TrainingConfig(settings, **steps, learning_rate=3e-3, seed=seed, target_l0=target))
    return dict(zip(kinds, train_many(configs, source, device=device), strict=True))


@torch.no_grad()
def _at_inference(dictionary: Any, source: PlantedSource, n: int = 8192) -> dict[str, float]:
    x = source.sample(n, seed=12345)[0].to(dictionary.W_dec.device)
    on = dictionary.encode(x) != 0
    error = (dictionary(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    return {"l0": float(on.sum()) / n, "dead": float((~on.any(0)).sum()), "fvu": float(error)}


def _mean(some: list[dict[str, float]], key: str) -> float:
    return sum(one[key] for one in some) / len(some)
