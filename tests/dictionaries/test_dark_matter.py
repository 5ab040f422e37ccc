"""Errors whose parts are planted, pursuit against brute force, and cross-entropies against replacements by hand."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from interp import hooks, results
from interp.dictionaries import (
    DarkMatter,
    Dictionary,
    JumpReLUSAE,
    PlantedError,
    ReLUSAE,
    TopKSAE,
    TrainingConfig,
    dark_matter,
    earlier_layer_prediction,
    error_ce_shares,
    error_scaling,
    error_source,
    evaluate,
    gradient_pursuit,
    token_rows,
    train,
)
from interp.dictionaries.error_losses import _replacement
from interp.dictionaries.pursuit import rescaling
from tests.helpers import D_MODEL, tiny_bridge, tiny_tokens

HOOK = "blocks.1.hook_mlp_out"


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def squared(dictionary: Dictionary, latents: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        return (x.double() - dictionary.decode(latents, x).double()).square().sum(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(
    ("linear", "nonlinear"), [(0.1, 0.1), (0.3, 0.05), (0.03, 0.25), (0.0, 0.15), (0.2, 0.0), (0.01, 0.01)]
)
def test_planted_parts_are_recovered(linear: float, nonlinear: float, seed: int) -> None:
    """A11."""
    planted = PlantedError(linear=linear, nonlinear=nonlinear, seed=seed)
    x, true_linear, true_rest = planted.sample(8000, seed=seed)
    found = dark_matter(planted.dictionary(), x, codes=("encoder",), seed=seed)
    assert found["fvu_linear"] == pytest.approx(linear, abs=0.03)
    assert found["fvu_nonlinear"] == pytest.approx(nonlinear, abs=0.03)
    assert found["linear_share"] == pytest.approx(linear / (linear + nonlinear), abs=0.03)
    assert found["fvu"] == pytest.approx(found["fvu_linear"] + found["fvu_nonlinear"], abs=1e-6)
    assert found["l0"] == pytest.approx(planted.n_features * planted.density, rel=0.05)
    scored = torch.tensor(found.per_token["token"].values)
    parts = found.linear_error(x[scored])
    missed = (parts - true_linear[scored]).square().sum() / (true_linear + true_rest)[scored].square().sum()
    assert missed < 0.02  # token by token, not only in the mean


def test_the_planted_error_is_the_dictionarys_own() -> None:
    planted = PlantedError(linear=0.2, nonlinear=0.1, shrinkage=0.25, seed=3)
    x, linear, rest = planted.sample(4000)
    with torch.no_grad():
        error = x - planted.dictionary()(x)
    assert torch.allclose(error, linear + rest, atol=1e-5)
    assert x.var(0).sum() == pytest.approx(planted.variance, rel=0.05)
    assert rest.var(0).sum() / planted.variance == pytest.approx(0.1, rel=0.05)
    assert torch.equal(next(planted.batches(4000, seed=0))[""], x)


def test_shrinkage_is_a_linear_error_that_rescaling_takes_away() -> None:
    planted = PlantedError(linear=0, nonlinear=0, shrinkage=0.3)
    found = dark_matter(planted.dictionary(), planted.sample(3000)[0], codes=("encoder", "rescaled"))
    assert found["fvu"] == pytest.approx(0.09, abs=1e-3) and found["linear_share"] == pytest.approx(1, abs=1e-3)
    assert found["reconstruction_bias"] == pytest.approx(0.7, abs=1e-3)
    assert found.get("fvu", "rescaled") < 1e-6
    assert np.allclose(found.factors.values, 1 / 0.7, atol=1e-3)
    dead = planted.dictionary()
    with torch.no_grad():
        dead.W_enc[:, 0] = 0.0
    again = dark_matter(dead, planted.sample(3000)[0], codes=("encoder", "rescaled"))
    assert again.factors.values[0] == 1 and again.get("fvu", "rescaled") < again["fvu"]
    real = dark_matter(PlantedError(linear=0.2, nonlinear=0).dictionary(), PlantedError(linear=0.2).sample(3000)[0])
    assert real.get("fvu_linear", "rescaled") == pytest.approx(real["fvu_linear"], abs=0.005)  # dense: not shrinkage


def test_numbers_against_least_squares_of_numpy() -> None:
    sae = TopKSAE(12, 40, k=4, decoder_norm=1.0)
    x, loss = draws(900, 12) * torch.linspace(0.5, 2, 12) + 1.0, draws(900, seed=5)
    documents = torch.arange(900) // 30
    found = dark_matter(sae, x, documents=documents, codes=("encoder",), baselines={"loss": loss}, test_fraction=0.4)
    test = np.zeros(900, bool)
    test[found.per_token["token"].values] = True
    scored = np.unique(documents.numpy()[test])
    assert len(scored) == 12 and test.sum() == 12 * 30  # whole documents
    assert found.provenance["split"] == "documents" and found.provenance["n_fitted"] == 540
    with torch.no_grad():
        error, l0 = (x - sae(x)).double().numpy(), (sae.encode(x) != 0).sum(1).double().numpy()
    wide = x.double().numpy()

    def predicted(features: np.ndarray, y: np.ndarray) -> np.ndarray:
        design = np.c_[features, np.ones(len(features))]
        return design @ np.linalg.lstsq(design[~test], y[~test], rcond=None)[0]

    def r2(y: np.ndarray, p: np.ndarray) -> Any:
        return 1 - ((y - p)[test] ** 2).sum(0) / ((y[test] - y[test].mean(0)) ** 2).sum(0)

    linear = predicted(wide, error)
    rest, square, size = error - linear, (error**2).sum(1), np.linalg.norm(wide, axis=1)
    spread = ((wide[test] - wide[test].mean(0)) ** 2).sum()
    expected = {
        "fvu": square[test].sum() / spread,
        "fvu_nonlinear": (rest[test] ** 2).sum() / spread,
        "error_r2_by_width": r2(error, linear).mean(),
        "error_r2": 1 - (rest[test] ** 2).sum() / ((error[test] - error[test].mean(0)) ** 2).sum(),
        "norm_r2": r2(square, predicted(wide, square)),
        "linear_norm_r2": r2((linear**2).sum(1), predicted(wide, (linear**2).sum(1))),
        "nonlinear_norm_r2": r2((rest**2).sum(1), predicted(wide, (rest**2).sum(1))),
        "norm_r2_size": r2(square, predicted(np.c_[size, size**2], square)),
        "norm_r2_l0": r2(square, predicted(l0[:, None], square)),
        "norm_r2_loss": r2(square, predicted(loss.double().numpy()[:, None], square)),
    }
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, abs=1e-5), metric
        assert found.definition(metric)
    assert np.isnan(found["norm_r2_token"])
    interval = found.interval("linear_share")
    assert interval.low < interval.estimate < interval.high
    assert float(interval.estimate) == pytest.approx(found["linear_share"], abs=1e-6)
    ridged = dark_matter(sae, x, documents=documents, codes=("encoder",), test_fraction=0.4, ridge=1e6)
    assert abs(ridged["error_r2"]) < 0.05 < found["error_r2"]  # all weights pulled to 0


def test_token_rows_bring_documents_and_ids() -> None:
    bridge, tokens = tiny_bridge("llama"), torch.randint(3, 50, (24, 12), generator=torch.Generator().manual_seed(0))
    rows = token_rows(bridge, tokens, HOOK)
    sae = TopKSAE(D_MODEL, 64, k=6, hook=HOOK, decoder_norm=1.0)
    found = dark_matter(sae, rows, ridge=0.01)
    here = found.per_token.sel(code="encoder")
    assert {int(document) for document in here["document"]} == set(rows.row[here["token"].values.tolist()].tolist())
    square = squared(sae, sae.encode(rows.values).detach(), rows.values).numpy()
    test = np.zeros(len(rows), bool)
    test[here["token"].values] = True
    ids = rows.ids.numpy()
    known = [~test & (ids == i) if (~test & (ids == i)).any() else ~test for i in ids]
    assert any(mask.sum() == (~test).sum() for mask in known)  # some ids are new: the mean of all
    means = np.array([square[mask].mean() for mask in known])
    expected = 1 - ((square - means)[test] ** 2).sum() / ((square[test] - square[test].mean()) ** 2).sum()
    assert found["norm_r2_token"] == pytest.approx(expected, abs=1e-4)
    assert found.provenance["hook"] == HOOK and found.provenance["model"]
    # at each token's own L0, on tokens that no map was fitted to
    per_token = found.per_token.sel(quantity="error")
    assert (per_token.sel(code="gradient pursuit") <= per_token.sel(code="encoder") * (1 + 1e-5)).all()
    assert found.get("fvu", "gradient pursuit") < found["fvu"]


def test_results_are_kept_and_drawn(tmp_path: Path) -> None:
    planted = PlantedError()
    found = dark_matter(planted.dictionary(), planted.sample(800)[0])
    again = DarkMatter.load(found.save(tmp_path / "parts.nc"))
    assert again["fvu"] == found["fvu"] and results.load(tmp_path / "parts.nc").provenance == found.provenance
    x = planted.sample(50, seed=9)[0]
    assert torch.equal(again.linear_error(x), found.linear_error(x))
    assert "linear_share" in repr(found)
    figure = found.plot()
    assert [trace.name for trace in figure.data] == ["linear", "nonlinear"]
    assert list(figure.data[0].y) == pytest.approx(found.values.sel(metric="fvu_linear").values.tolist())


def dictionaries() -> dict[str, Dictionary]:
    options: dict[str, Any] = {"decoder_norm": 1.0, "seed": 1}
    noisy = {
        "topk": TopKSAE(16, 48, k=5, **options),
        "relu": ReLUSAE(16, 48, **options),
        "jumprelu": JumpReLUSAE(16, 48, threshold_start=0.5, **options),
        "layer_norm": TopKSAE(16, 48, k=5, normalisation="layer_norm", **options),
        "constant_norm": TopKSAE(16, 48, k=5, normalisation="constant_norm", **options),
        "mean_norm": TopKSAE(16, 48, k=5, normalisation="mean_norm", **options),
        "rescaled": TopKSAE(16, 48, k=5, decoder="rescaled", **options),
    }
    for sae in noisy.values():
        with torch.no_grad():
            sae.W_enc.add_(0.1 * draws(16, 48, seed=2))
            sae.W_dec.mul_(0.5 + torch.rand(48, 1, generator=torch.Generator().manual_seed(3)))
            sae.b_dec.copy_(0.3 * draws(16, seed=4))
        sae.estimate_normalisation(draws(500, 16))
    return noisy


@pytest.mark.parametrize("name", dictionaries())
def test_pursuit_is_never_above_the_encoder_at_equal_l0(name: str) -> None:
    """A11."""
    sae, x = dictionaries()[name], draws(300, 16, seed=7) * torch.linspace(0.3, 3, 300)[:, None]
    encoded = sae.encode(x).detach()
    found = gradient_pursuit(sae, x, batch_size=128)
    assert ((found != 0).sum(1) <= (encoded != 0).sum(1)).all() and (found >= 0).all()
    theirs, ours = squared(sae, encoded, x), squared(sae, found, x)
    assert (ours <= theirs * (1 + 1e-5)).all() and ours.mean() < 0.95 * theirs.mean()
    alone = squared(sae, gradient_pursuit(sae, x, keep_better=False), x)
    assert torch.allclose(ours, torch.minimum(alone, theirs), rtol=1e-4, atol=1e-6)
    assert alone.mean() < 0.95 * theirs.mean()


@pytest.mark.parametrize("name", dictionaries())
def test_factors_against_least_squares_of_numpy(name: str) -> None:
    sae, x = dictionaries()[name], draws(400, 16, seed=7) * torch.linspace(0.3, 3, 400)[:, None]
    with torch.no_grad():
        latents, nothing = sae.encode(x), sae.decode(torch.zeros(400, 48), x)
        on = (latents != 0).any(0)
        each = torch.stack([sae.decode(latents * (torch.arange(48) == i), x) - nothing for i in range(48)], -1)
    design, wanted = each[..., on].double().flatten(0, 1).numpy(), (x - nothing).double().flatten().numpy()
    expected = np.linalg.lstsq(design, wanted, rcond=None)[0]
    found = rescaling(sae, x, batch_size=150)
    assert np.allclose(found[on], expected, atol=1e-3) and (found[~on] == 1).all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("orthogonal", [True, False])
def test_pursuit_against_every_support(k: int, orthogonal: bool) -> None:
    """On orthogonal atoms the best support and its best coefficients; of one atom, on any atoms."""
    if not orthogonal and k > 1:
        k = 1
    atoms = torch.linalg.qr(draws(6, 6)).Q if orthogonal else torch.nn.functional.normalize(draws(9, 6), dim=1)
    sae = ReLUSAE(6, len(atoms))
    with torch.no_grad():
        sae.W_dec.copy_(atoms * torch.linspace(0.2, 3, len(atoms))[:, None])  # lengths do not matter
        sae.W_enc.zero_()
        sae.b_dec.copy_(draws(6, seed=2))
    x = draws(40, 6, seed=3)
    found = squared(sae, gradient_pursuit(sae, x, k), x)
    for row, missed in zip((x - sae.b_dec.detach()).double().numpy(), found.tolist(), strict=True):
        best = min(
            nnls(sae.W_dec.detach().double().numpy()[list(support)].T, row)[1] ** 2
            for support in itertools.combinations(range(len(atoms)), k)
        )
        assert missed == pytest.approx(best, abs=1e-5)


def test_pursuit_token_by_token() -> None:
    """The source's steps, written out for one token."""
    sae, x = dictionaries()["topk"].double(), draws(40, 16, seed=9).double()
    atoms, b_dec = (parameter.detach().numpy() for parameter in (sae.W_dec, sae.b_dec))
    lengths = np.linalg.norm(atoms, axis=1)
    atoms = atoms / lengths[:, None]
    found, clipped = gradient_pursuit(sae, x, 20, keep_better=False).numpy(), 0
    for row, latents in zip(x.numpy(), found, strict=True):
        coefficients, support, missed = np.zeros(len(atoms)), [], []
        for _ in range(20):
            r = row - b_dec - coefficients @ atoms
            missed.append(r @ r)
            best = max(set(range(len(atoms))) - set(support), key=lambda i, r=r: atoms[i] @ r)
            support += [best] if atoms[best] @ r > 0 else []
            g = np.zeros(len(atoms))
            g[support] = atoms[support] @ r
            c = g @ atoms
            stepped = coefficients + (c @ r) / (c @ c) * g
            coefficients = np.maximum(stepped, 0)
            if (stepped < 0).any():
                clipped, missed = clipped + 1, []
            assert missed == sorted(missed, reverse=True)  # steps that clip nothing never raise the residual
        assert np.allclose(latents, coefficients / lengths, atol=1e-9)
    assert clipped > 0


def test_pursuit_takes_numbers_of_atoms_and_shapes() -> None:
    sae, x = dictionaries()["topk"], draws(4, 25, 16, seed=8)
    k = torch.arange(100).reshape(4, 25) % 7
    found = gradient_pursuit(sae, x, k)
    assert found.shape == (4, 25, 48) and ((found != 0).sum(-1) <= k).all() and (found[k == 0] == 0).all()
    assert torch.allclose(found[1, 3], gradient_pursuit(sae, x[1, 3], int(k[1, 3])), atol=1e-6)
    missed = [float(squared(sae, gradient_pursuit(sae, x, n), x).mean()) for n in (0, 1, 2, 4, 8)]
    assert missed == sorted(missed, reverse=True) and missed[-1] < 0.2 * missed[0]
    empty = dictionaries()["topk"]
    with torch.no_grad():
        empty.W_dec[:10] = 0.0
    assert (gradient_pursuit(empty, x, 48, keep_better=False)[..., :10] == 0).all()


def spliceable(family: str) -> tuple[Any, Tensor, TopKSAE, DarkMatter]:
    bridge = tiny_bridge(family)
    fit = torch.randint(3, 60, (20, 12), generator=torch.Generator().manual_seed(1))
    sae = TopKSAE(D_MODEL, 64, k=4, hook=HOOK, decoder_norm=1.0)
    parts = dark_matter(sae, token_rows(bridge, fit, HOOK), codes=("encoder",))
    return bridge, tiny_tokens(), sae, parts


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_cross_entropies_by_hand(family: str) -> None:
    bridge, tokens, sae, parts = spliceable(family)
    plain = bridge(tokens).detach()
    found = error_ce_shares(bridge, sae, tokens, parts, skip_first=2, batch_size=2)
    assert torch.equal(bridge(tokens), plain)  # hooks are gone
    assert found.provenance["n_forwards"] == 7 * -(-len(tokens) // 2)
    report = evaluate(sae, bridge, tokens, skip_first=2)
    assert found["ce_clean"] == pytest.approx(report["ce_clean"], abs=1e-6)
    assert found["ce_reconstruction"] == pytest.approx(report["ce_spliced"], abs=1e-6)
    assert found["ce_with_both"] == pytest.approx(found["ce_clean"], abs=1e-6)

    def ce(part: str) -> float:
        def replace(x: Tensor) -> Tensor:
            new, linear = x.clone(), parts.linear_error(x).float()
            new[:, 2:] = (sae(x) + linear if part == "linear" else x - linear)[:, 2:]
            return new

        with torch.no_grad(), hooks.interventions(bridge, {HOOK: replace}):
            log_probs = bridge(tokens).double().log_softmax(-1)[:, 2:-1]
        return float(-log_probs.gather(-1, tokens[:, 3:, None]).mean())

    assert found["ce_with_linear"] == pytest.approx(ce("linear"), abs=1e-5)
    assert found["ce_with_nonlinear"] == pytest.approx(ce("nonlinear"), abs=1e-5)
    rise = found["ce_rise"]
    assert rise == pytest.approx(found["ce_reconstruction"] - found["ce_clean"], abs=1e-6) and abs(rise) > 1e-3
    assert found["linear_share"] == pytest.approx((found["ce_with_nonlinear"] - found["ce_clean"]) / rise, rel=1e-3)
    assert found["nonlinear_restored"] == pytest.approx(1 - found["linear_share"], abs=1e-5)
    assert found["linear_restored"] == pytest.approx(1 - found["nonlinear_share"], abs=1e-5)
    estimate = found.interval("nonlinear_share").estimate
    assert float(estimate) == pytest.approx(found["nonlinear_share"], rel=1e-3)
    x = token_rows(bridge, tokens, HOOK).values
    x = x.reshape(*tokens.shape, -1)[:, 2:]
    linear = parts.linear_error(x)
    rest = x.double() - sae(x).detach().double() - linear
    squares = [float(part.square().sum()) for part in (linear, rest)]
    assert found["linear_norm_share"] == pytest.approx(squares[0] / sum(squares), abs=1e-5)
    assert [trace.name for trace in found.plot().data] == ["the error's part", "random, as long"]


def test_random_vectors_are_as_long_as_the_parts() -> None:
    x, rebuilt, linear, random = (draws(3, 5, 8, seed=i).double() for i in range(4))
    random = random / random.norm(dim=-1, keepdim=True)
    rest = x - rebuilt - linear
    for name, part in (("random_linear", linear), ("random_nonlinear", rest)):
        moved = x - _replacement(name, x, rebuilt, linear, rest, random)
        assert torch.allclose(moved.norm(dim=-1), part.norm(dim=-1))
    assert torch.allclose(_replacement("with_both", x, rebuilt, linear, rest, random), x)


def test_a_dictionary_is_trained_on_the_error() -> None:
    planted = PlantedError(linear=0.2, nonlinear=0.1, hook=HOOK)
    sae = planted.dictionary()
    x = planted.sample(2000, seed=1)[0]
    parts = dark_matter(sae, planted.sample(4000)[0], codes=("encoder",))
    found = {
        part: error_source(sae, x, part=part, parts=parts).tensors[HOOK] for part in ("all", "linear", "nonlinear")
    }
    assert torch.allclose(found["linear"] + found["nonlinear"], found["all"], atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(found["all"], x - sae(x), atol=1e-6)
    settings = {"architecture": "topk", "n_latents": 64, "k": 8, "hook": HOOK, "decoder_norm": 1.0}
    config = TrainingConfig(settings, n_steps=150, batch_size=256, learning_rate=3e-3, log_every=150)
    trained = train(config, error_source(sae, x))
    before, error = TopKSAE(planted.width, 64, k=8, hook=HOOK, decoder_norm=1.0), found["all"]
    with torch.no_grad():
        left, at_first = (float((error - d(error)).square().sum()) for d in (trained, before))
        assert left < 0.6 * float(error.square().sum()) and left < at_first


def test_what_earlier_activations_say_of_the_error() -> None:
    planted = PlantedError(linear=0.1, nonlinear=0.2)
    sae = planted.dictionary()
    x, linear, rest = planted.sample(6000)
    cause = rest @ draws(planted.width, planted.width, seed=1)  # all that x does not tell
    found = earlier_layer_prediction(sae, x, {"cause": cause, "noise": draws(6000, 20, seed=2)})
    numbers = found.values
    expected = dark_matter(sae, x, codes=("encoder",))
    assert float(numbers.sel(predictor="x", metric="error_r2")) == pytest.approx(expected["error_r2"], abs=1e-5)
    assert float(numbers.sel(predictor="x", metric="fvu_left")) == pytest.approx(expected["fvu_nonlinear"], abs=1e-5)
    assert float(numbers.sel(predictor="cause", metric="error_r2")) == pytest.approx(2 / 3, abs=0.03)
    assert float(numbers.sel(predictor="cause", metric="nonlinear_r2")) > 0.999
    assert abs(float(numbers.sel(predictor="noise", metric="nonlinear_r2"))) < 0.02
    assert (numbers.sel(metric="shuffled_r2") < 0.01).all()
    assert np.isnan(float(numbers.sel(predictor="x", metric="nonlinear_r2")))
    assert [trace.name for trace in found.plot().data] == ["of the error", "of what x leaves"]
    bridge, tokens = tiny_bridge("gpt2"), torch.randint(3, 60, (30, 12), generator=torch.Generator().manual_seed(0))
    rows, below = (token_rows(bridge, tokens, f"blocks.{layer}.hook_mlp_out") for layer in (1, 0))
    real = TopKSAE(D_MODEL, 64, k=6, hook=HOOK, decoder_norm=1.0)
    assert earlier_layer_prediction(real, rows, {"below": below}).provenance["split"] == "documents"
    other = token_rows(bridge, tokens.flip(0), HOOK)
    with pytest.raises(ValueError, match=r"earlier\['below'\] has rows of other tokens"):
        earlier_layer_prediction(real, rows, {"below": other})


def test_errors_across_widths() -> None:
    x = draws(1500, 12) * torch.linspace(0.5, 2, 1500)[torch.randperm(1500, generator=torch.Generator())][:, None]
    saes = {str(n): TopKSAE(12, n, k=4, decoder_norm=1.0) for n in (16, 32, 64)}
    found = error_scaling({**saes, "64 again": saes["64"]}, x)
    for name, sae in saes.items():
        alone = dark_matter(sae, x, codes=("encoder",))
        for metric in ("fvu", "fvu_linear", "fvu_nonlinear", "l0"):
            assert float(found.values.sel(dictionary=name, metric=metric)) == pytest.approx(alone[metric], abs=1e-6)
        square = alone.per_token.sel(code="encoder", quantity="error").values
        assert np.allclose(found.per_token.sel(dictionary=name).values ** 2, square, rtol=1e-4)
    assert float(found.norm_r2.sel(predictor="64", dictionary="64 again")) == pytest.approx(1, abs=1e-6)
    assert float(found.norm_r2.sel(predictor="16", dictionary="64")) > 0.5  # large tokens are missed by more
    assert 0.5 < float(found.norm_r2.sel(predictor="|x|", dictionary="16")) < 1
    three = error_scaling(saes, x)
    fvu = np.log(three.values.sel(metric="fvu").values.astype(float))
    width = np.log([16.0, 32.0, 64.0])
    by_hand = ((width - width.mean()) * (fvu - fvu.mean())).sum() / ((width - width.mean()) ** 2).sum()
    assert three.slope("fvu") == pytest.approx(by_hand, abs=1e-5) and abs(by_hand) > 0.1
    assert list(three.plot().data[0].x) == ["16", "32", "64"]


def test_messages() -> None:
    sae, x = TopKSAE(16, 32, k=3, hook=HOOK), draws(100, 16)
    transcoder = TopKSAE(16, 32, k=3, hook="a", target_hook="b")
    with pytest.raises(ValueError, match="transcoder to 'b'"):
        dark_matter(transcoder, x)
    with pytest.raises(ValueError, match="transcoder to 'b'"):
        gradient_pursuit(transcoder, x)
    with pytest.raises(ValueError, match="12 wide and the dictionary 16"):
        dark_matter(sae, x[:, :12])
    with pytest.raises(ValueError, match="17 tokens to fit 16 inputs.*ridge"):
        dark_matter(sae, x[:34])
    with pytest.raises(ValueError, match="test_fraction=1.5"):
        dark_matter(sae, x, test_fraction=1.5)
    with pytest.raises(ValueError, match="1 documents"):
        dark_matter(sae, x, documents=torch.zeros(100, dtype=torch.long))
    with pytest.raises(ValueError, match="documents has 3 entries"):
        dark_matter(sae, x, documents=torch.arange(3))
    with pytest.raises(ValueError, match="baselines\\['loss'\\] has shape"):
        dark_matter(sae, x, baselines={"loss": torch.zeros(3)})
    with pytest.raises(ValueError, match="expected some of encoder, rescaled, gradient pursuit"):
        dark_matter(sae, x, codes=())
    found = dark_matter(sae, x, codes=("encoder",))
    with pytest.raises(KeyError, match="'fvuu' was not measured"):
        found["fvuu"]
    with pytest.raises(KeyError, match="'rescaled' was not measured"):
        found.get("fvu", "rescaled")
    with pytest.raises(ValueError, match="no interval over documents for 'norm_r2'"):
        found.interval("norm_r2")
    with pytest.raises(ValueError, match="pass parts="):
        error_source(sae, x, part="linear")
    with pytest.raises(ValueError, match="k=-1"):
        gradient_pursuit(sae, x, -1)
    with pytest.raises(ValueError, match="k has shape"):
        gradient_pursuit(sae, x, torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="1 dictionaries"):
        error_scaling({"one": sae}, x)
    with pytest.raises(ValueError, match="expected one hook for all"):
        error_scaling({"one": sae, "other": TopKSAE(16, 32, k=3, hook="there")}, x)
    with pytest.raises(ValueError, match="a slope needs two widths"):
        error_scaling({"one": sae, "same": sae}, x).slope()
    with pytest.raises(ValueError, match="none called 'x'"):
        earlier_layer_prediction(sae, x, {})
    with pytest.raises(ValueError, match="has 3 rows"):
        earlier_layer_prediction(sae, x, {"early": x[:3]})
    with pytest.raises(ValueError, match="nonlinear=-1"):
        PlantedError(nonlinear=-1)
    bridge, tokens, own, parts = spliceable("llama")
    with pytest.raises(ValueError, match="parts are those of a dictionary with 32 latents"):
        error_ce_shares(bridge, own, tokens, found)
    with pytest.raises(ValueError, match="no two neighbouring"):
        error_ce_shares(bridge, own, tokens, parts, keep=torch.zeros_like(tokens, dtype=torch.bool))
    shares = error_ce_shares(bridge, own, tokens, parts)
    with pytest.raises(ValueError, match="no interval over texts for 'linear_norm_share'"):
        shares.interval("linear_norm_share")
