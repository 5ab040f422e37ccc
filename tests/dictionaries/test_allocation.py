"""Budgets are spent exactly and on the best entries, along each axis; sparse products equal dense ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from interp.dictionaries import _sparse
from interp.dictionaries.allocation import Active, density_quotas, per_batch, per_latent, per_token


def scores(n: int, n_latents: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, n_latents, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mask(active: Active, shape: torch.Size) -> Tensor:
    found = torch.zeros(shape, dtype=torch.long)
    found.index_put_((active.tokens, active.latents), torch.ones(len(active.tokens), dtype=torch.long), accumulate=True)
    return found


sizes = st.tuples(st.integers(1, 7), st.integers(1, 9), st.integers(0, 10**6))


@given(sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_each_axis_takes_the_best_entries(size: tuple[int, int, int], data: st.DataObject) -> None:
    n, h, seed = size
    s = scores(n, h, seed)
    k = data.draw(st.integers(1, h))
    budget = data.draw(st.integers(0, n * h))
    quotas = torch.tensor(data.draw(st.lists(st.integers(0, n), min_size=h, max_size=h)))
    by_token, by_batch, by_latent = (
        mask(a, s.shape) for a in (per_token(s, k), per_batch(s, budget), per_latent(s, quotas))
    )
    for found, counts, dim in ((by_token, torch.full((n,), k), 1), (by_latent, quotas, 0)):
        assert torch.equal(found.sum(dim), counts)
        lowest = torch.where(found.bool(), s, torch.inf).amin(dim)
        highest = torch.where(found.bool(), -torch.inf, s).amax(dim)
        assert bool((lowest >= highest).all())
    assert int(by_batch.sum()) == budget and int(by_batch.max()) <= 1
    if 0 < budget < n * h:
        assert float(s[by_batch.bool()].min()) > float(s[~by_batch.bool()].max())


def test_entries_come_in_order_of_tokens() -> None:
    s = scores(5, 6)
    for active in (per_token(s, 2), per_batch(s, 9), per_latent(s, torch.tensor([3, 0, 1, 5, 2, 2]))):
        assert bool((active.tokens.diff() >= 0).all())


@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 10**6), st.data())
@settings(max_examples=60, deadline=None)
def test_quotas_add_up_and_follow_the_densities(h: int, n: int, seed: int, data: st.DataObject) -> None:
    budget = data.draw(st.integers(0, h * n))
    density = torch.rand(h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    quotas = density_quotas(density, budget, n)
    assert int(quotas.sum()) == budget
    assert int(quotas.max()) <= n and int(quotas.min()) >= (1 if budget >= h else 0)
    order = density.argsort()
    assert bool((quotas[order].diff() >= -1).all())  # in proportion, to rounding


def test_quotas_in_proportion_where_nothing_binds() -> None:
    assert density_quotas(torch.tensor([0.4, 0.1, 0.3, 0.2]), 100, 1000).tolist() == [40, 10, 30, 20]
    assert density_quotas(torch.tensor([0.9, 0.0, 0.1]), 20, 10).tolist() == [10, 1, 9]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: per_token(s, 0), "k=0; expected 1 to 6"),
        (lambda s: per_batch(s, 31), "budget=31; expected 0 to 30"),
        (lambda s: per_latent(s, torch.tensor([1, 1, 1])), "one per latent"),
        (lambda s: per_latent(s, torch.tensor([6, 1, 1, 1, 1, 1])), "number of tokens"),
        (lambda s: density_quotas(s[0].abs(), 31, 5), "hold 0 to 30"),
    ],
)
def test_what_cannot_be_spent_is_refused(call, message: str, unchecked: None) -> None:
    with pytest.raises(ValueError, match=message):
        call(scores(5, 6))


def test_active_entries_equal_the_dense_product_forward_and_backward() -> None:
    """Also latents and tokens without any active entry."""
    n, d, h = 6, 4, 8
    x, W, b, rows = scores(n, d, 1), scores(d, h, 2), scores(1, h, 3)[0], scores(h, 5, 4)
    tokens, latents = torch.tensor([0, 0, 2, 2, 2, 5]), torch.tensor([1, 4, 1, 6, 0, 4])
    weights = scores(n, 5, 5)
    found = []
    for sparse in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, W, b, rows)]
        xs, Ws, bs, rs = leaves
        dense = xs @ Ws + bs
        if sparse:
            active = Active(tokens, latents)
            values = _sparse.active_preactivations(xs, Ws, bs, dense.detach(), active)
            out = _sparse.decode_active(values, active, n, rs)
        else:
            kept = torch.zeros(n, h, dtype=torch.float64)
            kept[tokens, latents] = 1
            out = (dense * kept) @ rs
        (out * weights).sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for a, b_ in zip(*found, strict=True):
        assert torch.allclose(a, b_, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x_, W_, b_: _sparse.active_preactivations(
            x_, W_, b_, (x_ @ W_ + b_).detach(), Active(tokens, latents)
        ).square(),
        (x.requires_grad_(), W.requires_grad_(), b.requires_grad_()),
    )
