"""Batches depend on the seed and their number alone; planted data are what they say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp.cache import capture
from interp.dictionaries.planted import PlantedSource, recovery
from interp.dictionaries.sources import LiveSource, StoreSource, TensorSource, as_source
from interp.hooks import hook_name, interventions, no_retained_graph
from tests.helpers import D_MODEL, FAMILIES, tiny_bridge, tiny_tokens

HOOKS = ("blocks.1.hook_mlp_out", "blocks.0.hook_resid_post")


def take(source: Any, n: int, start: int = 0, size: int = 6, seed: int = 2) -> list[dict[str, torch.Tensor]]:
    return [dict(batch) for batch in itertools.islice(source.batches(size, seed=seed, start=start), n)]


def sources(tmp_path: Path) -> dict[str, Any]:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens().repeat(3, 1)
    store = interp.cache.harvest(bridge, tokens, list(HOOKS), tmp_path / "store", batch_size=2)
    x = torch.randn(40, 3, 2, generator=torch.Generator().manual_seed(0))
    return {
        "tensors": TensorSource({"a": x, "b": x[:, :, 0]}),
        "store": StoreSource(store, HOOKS),
        "live": LiveSource(bridge, tokens, HOOKS, texts_per_buffer=2),
        "planted": PlantedSource(width=5, n_features=7, density=0.5),
    }


def test_batches_go_on_where_they_stopped(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        whole, rest = take(source, 9), take(source, 4, start=5)
        for a, b in zip(whole[5:], rest, strict=True):
            assert set(a) == set(source.hooks) and all(torch.equal(a[hook], b[hook]) for hook in a), name
        other = take(source, 1, seed=3)[0]
        assert not torch.equal(other[source.hooks[0]], whole[0][source.hooks[0]]), name
        assert all(tensor.ndim == 2 and len(tensor) == 6 for batch in whole for tensor in batch.values()), name
        assert source.describe() == source.describe()


def test_every_row_comes_once_per_epoch() -> None:
    x = torch.arange(20.0)[:, None]
    epochs = torch.cat([batch["a"] for batch in take(TensorSource({"a": x}), 10, size=4)]).reshape(2, 20)
    assert all(sorted(epoch.tolist()) == list(range(20)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_live_rows_are_the_models_own_without_the_first_position() -> None:
    bridge, tokens = tiny_bridge("llama"), tiny_tokens()
    found = interp.cache.capture(bridge, tokens, list(HOOKS))
    source = LiveSource(bridge, tokens, HOOKS, texts_per_buffer=len(tokens))
    n = len(tokens) * (tokens.shape[1] - 1)
    batch = take(source, 1, size=n)[0]
    rows = {name: value[:, 1:].reshape(-1, D_MODEL) for name, value in found.items()}
    match = (batch[HOOKS[0]][:, None] - rows[HOOKS[0]]).abs().sum(-1).argmin(1)
    assert sorted(match.tolist()) == list(range(n))
    for hook in HOOKS:  # both hooks in the same order
        assert torch.allclose(batch[hook], rows[hook][match], atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ["mlp_out", "resid_mid", "resid_post", "z"])
def test_live_gradients_are_those_of_the_summed_losses(family: str, site: Any) -> None:
    """Against what an edit h -> h + delta does to the losses, differentiated at delta = 0."""
    bridge, tokens = tiny_bridge(family, dtype=torch.float64), tiny_tokens(3, 7)
    if family == "neox" and site == "resid_mid":
        pytest.skip("parallel blocks have no stream between attention and MLP")
    hook = hook_name(site, 1)
    source = LiveSource(bridge, tokens, (hook,), texts_per_buffer=3, gradient_of=hook, texts_per_backward=2)
    shape = capture(bridge, tokens, hook)[hook].shape
    delta = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    with interventions(bridge, {hook: lambda h: h + delta}), torch.enable_grad(), no_retained_graph(bridge):
        losses = -bridge(tokens)[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
        expected = torch.autograd.grad(losses.sum(), delta)[0][:, 1:].flatten(0, 1).flatten(1)
    plain = take(LiveSource(bridge, tokens, (hook,), texts_per_buffer=3), 1, size=18)[0]
    batch = take(source, 1, size=18)[0]
    assert set(batch) == {hook, "gradient"} and torch.equal(batch[hook], plain[hook])
    rows = capture(bridge, tokens, hook)[hook][:, 1:].flatten(0, 1).flatten(1).float()
    order = (batch[hook][:, None] - rows).abs().sum(-1).argmin(1)  # which token each row of the batch is
    assert sorted(order.tolist()) == list(range(18))
    torch.testing.assert_close(batch["gradient"], expected[order].float(), rtol=1e-5, atol=1e-6)
    assert float(expected.abs().max()) > 1e-3
    assert all(p.grad is None for p in bridge.parameters()) and not any(p.requires_grad for p in bridge.parameters())


def test_what_cannot_be_a_source_is_refused(tmp_path: Path) -> None:
    found = sources(tmp_path)
    with pytest.raises(ValueError, match="blocks.0.hook_attn_out is not among them"):
        as_source(found["store"].store, "blocks.0.hook_attn_out", None)
    with pytest.raises(ValueError, match="same number"):
        TensorSource({"a": torch.zeros(3, 2), "b": torch.zeros(4, 2)})
    with pytest.raises(ValueError, match="expected floats"):
        TensorSource({"a": torch.zeros(3, 2).long()})
    with pytest.raises(ValueError, match="nothing would be left"):
        LiveSource(tiny_bridge("llama"), tiny_tokens(), HOOKS, skip_first=tiny_tokens().shape[1])
    with pytest.raises(ValueError, match="give no batch of 1000"):
        take(found["live"], 1, size=1000)
    live = {"bridge": tiny_bridge("llama"), "tokens": tiny_tokens(), "names": HOOKS}
    with pytest.raises(KeyError, match="hook_nothing"):
        LiveSource(**live, gradient_of="blocks.0.hook_nothing")
    with pytest.raises(ValueError, match="texts_per_backward=0"):
        LiveSource(**live, gradient_of=HOOKS[0], texts_per_backward=0)
    with pytest.raises(ValueError, match="predict nothing"):
        LiveSource(tiny_bridge("llama"), tiny_tokens(2, 1), HOOKS, skip_first=0, gradient_of=HOOKS[0])
    with pytest.raises(ValueError, match="scales has 2 values"):
        PlantedSource(scales=(1.0, 1.0))
    with pytest.raises(ValueError, match="one chance"):
        PlantedSource(density=0.0)


def test_planted_data_are_what_they_say() -> None:
    source = PlantedSource(width=16, n_features=24, density=0.1, amplitudes=(0.5, 1.5), seed=3)
    x, strengths = source.sample(20_000)
    assert torch.allclose(x, strengths @ source.features, atol=1e-6)
    assert torch.allclose(source.features.norm(dim=1), torch.ones(24), atol=1e-6)
    on = strengths[strengths > 0]
    assert float((strengths > 0).float().mean()) == pytest.approx(0.1, abs=0.003)
    assert float(on.min()) >= 0.5 and float(on.max()) <= 1.5 and float(on.mean()) == pytest.approx(1.0, abs=0.01)
    noisy = PlantedSource(width=16, n_features=24, density=0.1, noise=0.2, seed=3).sample(20_000)
    assert float((noisy[0] - noisy[1] @ source.features).std()) == pytest.approx(0.2, rel=0.02)


def test_recovery_by_hand(unchecked: None) -> None:
    true = torch.eye(4)
    assert recovery(-3 * true[[2, 0, 1, 3]], true) == {"mmcs": 1.0, "recovered": 1.0, "mcc": 1.0, "unique": 1.0}
    found = torch.tensor([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 0, 3.0, 4.0]])
    scores = recovery(found, true)
    assert scores["mmcs"] == pytest.approx((1 + 0 + 0.6 + 0.8) / 4)
    assert scores["mcc"] == pytest.approx((1 + 0 + 0.8) / 3) and scores["recovered"] == 0.25
    with pytest.raises(ValueError, match="cannot be compared"):
        recovery(found, true[:, :3])
