"""What all dictionaries share, and what sets each apart: planted answers, identities, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from interp.dictionaries.architectures import ARCHITECTURES, build
from interp.dictionaries.batch_topk import BatchTopKSAE
from interp.dictionaries.dictionary import Dictionary
from interp.dictionaries.feature_choice import FeatureChoiceSAE
from interp.dictionaries.gradient_sae import GradientSAE
from interp.dictionaries.jumprelu import JumpReLUSAE
from interp.dictionaries.matryoshka import MatryoshkaSAE, prefix_widths
from interp.dictionaries.mutual_choice import MutualChoiceSAE, zipf_fit, zipf_shortfall
from interp.dictionaries.relu import ReLUSAE
from interp.dictionaries.topk import TopKSAE

D_IN, D_OUT, H, N, K = 6, 5, 12, 40, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "batch_topk": {"k": 2.5},
    "matryoshka": {"k": K, "widths": [3, 6, H]},
    "mutual_choice": {"k": K},
    "feature_choice": {"k": K},
    "gradient": {"k": K},
}


def data(seed: int = 0, width: int = D_IN, n: int = N) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def extra(dictionary: Dictionary, n: int = N) -> dict[str, Any]:
    return {"gradient": data(9, dictionary.d_out, n)} if isinstance(dictionary, GradientSAE) else {}


def make(architecture: str, **options: Any) -> Dictionary:
    """With random parameters, and ready for inference."""
    dictionary = ARCHITECTURES[architecture](D_IN, H, **{**OPTIONS.get(architecture, {}), **options})
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in dictionary.named_parameters():
            noise = 0.4 * torch.randn(parameter.shape, generator=draws)
            parameter.add_(noise.abs() if name == "threshold" else noise)
        dictionary.renormalise()
    targets = data(1, D_OUT) if dictionary.is_transcoder else None
    dictionary.estimate_normalisation(data(), targets)
    dictionary.step(data(), targets, **extra(dictionary))
    return dictionary


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {"normalisation": "mean_norm"},
        {"normalisation": "mean_square", "decoder": "unit"},
        {"normalisation": "mean_norm", "decoder": "rescaled"},
        {
            "normalisation": "mean_norm",
            "target_hook": "blocks.0.hook_mlp_out",
            "hook": "x",
            "d_out": D_OUT,
            "skip": True,
        },
    ],
)
def test_folding_keeps_latents_and_reconstructions(architecture: str, options: dict[str, Any]) -> None:
    if options.get("decoder") == "rescaled" and architecture in ("gated", "jumprelu"):
        with pytest.raises(ValueError, match="rescaled"):
            make(architecture, **options)
        return
    dictionary = make(architecture, **options)
    before = {name: value.clone() for name, value in dictionary.state_dict().items()}
    folded = dictionary.folded()
    assert folded.normalisation == "none" and type(folded) is type(dictionary)
    assert not torch.allclose(folded.W_dec, dictionary.W_dec)
    x = data(5)
    assert torch.allclose(folded.encode(x), dictionary.encode(x), rtol=0, atol=1e-5)
    assert torch.allclose(folded(x), dictionary(x), rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], value) for name, value in dictionary.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_settings_build_the_same_dictionary(architecture: str) -> None:
    options = {"hook": "blocks.1.hook_mlp_out", "normalisation": "mean_norm", "seed": 4}
    first = ARCHITECTURES[architecture](D_IN, H, **OPTIONS.get(architecture, {}), **options)
    again = build(first.settings())
    assert type(again) is type(first) and again.settings() == first.settings()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = build({**first.settings(), "seed": 5})
    assert not torch.equal(other.W_dec, first.W_dec)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_lowers_its_own_loss_along_the_gradient(architecture: str) -> None:
    """A small step against the gradient: the loss falls by about the step times the squared gradient.

    Without what is detached on purpose: the gate's decoder, and the residual of the Zipf loss.
    """
    attached = {"gated": {"detach_decoder": False}, "mutual_choice": {"zipf_coefficient": 0}}
    attached["feature_choice"] = attached["mutual_choice"]
    dictionary = make(architecture, **attached.get(architecture, {})).double()
    x = data().double()
    named = {name: p for name, p in dictionary.named_parameters() if name != "threshold"}  # an estimate, no gradient
    step = dictionary.step(x, **extra(dictionary))
    gradients = torch.autograd.grad(step.loss, list(named.values()), allow_unused=True)
    size = 1e-7
    squared = sum(float(g.square().sum()) for g in gradients if g is not None)
    with torch.no_grad():
        for p, g in zip(named.values(), gradients, strict=True):
            if g is not None:
                p.sub_(size * g)
    fallen = float((step.loss - dictionary.step(x, **extra(dictionary)).loss).detach())
    assert fallen == pytest.approx(size * squared, rel=1e-2)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm"])
def test_normalisation_by_token_is_undone(normalisation: str) -> None:
    dictionary = make("relu", normalisation=normalisation)
    x = data(2)
    rebuilt = dictionary(x)
    moved = dictionary(7 * x + (3 if normalisation == "layer_norm" else 0))
    assert torch.allclose(moved, 7 * rebuilt + (3 if normalisation == "layer_norm" else 0), atol=1e-3)
    with pytest.raises(ValueError, match="pass the inputs"):
        dictionary.decode(dictionary.encode(x))


def test_normalising_constants() -> None:
    x = data(2)
    for normalisation, of in (
        ("mean_norm", lambda z: z.norm(dim=1).mean()),
        ("mean_square", lambda z: z.square().sum(1).mean()),
    ):
        dictionary = make("relu", normalisation=normalisation)
        dictionary.estimate_normalisation(x)
        found = float(of(dictionary._normalised(x)))
        assert found == pytest.approx(D_IN**0.5 if normalisation == "mean_norm" else 1.0, rel=1e-5)


def test_a_unit_decoder_stays_one() -> None:
    dictionary = make("topk", decoder="unit")
    dictionary.step(data()).loss.backward()
    dictionary.project_gradient()
    assert dictionary.W_dec.grad is not None
    assert float((dictionary.W_dec.grad * dictionary.W_dec.detach()).sum(1).abs().max()) < 1e-5
    assert float(dictionary.W_dec.grad.abs().max()) > 1e-3
    with torch.no_grad():
        dictionary.W_dec.sub_(0.1 * dictionary.W_dec.grad)
    dictionary.renormalise()
    assert torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(H))


def test_rescaled_latents_do_not_depend_on_the_decoders_length() -> None:
    dictionary = make("topk", decoder="rescaled")
    x, factors = data(2), torch.linspace(0.5, 2, H)
    latents, rebuilt = dictionary.encode(x), dictionary(x)
    with torch.no_grad():
        dictionary.W_dec.mul_(factors[:, None])
        dictionary.W_enc.div_(factors)
        dictionary.b_enc.div_(factors)
    assert torch.allclose(dictionary.encode(x), latents, atol=1e-5)
    assert torch.allclose(dictionary(x), rebuilt, atol=1e-5)


def test_relu_by_hand() -> None:
    dictionary = make("relu", coefficient=0.7)
    x = data(2)
    f = ((x - dictionary.b_dec) @ dictionary.W_enc + dictionary.b_enc).relu()
    rebuilt = f @ dictionary.W_dec + dictionary.b_dec
    loss = (x - rebuilt).square().sum(1).mean() + 0.7 * (f * dictionary.W_dec.norm(dim=1)).sum(1).mean()
    step = dictionary.step(x)
    assert float(step.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert step.l0 == float((f > 0).sum()) / N
    assert float(dictionary.step(x, coefficient=0).loss.detach()) == pytest.approx(
        float((x - rebuilt).detach().square().sum(1).mean()), rel=1e-5
    )


def test_the_threshold_is_exceeded_strictly() -> None:
    dictionary = make("jumprelu")
    with torch.no_grad():
        dictionary.get_parameter("threshold").fill_(1.0)
    pre = torch.full((1, H), 1.0)
    assert not dictionary.activate(pre).any()
    assert bool((dictionary.activate(pre + 1e-6) > 1).all())


def test_the_share_that_can_be_learned() -> None:
    dictionary = JumpReLUSAE(D_IN, H, bandwidth=0.2, threshold_start=0.3)
    pre = dictionary.preactivations(data())
    assert dictionary.learnable_share(data()) == pytest.approx(float(((pre > 0.2) & (pre < 0.4)).float().mean()))


def test_batch_budgets_are_exact_and_their_threshold_gives_the_same_l0() -> None:
    """A6: k times n entries; at inference, with the threshold, within 10 % of k."""
    for cls in (BatchTopKSAE, MutualChoiceSAE):
        dictionary = cls(D_IN, 64, k=4, seed=1)
        for seed in range(60):
            x = data(seed, n=256)
            step = dictionary.step(x)
            assert step.l0 <= 4 and len(dictionary.choose(dictionary.preactivations(x)).tokens) == 4 * 256
        l0 = float((dictionary.encode(data(99, n=4096)) > 0).sum()) / 4096
        assert abs(l0 - 4) < 0.4


def test_feature_choice_gives_every_latent_its_quota() -> None:
    dictionary = FeatureChoiceSAE(D_IN, 16, k=2, exponent=1.0)
    active = dictionary.choose(dictionary.preactivations(data(n=80)))
    counts = torch.bincount(active.latents, minlength=16)
    assert torch.equal(counts, dictionary.quotas(80)) and int(counts.sum()) == 160
    assert bool((counts.diff() <= 0).all()) and int(counts[0]) > 3 * int(counts[-1])
    flat = FeatureChoiceSAE(D_IN, 16, k=2)
    assert set(flat.quotas(80).tolist()) == {10}
    flat.fit_quotas(torch.tensor([0.5 / rank for rank in range(16, 0, -1)]))
    assert flat.quotas(80).argmax() == 15


def test_feature_choice_thresholds_are_the_lowest_values_taken() -> None:
    dictionary = FeatureChoiceSAE(D_IN, H, k=K)
    with pytest.raises(ValueError, match="no threshold"):
        dictionary.encode(data())
    x = data()
    dictionary.step(x)
    pre = dictionary.preactivations(x).detach()
    active = dictionary.choose(pre)
    for latent in range(H):
        taken = pre[active.tokens[active.latents == latent], latent]
        expected = float(taken[taken > 0].min()) if bool((taken > 0).any()) else float("inf")
        assert float(dictionary.threshold[latent]) == pytest.approx(expected)


def test_the_zipf_curve_and_who_falls_below_it() -> None:
    curve = 0.3 / torch.arange(1, 21, dtype=torch.float64) ** 1.2
    assert torch.allclose(zipf_fit(curve.flip(0)), curve.flip(0), rtol=1e-9)
    assert float(zipf_shortfall(curve).abs().max()) < 1e-9
    short = curve.clone()
    short[7] = 0
    weights = zipf_shortfall(short)
    assert float(weights[7]) == 1 and float(weights[:7].max()) < 0.2


def test_the_zipf_loss_reaches_latents_below_the_curve() -> None:
    dictionary = MutualChoiceSAE(D_IN, H, k=1)
    dictionary.density.copy_(torch.tensor([0.2] * (H - 1) + [0.0]))
    with torch.no_grad():
        dictionary.b_enc[-1] = 0.5
        dictionary.W_enc[:, -1] = 0
    step = dictionary.step(data())
    assert not bool(step.fired[-1]) or float(step.terms["aux"].detach()) > 0
    gradient = torch.autograd.grad(step.terms["aux"], dictionary.W_dec)[0]
    assert float(gradient[-1].abs().max()) > 0 and float(gradient[:-1].abs().max()) < float(gradient[-1].abs().max())
    assert "aux" not in MutualChoiceSAE(D_IN, H, k=1, zipf_coefficient=0).step(data()).terms


def test_the_gradient_decides_between_latents_and_beta_zero_is_topk() -> None:
    """A7: with beta = 0 bit-identical to TopK."""
    x, gradient = data(), torch.zeros(N, D_IN)
    plain, zero = TopKSAE(D_IN, H, k=K), GradientSAE(D_IN, H, k=K, beta=0)
    a, b = plain.step(x), zero.step(x, gradient=data(7))
    assert torch.equal(a.loss, b.loss) and torch.equal(a.fired, b.fired)
    strong = GradientSAE(D_IN, H, k=1, beta=1e6)
    assert torch.equal(strong.step(x, gradient=gradient).fired, TopKSAE(D_IN, H, k=1).step(x).fired)
    gradient += strong.W_dec[4].detach()  # a downstream that cares for one direction
    pre = strong.preactivations(x).detach()
    scores = pre + 1e6 * pre * (gradient @ strong.W_dec.detach().T).abs()
    assert strong.step(x, gradient=gradient).fired.nonzero()[:, 0].tolist() == sorted(set(scores.argmax(1).tolist()))
    with pytest.raises(ValueError, match="gradient="):
        strong.step(x)
    with pytest.raises(ValueError, match="that of the target"):
        strong.step(x, gradient=gradient[:, :-1])


def test_prefixes_are_compared_one_by_one() -> None:
    dictionary = make("matryoshka")
    assert isinstance(dictionary, MatryoshkaSAE)
    x = data(2)
    step = dictionary.step(x)
    pre = dictionary.preactivations(x).detach()
    f = torch.zeros_like(pre)
    active = dictionary.choose(pre)
    f[active.tokens, active.latents] = pre.relu()[active.tokens, active.latents]
    errors = [(x - f[:, :w] @ dictionary.W_dec[:w] - dictionary.b_dec).square().sum(1).mean() for w in (3, 6, H)]
    assert float(step.loss.detach()) == pytest.approx(float(sum(errors).detach()), rel=1e-5)
    dictionary.average = True
    assert float(dictionary.step(x).loss.detach()) == pytest.approx(float(sum(errors).detach()) / 3, rel=1e-5)
    assert prefix_widths(128) == [4, 12, 28, 60, 128]


def test_a_transcoder_rebuilds_another_hook() -> None:
    options = {"hook": "a", "target_hook": "b", "d_out": D_OUT, "skip": True}
    dictionary = make("topk", **options)
    assert dictionary.is_transcoder and not dictionary.subtract_bias
    x, y = data(2), data(3, D_OUT)
    assert dictionary(x).shape == (N, D_OUT)
    rebuilt = dictionary.encode(x) @ dictionary.W_dec + dictionary.b_dec + x @ dictionary.get_parameter("W_skip").T
    assert torch.allclose(dictionary(x), rebuilt, atol=1e-5)
    step = dictionary.step(x, y)
    assert float(step.loss.detach()) == pytest.approx(float((y - rebuilt).detach().square().sum(1).mean()), rel=1e-4)
    with pytest.raises(ValueError, match="needs targets"):
        dictionary.step(x)
    with pytest.raises(ValueError, match="skip connection"):
        dictionary.decode(dictionary.encode(x))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("relu", {"d_out": 3}, "target_hook"),
        ("relu", {"skip": True}, "target_hook"),
        ("relu", {"coefficient": -1}, "coefficient=-1"),
        ("relu", {"normalisation": "zscore"}, "zscore"),
        ("relu", {"decoder": "fixed"}, "fixed"),
        ("relu", {"target_hook": "b", "subtract_bias": True}, "belongs to its target"),
        ("relu", {"target_hook": "b", "normalisation": "layer_norm"}, "not those of a"),
        ("gated", {"decoder": "free"}, "with detach_decoder=False"),
        ("gated", {"decoder": "rescaled", "detach_decoder": False}, "rescaled"),
        ("topk", {"k": 2.5}, "a whole number"),
        ("topk", {"k": H + 1}, f"1 to {H}"),
        ("topk", {"aux": "best"}, "best"),
        ("batch_topk", {"threshold_rate": 0.0}, "threshold_rate"),
        ("jumprelu", {"penalty": "quadratic"}, "needs target_l0"),
        ("jumprelu", {"bandwidth": 0}, "bandwidth"),
        ("matryoshka", {"widths": [3, 6]}, f"the last being {H}"),
        ("mutual_choice", {"aux": "openai"}, "zipf_coefficient"),
        ("feature_choice", {"exponent": -1}, "exponent"),
        ("gradient", {"beta": -1}, "beta"),
    ],
)
def test_what_makes_no_sense_is_refused(
    architecture: str, options: dict[str, Any], message: str, unchecked: None
) -> None:
    with pytest.raises(ValueError, match=message):
        ARCHITECTURES[architecture](D_IN, H, **{**OPTIONS.get(architecture, {}), **options})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="there are relu, gated, topk"):
        build({"architecture": "vanilla", "d_in": 3, "n_latents": 4})
    with pytest.raises(ValueError, match="sparseness"):
        build({"architecture": "relu", "d_in": 3, "n_latents": 4, "sparseness": 1})


def test_what_needs_estimating_says_so() -> None:
    with pytest.raises(ValueError, match="estimate_normalisation"):
        ReLUSAE(D_IN, H, normalisation="mean_norm").encode(data())
    with pytest.raises(ValueError, match="no threshold"):
        BatchTopKSAE(D_IN, H, k=K).encode(data())
    with pytest.raises(ValueError, match="no sparsity penalty"):
        TopKSAE(D_IN, H, k=K).step(data(), coefficient=1.0)
